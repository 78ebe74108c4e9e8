"""Rows whose images are corrupted when they are opened, with boxes and masks that follow."""

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from unihema.errors import InputError, InputTypeError
from unihema.processing_unihema.image_io import image_size, load_image
from unihema.training.data.layouts.masks import read_mask
from unihema.training.data.rows import Row
from unihema.training.data.shards import StoredFile
from unihema.training.studies.corruptions import CORRUPTIONS, LEVELS, Corruption


# A cell is still one to find if so much of its box is in the image, as in training.
MIN_VISIBLE = 0.5


class CorruptedFile(StoredFile):
    """An image, or its mask, that is corrupted when it is opened.

    Args:
        source (`str`, `StoredFile`, `PIL.Image.Image` or `np.ndarray`): The image or mask as it is.
        corruption (`str`): Name of the corruption.
        severity (`int`): From 1 to `LEVELS`.
        name (`str`): What its random numbers are drawn by.
        is_mask (`bool`): A mask only follows a magnification.
    """

    def __new__(cls, source: Any, corruption: str, severity: int, name: str, is_mask: bool = False):
        place = source if isinstance(source, str) else f"{name}@{id(source)}"
        made = str.__new__(cls, f"{place}|{corruption}{severity}{'|mask' if is_mask else ''}")
        made.source, made.corruption, made.severity, made.name, made.is_mask = (
            source,
            corruption,
            severity,
            name,
            is_mask,
        )
        return made

    def __getnewargs__(self):
        return self.source, self.corruption, self.severity, self.name, self.is_mask

    def content(self) -> bytes:
        """There is no file of it.

        Raises:
            TypeError: Always.
        """
        raise InputTypeError(f"{self}: a corrupted image is not in a file.")

    def opened(self) -> Image.Image:
        """The corrupted image, or the mask that goes with it."""
        corruption = CORRUPTIONS[self.corruption]
        amount = corruption.amounts[self.severity - 1]
        if self.is_mask:
            return _magnified_mask(read_mask(self.source), amount)
        image = load_image(self.source.opened() if isinstance(self.source, StoredFile) else self.source)
        return corruption.apply(image, amount, np.random.default_rng([zlib.crc32(self.name.encode()), self.severity]))


def shifted_rows(rows: Sequence[Row], corruption: Corruption, severity: int) -> list[Row]:
    """Rows of one task under a corruption.

    Args:
        rows (`Sequence[Row]`): Rows of any task.
        corruption ([`Corruption`]): Which one; of `density` the fields of that fifth of each data set.
        severity (`int`): From 1 to `LEVELS`; 0 leaves the rows as they are.

    Raises:
        ValueError: There is no such severity.
    """
    if not 0 <= severity <= LEVELS:
        raise InputError(f"Severities go from 0 (as it is) to {LEVELS}, got {severity}.")
    if severity == 0:
        return list(rows)
    if corruption.apply is None:
        return _fifth_by_count(rows, severity)
    shifted = []
    for row in rows:
        changed = row | {"image": CorruptedFile(row["image"], corruption.name, severity, row["file_name"])}
        if corruption.zooms and row["task"] == "segmentation":
            changed["mask"] = CorruptedFile(row["mask"], corruption.name, severity, row["file_name"], is_mask=True)
        if corruption.zooms and row["task"] == "detection":
            changed["objects"] = _magnified_objects(row, corruption.amounts[severity - 1])
        shifted.append(changed)
    return shifted


def _magnified_objects(row: Row, amount: float) -> dict[str, Any]:
    """Boxes in the magnified image, clipped to it; cells of which less than `MIN_VISIBLE` is left are gone."""
    source = row["image"].opened() if isinstance(row["image"], StoredFile) else row["image"]
    size = np.array(row.get("size") or image_size(source)[::-1], float)
    boxes = np.asarray(row["objects"]["bbox"], float).reshape(-1, 4)
    corners = np.concatenate((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), 1)
    middle = np.tile(size / 2, 2)
    moved = (corners - middle) * amount + middle
    clipped = moved.clip(0, np.tile(size, 2))
    sides = clipped[:, 2:] - clipped[:, :2]
    visible = sides.prod(1) / np.maximum((moved[:, 2:] - moved[:, :2]).prod(1), 1e-6)
    kept = np.flatnonzero((visible >= MIN_VISIBLE) & (sides.min(1, initial=np.inf) >= 1))
    objects = {name: [values[number] for number in kept] for name, values in row["objects"].items()}
    objects["bbox"] = np.concatenate((clipped[:, :2], sides), 1)[kept].tolist()
    return objects


def _magnified_mask(mask: np.ndarray, amount: float) -> Image.Image:
    height, width = mask.shape
    inverse = (1 / amount, 0, width / 2 * (1 - 1 / amount), 0, 1 / amount, height / 2 * (1 - 1 / amount))
    return Image.fromarray(mask).transform((width, height), Image.Transform.AFFINE, inverse, Image.Resampling.NEAREST)


def _fifth_by_count(rows: Sequence[Row], number: int) -> list[Row]:
    """Of each data set's fields, sorted by their cells, one of `LEVELS` equal parts; so every part has all data sets."""
    chosen = []
    for dataset in dict.fromkeys(row["dataset"] for row in rows):
        own = sorted((row for row in rows if row["dataset"] == dataset), key=lambda row: len(row["objects"]["bbox"]))
        chosen += [own[place] for place in np.array_split(np.arange(len(own)), LEVELS)[number - 1]]
    return chosen


__all__ = ["CorruptedFile", "shifted_rows"]
