"""What an adapter has gained on a lab's images and what it has forgotten of the base's."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unihema.errors import DatasetError
from unihema.loading import available_tasks, load_model
from unihema.training.data.class_tree import as_known, row_names
from unihema.training.data.rows import Row
from unihema.training.evaluation import HEADLINES, evaluate_model
from unihema.training.evaluation.class_agnostic import class_agnostic_precision
from unihema.training.files import write_json, write_text
from unihema.training.run.build import build, load_rows, training_rows, validation_rows
from unihema.training.run.config import DataConfig, RunConfig


_NAME = "before_after"
_ANY_CLASS = "mAP50 of boxes, whatever their class"


class BeforeAfter:
    """Measures a base, and then its adapter, on the same images.

    On the lab's validation images: the task's main figure of the base, where it has all of the lab's classes, and of the
    adapter before its first step (`start`) and after its last; for detection also how well boxes fit whatever their class,
    which is what a base can do with classes that it has never been taught. On the base's: the same figures of the base,
    with the adapter switched off (which must not change them) and with it on (what the adapter has forgotten).

    Args:
        config ([`RunConfig`]): The run that trains the adapter.
        base_data (`str` or `Path`, *optional*): Data folder of the base.
    """

    def __init__(self, config: RunConfig, base_data: str | Path | None = None):
        self.config = config
        self.progress = config.logging.progress
        self.device = "cpu" if config.optimisation.device == "cpu" else None
        self.rows = validation_rows(config, config.data.tasks)
        self.base_rows: dict[str, list[Row]] = {}
        self.base_data = None if base_data is None else str(base_data)
        self.folds: list[dict[str, Any]] = []
        self.lab: dict[str, dict[str, float | None]] = {}
        self.forgotten: dict[str, dict[str, float | None]] = {}

    def measure_base(self) -> None:
        """Before training. The model is loaded and let go again.

        Raises:
            DatasetError: `base_data` has nothing that the base was trained on.
        """
        from accelerate.utils import set_seed

        model, processor = load_model(self.config.model.initial_checkpoint, self.device)
        known = available_tasks(model)
        if self.base_data is not None:
            self.base_rows = load_rows(DataConfig(folders=[self.base_data]), "val", list(known))
            self.base_rows = {
                task: as_known(rows, names) if (names := _names(model, task)) else rows
                for task, rows in self.base_rows.items()
            }
            odd = [task for task, rows in self.base_rows.items() if not _knows(model, task, rows)]
            if odd:
                raise DatasetError(f"{self.base_data}: its {odd[0]} classes are not those of the base.")
        for task, rows in self.rows.items():
            self.lab[task] = {"before": self._figure(model, processor, task, rows) if task in known else None}
        self._boxes(self.lab, self.rows, model, processor, "before", known)
        if self.rows:
            # The heads that the run will draw.
            set_seed(self.config.optimisation.seed)
            starting, its_processor = build(self.config, training_rows(self.config))
            starting.to(model.device)
            for task, rows in self.rows.items():
                self.lab[task]["start"] = self._figure(starting, its_processor, task, rows)
        for task, rows in self.base_rows.items():
            self.forgotten[task] = {"before": self._figure(model, processor, task, rows)}
        self._boxes(self.forgotten, self.base_rows, model, processor, "before", known)

    def measure_adapter(self) -> None:
        """After training, with the adapter in the run's output folder."""
        model, processor = load_model(self.config.output_dir, self.device)
        for task, rows in self.rows.items():
            self.lab[task]["after"] = self._figure(model, processor, task, rows)
        self._boxes(self.lab, self.rows, model, processor, "after", list(self.rows))
        if not self.base_rows:
            return
        for task, rows in self.base_rows.items():
            self.forgotten[task]["adapter on"] = self._figure(model, processor, task, rows)
        self._boxes(self.forgotten, self.base_rows, model, processor, "adapter on", list(self.base_rows))
        model.disable_adapters()
        _, processor = load_model(self.config.model.initial_checkpoint, self.device)
        for task, rows in self.base_rows.items():
            self.forgotten[task]["adapter off"] = self._figure(model, processor, task, rows)
        self._boxes(self.forgotten, self.base_rows, model, processor, "adapter off", list(self.base_rows))

    def _figure(self, model: Any, processor: Any, task: str, rows: Sequence[Row]) -> float | None:
        """The task's main figure; `None` where the model lacks classes of the rows."""
        rows = as_known(rows, names) if (names := _names(model, task)) else rows
        if not _knows(model, task, rows):
            return None
        report = evaluate_model(model, processor, {task: rows}, progress=self.progress, bootstrap=0)
        return report[task].get(HEADLINES[task])

    def _boxes(self, found, rows: Mapping[str, Sequence[Row]], model, processor, when: str, known) -> None:
        if "detection" in rows and "detection" in known:
            figures = class_agnostic_precision(model, processor, rows["detection"], progress=self.progress)
            found.setdefault(_ANY_CLASS, {})[when] = figures["mAP50"]

    def to_dict(self) -> dict[str, Any]:
        """What `before_after.json` has: `lab` and `base` (row -> figure), `folds`, and what was measured on."""
        return {
            "lab": {"data": self.config.data.folders, "rows": _counts(self.rows), "figures": self.lab},
            "base": {"data": self.base_data, "rows": _counts(self.base_rows), "figures": self.forgotten},
            "folds": [
                {"fold": run["fold"], "best_step": run["best_step"], **_headlines(run["report"])} for run in self.folds
            ],
        }

    def write(self) -> dict[str, Any]:
        """Writes `before_after.json` and `before_after.md` beside the adapter.

        Returns:
            `dict[str, Any]`: As `to_dict`.
        """
        folder, values = Path(self.config.output_dir), self.to_dict()
        write_json(folder / f"{_NAME}.json", values)
        write_text(folder / f"{_NAME}.md", "\n".join(before_after_lines(values)) + "\n")
        return values


