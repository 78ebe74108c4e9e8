"""Wide fields, and cells of another size than a checkpoint knows: an image seen in overlapping tiles at the right scale."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from PIL import Image

from unihema.errors import RequestError
from unihema.processing_unihema.class_names import cell_kind, is_untyped_white_cell, is_white_cell
from unihema.processing_unihema.post_processing import NMS_IOU, NMS_WITHIN
from unihema.results.smear_result import CROWDED, OTHER_SIZE, Cell, SmearResult


# Mean diameter of a normal red cell on a smear (LAB: 6 to 8 micrometres), which tells the size of a pixel.
RED_CELL_MICROMETRES = 7.2
# How far the red cells of an image may be below and above the sizes of the training fields before it is seen at another scale.
# Of cells that are too small a model finds the largest, and draws them too large: they look almost right.
BELOW, ABOVE = 1.08, 1.1
# Red cells by which a size can be told, and those of an image that is seen from further away.
FEW, FEW_LARGE = 5, 3
# Diameters of white cells, in those of red ones.
WHITE_CELL = (0.8, 3.0)
# Width to height of a tile, as of most fields.
SHAPE = 4 / 3
# Overlap on each side of a tile's core, in diameters of a red cell.
MARGIN = 0.6
# Places of an image that are looked at to find its scale, as shares of its width and height.
PLACES = ((0.5, 0.5), (0.25, 0.3), (0.75, 0.7))
# How many times as many red cells another scale must show: where those of the first look are too small, and where it saw few.
MORE_OF_SMALL, MORE = 1.1, 1.5
# Parts of an image that are looked at for its scale are smaller by this factor each time, down to this share of the input's edge.
STEP, SMALLEST_PART = math.sqrt(2), 0.4
# A picture whose longer edge is less than this many of the input's has its scale not searched where few red cells are found.
SMALL_PICTURE = 1.5
TILES_AT_ONCE = 4
# Of a tile that micrometres ask for: its longer edge in pixels of the file, at least, and in that of the image, at most.
SMALLEST_TILE, LARGEST_VIEW = 64, 8
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

    def holds(self, diameter: float) -> bool:
        """Whether cells of this diameter are about as large as in training."""
        return self.low / BELOW <= diameter <= self.high * ABOVE


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


def see_in_tiles(
    image: Image.Image,
    result: SmearResult,
    look: Callable[[list[Image.Image]], list[SmearResult]],
    edge: int,
    known: KnownSize | None,
    tiles: str | int = "auto",
    um_per_pixel: float | None = None,
) -> None:
    """Sees an image in tiles, where that is asked for or its cells are not of the size that the model knows, and puts what they
    show into its result.

    Args:
        image (`PIL.Image.Image`): The image, perhaps reduced.
        result ([`SmearResult`]): What was seen of the whole image, in pixels of its file; changed.
        look (`Callable`): What is seen of parts of the image.
        edge (`int`): Longer edge of the model's input in pixels.
        known ([`KnownSize`], *optional*): Of the checkpoint.
        tiles (`str` or `int`): `"auto"`, or the longer edge of a tile in pixels of the file.
        um_per_pixel (`float`, *optional*): Size of a pixel of the file in micrometres.

    Raises:
        RequestError: With pixels of this size no cell of the image could be seen.
    """
    to_file = result.width / image.width
    first_look = [replace(cell, box=tuple(value / to_file for value in cell.box)) for cell in result.cells]
    scale, source = _scale(image, result, first_look, look, edge, known, tiles, um_per_pixel)
    if scale is None:
        return
    usual = edge * USUAL_SHARE if known is None else known.usual
    placed = tiles_at(image, scale, edge, usual)
    seen: list[SmearResult] = []
    for start in range(0, len(placed), TILES_AT_ONCE):
        seen += look([cut(image, tile) for tile in placed[start : start + TILES_AT_ONCE]])
    # White cells may be known from whole fields, at their size there, as well.
    whole = Tile((0, 0, *image.size), (0, 0, *image.size))
    white = [cell for cell in first_look if _is_white_cell_of(cell, usual * scale, result.class_parents)]
    of_tiles = [of_tile.cells for of_tile in seen]
    found = merged([*placed, whole], [*of_tiles, white], result.class_parents, usual * scale)
    result.cells = [replace(cell, box=tuple(value * to_file for value in cell.box)) for cell in found]
    if result.mask is not None:
        result.mask = joined_masks(placed, [of_tile.mask for of_tile in seen], image.size)
    width, height = (round(edge_of * to_file) for edge_of in _size(placed[0].box))
    result.tiling = {"tiles": len(placed), "tile": [width, height], "scale": scale * to_file, "scale_source": source}
    if known is not None:
        result.tiling["um_per_pixel"] = um_per_pixel or known.um_per_pixel / (scale * to_file)
    full = sum(any(CROWDED in text for text in of_tile.warnings) for of_tile in seen)
    result.warnings = [text for text in result.warnings if CROWDED not in text and OTHER_SIZE not in text]
    result.warnings.append(f"Seen in {len(placed)} tiles of {width} x {height} pixels; their size is {source}.")
    if full:
        result.warnings.append(
            f"In {full} of {len(placed)} tiles all {CROWDED}: the counts are too low. Give smaller tiles."
        )


def _is_white_cell_of(cell: Cell, diameter: float, parents: dict[str, str]) -> bool:
    """Whether a cell is a white cell as large as one can be where red cells have this diameter in pixels."""
    size = math.sqrt((cell.box[2] - cell.box[0]) * (cell.box[3] - cell.box[1])) / diameter
    return is_white_cell(cell.label, parents) and WHITE_CELL[0] <= size <= WHITE_CELL[1]


def _scale(
    image: Image.Image,
    result: SmearResult,
    first_look: Sequence[Cell],
    look: Callable[[list[Image.Image]], list[SmearResult]],
    edge: int,
    known: KnownSize | None,
    tiles: str | int,
    um_per_pixel: float | None,
) -> tuple[float | None, str]:
    """Pixels of the image for a pixel of the model's input, `None` where it is best seen whole, and where that comes from."""
    to_file, longer = result.width / image.width, max(image.size)
    if isinstance(tiles, int):
        return (tiles / to_file / edge if tiles / to_file < longer else None), "given"
    if known is None:
        return None, ""
    if um_per_pixel is not None:
        scale = known.um_per_pixel / (um_per_pixel * to_file)
        if not SMALLEST_TILE <= scale * edge * to_file <= LARGEST_VIEW * longer * to_file:
            raise RequestError(
                f"{result.image or 'image'}: with pixels of {um_per_pixel:g} micrometres a red cell would be "
                f"{RED_CELL_MICROMETRES / um_per_pixel:.3g} pixels wide, in an image of {result.width} x {result.height}. "
                "Check the size of a pixel."
            )
        same = abs(math.log(scale * edge / longer)) < math.log(SAME_SCALE)
        return (None if same else scale), "that of the training at the given micrometres"
    crowded = any(CROWDED in text for text in result.warnings)
    scale = find_scale(image, first_look, crowded, known, edge, result.class_parents, lambda parts: [
        of_part.cells for of_part in look(parts)
    ])  # fmt: skip
    return scale, "estimated from the red cells that are found"


