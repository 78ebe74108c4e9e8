"""Overlap of masks."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from unihema.errors import InputError


def mask_counts(prediction: np.ndarray, reference: np.ndarray) -> tuple[int, int, int]:
    """Pixels in both masks, in the prediction, and in the reference; nonzero is cell.

    Raises:
        ValueError: Masks of different shapes.
    """
    prediction, reference = np.asarray(prediction), np.asarray(reference)
    if prediction.shape != reference.shape:
        raise InputError(f"Masks of different shapes: predicted {prediction.shape}, true {reference.shape}.")
    prediction, reference = prediction > 0, reference > 0
    return int((prediction & reference).sum()), int(prediction.sum()), int(reference.sum())


def dice_scores(counts: Iterable[tuple[int, int, int]]) -> dict[str, Any]:
    """Dice and intersection over union of the masks of a data set.

    Args:
        counts (`Iterable[tuple[int, int, int]]`): `mask_counts` of each image.

    Returns:
        `dict`: `dice` and `iou`, means over images (1 where both masks are empty); `dice_pooled` and `iou_pooled`, over
        all pixels together; `images`. `None` without images.
    """
    counts = np.array(list(counts), dtype=np.int64).reshape(-1, 3)
    return {**weighted_dice(counts, np.ones(len(counts))), "images": len(counts)}


def weighted_dice(counts: np.ndarray, weights: np.ndarray) -> dict[str, float | None]:
    """The figures of `dice_scores` where each image counts as often as its weight says.

    Args:
        counts (`np.ndarray`): `mask_counts` of each image, `[n, 3]`.
        weights (`np.ndarray`): `[n]`.
    """
    if not weights.sum():
        return dict.fromkeys(("dice", "iou", "dice_pooled", "iou_pooled"))
    both, total = counts[:, 0], counts[:, 1] + counts[:, 2]
    dice = np.where(total > 0, 2 * both / np.maximum(total, 1), 1.0)
    iou = np.where(total > 0, both / np.maximum(total - both, 1), 1.0)
    all_both, all_total = float(both @ weights), float(total @ weights)
    return {
        "dice": float(np.average(dice, weights=weights)),
        "iou": float(np.average(iou, weights=weights)),
        "dice_pooled": 2 * all_both / all_total if all_total else 1.0,
        "iou_pooled": all_both / (all_total - all_both) if all_total else 1.0,
    }
