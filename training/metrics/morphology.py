"""Scores of the attributes of detected cells."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unihema.errors import InputError
from unihema.training.metrics.detection import box_iou
from unihema.training.metrics.single_cell import classification_scores


MISSING = -100


def match_cells(
    boxes: np.ndarray,
    reference_boxes: np.ndarray,
    reference_class_scores: np.ndarray,
    iou_threshold: float = 0.5,
) -> tuple[np.ndarray, np.ndarray]:
    """Which query stands for which true cell: the assignment with the largest sum of overlap and score.

    The score of the cell's own class takes part, since of several queries on a cell the best-scoring one is shown.

    Args:
        boxes (`np.ndarray`): Of all queries, xyxy `[Q, 4]`.
        reference_boxes (`np.ndarray`): Of the cells, xyxy `[m, 4]`.
        reference_class_scores (`np.ndarray`): `[Q, m]`: each query's score for the class of each cell.
        iou_threshold (`float`): Pairs that overlap less are not matched.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: Query indices and cell indices of the pairs.
    """
    from scipy.optimize import linear_sum_assignment

    overlap = box_iou(boxes, reference_boxes)
    gain = np.where(overlap >= iou_threshold, overlap + np.asarray(reference_class_scores), 0.0)
    queries, cells = linear_sum_assignment(gain, maximize=True)
    matched = overlap[queries, cells] >= iou_threshold
    return queries[matched], cells[matched]


def morphology_scores(
    predictions: Sequence[Sequence[int]],
    references: Sequence[Sequence[int]],
    schema: Mapping[str, Sequence[str]],
    cells: int | None = None,
) -> dict[str, Any]:
    """Accuracy and macro-F1 of each attribute over matched cells; missing labels are dropped.

    Args:
        predictions (`Sequence[Sequence[int]]`): `[n, attributes]`, value indices.
        references (`Sequence[Sequence[int]]`): `[n, attributes]`, -100 where missing.
        schema (`Mapping[str, Sequence[str]]`): Attribute -> values.
        cells (`int`, *optional*): Labelled cells there were, matched or not.

    Returns:
        `dict`: `accuracy` and `macro_f1`, means over attributes with labels; `per_attribute`: name -> `accuracy`,
        `macro_f1`, `cells`; `matched`, the share of labelled cells that a query was found for.

    Raises:
        ValueError: Arrays of different shapes.
    """
    shape = (-1, len(schema))
    predictions = np.asarray(predictions, dtype=int).reshape(shape)
    references = np.asarray(references, dtype=int).reshape(shape)
    if predictions.shape != references.shape:
        raise InputError(f"{len(predictions)} predicted cells for {len(references)} references.")
    per_attribute = {}
    for index, (name, values) in enumerate(schema.items()):
        scores = classification_scores(predictions[:, index], references[:, index], list(values))
        per_attribute[name] = {key: scores[key] for key in ("accuracy", "macro_f1", "cells")}
    labelled = [scores for scores in per_attribute.values() if scores["cells"]]
    return {
        "accuracy": float(np.mean([scores["accuracy"] for scores in labelled])) if labelled else None,
        "macro_f1": float(np.mean([scores["macro_f1"] for scores in labelled])) if labelled else None,
        "per_attribute": per_attribute,
        "matched": len(references) / cells if cells else None,
    }
