"""A cell that any tile border cuts is counted once: a detector that knows the truth, and errs a little, sees a wide field."""

import math
from dataclasses import replace
from functools import cached_property

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_bipartite_matching
from scipy.spatial import cKDTree
from torchvision.ops import box_iou

from unihema.results.smear_result import Cell
from unihema.results.tile_layout import MARGIN, Tile, lay_tiles
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


def sliced(side: int) -> list[Tile]:
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


def disc(box: tuple[int, int, int, int], centre: np.ndarray, radius: float) -> np.ndarray:
    """The pixels of a box that lie in a disc, bool `[h, w]`."""
    left, top, right, bottom = box
    y, x = np.mgrid[top:bottom, left:right] + 0.5
    return (x - centre[0]) ** 2 + (y - centre[1]) ** 2 <= radius**2


def boxes_around(centres: np.ndarray, width: float) -> np.ndarray:
    """Boxes of round cells, xyxy `[n, 4]`."""
    return np.concatenate((centres - width / 2, centres + width / 2), 1)


def shown(tiles: list[Tile], boxes: np.ndarray, label: str, seed: int = 0, error: float = 0.0) -> list[list[Cell]]:
    """What each tile shows of cells that are known: those of which a third or more lies in it both ways, cut at its edge.

    Args:
        tiles (`list[Tile]`): The tiles.
        boxes (`np.ndarray`): Truth, xyxy `[n, 4]`, in pixels of the image.
        label (`str`): Class of all cells.
        seed (`int`): Of the scores and the errors.
        error (`float`): Standard deviation of each side of a box, in pixels; also of a side where a tile's edge cuts it.
    """
    rng = np.random.default_rng(seed)
    found = []
    for tile in tiles:
        left, top, right, bottom = tile.box
        low, high = np.array([left, top] * 2), np.array([right, bottom] * 2)
        cut = boxes.clip(low, high)
        seen = (cut[:, 2:] - cut[:, :2] > (boxes[:, 2:] - boxes[:, :2]) / 3).all(1)
        parts = (cut[seen] + rng.normal(0, error, (seen.sum(), 4))).clip(low, high) - low
        scores = rng.uniform(0.5, 0.95, len(parts))
        found.append([Cell(1, tuple(part), label, float(score)) for part, score in zip(parts, scores, strict=True)])
    return found


def shown_with_masks(tiles: list[Tile], centre: np.ndarray, radius: float, scores: list[float]) -> list[list[Cell]]:
    """What each tile shows of a round cell with a round nucleus: box, mask and areas of what lies in the tile."""
    found = []
    for tile, score in zip(tiles, scores, strict=True):
        cell = disc(tile.box, centre, radius)
        rows, columns = (np.flatnonzero(cell.any(axis)) for axis in (1, 0))
        box = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
        nucleus = float(disc(tile.box, centre, radius / 2).sum())
        areas = {"nucleus_area": nucleus, "cytoplasm_area": float(cell.sum() - nucleus)}
        mask = cell[box[1] : box[3], box[0] : box[2]]
        found.append([Cell(1, box, "neutrophil", score, mask=mask, nucleus=areas)])
    return found


def in_order(boxes: np.ndarray) -> np.ndarray:
    return boxes[np.lexsort(boxes.round(3).T)]


@pytest.mark.parametrize("width", [2.0, 2.2, 2.5, 2.8, 3.0])
def test_a_white_cell_wider_than_what_two_tiles_share_is_counted_once_and_whole(width):
    side, step = 4000, 150
    places = np.stack(np.meshgrid(*[np.arange(100, side - 100, step)] * 2), -1).reshape(-1, 2)
    boxes = boxes_around(places + np.random.default_rng(0).uniform(-14, 14, places.shape), width * DIAMETER)
    tiles = sliced(side)
    cells = merged(tiles, shown(tiles, boxes, "neutrophil"), PARENTS, DIAMETER)
    assert len(cells) == len(boxes)
    assert np.allclose(in_order(np.array([cell.box for cell in cells])), in_order(boxes))


def test_a_wide_cell_is_hardly_ever_two_where_boxes_err_at_the_edge_of_a_tile_too():
    side = 4000
    places = np.stack(np.meshgrid(*[np.arange(100, side - 100, 150)] * 2), -1).reshape(-1, 2)
    boxes = boxes_around(places + np.random.default_rng(1).uniform(-14, 14, places.shape), 2.5 * DIAMETER)
    tiles = sliced(side)
    cells = merged(tiles, shown(tiles, boxes, "neutrophil", error=0.05 * DIAMETER), PARENTS, DIAMETER)
    assert abs(len(cells) / len(boxes) - 1) < 0.02


@pytest.mark.parametrize("label, width", [("neutrophil", 2.5), ("neutrophil", 1.6), ("RBC", 1.0), ("RBC", 1.3)])
@pytest.mark.parametrize("apart", [1.0, 0.85])
def test_neighbours_that_touch_at_a_seam_are_two(label, width, apart):
    side, step = 4000, 320
    rng = np.random.default_rng(2)
    places = np.stack(np.meshgrid(*[np.arange(220, side - 200, step)] * 2), -1).reshape(-1, 2)
    places = places + rng.uniform(-40, 40, places.shape)
    # Side by side in every direction; a box reaches as far as the disc, so that of slanting pairs the boxes overlap.
    angle = rng.uniform(0, 2 * np.pi, len(places))
    half = np.stack((np.cos(angle), np.sin(angle)), 1) * width * DIAMETER * apart / 2
    boxes = boxes_around(np.concatenate((places - half, places + half)), width * DIAMETER)
    tiles = sliced(side)
    cells = merged(tiles, shown(tiles, boxes, label), PARENTS, DIAMETER)
    assert len(cells) == len(boxes)
    assert np.allclose(in_order(np.array([cell.box for cell in cells])), in_order(boxes))


