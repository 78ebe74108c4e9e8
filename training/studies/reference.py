"""The reference of a model: features, quality and cell sizes of the images it was trained on, and what their cells are like."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from unihema.errors import CheckpointError, InputError
from unihema.files import read_json_object, write_json
from unihema.modeling_unihema.configuration_unihema import ancestors
from unihema.modeling_unihema.tasks import IMAGE_TASKS
from unihema.processing_unihema.image_io import load_image
from unihema.processing_unihema.post_processing import find_cells, most_probable_labels, single_cell_probabilities
from unihema.results.crop_framing import FEWEST, measure_frame
from unihema.results.odd_cells import CellReference
from unihema.results.out_of_distribution import (
    QUANTILE,
    ModelReference,
    TaskReference,
    backbone_checksum,
    head_checksum,
    image_scores,
)
from unihema.results.tied_gaussians import TiedGaussians
from unihema.training.data.class_tree import as_known
from unihema.training.data.rows import Row
from unihema.training.data.shards import readable
from unihema.training.evaluation import draw_rows
from unihema.training.metrics.morphology import match_cells


_FEWEST_IMAGES = 2
# Images of each data set and class in which cells are looked at: enough for a mean, and for a spread that classes share.
IMAGES_OF_CLASS = 30


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
        [`ModelReference`]: Without `cells`, see [`fit_cells`].

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
            inputs = processor.image_processor([load_image(readable(row["image"]))], task=task).to(model.device)
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


def fit_cells(
    model: Any,
    processor: Any,
    train: Mapping[str, Sequence[Row]],
    val: Mapping[str, Sequence[Row]],
    max_images: int = IMAGES_OF_CLASS,
    seed: int = 0,
    progress: bool = True,
) -> tuple[dict[str, CellReference], dict[str, dict[str, float]]]:
    """Learns what the cells of a model's data sets are like: what its heads read of those that they name rightly.

    Args:
        model, processor: As for [`fit_reference`].
        train (`Mapping[str, Sequence[Row]]`): Task -> rows it was trained on: means and covariance.
        val (`Mapping[str, Sequence[Row]]`): Task -> rows it was not trained on: limits.
        max_images (`int`): At most so many images of each data set, split and class, drawn by `seed`. Boxes of fields that serve
            as crops are left out.
        seed (`int`): Of the draw.
        progress (`bool`): Show a progress bar.

    Returns:
        `tuple[dict[str, CellReference], dict[str, dict[str, float]]]`: Of the heads of detection and of single cells; one that
        names too few cells is left out. And what the scores are worth on the validation cells, see [`odd_cell_figures`].
    """
    looks: dict[str, Callable[[Any, Any, Row], Iterator[tuple[str, str | None, np.ndarray]]]]
    looks = {"detection": _cells_of_field, "single_cell": _cell_of_crop}
    found, figures, was_training = {}, {}, model.training
    model.eval()
    try:
        for task, look in looks.items():
            if task not in model.tasks:
                continue
            parts = []
            known = model.config.class_names if task == "detection" else model.config.single_cell_names
            for rows in (train, val):
                names, right, states = [], [], [np.zeros(model.config.d_model)]
                drawn = _of_each_class(as_known(rows.get(task, ()), known), max_images, seed)
                with torch.inference_mode():
                    for row in tqdm(drawn, desc=f"{task}, cells", unit="image", disable=not progress, leave=False):
                        for label, truth, state in look(model, processor, row):
                            names.append(label)
                            right.append(_is_right(label, truth, model.config.class_parents))
                            states.append(state)
                parts.append((np.array(names, dtype=str), np.stack(states)[1:], np.array(right, dtype=bool)))
            (of_train, of_val) = ((names[right], states[right]) for names, states, right in parts)
            fitted = CellReference.fit(of_train, of_val, head_checksum(model, task))
            if fitted is not None:
                found[task], figures[task] = fitted, odd_cell_figures(fitted, *parts[1])
    finally:
        model.train(was_training)
    return found, figures


def odd_cell_figures(
    known: CellReference, labels: Sequence[str], states: np.ndarray, right: Sequence[bool]
) -> dict[str, float]:
    """What odd-cell scores are worth.

    Args:
        known ([`CellReference`]): Gives the scores.
        labels (`Sequence[str]`): What cells were called, `[n]`.
        states (`np.ndarray`): What the head reads of them, `[n, d]`.
        right (`Sequence[bool]`): Whether they are that, `[n]`.

    Returns:
        `dict[str, float]`: Of the `cells` that have a score: the share `odd`, of the `wrong_odd` and of the `right_odd` ones;
        the share `right`, and `right_of_others`, of those that are not odd; and `auc`, how often a wrong one is odder than a
        right one. What does not exist is NaN.
    """
    scores = np.array([np.nan if score is None else score for score in known.scores(states, labels)])
    has = ~np.isnan(scores)
    scores, true = scores[has], np.asarray(right, bool)[has]
    odd, wrong, rest = scores > 1, np.sort(scores[~true]), np.sort(scores[true])

    def share(of: np.ndarray) -> float:
        return float(of.mean()) if len(of) else float("nan")

    below = np.searchsorted(rest, wrong, "left") + np.searchsorted(rest, wrong, "right")
    return {
        "cells": len(scores),
        "odd": share(odd),
        "wrong_odd": share(odd[~true]),
        "right_odd": share(odd[true]),
        "right": share(true),
        "right_of_others": share(true[~odd]),
        "auc": share(below / 2 / max(1, len(rest))),
    }


def _is_right(label: str, truth: str | None, parents: Mapping[str, str]) -> bool:
    """Whether a cell is of a class, or of a finer or coarser one."""
    return truth is not None and (label in (truth, *ancestors(truth, parents)) or truth in ancestors(label, parents))


def _of_each_class(rows: Iterable[Row], count: int, seed: int) -> list[Row]:
    """Rows in which at most `count` show each class of each data set, unless they show others too."""
    of_class: dict[tuple[str, str], list[tuple[int, Row]]] = {}
    for number, row in enumerate(rows):
        if "box" in row or row.get("from_attributes"):
            continue
        for name in dict.fromkeys(row["objects"]["category"] if "objects" in row else [row["label"]]):
            of_class.setdefault((row["dataset"], name), []).append((number, row))
    drawn: dict[int, Row] = {}
    for group in of_class.values():
        places = np.random.default_rng(seed).permutation(len(group))[:count]
        drawn |= {group[place][0]: group[place][1] for place in places}
    return list(drawn.values())


def _outputs(model: Any, processor: Any, task: str, image: Any) -> Any:
    inputs = processor.image_processor([image], task=task).to(model.device)
    named = {"task": task} if len(model.tasks) > 1 else {}
    return model(pixel_values=inputs["pixel_values"].to(model.dtype), pixel_mask=inputs["pixel_mask"], **named)


def _cells_of_field(model: Any, processor: Any, row: Row) -> Iterator[tuple[str, str | None, np.ndarray]]:
    """Of each cell that is found: what it is called, what it is, `None` where there is none, and its state in the decoder.
    Cells of classes that the data set does not annotate are left out."""
    image = load_image(readable(row["image"]))
    outputs = _outputs(model, processor, "detection", image)
    (cells,) = find_cells(outputs, model.config, [(image.height, image.width)])
    true = np.asarray(row["objects"]["bbox"], float).reshape(-1, 4)
    if row.get("size"):
        true = true * (image.width / row["size"][0])
    true = np.concatenate((true[:, :2], true[:, :2] + true[:, 2:]), 1)
    boxes = np.array([cell["box"] for cell in cells]).reshape(-1, 4)
    crowds = row["objects"].get("iscrowd") or [0] * len(true)
    there = dict(zip(*match_cells(boxes, true, np.zeros((len(boxes), len(true)))), strict=True))
    annotated = row.get("annotated_classes")
    for number, cell in enumerate(cells):
        other = there.get(number)
        asked = {cell["label"], *ancestors(cell["label"], model.config.label_parents or {})}
        if (annotated is None or asked & {*annotated}) if other is None else not crowds[other]:
            truth = None if other is None else row["objects"]["category"][other]
            yield cell["label"], truth, outputs.last_hidden_state[0, cell["query"]].float().cpu().numpy()


def _cell_of_crop(model: Any, processor: Any, row: Row) -> Iterator[tuple[str, str | None, np.ndarray]]:
    """What a crop is called, what it is, and its feature."""
    outputs = _outputs(model, processor, "single_cell", load_image(readable(row["image"])))
    best = most_probable_labels(single_cell_probabilities(outputs.logits.float(), model.config), model.config)
    yield model.config.single_cell_labels[int(best[0])], row["label"], outputs.features[0].float().cpu().numpy()


def with_cells(checkpoint: str | Path, model: Any, cells: Mapping[str, CellReference]) -> ModelReference:
    """The reference that a checkpoint has, with what its cells are like.

    Args:
        checkpoint (`str` or `Path`): The folder.
        model (`UniHemaPreTrainedModel`): Its model.
        cells (`Mapping[str, CellReference]`): Of [`fit_cells`].

    Raises:
        InputError: It has none of these weights.
    """
    reference = ModelReference.of_model(model, checkpoint)
    if reference is None:
        raise InputError(f"{checkpoint}: there is no reference of its images yet; leave out --cells.")
    return replace(reference, cells=dict(cells))


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
    frame = measure_frame([load_image(readable(row["image"])) for row in drawn])
    if frame is None:
        raise InputError(
            f"Of {len(drawn)} crops of single cells fewer than {FEWEST} show a nucleus: there is no frame to tell."
        )
    path = Path(checkpoint) / "config.json"
    fields = read_json_object(path, CheckpointError, "Copy the checkpoint again.")
    write_json(path, {**fields, "trained": {**fields["trained"], "crop_frame": frame}})
    return frame


__all__ = ["IMAGES_OF_CLASS", "fit_cells", "fit_reference", "odd_cell_figures", "record_crop_frame", "with_cells"]
