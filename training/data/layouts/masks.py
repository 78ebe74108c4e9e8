"""Images and their masks, paired by name: in folders of their own, with a suffix, or with another file type."""

import re
from pathlib import Path

from unihema.errors import DatasetError
from unihema.training.data.layouts.files import ImageFinder, image_size
from unihema.training.data.rows import BadRows, Row


MASK_FOLDERS = ("masks", "mask", "gt", "ground_truth", "groundtruth", "annotations", "labels")
IMAGE_FOLDERS = ("images", "image", "img", "imgs")
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
    return rows


def check_mask_size(row: Row) -> None:
    """Checks that the mask of a segmentation row is as large as its image.

    Raises:
        DatasetError: It is not, or one of the two is no image.
    """
    sizes = image_size(row["image"]), image_size(row["mask"])
    if sizes[0] != sizes[1]:
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