def test_red_cells_that_lie_thick_are_all_counted():
    side = 2000
    rng = np.random.default_rng(3)
    places = np.stack(np.meshgrid(*[np.arange(30, side - 30, 0.75 * DIAMETER)] * 2), -1).reshape(-1, 2)
    places = places + rng.uniform(-0.2, 0.2, places.shape) * DIAMETER
    half = DIAMETER * rng.uniform(0.8, 1.3, places.shape) / 2
    boxes = np.concatenate((places - half, places + half), 1)
    tiles = sliced(side)
    cells = merged(tiles, shown(tiles, boxes, "RBC"), PARENTS, DIAMETER)
    assert len(cells) == len(boxes)


def test_neighbours_that_both_lie_across_a_narrow_strip_are_two():
    tiles = lay_tiles(300, 120, 156, 120, 6)
    left, right = tiles[1].box[0], tiles[0].box[2]
    assert len(tiles) == 2 and 0 < right - left < DIAMETER / 2
    # Each lies whole in its own tile, up to its edge; the other tile takes no notice of so small a part.
    found = [
        [Cell(1, (right - DIAMETER, 40, right, 80), "RBC", 0.9)],
        [Cell(1, (0, 40, DIAMETER, 80), "RBC", 0.8)],
    ]
    assert len(merged(tiles, found, PARENTS, DIAMETER)) == 2


def test_red_cells_one_over_the_other_beside_a_seam_that_cuts_neither_are_two():
    tiles = lay_tiles(360, 156, *TILE, round(MARGIN * DIAMETER))
    seam, start = tiles[0].core[2], tiles[1].box[0]
    # In one field they would be two, though of what both tiles see of them more than NMS_IOU is the same.
    left, right = seam - 0.9 * DIAMETER, seam - 0.6 * DIAMETER
    found = [
        [Cell(1, (left, 60, left + DIAMETER, 100), "RBC", 0.9)],
        [Cell(1, (right - start, 60, right + DIAMETER - start, 100), "RBC", 0.8)],
    ]
    assert len(merged(tiles, found, PARENTS, DIAMETER)) == 2


@pytest.mark.parametrize("off", [(0, 0), (8, 0), (-11, 13)])
@pytest.mark.parametrize("scores", [(0.9, 0.8, 0.7, 0.6), (0.5, 0.6, 0.9, 0.8)])
def test_a_cell_cut_by_the_corner_of_four_tiles_is_one_with_the_whole_mask(off, scores):
    tiles = lay_tiles(360, 264, *TILE, round(MARGIN * DIAMETER))
    assert len(tiles) == 4
    centre, radius = np.array(tiles[0].core[2:]) + off, 1.25 * DIAMETER
    true = disc((0, 0, 360, 264), centre, radius)
    (cell,) = merged(tiles, shown_with_masks(tiles, centre, radius, scores), PARENTS, DIAMETER)
    assert np.allclose(cell.box, (*(centre - radius), *(centre + radius)), atol=1)
    x, y = cell.origin
    placed = np.zeros_like(true)
    placed[y : y + cell.mask.shape[0], x : x + cell.mask.shape[1]] = cell.mask
    assert (placed != true).sum() < 0.02 * true.sum()


@pytest.mark.parametrize("width", [1.7, 2.2, 2.5, 3.0])
@pytest.mark.parametrize("off", [-20, 0, 9, 16])
@pytest.mark.parametrize("scores", [(0.9, 0.6), (0.6, 0.9)])
def test_a_cell_joined_over_a_seam_has_its_whole_mask_and_the_nucleus_of_the_larger_part(width, off, scores):
    tiles = lay_tiles(360, 156, *TILE, round(MARGIN * DIAMETER))
    centre, radius = np.array((tiles[0].core[2] + off, 80)), width * DIAMETER / 2
    true = disc((0, 0, 360, 156), centre, radius)
    found = shown_with_masks(tiles, centre, radius, scores)
    parts = [cell.nucleus for (cell,) in found]
    (cell,) = merged(tiles, found, PARENTS, DIAMETER)
    assert abs(cell.mask.sum() / true.sum() - 1) < 0.02
    larger = max(parts, key=lambda areas: areas["nucleus_area"] + areas["cytoplasm_area"])
    assert cell.nucleus == larger


def test_a_part_that_is_much_less_sure_makes_a_cell_whole_where_the_seam_cuts_both():
    tiles = lay_tiles(360, 156, *TILE, round(MARGIN * DIAMETER))
    centre, radius = np.array((tiles[0].core[2], 80)), 1.25 * DIAMETER
    (cell,) = merged(tiles, shown_with_masks(tiles, centre, radius, [0.9, 0.35]), PARENTS, DIAMETER)
    assert abs(cell.mask.sum() / disc((0, 0, 360, 156), centre, radius).sum() - 1) < 0.02


def test_a_part_without_a_mask_leaves_that_of_the_other():
    tiles = lay_tiles(360, 156, *TILE, round(MARGIN * DIAMETER))
    centre = np.array((tiles[0].core[2], 80))
    found = shown_with_masks(tiles, centre, 1.25 * DIAMETER, [0.9, 0.6])
    found[0][0] = replace(found[0][0], mask=None, nucleus=None)
    (cell,) = merged(tiles, found, PARENTS, DIAMETER)
    (part,) = found[1]
    assert cell.score == 0.9 and cell.mask.sum() == part.mask.sum() and cell.nucleus == part.nucleus


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
