"""The cells of overlapping tiles as those of one image, each once."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from unihema.processing_unihema.class_names import cell_kind, is_untyped_white_cell
from unihema.processing_unihema.post_processing import NMS_IOU, NMS_WITHIN
from unihema.results.cell import Cell
from unihema.results.tile_layout import Tile


# How far outside a tile's core the centre of a cell may be that two tiles disagree on, in diameters of a red cell.
REACH = 0.3
# Score from which such a cell counts although the other tile does not see it: so near to a tile's edge cells are missed.
SURE = 0.35
# What a score is worth, of the same cell in two tiles, where a tile's edge cuts it, and where it is a white cell without a type.
WORSE = 0.5


def merged(
    tiles: Sequence[Tile], found: Iterable[Sequence[Cell]], parents: dict[str, str], diameter: float
) -> list[Cell]:
    """The cells of all tiles, in pixels of the image, each once, best score first.

    A cell is that of the tile whose core holds its centre. What another tile sees a little outside its own core, and this one
    does not, counts where it is sure, or where the two disagree on the centre, so that each takes it for the other's. Of what
    two tiles show of one cell the surer is kept, and rather one that is whole; the box of one that is cut goes around both.

    Args:
        tiles (`Sequence[Tile]`): The tiles.
        found (`Iterable[Sequence[Cell]]`): The cells of each, in pixels of the tile.
        parents (`dict[str, str]`): Class -> coarser class.
        diameter (`float`): Of a red cell, in pixels.
    """
    width, height = max(tile.core[2] for tile in tiles), max(tile.core[3] for tile in tiles)
    reach = REACH * diameter
    cells, owners, cut_off, own = [], [], [], []
    for number, (tile, of_tile) in enumerate(zip(tiles, found, strict=True)):
        left, top, right, bottom = tile.box
        for cell in of_tile:
            x_min, y_min, x_max, y_max = (a + b for a, b in zip(cell.box, (left, top, left, top)))
            x, y = (x_min + x_max) / 2, (y_min + y_max) / 2
            beyond = max(tile.core[0] - x, x - tile.core[2], tile.core[1] - y, y - tile.core[3])
            # A tile may be larger than the image: around it there is nothing to see.
            box = max(x_min, 0), max(y_min, 0), min(x_max, width), min(y_max, height)
            if beyond > reach or box[0] >= box[2] or box[1] >= box[3]:
                continue
            cells.append(_with_box(cell.placed(left, top), box))
            owners.append(number)
            # What the image's edge cuts is as whole as it can be.
            cut_off.append(
                0 < left >= x_min - 1
                or 0 < top >= y_min - 1
                or width > right <= x_max + 1
                or height > bottom <= y_max + 1
            )
            own.append(tile.core[0] <= x < tile.core[2] and tile.core[1] <= y < tile.core[3])
    kept = _once(cells, owners, cut_off, own, parents)
    kept.sort(key=lambda cell: -cell.score)
    return [replace(cell, id=number) for number, cell in enumerate(kept, 1)]


def _once(
    cells: list[Cell], owners: list[int], cut_off: list[bool], own: list[bool], parents: dict[str, str]
) -> list[Cell]:
    """Of cells of one kind that overlap, as in one field, but come from different tiles, the best.

    Args:
        cells (`list[Cell]`): Cells of all tiles, in pixels of the image.
        owners (`list[int]`): Of each, the number of its tile.
        cut_off (`list[bool]`): Whether it touches an edge of its tile beyond which the image goes on.
        own (`list[bool]`): Whether its tile's core holds its centre. Where not, it counts if it is sure, or a second tile saw it.
        parents (`dict[str, str]`): Class -> coarser class.
    """
    from scipy.spatial import cKDTree

    if not cells:
        return []
    boxes = np.array([cell.box for cell in cells])
    centres, sizes = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    kinds = [cell_kind(cell.label, parents) or cell.label for cell in cells]
    untyped = [is_untyped_white_cell(cell.label) for cell in cells]
    worth = [cell.score * WORSE ** (cut + no_type) for cell, cut, no_type in zip(cells, cut_off, untyped, strict=True)]
    order = sorted(range(len(cells)), key=lambda i: -worth[i])
    rank = {cell: place for place, cell in enumerate(order)}
    tree = cKDTree(centres)
    gone: set[int] = set()
    kept = []
    for i in order:
        if i in gone:
            continue
        box, counts = boxes[i], own[i] or (cells[i].score >= SURE and not cut_off[i])
        for j in tree.query_ball_point(centres[i], float(sizes[i].max())):
            if j == i or j in gone or owners[i] == owners[j] or kinds[i] != kinds[j] or rank[j] < rank[i]:
                continue
            low, high = np.maximum(boxes[i, :2], boxes[j, :2]), np.minimum(boxes[i, 2:], boxes[j, 2:])
            overlap = float(np.prod(np.clip(high - low, 0, None)))
            areas = float(np.prod(sizes[i])), float(np.prod(sizes[j]))
            if overlap > NMS_IOU * (sum(areas) - overlap) or overlap > NMS_WITHIN * min(areas):
                gone.add(j)
                counts = True
                if cut_off[i] and cells[j].score >= WORSE * cells[i].score:
                    box = np.concatenate((np.minimum(box[:2], boxes[j, :2]), np.maximum(box[2:], boxes[j, 2:])))
        if counts:
            kept.append(_with_box(cells[i], tuple(box.tolist())))
    return kept


def _with_box(cell: Cell, box: tuple[float, float, float, float]) -> Cell:
    """The cell with another box; of its mask what lies within."""
    if cell.mask is None or box == cell.box:
        return replace(cell, box=box)
    left, top = math.floor(box[0]), math.floor(box[1])
    mask = np.zeros((math.ceil(box[3]) - top, math.ceil(box[2]) - left), dtype=bool)
    x, y = cell.origin[0] - left, cell.origin[1] - top
    height, width = cell.mask.shape
    rows, columns = slice(max(y, 0), max(y + height, 0)), slice(max(x, 0), max(x + width, 0))
    part = mask[rows, columns]
    part[:] = cell.mask[max(-y, 0) :, max(-x, 0) :][: part.shape[0], : part.shape[1]]
    return replace(cell, box=box, mask=mask)
