"""Splits: the names they go by, and a fair one for data that come without."""

import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from unihema.errors import DatasetError
from unihema.training.data.rows import GROUP_KEYS, Row


SPLITS = ("train", "val", "test")
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}


def split_in_path(file_name: str) -> str | None:
    """The split that a folder in a relative path names; None when none does."""
    for part in PurePosixPath(file_name).parts[:-1]:
        if part.lower() in SPLIT_NAMES:
            return SPLIT_NAMES[part.lower()]
    return None


def split_in_name(file_name: str) -> str | None:
    """The split that the stem of an annotation file names as a word of its own, as in `attributes_val.csv`."""
    words = PurePosixPath(file_name).stem.lower().replace("-", "_").replace(".", "_").split("_")
    found = [SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES]
    return found[0] if len(found) == 1 else None


def draw_split(row: Row, val_share: float) -> str:
    """`train` or `val`, the same wherever and whenever it is drawn.

    All rows of a patient, else of a slide, else of a field fall into one split. Without these the bytes of the image
    decide, so that a photograph falls into the same split in every data set that has it.

    Raises:
        DatasetError: The image cannot be read.
    """
    group = next((f"{key}:{row[key]}".encode() for key in GROUP_KEYS if row.get(key)), None)
    if group is None:
        try:
            group = Path(row["image"]).read_bytes()
        except OSError as error:
            raise DatasetError(f"{row['image']}: cannot be read ({error}).") from error
    return "val" if zlib.crc32(group) < val_share * 2**32 else "train"


def check_val_share(val_share: float) -> None:
    """Checks the share of a validation split.

    Raises:
        DatasetError: Not in 0..1, or 1.
    """
    if not 0 <= val_share < 1:
        raise DatasetError(f"A validation share of {val_share} must be 0 or more and below 1, such as 0.1.")


def by_split(rows: Sequence[Row], val_share: float) -> dict[str, list[Row]]:
    """Rows sorted into splits: by a `split` that they have, which is taken off, else drawn.

    Where the data set has a training and no validation split, validation is drawn from its training rows; what it calls
    `test` stays `test`.

    Raises:
        DatasetError: An image that cannot be read.
    """
    named = {row["split"] for row in rows if row.get("split")}
    sorted_rows: dict[str, list[Row]] = {}
    for row in rows:
        split = row.get("split")
        if split is None or (split == "train" and "val" not in named):
            split = draw_split(row, val_share)
        sorted_rows.setdefault(split, []).append({key: value for key, value in row.items() if key != "split"})
    return {split: sorted_rows[split] for split in SPLITS if split in sorted_rows}
