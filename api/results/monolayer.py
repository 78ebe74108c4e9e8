"""Where red cells lie side by side: each tile of an image is judged by how densely they lie, how many overlap, and focus."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unihema.errors import InputError
from unihema.files import read_json_object
from unihema.processing_unihema.class_names import RED_CELL, cell_kind
from unihema.results.cell import Cell, has, is_list, is_number, is_text, or_none


if TYPE_CHECKING:
    from PIL import Image


BANDS_FILE = Path(__file__).with_name("monolayer_bands.json")
MEASURES = ("density", "overlap", "focus")
# What a tile is that lies below and above the band of a measure.
OUTSIDE = {
    "density": ("too few red cells", "too many red cells"),
    "overlap": ("too few cells that overlap", "too many cells that overlap"),
    "focus": ("too little focus", "too sharp edges"),
}
# A red cell overlaps another where this share of the smaller box lies in the other's. Cells that touch share their corners.
OVERLAPPING = 0.2
# Red cells from which their overlap says something.
FEW = 5
# Diameter of a red cell, in pixels, at which focus is measured.
FOCUS_DIAMETER = 62


@cache
def usual_bands() -> dict[str, Any]:
    """The bands that come with the package."""
    return read_bands(BANDS_FILE)


def read_bands(file: str | Path) -> dict[str, Any]:
    """Reads and checks a file of bands.

    Args:
        file (`str` or `Path`): JSON with `name`, `source`, and for each of `density`, `overlap` and `focus` the lowest and the
            highest value of the monolayer; `null` is no bound.

    Returns:
        `dict`: What is in the file.

    Raises:
        InputError: It cannot be read, or is no such file.
    """
    remedy = (
        "Bands of the monolayer are JSON with name and source (texts) and density, overlap and focus, each with its lowest and "
        f"highest value or null, as in {BANDS_FILE}."
    )
    bands = read_json_object(Path(file), InputError, remedy)
    if not is_bands(bands):
        raise InputError(f"{file}: no bands. {remedy}")
    return bands


def is_bands(value: Any) -> bool:
    """Whether something that was stored is a file of bands."""
    return has(name=is_text, source=is_text, **dict.fromkeys(MEASURES, _is_band))(value)


def _is_band(value: Any) -> bool:
    return is_list(or_none(is_number), 2)(value) and len(value) == 2 and (None in value or value[0] <= value[1])


def is_monolayer(value: Any) -> bool:
    """Whether something that was stored is what [`judged`] gives."""
    reasons = {text for texts in OUTSIDE.values() for text in texts}
    is_tile = has(
        box=lambda box: is_list(is_number, 4)(box) and len(box) == 4,
        red_cells=is_number,
        outside=is_list(lambda text: is_text(text) and text in reasons),
        **dict.fromkeys(MEASURES, or_none(is_number)),
    )
    return has(bands=is_bands, tiles=is_list(is_tile))(value)


def focus_of(image: "Image.Image", diameter: float) -> float:
    """How sharp an image is: the variance of its Laplacian by that of its brightness, where red cells have the same size.

    Args:
        image (`PIL.Image.Image`): A tile.
        diameter (`float`): Of a red cell, in pixels of the tile.
    """
    from PIL import Image

    share = FOCUS_DIAMETER / diameter
    size = max(round(image.width * share), 3), max(round(image.height * share), 3)
    grey = np.asarray(image.convert("L").resize(size, Image.Resampling.BILINEAR), dtype=np.float32)
    laplacian = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * grey[1:-1, 1:-1]
    # A grey value of noise in an empty tile is no sharp edge.
    return float(laplacian.var() / (grey.var() + 1))


def judged(
    boxes: Sequence[tuple[float, float, float, float]],
    focus: Sequence[float],
    cells: Sequence[Cell],
    parents: Mapping[str, str],
) -> dict[str, Any]:
    """Measures the tiles of an image and judges them by the bands of the package.

    Args:
        boxes (`Sequence[tuple]`): What each tile answers for: x_min, y_min, x_max, y_max in pixels of the image.
        focus (`Sequence[float]`): Of each, see [`focus_of`].
        cells (`Sequence[Cell]`): Cells of the image.
        parents (`Mapping[str, str]`): Class -> coarser class.

    Returns:
        `dict`: `bands`, and `tiles`: each with `box`, `red_cells`, `density` (share of the tile that its red cells cover),
        `overlap` (share of its red cells that overlap another; `None` with fewer than five), `focus`, and `outside`: what is
        wrong with it, empty in the monolayer.
    """
    red = [cell for cell in cells if cell_kind(cell.label, dict(parents)) == RED_CELL]
    corners = np.array([cell.box for cell in red]).reshape(-1, 4)
    centres, sizes = (corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]
    overlapping = _overlapping(corners)
    order = np.argsort(centres[:, 0])
    sorted_x = centres[order, 0]
    tiles = []
    for (left, top, right, bottom), sharpness in zip(boxes, focus, strict=True):
        inside = order[slice(*np.searchsorted(sorted_x, (left, right)))]
        inside = inside[(centres[inside, 1] >= top) & (centres[inside, 1] < bottom)]
        number = len(inside)
        tile = {
            "box": [left, top, right, bottom],
            "red_cells": number,
            "density": round(math.pi / 4 * float(sizes[inside].prod(1).sum()) / ((right - left) * (bottom - top)), 4),
            "overlap": round(float(overlapping[inside].mean()), 4) if number >= FEW else None,
            "focus": round(float(sharpness), 5),
        }
        tiles.append(tile)
    return judged_again({"tiles": tiles})


def judged_again(monolayer: Mapping[str, Any], bands: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What [`judged`] gave, by other bands.

    Args:
        monolayer (`Mapping`): It.
        bands (`Mapping`, *optional*): See [`read_bands`]; those of the package when missing.
    """
    bands = dict(usual_bands() if bands is None else bands)
    tiles = []
    for tile in monolayer["tiles"]:
        outside = []
        for name in MEASURES:
            low, high = bands[name]
            if tile[name] is not None and low is not None and tile[name] < low:
                outside.append(OUTSIDE[name][0])
            if tile[name] is not None and high is not None and tile[name] > high:
                outside.append(OUTSIDE[name][1])
        tiles.append({**tile, "outside": outside})
    return {"bands": bands, "tiles": tiles}