def before_after_lines(values: Mapping[str, Any]) -> list[str]:
    """The tables of `before_after.md`.

    Args:
        values (`Mapping[str, Any]`): As `BeforeAfter.to_dict` gives them.
    """
    lines = _table("The lab's validation images", values["lab"], ("before", "start", "after"))
    if not values["lab"]["rows"]:
        lines = ["Nothing was set aside to measure the adapter on; see the folds."]
    if values["base"]["data"] is not None:
        lines += ["", *_table("The base's validation images", values["base"], ("before", "adapter off", "adapter on"))]
    if values["folds"]:
        names = [name for name in values["folds"][0] if name not in ("fold", "best_step")]
        lines += ["", f"| fold | best step | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
        for run in values["folds"]:
            shown = " | ".join(_shown(run[name]) for name in names)
            lines.append(f"| {run['fold']} | {run['best_step']} | {shown} |")
        for name in names:
            found = [run[name] for run in values["folds"] if run[name] is not None]
            if len(found) > 1:
                spread = f"{statistics.mean(found):.3f}, standard deviation {statistics.stdev(found):.3f}"
                lines += ["", f"{name} over {len(found)} folds: mean {spread}."]
    return lines


def _table(title: str, part: Mapping[str, Any], columns: Sequence[str]) -> list[str]:
    counts = ", ".join(f"{count} {task}" for task, count in part["rows"].items())
    lines = [f"{title} ({counts} rows):", "", f"| figure | {' | '.join(columns)} | change |"]
    lines.append("|---" * (len(columns) + 2) + "|")
    for name, figures in part["figures"].items():
        label = f"{name} {HEADLINES[name]}" if name in HEADLINES else name
        known = [figures[column] for column in columns if figures.get(column) is not None]
        first, last = (known[0] if len(known) > 1 else None), figures.get(columns[-1])
        change = "" if first is None or last is None else f"{last - first:+.3f}"
        lines.append(f"| {label} | {' | '.join(_shown(figures.get(column)) for column in columns)} | {change} |")
    return lines


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _counts(rows: Mapping[str, Sequence[Row]]) -> dict[str, int]:
    return {task: len(found) for task, found in rows.items()}


def _headlines(report: Mapping[str, Any]) -> dict[str, float | None]:
    return {f"{task} {HEADLINES[task]}": figures.get(HEADLINES[task]) for task, figures in report.items()}


def _names(model: Any, task: str) -> list[str]:
    if task == "detection":
        return [model.config.id2label[index] for index in range(model.config.num_labels)]
    return list(model.config.single_cell_labels) if task == "single_cell" else []


def _knows(model: Any, task: str, rows: Sequence[Row]) -> bool:
    names = _names(model, task)
    return not names or {name for row in rows for name in row_names(row)} <= set(names)


__all__ = ["BeforeAfter", "before_after_lines"]