def _size(box: tuple[int, int, int, int]) -> tuple[int, int]:
    return box[2] - box[0], box[3] - box[1]


def joined_masks(tiles: Sequence[Tile], masks: Sequence[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """The mask of an image, uint8 `[h, w]`: of each tile its core.

    Args:
        tiles (`Sequence[Tile]`): The tiles.
        masks (`Sequence[np.ndarray]`): Of each tile.
        size (`tuple[int, int]`): Width and height of the image.
    """
    whole = np.zeros(size[::-1], dtype=np.uint8)
    for tile, mask in zip(tiles, masks, strict=True):
        left, top, right, bottom = tile.core
        x, y = left - tile.box[0], top - tile.box[1]
        whole[top:bottom, left:right] = mask[y : y + bottom - top, x : x + right - left]
    return whole


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


def cut(image: Image.Image, tile: Tile) -> Image.Image:
    """The pixels of a tile. What lies beyond the image gets the median colour of its edge."""
    left, top, right, bottom = tile.box
    inside = max(left, 0), max(top, 0), min(right, image.width), min(bottom, image.height)
    part = image.crop(inside)
    if inside == tile.box:
        return part
    canvas = Image.new("RGB", (right - left, bottom - top), border_colour(part))
    canvas.paste(part, (inside[0] - left, inside[1] - top))
    return canvas


def border_colour(image: Image.Image) -> tuple[int, ...]:
    """The median colour of an image's outermost pixels."""
    pixels = np.asarray(image)
    border = np.concatenate((pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]))
    return tuple(int(value) for value in np.median(border, axis=0))


def merged(
    tiles: Sequence[Tile], found: Sequence[Sequence[Cell]], parents: dict[str, str], diameter: float
) -> list[Cell]:
    """The cells of all tiles, in pixels of the image, each once, best score first.

    A cell is that of the tile whose core holds its centre. Near a seam two tiles may disagree on the centre: cells a little
    outside the core are taken as well, and of cells of one kind that overlap, as in one field, that which is whole is kept,
    then the better one.

    Args:
        tiles (`Sequence[Tile]`): The tiles.
        found (`Sequence[Sequence[Cell]]`): The cells of each, in pixels of the tile.
        parents (`dict[str, str]`): Class -> coarser class.
        diameter (`float`): Of a red cell, in pixels.
    """
    cells, owners, cut_off = [], [], []
    for number, (tile, of_tile) in enumerate(zip(tiles, found, strict=True)):
        left, top, right, bottom = tile.box
        for cell in of_tile:
            x_min, y_min, x_max, y_max = (a + b for a, b in zip(cell.box, (left, top, left, top)))
            x, y = (x_min + x_max) / 2, (y_min + y_max) / 2
            reach = 0.3 * diameter
            if not (
                tile.core[0] - reach <= x < tile.core[2] + reach and tile.core[1] - reach <= y < tile.core[3] + reach
            ):
                continue
            touches = x_min <= left + 1 or y_min <= top + 1 or x_max >= right - 1 or y_max >= bottom - 1
            cells.append(replace(cell, box=(x_min, y_min, x_max, y_max)))
            owners.append(number)
            cut_off.append(touches)
    kept = _once(cells, owners, cut_off, parents)
    kept.sort(key=lambda cell: -cell.score)
    return [replace(cell, id=number) for number, cell in enumerate(kept, 1)]


def _once(cells: list[Cell], owners: list[int], cut_off: list[bool], parents: dict[str, str]) -> list[Cell]:
    from scipy.spatial import cKDTree

    if not cells:
        return []
    boxes = np.array([cell.box for cell in cells])
    centres, sizes = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    kinds = [cell_kind(cell.label, parents) or cell.label for cell in cells]
    untyped = [is_untyped_white_cell(cell.label) for cell in cells]
    order = sorted(range(len(cells)), key=lambda i: (cut_off[i], untyped[i], -cells[i].score))
    rank = {cell: place for place, cell in enumerate(order)}
    tree = cKDTree(centres)
    gone: set[int] = set()
    for i in order:
        if i in gone:
            continue
        for j in tree.query_ball_point(centres[i], float(sizes[i].max())):
            if j == i or j in gone or owners[i] == owners[j] or kinds[i] != kinds[j] or rank[j] < rank[i]:
                continue
            low, high = np.maximum(boxes[i, :2], boxes[j, :2]), np.minimum(boxes[i, 2:], boxes[j, 2:])
            overlap = float(np.prod(np.clip(high - low, 0, None)))
            areas = float(np.prod(sizes[i])), float(np.prod(sizes[j]))
            if overlap > NMS_IOU * (sum(areas) - overlap) or overlap > NMS_WITHIN * min(areas):
                gone.add(j)
    return [cell for i, cell in enumerate(cells) if i not in gone]


def red_cell_diameter(cells: Sequence[Cell], width: float, height: float, parents: dict[str, str]) -> tuple[int, float]:
    """How many whole red cells there are, and their median diameter in pixels (0 without any).

    Args:
        cells (`Sequence[Cell]`): Cells of an image or tile.
        width, height (`float`): Of it, in pixels: what touches its edge is not whole.
        parents (`dict[str, str]`): Class -> coarser class.
    """
    sizes = []
    for cell in cells:
        x_min, y_min, x_max, y_max = cell.box
        whole = x_min > 1 and y_min > 1 and x_max < width - 1 and y_max < height - 1
        if whole and cell_kind(cell.label, parents) == "red blood cell":
            sizes.append(math.sqrt((x_max - x_min) * (y_max - y_min)))
    return len(sizes), float(np.median(sizes)) if sizes else 0.0


def find_scale(
    image: Image.Image,
    first_look: Sequence[Cell],
    crowded: bool,
    known: KnownSize,
    edge: int,
    parents: dict[str, str],
    look: Callable[[list[Image.Image]], list[list[Cell]]],
) -> float | None:
    """Pixels of the image for a pixel of the model's input, by the red cells that are found; `None` where the image is best
    seen whole.

    Args:
        image (`PIL.Image.Image`): The image.
        first_look (`Sequence[Cell]`): Cells of the whole image.
        crowded (`bool`): Whether there were more of them than can be found at once.
        known ([`KnownSize`]): Of the checkpoint.
        edge (`int`): Longer edge of the model's input.
        parents (`dict[str, str]`): Class -> coarser class.
        look (`Callable`): Finds the cells of images.
    """
    longer = max(image.size)
    number, diameter = red_cell_diameter(first_look, *image.size, parents)
    diameter *= edge / longer
    if number >= FEW and known.holds(diameter) and not crowded:
        return None
    if number >= FEW and diameter > known.high * ABOVE:
        return longer / edge * diameter / known.usual
    if number < FEW and longer < SMALL_PICTURE * edge:
        # A crop of a cell or a small field. Nothing says that its scale is another.
        return None
    # Cells that are plainly too small speak for another scale by themselves.
    needed = (MORE_OF_SMALL if number >= FEW else MORE) * number / (image.width * image.height)
    closer = int(math.log(longer / (SMALLEST_PART * edge), STEP))
    # With too few cells in the first look they may also be too large.
    for power in (*((2, 1) if number < FEW else ()), *range(-1, -closer - 1, -1)):
        size = longer * STEP**power
        places = _places(image, size)
        width, height = _size(places[0].box)
        counts = [
            red_cell_diameter(cells, width, height, parents) for cells in look([cut(image, tile) for tile in places])
        ]
        # Of large cells few are whole.
        enough = FEW if power < 0 else FEW_LARGE
        counts = [(n, d * edge / size) for n, d in counts if n >= enough]
        if counts and known.low <= np.median([d for _, d in counts]) <= known.high:
            # The first that fits shows most at once; closer looks find what the training did not count.
            area = min(width, image.width) * min(height, image.height)
            return size / edge if float(np.mean([n for n, _ in counts])) / area >= needed else None
    return None


def _places(image: Image.Image, size: float) -> list[Tile]:
    """Tiles whose longer edge is `size`: one in the middle of the image, and two apart where it is larger than a tile."""
    width, height = round(size), round(size / SHAPE)
    found = {}
    for x, y in PLACES:
        left, top = round(x * image.width - width / 2), round(y * image.height - height / 2)
        left = min(max(left, 0), image.width - width) if image.width > width else (image.width - width) // 2
        top = min(max(top, 0), image.height - height) if image.height > height else (image.height - height) // 2
        box = (left, top, left + width, top + height)
        found[box] = Tile(box, box)
    return list(found.values())


def tiles_at(image: Image.Image, scale: float, edge: int, diameter: float) -> list[Tile]:
    """The tiles of an image in which it is seen at a scale.

    Args:
        image (`PIL.Image.Image`): The image.
        scale (`float`): Pixels of the image for a pixel of the model's input.
        edge (`int`): Longer edge of the model's input.
        diameter (`float`): Of a red cell in the model's input.
    """
    width, height = round(edge * scale), round(edge * scale / SHAPE)
    return lay_tiles(*image.size, width, height, round(MARGIN * diameter * scale))
