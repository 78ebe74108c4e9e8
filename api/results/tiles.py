"""Wide fields, and cells of another size than a checkpoint knows: an image seen in overlapping tiles at the right scale."""

import math
from bisect import bisect
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
from PIL import Image

from unihema.errors import RequestError, UnreadableImageError
from unihema.files import OpenedImage
from unihema.processing_unihema.class_names import (
    cell_kind,
    is_beside_differential,
    is_untyped_white_cell,
    is_white_cell,
)
from unihema.processing_unihema.image_io import MAX_PIXELS
from unihema.processing_unihema.masks import rle_decode, rle_encode
from unihema.processing_unihema.post_processing import NMS_IOU, NMS_WITHIN
from unihema.results.monolayer import RED, focus_of, judged, told
from unihema.results.nuclei import find_nuclei
from unihema.results.smear_result import CROWDED, OTHER_SIZE, Cell, SmearResult
from unihema.slides import ImageRegions, RegionSource, UnreadableRegionError


# Mean diameter of a normal red cell on a smear (LAB: 6 to 8 micrometres), which tells the size of a pixel.
RED_CELL_MICROMETRES = 7.2
# Red cells by which a size can be told.
FEW = 5
# Diameters of white cells, in those of red ones.
WHITE_CELL = (0.8, 3.0)
# Width to height of a tile, as of most fields.
SHAPE = 4 / 3
# Overlap on each side of a tile's core, in diameters of a red cell.
MARGIN = 0.6
# How far outside a tile's core the centre of a cell may be that two tiles disagree on, in diameters of a red cell.
REACH = 0.3
# Score from which such a cell counts although the other tile does not see it: so near to a tile's edge cells are missed.
SURE = 0.35
# What a score is worth, of the same cell in two tiles, where a tile's edge cuts it, and where it is a white cell without a type.
WORSE = 0.5
# How many times as much a closer look must show: where red cells of another size are seen, and where hardly any are.
MORE_OF_SMALL, MORE_OF_USUAL, MORE = 1.1, 1.3, 1.5
# Parts of an image that are looked at for its scale are smaller by this factor each time, down to this share of the input's edge.
STEP, SMALLEST_PART = math.sqrt(2), 0.4
# A picture whose longer edge is less than this many of the input's, with no red cell, may be a crop of one cell.
SMALL_PICTURE = 1.5
TILES_AT_ONCE = 4
# How often a tile with more cells than queries is divided in four.
SPLITS = 2
# Of a tile that micrometres ask for: its longer edge in pixels of the file, at least, and in that of the image, at most.
SMALLEST_TILE, LARGEST_VIEW = 64, 8
# An image is seen whole where that differs by less than this factor from the scale that it should have.
SAME_SCALE = 1.15
# What a file says of its pixels is not believed where the red cells say something else by more than this factor.
CONTRADICTION = 1.6
ESTIMATED = "estimated from the red cells"
# A tile of a slide is read at no more pixels than this many of the model's input.
SHARPEST = 2
# An image of fewer tiles is seen in a second or two, and begun anew where that was stopped.
WORTH_KEEPING = 16
# Tiles of an image at most, and pixels of the mask of one that is larger than `MAX_PIXELS`.
MOST_TILES, MOST_MASK_PIXELS = 1_000_000, 16_000_000
# A slide is divided into so many parts along its longer side to find where something lies on the glass.
PARTS = 32
# Empty glass: levels of gray between its darkest and brightest pixel (a share of the image's contrast, within limits), and how
# far it may be below the brightest glass. What is darker is no glass: it may be what could not be read.
EVEN_SHARE, EVEN, GLASS_BELOW, GLASS = 0.15, (4.0, 10.0), 30, 100
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


class TileStore(Protocol):
    """Keeps what tiles show while an image is being seen, so that work that is stopped goes on."""

    def begin(self, layout: dict[str, Any]) -> list[list[dict[str, Any]]]:
        """What was kept of an image that is seen in just this way, a list for each call of `append`."""

    def append(self, seen: list[dict[str, Any]]) -> None:
        """Keeps what was seen of some tiles."""


