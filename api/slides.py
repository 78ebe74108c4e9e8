"""Images of any size, read in parts: slides and other pyramids, large plain files, and images in memory, all by one protocol.

A file of up to [`MAX_PIXELS`] pixels is read as a whole, as ever. A larger one, and one of a slide scanner, is read region by
region where the extra `slides` is installed, so that a slide is never in memory. Without it such an image is reduced, or
refused where nothing here can open it; both is said, with what would help.
"""

import logging
import math
import os
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unihema.errors import InputError, UnreadableImageError
from unihema.files import OpenedImage, open_image, scratch_folder, sha256, shortened

from .processing_unihema.image_io import (
    FOCUS_WINDOW,
    MAX_COMPRESSION,
    MAX_PAGES,
    MAX_PIXELS,
    SLIDE_SUFFIXES,
    RefusedImageError,
    described_pixel_size,
    image_size,
    page_axes,
    pages_of_picture,
    pixel_size,
    plausible_pixel_size,
    sharpest_plane,
    sharpness,
    stored_size,
    to_rgb,
)


# What a slide is like as a whole is seen, and drawn, at no more than this.
OVERVIEW_PIXELS = 8_000_000
# Pixels of a level that are put together at once.
MOST_AT_ONCE = 1 << 22
# Decoded bytes that are kept for the neighbouring region: of tiles some, of strips those that a row of regions lies in.
KEPT_OF_TILES, KEPT_OF_STRIPS, STRIP_ROWS = 1 << 25, 1 << 27, 1024
# Where an image is looked at first: in its middle, and on both sides of that.
PLACES = ((0.5, 0.5), (0.25, 0.3), (0.75, 0.7))
# A strip or tile of a file that would be larger when decoded cannot be read in parts.
LARGEST_CHUNK = 1 << 26
# A slide may be so many times more compressed than a photograph before its header is taken for damaged: most of it is glass.
SPARSE = 10
# Bytes of a file that is compared with what it was.
MOST_COMPARED = 1 << 28
# Of parts of a file that cannot be read, where a picture is needed all the same.
UNREADABLE_COLOUR = 0
EXTRA = "pip install 'unihema[slides]'"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_ORIENTATION = 274
# Formats whose slide lies in several files.
_FOLDER_BESIDE, _SERIES = (".mrxs", ".vms", ".vmu"), (".dcm",)

Box = tuple[int, int, int, int]


class UnreadableRegionError(UnreadableImageError):
    """A part of an image cannot be read; others may."""


class TooLargeError(UnreadableImageError):
    """An image has more pixels than are taken."""


