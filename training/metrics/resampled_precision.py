"""Average precision of many resamples of the same images, matched once."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unihema.training.metrics.detection import MAX_DETECTIONS, annotated_classes, box_iou, boxes_of, share_inside


IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALL_THRESHOLDS = np.linspace(0.0, 1.0, 101)


class MatchedDetections:
    """Predictions of a data set, each matched to a cell of its image or not, at COCO's ten overlaps.

    Which cell a prediction stands for is decided within its image, so a resample of images only changes how often each
    prediction counts: the average precision of every resample is that of `mean_average_precision` on the same images,
    at a small part of its time.

    Args:
        predictions (`Sequence[Mapping]`): See `mean_average_precision`.
        references (`Sequence[Mapping]`): See there.
        num_classes (`int`): How many classes there are.
    """

    def __init__(
        self, predictions: Sequence[Mapping[str, Any]], references: Sequence[Mapping[str, Any]], num_classes: int
    ):
        self.cells = np.zeros((len(references), num_classes))
        parts: list[list[tuple]] = [[] for _ in range(num_classes)]
        for image, (predicted, reference) in enumerate(zip(predictions, references, strict=True)):
            true_labels = np.asarray(reference["labels"], dtype=int)
            labels = np.asarray(predicted["labels"], dtype=int)
            scores, boxes = np.asarray(predicted["scores"], dtype=float), boxes_of(predicted)
            truth = boxes_of(reference)
            crowd = np.asarray(reference.get("iscrowd") or np.zeros(len(truth)), dtype=bool)
            for label in np.flatnonzero(annotated_classes(reference, num_classes)):
                true = true_labels == label
                self.cells[image, label] = (true & ~crowd).sum()
                mine = np.flatnonzero(labels == label)
                mine = mine[np.argsort(-scores[mine], kind="stable")][:MAX_DETECTIONS]
                if len(mine):
                    right, ignored = _match(boxes[mine], truth[true & ~crowd], truth[true & crowd])
                    parts[label].append((scores[mine], np.full(len(mine), image), right, ignored))
        self.classes = [_RankedClass(part) if part else None for part in parts]

    def average_precision(self, weights: np.ndarray) -> np.ndarray:
        """Average precision of a resample.

        Args:
            weights (`np.ndarray`): `[images]`, how often each image was drawn.

        Returns:
            `np.ndarray`: `[10, classes]`, at each overlap; NaN for a class without a cell in the resample.
        """
        cells = weights @ self.cells
        precision = np.full((len(IOU_THRESHOLDS), len(cells)), np.nan)
        for label in np.flatnonzero(cells > 0):
            ranked = self.classes[label]
            precision[:, label] = 0.0 if ranked is None else ranked.average_precision(weights, cells[label])
        return precision


class _RankedClass:
    """The predictions of one class, best score first."""

    def __init__(self, parts: list[tuple]):
        scores, images, right, ignored = (np.concatenate(values, axis=-1) for values in zip(*parts))
        order = np.argsort(-scores, kind="stable")
        self.images, right, ignored = images[order], right[:, order], ignored[:, order]
        # Precision falls between two right predictions, so the curve is needed at these only.
        self.columns = np.flatnonzero(right.any(axis=0))
        self.right = right[:, self.columns].astype(float)
        self.ignored = ignored.astype(float) if ignored.any() else None

    def average_precision(self, weights: np.ndarray, cells: float) -> np.ndarray:
        drawn = weights[self.images].astype(float)
        if self.ignored is None:
            predicted = np.cumsum(drawn)[self.columns]
        else:
            predicted = np.cumsum(drawn * (1 - self.ignored), axis=1)[:, self.columns]
        found = np.cumsum(self.right * drawn[self.columns], axis=1)
        precision = np.divide(found, predicted, out=np.zeros_like(found), where=predicted > 0)
        envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        # How many of the recall levels are reached for the first time at each prediction.
        reached = np.searchsorted(RECALL_THRESHOLDS, found / cells, side="right")
        reached[found == 0] = 0
        new = np.diff(reached, axis=1, prepend=0)
        return (envelope * new).sum(axis=1) / len(RECALL_THRESHOLDS)


def _match(boxes: np.ndarray, truth: np.ndarray, crowds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which boxes, best score first, take a cell at each overlap: bool `[10, n]`; and which are on a crowd instead."""
    right = np.zeros((len(IOU_THRESHOLDS), len(boxes)), dtype=bool)
    ignored = np.zeros_like(right)
    overlap = box_iou(boxes, truth)
    free = np.ones((len(IOU_THRESHOLDS), len(truth)), dtype=bool)
    for number in np.flatnonzero((overlap >= IOU_THRESHOLDS[0]).any(axis=1)):
        candidates = np.where(free, overlap[number], -1.0)
        best = candidates.argmax(axis=1)
        hit = np.flatnonzero(candidates.max(axis=1) >= IOU_THRESHOLDS)
        right[hit, number] = True
        free[hit, best[hit]] = False
        if not free.any():
            break
    if len(crowds):
        on_crowd = share_inside(boxes, crowds).max(axis=1) >= IOU_THRESHOLDS[:, None]
        ignored = on_crowd & ~right
    return right, ignored