def see_in_tiles(
    image: Image.Image | RegionSource,
    result: SmearResult,
    look: Callable[[list[Image.Image]], list[SmearResult]],
    edge: int,
    known: KnownSize | None,
    tiles: str | int = "auto",
    um_per_pixel: float | None = None,
    store: TileStore | None = None,
    on_tile: Callable[[int, int, int], None] | None = None,
    search: Callable[[list[Image.Image]], list[SmearResult]] | None = None,
    white_cells: int | None = None,
    calibrated: bool = True,
) -> None:
    """Sees an image in tiles, where that is asked for or its cells are not of the size that the model knows, and puts what they
    show into its result.

    Args:
        image (`RegionSource` or `PIL.Image.Image`): The image, of any size, or perhaps reduced.
        result ([`SmearResult`]): What was seen of the whole image, in pixels of its file; changed.
        look (`Callable`): What is seen of parts of the image.
        edge (`int`): Longer edge of the model's input in pixels.
        known ([`KnownSize`], *optional*): Of the checkpoint.
        tiles (`str` or `int`): `"auto"`, or the longer edge of a tile in pixels of the file.
        um_per_pixel (`float`, *optional*): Size of a pixel of the file in micrometres, instead of what the file says.
        store ([`TileStore`], *optional*): Keeps finished tiles.
        on_tile (`Callable`, *optional*): Called with the number of tiles that are done, of all tiles, and of cells in them (near
            seams some are counted twice).
        search (`Callable`, *optional*): What is seen of parts of the image when its scale is searched, where `look` finds not all
            classes, or not at the thresholds of the checkpoint.
        white_cells (`int`, *optional*): Only tiles with nuclei are seen, in an order of chance that is always the same, until so
            many white cells are found; other cells are not counted.
        calibrated (`bool`): Whether cells are those above the thresholds of the checkpoint. With others it says nothing that all
            queries found one, and nothing is seen in smaller tiles for that.

    Raises:
        RequestError: With pixels of this size no cell of the image could be seen.
        UnreadableImageError: No tile can be read.
    """
    if isinstance(image, RegionSource):
        source = image
    else:
        source = ImageRegions(OpenedImage(image, result.width, result.height, result.image))
    state_pixel_size(result, source, um_per_pixel)
    if source.streams:
        source.longest, source.places = SHARPEST * edge, crowded_places(source)

    def cells_of(parts: Sequence[Tile]) -> list[list[Cell]]:
        pictures = [cut(source, tile, strict=False) for tile in parts]
        return [
            _in_file(of_part.cells, picture, tile)
            for of_part, picture, tile in zip((search or look)(pictures), pictures, parts, strict=True)
        ]

    first_look, result.cells = result.cells, list(result.cells)
    whole = Tile((0, 0, *source.size), (0, 0, *source.size))
    red_cells = first_look
    if search and tiles == "auto" and um_per_pixel is None:
        (red_cells,) = cells_of([whole])
    scale, scale_source = _scale(source, result, red_cells, cells_of, edge, known, tiles, um_per_pixel)
    if scale is None and calibrated and known is not None and _is_crowded(result):
        scale, scale_source = max(source.size) / edge / 2, "halved, as there were more cells than the model has queries"
    if scale is None:
        if white_cells is not None:
            result.warnings.append(
                "The image was seen whole, so that all of its cells are counted, not white cells alone."
            )
        if source.streams and known is not None:
            result.warnings.append(
                f"The image has {source.width} x {source.height} pixels and was seen whole, as no red cells by which to tell its "
                "scale were found. Give the size of its pixels (--um-per-pixel)."
            )
        return
    usual = edge * USUAL_SHARE if known is None else known.usual
    placed = tiles_at(source, scale, edge, usual)
    if len(placed) > MOST_TILES:
        raise RequestError(
            f"{result.image or 'image'}: {source.width} x {source.height} pixels would be {len(placed):,} tiles, and more than "
            f"{MOST_TILES:,} are not seen. Give larger tiles, or check the size of a pixel."
        )
    glass = empty_glass(source, placed)
    looked_at = [tile for tile, empty in zip(placed, glass, strict=True) if not empty]
    filled = len(looked_at)
    if white_cells is not None:
        size = result.um_per_pixel or cast("KnownSize", known).um_per_pixel / scale
        looked_at = tiles_with_nuclei(source, looked_at, size)
    mask = None if result.mask is None else _Mask(source.size)
    layout = {"size": list(source.size), "scale": scale, "tiles": len(placed), "looked_at": len(looked_at)}
    layout |= {} if white_cells is None else {"white_cells": white_cells}
    found: deque[list[Cell]] = deque()
    unreadable: list[Tile] = []
    focus: list[tuple[tuple[int, int, int, int], float]] = []
    full = split = cells = white = 0
    store = store if len(looked_at) >= WORTH_KEEPING else None
    for start, seen in _seen(source, looked_at, look, mask, layout, store, usual * scale, calibrated):
        for tile, of_tile in zip(looked_at[start:], seen, strict=False):
            found.append(of_tile["cells"])
            full += of_tile["full"]
            split += of_tile["split"]
            cells += len(of_tile["cells"])
            white += _white_cells_within(tile, of_tile["cells"], result.class_parents)
            if of_tile["unreadable"]:
                unreadable.append(tile)
            else:
                focus.append((tile.core, of_tile["focus"]))
            if mask is not None and of_tile["mask"] is not None:
                mask.put(tile, of_tile["mask"])
        if on_tile:
            on_tile(start + len(seen), len(looked_at), cells)
        if white_cells is not None and white >= white_cells:
            break
    with_nuclei, looked_at = len(looked_at), looked_at[: len(found)]
    if unreadable and len(unreadable) == len(looked_at):
        raise UnreadableImageError(
            f"{result.image or 'image'}: none of its {len(looked_at)} tiles can be read. Copy it again or export it anew."
        )
    # White cells may be known from whole fields, at their size there, as well.
    of_whole = [cell for cell in first_look if _is_white_cell_of(cell, usual * scale, result.class_parents)]
    found.append(of_whole if white_cells is None else [])
    # Each list goes as its cells are taken: of a slide there are hundreds of thousands, and more than one copy is too many.
    lists = (found.popleft() for _ in range(len(found)))
    result.cells = merged([*looked_at, whole], lists, result.class_parents, usual * scale)
    result.mask = None if mask is None else mask.pixels
    width, height = _size(placed[0].box)
    result.tiling = {"tiles": len(placed), "tile": [width, height], "scale": scale, "scale_source": scale_source}
    if known is not None:
        result.tiling["um_per_pixel"] = result.um_per_pixel or known.um_per_pixel / scale
    result.warnings = [text for text in result.warnings if CROWDED not in text and OTHER_SIZE not in text]
    result.warnings.append(f"Seen in {len(placed)} tiles of {width} x {height} pixels; their size is {scale_source}.")
    if filled < len(placed):
        result.tiling["empty"] = len(placed) - filled
        result.warnings.append(f"{len(placed) - filled} of {len(placed)} tiles are empty glass.")
    if white_cells is not None:
        _count_white_cells_alone(result, white_cells, len(looked_at), with_nuclei, filled)
    if unreadable:
        result.tiling["unreadable"] = len(unreadable)
        result.warnings.append(_of_unreadable(unreadable, len(placed)))
    if mask is not None and mask.share < 1:
        result.warnings.append(f"The mask is kept at {mask.pixels.shape[1]} x {mask.pixels.shape[0]} pixels.")
    judge_tiles(result, focus)
    if split:
        result.warnings.append(
            f"{split} of {len(placed)} tiles held more cells than the model has queries and were seen in smaller ones."
        )
    if full:
        result.warnings.append(
            f"In {full} of {len(placed)} tiles all {CROWDED}: the counts are too low. Give smaller tiles."
        )


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