class RegionSource(ABC):
    """An image that gives its parts.

    Args:
        name (`str`, *optional*): Its path.
        levels (`list[tuple[int, int]]`): Width and height of the image and of its reductions, largest first.
        notes (`Sequence[str]`): A sentence for each thing that a reader of the results must know.
        scale (`tuple[float, str]`, *optional*): Micrometres of a pixel, and where that stands.

    Attributes:
        streams (`bool`): Whether its parts are read when they are asked for, rather than all at once.
        longest (`int`, *optional*): Longer edge of pictures that are cut from it, in pixels, at most.
        places (`tuple`): Where something lies on the glass, as shares of width and height.
        closing (`ExitStack`): What is done when it is closed.
    """

    streams = True
    places: tuple[tuple[float, float], ...] = PLACES

    def __init__(
        self,
        name: str | None,
        levels: list[tuple[int, int]],
        notes: "list[str] | tuple[str, ...]" = (),
        scale: tuple[float, str] | None = None,
    ):
        self.name, self.levels, self.notes = name, levels, tuple(notes)
        self.um_per_pixel: float | None
        self.um_source: str | None
        self.um_per_pixel, self.um_source = scale or (None, None)
        self.longest: int | None = None
        self.closing = ExitStack()

    @property
    def width(self) -> int:
        """Of the image in its file, in pixels."""
        return self.levels[0][0]

    @property
    def height(self) -> int:
        """Of the image in its file, in pixels."""
        return self.levels[0][1]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.width, self.height

    @cached_property
    def pixels(self) -> Image.Image:
        """The whole image, RGB, reduced to `OVERVIEW_PIXELS` where it is larger; parts that cannot be read are black."""
        shrink = max(1.0, math.sqrt(self.width * self.height / OVERVIEW_PIXELS))
        size = max(1, round(self.width / shrink)), max(1, round(self.height / shrink))
        return self.read_region((0, 0, *self.size), size, strict=False)

    def read_region(self, box: Box, size: tuple[int, int] | None = None, strict: bool = True) -> Image.Image:
        """A part of the image, from the smallest level that holds it at the size asked for.

        Args:
            box (`tuple[int, int, int, int]`): x_min, y_min, x_max, y_max in pixels of the image, within it.
            size (`tuple[int, int]`, *optional*): Width and height of the picture; those of the box when missing.
            strict (`bool`): Raise at what cannot be read. Otherwise it is black.

        Returns:
            `PIL.Image.Image`: RGB.

        Raises:
            UnreadableRegionError: It cannot be read.
            InputError: A box that is empty or outside the image.
        """
        left, top, right, bottom = box
        if not (0 <= left < right <= self.width and 0 <= top < bottom <= self.height):
            raise InputError(f"{self.name or 'image'}: {box} is no part of {self.width} x {self.height} pixels.")
        size = size or (right - left, bottom - top)
        step_x, step_y = (right - left) / size[0], (bottom - top) / size[1]
        level = self._level(min(step_x, step_y))
        to_x, to_y = self.levels[level][0] / self.width, self.levels[level][1] / self.height
        picture = Image.new("RGB", size, (UNREADABLE_COLOUR,) * 3)
        pieces = math.ceil(math.sqrt((right - left) * to_x * (bottom - top) * to_y / MOST_AT_ONCE))
        for y_from, y_to in _spans(size[1], pieces):
            for x_from, x_to in _spans(size[0], pieces):
                part = (
                    (left + x_from * step_x) * to_x,
                    (top + y_from * step_y) * to_y,
                    (left + x_to * step_x) * to_x,
                    (top + y_to * step_y) * to_y,
                )
                try:
                    piece = self._resampled(level, part, (x_to - x_from, y_to - y_from), strict)
                except UnreadableRegionError:
                    if strict:
                        raise
                    continue
                if piece.size == size:
                    return piece
                picture.paste(piece, (x_from, y_from))
        return picture

    def _level(self, step: float) -> int:
        """The smallest level in which a pixel is no wider than this many of the image."""
        fine = [n for n, (width, _) in enumerate(self.levels) if self.width / width <= 1.01 * step]
        return max(fine, key=lambda n: (-self.levels[n][0], -n), default=0)

    def _resampled(
        self, level: int, part: tuple[float, float, float, float], size: tuple[int, int], strict: bool
    ) -> Image.Image:
        width, height = self.levels[level]
        left, top = min(math.floor(part[0] + 1e-6), width - 1), min(math.floor(part[1] + 1e-6), height - 1)
        right = min(max(math.ceil(part[2] - 1e-6), left + 1), width)
        bottom = min(max(math.ceil(part[3] - 1e-6), top + 1), height)
        pixels = self._read(level, (left, top, right, bottom), strict)
        if pixels.size == size:
            return pixels
        within = (
            max(part[0] - left, 0.0),
            max(part[1] - top, 0.0),
            min(part[2] - left, float(right - left)),
            min(part[3] - top, float(bottom - top)),
        )
        return pixels.resize(size, Image.Resampling.BILINEAR, box=within, reducing_gap=2.0)

    @abstractmethod
    def _read(self, level: int, box: Box, strict: bool) -> Image.Image:
        """Pixels of a level, RGB.

        Raises:
            UnreadableRegionError: They cannot be read, and `strict` is set or nothing of them can.
        """

    def close(self) -> None:
        """Gives files back, also temporary ones."""
        self.closing.close()

    def __enter__(self) -> "RegionSource":
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()


class ImageRegions(RegionSource):
    """An image in memory.

    Args:
        opened ([`OpenedImage`]): The image, perhaps reduced.
        scale (`tuple[float, str]`, *optional*): Micrometres of a pixel of its file, and where that stands.
    """

    streams = False

    def __init__(self, opened: OpenedImage, scale: tuple[float, str] | None = None):
        super().__init__(opened.name, [(opened.width, opened.height)], opened.notes, scale)
        self.image = opened.pixels
        if self.image.size != self.size:
            self.levels.append(self.image.size)

    @property
    def pixels(self) -> Image.Image:
        """The image."""
        return self.image

    def read_region(self, box: Box, size: tuple[int, int] | None = None, strict: bool = True) -> Image.Image:
        """See [`RegionSource.read_region`]; without a size the pixels are given as they are in memory."""
        if len(self.levels) == 1:
            part = self.image.crop(box)
        else:
            to_x, to_y = self.image.width / self.width, self.image.height / self.height
            left, top = int(box[0] * to_x), int(box[1] * to_y)
            right, bottom = max(round(box[2] * to_x), left + 1), max(round(box[3] * to_y), top + 1)
            part = self.image.crop((left, top, right, bottom))
        return part if size is None or part.size == size else part.resize(size, Image.Resampling.BILINEAR)

    def _read(self, level: int, box: Box, strict: bool) -> Image.Image:
        return self.image.crop(box)


