"""Scores of a classification."""

from collections.abc import Sequence
from typing import Any

import numpy as np


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
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references.")
    labelled = references >= 0
    predictions, references = predictions[labelled], references[labelled]
    confusion = np.zeros((len(class_names), len(class_names)), dtype=int)
    np.add.at(confusion, (references, predictions), 1)
    right, true, predicted = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    f1 = 2 * right / np.maximum(true + predicted, 1)
    seen = true > 0
    return {
        "accuracy": float(right.sum() / true.sum()) if seen.any() else None,
        "macro_f1": float(f1[seen].mean()) if seen.any() else None,
        "weighted_f1": float((f1 * true).sum() / true.sum()) if seen.any() else None,
        "per_class": {
            name: {
                "precision": float(right[index] / predicted[index]) if predicted[index] else None,
                "recall": float(right[index] / true[index]) if true[index] else None,
                "f1": float(f1[index]) if seen[index] else None,
                "cells": int(true[index]),
            }
            for index, name in enumerate(class_names)
        },
        "confusion": confusion.tolist(),
        "cells": int(true.sum()),
    }
