"""Pictures of cells and of what lies around them, cut when they are asked for, from photographs and slides alike."""

import hashlib
import io
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from PIL import Image

from unihema.errors import InputError, RequestError
from unihema.slides import Box, RegionSource, is_unchanged, open_regions

from .state import ReviewedCell, ReviewedImage


# Bytes of images that are kept open, and of pictures that were cut.
KEPT_IMAGES, KEPT_PICTURES = 256 << 20, 64 << 20
# What a source that is read in parts keeps of it.
STREAMING_BYTES = 32 << 20
THUMBNAIL = 128
# A thumbnail shows this share of the cell's longer side around it.
AROUND = 0.2
LONGEST_VIEW = 1024


class Pictures:
    """Cuts pictures out of the images of a review; keeps the last ones, in bounded memory.

    Libraries that read slides are no friends of threads, so one picture is cut at a time.
    """

    def __init__(self) -> None:
        self._open: OrderedDict[str, RegionSource] = OrderedDict()
        self._cut: OrderedDict[str, bytes] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def thumbnail_key(self, image: ReviewedImage, cell: ReviewedCell) -> str:
        """What tells the picture of a cell from all others: the content of its image, and its box."""
        return _key(image, thumbnail_box(image, cell), (THUMBNAIL, THUMBNAIL))

    def thumbnail(self, image: ReviewedImage, cell: ReviewedCell) -> bytes:
        """A JPEG of a cell and a little around it, square.

        Raises:
            InputError: The image is not there any more, or is another one.
        """
        return self._picture(image, thumbnail_box(image, cell), (THUMBNAIL, THUMBNAIL))

    def view_key(self, image: ReviewedImage, box: Box, longest: int) -> str:
        """What tells a view from all others."""
        return _key(image, box, _view_size(box, longest))

    def view(self, image: ReviewedImage, box: Box, longest: int) -> bytes:
        """A JPEG of a part of an image.

        Args:
            image ([`ReviewedImage`]): The image.
            box (`tuple[int, int, int, int]`): x_min, y_min, x_max, y_max in its pixels, within it.
            longest (`int`): Longer edge of the picture in pixels.

        Raises:
            RequestError: A box that is none.
            InputError: The image is not there any more, or is another one.
        """
        result = image.stored.result
        if not (0 <= box[0] < box[2] <= result.width and 0 <= box[1] < box[3] <= result.height):
            raise RequestError(f"{list(box)} is no part of an image of {result.width} x {result.height} pixels.")
        return self._picture(image, box, _view_size(box, longest))

    def close(self) -> None:
        """Gives the images back."""
        with self._lock:
            while self._open:
                self._open.popitem()[1].close()

    def _picture(self, image: ReviewedImage, box: Box, size: tuple[int, int]) -> bytes:
        key = _key(image, box, size)
        with self._lock:
            if key in self._cut:
                self._cut.move_to_end(key)
                return self._cut[key]
            with _told(image):
                part = _region(self._source(image), box, size)
            content = io.BytesIO()
            part.save(content, "JPEG", quality=88)
            picture = self._cut[key] = content.getvalue()
            self._bytes += len(picture)
            while self._bytes > KEPT_PICTURES:
                self._bytes -= len(self._cut.popitem(last=False)[1])
            return picture

    def _source(self, image: ReviewedImage) -> RegionSource:
        source = self._open.get(image.name)
        if source is None:
            if not is_unchanged(image.stored.source, image.stored.image_sha256):
                raise InputError("it is another image than the one that was analysed")
            source = open_regions(image.stored.source)
            result = image.stored.result
            if source.size != (result.width, result.height):
                source.close()
                raise InputError(
                    f"it has {source.width} x {source.height} pixels now, and had {result.width} x {result.height} when it was "
                    "analysed"
                )
            self._open[image.name] = source
        self._open.move_to_end(image.name)
        while len(self._open) > 1 and sum(map(_memory, self._open.values())) > KEPT_IMAGES:
            self._open.popitem(last=False)[1].close()
        return source


def thumbnail_box(image: ReviewedImage, cell: ReviewedCell) -> Box:
    """The square around a cell that its thumbnail shows, in pixels; it may reach out of the image."""
    left, top, right, bottom = cell.original.box
    around = 0.0 if image.shows_one_cell else AROUND
    side = max(right - left, bottom - top, 8.0) * (1 + 2 * around)
    x, y = (left + right) / 2, (top + bottom) / 2
    x_min, y_min = round(x - side / 2), round(y - side / 2)
    return x_min, y_min, x_min + max(1, round(side)), y_min + max(1, round(side))


def _region(source: RegionSource, box: Box, size: tuple[int, int]) -> Image.Image:
    """A part of an image at a size; gray where it reaches out of it."""
    left, top, right, bottom = box
    within = max(left, 0), max(top, 0), min(right, source.width), min(bottom, source.height)
    if within == box:
        return source.read_region(box, size, strict=False)
    picture = Image.new("RGB", size, (128, 128, 128))
    if within[0] >= within[2] or within[1] >= within[3]:
        return picture
    x, y = size[0] / (right - left), size[1] / (bottom - top)
    place = round((within[0] - left) * x), round((within[1] - top) * y)
    part = max(1, round((within[2] - within[0]) * x)), max(1, round((within[3] - within[1]) * y))
    picture.paste(source.read_region(within, part, strict=False), place)
    return picture


@contextmanager
def _told(image: ReviewedImage) -> Iterator[None]:
    """What goes wrong with an image, as an error that names it without the folders above it."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, MemoryError) as error:
        said = str(error).replace(str(image.stored.source), image.stored.source.name)
        raise InputError(f"{image.stored.source.name} cannot be shown: {said.rstrip('.')}.") from error


def _memory(source: RegionSource) -> int:
    return STREAMING_BYTES if source.streams else 3 * source.pixels.width * source.pixels.height


def _view_size(box: Sequence[int], longest: int) -> tuple[int, int]:
    width, height = max(1, box[2] - box[0]), max(1, box[3] - box[1])
    scale = min(max(longest, 1), LONGEST_VIEW) / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _key(image: ReviewedImage, box: Sequence[int], size: tuple[int, int]) -> str:
    return hashlib.sha256(f"{image.stored.image_sha256} {list(box)} {size}".encode()).hexdigest()[:32]


__all__ = ["AROUND", "LONGEST_VIEW", "THUMBNAIL", "Pictures", "thumbnail_box"]
