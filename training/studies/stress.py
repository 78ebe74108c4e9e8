"""Measures a checkpoint under corruptions, with the figures of an ordinary evaluation, as tables and curves."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unihema.errors import InputError
from unihema.modeling_unihema.tasks import IMAGE_TASKS
from unihema.results.out_of_distribution import ModelReference, image_scores, set_out_of_distribution
from unihema.results.smear_result import SmearResult
from unihema.training.data.rows import Row
from unihema.training.evaluation import HEADLINES, draw_rows, evaluate_model
from unihema.training.studies.corruptions import CORRUPTIONS, LEVELS, shifted_rows
from unihema.training.studies.study import Plot, Report, Run, run_study, shown, table


STRESS_TASKS = IMAGE_TASKS
CLEAN = "clean"
Point = Mapping[str, Any]
_COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#8172b3", "#937860", "#c44e52")
_COLUMNS = 4


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
        overwrite (`bool`): Measure everything again; otherwise points that are in the folder stay.
        progress (`bool`): Show a progress bar.
        reference ([`ModelReference`], *optional*): What the images it was trained on are like.

    Returns:
        `dict`: `settings` and `points`: each with `task`, `corruption`, `severity`, `amount`, `unit`, the figures, and
        `warned`, the part of the images that `unihema predict` would warn of, where there is a reference.

    Raises:
        ValueError: Unknown corruption, severity or task, a corruption that none of the tasks has, or the folder has points that
            were measured with other settings.
    """
    points = _asked(rows_by_task, corruptions, severities)
    settings = {**(settings or {}), "max_samples": max_samples, "bootstrap": bootstrap, "seed": seed}
    rows = {task: draw_rows(found, max_samples, seed) for task, found in rows_by_task.items()}

    def measure(task: str, corruption: str, severity: int) -> Point | None:
        kind = CORRUPTIONS.get(corruption)
        changed = rows[task] if kind is None else shifted_rows(rows[task], kind, severity)
        if not changed:
            return None
        point = {"task": task, "corruption": corruption, "severity": severity}
        if kind is not None:
            point |= {"amount": kind.amounts[severity - 1], "unit": kind.unit}
        options = {"batch_size": batch_size, "bootstrap": bootstrap, "seed": seed}
        return point | _measured(model, processor, task, changed, reference, **options)

    runs = [Run(" ".join(map(str, point)), {}, lambda _, point=point: measure(*point)) for point in points]
    found = run_study(
        output,
        "stress",
        runs,
        lambda found: _report(settings, list(found.values())),
        settings,
        resume=True,
        overwrite=overwrite,
        progress=progress,
    )
    return {"settings": settings, "points": list(found.values())}


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
    if corruptions is not None and "density" in corruptions and "detection" not in rows_by_task:
        raise InputError("The corruption density is of fields of cells: it is measured where detection is.")
    # Density is the number of cells in a field.
    return [point for point in points if point[1] != "density" or point[0] == "detection"]


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


def _report(settings: Mapping[str, Any], points: Sequence[Point]) -> Report:
    plots = {
        "stress.png": _plot(points, _main_curves, "figure, and part of images warned of (dotted)"),
        "stress_counts.png": _plot(points, _count_curves, "median error of a field's count"),
    }
    return Report({}, _lines(settings, points), {name: plot for name, plot in plots.items() if plot})


def _lines(settings: Mapping[str, Any], points: Sequence[Point]) -> list[str]:
    settings = {name: value for name, value in settings.items() if value is not None}
    shown = (f"{name} {_told(value)}" for name, value in settings.items())
    lines = ["# Measured under corruptions", "", f"Written by `unihema evaluate --corruption`: {'; '.join(shown)}.", ""]
    for task in dict.fromkeys(point["task"] for point in points):
        own = [point for point in points if point["task"] == task]
        clean = own[0]
        lines += [f"## {task}: {clean['figure']}", "", f"{clean['images']} images, {clean['rows']} rows.", ""]
        lines += _severities(own, lambda point: point["value"])
        for name in clean.get("datasets", ()):
            lines += [f"{name}:", "", *_severities(own, lambda point, name=name: point.get("datasets", {}).get(name))]
        for name in clean.get("count_error", ()):
            lines += [f"Count error, {name} (median over fields of the error as part of the true count):", ""]
            lines += _severities(own, lambda point, name=name: point["count_error"].get(name))
        if any("warned" in point for point in own):
            lines += ["Part of the images that `unihema predict` warns of:", ""]
            lines += _severities(own, lambda point: point.get("warned"))
    amounts = [(kind.name, kind.unit, *(f"{amount:g}" for amount in kind.amounts)) for kind in CORRUPTIONS.values()]
    return [*lines, "## Severities", "", *table(("corruption", "unit", *range(1, LEVELS + 1)), amounts)]


