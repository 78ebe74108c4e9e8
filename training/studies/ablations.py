"""The questions that the paper asks of its own parts (Uni-Hema, arXiv 2511.13889, section 4, ablations), and their answers: the
whole model is trained once, then each question's run beside it."""

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unihema.errors import RunConfigError
from unihema.loading import load_model
from unihema.training.data.class_tree import as_known, row_names
from unihema.training.data.rows import Row
from unihema.training.data.splits import is_held_out
from unihema.training.evaluation import evaluate_model
from unihema.training.run.build import load_rows, training_rows
from unihema.training.run.config import RunConfig
from unihema.training.run.loop import DEFAULT_EPOCHS, train
from unihema.training.studies.stages import SIX_STAGES, train_stages
from unihema.training.studies.study import Plot, Report, Run, figure_settings, run_study, shown, table


@dataclass(frozen=True)
class Ablation:
    """One question, and the run that answers it beside the whole model's.

    Args:
        name (`str`): What it is called in folders and tables.
        asks (`str`): The question.
        figures (`tuple[tuple[str, str], ...]`): Tasks and their figures that answer it, such as `("detection", "mAP50")`.
        overrides (`Mapping[str, Any]`): Fields of `UniHemaConfig` that differ from the whole model's.
        kind (`str`): `"model"`: another model, trained alike; `"stages"`: the same model, trained in the six stages;
            `"unseen"`: the same model, trained without one data set and measured on that.
    """

    name: str
    asks: str
    figures: tuple[tuple[str, str], ...]
    overrides: Mapping[str, Any] = field(default_factory=dict)
    kind: str = "model"


# The run that all others are compared with.
WHOLE = "whole"

_EVERY_TASK = (
    ("detection", "mAP50"),
    ("segmentation", "dice"),
    ("single_cell", "macro_f1"),
    ("question_answering", "exact_match"),
    ("cloze", "exact_match"),
)

ABLATIONS = (
    Ablation(
        "no_fusion",
        "Do answers need the image? CrossModalFusion off: E_W = E_T.",
        (("question_answering", "exact_match"), ("question_answering", "bleu4"), ("cloze", "exact_match")),
        {"cross_modal_fusion": False},
    ),
    Ablation(
        "bilinear_upsampler",
        "Does learning to upsample masks help? Bilinear instead.",
        (("segmentation", "dice"), ("segmentation", "iou")),
        {"upsampler": "bilinear"},
    ),
    Ablation(
        "backbone_features",
        "Is SingleCellFeatureExtraction enough alone? Pooled backbone features beside it.",
        (("single_cell", "macro_f1"), ("single_cell", "accuracy")),
        {"scfe_backbone_features": True},
    ),
    Ablation(
        "no_refinement",
        "Do queries need the prompt? TextGuidedVisualRefinement off.",
        (("detection", "mAP50"), ("segmentation", "dice")),
        {"text_guided_refinement": False},
    ),
    Ablation(
        "six_stages",
        "Do tasks destroy each other when trained at once? The six stages instead, with as many steps in all.",
        _EVERY_TASK,
        kind="stages",
    ),
    Ablation(
        "unseen",
        "How much is lost on a data set that was never trained on? Both are measured on that one.",
        _EVERY_TASK,
        kind="unseen",
    ),
)


# Every task is trained in two of the six stages.
STAGES_OF_A_TASK = 2


