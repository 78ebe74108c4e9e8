"""How large the red cells of an image are, and the scale at which a model knows them."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from unihema.processing_unihema.class_names import RED_CELL, cell_kind
from unihema.results.cell import Cell
from unihema.results.tile_layout import SHAPE, Tile, size_of
from unihema.slides import RegionSource


# Mean diameter of a normal red cell on a smear (LAB: 6 to 8 micrometres), which tells the size of a pixel.
RED_CELL_MICROMETRES = 7.2
# Red cells by which a size can be told.
FEW = 5
# How many times as much a closer look must show: where red cells of another size are seen, and where hardly any are.
MORE_OF_SMALL, MORE_OF_USUAL, MORE = 1.1, 1.3, 1.5
# Parts of an image that are looked at for its scale are smaller by this factor each time, down to this share of the input's edge.
STEP, SMALLEST_PART = math.sqrt(2), 0.4
# A picture whose longer edge is less than this many of the input's, with no red cell, may be a crop of one cell.
SMALL_PICTURE = 1.5
# An image is seen whole where that differs by less than this factor from the scale that it should have.
SAME_SCALE = 1.15
# Of a checkpoint that does not say how large red cells are: this part of the longer edge of a field.
USUAL_SHARE = 1 / 6


class KnownSize(NamedTuple):
    """How large red cells are in the fields that a checkpoint was trained on, in pixels of the model's input.

    Args:
        low, usual, high (`float`): 5 %, 50 % and 95 % of the fields have cells (the median of a field) below this.
    """

    low: float
    usual: float
    high: float

    @property
    def um_per_pixel(self) -> float:
        """Size of a pixel of the model's input on the glass."""
        return RED_CELL_MICROMETRES / self.usual


def red_cell_diameter(cells: Sequence[Cell], width: float, height: float, parents: dict[str, str]) -> tuple[int, float]:
    """How many red cells there are, and their median diameter in pixels (0 without any).

    Args:
        cells (`Sequence[Cell]`): Cells of an image or tile.
        width, height (`float`): Of it, in pixels: of a cell that its edge cuts the longer side is taken.
        parents (`dict[str, str]`): Class -> coarser class.
    """
    sizes = []
    for cell in cells:
        if cell_kind(cell.label, parents) == RED_CELL:
            x_min, y_min, x_max, y_max = cell.box
            sides = x_max - x_min, y_max - y_min
            whole = x_min > 1 and y_min > 1 and x_max < width - 1 and y_max < height - 1
            sizes.append(math.sqrt(sides[0] * sides[1]) if whole else max(sides))
    return len(sizes), float(np.median(sizes)) if sizes else 0.0


class _Looks(NamedTuple):
    """What places of one size show.

    Args:
        size (`float`): Their longer edge, in pixels of the image.
        places (`list[Tile]`): The places.
        cells (`list[Sequence[Cell]]`): Of each its cells, in pixels of the image.
        number (`int`): Red cells of all places.
        diameter (`float`): Their median diameter, in pixels of the model's input.
    """

    size: float
    places: list[Tile]
    cells: list[Sequence[Cell]]
    number: int
    diameter: float


