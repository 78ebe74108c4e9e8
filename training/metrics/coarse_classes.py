"""Cells under the coarser and finer names of their class, where a data set annotates both."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from unihema.training.metrics.detection import annotated_classes, boxes_of


def with_coarser_truth(reference: Mapping[str, Any], ancestors: np.ndarray | None) -> dict[str, Any]:
    """A reference in which a neutrophil is a WBC as well, and a cell labelled WBC may be called neutrophil.

    Args:
        reference (`Mapping[str, Any]`): See `mean_average_precision`; `exact_classes` are numbers of those whose cells are of
            no annotated finer class.
        ancestors (`np.ndarray`, *optional*): bool `[C, C]`, `[i, j]` where class j is coarser than class i.

    Returns:
        `dict[str, Any]`: With each cell once more for each annotated coarser class, and as a crowd, on which predictions
        do not count, for each annotated finer one that it may be.
    """
    labels = np.asarray(reference["labels"], dtype=int)
    if ancestors is None or not len(labels):
        return dict(reference)
    boxes = boxes_of(reference)
    crowd = reference.get("iscrowd")
    crowd = np.zeros(len(labels), dtype=int) if crowd is None else np.asarray(crowd, dtype=int)
    allowed = annotated_classes(reference, len(ancestors))
    cell, coarser = np.nonzero(ancestors[labels] & allowed)
    inexact = ~np.isin(labels, reference.get("exact_classes", ()))
    open_cell, finer = np.nonzero(ancestors.T[labels] & allowed & inexact[:, None])
    masks = reference.get("masks")
    again = {} if masks is None else {"masks": [*masks, *(masks[number] for number in (*cell, *open_cell))]}
    return {
        **reference,
        **again,
        "boxes": np.concatenate([boxes, boxes[cell], boxes[open_cell]]),
        "labels": np.concatenate([labels, coarser, finer]),
        "iscrowd": np.concatenate([crowd, crowd[cell], np.ones(len(finer), dtype=int)]).tolist(),
    }


def with_coarser_names(
    cells: Mapping[str, np.ndarray], reference: Mapping[str, Any], ancestors: np.ndarray | None
) -> dict[str, np.ndarray]:
    """Predictions with one name each, once more for each coarser class that the image's data set annotates.

    Args:
        cells (`Mapping[str, np.ndarray]`): `boxes`, `scores`, `labels` and more, best first.
        reference (`Mapping[str, Any]`): The image's truth.
        ancestors (`np.ndarray`, *optional*): See `with_coarser_truth`.

    Returns:
        `dict[str, np.ndarray]`: Best first.
    """
    if ancestors is None or not len(cells["labels"]):
        return dict(cells)
    cell, coarser = np.nonzero(ancestors[cells["labels"]] & annotated_classes(reference, len(ancestors)))
    widened = {name: np.concatenate([values, values[cell]]) for name, values in cells.items()}
    widened["labels"] = np.concatenate([cells["labels"], coarser])
    order = np.argsort(-widened["scores"], kind="stable")
    return {name: values[order] for name, values in widened.items()}