def run_ablations(
    config: RunConfig, names: Sequence[str] | None = None, unseen: str | None = None, resume: bool = False
) -> dict[str, Any]:
    """Trains the whole model and each ablation as runs of their own, and compares them.

    Each run is a folder of `output_dir`: `whole`, and one of the name of each ablation (`unseen-NAME` of what is held
    out). `ablation.json`, `ablation.md` and, where matplotlib is installed, `ablation.png` have the comparison, as far as
    runs are finished.

    Args:
        config ([`RunConfig`]): Settings of every run; those of the whole model.
        names (`Sequence[str]`, *optional*): Ablations to run. All whose tasks the data have when not given; `unseen` only
            with a data set to hold out.
        unseen (`str`, *optional*): What the ablation `unseen` holds out: the name of one of the data folders, or a group
            such as `slide=7`.
        resume (`bool`): Go on with what an earlier call left in the folder; finished runs are not run again.

    Returns:
        `dict[str, Any]`: What `ablation.json` has.

    Raises:
        RunConfigError: Settings that cannot be, an unknown ablation, one whose tasks the data lack or that changes
            nothing, or, without `resume`, a folder that holds ablations already.
        DatasetError: Data that cannot be used.
        TrainingError: See [`train`].
    """
    config.check()
    folder = Path(config.output_dir)
    if not config.data.val_split and config.data.folds is None:
        raise RunConfigError("data.val_split is empty: ablations are compared on a validation split.")
    # Read once before anything is trained, so that what is missing is said at once.
    tasks = list(training_rows(config))
    chosen = _chosen(names, unseen, tasks, config)
    held_out = _hold_out(config, unseen) if any(ablation.kind == "unseen" for ablation in chosen) else None

    def trained(run: RunConfig) -> Run:
        output = Path(run.output_dir)
        return Run(output.name, figure_settings(run), lambda _: train(run, resume=resume and output.exists()), output)

    runs = [trained(config.with_overrides({"output_dir": str(folder / WHOLE)}))]
    for ablation in chosen:
        if ablation.kind == "unseen":
            without = _run_without(config, held_out, unseen)
            runs += [trained(without), _unseen_run(config, held_out, unseen, folder / WHOLE, Path(without.output_dir))]
            continue
        overrides = {**config.model.overrides, **ablation.overrides}
        run = config.with_overrides({"output_dir": str(folder / ablation.name), "model.overrides": overrides})
        runs.append(_stages_run(run, tasks, resume) if ablation.kind == "stages" else trained(run))
    results = run_study(folder, "ablation", runs, _report, resume=resume)
    return dict(_report(results).summary)


def _chosen(names: Sequence[str] | None, unseen: str | None, tasks: list[str], config: RunConfig) -> list[Ablation]:
    known = {ablation.name: ablation for ablation in ABLATIONS}
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise RunConfigError(f"Unknown ablation '{unknown[0]}'; there are {', '.join(known)}.")
    if unseen is None and "unseen" in (names or ()):
        raise RunConfigError("The ablation 'unseen' needs a data set to hold out (unseen=NAME, or unseen=slide=7).")
    chosen = []
    for ablation in ABLATIONS:
        if names is not None and ablation.name not in names:
            continue
        lacking = not any(task in tasks for task, _ in ablation.figures)
        lacking |= ablation.kind == "stages" and len(tasks) < 2
        same = ablation.overrides and all(
            config.model.overrides.get(name) == value for name, value in ablation.overrides.items()
        )
        if names is None and (lacking or same or (ablation.kind == "unseen" and unseen is None)):
            continue
        if lacking:
            wanted = ", ".join(dict.fromkeys(task for task, _ in ablation.figures))
            several = ", two of them at least" if ablation.kind == "stages" else ""
            raise RunConfigError(
                f"The ablation '{ablation.name}' is about {wanted}{several}; the data have {', '.join(tasks)}."
            )
        if same:
            raise RunConfigError(
                f"The ablation '{ablation.name}' changes nothing: model.overrides has {dict(ablation.overrides)} already."
            )
        chosen.append(ablation)
    return chosen


def _hold_out(config: RunConfig, unseen: str) -> dict[str, Any]:
    """What a run that never sees the data set or group is told: the folders that are left, or the group."""
    group, separator, name = unseen.partition("=")
    if separator:
        is_held_out({}, {group: [name]})
        return {"data.hold_out": {**config.data.hold_out, group: [*config.data.hold_out.get(group, ()), name]}}
    kept = [folder for folder in config.data.folders if Path(folder).resolve().name != unseen]
    if len(kept) == len(config.data.folders) or not kept:
        names = ", ".join(Path(folder).resolve().name for folder in config.data.folders)
        raise RunConfigError(f"'{unseen}' cannot be held out: the data folders are {names}. Name one of several.")
    return {"data.folders": kept}


