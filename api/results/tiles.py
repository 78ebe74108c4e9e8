"""Wide fields, and cells of another size than a checkpoint knows: an image seen in overlapping tiles at the right scale."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, cast

import numpy as np
from PIL import Image

from unihema.errors import RequestError, UnreadableImageError
from unihema.files import OpenedImage
from unihema.processing_unihema.class_names import (
    RED_CELL,
    cell_kind,
    is_beside_differential,
    is_white_cell,
)
from unihema.processing_unihema.image_io import MAX_PIXELS
from unihema.processing_unihema.masks import rle_decode, rle_encode
from unihema.results.cell_size import (
    FEW,
    RED_CELL_MICROMETRES,
    SAME_SCALE,
    USUAL_SHARE,
    KnownSize,
    find_scale,
    red_cell_diameter,
)
from unihema.results.monolayer import focus_of, judged, told
from unihema.results.smear_result import CROWDED, OTHER_SIZE, Cell, SmearResult
from unihema.results.tile_layout import (
    MARGIN,
    Tile,
    crowded_places,
    cut,
    empty_glass,
    lay_tiles,
    size_of,
    tiles_at,
    tiles_with_nuclei,
)
from unihema.results.tile_merging import merged
from unihema.slides import ImageRegions, RegionSource, UnreadableRegionError


# Diameters of white cells, in those of red ones.
WHITE_CELL = (0.8, 3.0)
TILES_AT_ONCE = 4
# How often a tile with more cells than queries is divided in four.
SPLITS = 2
# Of a tile that micrometres ask for: its longer edge in pixels of the file, at least, and in that of the image, at most.
SMALLEST_TILE, LARGEST_VIEW = 64, 8
# What a file says of its pixels is not believed where the red cells say something else by more than this factor.
CONTRADICTION = 1.6
ESTIMATED = "estimated from the red cells"
# A tile of a slide is read at no more pixels than this many of the model's input.
SHARPEST = 2
# An image of fewer tiles is seen in a second or two, and begun anew where that was stopped.
WORTH_KEEPING = 16
# Tiles of an image at most, and pixels of the mask of one that is larger than `MAX_PIXELS`.
MOST_TILES, MOST_MASK_PIXELS = 1_000_000, 16_000_000


class TileStore(Protocol):
    """Keeps what tiles show while an image is being seen, so that work that is stopped goes on."""

    def begin(self, layout: dict[str, Any]) -> Iterable[list[dict[str, Any]]]:
        """What was kept of an image that is seen in just this way, a list for each call of `append`."""

    def append(self, seen: list[dict[str, Any]]) -> None:
        """Keeps what was seen of some tiles."""


@dataclass(frozen=True)
class TileDetector:
    """What finds cells in parts of an image.

    Args:
        look (`Callable`): What is seen of parts of the image.
        edge (`int`): Longer edge of the model's input in pixels.
        known ([`KnownSize`], *optional*): Of the checkpoint.
        search (`Callable`, *optional*): What is seen of parts of the image when its scale is searched, where `look` finds not all
            classes, or not at the thresholds of the checkpoint.
        calibrated (`bool`): Whether cells are those above the thresholds of the checkpoint. With others it says nothing that all
            queries found one, and nothing is seen in smaller tiles for that.
    """

    look: Callable[[list[Image.Image]], list[SmearResult]]
    edge: int
    known: KnownSize | None
    search: Callable[[list[Image.Image]], list[SmearResult]] | None = None
    calibrated: bool = True

    @property
    def usual(self) -> float:
        """Usual diameter of a red cell, in pixels of the model's input."""
        return self.edge * USUAL_SHARE if self.known is None else self.known.usual

    def searched(self, source: RegionSource, parts: Sequence[Tile]) -> list[list[Cell]]:
        """Cells of parts by which the scale is searched, in pixels of the file from the corner of each part."""
        pictures = [cut(source, tile, strict=False) for tile in parts]
        return [
            _in_file(of_part.cells, picture, tile)
            for of_part, picture, tile in zip((self.search or self.look)(pictures), pictures, parts, strict=True)
        ]


