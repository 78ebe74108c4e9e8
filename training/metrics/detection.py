"""Mean average precision of boxes, and the operating points that come with it."""

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unihema.errors import InputError
from unihema.processing_unihema.masks import rle_in_image


MAX_DETECTIONS = 300
F1_TOLERANCE = (0.01, 0.05)


def mean_average_precision(
    predictions: Sequence[Mapping[str, Any]],
    references: Sequence[Mapping[str, Any]],
    class_names: Sequence[str],
    of_masks: bool = False,
) -> dict[str, Any]:
    """COCO's average precision, of boxes or of masks.

    A class that an image's data set does not annotate is neither asked for nor counted in that image. Classes without
    any cell in the references are left out of the means.

    Args:
        predictions (`Sequence[Mapping]`): For each image `boxes` `[n, 4]` xyxy pixels, `scores` `[n]`, `labels` `[n]`.
        references (`Sequence[Mapping]`): For each image `boxes` `[m, 4]`, `labels` `[m]`, optionally `iscrowd` `[m]` and
            `annotated_classes`, the class indices that are annotated (`None`: all).
        class_names (`Sequence[str]`): Names of the class indices.
        of_masks (`bool`): Overlap is that of `masks`, which predictions and references then have: one a box, run lengths over
            the image (`rle_in_image`). A reference's may be `None`: its cell is ignored, like a crowd.

    Returns:
        `dict`: `mAP` (IoU 0.50 to 0.95), `mAP50`, `mAP75`, all in 0..1, and `per_class`: name -> `AP50`, `AP`, `cells`.
        `None` where there is nothing to find.

    Raises:
        ValueError: As many predictions as references are needed.
    """
    _check_lengths(predictions, references)
    from faster_coco_eval import COCO, COCOeval_faster

    truth, found, cells = _in_coco(predictions, references, len(class_names), of_masks)
    images = [{"id": number, "width": 1, "height": 1} for number in range(1, len(references) + 1)]
    categories = [{"id": number, "name": name} for number, name in enumerate(class_names)]
    with contextlib.redirect_stdout(io.StringIO()):
        dataset = COCO({"images": images, "annotations": truth, "categories": categories})
        evaluation = COCOeval_faster(dataset, dataset.loadRes(found), iouType="segm" if of_masks else "bbox")
        evaluation.params.maxDets = [1, 10, MAX_DETECTIONS]
        evaluation.evaluate()
        evaluation.accumulate()
    # Axes: IoU threshold, recall, class, area range, detections an image. -1 marks a class without cells.
    precision = evaluation.eval["precision"][:, :, :, 0, -1].mean(axis=1)
    seen = cells > 0
    return {
        "mAP": _mean(precision[:, seen]),
        "mAP50": _mean(precision[0, seen]),
        "mAP75": _mean(precision[5, seen]),
        "per_class": {
            name: {
                "AP50": float(precision[0, number]) if seen[number] else None,
                "AP": float(precision[:, number].mean()) if seen[number] else None,
                "cells": int(cells[number]),
            }
            for number, name in enumerate(class_names)
        },
    }


def _in_coco(
    predictions: Sequence[Mapping[str, Any]], references: Sequence[Mapping[str, Any]], classes: int, of_masks: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], np.ndarray]:
    """Annotations of the cells, results of the predictions, and the number of cells of each class `[classes]`."""
    from faster_coco_eval.core import mask as coco_mask

    def packed(code: Mapping[str, Any]) -> dict[str, Any]:
        return coco_mask.frPyObjects(dict(code), *code["size"])

    truth: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    cells = np.zeros(classes, dtype=int)
    for image, (predicted, reference) in enumerate(zip(predictions, references), 1):
        allowed = annotated_classes(reference, classes)
        crowd = reference.get("iscrowd")
        for number, (box, label) in enumerate(zip(boxes_of(reference), np.asarray(reference["labels"], dtype=int))):
            if not allowed[label]:
                continue
            is_crowd = 0 if crowd is None else int(crowd[number])
            if of_masks and reference["masks"][number] is None:
                is_crowd = 1
            cells[label] += not is_crowd
            cell = {"id": len(truth) + 1, "iscrowd": is_crowd, **_coco_box(image, box, label)}
            cell["area"] = cell["bbox"][2] * cell["bbox"][3]
            if of_masks:
                code = packed(reference["masks"][number] or box_code(box, reference["size"]))
                cell |= {"segmentation": code, "area": float(coco_mask.area(code))}
            truth.append(cell)
        labels = np.asarray(predicted["labels"], dtype=int)
        scores = np.asarray(predicted["scores"], dtype=float)
        for number, (box, score, label) in enumerate(zip(boxes_of(predicted), scores, labels)):
            if allowed[label]:
                cell = {"score": float(score), **_coco_box(image, box, label)}
                if of_masks:
                    cell["segmentation"] = packed(predicted["masks"][number])
                found.append(cell)
    return truth, found, cells