def _white_cells_within(tile: Tile, cells: Sequence[Cell], parents: dict[str, str]) -> int:
    """White cells whose centre lies in the core of their tile."""
    left, top = tile.box[:2]
    centres = [cell.center for cell in cells if is_white_cell(cell.label, parents)]
    return sum(tile.core[0] <= x + left < tile.core[2] and tile.core[1] <= y + top < tile.core[3] for x, y in centres)


def _count_white_cells_alone(result: SmearResult, asked: int, seen: int, with_nuclei: int, tiles: int) -> None:
    """Leaves white cells, and what stands beside them in a differential: others were seen only where these are."""
    parents = result.class_parents
    result.classes = [
        name for name in result.classes if is_white_cell(name, parents) or is_beside_differential(name, parents)
    ]
    result.cells = [cell for cell in result.cells if cell.label in result.classes]
    result.cells = [replace(cell, id=number) for number, cell in enumerate(result.cells, 1)]
    found = sum(is_white_cell(cell.label, parents) for cell in result.cells)
    result.tiling |= {"white_cells": asked, "seen": seen, "with_nuclei": with_nuclei}
    enough = "" if found >= asked else f" That is less than the {asked} that were asked for."
    result.warnings.append(
        f"White cells alone: {found} found in {seen} of {with_nuclei} tiles with nuclei (of {tiles} with anything), in an order "
        f"of chance. Other cells are not counted.{enough}"
    )