class TiffRegions(RegionSource):
    """A TIFF of any size, tile by tile or strip by strip: generic pyramids, OME-TIFF, SVS, BigTIFF.

    Only what is asked for is decoded, and a part of the file that cannot be is named without loss of the others. Levels are the
    reductions that the first page names (`SubIFDs`), or the further pages that show the same at smaller sizes. Red, green and
    blue may lie in a page each.

    Args:
        path (`Path`): The file.
        name (`str`, *optional*): Path to be named instead of it.

    Raises:
        RefusedImageError: It has channels that are no colours.
        UnreadableImageError: Its pixels are of a kind, or packed in a way, that cannot be read in parts.
    """

    def __init__(self, path: Path, name: str | None = None):
        tifffile = _tifffile()
        name = name or str(path)
        stack = ExitStack()
        try:
            with _of_file(name):
                file = stack.enter_context(tifffile.TiffFile(path))
                self._file = file.filehandle
                self._forget()
                levels, notes = _levels(file, name, self._sharpness)
                self._forget()
                largest = levels[0][0]
                scale = _scale_of_tags(largest, file.pages[0].description or "")
            _check_plausible(path, name, largest.imagewidth, largest.imagelength)
            super().__init__(name, [(pages[0].imagewidth, pages[0].imagelength) for pages in levels], notes, scale)
        except BaseException:
            stack.close()
            raise
        self._pages = levels
        self.closing = stack

    def _forget(self) -> None:
        self._kept: OrderedDict[tuple[int, int, int], np.ndarray | None] = OrderedDict()
        self._kept_bytes = 0

    def _sharpness(self, page: Any) -> float:
        """Of the middle of a page, negative where nothing of it can be read."""
        self._forget()
        self._pages = [[page]]
        width, height = min(FOCUS_WINDOW, page.imagewidth), min(FOCUS_WINDOW, page.imagelength)
        left, top = (page.imagewidth - width) // 2, (page.imagelength - height) // 2
        return sharpness(np.asarray(self._read(0, (left, top, left + width, top + height), strict=False)))

    def _read(self, level: int, box: Box, strict: bool) -> Image.Image:
        left, top, right, bottom = box
        out = np.full((bottom - top, right - left, 3), UNREADABLE_COLOUR, dtype=np.uint8)
        if len(self._pages[level]) == 1:
            self._copy(level, 0, box, out, strict)
        else:
            for band in range(3):
                self._copy(level, band, box, out[..., band : band + 1], strict)
        return Image.fromarray(out)

    def _copy(self, level: int, number: int, box: Box, out: np.ndarray, strict: bool) -> None:
        """Copies pixels of one page of a level to `out`, `[h, w, 3]`, or `[h, w, 1]` where the page is one colour of three."""
        page, (left, top, right, bottom) = self._pages[level][number], box
        if _in_plain_rows(page):
            self._copy_rows(page, box, out, strict)
            return
        width, height = _chunk_size(page)
        across = -(-page.imagewidth // width)
        for row in range(top // height, -(-bottom // height)):
            for column in range(left // width, -(-right // width)):
                pixels = self._chunk(level, number, row * across + column, strict)
                if pixels is None:
                    continue
                x, y = column * width, row * height
                x_from, y_from = max(left, x), max(top, y)
                x_to, y_to = min(right, x + pixels.shape[1]), min(bottom, y + pixels.shape[0])
                out[y_from - top : y_to - top, x_from - left : x_to - left] = pixels[
                    y_from - y : y_to - y, x_from - x : x_to - x
                ]

    def _copy_rows(self, page: Any, box: Box, out: np.ndarray, strict: bool) -> None:
        """Copies pixels that nothing has packed, whatever the strips they lie in."""
        left, top, right, bottom = box
        samples, rows = page.samplesperpixel, max(1, page.rowsperstrip)
        for y in range(top, bottom):
            strip, within = divmod(y, rows)
            try:
                self._file.seek(page.dataoffsets[strip] + (within * page.imagewidth + left) * samples)
                data = self._file.read((right - left) * samples)
                pixels = np.frombuffer(data, np.uint8).reshape(right - left, samples)
            except (OSError, ValueError, IndexError) as error:
                if strict:
                    raise UnreadableRegionError(f"{self.name}: row {y} cannot be read ({shortened(error)}).") from error
                continue
            out[y - top] = _gray_or_rgb(page, pixels)

    def _chunk(self, level: int, number: int, index: int, strict: bool) -> np.ndarray | None:
        """A decoded strip or tile of a page, uint8 `[h, w, 3]`, or `[h, w, 1]` of a gray one."""
        key, page = (level, number, index), self._pages[level][number]
        if key in self._kept:
            self._kept.move_to_end(key)
        else:
            pixels = self._kept[key] = self._decoded(page, index)
            self._kept_bytes += 0 if pixels is None else pixels.nbytes
            most = KEPT_OF_TILES if page.is_tiled else KEPT_OF_STRIPS
            while self._kept_bytes > most and len(self._kept) > 1:
                _, old = self._kept.popitem(last=False)
                self._kept_bytes -= 0 if old is None else old.nbytes
        found = self._kept[key]
        if found is None and strict:
            raise UnreadableRegionError(f"{self.name}: part {index} of level {level} cannot be read.")
        return found

    def _decoded(self, page: Any, index: int) -> np.ndarray | None:
        try:
            count = page.databytecounts[index]
            if count == 0:
                # What a scanner has not looked at.
                return np.full((*_chunk_size(page)[::-1], 1), 255, dtype=np.uint8)
            self._file.seek(page.dataoffsets[index])
            data = self._file.read(count)
            if len(data) < count:
                return None
            packed = {"jpegtables": page.jpegtables} if page.compression in _JPEGS else {}
            decoded = page.decode(data, index, **packed)[0]
            pixels = decoded[0]
            return _gray_or_rgb(page, pixels)
        # A damaged part makes codecs raise anything.
        except Exception:
            return None


# JPEG in its kinds, which share tables of the page.
_JPEGS = (6, 7, 33007, 34892)


def _tifffile() -> Any:
    import tifffile

    # What it says of a damaged file would go to the terminal as it is.
    logger = logging.getLogger("tifffile")
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())
    return tifffile


@contextmanager
def _of_file(name: str) -> Iterator[None]:
    """What a library raises at a damaged file, as an error that names it."""
    try:
        yield
    except UnreadableImageError:
        raise
    except Exception as error:
        raise UnreadableImageError(
            f"{name}: the image is truncated or damaged ({shortened(error, 200)}). Copy it again or export it anew."
        ) from error


def _levels(file: Any, name: str, sharpness_of: Callable[[Any], float]) -> tuple[list[list[Any]], list[str]]:
    """The levels of the picture in a TIFF, largest first, and what has to be said of its other pages.

    Args:
        file (`tifffile.TiffFile`): The file.
        name (`str`): Its path.
        sharpness_of (`Callable`): Page -> its sharpness, negative where it cannot be read.

    Returns:
        `tuple[list[list[Any]], list[str]]`: Of each level its page, or those of red, green and blue; and the sentences.

    Raises:
        RefusedImageError: It has channels that are no colours.
        UnreadableImageError: The picture's pixels cannot be read in parts.
    """
    listed = _listed(file)
    same = _pages_of_one_size(listed, name)
    numbers, notes = _chosen(same, listed[0].description or "", name, sharpness_of)
    reason = next(filter(None, (_not_in_parts(same[number]) for number in numbers)), None)
    if reason:
        raise UnreadableImageError(f"{name}: {reason}.")
    largest = [same[number] for number in numbers]
    # Reductions lie in sub-files of each page, or behind the pages, in the same order as these.
    below: dict[tuple[int, int], list[list[Any]]] = {}
    others = [page for page in listed if page not in same]
    for size in dict.fromkeys(map(_size, others)):
        alike = [page for page in others if _size(page) == size]
        if len(alike) == len(same):
            below.setdefault(size, []).append([alike[number] for number in numbers])
        elif len(numbers) == 1:
            below.setdefault(size, []).append(alike[:1])
    try:
        for reduced in zip(*(page.pages or () for page in largest), strict=False):
            if len(set(map(_size, reduced))) == 1:
                below.setdefault(_size(reduced[0]), []).append(list(reduced))
    # Reductions that lie beyond the end of the file.
    except Exception:
        notes.append("Reduced levels of the file cannot be read.")
    levels = [largest]
    width, height = _size(largest[0])
    for size in sorted(below, reverse=True):
        for pages in below[size]:
            try:
                # Labels and photographs of the glass have another shape.
                of_shape = abs(size[0] / size[1] * height / width - 1) < 0.02
                if size[0] < levels[-1][0].imagewidth and of_shape and not any(map(_not_in_parts, pages)):
                    levels.append(pages)
            except Exception:
                continue
    return levels, notes


def _size(page: Any) -> tuple[int, int]:
    return page.imagewidth, page.imagelength


def _pages_of_one_size(listed: list[Any], name: str) -> list[Any]:
    """The largest page of a TIFF, with those that are alike.

    Raises:
        UnreadableImageError: No page can be read.
    """
    first = max(listed, key=lambda page: page.imagewidth * page.imagelength, default=None)
    if first is None:
        raise UnreadableImageError(f"{name}: no page in this TIFF can be read. Copy it again or export it anew.")

    def kind(page: Any) -> tuple[Any, ...]:
        return *_size(page), page.samplesperpixel, page.bitspersample, page.photometric

    same = [page for page in listed if kind(page) == kind(first) and not page.subfiletype & 1]
    return same or [first]


def _chosen(
    same: list[Any], description: str, name: str, sharpness_of: Callable[[Any], float]
) -> tuple[list[int], list[str]]:
    """Which of the pages of one size is the picture, or which are its red, green and blue; and what has to be said of it.

    As [`read_image`] chooses; but of pages that nothing explains it is the sharpest, as scanners write stacks so.

    Raises:
        RefusedImageError: Several channels that are no colours.
    """
    gray, palette = (int(same[0].photometric) in kinds for kinds in ((0, 1), (3,)))

    def plane_in_focus(pages: Sequence[int]) -> int:
        return sharpest_plane(len(pages), lambda plane: sharpness_of(same[pages[plane]]))

    notes: list[str] = []
    try:
        _check_samples(same[0])
        axes = page_axes(description, len(same), gray, one_sample=gray or palette)
        if axes.sizes.get("?", 1) == 1:
            return pages_of_picture(axes, plane_in_focus, notes), notes
    except InputError as error:
        raise RefusedImageError(f"{name}: {error}") from error
    number = plane_in_focus(range(len(same)))
    notes.append(f"The file has {len(same)} pages of one size: only page {number + 1}, the sharpest, is read.")
    return [number], notes


def _check_samples(page: Any) -> None:
    """Refuses a page that is said to be gray, and has several numbers for each pixel that are not alpha."""
    alpha = sum(int(kind) in (1, 2) for kind in page.extrasamples or ())
    unknown = sum(int(kind) == 0 for kind in page.extrasamples or ())
    samples = page.samplesperpixel - alpha
    # Beside gray alone, one of which nothing is said is left out, as everywhere.
    if int(page.photometric) in (0, 1) and samples > 1 and (samples, unknown) != (2, 1):
        raise InputError(
            f"it has {samples} channels in each pixel, which are said to be gray. Merge them to one RGB image, and export that."
        )


def _listed(file: Any) -> list[Any]:
    """The pages of a TIFF, up to the first that cannot be read."""
    listed = []
    for number in range(MAX_PAGES):
        try:
            listed.append(file.pages[number])
        # After the last one, or at one that is damaged.
        except Exception:
            break
    return listed


def _not_in_parts(page: Any) -> str | None:
    """Why a page cannot be read in parts, in words."""
    sides = (page.imagewidth, page.imagelength, *_chunk_size(page))
    if not all(isinstance(side, int) and side > 0 for side in sides):
        return "its size, or that of its tiles, is none"
    if page.dtype != np.uint8 or page.bitspersample != 8:
        return f"pixels of {page.bitspersample} bits are not read in parts"
    if page.samplesperpixel not in (1, 3, 4) or (page.samplesperpixel > 1 and page.planarconfig != 1):
        return f"{page.samplesperpixel} channels that lie apart are not read in parts"
    colours = {0, 1} if page.samplesperpixel == 1 else {2, 6}
    if int(page.photometric) not in colours or (int(page.photometric) == 6 and page.compression not in _JPEGS):
        return f"colours of the kind {page.photometric!s} are not read in parts"
    if page.tags.get(_ORIENTATION) is not None and page.tags[_ORIENTATION].value not in (0, 1):
        return "a picture that is stored turned is not read in parts"
    width, height = _chunk_size(page)
    if not _in_plain_rows(page) and width * height * page.samplesperpixel > LARGEST_CHUNK:
        return "its pixels are packed in one piece"
    if not _in_plain_rows(page) and not page.is_tiled and 3 * width * STRIP_ROWS > KEPT_OF_STRIPS:
        return f"its packed strips of {width} pixels are too wide"
    return None


def _in_plain_rows(page: Any) -> bool:
    return page.compression == 1 and not page.is_tiled and page.fillorder == 1


def _chunk_size(page: Any) -> tuple[int, int]:
    """Width and height of a tile, or strip."""
    if page.is_tiled:
        return page.tilewidth, page.tilelength
    return page.imagewidth, min(max(1, page.rowsperstrip), page.imagelength)


def _gray_or_rgb(page: Any, pixels: np.ndarray) -> np.ndarray:
    """Samples `[..., 1|3|4]` as gray `[..., 1]` of which zero is black, or RGB; what is transparent over white."""
    if pixels.shape[-1] == 1:
        return 255 - pixels if int(page.photometric) == 0 else pixels
    if pixels.shape[-1] == 4:
        if int((page.extrasamples or (0,))[0]) == 0:
            return pixels[..., :3]
        alpha = pixels[..., 3:].astype(np.uint16)
        colours = pixels[..., :3].astype(np.uint16)
        colours = colours if int(page.extrasamples[0]) == 1 else colours * alpha // 255
        return np.minimum(colours + 255 - alpha, 255).astype(np.uint8)
    return pixels


def _scale_of_tags(page: Any, description: str) -> tuple[float, str] | None:
    def tag(code: int) -> Any:
        found = page.tags.get(code)
        return None if found is None else found.value

    resolution = []
    for code in (282, 283):
        value = tag(code)
        pair = value if isinstance(value, tuple) and len(value) == 2 else (0, 1)
        resolution.append(pair[0] / pair[1] if pair[1] else 0.0)
    unit = {2: 25400.0, 3: 1e4}.get(int(tag(296) or 2), 0.0)
    return described_pixel_size(description, tuple(resolution)) or plausible_pixel_size(
        tuple(unit / each if each > 0 else 0.0 for each in resolution), "the resolution of the TIFF"
    )


def _check_plausible(path: Path, name: str, width: int, height: int) -> None:
    if 3 * width * height > max(SPARSE * MAX_COMPRESSION * path.stat().st_size, 1 << 29):
        raise UnreadableImageError(
            f"{name}: the file is far too small for the {width} x {height} pixels it names, so it is damaged. Copy it again or "
            "export it anew."
        )


class OpenSlideRegions(RegionSource):
    """A slide in a format that OpenSlide reads: NDPI, MRXS, DICOM, SCN, BIF, and others.

    Args:
        path (`Path`): The file; of a slide in several files, the one that OpenSlide opens.

    Raises:
        UnreadableImageError: OpenSlide cannot open it.
    """

    def __init__(self, path: Path):
        import openslide

        self._path = path
        if _is_tiff(path):
            _check_tiles(path)
        with _of_file(str(path)):
            try:
                self._slide = openslide.OpenSlide(str(path))
            except openslide.OpenSlideUnsupportedFormatError as error:
                raise UnreadableImageError(f"{path}: it is no slide of a format that OpenSlide reads.") from error
            properties = self._slide.properties
            sizes = [properties.get(key, "") for key in ("openslide.mpp-x", "openslide.mpp-y")]
            scale = plausible_pixel_size(tuple(_float(size) for size in sizes), "slide metadata")
            levels = [(int(width), int(height)) for width, height in self._slide.level_dimensions]
            if path.suffix.lower() not in (*_FOLDER_BESIDE, *_SERIES):
                _check_plausible(path, str(path), *levels[0])
        super().__init__(str(path), levels, (), scale)
        self.closing.callback(lambda: self._slide.close())

    def _read(self, level: int, box: Box, strict: bool) -> Image.Image:
        import openslide

        left, top, right, bottom = box
        down = self.width / self.levels[level][0], self.height / self.levels[level][1]
        try:
            part = self._slide.read_region(
                (round(left * down[0]), round(top * down[1])), level, (right - left, bottom - top)
            )
        except openslide.OpenSlideError as error:
            # After an error a slide answers nothing any more.
            self._slide.close()
            with _of_file(str(self._path)):
                self._slide = openslide.OpenSlide(str(self._path))
            raise UnreadableRegionError(f"{self.name}: {box} cannot be read ({shortened(error)}).") from error
        return to_rgb(part)


def _check_tiles(path: Path) -> None:
    """Refuses a TIFF with tiles of a size that nobody writes: OpenSlide would end the process where memory for one is missing."""
    with _of_file(str(path)), _tifffile().TiffFile(path) as file:
        for page in _listed(file):
            if page.is_tiled and math.prod((*_chunk_size(page), page.samplesperpixel)) > LARGEST_CHUNK:
                raise UnreadableImageError(f"{path}: it names tiles of {page.tilewidth} x {page.tilelength} pixels.")


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


# The process that has used libvips. In one that was forked from it the threads of libvips are gone, and it would wait for ever.
_vips_process: int | None = None


def _decoded_once(path: Path, most_pixels: int | None = None) -> RegionSource:
    """A plain file of any size, decoded once from top to bottom into a temporary pyramid, which is read in parts.

    Raises:
        UnreadableImageError: It cannot be decoded so, or only by guessing at its brightness; or it has more than `most_pixels`.
    """
    global _vips_process
    if _vips_process not in (None, os.getpid()):
        raise UnreadableImageError(
            f"{path}: libvips was in use before this process was forked, and does not work in it. Start processes by spawn."
        )
    _vips_process = os.getpid()
    stack = ExitStack()
    try:
        folder = stack.enter_context(scratch_folder())
        numbers, notes = _chosen_of_file(path) if _is_tiff(path) else ([0], [])
        with _by_libvips(path):
            image = _opened_by_libvips(path, numbers, "sequential")
            _check_most(str(path), image.width, image.height, most_pixels)
            if image.get_typeof("orientation") and image.get("orientation") != 1:
                # A turn needs the end of the file first: the picture goes through another temporary file.
                image = _opened_by_libvips(path, numbers, "random").autorot()
            if image.format != "uchar":
                raise UnreadableImageError(f"{path}: pixels of more than 8 bits are not read in parts.")
            if image.interpretation != "srgb":
                image = image.colourspace("srgb")
            if image.hasalpha():
                image = image.flatten(background=[255, 255, 255])
            image.tiffsave(
                str(folder / "pyramid.tif"),
                tile=True, tile_width=512, tile_height=512, pyramid=True, bigtiff=True, compression="none",
            )  # fmt: skip
        source = TiffRegions(folder / "pyramid.tif", str(path))
        source.closing.push(stack.pop_all())
    except BaseException:
        stack.close()
        raise
    found = pixel_size(path)
    source.um_per_pixel, source.um_source = found or (None, None)
    source.notes = (*notes, *source.notes)
    return source


@contextmanager
def _by_libvips(path: Path) -> Iterator[None]:
    """What libvips raises, as an error of the file: libvips reads fewer formats than Pillow, so the file need not be damaged."""
    import pyvips

    try:
        yield
    except pyvips.Error as error:
        if pyvips.vips_lib.vips_foreign_find_load(os.fsencode(path)) == pyvips.ffi.NULL:
            raise UnreadableImageError(
                f"{path}: this format cannot be read in parts here. Convert the image to TIFF."
            ) from error
        raise UnreadableImageError(
            f"{path}: libvips cannot decode it ({shortened(error, 200)}). Convert the image to a TIFF of 8-bit RGB."
        ) from error


def _opened_by_libvips(path: Path, pages: list[int], access: str) -> Any:
    """An image of libvips: a page of a file, or three gray ones as red, green and blue."""
    import pyvips

    def opened(**page: int) -> Any:
        return pyvips.Image.new_from_file(str(path), access=access, fail_on="error", **page)

    if len(pages) == 1:
        return opened(page=pages[0]) if pages[0] else opened()
    return opened(page=pages[0]).bandjoin([opened(page=page) for page in pages[1:]]).copy(interpretation="srgb")


def _chosen_of_file(path: Path) -> tuple[list[int], list[str]]:
    """The page of a TIFF that is its picture, or those of red, green and blue, for libvips to decode; and what has to be said.

    Raises:
        RefusedImageError: It has channels that are no colours, or with a palette each.
        UnreadableImageError: No page can be read.
    """
    with _of_file(str(path)), _tifffile().TiffFile(path) as file:
        listed = _listed(file)
        same = _pages_of_one_size(listed, str(path))
        numbers, notes = _chosen(same, listed[0].description or "", str(path), partial(_sharpness_by_libvips, path))
        chosen = [same[number] for number in numbers]
        if len(chosen) > 1 and int(chosen[0].photometric) == 3:
            raise RefusedImageError(
                f"{path}: its {len(chosen)} channels have a palette each, and are not read in parts. Merge them to one RGB "
                "image, and export that."
            )
        return [int(page.index) for page in chosen], notes


def _sharpness_by_libvips(path: Path, page: Any) -> float:
    """Of the middle of a page, negative where it cannot be decoded."""
    import pyvips

    width, height = min(FOCUS_WINDOW, page.imagewidth), min(FOCUS_WINDOW, page.imagelength)
    left, top = (page.imagewidth - width) // 2, (page.imagelength - height) // 2
    try:
        return sharpness(
            _opened_by_libvips(path, [int(page.index)], "sequential").crop(left, top, width, height).numpy()
        )
    except pyvips.Error:
        return -1.0


def _check_most(name: str, width: int, height: int, most_pixels: int | None) -> None:
    if most_pixels is not None and width * height > most_pixels:
        raise TooLargeError(f"{name}: {width} x {height} pixels, and no more than {most_pixels} are taken here.")


def open_regions(image: Any, max_pixels: int = MAX_PIXELS, most_pixels: int | None = None) -> RegionSource:
    """Opens an image of any size.

    Args:
        image (`str`, `Path`, `PIL.Image.Image`, `np.ndarray` or [`OpenedImage`]): The image. One in memory, and a file of up to
            `max_pixels`, is held whole; larger files, and those of slide scanners, are read in parts.
        max_pixels (`int`): Pixels of an image that is held in memory.
        most_pixels (`int`, *optional*): A file of more is refused before anything of it is decoded.

    Returns:
        [`RegionSource`]: To be closed; in a `with` block it is.

    Raises:
        TooLargeError: It has more than `most_pixels`.
        RefusedImageError: The image can be decoded, and shows no colours: four channels of fluorescence, for example.
        UnreadableImageError: The image cannot be read.
    """
    if isinstance(image, OpenedImage):
        return ImageRegions(image)
    if not isinstance(image, (str, Path)):
        return ImageRegions(open_image(image))
    path, problem = Path(image), None
    try:
        if most_pixels is not None:
            _check_most(str(path), *stored_size(path), most_pixels)
        height, width = image_size(path)
        if height * width <= max_pixels and path.suffix.lower() not in _OWN_LIBRARY:
            return ImageRegions(open_image(image), pixel_size(path))
    except (TooLargeError, RefusedImageError):
        raise
    except UnreadableImageError as error:
        problem = error
        if not path.is_file() or not (_is_tiff(path) or path.suffix.lower() in _OWN_LIBRARY):
            raise
    else:
        _check_plausible(path, str(path), width, height)
    reasons = []
    for needed, reader in _readers(path, most_pixels):
        if not all(map(find_spec, needed)):
            reasons.append(f"{EXTRA} may help")
            continue
        try:
            source = reader(path)
        except (TooLargeError, RefusedImageError):
            raise
        except UnreadableImageError as error:
            reasons.append(str(error).removeprefix(f"{path}: ").rstrip("."))
            continue
        try:
            # Another page of the file may be larger than the first.
            _check_most(str(path), *source.size, most_pixels)
        except TooLargeError:
            source.close()
            raise
        return source
    said = "; ".join(dict.fromkeys(reasons))
    if problem is not None:
        raise UnreadableImageError(
            f"{str(problem).rstrip('.')}. It is not read as a slide either: {said}."
        ) from problem
    # Reduced, as it stands in memory.
    opened = open_image(image)
    note = (
        f"The image has {opened.width} x {opened.height} pixels and was reduced to {opened.pixels.width} x "
        f"{opened.pixels.height}: {said}."
    )
    return ImageRegions(opened._replace(notes=(*opened.notes, note)), pixel_size(path))


# Formats that no other library opens as they are.
_OWN_LIBRARY = tuple(suffix for suffix in (*SLIDE_SUFFIXES, *_SERIES) if suffix != ".svs")


def _readers(
    path: Path, most_pixels: int | None = None
) -> list[tuple[tuple[str, ...], Callable[[Path], RegionSource]]]:
    """Modules that are needed, and what reads a file with them, in the order in which they are tried."""
    tiff = (("tifffile", "imagecodecs"), TiffRegions)
    slide = (("openslide", "tifffile"), OpenSlideRegions)
    plain = (("pyvips", "tifffile", "imagecodecs"), partial(_decoded_once, most_pixels=most_pixels))
    if path.suffix.lower() in _OWN_LIBRARY:
        return [slide, tiff] if _is_tiff(path) else [slide]
    return [tiff, slide, plain] if _is_tiff(path) else [plain]


def _is_tiff(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) in _TIFF


def image_sha256(path: Path) -> str:
    """SHA-256 of an image's bytes, in hexadecimal; of a slide in several files, of the SHA-256 of each.

    All bytes are read, also those of a slide: a cheaper mark would not notice a file that was changed in its middle. Reading them
    takes seconds for each gigabyte, where looking at them takes minutes.

    Raises:
        InputError: Not a regular file.
    """
    beside = _beside(path)
    whole = sha256(path)
    if not beside:
        return whole
    import hashlib

    digest = hashlib.sha256(whole.encode())
    for each in beside:
        digest.update(os.fsencode(each.name) + sha256(each).encode())
    return digest.hexdigest()


def is_unchanged(path: Path, digest: str) -> bool:
    """Whether an image is the one of a SHA-256 of [`image_sha256`]. All images of a camera have one size, so that says little.

    Of files of more than `MOST_COMPARED` bytes the answer is yes: reading a slide for each of its pictures would take minutes.
    """
    size = sum(each.stat().st_size for each in (path, *_beside(path)))
    return size > MOST_COMPARED or image_sha256(path) == digest


def _beside(path: Path) -> list[Path]:
    """The other files of a slide that lies in several."""
    if path.suffix.lower() in _FOLDER_BESIDE and path.with_suffix("").is_dir():
        return sorted(each for each in path.with_suffix("").rglob("*") if each.is_file())
    if path.suffix.lower() in _SERIES:
        return sorted(each for each in path.parent.iterdir() if each.suffix.lower() in _SERIES and each != path)
    return []


def _spans(length: int, pieces: int) -> list[tuple[int, int]]:
    """`length` in equal pieces."""
    pieces = min(max(pieces, 1), length)
    return [(length * n // pieces, length * (n + 1) // pieces) for n in range(pieces)]


__all__ = [
    "ImageRegions",
    "OpenSlideRegions",
    "RegionSource",
    "TiffRegions",
    "TooLargeError",
    "UnreadableRegionError",
    "image_sha256",
    "is_unchanged",
    "open_regions",
]
