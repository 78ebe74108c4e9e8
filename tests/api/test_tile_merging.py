"""A cell that any tile border cuts is counted once: a detector that knows the truth, and errs a little, sees a wide field."""

import math

import numpy as np
import pytest
from PIL import Image
from torchvision.ops import box_iou

from unihema.results.smear_result import Cell
from unihema.results.tiles import MARGIN, lay_tiles, merged


DIAMETER, TILE = 40, (208, 156)
PARENTS = {"neutrophil": "WBC", "lymphocyte": "WBC"}


class Field:
    """Cells at random, some overlapping, one in fifty of them a white cell of two diameters.

    Args:
        side (`int`): Of the field, in pixels.
        number (`int`): Cells to place.
    """

    def __init__(self, side: int, number: int, seed: int = 0):
        rng = np.random.default_rng(seed)
        columns = math.ceil(math.sqrt(number))
        places = np.stack(np.meshgrid(*[np.arange(columns)] * 2), -1).reshape(-1, 2)[:number]
        self.centres = (places + 0.5 + rng.uniform(-0.22, 0.22, places.shape)) * side / columns
        self.sizes = DIAMETER * rng.uniform(0.8, 1.2, (number, 2))
        self.white = rng.random(number) < 0.02
        self.sizes[self.white] *= 2
        self.side, self.rng = side, rng

    @property
    def boxes(self) -> np.ndarray:
        """Truth, xyxy `[n, 4]`, cut at the edge of the field."""
        return np.concatenate((self.centres - self.sizes / 2, self.centres + self.sizes / 2), 1).clip(0, self.side)

    def look(self, box: tuple[int, int, int, int], jitter: float = 0.04, missed: float = 0.0) -> list[Cell]:
        """What is seen in a tile: cells of which three tenths or more lie in it, cut at its edge, each a little wrong."""
        left, top, right, bottom = box
        near = np.flatnonzero(
            ((self.centres > (left - 60, top - 60)) & (self.centres < (right + 60, bottom + 60))).all(1)
        )
        cells = []
        for number in near:
            true = self.boxes[number] - (left, top, left, top)
            wrong = true + self.rng.normal(0, jitter * DIAMETER, 4)
            seen = np.clip(wrong, 0, (right - left, bottom - top) * 2)
            sizes, whole = seen[2:] - seen[:2], true[2:] - true[:2]
            if (sizes > 2).all() and sizes.prod() > 0.3 * whole.prod() and self.rng.random() >= missed:
                label = self.rng.choice(["neutrophil", "lymphocyte", "WBC"]) if self.white[number] else "RBC"
                cells.append(Cell(len(cells) + 1, tuple(seen), str(label), float(self.rng.uniform(0.3, 1))))
        return cells


def right(found: np.ndarray, true: np.ndarray) -> int:
    """True boxes that have a found one of their own, with an overlap of 0.5 or more."""
    import torch
    from scipy.optimize import linear_sum_assignment
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import maximum_bipartite_matching

    del linear_sum_assignment
    rows, columns = [], []
    for start in range(0, len(true), 500):
        overlap = box_iou(torch.from_numpy(true[start : start + 500]), torch.from_numpy(found))
        row, column = np.nonzero(overlap.numpy() >= 0.5)
        rows.append(row + start)
        columns.append(column)
    rows, columns = np.concatenate(rows), np.concatenate(columns)
    graph = csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(len(true), len(found)))
    return int((maximum_bipartite_matching(graph) >= 0).sum())