def judge_tiles(result: SmearResult, focus: Sequence[tuple[tuple[int, int, int, int], float]]) -> None:
    """Says of each tile whether it lies in the monolayer, where red cells were looked for.

    Args:
        result ([`SmearResult`]): Changed.
        focus (`Sequence[tuple]`): Of each tile what it answers for, and its focus, see [`focus_of`].
    """
    if any(cell_kind(name, result.class_parents) == RED for name in result.classes):
        boxes, sharpness = zip(*focus) if focus else ((), ())
        result.monolayer = judged(boxes, sharpness, result.cells, result.class_parents)
        text = told(result.monolayer, result.cells, result.class_parents)
        result.warnings += [text] if text else []


def judge_whole(result: SmearResult, source: RegionSource) -> None:
    """Judges an image that is seen whole as one tile.

    Args:
        result ([`SmearResult`]): Changed.
        source ([`RegionSource`]): The image.
    """
    number, diameter = red_cell_diameter(result.cells, *source.size, result.class_parents)
    if number < FEW or not diameter:
        diameter = USUAL_SHARE * max(source.size)
    focus = focus_of(source.pixels, diameter * source.pixels.width / source.width)
    judge_tiles(result, [((0, 0, *source.size), focus)])


def _seen(
    source: RegionSource,
    tiles: Sequence[Tile],
    look: Callable[[list[Image.Image]], list[SmearResult]],
    mask: "_Mask | None",
    layout: dict[str, Any],
    store: TileStore | None,
    diameter: float,
    may_split: bool,
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """The number of the first tile of each group, and what they show: first all that was kept, then what is looked at."""
    kept = [_from_store(of_tile) for group in (store.begin(layout) if store else ()) for of_tile in group]
    if kept:
        yield 0, kept
    for start in range(len(kept), len(tiles), TILES_AT_ONCE):
        group = tiles[start : start + TILES_AT_ONCE]
        pictures: list[Image.Image | None] = []
        for tile in group:
            try:
                pictures.append(cut(source, tile))
            except UnreadableRegionError:
                pictures.append(None)
        there = [picture for picture in pictures if picture is not None]
        results = iter(look(there) if there else ())
        seen: list[dict[str, Any]] = []
        for tile, picture in zip(group, pictures, strict=True):
            if picture is None:
                seen.append(
                    {"cells": [], "mask": None, "full": False, "split": False, "focus": None, "unreadable": True}
                )
                continue
            of_tile = next(results)
            part = None if mask is None or of_tile.mask is None else mask.core(tile, of_tile.mask)
            cells = _in_file(of_tile.cells, picture, tile)
            crowded = split = _is_crowded(of_tile)
            if crowded and may_split:
                cells, crowded = seen_closer(source, tile, cells, look, of_tile.class_parents)
            focus = focus_of(picture, diameter * picture.width / (tile.box[2] - tile.box[0]))
            split = split and not crowded
            seen.append(
                {"cells": cells, "mask": part, "full": crowded, "split": split, "focus": focus, "unreadable": False}
            )
        if store:
            store.append([_to_store(of_tile) for of_tile in seen])
        yield start, seen


def _is_crowded(result: SmearResult) -> bool:
    return any(CROWDED in text for text in result.warnings)


def seen_closer(
    source: RegionSource,
    tile: Tile,
    cells: list[Cell],
    look: Callable[[list[Image.Image]], list[SmearResult]],
    parents: dict[str, str],
    times: int = SPLITS,
) -> tuple[list[Cell], bool]:
    """Sees a tile with more cells than the model has queries in four smaller ones, and these again, as long as that shows more.

    Args:
        source ([`RegionSource`]): The image.
        tile ([`Tile`]): The tile.
        cells (`list[Cell]`): What was seen in it, in pixels of the image from its corner.
        look (`Callable`): What is seen of parts of the image.
        parents (`dict[str, str]`): Class -> coarser class.
        times (`int`): How often it may be divided.

    Returns:
        `tuple[list[Cell], bool]`: Its cells, and whether there are still too many somewhere.
    """
    width, height = _size(tile.box)
    if not times or min(width, height) < SMALLEST_TILE:
        return cells, True
    _, diameter = red_cell_diameter(cells, width, height, parents)
    # Of cells in such numbers several lie side by side in an eighth of the tile.
    margin = round(min(MARGIN * diameter or math.inf, width / 8, height / 8))
    parts = lay_tiles(width, height, math.ceil(width / 2) + margin, math.ceil(height / 2) + margin, margin)
    left, top = tile.box[:2]
    placed = [replace(part, box=tuple(a + b for a, b in zip(part.box, (left, top) * 2))) for part in parts]
    pictures = [cut(source, part, strict=False) for part in placed]
    found, crowded = [], False
    for part, picture, of_part in zip(placed, pictures, look(pictures), strict=True):
        of_cells = _in_file(of_part.cells, picture, part)
        if _is_crowded(of_part):
            of_cells, still = seen_closer(source, part, of_cells, look, parents, times - 1)
            crowded |= still
        found.append(of_cells)
    closer = merged(parts, found, parents, diameter)
    return (closer, crowded) if len(closer) >= len(cells) else (cells, True)


def _to_store(seen: dict[str, Any]) -> dict[str, Any]:
    mask = None if seen["mask"] is None else rle_encode(seen["mask"])
    return seen | {"cells": [cell.to_dict() for cell in seen["cells"]], "mask": mask}


def _from_store(kept: dict[str, Any]) -> dict[str, Any]:
    mask = None if kept["mask"] is None else rle_decode(kept["mask"])
    return kept | {"cells": [Cell.from_dict(cell) for cell in kept["cells"]], "mask": mask}


def state_pixel_size(result: SmearResult, source: RegionSource, given: float | None) -> None:
    """Says how large a pixel is: as given, else as the file says.

    Args:
        result ([`SmearResult`]): Changed.
        source ([`RegionSource`]): The image.
        given (`float`, *optional*): Micrometres of a pixel that the caller gave.
    """
    if given is not None:
        result.um_per_pixel, result.um_source = given, "given"
    else:
        result.um_per_pixel, result.um_source = source.um_per_pixel, source.um_source


def _in_file(cells: Sequence[Cell], picture: Image.Image, tile: Tile) -> list[Cell]:
    """Cells of a picture of a tile in pixels of the file, from the tile's corner."""
    width, height = _size(tile.box)
    if picture.size == (width, height):
        return list(cells)
    scale = width / picture.width, height / picture.height
    return [cell.placed(0, 0, scale) for cell in cells]


def _of_unreadable(tiles: Sequence[Tile], number: int) -> str:
    places = ", ".join(f"x {tile.core[0]} to {tile.core[2]}, y {tile.core[1]} to {tile.core[3]}" for tile in tiles[:5])
    more = f" and {len(tiles) - 5} more" if len(tiles) > 5 else ""
    return (
        f"{len(tiles)} of {number} tiles cannot be read, so the file is truncated or damaged; nothing is counted at {places}"
        f"{more}. Copy it again."
    )


def _is_white_cell_of(cell: Cell, diameter: float, parents: dict[str, str]) -> bool:
    """Whether a cell is a white cell as large as one can be where red cells have this diameter in pixels."""
    size = math.sqrt((cell.box[2] - cell.box[0]) * (cell.box[3] - cell.box[1])) / diameter
    return is_white_cell(cell.label, parents) and WHITE_CELL[0] <= size <= WHITE_CELL[1]


def _scale(
    source: RegionSource,
    result: SmearResult,
    first_look: Sequence[Cell],
    cells_of: Callable[[Sequence[Tile]], list[list[Cell]]],
    edge: int,
    known: KnownSize | None,
    tiles: str | int,
    um_per_pixel: float | None,
) -> tuple[float | None, str]:
    """Pixels of the image for a pixel of the model's input, `None` where it is best seen whole, and where that comes from."""
    longer = max(source.size)
    if isinstance(tiles, int):
        return (tiles / edge if tiles < longer else None), "given"
    if known is None:
        return None, ""

    def of_micrometres(size: float) -> float | None:
        """The scale that a pixel's size asks for, `None` where no cell could be seen with it."""
        scale = known.um_per_pixel / size
        return scale if SMALLEST_TILE <= scale * edge <= LARGEST_VIEW * longer else None

    def or_whole(scale: float) -> float | None:
        return None if abs(math.log(scale * edge / longer)) < math.log(SAME_SCALE) else scale

    if um_per_pixel is not None:
        scale = of_micrometres(um_per_pixel)
        if scale is None:
            raise RequestError(
                f"{result.image or 'image'}: with pixels of {um_per_pixel:g} micrometres a red cell would be "
                f"{RED_CELL_MICROMETRES / um_per_pixel:.3g} pixels wide, in an image of {result.width} x {result.height}. "
                "Check the size of a pixel."
            )
        return or_whole(scale), "that of the training at the given micrometres"
    crowded = _is_crowded(result)
    estimated, diameter = find_scale(source, first_look, crowded, known, edge, result.class_parents, cells_of)
    by_cells = RED_CELL_MICROMETRES / diameter if diameter else None
    said = source.um_per_pixel
    if said is not None and (by_cells is None or 1 / CONTRADICTION < said / by_cells < CONTRADICTION):
        scale = of_micrometres(said)
        if scale is not None:
            return or_whole(scale), f"that of the training at the micrometres of {source.um_source}"
    if said is not None:
        seen = "" if by_cells is None else f", and of {by_cells:.3g} by its red cells, which decide"
        result.warnings.append(
            f"A pixel would be of {said:.3g} micrometres by {source.um_source}{seen}. Check it, or give --um-per-pixel."
        )
        result.um_per_pixel = result.um_source = None
    if by_cells is not None:
        result.um_per_pixel, result.um_source = by_cells, ESTIMATED
    return estimated, "estimated from the red cells that are found"


def _size(box: tuple[int, int, int, int]) -> tuple[int, int]:
    return box[2] - box[0], box[3] - box[1]


class _Mask:
    """The mask of an image, uint8 `[h, w]`, made of the cores of its tiles; reduced where it would have too many pixels."""

    def __init__(self, size: tuple[int, int]):
        self.size = size
        pixels = size[0] * size[1]
        self.share = 1.0 if pixels <= MAX_PIXELS else math.sqrt(MOST_MASK_PIXELS / pixels)
        self.pixels = np.zeros([max(1, round(side * self.share)) for side in size[::-1]], dtype=np.uint8)

    def core(self, tile: Tile, mask: np.ndarray) -> np.ndarray:
        """The part of a tile's mask that is its core, as it stands in the mask of the image."""
        width, height = _size(tile.box)
        left, top, right, bottom = (
            core - start for core, start in zip(tile.core, (*tile.box[:2], *tile.box[:2]), strict=True)
        )
        if self.share == 1 and mask.shape == (height, width):
            return mask[top:bottom, left:right]
        rows, columns = self._place(tile)
        to_x, to_y = mask.shape[1] / width, mask.shape[0] / height
        return np.asarray(
            Image.fromarray(mask).resize(
                (columns.stop - columns.start, rows.stop - rows.start),
                Image.Resampling.NEAREST,
                box=(left * to_x, top * to_y, right * to_x, bottom * to_y),
            )
        )

    def put(self, tile: Tile, core: np.ndarray) -> None:
        """Puts in what [`_Mask.core`] gave."""
        self.pixels[self._place(tile)] = core

    def _place(self, tile: Tile) -> tuple[slice, slice]:
        height, width = self.pixels.shape
        left, right = (value * width // self.size[0] for value in tile.core[::2])
        top, bottom = (value * height // self.size[1] for value in tile.core[1::2])
        # A core of less than a pixel has one all the same.
        return slice(min(top, height - 1), max(bottom, top + 1)), slice(min(left, width - 1), max(right, left + 1))


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
    shrink = max(1.0, max(_size(tile.box)) / source.longest) if source.longest else 1.0
    size = tuple(max(1, round(side / shrink)) for side in _size(inside)) if shrink > 1 else None
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


def red_cell_diameter(cells: Sequence[Cell], width: float, height: float, parents: dict[str, str]) -> tuple[int, float]:
    """How many red cells there are, and their median diameter in pixels (0 without any).

    Args:
        cells (`Sequence[Cell]`): Cells of an image or tile.
        width, height (`float`): Of it, in pixels: of a cell that its edge cuts the longer side is taken.
        parents (`dict[str, str]`): Class -> coarser class.
    """
    sizes = []
    for cell in cells:
        if cell_kind(cell.label, parents) == RED:
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
        number, diameter = red_cell_diameter(found, *_size(place.box), parents)
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
                if left <= x < right and top <= y < bottom and cell_kind(cell.label, parents) == RED:
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
