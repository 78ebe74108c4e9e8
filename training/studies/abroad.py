"""Home and abroad: each source in turn is left out of a short training and measured, beside the sources that were trained on."""

import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unihema.errors import RunConfigError
from unihema.files import write_json
from unihema.loading import load_model
from unihema.training.evaluation import HEADLINES, evaluate_model
from unihema.training.run.build import folders_by_name, load_rows
from unihema.training.run.config import RunConfig
from unihema.training.run.loop import train
from unihema.training.studies.ablations import rows_of_known_classes
from unihema.training.studies.study import Report, Run, figure_settings, run_study, shown, table


CONFIG_FILE = "abroad_config.json"
# Crops of a class that are measured at most.
MOST_CROPS = 100


def run_abroad(
    config: RunConfig, held_out: Sequence[str] = (), never: Sequence[str] = (), resume: bool = False
) -> dict[str, Any]:
    """Trains as often as there are sources, each time without one of them, and measures each model on its own sources and on
    what it never saw.

    Each run is a folder `without-NAME` of `output_dir`, with the same settings. `abroad.json` and `abroad.md` have the
    comparison, as far as runs are finished.

    Args:
        config ([`RunConfig`]): Settings of every run; its data folders are the sources.
        held_out (`Sequence[str]`): Names of the folders to leave out in turn; all that are trained on when missing.
        never (`Sequence[str]`): Names of folders that no run is trained on; every run is measured on them.
        resume (`bool`): Go on with what an earlier call left.

    Raises:
        RunConfigError: Fewer than two sources to train on, a name that is none of them, no validation split, or, without
            `resume`, a folder that holds the study already.
        DatasetError: Data that cannot be used.
        TrainingError: See [`train`].
    """
    config.check()
    folders = folders_by_name(config.data.folders)
    if not config.data.val_split:
        raise RunConfigError("data.val_split is empty: home and abroad are measured on a validation split.")
    for name in (*held_out, *never):
        if name not in folders:
            raise RunConfigError(f"'{name}' cannot be held out: the data folders are {', '.join(folders)}.")
    sources = [name for name in folders if name not in never]
    if len(sources) < 2:
        raise RunConfigError(
            f"One source is left out of each run, so there must be two to train on; there are {', '.join(sources) or 'none'}."
        )
    runs = []
    for name in [name for name in sources if name in held_out or not held_out]:
        part = _without(config, folders, [name, *never])
        output = Path(part.output_dir)

        def trained(_: Mapping[str, Any], part: RunConfig = part, output: Path = output) -> Any:
            return _figures(train(part, resume=resume and output.exists()))

        def measured(_: Mapping[str, Any], name: str = name, output: Path = output) -> Any:
            return {"held out": name, **_on_unseen(config, folders, [name, *never], output)}

        runs.append(Run(output.name, figure_settings(part), trained, output))
        unseen = {"on": [name, *never], **_reading(config)}
        runs.append(Run(f"{output.name}, abroad", unseen, measured, needs=[output.name]))
    # By it the command goes on where no data are named.
    write_json(Path(config.output_dir) / CONFIG_FILE, config.to_dict())
    results = run_study(config.output_dir, "abroad", runs, _report, resume=resume)
    return dict(_report(results).summary)


def _without(config: RunConfig, folders: Mapping[str, str], names: Sequence[str]) -> RunConfig:
    """The run that never sees some sources."""
    kept = {name: folder for name, folder in folders.items() if name not in names}
    label = re.sub(r"[^A-Za-z0-9_.-]", "-", names[0])
    run = config.with_folders(list(kept.values())).with_overrides(
        {"output_dir": str(Path(config.output_dir) / f"without-{label}")}
    )
    if run.data.tasks is not None:
        # That the other sources lack a task is no mistake in the settings.
        run.data.tasks = list(load_rows(run.data, run.data.train_split))
    return run


def _reading(config: RunConfig) -> dict[str, Any]:
    """What the figures of unseen sources depend on beside the model."""
    return {"val_split": config.data.val_split, "rename": config.data.rename, "samples": config.logging.final_samples}


