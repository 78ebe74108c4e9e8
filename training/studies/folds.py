"""Cross-validation folds: the same training run on all but one part of the images, measured on that part, part by part."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from unihema.training.evaluation import HEADLINES
from unihema.training.run.checkpoint import best_step
from unihema.training.run.config import RunConfig
from unihema.training.run.loop import train
from unihema.training.studies.study import Run, figure_settings, shown, table


def fold_runs(
    config: RunConfig, folds: int, resume: bool = False, callbacks: Sequence[Callable[[dict], None]] = ()
) -> list[Run]:
    """The runs of all folds, each in a folder `fold-N` of `output_dir`.

    Their results have `fold` (from 1), `best_step` and the main figure of each task, such as `detection mAP50`.

    Args:
        config ([`RunConfig`]): Settings of every run.
        folds (`int`): How many parts.
        resume (`bool`): Go on with a run that was begun.
        callbacks (`Sequence[Callable[[dict], None]]`): Called with every line of the logs.
    """

    def run(fold: int) -> Run:
        folder = Path(config.output_dir) / f"fold-{fold + 1}"
        part = config.with_overrides({"output_dir": str(folder), "data.folds": folds, "data.fold": fold})

        def measure(_: Mapping[str, Any]) -> dict[str, Any]:
            report = train(part, resume=resume, callbacks=callbacks)
            figures = {f"{task} {HEADLINES[task]}": found.get(HEADLINES[task]) for task, found in report.items()}
            return {"fold": fold + 1, "best_step": best_step(folder), **figures}

        return Run(folder.name, figure_settings(part), measure, folder)

    return [run(fold) for fold in range(folds)]


def fold_lines(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown: a row for each finished fold, then mean and standard deviation of each figure.

    Args:
        found (`Sequence[Mapping[str, Any]]`): Results of [`fold_runs`].
    """
    if not found:
        return []
    names = [name for name in found[0] if name not in ("fold", "best_step")]
    rows = [(run["fold"], run["best_step"], *(shown(run[name], missing="-") for name in names)) for run in found]
    lines = table(("fold", "best step", *names), rows)
    for name in names:
        values = [run[name] for run in found if run[name] is not None]
        if len(values) > 1:
            spread = f"{statistics.mean(values):.3f}, standard deviation {statistics.stdev(values):.3f}"
            lines += ["", f"{name} over {len(values)} folds: mean {spread}."]
    return lines


__all__ = ["fold_lines", "fold_runs"]