def _coco_box(image: int, box: Sequence[float], label: int) -> dict[str, Any]:
    x1, y1, x2, y2 = map(float, box)
    return {"image_id": image, "category_id": int(label), "bbox": [x1, y1, x2 - x1, y2 - y1]}


def box_code(box: Sequence[float], size: tuple[int, int]) -> dict[str, Any]:
    """A box `[4]` as run lengths over an image of height and width `size`."""
    left, top, right, bottom = (int(value) for value in (*np.floor(box[:2]), *np.ceil(box[2:])))
    return rle_in_image(np.ones((bottom - top, right - left), dtype=bool), (left, top), size)


def score_matches(
    predictions: Sequence[Mapping[str, Any]],
    references: Sequence[Mapping[str, Any]],
    label: int,
    num_classes: int,
    iou_threshold: float = 0.5,
) -> tuple[np.ndarray, np.ndarray, int]:
    """Which predictions of a class are right: best score first, each takes the best free cell that it overlaps enough.

    Args:
        predictions (`Sequence[Mapping]`): See `mean_average_precision`.
        references (`Sequence[Mapping]`): See there. Predictions on crowds are left out.
        label (`int`): The class.
        num_classes (`int`): How many classes there are.
        iou_threshold (`float`): Overlap that counts as found.

    Returns:
        `tuple[np.ndarray, np.ndarray, int]`: Scores `[n]`, best first; bool `[n]`, right or not; number of cells.
    """
    _check_lengths(predictions, references)
    scores, right, cells = [], [], 0
    for predicted, reference in zip(predictions, references):
        if not annotated_classes(reference, num_classes)[label]:
            continue
        truth = boxes_of(reference)
        of_class = np.asarray(reference["labels"], dtype=int) == label
        crowd = np.asarray(reference.get("iscrowd") or np.zeros(len(truth)), dtype=bool)
        crowds, truth = truth[of_class & crowd], truth[of_class & ~crowd]
        cells += len(truth)
        mine = np.asarray(predicted["labels"], dtype=int) == label
        own_scores = np.asarray(predicted["scores"], dtype=float)[mine]
        order = np.argsort(-own_scores, kind="stable")
        boxes = boxes_of(predicted)[mine][order]
        overlap = box_iou(boxes, truth)
        on_crowd = (share_inside(boxes, crowds) >= iou_threshold).any(axis=1)
        free = np.ones(len(truth), dtype=bool)
        for number, score in enumerate(own_scores[order]):
            candidates = np.where(free, overlap[number], -1.0)
            best = int(candidates.argmax()) if len(candidates) else -1
            hit = best >= 0 and candidates[best] >= iou_threshold
            if hit:
                free[best] = False
            elif on_crowd[number]:
                continue
            scores.append(score)
            right.append(hit)
    order = np.argsort(-np.asarray(scores, dtype=float), kind="stable")
    return np.asarray(scores, dtype=float)[order], np.asarray(right, dtype=bool)[order], cells


