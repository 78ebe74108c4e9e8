"""One evaluation for all tasks: predictions through the same post-processing as `unihema predict`, figures in one report."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from unihema.processing_unihema.post_processing import DEFAULT_THRESHOLD, distinct_cells
from unihema.processing_unihema.prompts import LANGUAGE_TASKS
from unihema.training.data.dataset import SmearDataset, read_mask
from unihema.training.data.rows import Row
from unihema.training.files import write_json, write_text
from unihema.training.metrics.detection import (
    best_threshold,
    mean_average_precision,
    operating_point,
    score_matches,
)
from unihema.training.metrics.dice import dice_scores, mask_counts
from unihema.training.metrics.morphology import MISSING, match_cells, morphology_scores
from unihema.training.metrics.single_cell import classification_scores
from unihema.training.metrics.text import blank_accuracy, normalise, text_scores


MAX_DETECTIONS = 300
QUESTIONS_AT_ONCE = 12
# Questions that the report lists one by one: those asked most often, and more than once.
LISTED_QUESTIONS = 40

# The figure that stands for a task: in progress messages, and to choose the best evaluation of a run.
HEADLINES = {
    "detection": "mAP50",
    "segmentation": "dice",
    "single_cell": "macro_f1",
    "question_answering": "exact_match",
    "cloze": "exact_match",
}


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
) -> dict[str, Any]:
    """Measures a model on rows of any tasks, in evaluation mode.

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
        seed (`int`): Of the draw and the exchange.
        calibrate (`bool`): First set `model.config.detection_thresholds` to the best of these rows; the figures
            `at_threshold` are then those of the rows the thresholds were chosen on.

    Returns:
        `dict[str, Any]`: Task -> figures, with the number of `rows`, and `image_blind` for that control.

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
            batches = _batches(model, processor, task, rows, batch_size, progress)
            with torch.inference_mode():
                if task == "detection":
                    figures = _detection(model, processor, rows, batches, calibrate)
                elif task == "segmentation":
                    figures = _segmentation(model, processor, rows, batches)
                elif task == "single_cell":
                    figures = _single_cell(model, batches)
                else:
                    figures = _language(model, processor, task, rows, batches, dict(generate_kwargs or {}))
            report[task] = {**figures, "rows": len(rows), **({"image_blind": True} if shuffle_images else {})}
    finally:
        model.train(was_training)
    return report


def draw_rows(rows: Sequence[Row], count: int | None, seed: int) -> list[Row]:
    """About `count` rows, whole images at a time, drawn by `seed`; all of them for `None`."""
    if count is None or len(rows) <= count:
        return list(rows)
    groups = list(_by_image(rows).values())
    drawn: list[Row] = []
    for position in np.random.default_rng(seed).permutation(len(groups)):
        if len(drawn) >= count:
            break
        drawn += groups[position]
    return drawn


def exchange_images(rows: Sequence[Row], seed: int) -> list[Row]:
    """The same rows, each image's questions asked of another image.

    Raises:
        ValueError: Fewer than two images.
    """
    groups = list(_by_image(rows).values())
    if len(groups) < 2:
        raise ValueError("The image-blind control needs at least two images.")
    order = np.random.default_rng(seed).permutation(len(groups))
    exchanged = []
    # Each takes the image that follows in a random circle, so none keeps its own.
    for position, group in enumerate(order):
        other = groups[order[(position + 1) % len(order)]][0]
        exchanged += [{**row, "image": other["image"]} for row in groups[group]]
    return exchanged


def _by_image(rows: Sequence[Row]) -> dict[Any, list[Row]]:
    images: dict[Any, list[Row]] = {}
    for row in rows:
        images.setdefault(row["image"] if isinstance(row["image"], str) else id(row["image"]), []).append(row)
    return images


def _batches(model, processor, task: str, rows: Sequence[Row], batch_size: int, progress: bool) -> Iterator[dict]:
    config = model.config
    dataset = SmearDataset(
        rows,
        processor,
        task,
        class_names=_class_names(model),
        single_cell_labels=config.single_cell_labels,
        morphology=config.morphology,
        questions_per_image=QUESTIONS_AT_ONCE,
        evaluation=True,
    )
    loader = DataLoader(dataset, batch_size=batch_size, collate_fn=dataset.collate)
    return tqdm(loader, desc=f"evaluate {task}", unit="batch", disable=not progress, leave=False)


def _class_names(model) -> list[str]:
    return [model.config.id2label[index] for index in range(model.config.num_labels)]


