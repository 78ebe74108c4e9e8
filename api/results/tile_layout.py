"""The tiles of an image: where they lie, what they show, and which are worth a look."""

import math
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from unihema.results.nuclei import find_nuclei
from unihema.slides import RegionSource


# Width to height of a tile, as of most fields.
SHAPE = 4 / 3
# Overlap on each side of a tile's core, in diameters of a red cell.
MARGIN = 0.6
# A slide is divided into so many parts along its longer side to find where something lies on the glass.
PARTS = 32
# Empty glass: levels of gray between its darkest and brightest pixel (a share of the image's contrast, within limits), and how
# far it may be below the brightest glass. What is darker is no glass: it may be what could not be read.
EVEN_SHARE, EVEN, GLASS_BELOW, GLASS = 0.15, (4.0, 10.0), 30, 100


@dataclass(frozen=True)
class Tile:
    """A part of an image.

    Args:
        box (`tuple[int, int, int, int]`): What is looked at: x_min, y_min, x_max, y_max in pixels. It may pass the image's edge
            where the image is smaller than a tile.
        core (`tuple[int, int, int, int]`): What it answers for; the cores of all tiles cover the image once.
    """

    box: tuple[int, int, int, int]
    core: tuple[int, int, int, int]


def lay_tiles(width: int, height: int, tile_width: int, tile_height: int, margin: int) -> list[Tile]:
    """Tiles of one size that cover an image, row by row.

    Args:
        width, height (`int`): Of the image, in pixels.
        tile_width, tile_height (`int`): Of a tile.
        margin (`int`): How far a tile reaches beyond its core, at least, but at the image's edges.
    """
    tiles = []
    rows, columns = _intervals(height, tile_height, margin), _intervals(width, tile_width, margin)
    for (top, bottom), (core_top, core_bottom) in rows:
        for (left, right), (core_left, core_right) in columns:
            tiles.append(Tile((left, top, right, bottom), (core_left, core_top, core_right, core_bottom)))
    return tiles


def _intervals(length: int, tile: int, margin: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Spans and cores along one axis; the spans are spread evenly."""
    if length <= tile:
        # In the middle of a tile that is larger.
        start = (length - tile) // 2
        return [((start, start + tile), (0, length))]
    number = math.ceil((length - 2 * margin) / max(tile - 2 * margin, 1))
    starts = [round(i * (length - tile) / (number - 1)) for i in range(number)]
    borders = [0, *((a + tile + b) // 2 for a, b in zip(starts, starts[1:])), length]
    return [((start, start + tile), core) for start, core in zip(starts, zip(borders, borders[1:]))]


def tiles_at(image: RegionSource, scale: float, edge: int, diameter: float) -> list[Tile]:
    """The tiles of an image in which it is seen at a scale.

    Args:
        image ([`RegionSource`]): The image.
        scale (`float`): Pixels of the image for a pixel of the model's input.
        edge (`int`): Longer edge of the model's input.
        diameter (`float`): Of a red cell in the model's input.
    """
    width, height = round(edge * scale), round(edge * scale / SHAPE)
    return lay_tiles(*image.size, width, height, round(MARGIN * diameter * scale))


def size_of(box: tuple[int, int, int, int]) -> tuple[int, int]:
    """Width and height of a box."""
    return box[2] - box[0], box[3] - box[1]


def cut(source: RegionSource, tile: Tile, strict: bool = True) -> Image.Image:
    """The pixels of a tile. What lies beyond the image gets the median colour of its edge.

    Args:
        source ([`RegionSource`]): The image. Where it says how large a picture is at most, larger tiles are reduced.
        tile ([`Tile`]): The tile.
        strict (`bool`): Raise at what cannot be read. Otherwise it is black.

    Raises:
        UnreadableRegionError: It cannot be read.
    """
    left, top, right, bottom = tile.box
    inside = max(left, 0), max(top, 0), min(right, source.width), min(bottom, source.height)
    shrink = max(1.0, max(size_of(tile.box)) / source.longest) if source.longest else 1.0
    size = tuple(max(1, round(side / shrink)) for side in size_of(inside)) if shrink > 1 else None
    part = source.read_region(inside, size, strict)
    if inside == tile.box:
        return part
    to_x, to_y = part.width / (inside[2] - inside[0]), part.height / (inside[3] - inside[1])
    canvas = Image.new("RGB", (round((right - left) * to_x), round((bottom - top) * to_y)), border_colour(part))
    canvas.paste(part, (round((inside[0] - left) * to_x), round((inside[1] - top) * to_y)))
    return canvas


def border_colour(image: Image.Image) -> tuple[int, ...]:
    """The median colour of an image's outermost pixels."""
    pixels = np.asarray(image)
    border = np.concatenate((pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]))
    return tuple(int(value) for value in np.median(border, axis=0))


