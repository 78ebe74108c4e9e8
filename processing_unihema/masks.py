"""Masks of cells as run lengths (COCO) and as polygons, and back: the same pixels.

A mask as polygons is the outline of its pixels: the corners lie at whole coordinates, pixel (x, y) is the square from (x, y)
to (x + 1, y + 1). Polygons as a mask are the pixels whose centre lies inside. So a mask comes back pixel for pixel, also when
the corners were rounded on the way, by less than half a pixel.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from unihema.errors import InputError


# Of one mask that is read: pixels of the rectangle around it, and rows that the edges of its polygons cross.
MOST_PIXELS = 1 << 27
MOST_CROSSINGS = 1 << 25


def rle_encode(mask: np.ndarray) -> dict[str, Any]:
    """Uncompressed COCO run lengths of a mask.

    Args:
        mask (`np.ndarray`): [h, w], nonzero inside.

    Returns:
        `dict`: {"size": [h, w], "counts": lengths of the runs of zeros and ones in turn, column by column}.
    """
    height, width = np.shape(mask)
    return rle_in_image(mask, (0, 0), (height, width))


def rle_in_image(mask: np.ndarray, origin: tuple[int, int], size: tuple[int, int]) -> dict[str, Any]:
    """Run lengths, over a whole image, of a mask of a part of it; no image is laid out.

    Args:
        mask (`np.ndarray`): [h, w], nonzero inside.
        origin (`tuple[int, int]`): Pixel (x, y) of the image where its first pixel lies.
        size (`tuple[int, int]`): Height and width of the image; what lies beyond is cut off.
    """
    (left, top), (height, width) = origin, size
    inside = np.asarray(mask).astype(bool)[max(-top, 0) : max(height - top, 0), max(-left, 0) : max(width - left, 0)]
    left, top = max(left, 0), max(top, 0)
    columns = np.zeros((inside.shape[1], inside.shape[0] + 2), dtype=np.int8)
    columns[:, 1:-1] = inside.T
    steps = np.diff(columns, axis=1)
    starts, ends = (
        (column + left) * height + row + top for column, row in (np.nonzero(steps == 1), np.nonzero(steps == -1))
    )
    # A run over the end of a column goes on in the next.
    apart = starts[1:] != ends[:-1]
    borders = np.stack((starts[np.append(True, apart)[: len(starts)]], ends[np.append(apart, True)[: len(ends)]]), 1)
    counts = np.diff(np.concatenate(([0], borders.ravel(), [height * width])))
    # No run of zeros ends a mask that goes to the last pixel.
    return {"size": [int(height), int(width)], "counts": counts[: len(counts) - (counts[-1] == 0)].tolist()}


def rle_decode(code: dict[str, Any]) -> np.ndarray:
    """The mask of `rle_encode`, uint8 [h, w].

    Raises:
        ValueError: The runs do not add up to the size.
    """
    height, width = code["size"]
    counts = check_runs(code)
    return np.repeat(np.arange(len(counts), dtype=np.uint8) % 2, counts).reshape((height, width), order="F")


def rle_crop(code: dict[str, Any]) -> tuple[np.ndarray, tuple[int, int]]:
    """The mask within the smallest rectangle around it, bool [h, w], and the pixel (x, y) of the image where that begins.

    Args:
        code (`dict`): "size", and "counts" as numbers or as COCO's compressed text.

    Raises:
        ValueError: The runs do not add up to the size, or the rectangle is larger than `MOST_PIXELS`.
    """
    height, _ = code["size"]
    borders = np.cumsum(check_runs(code))
    starts, ends = borders[0::2], borders[1::2]
    starts = starts[: len(ends)]
    kept = ends > starts
    starts, ends = starts[kept], ends[kept]
    if not len(starts):
        return np.zeros((0, 0), dtype=bool), (0, 0)
    first, last = int(starts[0] // height), int((ends[-1] - 1) // height)
    if (last - first + 1) * height > MOST_PIXELS:
        raise InputError(f"A mask over {last - first + 1} columns of {height} pixels is larger than a cell's.")
    turns = np.zeros((last - first + 1) * height + 1, dtype=np.int8)
    turns[starts - first * height] += 1
    turns[ends - first * height] -= 1
    columns = np.cumsum(turns[:-1], dtype=np.int8).reshape(-1, height).astype(bool)
    rows = np.flatnonzero(columns.any(0))
    return columns[:, rows[0] : rows[-1] + 1].T.copy(), (first, int(rows[0]))


def outline_mask(outline: Any, size: tuple[int, int]) -> tuple[np.ndarray, tuple[int, int]]:
    """The mask of a COCO `segmentation`: run lengths, compressed or not, or polygons.

    Args:
        outline (`dict` or `list`): As in the file.
        size (`tuple[int, int]`): Height and width of the image.

    Returns:
        `tuple[np.ndarray, tuple[int, int]]`: bool `[h, w]`, the smallest rectangle around it, and the pixel (x, y) where that
        begins.

    Raises:
        ValueError: Runs that do not add up to the image.
    """
    if isinstance(outline, dict):
        if list(outline.get("size", size)) != list(size):
            raise InputError(f"A mask of {outline['size']} pixels for an image of {list(size)}.")
        return rle_crop({"counts": outline["counts"], "size": list(size)})
    corners = [np.asarray(part, dtype=np.float64).reshape(-1, 2) for part in outline]
    (left, top), (right, bottom) = np.concatenate(corners).min(0), np.concatenate(corners).max(0)
    left, top = (int(np.clip(np.floor(value), 0, most)) for value, most in ((left, size[1]), (top, size[0])))
    right, bottom = (int(np.clip(np.ceil(value), 0, most)) for value, most in ((right, size[1]), (bottom, size[0])))
    return polygon_mask([[part] for part in corners], (left, top, right, bottom)), (left, top)


def check_runs(code: dict[str, Any]) -> np.ndarray:
    """The run lengths of a mask as numbers.

    Args:
        code (`dict`): "size", and "counts" as numbers or as COCO's compressed text.

    Raises:
        ValueError: They do not add up to the size.
    """
    height, width = code["size"]
    counts = code["counts"]
    if isinstance(counts, (str, bytes)):
        counts = _uncompressed(counts if isinstance(counts, bytes) else counts.encode("ascii", "replace"))
    counts = np.asarray(counts, dtype=np.int64)
    if (counts < 0).any() or counts.sum() != height * width:
        raise InputError(f"Mask runs add up to {counts.sum()} pixels, but its size is {height} x {width}.")
    return counts


def _uncompressed(text: bytes) -> list[int]:
    """Run lengths of COCO's compressed text: numbers of 5 bits a character, from the third on relative to the one before the
    last."""
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = character - 48
        if not 0 <= bits < 64 or shift > 50:
            raise InputError("A mask's compressed runs are damaged.")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    return counts


def mask_polygons(mask: np.ndarray) -> list[list[list[list[int]]]]:
    """The connected regions of a mask as polygons along pixel edges.

    Args:
        mask (`np.ndarray`): [h, w], nonzero inside; pixels that touch at a corner only are apart.

    Returns:
        `list`: Polygons; each a list of closed rings, the outer one first; each ring a list of [x, y].
    """
    from scipy import ndimage

    regions, number = ndimage.label(np.pad(np.asarray(mask).astype(bool), 1))
    polygons: list[list[list[list[int]]]] = [[] for _ in range(number)]
    # Of each point between pixels, which of the four around it are inside: above left 1, above right 2, below left 4, below
    # right 8. It is a corner where they are odd, or two opposite ones.
    inside = (regions > 0).view(np.uint8)
    rows = inside[:, :-1] + 2 * inside[:, 1:]
    around = rows[:-1] + 4 * rows[1:]
    ys, xs = np.nonzero(np.isin(np.arange(16), (1, 2, 4, 8, 7, 11, 13, 14, 6, 9))[around])
    around = around[ys, xs]
    # Where pixels touch at a corner two outlines meet: the point stands twice, first as the end of the edge to its left.
    times = np.where((around == 6) | (around == 9), 2, 1)
    ys, xs, around = (np.repeat(values, times) for values in (ys, xs, around))
    second = np.zeros(len(ys), dtype=bool)
    second[1:] = (ys[1:] == ys[:-1]) & (xs[1:] == xs[:-1])
    # Of the two, that of the edge upwards comes first in its column.
    upwards = np.where(around == 9, second, ~second)
    order = np.lexsort((upwards, ys, xs))
    # In a row as in a column, two corners in turn are the ends of an edge.
    along_column = np.empty(len(order), dtype=np.int64)
    along_column[order[0::2]], along_column[order[1::2]] = order[1::2], order[0::2]
    below, above = regions[ys + 1, xs + 1].tolist(), regions[ys, xs + 1].tolist()
    points, along_column = np.stack((xs, ys), 1).tolist(), along_column.tolist()
    seen = bytearray(len(points))
    for first in range(0, len(points), 2):
        if seen[first]:
            continue
        # The first edge of a ring is its uppermost: under it lies the region, or over it where the ring is of a hole.
        is_outer = below[first] > 0
        corner = start = first if is_outer else first + 1
        ring = []
        while True:
            other = corner ^ 1
            seen[corner] = seen[other] = 1
            ring += [points[corner], points[other]]
            corner = along_column[other]
            if corner == start:
                break
        polygons[(below if is_outer else above)[first] - 1].append([*ring, ring[0]])
    return polygons


def polygon_mask(polygons: Iterable[Sequence[Sequence[Sequence[float]]]], box: tuple[int, int, int, int]) -> np.ndarray:
    """The pixels of polygons: those whose centre lies inside.

    Args:
        polygons (`Iterable`): Each a list of rings, holes among them; each ring a list of [x, y], closed or not.
        box (`tuple[int, int, int, int]`): Left, top, right and bottom of the part of the image that is wanted.

    Returns:
        `np.ndarray`: bool [bottom - top, right - left].

    Raises:
        ValueError: It would take too much memory.
    """
    left, top, right, bottom = box
    height, width = bottom - top, right - left
    if height * width > MOST_PIXELS:
        raise InputError(f"A mask of {height} x {width} pixels is larger than a cell's.")
    mask = np.zeros((height, width), dtype=bool)
    for rings in polygons:
        turns = np.zeros(height * (width + 1), dtype=np.int64)
        for ring in rings:
            corners = np.asarray(ring, dtype=np.float64)
            x1, y1 = corners.T
            x2, y2 = np.roll(corners, -1, axis=0).T
            # Rows whose middle an edge crosses.
            low, high = np.minimum(y1, y2), np.maximum(y1, y2)
            first = np.clip(np.ceil(low - 0.5), top, bottom).astype(np.int64)
            count = np.clip(np.ceil(high - 0.5), top, bottom).astype(np.int64) - first
            if count.sum() > MOST_CROSSINGS:
                raise InputError(f"An outline of {len(corners)} corners is longer than a cell's.")
            edge = np.repeat(np.arange(len(count)), count)
            row = np.arange(len(edge)) - np.repeat(np.cumsum(count) - count, count) + first[edge]
            slope = (row + 0.5 - y1[edge]) / (y2 - y1)[edge]
            x = x1[edge] + slope * (x2 - x1)[edge]
            column = np.clip(np.ceil(x - 0.5), left, right).astype(np.int64) - left
            turns += np.bincount((row - top) * (width + 1) + column, minlength=len(turns))
        mask |= (np.cumsum(turns.reshape(height, width + 1), axis=1)[:, :-1] % 2).astype(bool)
    return mask


__all__ = [
    "check_runs",
    "mask_polygons",
    "outline_mask",
    "polygon_mask",
    "rle_crop",
    "rle_decode",
    "rle_encode",
    "rle_in_image",
]