def see_in_tiles(
    image: Image.Image | RegionSource,
    result: SmearResult,
    detector: TileDetector,
    tiles: str | int = "auto",
    um_per_pixel: float | None = None,
    *,
    white_cells: int | None = None,
    store: TileStore | None = None,
    on_tile: Callable[[int, int, int], None] | None = None,
) -> None:
    """Sees an image in tiles, where that is asked for or its cells are not of the size that the model knows, and puts what they
    show into its result.

    Args:
        image (`RegionSource` or `PIL.Image.Image`): The image, of any size, or perhaps reduced.
        result ([`SmearResult`]): What was seen of the whole image, in pixels of its file; changed.
        detector ([`TileDetector`]): What finds cells in parts of the image.
        tiles (`str` or `int`): `"auto"`, or the longer edge of a tile in pixels of the file.
        um_per_pixel (`float`, *optional*): Size of a pixel of the file in micrometres, instead of what the file says.
        white_cells (`int`, *optional*): Only tiles with nuclei are seen, in an order of chance that is always the same, until so
            many white cells are found; other cells are not counted.
        store ([`TileStore`], *optional*): Keeps finished tiles.
        on_tile (`Callable`, *optional*): Called with the number of tiles that are done, of all tiles, and of cells in them (near
            seams some are counted twice).

    Raises:
        RequestError: With pixels of this size no cell of the image could be seen, or there would be too many tiles.
        UnreadableImageError: No tile can be read.
    """
    if isinstance(image, RegionSource):
        source = image
    else:
        source = ImageRegions(OpenedImage(image, result.width, result.height, result.image))
    edge, known, parents = detector.edge, detector.known, result.class_parents
    state_pixel_size(result, source, um_per_pixel)
    if source.streams:
        source.longest, source.places = SHARPEST * edge, crowded_places(source)
    scale, scale_source = _scale(source, result, detector, tiles, um_per_pixel)
    if scale is None and detector.calibrated and known is not None and _is_crowded(result):
        scale, scale_source = max(source.size) / edge / 2, "halved, as there were more cells than the model has queries"
    if scale is None:
        _note_seen_whole(result, source, known, white_cells)
        return
    diameter = detector.usual * scale
    placed = tiles_at(source, scale, edge, detector.usual)
    if len(placed) > MOST_TILES:
        raise RequestError(
            f"{result.image or 'image'}: {source.width} x {source.height} pixels would be {len(placed):,} tiles, and more than "
            f"{MOST_TILES:,} are not seen. Give larger tiles, or check the size of a pixel."
        )
    filled = [tile for tile, empty in zip(placed, empty_glass(source, placed), strict=True) if not empty]
    looked_at = filled
    layout = {"size": list(source.size), "scale": scale, "tiles": len(placed)}
    if white_cells is not None:
        size = result.um_per_pixel or cast("KnownSize", known).um_per_pixel / scale
        looked_at = tiles_with_nuclei(source, filled, size)
        layout["white_cells"] = white_cells
    layout["looked_at"] = len(looked_at)
    found = _Findings(None if result.mask is None else _Mask(source.size), parents)
    store = store if len(looked_at) >= WORTH_KEEPING else None
    for start, seen in _seen(source, looked_at, detector, found.mask, layout, store, diameter):
        for tile, of_tile in zip(looked_at[start:], seen, strict=False):
            found.add(tile, of_tile)
        if on_tile:
            on_tile(start + len(seen), len(looked_at), found.number)
        if white_cells is not None and found.white >= white_cells:
            break
    if len(found.unreadable) == len(found.tiles) > 0:
        raise UnreadableImageError(
            f"{result.image or 'image'}: none of its {len(found.tiles)} tiles can be read. Copy it again or export it anew."
        )
    # White cells may be known from whole fields, at their size there, as well.
    of_whole = [cell for cell in result.cells if _is_white_cell_of(cell, diameter, parents)]
    result.cells = found.merged(_whole(source), of_whole if white_cells is None else [], diameter)
    result.mask = None if found.mask is None else found.mask.pixels
    width, height = size_of(placed[0].box)
    result.tiling = {"tiles": len(placed), "tile": [width, height], "scale": scale, "scale_source": scale_source}
    if known is not None:
        result.tiling["um_per_pixel"] = result.um_per_pixel or known.um_per_pixel / scale
    result.warnings = [text for text in result.warnings if CROWDED not in text and OTHER_SIZE not in text]
    result.warnings.append(f"Seen in {len(placed)} tiles of {width} x {height} pixels; their size is {scale_source}.")
    if len(filled) < len(placed):
        result.tiling["empty"] = len(placed) - len(filled)
        result.warnings.append(f"{len(placed) - len(filled)} of {len(placed)} tiles are empty glass.")
    if white_cells is not None:
        _count_white_cells_alone(result, white_cells, len(found.tiles), len(looked_at), len(filled))
    found.judge(result, len(placed))


def _whole(source: RegionSource) -> Tile:
    """The image as one tile."""
    return Tile((0, 0, *source.size), (0, 0, *source.size))


def _note_seen_whole(
    result: SmearResult, source: RegionSource, known: KnownSize | None, white_cells: int | None
) -> None:
    if white_cells is not None:
        result.warnings.append("The image was seen whole, so that all of its cells are counted, not white cells alone.")
    if source.streams and known is not None:
        result.warnings.append(
            f"The image has {source.width} x {source.height} pixels and was seen whole, as no red cells by which to tell its "
            "scale were found. Give the size of its pixels (--um-per-pixel)."
        )