def crowded_places(source: RegionSource) -> tuple[tuple[float, float], ...]:
    """Where much lies on the glass of an image, as shares of its width and height: in three parts that are as full as usual,
    and not where cells lie so thick that nothing can be told apart.

    Args:
        source ([`RegionSource`]): The image.
    """
    gray = np.asarray(source.pixels.convert("L").resize((PARTS, PARTS * 3 // 4), Image.Resampling.BOX), dtype=np.int16)
    darkness = np.percentile(gray, 98) - gray
    filled = np.argwhere(darkness > max(EVEN[0], 0.25 * np.percentile(darkness, 95)))
    if len(filled) < len(source.places):
        return source.places
    # Of the parts in order of darkness those in the middle: the thinnest are almost empty, the darkest the thick end.
    order = filled[np.argsort(darkness[tuple(filled.T)], kind="stable")]
    chosen = [order[len(order) * share // 8] for share in (4, 2, 6)]
    return tuple(((x + 0.5) / gray.shape[1], (y + 0.5) / gray.shape[0]) for y, x in chosen)


def empty_glass(source: RegionSource, tiles: Sequence[Tile]) -> list[bool]:
    """Of each tile, whether nothing lies on the glass there: bright and even in the picture of the whole image.

    Args:
        source ([`RegionSource`]): The image.
        tiles (`Sequence[Tile]`): Its tiles.
    """
    gray = np.asarray(source.pixels.convert("L"))
    sample = gray[:: max(1, gray.shape[0] // 1000), :: max(1, gray.shape[1] // 1000)]
    dark, bright = (float(value) for value in np.percentile(sample, (2, 98)))
    # Of an image that is nothing but glass, and of a faint one, less is even.
    even = min(max(EVEN_SHARE * (bright - dark), EVEN[0]), EVEN[1])
    to_x, to_y = gray.shape[1] / source.width, gray.shape[0] / source.height
    empty = []
    for tile in tiles:
        left, right = max(int(tile.box[0] * to_x), 0), max(math.ceil(tile.box[2] * to_x), 1)
        top, bottom = max(int(tile.box[1] * to_y), 0), max(math.ceil(tile.box[3] * to_y), 1)
        part = gray[top:bottom, left:right]
        low, high = (int(part.min()), int(part.max())) if part.size else (0, 255)
        empty.append(high - low <= even and low >= max(bright - GLASS_BELOW, GLASS))
    return empty


def tiles_with_nuclei(source: RegionSource, tiles: Sequence[Tile], um_per_pixel: float) -> list[Tile]:
    """The tiles whose core holds what may be the nucleus of a white cell.

    Args:
        source ([`RegionSource`]): The image.
        tiles (`Sequence[Tile]`): Tiles of a grid.
        um_per_pixel (`float`): Size of a pixel of the image in micrometres.

    Returns:
        `list[Tile]`: In an order of chance, so that the first of them stand for the whole smear; it is the same each time.
    """
    columns, rows = (sorted({tile.core[axis] for tile in tiles}) for axis in (0, 1))
    at = {tile.core[:2]: number for number, tile in enumerate(tiles)}
    chosen = set()
    for x, y in find_nuclei(source, um_per_pixel).tolist():
        corner = columns[max(bisect(columns, x) - 1, 0)], rows[max(bisect(rows, y) - 1, 0)]
        # Not in a tile of empty glass.
        if corner in at and x < tiles[at[corner]].core[2] and y < tiles[at[corner]].core[3]:
            chosen.add(at[corner])
    return [tiles[number] for number in np.random.default_rng(0).permutation(sorted(chosen))]
