"""What a score means: the probability that a cell is what it is called, and below which a white cell's type is left open."""

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from unihema.processing_unihema.class_names import WHITE_CELL, cell_kind, is_untyped_white_cell


if TYPE_CHECKING:
    from .cell import Cell
    from .smear_result import SmearResult


def calibrated_probability(fitted: Mapping[str, Any], label: str, score: float) -> float:
    """The probability that a cell of a score is of its class (Platt 1999: a logistic curve of the score's own logit).

    Args:
        fitted (`Mapping`): `slope`, `shift`, and the `shifts` of classes, see `TrainingResults.calibration`.
        label (`str`): The class.
        score (`float`): Its score, 0..1.
    """
    score = min(max(score, 1e-6), 1 - 1e-6)
    logit = fitted["slope"] * math.log(score / (1 - score)) + fitted["shifts"].get(label, fitted["shift"])
    return 1 / (1 + math.exp(-min(max(logit, -30.0), 30.0)))


def set_probabilities(result: "SmearResult", calibration: Mapping[str, Mapping[str, Any]]) -> None:
    """Gives the cells of a result their probabilities, and says in its provenance what they mean.

    Args:
        result ([`SmearResult`]): Changed.
        calibration (`Mapping`): Head -> what was fitted; of one that is not there cells have scores alone.
    """
    told = {}
    fitted = calibration.get("detection")
    if fitted is not None and result.classes:
        for cell in result.cells:
            cell.probability = _probability(cell, fitted, calibration.get("single_cell"))
        told["detection"] = _meaning(fitted)
    fitted = calibration.get("single_cell")
    if fitted is not None and result.single_cell is not None:
        label, score = result.single_cell["label"], result.single_cell["score"]
        result.single_cell["probability"] = round(calibrated_probability(fitted, label, score), 4)
        told["single_cell"] = _meaning(fitted)
    if told:
        result.provenance["calibration"] = told


def _probability(cell: "Cell", of_field: Mapping[str, Any], of_crop: Mapping[str, Any] | None) -> float | None:
    """By the head that gave the cell its class: a type that the look at its crop changed is that head's."""
    look = cell.second_look
    if look is None or look["detection"] == cell.label:
        return round(calibrated_probability(of_field, cell.label, cell.score), 4)
    return None if of_crop is None else round(calibrated_probability(of_crop, cell.label, look["score"]), 4)


def is_typed_white_cell(label: str, parents: Mapping[str, str] | None = None) -> bool:
    """Whether a class is a type of white cell, which may be left open."""
    return cell_kind(label, parents) == WHITE_CELL and not is_untyped_white_cell(label)


def certainty(cell: "Cell") -> float:
    """How sure it is that a cell is of its class: its calibrated probability, or its score where there is none."""
    return cell.score if cell.probability is None else cell.probability


class TypeLevel(NamedTuple):
    """From which certainty on white cells of an image are counted by their types.

    Args:
        head (`str`): That gave the types: `detection` or `single_cell`.
        told (`Mapping`): Of its calibration, `typed_from` and the `precision` that it stands for among it.
        untyped (`str`): The class of white cells without a type.
        parents (`Mapping[str, str]`): Class -> coarser class.
    """

    head: str
    told: Mapping[str, Any]
    untyped: str
    parents: Mapping[str, str]

    @classmethod
    def of(cls, result: "SmearResult", of_crop: bool) -> "TypeLevel | None":
        """That of the checkpoint which an image was analysed with, where it has one.

        Args:
            result ([`SmearResult`]): Of the image.
            of_crop (`bool`): It is a crop that was classified as a whole.
        """
        head = "single_cell" if of_crop else "detection"
        told = result.provenance.get("calibration", {}).get(head, {})
        if told.get("typed_from") is None:
            return None
        untyped = next((name for name in result.classes if is_untyped_white_cell(name)), "WBC")
        return cls(head, told, untyped, result.class_parents)

    def types(self, labels: Iterable[str]) -> set[str]:
        """Those of the classes that are types of white cells."""
        return {label for label in set(labels) if is_typed_white_cell(label, self.parents)}

    def leaves_open(self, certain: float) -> bool:
        """Whether a type is too uncertain to be counted, see [`certainty`]."""
        return certain < self.told["typed_from"]


def left_open(opened: int, typed: int, levels: Iterable[TypeLevel]) -> list[str]:
    """The sentence of a report on white cells whose types are left open; none where no level was asked for.

    Args:
        opened (`int`): How many.
        typed (`int`): Of how many that have a type.
        levels (`Iterable[TypeLevel]`): Of their images.
    """
    if not typed:
        return []
    meanings = {
        level.head: f"from {level.told['typed_from']:.2f} on {level.told['precision']:.0%} of types were right in validation"
        for level in levels
    }
    told = "; ".join(meanings.values())
    return [f"{opened} of {typed} white cells have a type that is too uncertain, and are unidentified ({told})."]


def _meaning(fitted: Mapping[str, Any]) -> dict[str, Any]:
    return {name: fitted[name] for name in ("ece", "cells", "typed_from", "precision", "coverage") if name in fitted}


__all__ = ["TypeLevel", "calibrated_probability", "certainty", "is_typed_white_cell", "left_open", "set_probabilities"]
