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
# How far from the edge of its tile the box of a cell that this edge cuts may end, in diameters of a red cell.
NEAR_EDGE = 0.2

Box = tuple[float, float, float, float]


def merged(
    tiles: Sequence[Tile], found: Iterable[Sequence[Cell]], parents: dict[str, str], diameter: float
) -> list[Cell]:
    """The cells of all tiles, in pixels of the image, each once, best score first.

    A cell is that of the tile whose core holds its centre. What another tile sees a little outside its own core, and this one
    does not, counts where it is sure, or where the two disagree on the centre, so that each takes it for the other's. Of what
    two tiles show of one cell the surer is kept, and rather one that is whole; the box and the mask of one that is cut are those
    of both parts together.

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
            cells.append(_in_box([cell.placed(left, top)], box))
            owners.append(number)
            # What the image's edge cuts is as whole as it can be.
            cut_off.append(
                0 < left >= x_min - 1
                or 0 < top >= y_min - 1
                or width > right <= x_max + 1
                or height > bottom <= y_max + 1
            )
            own.append(tile.core[0] <= x < tile.core[2] and tile.core[1] <= y < tile.core[3])
    kept = _once(cells, [tiles[number] for number in owners], cut_off, own, parents, diameter)
    kept.sort(key=lambda cell: -cell.score)
    return [replace(cell, id=number) for number, cell in enumerate(kept, 1)]


def _once(
    cells: list[Cell],
    owners: list[Tile],
    cut_off: list[bool],
    own: list[bool],
    parents: dict[str, str],
    diameter: float,
) -> list[Cell]:
    """Of cells of one kind that overlap, as in one field, or that a seam cuts, but come from different tiles, the best.

    Args:
        cells (`list[Cell]`): Cells of all tiles, in pixels of the image.
        owners (`list[Tile]`): Of each, its tile.
        cut_off (`list[bool]`): Whether it touches an edge of its tile beyond which the image goes on.
        own (`list[bool]`): Whether its tile's core holds its centre. Where not, it counts if it is sure, or a second tile saw it.
        parents (`dict[str, str]`): Class -> coarser class.
        diameter (`float`): Of a red cell, in pixels.

    Returns:
        `list[Cell]`: In no order; one that was joined has the box and the mask of all of its parts.
    """
    from scipy.spatial import cKDTree

    if not cells:
        return []
    boxes = np.array([cell.box for cell in cells])
    centres, diagonals = (boxes[:, :2] + boxes[:, 2:]) / 2, np.hypot(*(boxes[:, 2:] - boxes[:, :2]).T)
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
        cell, counts = cells[i], own[i] or (cells[i].score >= SURE and not cut_off[i])
        parts = [cell]
        # By its width alone the small part that a corner of four tiles leaves of a large cell would not find the others.
        for j in tree.query_ball_point(centres[i], float(diagonals[i])):
            other = cells[j]
            if j == i or j in gone or owners[i] is owners[j] or kinds[i] != kinds[j] or rank[j] < rank[i]:
                continue
            cut_by_seam = _is_one_over_seam(cell.box, other.box, owners[i].box, owners[j].box, diameter)
            if cut_by_seam or _is_one_as_in_a_field(cell.box, other.box):
                gone.add(j)
                counts = True
                # One that is much less sure says little of where a cell ends, but that it goes on beyond the seam.
                if cut_by_seam or (cut_off[i] and other.score >= WORSE * cell.score):
                    parts.append(other)
        if counts:
            kept.append(_joined(parts))
    return kept


def _is_one_as_in_a_field(box: Box, other: Box) -> bool:
    """Whether two boxes overlap so far that in one field they would be one cell."""
    overlap, areas = _area(_shared(box, other)), (_area(box), _area(other))
    return overlap > NMS_IOU * (sum(areas) - overlap) or overlap > NMS_WITHIN * min(areas)


def _is_one_over_seam(box: Box, other: Box, tile: Box, other_tile: Box, diameter: float) -> bool:
    """Whether two boxes are what two tiles show of a cell that is wider than the strip that both tiles see.

    Each part ends at the edge of its own tile, so that much of either lies where the other tile sees nothing, and their overlap
    is small however well they agree. Both tiles see the strip alone: there the boxes are the same, or of two cells.

    Args:
        box, other (`tuple[float, float, float, float]`): Of the parts, in pixels of the image.
        tile, other_tile (`tuple[float, float, float, float]`): Of the tiles that show them.
        diameter (`float`): Of a red cell, in pixels.

    Returns:
        `bool`: `False` as well where the strip is narrower than a red cell: neighbours that touch may both lie across it.
    """
    strip = _shared(tile, other_tile)
    if min(strip[2] - strip[0], strip[3] - strip[1]) < diameter:
        return False
    if not any(_are_cut(axis, box, other, tile, other_tile, NEAR_EDGE * diameter) for axis in (0, 1)):
        return False
    seen, other_seen = _shared(box, strip), _shared(other, strip)
    overlap = _area(_shared(seen, other_seen))
    return overlap > NMS_IOU * (_area(seen) + _area(other_seen) - overlap)


def _are_cut(axis: int, box: Box, other: Box, tile: Box, other_tile: Box, near: float) -> bool:
    """Whether along an axis each of two boxes ends at that edge of its own tile which lies within the other tile.

    Args:
        axis (`int`): 0 for x, 1 for y.
        box, other (`tuple[float, float, float, float]`): Of the parts, in pixels of the image.
        tile, other_tile (`tuple[float, float, float, float]`): Of the tiles that show them.
        near (`float`): How far from the edge a box may end, in pixels.
    """
    if tile[axis] > other_tile[axis]:
        box, other, tile, other_tile = other, box, other_tile, tile
    # Tiles of one row have no seam from top to bottom, and the image as a whole has none with any tile.
    if not tile[axis] < other_tile[axis] < tile[axis + 2] < other_tile[axis + 2]:
        return False
    return box[axis + 2] >= tile[axis + 2] - near and other[axis] <= other_tile[axis] + near


def _shared(box: Box, other: Box) -> Box:
    """What two boxes share; upside down where that is nothing."""
    return max(box[0], other[0]), max(box[1], other[1]), min(box[2], other[2]), min(box[3], other[3])


def _area(box: Box) -> float:
    """Pixels of a box, none of one that is upside down."""
    return max(box[2] - box[0], 0) * max(box[3] - box[1], 0)


def _joined(parts: Sequence[Cell]) -> Cell:
    """The first of the parts of a cell, in the box around all of them."""
    if len(parts) == 1:
        return parts[0]
    x_min, y_min, x_max, y_max = zip(*(part.box for part in parts), strict=True)
    return _in_box(parts, (min(x_min), min(y_min), max(x_max), max(y_max)))


def _in_box(parts: Sequence[Cell], box: Box) -> Cell:
    """The first of the parts of a cell, with another box, and what lies within it of the masks of all.

    Its nucleus is that of the part that shows most of the cell: where parts overlap the same pixels are in the areas of both.

    Args:
        parts (`Sequence[Cell]`): What one tile or several show of a cell, in pixels of the image.
        box (`tuple[float, float, float, float]`): The new box.
    """
    first = parts[0]
    if len(parts) == 1 and (first.mask is None or box == first.box):
        return replace(first, box=box)
    nucleus = max((part.nucleus for part in parts if part.nucleus), key=lambda areas: sum(areas.values()), default=None)
    if all(part.mask is None for part in parts):
        return replace(first, box=box, nucleus=nucleus)
    left, top = math.floor(box[0]), math.floor(box[1])
    mask = np.zeros((math.ceil(box[3]) - top, math.ceil(box[2]) - left), dtype=bool)
    for part in parts:
        if part.mask is not None:
            _paint(mask, part.mask, part.origin[0] - left, part.origin[1] - top)
    return replace(first, box=box, mask=mask, nucleus=nucleus)


def _paint(mask: np.ndarray, part: np.ndarray, x: int, y: int) -> None:
    """Adds to a mask what lies within it of another, whose first pixel is at x, y."""
    height, width = part.shape
    within = mask[max(y, 0) : max(y + height, 0), max(x, 0) : max(x + width, 0)]
    within |= part[max(-y, 0) :, max(-x, 0) :][: within.shape[0], : within.shape[1]]
