"""What an analysis of one image found: cells, counts, mask, answers, and how it was made."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from unihema.errors import InputError
from unihema.files import shortened

from ..processing_unihema.class_names import (
    UNIDENTIFIED,
    is_beside_differential,
    is_untyped_white_cell,
    is_white_cell,
)
from .export import cell_columns, cell_row, coco, geojson, rle_decode, rle_encode
from .overlay import draw_overlay


if TYPE_CHECKING:
    import pandas


FORMAT = 1
# Words of the warning that a field has about as many cells as the model has queries.
CROWDED = "queries found a cell"
# Words of the warning that cells are not of the size that the model was trained on.
OTHER_SIZE = "for the model than those it was trained on"
# Of a stored result: texts (of an image's path, for one), pixels along a side, pixels of all masks together.
LONGEST_TEXT, LARGEST_NUMBER, MOST_MASK_PIXELS = 8192, 10**9, 1 << 29
MOST_CLASSES = 4096


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

    Raises:
        ValueError: The box is upside down, or the mask has not the box's size.
    """

    id: int
    box: tuple[float, float, float, float]
    label: str
    score: float
    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)
    mask: np.ndarray | None = None

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

    def to_dict(self) -> dict[str, Any]:
        """The cell as JSON types; the mask as a run-length code."""
        out = {"id": self.id, "box": list(self.box), "label": self.label, "score": self.score}
        if self.attributes:
            out["attributes"] = self.attributes
        if self.mask is not None:
            out["mask"] = rle_encode(self.mask)
        return out

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Cell":
        """The cell that `to_dict` wrote."""
        values = _checked(values, _CELL, "a cell")
        if values.get("mask") is not None:
            values["mask"] = rle_decode(values["mask"]).astype(bool)
        return cls(**values)