def _run_without(config: RunConfig, held_out: dict[str, Any], unseen: str) -> RunConfig:
    folder = Path(config.output_dir) / f"unseen-{re.sub(r'[^A-Za-z0-9_.-]', '-', unseen)}"
    run = (
        config.with_folders(held_out["data.folders"]) if "data.folders" in held_out else config.with_overrides(held_out)
    )
    run = run.with_overrides({"output_dir": str(folder)})
    if run.data.tasks is not None:
        # That the other data sets lack a task is no mistake in the settings.
        run.data.tasks = list(load_rows(run.data, run.data.train_split))
    return run


def _stages_run(run: RunConfig, tasks: list[str], resume: bool) -> Run:
    """The model that is trained in stages, with the steps, the time or the passes over each task's data that the whole model
    has."""
    own = [(stage, tuple(task for task in stage.tasks if task in tasks)) for stage in SIX_STAGES]
    stages = [dataclasses.replace(stage, tasks=left) for stage, left in own if left]
    limits, shares = run.optimisation, {}
    if limits.max_steps is not None:
        shares["optimisation.max_steps"] = math.ceil(limits.max_steps / len(stages))
    if limits.time_limit_minutes is not None:
        shares["optimisation.time_limit_minutes"] = limits.time_limit_minutes / len(stages)
    if limits.epochs is not None or not shares:
        shares["optimisation.epochs"] = (limits.epochs or DEFAULT_EPOCHS) / STAGES_OF_A_TASK
    folder = Path(run.output_dir)

    def measure(_: Mapping[str, Any]) -> dict[str, Any]:
        train_stages(run.with_overrides(shares), stages, resume=resume)
        return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))

    return Run(folder.name, figure_settings(run), measure, folder)


def _unseen_run(config: RunConfig, held_out: dict[str, Any], unseen: str, whole: Path, without: Path) -> Run:
    """Both models on the validation rows of what one of them never saw."""

    def measure(_: Mapping[str, Any]) -> dict[str, Any]:
        first, other = _on_unseen(config, held_out, whole, without)
        return {"on": unseen, WHOLE: first, "changed": other}

    return Run(f"{without.name}, measured", {"on": unseen, **held_out}, measure, needs=[WHOLE, without.name])


