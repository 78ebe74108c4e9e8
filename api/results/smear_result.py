"""What an analysis of one image found: cells, counts, mask, answers, and how it was made."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from unihema.errors import InputError
from unihema.files import shortened

from ..processing_unihema.class_names import (
    RED_CELL,
    UNIDENTIFIED,
    cell_kind,
    is_beside_differential,
    is_untyped_white_cell,
    is_white_cell,
)
from ..processing_unihema.masks import rle_decode, rle_encode
from .cell import (
    MOST_MASK_PIXELS,
    Cell,
    checked,
    has,
    is_list,
    is_mapping,
    is_mask,
    is_number,
    is_side,
    is_text,
    or_none,
)
from .edits import UNCLASSIFIED, of_coco, of_geojson, of_imagej, of_label_studio, of_labels
from .export import (
    cell_columns,
    cell_row,
    coco,
    geojson,
    imagej,
    in_characters,
    label_image,
    label_studio,
    supervision_detections,
)
from .monolayer import is_monolayer, judged_again, outside_monolayer, read_bands, told
from .overlay import draw_overlay
from .shapes import can_measure


if TYPE_CHECKING:
    import pandas
    import supervision


FORMAT = 1
# Words of the warning that a field has about as many cells as the model has queries.
CROWDED = "queries found a cell"
# Words of the warning that cells are not of the size that the model was trained on.
OTHER_SIZE = "for the model than those it was trained on"
# Beginning of the warnings that an image is blurred, noisy, or badly exposed.
POOR_QUALITY = "The image is "
MOST_CLASSES = 4096


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
        single_cell (`dict`, *optional*): {"label", "score"} of an image that shows one cell, with "probability" and "odd" where
            there are any, see [`Cell`].
        framing (`dict`, *optional*): How the crop of a nucleated cell was seen, beside as it was cut: `box` of the frame in
            pixels of the image (beyond it its last pixels are repeated), `nucleus` (side of its box, as a part of the crop's),
            and `colour` (how much of the way to the colours of the training both views were taken). `None`: as it is.
        answers (`list[dict]`): {"question", "answer"} for each question asked; where all cells were looked for, too, with what
            supports the answer as in [`Answer`], `cells` being their numbers.
        out_of_distribution (`dict`, *optional*): How far the image is from those the model was trained on: {"distance" to the
            most similar data set, "limit" below which 99 % of its validation images are, "nearest": its name}. Of a
            checkpoint with a reference (`unihema reference`).
        tiling (`dict`, *optional*): How the image was seen in tiles: their number `tiles`, their size `tile` (width and height)
            in pixels of the image, `scale` (pixels of the image for one of the model's input), `scale_source` (where that
            comes from) and `um_per_pixel`, measured by red cells where none was given; where there are any, `empty` tiles of bare
            glass and `unreadable` ones. `None`: it was seen whole.
        um_per_pixel (`float`, *optional*): Size of a pixel of the image in micrometres.
        um_source (`str`, *optional*): Where that comes from: given, from the file, or estimated.
        monolayer (`dict`, *optional*): How densely red cells lie in each tile, how many overlap, and focus, and which tiles lie
            outside the monolayer by which bands, see [`judged`]. Of an image that was seen whole its one tile, to know.
        warnings (`list[str]`): What a reader of the counts must know, such as a reached query cap.
        changes (`list[dict]`): What a person changed in another program (`with_geojson` and its like): number of the `cell`,
            `what` (`added`, `deleted`, `class`, `shape`, `score`, or `attribute` and its name), and the text `before` and
            `after`, where there is one.
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
    framing: dict[str, Any] | None = None
    answers: list[dict[str, Any]] = field(default_factory=list)
    out_of_distribution: dict[str, Any] | None = None
    tiling: dict[str, Any] | None = None
    um_per_pixel: float | None = None
    um_source: str | None = None
    monolayer: dict[str, Any] | None = None
    warnings: list[str] = field(default_factory=list)
    changes: list[dict[str, Any]] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def counts(self) -> dict[str, int]:
        """Cells of each class that was looked for, zero included."""
        counts = dict.fromkeys(self.classes, 0)
        for cell in self.cells:
            counts[cell.label] = counts.get(cell.label, 0) + 1
        return counts

    @property
    def monolayer_counts(self) -> dict[str, int]:
        """The counts, red cells of each class in the monolayer alone, see [`outside_monolayer`]."""
        counts = self.counts
        for cell, outside in zip(self.cells, outside_monolayer(self.monolayer, self.cells), strict=True):
            if outside and cell_kind(cell.label, self.class_parents) == RED_CELL:
                counts[cell.label] -= 1
        return counts

    def judge_monolayer(self, bands: str | Path | Mapping[str, Any] | None = None) -> None:
        """Judges anew which tiles lie in the monolayer.

        Args:
            bands (`str`, `Path` or `Mapping`, *optional*): A file of bands, or its content, see [`read_bands`]; those of the
                package when missing.

        Raises:
            InputError: The file is none of bands, or the tiles of this result were never measured.
        """
        if self.monolayer is None:
            raise InputError(f"{self.image or 'image'}: its tiles were never measured; analyse it again.")
        bands = read_bands(bands) if isinstance(bands, (str, Path)) else bands
        old = told(self.monolayer, self.cells, self.class_parents)
        self.monolayer = judged_again(self.monolayer, bands)
        new = told(self.monolayer, self.cells, self.class_parents)
        self.warnings = [text for text in self.warnings if text != old] + ([new] if new else [])

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
            "framing": self.framing,
            "answers": self.answers,
            "out_of_distribution": self.out_of_distribution,
            "tiling": self.tiling,
            "um_per_pixel": self.um_per_pixel,
            "um_source": self.um_source,
            "monolayer": self.monolayer,
            "warnings": self.warnings,
            "changes": self.changes,
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
        values = checked(values, _RESULT, "a result")
        masks = [cell["mask"] for cell in values["cells"] if isinstance(cell, dict) and cell.get("mask")]
        if sum(np.prod(mask["size"]) for mask in [*masks, values.get("mask")] if is_mask(mask)) > MOST_MASK_PIXELS:
            raise InputError(f"The masks of a result have more than {MOST_MASK_PIXELS:,} pixels together.")
        derived = {"format", "counts", "differential", "cells", "mask"}
        cells = [Cell.from_dict(cell) for cell in values["cells"]]
        # By its number a cell is found again in what other programs send back, and in the log of a review.
        twice = [number for number, times in Counter(cell.id for cell in cells).items() if times > 1]
        if twice:
            raise InputError(f"A result that has cell {twice[0]} more than once: analyse the image again.")
        return cls(
            cells=cells,
            mask=None if values.get("mask") is None else rle_decode(values["mask"]),
            **{name: value for name, value in values.items() if name not in derived},
        )

    def whole_image_cell(self, number: int) -> Cell:
        """The cell of an image that shows one, in the class of `single_cell`; its box is the image.

        Args:
            number (`int`): Its number.
        """
        told = self.single_cell or {}
        box = (0.0, 0.0, float(self.width), float(self.height))
        return Cell(number, box, told["label"], told["score"], probability=told.get("probability"), odd=told.get("odd"))

    def to_coco(self, image_id: int = 1, first_annotation_id: int = 1) -> dict[str, Any]:
        """A COCO detection dataset of this one image, with masks as run lengths, scores and attributes.

        Args:
            image_id (`int`): Id of the image.
            first_annotation_id (`int`): Id of the first cell; the others follow.
        """
        return coco(self, image_id, first_annotation_id)

    def to_geojson(self) -> dict[str, Any]:
        """A GeoJSON FeatureCollection that QuPath opens: cells as detections, outlined where they have masks, with classes and
        measurements; the mask of the image as an annotation."""
        return geojson(self)

    def to_labels(self) -> np.ndarray:
        """The cells as an image of instances: uint16 [h, w] (uint32 above 65 535), the number of the cell whose pixel it is, 0
        for none. A cell without a mask fills its box; where cells overlap, the pixel is of the best score.

        Raises:
            RequestError: The image is too large.
        """
        return label_image(self)

    def to_imagej(self) -> bytes:
        """The cells as a zip file of ImageJ's ROIs, outlined where they have masks. Needs the extra `imagej`.

        Raises:
            PackageMissingError: roifile is not installed.
            RequestError: The image is larger than ImageJ's coordinates.
        """
        return imagej(self)

    def to_label_studio(self, image: str | None = None) -> list[dict[str, Any]]:
        """The cells as predictions of a task of Label Studio, as its import takes them: rectangles, or polygons where a mask is
        of one part without holes. [`label_studio_config`] makes the labelling configuration of the project.

        Args:
            image (`str`, *optional*): URL at which Label Studio opens the image, ending with its name; its path below
                `LOCAL_FILES_DOCUMENT_ROOT` when missing.
        """
        return label_studio(self, image)

    def to_supervision(self) -> "supervision.Detections":
        """The cells for the package supervision, masks too where all have one. Needs the extra `supervision`.

        Raises:
            PackageMissingError: supervision is not installed.
            RequestError: The masks, each as large as the image, would take too much memory.
        """
        return supervision_detections(self)

    def with_geojson(self, source: "str | Path | dict[str, Any] | list[Any]") -> "SmearResult":
        """This result with the cells of a GeoJSON file, as QuPath exports it after a person changed them.

        A cell that is as `to_geojson` wrote it stays as it is, to the last bit. What is new, gone or different is in `changes`
        of the new result; this one is left as it is. An outline becomes the pixels whose centre lies inside; a rectangle that
        a person drew is a box without a mask. Annotations without a class are passed over.

        Args:
            source (`str`, `Path`, `dict` or `list`): The file, or its content.

        Raises:
            InputError: It is no such file; the message names file and entry.
        """
        return of_geojson(self, source)

    def with_coco(self, source: "str | Path | dict[str, Any]") -> "SmearResult":
        """This result with the cells that a COCO file has of its image; see `with_geojson`.

        Masks may be run lengths, compressed or not, or polygons. Of several images that of the result's name is read. Crowds
        are passed over.

        Args:
            source (`str`, `Path` or `dict`): The file, or its content.

        Raises:
            InputError: It is no such file; the message names file and entry.
        """
        return of_coco(self, source)

    def with_label_studio(self, source: "str | Path | list[Any]") -> "SmearResult":
        """This result with the cells of Label Studio's JSON; see `with_geojson`.

        Of its tasks that of the result's image is read, and of that the last annotation that was submitted. Cells are rectangles
        or polygons; a turned rectangle is the box around it. A region with the id that `to_label_studio` gave it, or a rectangle
        where a cell was, is that cell.

        Args:
            source (`str`, `Path` or `list`): The file, or its content.

        Raises:
            InputError: It is no such file; the message names file and entry.
        """
        return of_label_studio(self, source)

    def with_labels(self, source: "str | Path | np.ndarray", label: str = UNCLASSIFIED) -> "SmearResult":
        """This result with the cells of an image of instances; see `with_geojson`.

        Args:
            source (`str`, `Path` or `np.ndarray`): PNG or TIFF, or whole numbers [h, w]: the number of the cell whose pixel it
                is, 0 for none. Other numbers are new cells.
            label (`str`): Class of new cells, which such an image does not say.

        Raises:
            InputError: It cannot be read, or is not of the image's size.
        """
        return of_labels(self, source, label)

    def with_imagej(self, source: "str | Path") -> "SmearResult":
        """This result with the cells of a zip file of ImageJ's ROIs; see `with_geojson`. Needs the extra `imagej`.

        The name of a ROI is the number of a cell and its class, as in `3 neutrophil`; of a new one its class alone.

        Args:
            source (`str` or `Path`): The file.

        Raises:
            InputError: It is no such file; the message names file and entry.
            PackageMissingError: roifile is not installed.
        """
        return of_imagej(self, source)

    def to_dataframe(self) -> "pandas.DataFrame":
        """A row a cell: box, centre and size in pixels, class, score, attributes (the columns of `cells.csv`); of cells with
        masks their shapes too, where scikit-image is installed (the extra `shapes`)."""
        import pandas

        attributes = list(dict.fromkeys(name for cell in self.cells for name in cell.attributes))
        shapes = can_measure() and any(cell.mask is not None for cell in self.cells)
        nuclei = any(cell.nucleus is not None for cell in self.cells)
        groups = shapes, nuclei, any(cell.second_look is not None for cell in self.cells)
        rows = [in_characters(cell_row(self, cell, attributes, *groups)) for cell in self.cells]
        return pandas.DataFrame(rows, columns=cell_columns(attributes, *groups))

    def overlay(self, image: Image.Image) -> Image.Image:
        """The image with boxes, classes, scores and mask drawn on it, and a legend with the counts beside it.

        Args:
            image (`PIL.Image.Image`): The analysed image, at any size; it is not changed.

        Returns:
            `PIL.Image.Image`: RGB, the image at most 2048 pixels on its longer side.
        """
        return draw_overlay(self, image)


def _is_single_cell(value: Any) -> bool:
    more = {name: is_number for name in ("probability", "odd") if isinstance(value, dict) and name in value}
    return has(label=is_text, score=is_number, **more)(value)


def _is_answer(value: Any) -> bool:
    known: dict[str, Callable[[Any], bool]] = {"question": is_text, "answer": is_text}
    optional: dict[str, Callable[[Any], bool]] = dict.fromkeys(("source", "text", "disagreement", "note"), is_text)
    optional |= {"cells": is_list(is_side), "counts": is_mapping(is_number), "single_cell": _is_single_cell}
    optional |= {"attributes": is_mapping(has(value=is_text, score=is_number))}
    known |= {name: check for name, check in optional.items() if isinstance(value, dict) and name in value}
    return has(**known)(value)


def _is_tiling(value: Any) -> bool:
    known = {"tiles": is_side, "tile": is_list(is_side, 2), "scale": is_number, "scale_source": is_text}
    # Of a checkpoint that does not say how large its cells are there is no size of a pixel.
    optional = {"um_per_pixel": is_number, "empty": is_side, "unreadable": is_side, "white_cells": is_side}
    optional |= dict.fromkeys(("seen", "with_nuclei"), is_number)
    known |= {name: check for name, check in optional.items() if isinstance(value, dict) and name in value}
    return has(**known)(value)


_RESULT = {
    "format": is_side,
    "image": or_none(is_text),
    "width": is_side,
    "height": is_side,
    "counts": is_mapping(is_number),
    "differential": is_mapping(is_number),
    "classes": is_list(is_text, MOST_CLASSES),
    "class_parents": is_mapping(is_text),
    "cells": lambda value: isinstance(value, list),
    "mask": or_none(is_mask),
    "mask_label": or_none(is_text),
    "single_cell": or_none(_is_single_cell),
    "framing": or_none(has(box=is_list(is_number, 4), nucleus=is_number, colour=is_number)),
    "answers": is_list(_is_answer),
    "out_of_distribution": or_none(has(distance=is_number, limit=is_number, nearest=is_text)),
    "tiling": or_none(_is_tiling),
    "um_per_pixel": or_none(is_number),
    "um_source": or_none(is_text),
    "monolayer": or_none(is_monolayer),
    "warnings": is_list(is_text),
    "changes": is_list(has(cell=is_side, what=is_text, before=or_none(is_text), after=or_none(is_text))),
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