@dataclass
class SmearResult:
    """What was found in one image. All coordinates are pixels of the image as it stands in its file, upright.

    Args:
        width (`int`): Width of the image in pixels.
        height (`int`): Height of the image in pixels.
        cells (`list[Cell]`): The cells, best score first.
        classes (`list[str]`): Classes that were looked for, found or not.
        class_parents (`dict[str, str]`): Class -> the coarser class that it is a kind of, where the checkpoint says so.
        image (`str`, *optional*): Path of the image.
        mask (`np.ndarray`, *optional*): uint8 [h, w] over the whole image, 1 on what `mask_label` names. Smaller than
            the image where that was reduced on opening.
        mask_label (`str`, *optional*): What the mask shows.
        single_cell (`dict`, *optional*): {"label", "score"} of an image that shows one cell.
        answers (`list[dict]`): {"question", "answer"} for each question asked.
        out_of_distribution (`dict`, *optional*): How far the image is from those the model was trained on: {"distance" to the
            most similar data set, "limit" below which 99 % of its validation images are, "nearest": its name}. Of a
            checkpoint with a reference (`unihema reference`).
        tiling (`dict`, *optional*): How the image was seen in tiles: their number `tiles`, their size `tile` (width and height)
            in pixels of the image, `scale` (pixels of the image for one of the model's input), `scale_source` (where that
            comes from) and `um_per_pixel`, measured by red cells where none was given; where there are any, `empty` tiles of bare
            glass and `unreadable` ones. `None`: it was seen whole.
        um_per_pixel (`float`, *optional*): Size of a pixel of the image in micrometres.
        um_source (`str`, *optional*): Where that comes from: given, from the file, or estimated.
        warnings (`list[str]`): What a reader of the counts must know, such as a reached query cap.
        provenance (`dict`): Versions, checkpoint, SHA-256 of the weights, thresholds and settings.
    """

    width: int
    height: int
    cells: list[Cell] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    class_parents: dict[str, str] = field(default_factory=dict)
    image: str | None = None
    mask: np.ndarray | None = None
    mask_label: str | None = None
    single_cell: dict[str, Any] | None = None
    answers: list[dict[str, str]] = field(default_factory=list)
    out_of_distribution: dict[str, Any] | None = None
    tiling: dict[str, Any] | None = None
    um_per_pixel: float | None = None
    um_source: str | None = None
    warnings: list[str] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def counts(self) -> dict[str, int]:
        """Cells of each class that was looked for, zero included."""
        counts = dict.fromkeys(self.classes, 0)
        for cell in self.cells:
            counts[cell.label] = counts.get(cell.label, 0) + 1
        return counts

    @property
    def differential(self) -> dict[str, float]:
        """Percent of each white-cell class among all white cells, `unidentified` those without a type; see
        [`differential`]."""
        return differential(self.counts, self.class_parents)

    def percent_of_white_cells(self, label: str) -> float | None:
        """Percent of a class among all white cells; `None` for classes of other cells, and where no white cell was found."""
        return _percent_of_white_cells(self.counts, self.class_parents).get(label)

    def place_in_differential(self, label: str) -> str | None:
        """What the differential count does with a class: `counted`, `unidentified` (white cells without a type), `beside`
        (reported beside it: nucleated red cells, smudge cells, megakaryocytes), or `None` for all others."""
        if is_untyped_white_cell(label):
            return UNIDENTIFIED
        if is_white_cell(label, self.class_parents):
            return "counted"
        return "beside" if is_beside_differential(label, self.class_parents) else None

    def to_dict(self, with_cells: bool = True) -> dict[str, Any]:
        """Everything as JSON types, with the counts beside it.

        Args:
            with_cells (`bool`): Leave the list of cells empty without it: that of a slide is large.
        """
        return {
            "format": FORMAT,
            "image": self.image,
            "width": self.width,
            "height": self.height,
            "counts": self.counts,
            "differential": self.differential,
            "classes": self.classes,
            "class_parents": self.class_parents,
            "cells": [cell.to_dict() for cell in self.cells] if with_cells else [],
            "mask": None if self.mask is None else rle_encode(self.mask),
            "mask_label": self.mask_label,
            "single_cell": self.single_cell,
            "answers": self.answers,
            "out_of_distribution": self.out_of_distribution,
            "tiling": self.tiling,
            "um_per_pixel": self.um_per_pixel,
            "um_source": self.um_source,
            "warnings": self.warnings,
            "provenance": self.provenance,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "SmearResult":
        """The result that `to_dict` wrote.

        Raises:
            ValueError: Written in another format, or changed since to what it cannot say.
        """
        found = values.get("format") if isinstance(values, dict) else type(values).__name__
        if found != FORMAT or isinstance(found, bool):
            raise InputError(
                f"Not a UniHema result of format {FORMAT} (found {shortened(repr(found), 40)}); analyse the image again."
            )
        # Its name in older results.
        if "familiarity" in values:
            values = {("out_of_distribution" if name == "familiarity" else name): of for name, of in values.items()}
        values = _checked(values, _RESULT, "a result")
        masks = [cell["mask"] for cell in values["cells"] if isinstance(cell, dict) and cell.get("mask")]
        if sum(np.prod(mask["size"]) for mask in [*masks, values["mask"]] if _is_mask(mask)) > MOST_MASK_PIXELS:
            raise InputError(f"The masks of a result have more than {MOST_MASK_PIXELS:,} pixels together.")
        derived = {"format", "counts", "differential", "cells", "mask"}
        return cls(
            cells=[Cell.from_dict(cell) for cell in values["cells"]],
            mask=None if values.get("mask") is None else rle_decode(values["mask"]),
            **{name: value for name, value in values.items() if name not in derived},
        )

    def to_coco(self, image_id: int = 1, first_annotation_id: int = 1) -> dict[str, Any]:
        """A COCO detection dataset of this one image, with scores and attributes.

        Args:
            image_id (`int`): Id of the image.
            first_annotation_id (`int`): Id of the first cell; the others follow.
        """
        return coco(self, image_id, first_annotation_id)

    def to_geojson(self) -> dict[str, Any]:
        """A GeoJSON FeatureCollection that QuPath opens: cells as detections, the mask as an annotation."""
        return geojson(self)

    def to_dataframe(self) -> "pandas.DataFrame":
        """A row a cell: box, centre and size in pixels, class, score, attributes (the columns of `cells.csv`)."""
        import pandas

        attributes = list(dict.fromkeys(name for cell in self.cells for name in cell.attributes))
        rows = [cell_row(self, cell, attributes) for cell in self.cells]
        return pandas.DataFrame(rows, columns=cell_columns(attributes))

    def overlay(self, image: Image.Image) -> Image.Image:
        """The image with boxes, classes, scores and mask drawn on it, and a legend with the counts beside it.

        Args:
            image (`PIL.Image.Image`): The analysed image, at any size; it is not changed.

        Returns:
            `PIL.Image.Image`: RGB, the image at most 2048 pixels on its longer side.
        """
        return draw_overlay(self, image)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= LONGEST_TEXT


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= LARGEST_NUMBER


def _is_side(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LARGEST_NUMBER


def _is_mask(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"size", "counts"}
        and isinstance(value["size"], list)
        and len(value["size"]) == 2
        and all(isinstance(side, int) and 0 <= side <= LARGEST_NUMBER for side in value["size"])
        and isinstance(value["counts"], list)
        and all(isinstance(count, int) and 0 <= count <= LARGEST_NUMBER**2 for count in value["counts"])
    )


def _or_none(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


def _is_list(check: Callable[[Any], bool], most: int = LARGEST_NUMBER) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and len(value) <= most and all(map(check, value))


def _has(**checks: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Checks a dictionary with these keys."""
    return lambda value: (
        isinstance(value, dict)
        and value.keys() == checks.keys()
        and all(check(value[name]) for name, check in checks.items())
    )


def _is_mapping(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(_is_text, value)) and all(map(check, value.values()))


def _is_tiling(value: Any) -> bool:
    known = {"tiles": _is_side, "tile": _is_list(_is_side, 2), "scale": _is_number, "scale_source": _is_text}
    # Of a checkpoint that does not say how large its cells are there is no size of a pixel.
    optional = {"um_per_pixel": _is_number, "empty": _is_side, "unreadable": _is_side}
    known |= {name: check for name, check in optional.items() if isinstance(value, dict) and name in value}
    return _has(**known)(value)


def _checked(values: Any, checks: Mapping[str, Callable[[Any], bool]], what: str) -> dict[str, Any]:
    """The fields of something that was stored.

    Raises:
        InputError: A field is missing, unknown, or of a value that is never written.
    """
    if not isinstance(values, dict):
        raise InputError(f"{what} is stored as a dictionary, not as {shortened(repr(values), 60)}.")
    # Older results lack some of these.
    optional = {"attributes", "mask", "class_parents", "out_of_distribution", "tiling", "um_per_pixel", "um_source"}
    for name in (*values, *(name for name in checks if name not in values and name not in optional)):
        if name not in checks or name not in values or not checks[name](values[name]):
            shown = shortened(repr(values.get(name, "missing")), 60)
            raise InputError(f"{what} whose {shortened(repr(name), 60)} is {shown}: analyse the image again.")
    return dict(values)


_CELL = {
    "id": _is_side,
    "box": lambda value: _is_list(_is_number, 4)(value) and len(value) == 4,
    "label": _is_text,
    "score": _is_number,
    "attributes": _is_mapping(_has(value=_is_text, score=_is_number)),
    "mask": _or_none(_is_mask),
}
_RESULT = {
    "format": _is_side,
    "image": _or_none(_is_text),
    "width": _is_side,
    "height": _is_side,
    "counts": _is_mapping(_is_number),
    "differential": _is_mapping(_is_number),
    "classes": _is_list(_is_text, MOST_CLASSES),
    "class_parents": _is_mapping(_is_text),
    "cells": lambda value: isinstance(value, list),
    "mask": _or_none(_is_mask),
    "mask_label": _or_none(_is_text),
    "single_cell": _or_none(_has(label=_is_text, score=_is_number)),
    "answers": _is_list(_has(question=_is_text, answer=_is_text)),
    "out_of_distribution": _or_none(_has(distance=_is_number, limit=_is_number, nearest=_is_text)),
    "tiling": _or_none(_is_tiling),
    "um_per_pixel": _or_none(_is_number),
    "um_source": _or_none(_is_text),
    "warnings": _is_list(_is_text),
    "provenance": lambda value: isinstance(value, dict),
}


def differential(counts: Mapping[str, int], parents: Mapping[str, str] | None = None) -> dict[str, float]:
    """Percent of each white-cell class among all nucleated white cells.

    Nucleated red cells, smudge cells and megakaryocytes are not in it. White cells without a type are, as `unidentified`.

    Args:
        counts (`Mapping[str, int]`): Class name -> cells; names in any spelling.
        parents (`Mapping[str, str]`, *optional*): Class -> coarser class, where the checkpoint says so; see `cell_kind`.

    Returns:
        `dict[str, float]`: The white-cell classes that were looked for; empty when no white cell was found.
    """
    found: dict[str, float] = {}
    for label, percent in _percent_of_white_cells(counts, parents).items():
        name = UNIDENTIFIED if is_untyped_white_cell(label) else label
        found[name] = found.get(name, 0.0) + percent
    return found


def _percent_of_white_cells(counts: Mapping[str, int], parents: Mapping[str, str] | None) -> dict[str, float]:
    white = {label: count for label, count in counts.items() if is_white_cell(label, parents)}
    total = sum(white.values())
    return {label: 100 * count / total for label, count in white.items()} if total else {}


__all__ = ["Cell", "SmearResult", "differential"]
