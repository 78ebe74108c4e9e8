"""A second look at cells of a field in their crops. Nucleated cells are typed from them as well, and the two opinions are put
together; red cells are looked at for parasites, which detection alone does not find."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from unihema.processing_unihema.class_names import (
    INFECTED,
    NUCLEATED_RED_CELL,
    RED_CELL,
    UNINFECTED,
    WHITE_CELL,
    cell_kind,
    is_infected,
    is_untyped_white_cell,
    usual_name,
)
from unihema.results.cell import Cell
from unihema.results.crop_framing import framed
from unihema.slides import RegionSource


# Side of a crop, in the longer sides of the cell's box: how the crops of fields are cut in training.
CROP = 2.0
# Crops that are in memory at once.
CROPS_AT_ONCE = 32
# A white cell without a type gets one where it is more probable than all others together.
SURE = 0.5
_LEAST = 1e-4


class Rule(NamedTuple):
    """How the opinion of detection and that of the crop are put together.

    Args:
        weight (`float`): Of the crop, 0 to 1: a mean of logarithms.
        detection_temperature, crop_temperature (`float`): By which the logits of each are divided first.

    The values are those of a checkpoint that states none: a type that detection names counts for more than that of the crop,
    and a white cell without one gets the crop's (fitted on WBC5 and Bio-Net, docs/results/abroad.md).
    """

    weight: float = 0.3
    detection_temperature: float = 0.25
    crop_temperature: float = 1.0

    def probabilities(self, detection: np.ndarray, crop: np.ndarray) -> np.ndarray:
        """How probable each type is.

        Args:
            detection (`np.ndarray`): Logits of detection `[n, types]`, see [`detection_logits`].
            crop (`np.ndarray`): Logits, or logarithms of the probabilities, of the crops `[n, types]`.

        Returns:
            `np.ndarray`: `[n, types]`; rows sum to 1.
        """
        first = _log_softmax(detection / self.detection_temperature)
        second = _log_softmax(crop / self.crop_temperature)
        return np.exp(_log_softmax((1 - self.weight) * first + self.weight * second))


def cell_types(labels: Sequence[str], parents: Mapping[str, str] | None) -> list[str]:
    """The single-cell labels that a nucleated cell of a field may have: kinds of white cells and nucleated red cells.

    Args:
        labels (`Sequence[str]`): Classes of the single-cell head.
        parents (`Mapping[str, str]`, *optional*): Class -> coarser class.
    """
    kinds = (WHITE_CELL, NUCLEATED_RED_CELL)
    return [name for name in labels if cell_kind(name, parents) in kinds and not is_untyped_white_cell(name)]


def is_looked_at(cell: Cell, parents: Mapping[str, str] | None) -> bool:
    """Whether a cell is a white cell or a nucleated red cell."""
    return cell_kind(cell.label, parents) in (WHITE_CELL, NUCLEATED_RED_CELL)


def detection_logits(cells: Sequence[Cell], types: Sequence[str]) -> np.ndarray:
    """What detection says of the types of cells: the logit of the score at the type it names, 0 elsewhere; `[n, types]`."""
    number = {usual_name(name): index for index, name in enumerate(types)}
    logits = np.zeros((len(cells), len(types)))
    for row, cell in zip(logits, cells, strict=True):
        if (index := number.get(usual_name(cell.label))) is not None:
            score = min(max(cell.score, _LEAST), 1 - _LEAST)
            # Of a cell that is there: a low score says that it is unsure, never that it is of another type.
            row[index] = max(math.log(score / (1 - score)), 0.0) + math.log(2)
    return logits


def crop_of(source: RegionSource, cell: Cell) -> Image.Image:
    """The crop of a cell at the image's own resolution.

    Args:
        source ([`RegionSource`]): The image.
        cell ([`Cell`]): A cell, in its pixels.
    """
    x, y = cell.center
    side = max(8, round(CROP * max(cell.box[2] - cell.box[0], cell.box[3] - cell.box[1])))
    left, top = round(x - side / 2), round(y - side / 2)
    inside = max(left, 0), max(top, 0), min(left + side, source.width), min(top + side, source.height)
    part = source.read_region(inside, None, strict=False)
    # Beyond the image its last pixels are repeated, as in training.
    centre = (
        (x - inside[0]) * part.width / (inside[2] - inside[0]),
        (y - inside[1]) * part.height / (inside[3] - inside[1]),
    )
    return framed(part, centre, side * part.width / (inside[2] - inside[0]))[0]


def look_again(
    source: RegionSource,
    cells: Sequence[Cell],
    classes: Sequence[str],
    parents: Mapping[str, str] | None,
    types: Sequence[str],
    rule: Rule,
    classify: Callable[[list[Image.Image]], np.ndarray],
    on_crops: Callable[[int, int], None] | None = None,
) -> list[Cell]:
    """Types the nucleated cells of an image from their crops, too.

    Args:
        source ([`RegionSource`]): The image.
        cells (`Sequence[Cell]`): Its cells.
        classes (`Sequence[str]`): What a cell of it may be called.
        parents (`Mapping[str, str]`, *optional*): Class -> coarser class.
        types (`Sequence[str]`): Of [`cell_types`].
        rule ([`Rule`]): Puts the opinions together.
        classify (`Callable`): From crops to the logarithms of their probabilities `[n, types]`.
        on_crops (`Callable`, *optional*): Called with the number of crops that have been seen, and of all.

    Returns:
        `list[Cell]`: The cells; those that were looked at have `second_look`, and the label of both opinions together, and no
        probability where that is another than detection's.
    """
    called = {usual_name(name): name for name in classes}
    found = list(cells)
    for numbers in _groups([number for number, cell in enumerate(cells) if is_looked_at(cell, parents)], on_crops):
        looked_at = [cells[number] for number in numbers]
        of_crops = classify([crop_of(source, cell) for cell in looked_at])
        together = rule.probabilities(detection_logits(looked_at, types), of_crops)
        for number, cell, of_crop, of_both in zip(numbers, looked_at, of_crops, together, strict=True):
            second, best = int(np.argmax(of_crop)), int(np.argmax(of_both))
            told: dict[str, Any] = {"label": types[second], "score": float(np.exp(_log_softmax(of_crop)[second]))}
            label = called.get(usual_name(types[best]))
            if label is None or (is_untyped_white_cell(cell.label) and of_both[best] < SURE):
                label = cell.label
            # The probability is of what detection called it.
            probability = cell.probability if label == cell.label else None
            found[number] = replace(
                cell, label=label, probability=probability, second_look={**told, "detection": cell.label}
            )
    return found


def is_looked_at_for_parasites(cell: Cell, parents: Mapping[str, str] | None) -> bool:
    """Whether a cell is a red cell that is not called infected yet."""
    return cell_kind(cell.label, parents) == RED_CELL and not is_infected(cell.label, parents)


def look_for_parasites(
    source: RegionSource,
    cells: Sequence[Cell],
    parents: Mapping[str, str] | None,
    threshold: float,
    classify: Callable[[list[Image.Image]], np.ndarray],
    on_crops: Callable[[int, int], None] | None = None,
) -> list[Cell]:
    """Looks at the crops of the red cells of an image for parasites.

    Args:
        source ([`RegionSource`]): The image.
        cells (`Sequence[Cell]`): Its cells.
        parents (`Mapping[str, str]`, *optional*): Class -> coarser class.
        threshold (`float`): Probability from which a cell is called infected.
        classify (`Callable`): From crops to the probabilities that the cells are infected `[n]`.
        on_crops (`Callable`, *optional*): Called with the number of crops that have been seen, and of all.

    Returns:
        `list[Cell]`: The cells; those that were looked at have `second_look`, and infected ones the label and no probability.
    """
    found = list(cells)
    looked_at = [number for number, cell in enumerate(cells) if is_looked_at_for_parasites(cell, parents)]
    for numbers in _groups(looked_at, on_crops):
        infected = classify([crop_of(source, cells[number]) for number in numbers])
        for number, share in zip(numbers, infected.tolist(), strict=True):
            cell, called = cells[number], share >= threshold
            told = {
                "label": INFECTED if called else UNINFECTED,
                "score": share if called else 1 - share,
                "detection": cell.label,
            }
            changed = {"label": INFECTED, "probability": None} if called else {}
            found[number] = replace(cell, **changed, second_look=told)
    return found


def fit_rule(detection: np.ndarray, crop: np.ndarray, true: np.ndarray) -> Rule:
    """The rule under which the true types of cells are most probable.

    Args:
        detection, crop (`np.ndarray`): Logits `[n, types]` of cells that neither was trained on.
        true (`np.ndarray`): Numbers of their types `[n]`.
    """
    temperatures = (0.25, 0.5, 1.0, 2.0, 4.0)
    rules = [
        Rule(weight, first, second)
        for weight in np.linspace(0, 1, 11).round(1).tolist()
        for first in temperatures
        for second in temperatures
    ]
    rows = np.arange(len(true))

    def loss(rule: Rule) -> float:
        return -float(np.log(rule.probabilities(detection, crop)[rows, true] + 1e-9).mean())

    return min(rules, key=loss)


def _groups(numbers: Sequence[int], on_crops: Callable[[int, int], None] | None) -> Iterator[Sequence[int]]:
    for start in range(0, len(numbers), CROPS_AT_ONCE):
        group = numbers[start : start + CROPS_AT_ONCE]
        yield group
        if on_crops is not None:
            on_crops(start + len(group), len(numbers))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


__all__ = [
    "Rule",
    "cell_types",
    "crop_of",
    "detection_logits",
    "fit_rule",
    "is_looked_at",
    "is_looked_at_for_parasites",
    "look_again",
    "look_for_parasites",
]