def _told(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"`{name}` {of}" for name, of in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _severities(points: Sequence[Point], value: Callable[[Point], float | None]) -> list[str]:
    """A row for each corruption, a column for each severity; an empty table is none."""
    by_place = {(point["corruption"], point["severity"]): value(point) for point in points}
    clean = by_place.get((CLEAN, 0))
    rows = [
        (name, shown(clean), *(shown(by_place.get((name, level))) for level in range(1, LEVELS + 1)))
        for name in dict.fromkeys(point["corruption"] for point in points if point["severity"])
    ]
    return [*table(("corruption", *range(LEVELS + 1)), rows), ""]


def _main_curves(points: Sequence[Point]) -> dict[str, list[tuple[int, float | None, Sequence[float] | None]]]:
    """Curve -> severity, value and interval: of each task, and of the part of its images that is warned of."""
    curves: dict[str, list] = {}
    for point in points:
        curves.setdefault(f"{point['task']}, {point['figure']}", []).append(
            (point["severity"], point["value"], point.get("interval"))
        )
        if "warned" in point:
            curves.setdefault(f"{point['task']}, warned of", []).append((point["severity"], point["warned"], None))
    return curves


def _count_curves(points: Sequence[Point]) -> dict[str, list[tuple[int, float | None, Sequence[float] | None]]]:
    curves: dict[str, list] = {}
    for point in points:
        for name, error in point.get("count_error", {}).items():
            curves.setdefault(name, []).append((point["severity"], error, None))
    return curves


def _plot(points: Sequence[Point], curves_of: Callable, title: str) -> Plot | None:
    """A panel for each corruption."""
    names = list(dict.fromkeys(point["corruption"] for point in points if point["severity"]))
    if not names or not curves_of(points):
        return None
    rows = math.ceil(len(names) / _COLUMNS)
    return Plot(3 * _COLUMNS, 2.4 * rows + 0.8, lambda plot: _draw(plot, points, names, rows, curves_of, title))


def _draw(plot: Any, points: Sequence[Point], names: Sequence[str], rows: int, curves_of: Callable, title: str) -> None:
    panels = plot.subplots(rows, _COLUMNS, sharex=True, sharey=True, squeeze=False).ravel()
    colours: dict[str, str] = {}
    for name, axes in zip(names, panels):
        curves = curves_of([point for point in points if point["corruption"] in ("clean", name)])
        for label, values in curves.items():
            values = [(severity, value, limits) for severity, value, limits in sorted(values, key=lambda v: v[0])]
            task = label.split(",")[0]
            colour = colours.setdefault(task, _COLOURS[len(colours) % len(_COLOURS)])
            drawn = [(severity, math.nan if value is None else value) for severity, value, _ in values]
            style = ":" if label.endswith("warned of") else "-"
            axes.plot(*zip(*drawn), style, color=colour, marker=".", label=label)
            bands = [(severity, *limits) for severity, _, limits in values if limits]
            if len(bands) > 1:
                axes.fill_between(*zip(*bands), color=colour, alpha=0.15, linewidth=0)
        axes.set_title(name.replace("_", " "), fontsize=9)
        axes.set_xticks(range(LEVELS + 1))
        axes.set_ylim(-0.03, 1.03)
        axes.grid(alpha=0.3)
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    handles = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels())}
    plot.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8)
    plot.suptitle(f"Severity against {title}", fontsize=10)


__all__ = ["STRESS_TASKS", "run_stress"]
