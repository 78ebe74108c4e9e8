"""What the ablations say: `ablation.json`, a table and a plot."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unihema.errors import RunConfigError
from unihema.training.files import write_json, write_text
from unihema.training.studies.ablations import Ablation


REPORT_FILE = "ablation.json"


@dataclass(frozen=True)
class Comparison:
    """An ablation beside the whole model.

    Args:
        ablation ([`Ablation`]): The question.
        whole (`Mapping[str, Any]`): Evaluation report of the whole model.
        changed (`Mapping[str, Any]`): That of the ablation.
        on (`str`, *optional*): The data set that both were measured on; the validation split of all when not given.
    """

    ablation: Ablation
    whole: Mapping[str, Any]
    changed: Mapping[str, Any]
    on: str | None = None

    def rows(self) -> list[dict[str, Any]]:
        """A row for each figure that both reports have; values in the figure's own unit."""
        found = []
        for task, figure in self.ablation.figures:
            whole, changed = self.whole.get(task, {}), self.changed.get(task, {})
            values = whole.get(figure), changed.get(figure)
            if None in values:
                continue
            found.append(
                {
                    "ablation": self.ablation.name,
                    "task": task,
                    "figure": figure,
                    "on": self.on,
                    "rows": changed.get("rows"),
                    "whole": values[0],
                    "changed": values[1],
                    "difference": values[1] - values[0],
                    "whole_interval": (whole.get("intervals") or {}).get(figure),
                    "changed_interval": (changed.get("intervals") or {}).get(figure),
                }
            )
        return found


class AblationReport:
    """The comparisons so far, in the folder of the runs.

    Args:
        folder (`Path`): Where.

    Raises:
        RunConfigError: An earlier `ablation.json` cannot be read.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        path = folder / REPORT_FILE
        self.content: dict[str, Any] = {"questions": {}, "comparisons": []}
        if path.is_file():
            try:
                self.content |= json.loads(path.read_text(encoding="utf-8"))
            except (ValueError, TypeError) as error:
                raise RunConfigError(f"{path}: cannot be read ({error}). Delete it; it is written anew.") from error

    def add(self, comparison: Comparison) -> None:
        """Takes in a finished ablation, in place of an earlier account of it, and writes `ablation.json`, `ablation.md` and,
        where matplotlib is installed, `ablation.png`."""
        name = comparison.ablation.name
        self.content["questions"][name] = comparison.ablation.asks
        others = [r for r in self.content["comparisons"] if (r["ablation"], r["on"]) != (name, comparison.on)]
        self.content["comparisons"] = others + comparison.rows()
        write_json(self.folder / REPORT_FILE, self.content)
        write_text(self.folder / "ablation.md", self.table())
        _plot(self.content["comparisons"], self.folder / "ablation.png")

    def table(self) -> str:
        """Markdown: the questions, and a row for each figure."""
        lines = [
            "| ablation | task | figure | rows | whole model | changed | difference |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in self.content["comparisons"]:
            name = row["ablation"] + (f" ({row['on']})" if row["on"] else "")
            values = [_value(row[key], row[f"{key}_interval"]) for key in ("whole", "changed")]
            cells = (name, row["task"], row["figure"], row["rows"], *values, f"{row['difference']:+.3f}")
            lines.append(f"| {' | '.join(map(str, cells))} |")
        lines += ["", *(f"- {name}: {asks}" for name, asks in self.content["questions"].items()), ""]
        lines.append(
            "In brackets: 95 % interval, from resamples of the validation images. One training run each, so what"
        )
        lines.append("another seed would change is not in it.")
        return "\n".join(lines) + "\n"


def _value(value: float, interval: list[float] | None) -> str:
    return f"{value:.3f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")


def _plot(comparisons: list[dict[str, Any]], path: Path) -> None:
    """A pair of bars for each figure; figures in 0..100 are drawn in 0..1."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    if not comparisons:
        return
    plot = Figure(figsize=(8, 1.2 + 0.55 * len(comparisons)), layout="constrained")
    axes = plot.add_subplot()
    places = range(len(comparisons))
    for shift, key, colour in ((-0.2, "whole", "#4c72b0"), (0.2, "changed", "#dd8452")):
        values, errors = [], []
        for row in comparisons:
            unit = 100 if row["figure"].startswith("bleu") else 1
            low, high = row[f"{key}_interval"] or (math.nan, math.nan)
            values.append(row[key] / unit)
            errors.append([max(row[key] - low, 0) / unit, max(high - row[key], 0) / unit])
        label = "whole model" if key == "whole" else "changed"
        axes.barh([place + shift for place in places], values, 0.38, color=colour, label=label)
        axes.errorbar(
            values,
            [place + shift for place in places],
            xerr=list(zip(*errors)),
            fmt="none",
            ecolor="#333333",
            elinewidth=1,
        )
    axes.set_yticks(list(places), [f"{row['ablation']}: {row['task']} {row['figure']}" for row in comparisons])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    plot.legend(loc="outside lower right", ncols=2)
    partial = path.with_name(f".{path.name}.partial.png")
    plot.savefig(partial, dpi=120)
    partial.replace(path)


__all__ = ["AblationReport", "Comparison"]