def _inputs(model, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    names = ("pixel_values", "pixel_mask", "input_ids", "attention_mask")
    return {name: batch[name].to(model.device) for name in names if name in batch}


def _detection(model, processor, rows: Sequence[Row], batches, calibrate: bool) -> dict[str, Any]:
    config, names = model.config, _class_names(model)
    process = processor.image_processor.post_process_object_detection
    ranked, best_class, references = [], [], []
    read, true, labelled = [], [], 0
    for batch in batches:
        output = model(task="detection", **_inputs(model, batch))
        sizes = batch["target_sizes"]
        ranked += _arrays(
            process(output, threshold=0.0, target_sizes=sizes, top_k=MAX_DETECTIONS, one_class_per_query=False)
        )
        cells = _arrays(process(output, threshold=0.0, target_sizes=sizes))
        truth = _references(batch, rows, names)
        best_class += cells
        references += truth
        for image, labels in enumerate(batch["labels"]):
            if labels.get("morphology") is None:
                continue
            values = labels["morphology"].numpy()
            described = (values != MISSING).any(-1)
            labelled += int(described.sum())
            kept = cells[image]["queries"]
            scores = output.logits[image].float().sigmoid().cpu().numpy()[kept][:, truth[image]["labels"]]
            queries, matched = match_cells(cells[image]["boxes"], truth[image]["boxes"], scores)
            queries, matched = queries[described[matched]], matched[described[matched]]
            parts = output.pred_morphology[image].split(config.morphology_sizes, dim=-1)
            read.append(torch.stack([part.argmax(-1) for part in parts], -1).cpu().numpy()[kept[queries]])
            true.append(values[matched])
    if calibrate:
        config.detection_thresholds = _best_thresholds(best_class, references, names)
    figures = mean_average_precision(ranked, references, names)
    thresholds = np.array([config.detection_thresholds.get(name, DEFAULT_THRESHOLD) for name in names])
    shown = [_shown(cells, thresholds) for cells in best_class]
    figures["at_threshold"] = {}
    for label, name in enumerate(names):
        scores, right, count = score_matches(shown, references, label, len(names))
        if count or len(scores):
            figures["at_threshold"][name] = operating_point(scores, right, count, thresholds[label])
    if labelled:
        figures["morphology"] = morphology_scores(
            np.concatenate(read), np.concatenate(true), config.morphology, cells=labelled
        )
    return figures


def _shown(cells: Mapping[str, np.ndarray], thresholds: np.ndarray | float) -> dict[str, np.ndarray]:
    """Cells above their class's threshold, each once."""
    limit = thresholds[cells["labels"]] if isinstance(thresholds, np.ndarray) else thresholds
    above = np.flatnonzero(cells["scores"] > limit)
    # `cells` come best first.
    kept = distinct_cells(torch.from_numpy(cells["boxes"][above]), torch.from_numpy(cells["labels"][above])).numpy()
    return {name: values[above[kept]] for name, values in cells.items()}


def _best_thresholds(
    best_class: Sequence[Mapping[str, np.ndarray]], references: Sequence[Mapping[str, Any]], names: list[str]
) -> dict[str, float]:
    predictions = [_shown(cells, 0.0) for cells in best_class]
    thresholds = {}
    for label, name in enumerate(names):
        best = best_threshold(*score_matches(predictions, references, label, len(names)))
        if best is not None:
            thresholds[name] = round(min(max(best[0], 0.01), 0.99), 4)
    return thresholds


def _arrays(detections: Sequence[Mapping[str, torch.Tensor]]) -> list[dict[str, np.ndarray]]:
    return [{name: values.cpu().numpy() for name, values in image.items()} for image in detections]


def _references(batch: dict[str, Any], rows: Sequence[Row], names: list[str]) -> list[dict[str, Any]]:
    references = []
    for index, (height, width) in zip(batch["row_indices"], batch["target_sizes"].tolist()):
        row = rows[index]
        boxes = np.asarray(row["objects"]["bbox"], dtype=float).reshape(-1, 4)
        boxes = np.concatenate((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), 1)
        if row.get("size"):
            boxes *= width / row["size"][0]
        reference = {
            "boxes": boxes.clip(0, [width, height, width, height]),
            "labels": [names.index(name) for name in row["objects"]["category"]],
        }
        if "iscrowd" in row["objects"]:
            reference["iscrowd"] = row["objects"]["iscrowd"]
        if row.get("annotated_classes") is not None:
            reference["annotated_classes"] = [names.index(name) for name in row["annotated_classes"]]
        references.append(reference)
    return references


def _segmentation(model, processor, rows: Sequence[Row], batches) -> dict[str, Any]:
    counts = []
    for batch in batches:
        output = model(task="segmentation", **_inputs(model, batch))
        masks = processor.image_processor.post_process_semantic_segmentation(
            output,
            target_sizes=batch["target_sizes"],
            pixel_mask=batch["pixel_mask"],
            threshold=model.config.segmentation_threshold,
        )
        for index, mask in zip(batch["row_indices"], masks):
            true = torch.from_numpy(read_mask(rows[index]["mask"]))
            if true.shape != mask.shape:
                # Very large images are reduced on opening; the mask follows.
                true = torch.nn.functional.interpolate(true[None, None].float(), size=mask.shape)[0, 0]
            counts.append(mask_counts(mask.cpu().numpy(), true.numpy()))
    return dice_scores(counts)


def _single_cell(model, batches) -> dict[str, Any]:
    predicted, true = [], []
    for batch in batches:
        predicted += model(task="single_cell", **_inputs(model, batch)).logits.argmax(-1).tolist()
        true += batch["labels"].tolist()
    return classification_scores(predicted, true, model.config.single_cell_labels)


def _language(model, processor, task: str, rows: Sequence[Row], batches, generate_kwargs: dict) -> dict[str, Any]:
    options = {"max_new_tokens": processor.max_text_length, "num_beams": 1, "do_sample": False, **generate_kwargs}
    asked_key, answer_key = ("question", "answer") if task == "question_answering" else ("masked", "completed")
    asked, answers, expected = [], [], []
    for batch in batches:
        generated = model.generate(**_inputs(model, batch), **options)
        for index, answer in zip(batch["row_indices"], processor.decode_answers(generated), strict=True):
            # The places left over in an image's last sample repeat a question under index -1.
            if index >= 0:
                asked.append(rows[index][asked_key])
                answers.append(answer)
                expected.append(rows[index][answer_key])
    figures = text_scores(answers, expected)
    if task == "cloze":
        figures["blank_accuracy"] = blank_accuracy(answers, expected, asked)
    else:
        figures["per_question"] = {}
        for question, count in Counter(asked).most_common(LISTED_QUESTIONS):
            if count > 1:
                exact = [
                    normalise(answer) == normalise(other)
                    for text, answer, other in zip(asked, answers, expected)
                    if text == question
                ]
                figures["per_question"][question] = {"exact_match": sum(exact) / count, "texts": count}
    return figures


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
    names = _class_names(model)
    best_class, references = [], []
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for batch in _batches(model, processor, "detection", rows, batch_size, progress):
                output = model(task="detection", **_inputs(model, batch))
                best_class += _arrays(
                    processor.image_processor.post_process_object_detection(output, 0.0, batch["target_sizes"])
                )
                references += _references(batch, rows, names)
    finally:
        model.train(was_training)
    return _best_thresholds(best_class, references, names)


def headline(report: Mapping[str, Any]) -> tuple[float, str]:
    """Mean of the tasks' main figures, and those figures as text."""
    figures = {task: report[task].get(name) for task, name in HEADLINES.items() if task in report}
    known = [value for value in figures.values() if value is not None]
    text = ", ".join(
        f"{task} {HEADLINES[task]} {'none' if value is None else format(value, '.3f')}"
        for task, value in figures.items()
    )
    return (float(np.mean(known)) if known else float("-inf")), text


def write_report(report: Mapping[str, Any], folder: str | Path, name: str = "metrics") -> None:
    """Writes a report as JSON and as a Markdown table.

    Args:
        report (`Mapping[str, Any]`): Of `evaluate_model`.
        folder (`str` or `Path`): Where.
        name (`str`): File name without its ending.
    """
    folder = Path(folder)
    write_json(folder / f"{name}.json", report)
    lines = ["| task | figure | value |", "|---|---|---|"]
    for task, figures in report.items():
        for figure, value in _flat(figures):
            shown = f"{value:.4f}" if isinstance(value, float) else value
            lines.append(f"| {task} | {figure} | {shown} |")
    write_text(folder / f"{name}.md", "\n".join(lines) + "\n")


def _flat(figures: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in figures.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name} / ")
        elif not isinstance(value, (list, tuple, np.ndarray)):
            yield f"{prefix}{name}", value
