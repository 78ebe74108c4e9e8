"""A model measured under every corruption and severity, point by point, so that a stopped run goes on where it was."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from unihema.errors import InputError
from unihema.modeling_unihema.tasks import IMAGE_TASKS
from unihema.results.out_of_distribution import ModelReference, image_scores, set_out_of_distribution
from unihema.results.smear_result import SmearResult
from unihema.training.data.rows import Row
from unihema.training.evaluation import HEADLINES, draw_rows, evaluate_model
from unihema.training.files import write_json
from unihema.training.studies.corruptions import CORRUPTIONS, LEVELS
from unihema.training.studies.shifted_rows import shifted_rows
from unihema.training.studies.stress_report import write_stress_report


STRESS_TASKS = IMAGE_TASKS
STRESS_FILE = "stress.json"
CLEAN = "clean"


def run_stress(
    model: Any,
    processor: Any,
    rows_by_task: Mapping[str, Sequence[Row]],
    output: str | Path,
    corruptions: Sequence[str] | None = None,
    severities: Sequence[int] | None = None,
    max_samples: int | None = None,
    batch_size: int = 8,
    bootstrap: int = 200,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: bool = True,
    reference: ModelReference | None = None,
) -> dict[str, Any]:
    """Measures a model on corrupted images, with the figures of `evaluate_model`.

    Args:
        model ([`UniHemaForMultiTask`] or a model with one head): The model.
        processor ([`UniHemaProcessor`]): Its processor.
        rows_by_task (`Mapping[str, Sequence[Row]]`): Task -> rows, of `STRESS_TASKS`.
        output (`str` or `Path`): Folder for `stress.json`, `stress.md` and, where matplotlib is installed, `stress.png` and
            `stress_counts.png`.
        corruptions (`Sequence[str]`, *optional*): Among `CORRUPTIONS`; all of them when missing.
        severities (`Sequence[int]`, *optional*): Among 1 to `LEVELS`; all when missing. Clean images always come first.
        max_samples (`int`, *optional*): About so many rows of a task, the same for every point, drawn by `seed`.
        batch_size (`int`): Images at once.
        bootstrap (`int`): Resamples of the images for the interval of the main figure; 0 for none.
        seed (`int`): Of the draw and the resamples.
        settings (`Mapping[str, Any]`, *optional*): What else decides the figures, such as the checkpoint's SHA-256.
        overwrite (`bool`): Measure everything again.
        progress (`bool`): Show a progress bar.
        reference ([`ModelReference`], *optional*): What the images it was trained on are like.

    Returns:
        `dict`: `settings` and `points`: each with `task`, `corruption`, `severity`, `amount`, `unit`, the figures, and
        `warned`, the part of the images that `unihema predict` would warn of, where there is a reference.

    Raises:
        ValueError: Unknown corruption, severity or task, or the folder holds a run with other settings.
    """
    points = _asked(rows_by_task, corruptions, severities)
    settings = {**(settings or {}), "max_samples": max_samples, "bootstrap": bootstrap, "seed": seed}
    report = {"settings": settings, "points": []} if overwrite else _begun(Path(output), settings)
    done = {(point["task"], point["corruption"], point["severity"]) for point in report["points"]}
    rows = {task: draw_rows(found, max_samples, seed) for task, found in rows_by_task.items()}
    try:
        for task, corruption, severity in tqdm(points, desc="stress", unit="point", disable=not progress):
            if (task, corruption, severity) in done:
                continue
            kind = CORRUPTIONS.get(corruption)
            changed = rows[task] if kind is None else shifted_rows(rows[task], kind, severity)
            if not changed:
                continue
            point = {"task": task, "corruption": corruption, "severity": severity}
            if kind is not None:
                point |= {"amount": kind.amounts[severity - 1], "unit": kind.unit}
            options = {"batch_size": batch_size, "bootstrap": bootstrap, "seed": seed}
            figures = _measured(model, processor, task, changed, reference, **options)
            report["points"].append(point | figures)
            write_json(Path(output) / STRESS_FILE, report)
    finally:
        # Also of a run that is stopped.
        if report["points"]:
            write_stress_report(report, output)
    return report


def _asked(
    rows_by_task: Mapping[str, Any], corruptions: Sequence[str] | None, severities: Sequence[int] | None
) -> list[tuple[str, str, int]]:
    """Task, corruption and severity of each point, clean ones first."""
    names = list(CORRUPTIONS) if corruptions is None else list(dict.fromkeys(corruptions))
    levels = range(1, LEVELS + 1) if severities is None else sorted(set(severities) - {0})
    for name in names:
        if name not in CORRUPTIONS:
            raise InputError(f"Unknown corruption {name!r}; choose among {', '.join(CORRUPTIONS)}.")
    for level in levels:
        if not 1 <= level <= LEVELS:
            raise InputError(f"Severities go from 0 (as it is) to {LEVELS}, got {level}.")
    for task in rows_by_task:
        if task not in STRESS_TASKS:
            raise InputError(f"{task} is not measured under corruptions; choose among {', '.join(STRESS_TASKS)}.")
    points = [(task, CLEAN, 0) for task in rows_by_task]
    points += [(task, name, level) for name in names for level in levels for task in rows_by_task]
    # Density is the number of cells in a field.
    return [point for point in points if point[1] != "density" or point[0] == "detection"]


def _begun(output: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What an earlier run left, if it was the same.

    Raises:
        ValueError: It was another one, or its file cannot be read.
    """
    path = output / STRESS_FILE
    if not path.is_file():
        return {"settings": dict(settings), "points": []}
    remedy = "Name another --output, or add --overwrite to measure everything again."
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        begun = report["settings"]
        report["points"] = list(report["points"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: cannot be read ({error}). {remedy}") from error
    other = [name for name in {**begun, **settings} if begun.get(name) != settings.get(name)]
    if other:
        raise InputError(f"{path} was measured with another {', '.join(other)}. {remedy}")
    return report


def _measured(
    model, processor, task: str, rows: Sequence[Row], reference: ModelReference | None, **options: Any
) -> dict[str, Any]:
    if reference is None or task not in reference.tasks:
        return _figures(task, evaluate_model(model, processor, {task: rows}, progress=False, **options)[task])
    warned = []

    def compare(features, pixels) -> None:
        for pooled, quality in zip(*image_scores(features, pixels, processor), strict=True):
            result = SmearResult(1, 1)
            set_out_of_distribution(reference.tasks[task], pooled, quality.tolist(), result)
            warned.append(bool(result.warnings))

    found = evaluate_model(model, processor, {task: rows}, progress=False, on_features=compare, **options)[task]
    return _figures(task, found) | {"warned": float(np.mean(warned))}


def _figures(task: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """What of a task's figures is compared."""
    headline = HEADLINES[task]
    kept = {"images": found["images"], "rows": found["rows"], "figure": headline, "value": found[headline]}
    if limits := (found.get("intervals") or {}).get(headline):
        kept["interval"] = limits
    if task == "detection":
        kept["mAP"] = found["mAP"]
        kept["AP50"] = {name: values["AP50"] for name, values in found["per_class"].items() if values["cells"]}
        kept["count_error"] = {
            name: values["count_error"] for name, values in found["at_threshold"].items() if values["counted_fields"]
        }
    if "datasets" in found:
        kept["datasets"] = {name: part[headline] for name, part in found["datasets"].items()}
    return kept


__all__ = ["STRESS_FILE", "STRESS_TASKS", "run_stress"]