def best_threshold(scores: np.ndarray, right: np.ndarray, cells: int) -> tuple[float, float] | None:
    """A score threshold of good F1 that does not hang on a single cell.

    It is the middle of the range of thresholds, around the best one, whose F1 is lower by no more than about one cell
    makes (within the limits of `F1_TOLERANCE`): with few cells the best alone often lies at an extreme, where other
    images would have many false cells, or miss many.

    Args:
        scores (`np.ndarray`): `[n]`, best first.
        right (`np.ndarray`): bool `[n]`.
        cells (`int`): Cells there are to find.

    Returns:
        `tuple[float, float]` or `None`: Threshold and F1; `None` without cells or without a right prediction.
    """
    if not cells or not right.any():
        return None
    # Predictions of one score stand or fall together.
    last = np.flatnonzero(np.append(scores[:-1] > scores[1:], True))
    f1 = 2 * np.cumsum(right)[last] / (last + 1 + cells)
    # Half way to the next score, the last to nothing.
    thresholds = (scores[last] + np.append(scores[last[1:]], 0.0)) / 2
    start = stop = int(f1.argmax())
    near = f1 >= f1[start] - np.clip(1 / cells, *F1_TOLERANCE)
    while start and near[start - 1]:
        start -= 1
    while stop + 1 < len(near) and near[stop + 1]:
        stop += 1
    threshold = float((thresholds[start] + thresholds[stop]) / 2)
    return threshold, float(f1[np.flatnonzero(scores[last] > threshold)[-1]])


def operating_point(scores: np.ndarray, right: np.ndarray, cells: int, threshold: float) -> dict[str, Any]:
    """Precision, recall and F1 of a class at a threshold; `None` where there is nothing to divide by."""
    kept = scores > threshold
    found, total = int(right[kept].sum()), int(kept.sum())
    return {
        "threshold": float(threshold),
        "precision": found / total if total else None,
        "recall": found / cells if cells else None,
        "f1": 2 * found / (total + cells) if total + cells else None,
        "predicted": total,
        "cells": cells,
    }


def box_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Intersection over union `[n, m]` of xyxy boxes `[n, 4]` and `[m, 4]`."""
    first, second = np.asarray(first, float).reshape(-1, 4), np.asarray(second, float).reshape(-1, 4)
    corner = np.maximum(first[:, None, :2], second[None, :, :2])
    opposite = np.minimum(first[:, None, 2:], second[None, :, 2:])
    overlap = np.clip(opposite - corner, 0, None).prod(axis=-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).clip(0).prod(axis=-1) for boxes in (first, second)]
    union = areas[0][:, None] + areas[1][None] - overlap
    return np.divide(overlap, union, out=np.zeros_like(overlap), where=union > 0)


def share_inside(boxes: np.ndarray, crowds: np.ndarray) -> np.ndarray:
    """The part of each box `[n, 4]` that lies in each crowd `[m, 4]`: `[n, m]`, which is COCO's overlap with a crowd."""
    boxes, crowds = np.asarray(boxes, float).reshape(-1, 4), np.asarray(crowds, float).reshape(-1, 4)
    corner = np.maximum(boxes[:, None, :2], crowds[None, :, :2])
    opposite = np.minimum(boxes[:, None, 2:], crowds[None, :, 2:])
    overlap = np.clip(opposite - corner, 0, None).prod(axis=-1)
    area = (boxes[:, 2:] - boxes[:, :2]).clip(0).prod(axis=-1)[:, None]
    return np.divide(overlap, area, out=np.zeros_like(overlap), where=area > 0)


def annotated_classes(reference: Mapping[str, Any], num_classes: int) -> np.ndarray:
    """bool `[num_classes]`: the classes that the data set of an image annotates."""
    annotated = reference.get("annotated_classes")
    if annotated is None:
        return np.ones(num_classes, dtype=bool)
    allowed = np.zeros(num_classes, dtype=bool)
    allowed[np.asarray(annotated, dtype=int)] = True
    return allowed


def boxes_of(entry: Mapping[str, Any]) -> np.ndarray:
    """Boxes `[n, 4]` of a prediction or reference."""
    return np.asarray(entry["boxes"], dtype=float).reshape(-1, 4)


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if values.size else None


def _check_lengths(predictions: Sequence[Any], references: Sequence[Any]) -> None:
    if len(predictions) != len(references):
        raise InputError(f"{len(predictions)} predictions for {len(references)} references: give one for each image.")
