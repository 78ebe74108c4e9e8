"""Masks as run lengths (COCO) and as polygons (GeoJSON)."""

from typing import Any

import numpy as np
from scipy import ndimage


def rle_encode(mask: np.ndarray) -> dict[str, Any]:
    """Uncompressed COCO run lengths of a mask.

    Args:
        mask (`np.ndarray`): [h, w], nonzero inside.

    Returns:
        `dict`: {"size": [h, w], "counts": lengths of the runs of zeros and ones in turn, column by column}.
    """
    flat = np.asarray(mask).astype(bool).ravel(order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff(np.concatenate(([0], changes, [flat.size]))).tolist()
    if flat.size and flat[0]:
        counts = [0, *counts]
    return {"size": [int(side) for side in np.shape(mask)], "counts": counts}


def rle_decode(code: dict[str, Any]) -> np.ndarray:
    """The mask of `rle_encode`, uint8 [h, w].

    Raises:
        ValueError: The runs do not add up to the size.
    """
    height, width = code["size"]
    counts = np.asarray(code["counts"], dtype=np.int64)
    if counts.sum() != height * width:
        raise ValueError(f"Mask runs add up to {counts.sum()} pixels, but its size is {height} x {width}.")
    values = np.arange(len(counts), dtype=np.uint8) % 2
    return np.repeat(values, counts).reshape((height, width), order="F")


def mask_polygons(mask: np.ndarray) -> list[list[list[list[int]]]]:
    """The connected regions of a mask as GeoJSON polygons along pixel edges.

    Args:
        mask (`np.ndarray`): [h, w], nonzero inside; pixels that touch at a corner only are apart.

    Returns:
        `list`: Polygons; each a list of closed rings, the outer one first; each ring a list of [x, y].
    """
    regions, _ = ndimage.label(np.asarray(mask).astype(bool))
    polygons = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(regions), 1):
        rings = _rings(regions[rows, columns] == number)
        rings.sort(key=_signed_area, reverse=True)
        polygons.append([[[x + columns.start, y + rows.start] for x, y in ring] for ring in rings])
    return polygons


def _signed_area(ring: list[tuple[int, int]]) -> float:
    """Area with the sign of the ring's direction: positive for an outer ring of `_rings`, negative for a hole."""
    return sum(x1 * y2 - x2 * y1 for (x1, y1), (x2, y2) in zip(ring, ring[1:], strict=False)) / 2


def _rings(mask: np.ndarray) -> list[list[tuple[int, int]]]:
    """Closed rings along the pixel edges of one region, its pixels on the right of the way."""
    padded = np.pad(mask, 1)
    inside, above, left = padded[1:, 1:], padded[:-1, 1:], padded[1:, :-1]
    moves: dict[tuple[int, int], set[tuple[int, int]]] = {}
    for starts, shift, step in (
        (inside & ~above, (0, 0), (1, 0)),  # top edge, eastwards
        (~inside & above, (1, 0), (-1, 0)),  # bottom edge, westwards
        (inside & ~left, (0, 1), (0, -1)),  # left edge, northwards
        (~inside & left, (0, 0), (0, 1)),  # right edge, southwards
    ):
        for y, x in np.argwhere(starts).tolist():
            moves.setdefault((x + shift[0], y + shift[1]), set()).add(step)
    rings = []
    while moves:
        point = start = next(iter(moves))
        step = next(iter(moves[start]))
        ring = [start]
        while True:
            moves[point].discard(step)
            if not moves[point]:
                del moves[point]
            point = (point[0] + step[0], point[1] + step[1])
            if point == start and not (point in moves and (-step[1], step[0]) in moves[point]):
                break
            right = (-step[1], step[0])
            # Where two regions of the background or the mask meet at a corner, the right turn stays at the same pixel.
            following = right if right in moves[point] else next(iter(moves[point]))
            if following != step:
                ring.append(point)
            step = following
        rings.append([*ring, start])
    return rings


__all__ = ["mask_polygons", "rle_decode", "rle_encode"]
