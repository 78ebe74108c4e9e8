"""Single cells sorted into folders: the folder is the class."""

from collections.abc import Mapping
from pathlib import Path

from unihema.errors import DatasetError
from unihema.training.data.layouts.files import ImageFinder, checked_label
from unihema.training.data.rows import BadRows, Row
from unihema.training.data.splits import SPLIT_NAMES


def read_class_folders(folder: Path, dataset: str, rename: Mapping[str, str], bad: BadRows) -> list[Row]:
    """Single-cell rows of `.../<label>/*.png`; folders above the label may be anything.

    Args:
        folder (`Path`): The data set.
        dataset (`str`): Its name.
        rename (`Mapping[str, str]`): Labels to replace.
        bad (`BadRows`): Gets images that lie in no class folder.

    Returns:
        `list[Row]`: `file_name` is relative to `folder`.
    """
    images = ImageFinder(folder)
    rows = []
    for path in images.files:
        with bad.collecting():
            label = class_of(path, folder)
            if label is None:
                raise DatasetError(f"{path}: lies in no class folder. Move it into one, or take it out.")
            label = checked_label(label, str(path))
            rows.append(images.row(path, dataset, "single_cell") | {"label": rename.get(label, label)})
    images.report(bad)
    stems = {path.with_suffix("") for path in images.files}
    unread = [path for path in images.listing.named(".json", ".xml", ".txt") if path.with_suffix("") in stems]
    if unread:
        bad.note(
            f"{folder}: read as class folders. {len(unread)} files that are named like an image, such as "
            f"{images.relative(unread[0])}, are in no layout that is known, and are not read."
        )
    return rows


def class_of(path: Path, root: Path) -> str | None:
    """The folder directly around an image, unless that is the data set itself or a split."""
    parts = path.relative_to(root).parts[:-1]
    return parts[-1] if parts and parts[-1].lower() not in SPLIT_NAMES else None