def _on_unseen(
    config: RunConfig, held_out: dict[str, Any], whole: Path, without: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both models on the validation rows of what one of them never saw, of classes that both know."""
    models = [load_model(folder) for folder in (whole, without)]
    rows = _unseen_rows(config, held_out)
    for model, _ in models:
        rows = {task: rows_of_known_classes(task, found, model.config) for task, found in rows.items()}
    # A model that was never taught a task says nothing of an unseen data set.
    shared = set(models[0][0].config.trained.tasks or rows) & set(models[1][0].config.trained.tasks or rows)
    rows = {task: found for task, found in rows.items() if found and task in shared}
    if not rows:
        raise RunConfigError("The held-out data have no class or task that the other data teach: nothing to compare.")
    first, other = (
        evaluate_model(model, processor, rows, progress=config.logging.progress) for model, processor in models
    )
    return first, other


def _unseen_rows(config: RunConfig, held_out: dict[str, Any]) -> dict[str, list[Row]]:
    data, split = config.data, config.data.val_split
    if "data.folders" in held_out:
        folders = [folder for folder in data.folders if folder not in held_out["data.folders"]]
        return load_rows(config.with_folders(folders).data, split)
    groups = held_out["data.hold_out"]
    rows = load_rows(data, split)
    found = {task: [row for row in of_task if is_held_out(row, groups)] for task, of_task in rows.items()}
    if not any(found.values()):
        raise RunConfigError(f"No row of split '{split}' is of {groups}: there is nothing unseen to measure on.")
    return found


def rows_of_known_classes(task: str, rows: Sequence[Row], model_config) -> list[Row]:
    """Rows with the classes that a model knows: cells of others are left out, and so are images of other cells.

    Args:
        task (`str`): Their task.
        rows (`Sequence[Row]`): The rows.
        model_config (`UniHemaConfig`): Of the model.
    """
    if task not in ("detection", "single_cell"):
        return list(rows)
    known = list(model_config.id2label.values()) if task == "detection" else model_config.single_cell_names
    rows = as_known(rows, known)
    if task == "single_cell":
        return [row for row in rows if row["label"] in known]
    return [_known_cells(row, known, model_config.morphology) for row in rows if set(row_names(row)) & set(known)]


def _known_cells(row: Row, known: Sequence[str], morphology: Mapping[str, Sequence[str]]) -> Row:
    objects = row["objects"]
    kept = [number for number, name in enumerate(objects["category"]) if name in known]
    row = {**row, "objects": {key: [values[number] for number in kept] for key, values in objects.items()}}
    if "morphology" in objects:
        row["objects"]["morphology"] = [
            {name: value for name, value in cell.items() if value in morphology.get(name, ())}
            for cell in row["objects"]["morphology"]
        ]
    if row.get("annotated_classes") is not None:
        row["annotated_classes"] = [name for name in row["annotated_classes"] if name in known]
    return row


def _report(results: Mapping[str, Any]) -> Report:
    """The comparisons of the finished runs."""
    known = {ablation.name: ablation for ablation in ABLATIONS}
    questions, rows = {}, []
    for name, result in results.items():
        if name in known and WHOLE in results:
            ablation, pair, on = known[name], (results[WHOLE], result), None
        elif name.endswith(", measured"):
            ablation, pair, on = known["unseen"], (result[WHOLE], result["changed"]), result["on"]
        else:
            continue
        questions[ablation.name] = ablation.asks
        rows += comparison_rows(ablation, *pair, on)
    plots = {"ablation.png": Plot(8, 1.2 + 0.55 * len(rows), lambda plot: _draw(plot, rows))} if rows else {}
    return Report({"questions": questions, "comparisons": rows}, _lines(questions, rows) if rows else (), plots)


def comparison_rows(
    ablation: Ablation, whole: Mapping[str, Any], changed: Mapping[str, Any], on: str | None = None
) -> list[dict[str, Any]]:
    """A row for each figure of an ablation that both reports have; values in the figure's own unit.

    Args:
        ablation ([`Ablation`]): The question.
        whole (`Mapping[str, Any]`): Evaluation report of the whole model.
        changed (`Mapping[str, Any]`): That of the ablation.
        on (`str`, *optional*): The data set that both were measured on; the validation split of all when not given.
    """
    found = []
    for task, figure in ablation.figures:
        first, other = whole.get(task, {}), changed.get(task, {})
        values = first.get(figure), other.get(figure)
        if None in values:
            continue
        found.append(
            {
                "ablation": ablation.name,
                "task": task,
                "figure": figure,
                "on": on,
                "rows": other.get("rows"),
                "whole": values[0],
                "changed": values[1],
                "difference": values[1] - values[0],
                "whole_interval": (first.get("intervals") or {}).get(figure),
                "changed_interval": (other.get("intervals") or {}).get(figure),
            }
        )
    return found


def _lines(questions: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    cells = [
        (
            row["ablation"] + (f" ({row['on']})" if row["on"] else ""),
            row["task"],
            row["figure"],
            row["rows"],
            shown(row["whole"], row["whole_interval"]),
            shown(row["changed"], row["changed_interval"]),
            f"{row['difference']:+.3f}",
        )
        for row in rows
    ]
    return [
        *table(("ablation", "task", "figure", "rows", "whole model", "changed", "difference"), cells),
        "",
        *(f"- {name}: {asks}" for name, asks in questions.items()),
        "",
        "In brackets: 95 % interval, from resamples of the validation images. One training run each, so what",
        "another seed would change is not in it.",
    ]


def _draw(plot: Any, comparisons: Sequence[Mapping[str, Any]]) -> None:
    """A pair of bars for each figure; figures in 0..100 are drawn in 0..1."""
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


__all__ = ["ABLATIONS", "WHOLE", "Ablation", "comparison_rows", "rows_of_known_classes", "run_ablations"]