def find_scale(
    image: RegionSource,
    first_look: Sequence[Cell],
    crowded: bool,
    known: KnownSize,
    edge: int,
    parents: dict[str, str],
    cells_of: Callable[[Sequence[Tile]], list[list[Cell]]],
) -> tuple[float | None, float | None]:
    """Pixels of the image for a pixel of the model's input, by the red cells that are found.

    Of cells that are too small a model finds some, and draws them too large, so that their size alone does not tell. Where
    it is small, or hardly a cell is found, parts of the image are looked at more and more closely, as long as that shows more
    at the same place: more red cells, or surer ones.

    Args:
        image ([`RegionSource`]): The image.
        first_look (`Sequence[Cell]`): Cells of the whole image.
        crowded (`bool`): Whether there were more of them than can be found at once.
        known ([`KnownSize`]): Of the checkpoint.
        edge (`int`): Longer edge of the model's input.
        parents (`dict[str, str]`): Class -> coarser class.
        cells_of (`Callable`): Finds the cells of tiles, in pixels of the image from the tile's corner.

    Returns:
        `tuple[float | None, float | None]`: That scale, `None` where the image is best seen whole, and the diameter of its red
        cells in pixels, `None` where there are too few to tell.
    """
    longer = max(image.size)
    number, diameter = red_cell_diameter(first_look, *image.size, parents)
    diameter *= edge / longer
    if number and diameter > known.high * SAME_SCALE and not crowded:
        # No further away than needed: the larger cells are, the better they are seen.
        return longer / edge * diameter / known.high, longer / edge * diameter
    small = math.sqrt(known.low * known.usual)
    if number >= FEW and diameter >= small and not crowded:
        return None, longer / edge * diameter
    if not number and longer < SMALL_PICTURE * edge:
        return None, None
    whole = Tile((0, 0, *image.size), (0, 0, *image.size))
    best = _Looks(longer, [whole], [first_look], number, diameter)
    for power in range(1, int(math.log(longer / (SMALLEST_PART * edge), STEP)) + 1):
        looks = _looks(image, longer / STEP**power, edge, parents, cells_of)
        if looks.number < FEW or not known.low <= looks.diameter <= known.high:
            continue
        now, before = _evidence(looks, best, image, known.usual / edge, parents)
        needed = MORE if best.number < FEW else MORE_OF_SMALL if best.diameter < known.low else MORE_OF_USUAL
        if now < needed * before:
            break
        best = looks
        if looks.diameter >= small:
            break
    enough = best.number >= FEW and best.diameter >= known.low
    return None if best.size == longer else best.size / edge, best.size / edge * best.diameter if enough else None


def _looks(
    image: RegionSource,
    size: float,
    edge: int,
    parents: dict[str, str],
    cells_of: Callable[[Sequence[Tile]], list[list[Cell]]],
) -> _Looks:
    """What places whose longer edge is `size` show."""
    places = _places(image, size)
    cells, numbers, sizes = [], [], []
    for place, found in zip(places, cells_of(places), strict=True):
        left, top = place.box[:2]
        number, diameter = red_cell_diameter(found, *size_of(place.box), parents)
        numbers.append(number)
        sizes += [diameter] * number
        cells.append([cell.placed(left, top) for cell in found])
    return _Looks(size, places, cells, sum(numbers), float(np.median(sizes)) * edge / size if sizes else 0.0)


def _shared(one: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> int:
    """Pixels that two boxes share."""
    width, height = (min(one[axis + 2], other[axis + 2]) - max(one[axis], other[axis]) for axis in (0, 1))
    return max(width, 0) * max(height, 0)


def _evidence(
    looks: _Looks, before: _Looks, image: RegionSource, share: float, parents: dict[str, str]
) -> tuple[float, float]:
    """How surely red cells are seen in places: the sum of their scores, now and in wider looks at the same places.

    Args:
        looks, before ([`_Looks`]): Of the places, and of wider ones around them.
        image ([`RegionSource`]): The image.
        share (`float`): Diameter of a red cell by the longer edge of a place: so near to its edge cells may be missed.
        parents (`dict[str, str]`): Class -> coarser class.
    """
    sums = [0.0, 0.0]
    margin = share * looks.size / 2
    for place, cells in zip(looks.places, looks.cells, strict=True):
        left, top, right, bottom = place.box
        # Each place lies in one of the wider looks.
        around = before.cells[max(range(len(before.places)), key=lambda i: _shared(place.box, before.places[i].box))]
        left, top = (edge + margin if edge > 0 else edge for edge in (left, top))
        right, bottom = (edge - margin if edge < limit else edge for edge, limit in zip((right, bottom), image.size))
        for number, found in enumerate((cells, around)):
            for cell in found:
                x, y = cell.center
                if left <= x < right and top <= y < bottom and cell_kind(cell.label, parents) == RED_CELL:
                    sums[number] += cell.score
    return sums[0], sums[1]


def _places(image: RegionSource, size: float) -> list[Tile]:
    """Tiles whose longer edge is `size`: one in the middle of the image, and two apart where it is larger than a tile."""
    width, height = round(size), round(size / SHAPE)
    found = {}
    for x, y in image.places:
        left, top = round(x * image.width - width / 2), round(y * image.height - height / 2)
        left = min(max(left, 0), image.width - width) if image.width > width else (image.width - width) // 2
        top = min(max(top, 0), image.height - height) if image.height > height else (image.height - height) // 2
        box = (left, top, left + width, top + height)
        found[box] = Tile(box, box)
    return list(found.values())
