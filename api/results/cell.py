"""A cell, and the checks of what is read of stored results."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from unihema.errors import InputError
from unihema.files import shortened

from ..processing_unihema.masks import rle_decode, rle_encode


# Of a stored result: texts (of an image's path, for one), pixels along a side, pixels of all masks together.
LONGEST_TEXT, LARGEST_NUMBER, MOST_MASK_PIXELS = 8192, 10**9, 1 << 29


@dataclass
class Cell:
    """One cell of a field.

    Args:
        id (`int`): Number of the cell in its image, from 1, best score first.
        box (`tuple[float, float, float, float]`): x_min, y_min, x_max, y_max in pixels of the image.
        label (`str`): Class.
        score (`float`): Detection score in 0..1; it is a ranking, not a calibrated probability.
        attributes (`dict[str, dict]`): Attribute -> {"value": str, "score": float}.
        mask (`np.ndarray`, *optional*): bool, the box's pixels from floor(x_min), floor(y_min) to ceil(x_max),
            ceil(y_max).
        nucleus (`dict[str, float]`, *optional*): Of a white cell whose nucleus was told apart: `nucleus_area` and
            `cytoplasm_area` in pixels of the image.
        probability (`float`, *optional*): How probable it is that the cell is of its class, of a checkpoint whose scores were
            calibrated on validation data.
        odd (`float`, *optional*): How far it is from the training cells of the class that its head gave it; above 1 are cells
            further away than 95 % of those, see [`CellReference`]. Of a checkpoint with a reference (`unihema reference`).
        second_look (`dict`, *optional*): {"label", "score"} of the cell's crop alone, and "detection", the label that detection
            gave it; `label` is of both together.

    Raises:
        ValueError: The box is upside down, or the mask has not the box's size.
    """

    id: int
    box: tuple[float, float, float, float]
    label: str
    score: float
    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)
    mask: np.ndarray | None = None
    nucleus: dict[str, float] | None = None
    probability: float | None = None
    odd: float | None = None
    second_look: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        x_min, y_min, x_max, y_max = (float(value) for value in self.box)
        self.box = (x_min, y_min, x_max, y_max)
        if x_max < x_min or y_max < y_min:
            raise InputError(f"Cell {self.id}: box {self.box} must be x_min, y_min, x_max, y_max.")
        if self.mask is not None:
            left, top = self.origin
            size = (int(np.ceil(y_max)) - top, int(np.ceil(x_max)) - left)
            self.mask = np.asarray(self.mask, dtype=bool)
            if self.mask.shape != size:
                raise InputError(f"Cell {self.id}: mask of {self.mask.shape} for a box of {size} pixels.")

    @property
    def origin(self) -> tuple[int, int]:
        """Pixel (x, y) of the image where the mask's first pixel lies."""
        return int(np.floor(self.box[0])), int(np.floor(self.box[1]))

    @property
    def center(self) -> tuple[float, float]:
        """x, y of the box's centre in pixels."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    def placed(self, left: float, top: float, scale: tuple[float, float] = (1.0, 1.0)) -> "Cell":
        """The cell of a part of an image, in the image, with its mask.

        Args:
            left, top (`float`): Pixel of the image where the part begins.
            scale (`tuple[float, float]`): Pixels of the image across and down for one of the part.
        """
        offset, factor = (left, top, left, top), (*scale, *scale)
        box = tuple(value * by + moved for value, by, moved in zip(self.box, factor, offset, strict=True))
        mask = None
        if self.mask is not None:
            # Pixels are looked up where they come from: a scale may be any number, and sums are rounded.
            columns, rows = (
                np.floor(
                    (np.arange(math.floor(box[axis]), math.ceil(box[axis + 2])) + 0.5 - offset[axis]) / scale[axis]
                )
                for axis in (0, 1)
            )
            columns, rows = columns.astype(int) - self.origin[0], rows.astype(int) - self.origin[1]
            height, width = self.mask.shape
            mask = ((rows >= 0) & (rows < height))[:, None] & ((columns >= 0) & (columns < width))
            if self.mask.size:
                mask &= self.mask[np.clip(rows, 0, height - 1)[:, None], np.clip(columns, 0, width - 1)]
        nucleus = self.nucleus and {name: area * scale[0] * scale[1] for name, area in self.nucleus.items()}
        return replace(self, box=box, mask=mask, nucleus=nucleus)

    def to_dict(self) -> dict[str, Any]:
        """The cell as JSON types; the mask as a run-length code."""
        out = {"id": self.id, "box": list(self.box), "label": self.label, "score": self.score}
        if self.attributes:
            out["attributes"] = self.attributes
        if self.second_look is not None:
            out["second_look"] = self.second_look
        if self.mask is not None:
            out["mask"] = rle_encode(self.mask)
        if self.nucleus is not None:
            out["nucleus"] = self.nucleus
        if self.probability is not None:
            out["probability"] = self.probability
        if self.odd is not None:
            out["odd"] = self.odd
        return out

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Cell":
        """The cell that `to_dict` wrote."""
        values = checked(values, _CELL, "a cell")
        if values.get("mask") is not None:
            values["mask"] = rle_decode(values["mask"]).astype(bool)
        return cls(**values)


def is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= LONGEST_TEXT


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= LARGEST_NUMBER


def is_side(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LARGEST_NUMBER


def is_mask(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"size", "counts"}
        and isinstance(value["size"], list)
        and len(value["size"]) == 2
        and all(isinstance(side, int) and 0 <= side <= LARGEST_NUMBER for side in value["size"])
        and isinstance(value["counts"], list)
        and all(isinstance(count, int) and 0 <= count <= LARGEST_NUMBER**2 for count in value["counts"])
    )


def or_none(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


def is_list(check: Callable[[Any], bool], most: int = LARGEST_NUMBER) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and len(value) <= most and all(map(check, value))


def has(**checks: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Checks a dictionary with these keys."""
    return lambda value: (
        isinstance(value, dict)
        and value.keys() == checks.keys()
        and all(check(value[name]) for name, check in checks.items())
    )


