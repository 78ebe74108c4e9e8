"""One evaluation for all tasks: predictions through the same post-processing as `unihema predict`, figures in one report."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from unihema.modeling_unihema.tasks import LANGUAGE_TASKS
from unihema.results.out_of_distribution import ModelReference
from unihema.training.data.class_tree import as_known
from unihema.training.data.dataset import SmearDataset
from unihema.training.data.rows import Row
from unihema.training.evaluation.calibration import calibration_of
from unihema.training.evaluation.detection import MeasuredDetections
from unihema.training.evaluation.intervals import DRAWS, LEVEL, bootstrap_intervals
from unihema.training.evaluation.language import MeasuredTexts
from unihema.training.evaluation.measured import FeatureListener, Measured, class_names
from unihema.training.evaluation.segmentation import MeasuredMasks
from unihema.training.evaluation.selection import draw_rows, exchange_images, image_numbers
from unihema.training.evaluation.single_cell import MeasuredCells
from unihema.training.evaluation.sources import Distances, groups_of


QUESTIONS_AT_ONCE = 12


def evaluate_model(
    model,
    processor,
    rows_by_task: Mapping[str, Sequence[Row]],
    batch_size: int = 8,
    max_samples: int | None = None,
    progress: bool = True,
    generate_kwargs: Mapping[str, Any] | None = None,
    shuffle_images: bool = False,
    seed: int = 0,
    calibrate: bool = False,
    bootstrap: int = DRAWS,
    name_classes: bool = False,
    text_only: bool = False,
    on_features: FeatureListener | None = None,
    home: Collection[str] = (),
    reference: ModelReference | None = None,
) -> dict[str, Any]:
    """Measures a model on rows of any tasks, in evaluation mode, asked as `unihema predict` asks when given no prompt.

    Boxes are measured in pixels of the original image, masks at its size. `at_threshold` has what `unihema predict` shows:
    cells above the model's thresholds, overlapping ones removed.

    Args:
        model (`UniHemaForMultiTask`): The model.
        processor (`UniHemaProcessor`): Its processor.
        rows_by_task (`Mapping[str, Sequence[Row]]`): Task -> rows.
        batch_size (`int`): Images at once.
        max_samples (`int`, *optional*): Measure on about this many rows of a task, whole images, drawn by `seed`.
        progress (`bool`): Show progress bars.
        generate_kwargs (`Mapping[str, Any]`, *optional*): For `generate`; greedy by default.
        shuffle_images (`bool`): The image-blind control of language tasks: the same questions and answers, but every
            image exchanged for another of the set. Other tasks are left out.
        seed (`int`): Of the draw, the exchange and the resamples.
        calibrate (`bool`): First set `model.config.trained.detection_thresholds` to the best of these rows; the figures
            `at_threshold` are then those of the rows the thresholds were chosen on. Set `trained.calibration` to what the scores
            of these rows mean, see [`fit_calibration`].
        bootstrap (`int`): Resamples of the images for the `intervals` (see `bootstrap_intervals`); 0 for none.
        name_classes (`bool`): Ask detection for the classes that each data set annotates, instead of the default prompt.
        text_only (`bool`): Language tasks without their images.
        on_features (`Callable`, *optional*): Gets the image features and pixels of every batch of an image task.
        home (`Collection[str]`): Data sets of the training, where they are known.
        reference ([`ModelReference`], *optional*): Of the model: how well images from elsewhere are told is measured, too.

    Returns:
        `dict[str, Any]`: Task -> figures, with the number of `rows` and `images`, `intervals` and how they were made
        (`bootstrap`), `image_blind` for that control, and where the rows are of several data sets `datasets`: for each
        its own figures, of the classes it annotates; with `home`, `groups`: the figures of the sources in training and of those
        not in training; with `reference`, `out_of_distribution`, see [`Distances`].

    Raises:
        ValueError: The image-blind control of fewer than two images.
    """
    was_training = model.training
    model.eval()
    report = {}
    try:
        for task, rows in rows_by_task.items():
            if shuffle_images:
                if task not in LANGUAGE_TASKS:
                    continue
                rows = exchange_images(rows, seed)
            rows = draw_rows(rows, max_samples, seed)
            told = reference.tasks.get(task) if reference is not None and on_features is None else None
            distances = None if told is None else Distances(told, processor)
            listener = distances or on_features
            measured = _measured(model, processor, task, generate_kwargs or {}, listener, name_classes)
            _ask(measured, task, rows, batch_size, progress, name_classes, text_only)
            if calibrate and task == "detection":
                thresholds = measured.best_thresholds()
                model.config.trained.detection_thresholds = thresholds
                model.config.trained.unfound_classes = measured.unfound_classes(thresholds)
            report[task] = _task_report(measured, bootstrap, seed, home)
            if distances is not None:
                report[task]["out_of_distribution"] = distances.figures(measured.rows, home)
            if calibrate:
                fitted, trained = calibration_of(measured), model.config.trained
                others = {head: of for head, of in trained.calibration.items() if head != task}
                # Another dictionary: that of a base, whose adapter this is, stays as it is.
                trained.calibration = others if fitted is None else {**others, task: fitted}
            if shuffle_images:
                report[task]["image_blind"] = True
            if task in LANGUAGE_TASKS and text_only:
                report[task]["text_only"] = True
    finally:
        model.train(was_training)
    return report


def calibrate_scores(
    model,
    processor,
    rows_by_task: Mapping[str, Sequence[Row]],
    batch_size: int = 8,
    max_samples: int | None = None,
    progress: bool = True,
) -> dict[str, dict[str, Any]]:
    """What the scores of a model mean, at the thresholds that it has, see [`fit_calibration`]. The model stays as it is.

    Args:
        model (`UniHemaForMultiTask`): The model.
        processor (`UniHemaProcessor`): Its processor.
        rows_by_task (`Mapping[str, Sequence[Row]]`): Rows that the model was not trained on; of detection and single cells.
        batch_size (`int`): Images at once.
        max_samples (`int`, *optional*): About this many rows of a task.
        progress (`bool`): Show progress bars.

    Returns:
        `dict`: Head -> what was fitted; a head with too few answers is left out.
    """
    found, was_training = {}, model.training
    model.eval()
    try:
        for task, kind in (("detection", MeasuredDetections), ("single_cell", MeasuredCells)):
            if not (rows := rows_by_task.get(task)):
                continue
            measured = kind(model, processor)
            _ask(measured, task, draw_rows(rows, max_samples, 0), batch_size, progress)
            if (fitted := calibration_of(measured)) is not None:
                found[task] = fitted
    finally:
        model.train(was_training)
    return found


def calibrate_thresholds(
    model, processor, rows: Sequence[Row], batch_size: int = 8, progress: bool = True
) -> dict[str, float]:
    """The score of each class at which its F1 (overlap at least 0.5) on these rows is best, see `best_threshold`.

    Args:
        model (`UniHemaForMultiTask`): The model.
        processor (`UniHemaProcessor`): Its processor.
        rows (`Sequence[Row]`): Detection rows that the model was not trained on.
        batch_size (`int`): Images at once.
        progress (`bool`): Show a progress bar.

    Returns:
        `dict[str, float]`: Class name -> threshold; classes that are not in the rows or never found are left out.
    """
    was_training = model.training
    model.eval()
    try:
        measured = MeasuredDetections(model, processor)
        _ask(measured, "detection", rows, batch_size, progress)
    finally:
        model.train(was_training)
    return measured.best_thresholds()


def _measured(
    model,
    processor,
    task: str,
    generate_kwargs: Mapping[str, Any],
    on_features: FeatureListener | None,
    name_classes: bool,
) -> Measured:
    if task in LANGUAGE_TASKS:
        return MeasuredTexts(model, processor, task, generate_kwargs)
    if task == "detection":
        return MeasuredDetections(model, processor, on_features, name_classes)
    kinds = {"segmentation": MeasuredMasks, "single_cell": MeasuredCells}
    return kinds[task](model, processor, on_features)


def _ask(
    measured: Measured,
    task: str,
    rows: Sequence[Row],
    batch_size: int,
    progress: bool,
    name_classes: bool = False,
    text_only: bool = False,
) -> None:
    known = {"detection": class_names(measured.model), "single_cell": measured.model.config.single_cell_names}
    rows = as_known(rows, known[task]) if task in known else rows
    with torch.inference_mode():
        options = {"name_classes": name_classes, "text_only": text_only}
        for batch in _batches(measured.model, measured.processor, task, rows, batch_size, progress, **options):
            measured.add(batch, rows)


def _batches(
    model,
    processor,
    task: str,
    rows: Sequence[Row],
    batch_size: int,
    progress: bool,
    name_classes: bool,
    text_only: bool,
) -> Iterator[dict]:
    config = model.config
    dataset = SmearDataset(
        rows,
        processor,
        task,
        class_names=class_names(model),
        single_cell_labels=config.single_cell_names,
        morphology=config.morphology,
        questions_per_image=QUESTIONS_AT_ONCE,
        evaluation=True,
        text_only=text_only,
        name_classes=name_classes,
    )
    crops = dataset.one_cell
    kinds = [np.flatnonzero(~crops), np.flatnonzero(crops)]
    batches = [kind[start : start + batch_size].tolist() for kind in kinds for start in range(0, len(kind), batch_size)]
    loader = DataLoader(dataset, batch_sampler=batches, collate_fn=dataset.collate)
    return tqdm(loader, desc=f"evaluate {task}", unit="batch", disable=not progress, leave=False)


def _task_report(measured: Measured, bootstrap: int, seed: int, home: Collection[str] = ()) -> dict[str, Any]:
    report = measured.figures() | _numbers(measured, bootstrap, seed)
    if report["intervals"]:
        report["bootstrap"] = {"draws": bootstrap, "level": LEVEL, "seed": seed, "resampled": "images"}
    names = list(dict.fromkeys(row["dataset"] for row in measured.rows))

    def of_parts(parts: Mapping[str, Collection[str]]) -> dict[str, Any]:
        chosen = {name: measured.of_datasets(own) for name, own in parts.items()}
        return {name: part.figures(part=True) | _numbers(part, bootstrap, seed) for name, part in chosen.items()}

    if len(names) > 1:
        report["datasets"] = of_parts({name: (name,) for name in names})
    if groups := groups_of(names, home):
        report["groups"] = of_parts(groups)
    return report


def _numbers(measured: Measured, bootstrap: int, seed: int) -> dict[str, Any]:
    return {
        "rows": len(measured.rows),
        "images": int(image_numbers(measured.rows).max(initial=-1)) + 1,
        "intervals": bootstrap_intervals(measured, bootstrap, seed),
    }
