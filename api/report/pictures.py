"""Pictures in a report's page: cells and fields, as data that stands in the page itself."""

import base64
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from unihema.slides import Box, RegionSource, is_unchanged, open_regions


if TYPE_CHECKING:
    from PIL import Image

    from unihema.results.cell import Cell

    from .smear_report import ReportedImage


# Pixels of a cell's picture, and of the longer edge of a field's; both as they are printed, at twice their size on a screen.
THUMBNAIL, FIELD = 112, 900
# A thumbnail shows this share of the cell's longer side around it.
AROUND = 0.25
QUALITY = 82


def thumbnails(cells: "Sequence[tuple[ReportedImage, Cell]]") -> list[str | None]:
    """A picture of each cell, `None` where its image is not there any more, or is another one.

    Args:
        cells (`Sequence[tuple[ReportedImage, Cell]]`): Cells with their images; each image is opened once.
    """
    found: list[str | None] = [None] * len(cells)
    places: dict[int, list[int]] = {}
    for place, (image, _) in enumerate(cells):
        places.setdefault(id(image), []).append(place)
    for of_image in places.values():
        image = cells[of_image[0]][0]
        with _opened(image) as source:
            for place in of_image if source is not None else ():
                box = _square(cells[place][1], source, 0.0 if image.shows_one_cell else AROUND)
                found[place] = _data(source.read_region(box, (THUMBNAIL, THUMBNAIL), strict=False))
    return found


def field_picture(image: "ReportedImage") -> str | None:
    """A field at a size to print; `None` where it is not there any more, or is another one."""
    with _opened(image) as source:
        if source is None:
            return None
        share = min(1.0, FIELD / max(source.size))
        size = max(1, round(source.width * share)), max(1, round(source.height * share))
        return _data(source.pixels.resize(size, reducing_gap=2.0))


@contextmanager
def _opened(image: "ReportedImage") -> "Iterator[RegionSource | None]":
    """The image of a result, if it is there and still the same."""
    source = None
    if image.source is not None and image.source.is_file():
        try:
            if image.sha256 is None or is_unchanged(image.source, image.sha256):
                source = open_regions(image.source)
        except (OSError, ValueError, RuntimeError, MemoryError):
            # Without its picture a figure is still right; the page says that it is missing.
            source = None
    try:
        yield source if source and source.size == (image.result.width, image.result.height) else None
    finally:
        if source is not None:
            source.close()


def _square(cell: "Cell", source: RegionSource, around: float) -> Box:
    """The square around a cell, moved into the image."""
    left, top, right, bottom = cell.box
    side = round(min(max(right - left, bottom - top, 8.0) * (1 + 2 * around), *source.size))
    x = min(max(round((left + right - side) / 2), 0), source.width - side)
    y = min(max(round((top + bottom - side) / 2), 0), source.height - side)
    return x, y, x + side, y + side


def _data(picture: "Image.Image") -> str:
    content = io.BytesIO()
    picture.convert("RGB").save(content, "JPEG", quality=QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode("ascii")


__all__ = ["field_picture", "thumbnails"]
