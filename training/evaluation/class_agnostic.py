"""How well boxes fit whatever their class: what can be said of a detector on classes that it does not know."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from unihema.training.data.dataset import SmearDataset
from unihema.training.data.rows import Row
from unihema.training.metrics.detection import MAX_DETECTIONS, mean_average_precision


_ANY = "cell"


def class_agnostic_precision(
    model: Any, processor: Any, rows: Sequence[Row], batch_size: int = 8, progress: bool = True
) -> dict[str, Any]:
    """Average precision of boxes with all classes, of the model and of the data, taken as one. A box's score is the best
    of its class scores; the model is asked with its own default prompt.

    Cells that the data do not annotate count as false, as nobody can tell them from mistakes.

    Args:
        model (`UniHemaForMultiTask`): The model.
        processor (`UniHemaProcessor`): Its processor.
        rows (`Sequence[Row]`): Detection rows, of any classes.
        batch_size (`int`): Images at once.
        progress (`bool`): Show a progress bar.

    Returns:
        `dict[str, Any]`: `mAP50`, `mAP75`, `mAP` in 0..1, and the number of `rows` and `cells`.
    """
    rows = [_of_one_class(row) for row in rows]
    dataset = SmearDataset(rows, processor, "detection", class_names=[_ANY], evaluation=True)
    loader = DataLoader(dataset, batch_size=batch_size, collate_fn=dataset.collate)
    process = processor.image_processor.post_process_object_detection
    found, truth = [], []
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for batch in tqdm(loader, desc="boxes of any class", unit="batch", disable=not progress, leave=False):
                images = {
                    "pixel_values": batch["pixel_values"].to(model.device, model.dtype),
                    "pixel_mask": batch["pixel_mask"].to(model.device),
                }
                output = model(task="detection", **images)
                output.logits = output.logits.amax(-1, keepdim=True)
                sizes = batch["target_sizes"]
                for image in process(output, 0.0, sizes, top_k=MAX_DETECTIONS):
                    found.append({name: values.cpu().numpy() for name, values in image.items()})
                truth += [_truth(rows[index], size) for index, size in zip(batch["row_indices"], sizes.tolist())]
    finally:
        model.train(was_training)
    figures = mean_average_precision(found, truth, [_ANY])
    cells = figures.pop("per_class")[_ANY]["cells"]
    return {**figures, "rows": len(rows), "cells": cells}


def _of_one_class(row: Row) -> Row:
    objects = {name: value for name, value in row["objects"].items() if name != "morphology"}
    return {**row, "objects": {**objects, "category": [_ANY] * len(objects["category"])}, "annotated_classes": None}


def _truth(row: Row, size: Sequence[int]) -> dict[str, Any]:
    height, width = size
    boxes = np.asarray(row["objects"]["bbox"], dtype=float).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    if row.get("size"):
        # Very large images are reduced on opening.
        boxes *= width / row["size"][0]
    return {
        "boxes": boxes.clip(0, [width, height, width, height]),
        "labels": [0] * len(boxes),
        "iscrowd": row["objects"].get("iscrowd"),
    }


__all__ = ["class_agnostic_precision"]