def _on_unseen(
    config: RunConfig, folders: Mapping[str, str], names: Sequence[str], checkpoint: Path
) -> dict[str, dict[str, Any]]:
    """Figures of a model on sources that it never saw, of classes that it knows. The boxes of fields are measured as crops of
    single cells, too."""
    model, processor = load_model(checkpoint)
    found = {}
    for name in names:
        part = config.with_folders([folders[name]]).with_overrides({"data.boxes_as_crops": True, "data.tasks": None})
        rows = load_rows(part.data, config.data.val_split, None, MOST_CROPS)
        trained = model.config.trained.tasks or tuple(rows)
        known = {
            task: rows_of_known_classes(task, of_task, model.config)
            for task, of_task in rows.items()
            if task in trained and task in (config.data.tasks or rows)
        }
        known = {task: of_task for task, of_task in known.items() if of_task}
        samples, progress = config.logging.final_samples, config.logging.progress
        found[name] = _figures(evaluate_model(model, processor, known, max_samples=samples, progress=progress))
    return {"abroad": found}


def _figures(report: Mapping[str, Any]) -> dict[str, Any]:
    """The figures that are compared, by name: value, rows and interval."""
    found = {}
    for task, figures in report.items():
        names = {HEADLINES[task]: figures.get(HEADLINES[task])}
        if task == "single_cell":
            names["accuracy"] = figures.get("accuracy")
        for part in ("kinds", "types"):
            if part in figures:
                names[f"{part} accuracy"] = figures[part]["accuracy"]
        if task == "detection":
            names |= {f"AP50 {label}": of["AP50"] for label, of in figures["per_class"].items() if of["cells"]}
        intervals = figures.get("intervals") or {}
        for name, value in names.items():
            interval = intervals.get(
                name.replace("AP50 ", "per_class ") + " AP50" if name.startswith("AP50 ") else name
            )
            found[f"{task} {name}"] = {"value": value, "rows": figures["rows"], "interval": interval}
    return found


def _report(results: Mapping[str, Any]) -> Report:
    """The comparisons of the finished runs."""
    rows = []
    for name, result in results.items():
        if not name.endswith(", abroad"):
            continue
        home = results[name.removesuffix(", abroad")]
        for source, figures in result["abroad"].items():
            for figure, abroad in figures.items():
                rows.append(
                    {
                        "run": result["held out"],
                        "on": source,
                        "figure": figure,
                        "abroad": abroad,
                        "home": home.get(figure),
                    }
                )
    if not rows:
        return Report({"comparisons": []}, ())
    cells = [
        (
            row["run"],
            row["on"],
            row["figure"],
            _value(row["home"]),
            _value(row["abroad"]),
            row["abroad"]["rows"],
        )
        for row in rows
    ]
    lines = [
        *table(("without", "measured on", "figure", "home", "abroad", "rows"), cells),
        "",
        "Home: the validation rows of the sources that the run was trained on. Abroad: of a source that it never saw, of the",
        "classes that it knows; the boxes of fields also as crops of single cells. In brackets: 95 % interval, from resamples",
        "of the images. One training run each, so what another seed would change is not in it.",
    ]
    means = _means(rows)
    if means:
        lines += ["", "Mean over the sources that were left out in turn:", ""]
        cells = [
            (name, shown(of["home"], missing="-"), shown(of["abroad"]), of["sources"]) for name, of in means.items()
        ]
        lines += table(("figure", "home", "abroad", "sources"), cells)
    return Report({"comparisons": rows, "means": means}, lines)


def _value(figure: Mapping[str, Any] | None) -> str:
    return "-" if figure is None else shown(figure["value"], figure["interval"], missing="-")


def _means(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each figure the mean at home, abroad, and of how many sources, where there are several."""
    pairs: dict[str, list[tuple[float | None, float]]] = {}
    for row in rows:
        if row["run"] == row["on"] and row["abroad"]["value"] is not None:
            home = None if row["home"] is None else row["home"]["value"]
            pairs.setdefault(row["figure"], []).append((home, row["abroad"]["value"]))
    found = {}
    for name, of_figure in pairs.items():
        home = [value for value, _ in of_figure if value is not None]
        if len(of_figure) > 1:
            found[name] = {
                "home": statistics.mean(home) if home else None,
                "abroad": statistics.mean(value for _, value in of_figure),
                "sources": len(of_figure),
            }
    return found


__all__ = ["run_abroad"]
