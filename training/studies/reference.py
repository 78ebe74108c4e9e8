"""The reference of a model: features, quality and cell sizes of the images it was trained on."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from unihema.errors import CheckpointError, InputError
from unihema.files import read_json_object, write_json
from unihema.modeling_unihema.tasks import IMAGE_TASKS
from unihema.processing_unihema.image_io import load_image
from unihema.results.crop_framing import FEWEST, measure_frame
from unihema.results.out_of_distribution import (
    QUANTILE,
    ModelReference,
    TaskReference,
    TiedGaussians,
    backbone_checksum,
    image_scores,
)
from unihema.training.data.class_tree import as_known
from unihema.training.data.rows import Row
from unihema.training.data.shards import StoredFile
from unihema.training.evaluation import draw_rows


_FEWEST_IMAGES = 2


def fit_reference(
    model: Any,
    processor: Any,
    train: Mapping[str, Sequence[Row]],
    val: Mapping[str, Sequence[Row]],
    max_images: int | None = 500,
    seed: int = 0,
    progress: bool = True,
) -> ModelReference:
    """Learns what the images of a model's data sets are like.

    Args:
        model ([`UniHemaForMultiTask`] or a model with one head): The trained model.
        processor ([`UniHemaProcessor`]): Its processor.
        train (`Mapping[str, Sequence[Row]]`): Task -> rows it was trained on: means, covariance and ranges.
        val (`Mapping[str, Sequence[Row]]`): Task -> rows it was not trained on: limits, and ranges as well. A data set
            without any is left out.
        max_images (`int`, *optional*): At most so many images of each data set, task and split, drawn by `seed`.
        seed (`int`): Of the draw.
        progress (`bool`): Show a progress bar.

    Returns:
        [`ModelReference`]

    Raises:
        ValueError: No data set has images of a task in both splits.
    """
    tasks = {}
    was_training = model.training
    model.eval()
    try:
        for task in IMAGE_TASKS:
            both = [_by_dataset(rows.get(task, ()), max_images, seed) for rows in (train, val)]
            names = [name for name in both[0] if name in both[1] and len(both[0][name]) >= _FEWEST_IMAGES]
            if names:
                seen = [[_seen(model, processor, task, part[name], progress) for name in names] for part in both]
                tasks[task] = _fitted(
                    names, *seen, sizes=_cell_sizes(train[task], model, processor) if task == "detection" else {}
                )
    finally:
        model.train(was_training)
    if not tasks:
        raise InputError(
            f"No data set has {_FEWEST_IMAGES} training images and a validation image of {', '.join(IMAGE_TASKS)}: "
            "give the folders the model was trained on, with their val split."
        )
    return ModelReference(tasks, backbone_checksum(model))


def _by_dataset(rows: Iterable[Row], count: int | None, seed: int) -> dict[str, list[Row]]:
    """One row an image of each data set, at most `count`."""
    images: dict[str, dict[Any, Row]] = {}
    for row in rows:
        key = str(row["image"]) if isinstance(row["image"], str) else id(row["image"])
        images.setdefault(row["dataset"], {}).setdefault(key, row)
    return {name: draw_rows(list(found.values()), count, seed) for name, found in images.items()}


def _seen(model, processor, task: str, rows: Sequence[Row], progress: bool) -> tuple[np.ndarray, np.ndarray]:
    """Features `[n, D]` and quality `[n, 3]` of images, one at a time as `unihema predict` sees them."""
    bar = tqdm(rows, desc=f"{task}, {rows[0]['dataset']}", unit="image", disable=not progress, leave=False)
    seen = []
    with torch.inference_mode():
        for row in bar:
            inputs = processor.image_processor([load_image(_source(row))], task=task).to(model.device)
            pixels = inputs["pixel_values"].to(model.dtype)
            # The task that needs no encoder: the backbone's features are enough.
            features = model.get_image_features(pixels, inputs["pixel_mask"], task="question_answering")
            seen.append(image_scores(features, pixels, processor))
    return tuple(np.concatenate(parts) for parts in zip(*seen))


def _fitted(names: Sequence[str], train, val, sizes: dict[str, tuple[float, float]]) -> TaskReference:
    groups = np.repeat(np.arange(len(names)), [len(features) for features, _ in train])
    gaussians = TiedGaussians.fit(np.concatenate([features for features, _ in train]), groups)
    limits = np.array(
        [np.quantile(gaussians.distances(features)[:, group], QUANTILE) for group, (features, _) in enumerate(val)]
    )
    tails = (1 - QUANTILE) / 2, (1 + QUANTILE) / 2
    ranges = [np.quantile(np.concatenate([a, b]), tails, axis=0).T for (_, a), (_, b) in zip(train, val)]
    return TaskReference(tuple(names), gaussians, limits, np.stack(ranges), sizes)


def _cell_sizes(rows: Sequence[Row], model: Any, processor: Any) -> dict[str, tuple[float, float]]:
    """For each class the range of the median cell size of an image, in pixels that the model sees; over all data sets, each
    with its own range."""
    medians: dict[str, dict[str, list[float]]] = {}
    for row in as_known(rows, list(model.config.id2label.values())):
        if not row.get("size") or row.get("from_attributes") or not row["objects"]["category"]:
            continue
        boxes, names = np.asarray(row["objects"]["bbox"], float), np.asarray(row["objects"]["category"])
        sizes = np.sqrt(boxes[:, 2] * boxes[:, 3]) * processor.image_processor.scale(tuple(row["size"][::-1]))
        for name in np.unique(names).tolist():
            found = medians.setdefault(name, {}).setdefault(row["dataset"], [])
            found.append(float(np.median(sizes[names == name])))
    tails = (1 - QUANTILE) / 2, (1 + QUANTILE) / 2
    ranges = {name: [np.quantile(values, tails) for values in found.values()] for name, found in medians.items()}
    return {
        name: (float(min(low for low, _ in found)), float(max(high for _, high in found)))
        for name, found in ranges.items()
    }


def record_crop_frame(
    checkpoint: str | Path, rows: Sequence[Row], max_images: int | None = 500, seed: int = 0
) -> dict[str, list[float]]:
    """Writes into a checkpoint's `config.json` what the crops of nucleated cells are like that it was trained on
    (`trained.crop_frame`). Boxes of fields are left out, for these are cut as one likes.

    Args:
        checkpoint (`str` or `Path`): The folder.
        rows (`Sequence[Row]`): Of single cells, of the training.
        max_images (`int`, *optional*): At most so many crops of each data set, drawn by `seed`.
        seed (`int`): Of the draw.

    Raises:
        ValueError: Too few of the crops show a nucleus.
    """
    drawn = [row for of_one in _by_dataset(rows, max_images, seed).values() for row in of_one if "box" not in row]
    frame = measure_frame([load_image(_source(row)) for row in drawn])
    if frame is None:
        raise InputError(
            f"Of {len(drawn)} crops of single cells fewer than {FEWEST} show a nucleus: there is no frame to tell."
        )
    path = Path(checkpoint) / "config.json"
    fields = read_json_object(path, CheckpointError, "Copy the checkpoint again.")
    write_json(path, {**fields, "trained": {**fields["trained"], "crop_frame": frame}})
    return frame


def _source(row: Row) -> Any:
    return row["image"].opened() if isinstance(row["image"], StoredFile) else row["image"]


__all__ = ["fit_reference", "record_crop_frame"]