def outside_monolayer(monolayer: Mapping[str, Any] | None, cells: Sequence[Cell]) -> list[bool]:
    """Of each cell, whether its centre lies in a tile outside the monolayer. Of an image that is seen whole none does: whoever
    took it chose the place.

    Args:
        monolayer (`Mapping`, *optional*): See [`judged`].
        cells (`Sequence[Cell]`): Cells of the image.
    """
    centres = np.array([cell.center for cell in cells]).reshape(-1, 2)
    outside = np.zeros(len(cells), dtype=bool)
    tiles = monolayer["tiles"] if monolayer else []
    order = np.argsort(centres[:, 0])
    sorted_x = centres[order, 0]
    for tile in tiles if len(tiles) > 1 else ():
        if tile["outside"]:
            left, top, right, bottom = tile["box"]
            column = order[slice(*np.searchsorted(sorted_x, (left, right)))]
            outside[column[(centres[column, 1] >= top) & (centres[column, 1] < bottom)]] = True
    return outside.tolist()


def told(monolayer: Mapping[str, Any], cells: Sequence[Cell], parents: Mapping[str, str]) -> str | None:
    """One sentence on what of an image in tiles lies outside the monolayer; `None` where nothing does.

    Args:
        monolayer (`Mapping`): See [`judged`].
        cells (`Sequence[Cell]`): Cells of the image.
        parents (`Mapping[str, str]`): Class -> coarser class.
    """
    tiles = monolayer["tiles"]
    outside = [tile for tile in tiles if tile["outside"]]
    if len(tiles) < 2 or not outside:
        return None
    reasons = Counter(reason for tile in outside for reason in tile["outside"])
    where = outside_monolayer(monolayer, cells)
    red = [there for cell, there in zip(cells, where, strict=True) if cell_kind(cell.label, dict(parents)) == RED_CELL]
    return (
        f"{len(outside)} of {len(tiles)} tiles lie outside the monolayer by the bands of {monolayer['bands']['name']} ("
        + ", ".join(f"{number} with {reason}" for reason, number in reasons.most_common())
        + f"): {sum(red)} of {len(red)} red cells."
    )


def _overlapping(boxes: np.ndarray) -> np.ndarray:
    """Of boxes xyxy `[n, 4]`, whether each overlaps another, bool `[n]`."""
    from scipy.spatial import cKDTree

    found = np.zeros(len(boxes), dtype=bool)
    if len(boxes) < 2:
        return found
    centres, sizes = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    pairs = cKDTree(centres).query_pairs(float(sizes.max()), output_type="ndarray")
    first, second = boxes[pairs[:, 0]], boxes[pairs[:, 1]]
    shared = np.clip(np.minimum(first[:, 2:], second[:, 2:]) - np.maximum(first[:, :2], second[:, :2]), 0, None).prod(1)
    close = shared > OVERLAPPING * np.minimum(*(sizes[pairs[:, side]].prod(1) for side in (0, 1)))
    found[pairs[close].ravel()] = True
    return found


__all__ = [
    "focus_of",
    "is_monolayer",
    "judged",
    "judged_again",
    "outside_monolayer",
    "read_bands",
    "told",
    "usual_bands",
]
