"""What each stage of a run gained and forgot: `stages.json` and `stages.md`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unihema.errors import RunConfigError
from unihema.training.evaluation import HEADLINES
from unihema.training.files import write_json, write_text
from unihema.training.run.config import RunConfig
from unihema.training.studies.stages import Stage


REPORT_FILE = "stages.json"
# How long a stage may go on and what it writes says nothing about what it has learned.
FREE = (
    "output_dir",
    "logging.",
    "optimisation.device",
    "data.workers",
    "data.cache_images",
    "model.initial_checkpoint",
)


class StageReport:
    """The finished stages of a run, kept in its folder.

    Args:
        folder (`Path`): The folder of all stages.

    Raises:
        RunConfigError: `stages.json` cannot be read.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.rows: list[dict[str, Any]] = []
        path = folder / REPORT_FILE
        if path.is_file():
            try:
                self.rows = list(json.loads(path.read_text(encoding="utf-8"))["stages"])
            except (ValueError, KeyError, TypeError) as error:
                raise RunConfigError(f"{path}: cannot be read ({error}). Restore it, or delete the folder.") from error

    @property
    def finished(self) -> list[str]:
        """Names of the stages that are done."""
        return [row["stage"] for row in self.rows]

    def check_same(self, stage: Stage, run: RunConfig) -> None:
        """A finished stage is kept as it was trained.

        Raises:
            RunConfigError: It was trained with other settings than are asked for now.
        """
        path = Path(run.output_dir)
        changed = {
            name: pair for name, pair in run.differences(RunConfig.load(path)).items() if not name.startswith(FREE)
        }
        if changed:
            name, (now, before) = next(iter(changed.items()))
            raise RunConfigError(
                f"Stage {stage.number} ({stage.name}) is finished, with {name}={before!r}; now it is {now!r}. Keep the "
                f"setting, change it for later stages only (stages: in the mix), or delete {path} and those after it."
            )

    def add(self, stage: Stage, run: RunConfig, metrics: Mapping[str, Mapping[str, Any]]) -> None:
        """Takes in a finished stage and writes both files."""
        figures = {}
        for task, values in metrics.items():
            figures[task] = {
                "figure": HEADLINES[task],
                "value": values.get(HEADLINES[task]),
                "rows": values.get("rows"),
                "text_only": bool(values.get("text_only", False)),
            }
        row = {"number": stage.number, "stage": stage.name, "trained_tasks": run.data.tasks, "metrics": figures}
        self.rows = sorted([*self.rows, row], key=lambda entry: entry["number"])
        write_json(self.folder / REPORT_FILE, {"stages": self.rows})
        write_text(self.folder / "stages.md", self.table())

    def table(self) -> str:
        """A row for each task, a column for each finished stage, and what is lost of the best figure."""
        tasks = list(dict.fromkeys(task for row in self.rows for task in row["metrics"]))
        header = ["task", *(f"after {row['number']} {row['stage']}" for row in self.rows), "below its best"]
        lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
        for task in tasks:
            cells, seen = [], []
            for row in self.rows:
                entry = row["metrics"].get(task)
                if entry is None or entry["value"] is None:
                    cells.append("")
                    continue
                text = f"{entry['value']:.3f}"
                if entry["text_only"]:
                    text += " (text alone)"
                else:
                    seen.append(entry["value"])
                cells.append(f"**{text}**" if task in row["trained_tasks"] else text)
            lost = f"{max(seen) - seen[-1]:.3f}" if seen else ""
            name = f"{task}, {HEADLINES[task]}"
            lines.append(f"| {' | '.join([name, *cells, lost])} |")
        lines.append("\nBold: the stage trained this task. Figures are of the validation split.\n")
        return "\n".join(lines)


__all__ = ["StageReport"]