class _Findings:
    """What the tiles that are done show.

    Args:
        mask ([`_Mask`], *optional*): Takes their masks.
        parents (`dict[str, str]`): Class -> coarser class.
    """

    def __init__(self, mask: "_Mask | None", parents: dict[str, str]):
        self.mask, self.parents = mask, parents
        self.tiles: list[Tile] = []
        self.unreadable: list[Tile] = []
        self.number = self.white = self._full = self._split = 0
        self._cells: deque[list[Cell]] = deque()
        self._focus: list[tuple[tuple[int, int, int, int], float]] = []

    def add(self, tile: Tile, seen: dict[str, Any]) -> None:
        """Adds what a tile shows."""
        self.tiles.append(tile)
        self._cells.append(seen["cells"])
        self._full += seen["full"]
        self._split += seen["split"]
        self.number += len(seen["cells"])
        self.white += _white_cells_within(tile, seen["cells"], self.parents)
        if seen["unreadable"]:
            self.unreadable.append(tile)
        else:
            self._focus.append((tile.core, seen["focus"]))
        if self.mask is not None and seen["mask"] is not None:
            self.mask.put(tile, seen["mask"])

    def merged(self, whole: Tile, of_whole: list[Cell], diameter: float) -> list[Cell]:
        """Each cell once, with those that were seen in the whole image."""
        self._cells.append(of_whole)
        # Each list goes as its cells are taken: of a slide there are hundreds of thousands, and more than one copy is too many.
        lists = (self._cells.popleft() for _ in range(len(self._cells)))
        return merged([*self.tiles, whole], lists, self.parents, diameter)

    def judge(self, result: SmearResult, placed: int) -> None:
        """Says in a result, of an image of so many tiles, what could not be seen or counted, and where its monolayer is."""
        if self.unreadable:
            result.tiling = {**(result.tiling or {}), "unreadable": len(self.unreadable)}
            result.warnings.append(_of_unreadable(self.unreadable, placed))
        if self.mask is not None and self.mask.share < 1:
            height, width = self.mask.pixels.shape
            result.warnings.append(f"The mask is kept at {width} x {height} pixels.")
        judge_tiles(result, self._focus)
        if self._split:
            result.warnings.append(
                f"{self._split} of {placed} tiles held more cells than the model has queries and were seen in smaller ones."
            )
        if self._full:
            result.warnings.append(
                f"In {self._full} of {placed} tiles all {CROWDED}: the counts are too low. Give smaller tiles."
            )


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
    result.tiling = {**(result.tiling or {}), "white_cells": asked, "seen": seen, "with_nuclei": with_nuclei}
    enough = "" if found >= asked else f" That is less than the {asked} that were asked for."
    if not with_nuclei:
        enough += (
            " No nucleus was found by its colour: if the image shows white cells, see all of it (without white_cells)."
        )
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
    if any(cell_kind(name, result.class_parents) == RED_CELL for name in result.classes):
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
    detector: TileDetector,
    mask: "_Mask | None",
    layout: dict[str, Any],
    store: TileStore | None,
    diameter: float,
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
        results = iter(detector.look(there) if there else ())
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
            if crowded and detector.calibrated:
                cells, crowded = seen_closer(source, tile, cells, detector.look, of_tile.class_parents)
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
    width, height = size_of(tile.box)
    if not times or min(width, height) < SMALLEST_TILE:
        return cells, True
    _, diameter = red_cell_diameter(cells, width, height, parents)
    # Of cells in such numbers several lie side by side in an eighth of the tile.
    margin = round(min(MARGIN * diameter or math.inf, width / 8, height / 8))
    parts = lay_tiles(width, height, math.ceil(width / 2) + margin, math.ceil(height / 2) + margin, margin)
    left, top = tile.box[:2]
    placed = [
        replace(part, box=(part.box[0] + left, part.box[1] + top, part.box[2] + left, part.box[3] + top))
        for part in parts
    ]
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
    width, height = size_of(tile.box)
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
    detector: TileDetector,
    tiles: str | int,
    um_per_pixel: float | None,
) -> tuple[float | None, str]:
    """Pixels of the image for a pixel of the model's input, `None` where it is best seen whole, and where that comes from."""
    longer, edge, known = max(source.size), detector.edge, detector.known
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
    red_cells = detector.searched(source, [_whole(source)])[0] if detector.search else result.cells
    estimated, diameter = find_scale(
        source, red_cells, _is_crowded(result), known, edge, result.class_parents, partial(detector.searched, source)
    )
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


class _Mask:
    """The mask of an image, uint8 `[h, w]`, made of the cores of its tiles; reduced where it would have too many pixels."""

    def __init__(self, size: tuple[int, int]):
        self.size = size
        pixels = size[0] * size[1]
        self.share = 1.0 if pixels <= MAX_PIXELS else math.sqrt(MOST_MASK_PIXELS / pixels)
        self.pixels = np.zeros([max(1, round(side * self.share)) for side in size[::-1]], dtype=np.uint8)

    def core(self, tile: Tile, mask: np.ndarray) -> np.ndarray:
        """The part of a tile's mask that is its core, as it stands in the mask of the image."""
        width, height = size_of(tile.box)
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