def is_mapping(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(is_text, value)) and all(map(check, value.values()))


def checked(values: Any, checks: Mapping[str, Callable[[Any], bool]], what: str) -> dict[str, Any]:
    """The fields of something that was stored.

    Raises:
        InputError: A field is missing, unknown, or of a value that is never written.
    """
    if not isinstance(values, dict):
        raise InputError(f"{what} is stored as a dictionary, not as {shortened(repr(values), 60)}.")
    # Older results lack some of these.
    optional = {
        "attributes",
        "mask",
        "nucleus",
        "probability",
        "class_parents",
        "out_of_distribution",
        "tiling",
        "changes",
    }
    optional |= {"um_per_pixel", "um_source", "monolayer", "framing", "second_look", "odd"}
    for name in (*values, *(name for name in checks if name not in values and name not in optional)):
        if name not in checks or name not in values or not checks[name](values[name]):
            shown = shortened(repr(values.get(name, "missing")), 60)
            raise InputError(f"{what} whose {shortened(repr(name), 60)} is {shown}: analyse the image again.")
    return dict(values)


_CELL = {
    "id": is_side,
    "box": lambda value: is_list(is_number, 4)(value) and len(value) == 4,
    "label": is_text,
    "score": is_number,
    "attributes": is_mapping(has(value=is_text, score=is_number)),
    "mask": or_none(is_mask),
    "probability": or_none(lambda value: is_number(value) and 0 <= value <= 1),
    "odd": or_none(lambda value: is_number(value) and value >= 0),
    "nucleus": or_none(has(nucleus_area=is_number, cytoplasm_area=is_number)),
    "second_look": or_none(has(label=is_text, score=is_number, detection=is_text)),
}


__all__ = [
    "LARGEST_NUMBER",
    "LONGEST_TEXT",
    "MOST_MASK_PIXELS",
    "Cell",
    "checked",
    "has",
    "is_list",
    "is_mapping",
    "is_mask",
    "is_number",
    "is_side",
    "is_text",
    "or_none",
]
