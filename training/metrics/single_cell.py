"""Scores of a classification."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from unihema.errors import InputError


def classification_scores(
    predictions: Sequence[int], references: Sequence[int], class_names: Sequence[str]
) -> dict[str, Any]:
    """Accuracy and F1.

    Args:
        predictions (`Sequence[int]`): Predicted class of each image.
        references (`Sequence[int]`): True class; negative ones are left out.
        class_names (`Sequence[str]`): Names of the class indices.

    Returns:
        `dict`: `accuracy`; `macro_f1`, the mean F1 of the classes that occur in the references; `weighted_f1`;
        `per_class`: name -> `precision`, `recall`, `f1`, `cells`; `confusion`, rows true, columns predicted; `cells`.
        `None` where there is nothing to divide by.

    Raises:
        ValueError: Lists of different lengths.
    """
    predictions, references = np.asarray(predictions, dtype=int), np.asarray(references, dtype=int)
    if predictions.shape != references.shape:
        raise InputError(f"{len(predictions)} predictions for {len(references)} references.")
    labelled = references >= 0
    predictions, references = predictions[labelled], references[labelled]
    confusion = np.zeros((len(class_names), len(class_names)), dtype=int)
    np.add.at(confusion, (references, predictions), 1)
    right, true, predicted = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    figures, f1 = scores_of_counts(right, true, predicted)
    return {
        **figures,
        "per_class": {
            name: {
                "precision": float(right[index] / predicted[index]) if predicted[index] else None,
                "recall": float(right[index] / true[index]) if true[index] else None,
                "f1": float(f1[index]) if true[index] else None,
                "cells": int(true[index]),
            }
            for index, name in enumerate(class_names)
        },
        "confusion": confusion.tolist(),
        "cells": int(true.sum()),
    }


def scores_of_counts(
    right: np.ndarray, true: np.ndarray, predicted: np.ndarray
) -> tuple[dict[str, float | None], np.ndarray]:
    """Figures from how often each class was named rightly, was true and was predicted.

    Args:
        right (`np.ndarray`): `[classes]`.
        true (`np.ndarray`): `[classes]`.
        predicted (`np.ndarray`): `[classes]`.

    Returns:
        `tuple[dict[str, float | None], np.ndarray]`: `accuracy`, `macro_f1` and `weighted_f1`, `None` without cells; and
        the F1 of each class, `[classes]`.
    """
    f1 = 2 * right / np.maximum(true + predicted, 1)
    seen, cells = true > 0, true.sum()
    if not cells:
        return dict.fromkeys(("accuracy", "macro_f1", "weighted_f1")), f1
    return {
        "accuracy": float(right.sum() / cells),
        "macro_f1": float(f1[seen].mean()),
        "weighted_f1": float((f1 * true).sum() / cells),
    }, f1


def one_hot_counts(predictions: Sequence[int], references: Sequence[int], classes: int) -> np.ndarray:
    """For each cell what it adds to the counts of `scores_of_counts`: `[n, 3, classes]`, nothing without a label."""
    predictions, references = np.asarray(predictions, dtype=int), np.asarray(references, dtype=int)
    counts = np.zeros((len(references), 3, classes))
    labelled = np.flatnonzero(references >= 0)
    predicted, true = predictions[labelled], references[labelled]
    counts[labelled, 0, true] = predicted == true
    counts[labelled, 1, true] = 1
    counts[labelled, 2, predicted] = 1
    return counts
