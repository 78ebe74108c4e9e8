"""Masks: pairs of images and masks by name, and what the pixels of a mask mean."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from unihema.errors import DatasetError
from unihema.files import shortened
from unihema.training.data.layouts.files import ImageFinder, image_size
from unihema.training.data.rows import BadRows, Row, same_shape


MASK_FOLDERS = ("masks", "mask", "gt", "ground_truth", "groundtruth", "annotations", "labels")
IMAGE_FOLDERS = ("images", "image", "img", "imgs")
# Gray levels between background and cell from which on edges may be soft, and the largest share of flat surface in them.
SOFT_LEVELS = 4
LARGEST_FLAT_SHARE = 0.25
_MASK_SUFFIX = re.compile(r"[-_ ](mask|gt|seg|label)$", re.I)


def read_mask_pairs(folder: Path, dataset: str, prompt: str, bad: BadRows) -> list[Row]:
    """Segmentation rows of all image/mask pairs in a folder and its subfolders.

    A mask is recognised by its folder (`masks/`, `gt/`, ...), by its suffix (`a_mask.png`), or as the PNG beside an image
    of the same stem and another type (`001.bmp`, `001.png`). Nonzero pixels are cell.

    Args:
        folder (`Path`): The data set.
        dataset (`str`): Its name.
        prompt (`str`): What the masks show.
        bad (`BadRows`): Gets masks without an image, and pairs of different size.

    Returns:
        `list[Row]`: `file_name` is relative to `folder`.
    """
    images = ImageFinder(folder)
    masks = [path for path in images.files if is_mask(path, folder)]
    candidates: dict[tuple[str, str], list[Path]] = {}
    for path in images.files:
        if not is_mask(path, folder):
            candidates.setdefault(_key(path, folder), []).append(path)
    rows = []
    for mask in masks:
        with bad.collecting():
            found = candidates.get(_key(mask, folder), [])
            if not found:
                raise DatasetError(
                    f"{mask}: no image of this name. Put it into {IMAGE_FOLDERS[0]}/, or take the mask out."
                )
            if len(found) > 1:
                raise DatasetError(f"{mask}: several images of this name: {', '.join(path.name for path in found)}.")
            row = images.row(found[0], dataset, "segmentation") | {"mask": str(mask), "prompt": prompt}
            check_mask_size(row)
            rows.append(row)
    images.report(bad, rows, "is a mask of its name")
    return rows


def check_mask_size(row: Row) -> None:
    """Checks that the mask of a segmentation row has the shape of its image; it may be larger or smaller.

    Raises:
        DatasetError: It has not, or one of the two is no image.
    """
    sizes = image_size(row["image"]), image_size(row["mask"])
    if not same_shape(*sizes):
        (width, height), (mask_width, mask_height) = sizes
        raise DatasetError(
            f"{row['mask']}: {mask_width}x{mask_height} pixels, but its image {row['image']} has {width}x{height}."
        )


def is_mask(path: Path, root: Path) -> bool:
    """Whether an image file is a mask, by its folder, its suffix or the image beside it."""
    folders = path.relative_to(root).parts[:-1]
    if any(part.lower() in MASK_FOLDERS for part in folders) or _MASK_SUFFIX.search(path.stem):
        return True
    others = (".bmp", ".jpg", ".jpeg", ".tif", ".tiff")
    return path.suffix.lower() == ".png" and any(path.with_suffix(suffix).is_file() for suffix in others)


def _key(path: Path, root: Path) -> tuple[str, str]:
    """What an image and its mask share: the stem, and the folders apart from `images`, `masks` and the like."""
    folders = [
        part for part in path.relative_to(root).parts[:-1] if part.lower() not in (*MASK_FOLDERS, *IMAGE_FOLDERS)
    ]
    return "/".join(folders), _MASK_SUFFIX.sub("", path.stem)


def rows_of_levels(rows: Sequence[Row], levels: Mapping[str, Sequence[int]]) -> list[Row]:
    """Segmentation rows of masks whose levels show several things: one for each of them.

    Args:
        rows (`Sequence[Row]`): Of one data set.
        levels (`Mapping[str, Sequence[int]]`): What is shown, the prompt -> the levels that show it.

    Raises:
        DatasetError: The data set has no masks, or the rows are of shards.
    """
    if not len(rows) or not isinstance(rows, list):
        raise DatasetError("data.mask_levels: the data set has no masks in files; name the folder that has them.")
    return [row | {"prompt": prompt, "mask_levels": list(shown)} for row in rows for prompt, shown in levels.items()]


def read_mask(source: Any, levels: Sequence[int] | None = None) -> np.ndarray:
    """A mask as uint8 `[H, W]`, 1 where there is a cell.

    Args:
        source (path, `PIL.Image.Image` or `np.ndarray`): Upright by its EXIF turn. What is not black is cell, by any colour; of a
            palette its colours count, of a picture that is black throughout its opacity. Where edges are soft, or JPEG has
            blurred them, cell is what is nearer to the brightest level than to black.
        levels (`Sequence[int]`, *optional*): The levels that count as cell, of a palette its numbers, instead of all but black.

    Raises:
        DatasetError: Not readable, not of one picture, a JPEG too dark to tell cell from noise, or a JPEG of which levels are
            asked for.
    """
    if hasattr(source, "opened"):
        # A file inside a shard.
        source = source.opened()
    if isinstance(source, np.ndarray):
        values, lossy, name = source, False, "mask"
    else:
        name = getattr(source, "filename", "mask") if isinstance(source, Image.Image) else source
        try:
            if isinstance(source, Image.Image):
                values, lossy = _levels(source, numbered=levels is not None)
            else:
                with Image.open(source) as opened:
                    values, lossy = _levels(opened, numbered=levels is not None)
        except Exception as error:
            # PIL's readers raise anything on bytes that were damaged on purpose.
            raise DatasetError(f"{name}: not a readable mask ({shortened(error)}). Export it again as PNG.") from error
        if lossy and 0 < int(values.max(initial=0)) < 128:
            raise DatasetError(
                f"{name}: a JPEG whose brightest level is {values.max()}: cells cannot be told from noise. Export it as PNG."
            )
    if values.ndim == 3:
        values = values[..., : 3 if values.shape[-1] >= 3 else 1].max(axis=-1)
    if values.ndim != 2 or not values.size:
        raise DatasetError(f"{source if isinstance(source, str) else 'mask'}: shape {values.shape} is not [H, W].")
    if levels is not None:
        if lossy:
            raise DatasetError(f"{name}: a JPEG keeps no levels. Export the mask as PNG.")
        return np.isin(values, list(levels)).astype(np.uint8)
    limit = int(values.max()) / 2 if lossy or has_soft_edges(values) else 0
    return (values > limit).astype(np.uint8)


def _levels(image: Image.Image, numbered: bool) -> tuple[np.ndarray, bool]:
    """The levels of a mask, `[H, W]`, black being 0, and whether its file type blurs edges. Of a palette they are its numbers
    where these say what is shown, or else how bright its colours are."""
    lossy = image.format in ("JPEG", "MPO")
    image = ImageOps.exif_transpose(image)
    if image.mode in ("P", "PA"):
        indices = np.asarray(image.convert("P"))
        levels = np.asarray(image.convert("RGB")).max(axis=-1)
        # Without black, only the number says what is background.
        return (indices if numbered or levels.all() else levels), lossy
    if image.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
        image = image.convert("RGB")
    values = np.asarray(image)
    if values.ndim == 3:
        colours = values[..., : 3 if values.shape[-1] >= 3 else 1].max(axis=-1)
        opaque = values[..., -1] if image.mode in ("RGBA", "LA") else colours
        values = colours if colours.any() or opaque.all() else opaque
    return values, lossy


def has_soft_edges(values: np.ndarray) -> bool:
    """Whether the levels between black and the brightest are edges, uint8 `[H, W]`, and not numbers of classes or cells.

    Areas of classes and cells are flat: most of their pixels equal their neighbours.
    """
    if values.dtype != np.uint8 or values.max(initial=0) < 128:
        return False
    between = (values > 0) & (values < values.max())
    if len(np.unique(values[between])) < SOFT_LEVELS:
        return False
    corner = values[:-1, :-1]
    flat = between[:-1, :-1] & (corner == values[1:, :-1]) & (corner == values[:-1, 1:])
    return flat.sum() < LARGEST_FLAT_SHARE * between.sum()
