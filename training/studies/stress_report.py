"""A stress run as tables and curves."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from unihema.training.files import write_text
from unihema.training.studies.corruptions import CORRUPTIONS, LEVELS


Point = Mapping[str, Any]
_COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#8172b3", "#937860", "#c44e52")
_COLUMNS = 4


def write_stress_report(report: Mapping[str, Any], folder: str | Path) -> None:
    """Writes `stress.md` and, where matplotlib is installed, `stress.png` and `stress_counts.png`.

    Args:
        report (`Mapping[str, Any]`): Of `run_stress`.
        folder (`str` or `Path`): Where.
    """
    folder = Path(folder)
    write_text(folder / "stress.md", "\n".join(_lines(report)) + "\n")
    _plot(report["points"], folder / "stress.png", _main_curves, "figure, and part of images warned of (dotted)")
    _plot(report["points"], folder / "stress_counts.png", _count_curves, "median error of a field's count")


def _lines(report: Mapping[str, Any]) -> list[str]:
    settings = {name: value for name, value in report["settings"].items() if value is not None}
    shown = (f"{name} {_told(value)}" for name, value in settings.items())
    lines = ["# Measured under corruptions", "", f"Written by `unihema evaluate --corruption`: {'; '.join(shown)}.", ""]
    points = report["points"]
    for task in dict.fromkeys(point["task"] for point in points):
        own = [point for point in points if point["task"] == task]
        clean = own[0]
        lines += [f"## {task}: {clean['figure']}", "", f"{clean['images']} images, {clean['rows']} rows.", ""]
        lines += _table(own, lambda point: point["value"])
        for name in clean.get("datasets", ()):
            lines += [f"{name}:", "", *_table(own, lambda point, name=name: point.get("datasets", {}).get(name))]
        for name in clean.get("count_error", ()):
            lines += [f"Count error, {name} (median over fields of the error as part of the true count):", ""]
            lines += _table(own, lambda point, name=name: point["count_error"].get(name))
        if any("warned" in point for point in own):
            lines += ["Part of the images that `unihema predict` warns of:", ""]
            lines += _table(own, lambda point: point.get("warned"))
    lines += ["## Severities", "", f"| corruption | unit | {' | '.join(map(str, range(1, LEVELS + 1)))} |"]
    lines.append("|---|---|" + "---|" * LEVELS)
    lines += [
        f"| {kind.name} | {kind.unit} | {' | '.join(f'{amount:g}' for amount in kind.amounts)} |"
        for kind in CORRUPTIONS.values()
    ]
    return lines


def _told(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"`{name}` {of}" for name, of in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _table(points: Sequence[Point], value: Callable[[Point], float | None]) -> list[str]:
    """A row for each corruption, a column for each severity; an empty table is none."""
    by_place = {(point["corruption"], point["severity"]): value(point) for point in points}
    clean = by_place.get(("clean", 0))
    lines = [f"| corruption | 0 | {' | '.join(map(str, range(1, LEVELS + 1)))} |", "|---|" + "---|" * (LEVELS + 1)]
    for name in dict.fromkeys(point["corruption"] for point in points if point["severity"]):
        values = [clean, *(by_place.get((name, level)) for level in range(1, LEVELS + 1))]
        lines.append(f"| {name} | {' | '.join('' if v is None else f'{v:.3f}' for v in values)} |")
    return [*lines, ""]


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


def _plot(points: Sequence[Point], path: Path, curves_of: Callable, title: str) -> None:
    """A panel for each corruption."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    names = list(dict.fromkeys(point["corruption"] for point in points if point["severity"]))
    if not names or not curves_of(points):
        return
    rows = math.ceil(len(names) / _COLUMNS)
    plot = Figure(figsize=(3 * _COLUMNS, 2.4 * rows + 0.8), layout="constrained")
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
    partial = path.with_name(f".{path.name}.partial.png")
    plot.savefig(partial, dpi=110)
    partial.replace(path)


__all__ = ["write_stress_report"]
