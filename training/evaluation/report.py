"""A report in files, and its main figures in a line."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unihema.errors import CheckpointError
from unihema.files import read_json_object, shortened, write_json, write_text
from unihema.modeling_unihema.tasks import TASK_TABLE, check_task


# The figure that stands for a task: in progress messages, and to choose the best evaluation of a run.
HEADLINES = {name: task.headline for name, task in TASK_TABLE.items()}
_BESIDES = ("intervals", "datasets", "groups", "bootstrap")


def headline(report: Mapping[str, Any]) -> tuple[float, str]:
    """Mean of the tasks' main figures, and those figures as text."""
    figures = {task: report[task].get(name) for task, name in HEADLINES.items() if task in report}
    known = [value for value in figures.values() if value is not None]
    text = ", ".join(
        f"{task} {HEADLINES[task]} {'none' if value is None else format(value, '.3f')}"
        for task, value in figures.items()
    )
    return (float(np.mean(known)) if known else float("-inf")), text


def figures_text(figures: Mapping[str, Any]) -> str:
    """The main figures of a task of an evaluation report and their intervals, such as `mAP50 0.824 (0.790 to 0.851), mAP
    0.512 (0.480 to 0.538), morphology macro_f1 0.781 (0.722 to 0.823)`."""
    shown = {name: value for name, value in figures.items() if isinstance(value, float)}
    morphology = figures.get("morphology", {}).get("macro_f1")
    if morphology is not None:
        shown["morphology macro_f1"] = morphology
    for part in ("kinds", "types"):
        if part in figures:
            shown[f"{part} accuracy"] = figures[part]["accuracy"]
    intervals = figures.get("intervals") or {}
    return (
        ", ".join(_figure_text(name, value, intervals.get(name)) for name, value in shown.items())
        or "nothing to measure"
    )


def _figure_text(name: str, value: float, interval: Sequence[float] | None) -> str:
    return f"{name} {value:.3f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")


def read_figures(path: Path) -> dict[str, dict[str, Any]]:
    """The report that [`write_report`] wrote.

    Args:
        path (`Path`): `metrics.json`.

    Raises:
        CheckpointError: The file cannot be read, or holds something else.
    """
    remedy = "Delete it, and measure again."
    report = read_json_object(path, CheckpointError, remedy)
    try:
        for task, figures in report.items():
            check_task(task)
            for part in (figures, *parts_of(figures).values()):
                figures_text(part)
        report_lines(report)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: not figures of an evaluation ({shortened(repr(error), 100)}). {remedy}"
        ) from error
    return report


def write_report(report: Mapping[str, Any], folder: str | Path, name: str = "metrics") -> None:
    """Writes a report as JSON and as Markdown: the main figures of each task and data set, then every figure.

    Args:
        report (`Mapping[str, Any]`): Of `evaluate_model`.
        folder (`str` or `Path`): Where.
        name (`str`): File name without its ending.
    """
    folder = Path(folder)
    write_json(folder / f"{name}.json", report)
    write_text(folder / f"{name}.md", "\n".join(report_lines(report)) + "\n")


def unlike_text(figures: Mapping[str, Any]) -> str:
    """What [`Distances`] found, in a line."""
    warned = ", ".join(f"{100 * share:.1f} % of {name}" for name, share in figures["warned"].items())
    if "auc" not in figures:
        return f"warned of {warned}"
    at = 100 * figures["warned_at_1_percent"]
    return f"AUC {figures['auc']:.3f}, {at:.1f} % of images from elsewhere at 1 % false alarms; warned of {warned}"


def parts_of(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of each group of sources, and of each data set."""
    return {**figures.get("groups", {}), **figures.get("datasets", {})}


def report_lines(report: Mapping[str, Any]) -> list[str]:
    """The lines of a report in Markdown."""
    lines = ["| task | data | images | rows | main figure | value | interval |", "|---|---|---|---|---|---|---|"]
    details = ["| task | figure | value | interval |", "|---|---|---|---|"]
    notes = []
    for task, figures in report.items():
        for data, part in {"all": figures, **parts_of(figures)}.items():
            figure = HEADLINES.get(task, "")
            shown = (data, part.get("images", ""), part.get("rows", ""), figure, _shown(part.get(figure)))
            lines.append(f"| {task} | {' | '.join(map(str, shown))} | {_interval(part, figure)} |")
            where = task if part is figures else f"{task}, {data}"
            for path, value in _flat(part):
                interval = _interval(part, path.replace(" / ", " "))
                details.append(f"| {where} | {path} | {_shown(value)} | {interval} |")
        if made := figures.get("bootstrap"):
            notes.append(
                f"Intervals of {task}: {made['level']:.0%}, percentiles of {made['draws']} resamples of its images "
                f"(seed {made['seed']})."
            )
    return [*lines, "", *(line for note in notes for line in (note, "")), *details]


def _shown(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _interval(figures: Mapping[str, Any], name: str) -> str:
    limits = (figures.get("intervals") or {}).get(name)
    return f"{limits[0]:.4f} to {limits[1]:.4f}" if limits else ""


def _flat(figures: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in figures.items():
        if not prefix and name in _BESIDES:
            continue
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name} / ")
        elif not isinstance(value, (list, tuple, np.ndarray)):
            yield f"{prefix}{name}", value
