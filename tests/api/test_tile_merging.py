"""A cell that any tile border cuts is counted once: a detector that knows the truth, and errs a little, sees a wide field."""

import math
from functools import cached_property

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_bipartite_matching
from scipy.spatial import cKDTree
from torchvision.ops import box_iou

from unihema.results.smear_result import Cell
from unihema.results.tile_layout import MARGIN, lay_tiles
from unihema.results.tile_merging import merged


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
        self.side, self.rng, self.tree = side, rng, cKDTree(self.centres)

    @cached_property
    def boxes(self) -> np.ndarray:
        """Truth, xyxy `[n, 4]`, cut at the edge of the field."""
        return np.concatenate((self.centres - self.sizes / 2, self.centres + self.sizes / 2), 1).clip(0, self.side)

    def look(
        self, box: tuple[int, int, int, int], jitter: float = 0.04, missed: float = 0.0, surest: float = 1.0
    ) -> list[Cell]:
        """What is seen in a tile: cells of which three tenths or more lie in it, cut at its edge, each a little wrong."""
        left, top, right, bottom = box
        middle = (left + right) / 2, (top + bottom) / 2
        near = sorted(self.tree.query_ball_point(middle, math.hypot(right - left, bottom - top) / 2 + 1.5 * DIAMETER))
        cells = []
        for number in near:
            true = self.boxes[number] - (left, top, left, top)
            wrong = true + self.rng.normal(0, jitter * DIAMETER, 4)
            seen = np.clip(wrong, 0, (right - left, bottom - top) * 2)
            sizes, whole = seen[2:] - seen[:2], true[2:] - true[:2]
            if (sizes > 2).all() and sizes.prod() > 0.3 * whole.prod() and self.rng.random() >= missed:
                label = self.rng.choice(["neutrophil", "lymphocyte", "WBC"]) if self.white[number] else "RBC"
                cells.append(Cell(len(cells) + 1, tuple(seen), str(label), float(self.rng.uniform(0.3, surest))))
        return cells


def right(found: np.ndarray, true: np.ndarray) -> int:
    """True boxes that have a found one of their own, with an overlap of 0.5 or more."""
    rows, columns = [], []
    for start in range(0, len(true), 500):
        overlap = box_iou(torch.from_numpy(true[start : start + 500]), torch.from_numpy(found))
        row, column = np.nonzero(overlap.numpy() >= 0.5)
        rows.append(row + start)
        columns.append(column)
    rows, columns = np.concatenate(rows), np.concatenate(columns)
    graph = csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(len(true), len(found)))
    return int((maximum_bipartite_matching(graph) >= 0).sum())


def sliced(side: int) -> list:
    return lay_tiles(side, side, *TILE, round(MARGIN * DIAMETER))


def found_in_tiles(field: Field, **errors: float) -> list[Cell]:
    tiles = sliced(field.side)
    return merged(tiles, [field.look(tile.box, **errors) for tile in tiles], PARENTS, DIAMETER)


@pytest.mark.parametrize("seed", range(3))
def test_every_cell_is_counted_once_wherever_a_border_cuts_it(seed):
    field = Field(1200, 400, seed)
    cells = found_in_tiles(field)
    boxes = np.array([cell.box for cell in cells])
    # A white cell counts as one, whatever its type in each tile; where two tiles cut it, its box goes around both.
    assert len(cells) == 400 and right(boxes, field.boxes) == 400
    assert sum(cell.label != "RBC" for cell in cells) == field.white.sum()
    assert boxes.min() >= 0 and boxes.max() <= field.side


def test_what_is_unsure_and_missed_now_and_then_is_not_missed_less_along_borders():
    field = Field(2400, 1600)
    cells = found_in_tiles(field, missed=0.2, surest=0.34)
    # The union of what two tiles see would be 0.89 of them.
    assert abs(len(cells) / 1600 - 0.8) < 0.04


@pytest.mark.slow
def test_a_field_of_20_000_cells_has_the_recall_and_precision_of_small_ones():
    field = Field(8192, 20_000)
    cells = found_in_tiles(field)
    hits = right(np.array([cell.box for cell in cells]), field.boxes)
    assert hits >= 0.99 * 20_000 and hits >= 0.99 * len(cells)


def test_it_counts_no_worse_than_the_slicer_of_supervision():
    supervision = pytest.importorskip("supervision")
    field = Field(1200, 400)

    def look(part: np.ndarray):
        # The picture tells where it is from: its first pixel holds the place.
        left, top = (int(part[0, 0, axis]) for axis in (0, 1))
        cells = field.look((left, top, left + part.shape[1], top + part.shape[0]))
        return supervision.Detections(
            xyxy=np.array([cell.box for cell in cells]).reshape(-1, 4),
            confidence=np.array([cell.score for cell in cells]),
            class_id=np.array([int(cell.label == "RBC") for cell in cells], dtype=int),
        )

    y, x = np.mgrid[: field.side, : field.side]
    places = np.stack((x, y, np.zeros_like(x)), -1).astype(np.int32)
    overlap = round(2 * MARGIN * DIAMETER)
    slicer = supervision.InferenceSlicer(look, slice_wh=TILE, overlap_wh=(overlap, overlap))
    theirs = slicer(places).xyxy
    ours = np.array([cell.box for cell in found_in_tiles(field)])
    error = abs(len(ours) - 400)
    assert error <= abs(len(theirs) - 400) and right(ours, field.boxes) >= right(theirs, field.boxes)
