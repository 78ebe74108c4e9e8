"""The six stages of training: what each one learns and leaves alone (Uni-Hema, arXiv 2511.13889, "progressive training"; the
paper gives the order, the sets of frozen parts are ours). Each goes on from the one before."""

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from unihema.errors import RunConfigError
from unihema.files import write_atomically
from unihema.modeling_unihema.tasks import LANGUAGE_TASKS, TASKS
from unihema.training.data.rows import Row
from unihema.training.evaluation import HEADLINES
from unihema.training.run.build import build, training_rows
from unihema.training.run.checkpoint import save_trained
from unihema.training.run.config import Mix, RunConfig
from unihema.training.run.distributed import is_main_process, join_processes
from unihema.training.run.loop import train
from unihema.training.studies.study import Report, Run, figure_settings, read_record, run_study, shown, table


STAGES_FOLDER = "stages"
INITIAL = "0-initial"
# The record of finished stages and their table.
REPORT = "stages"
# What a run leaves for itself; the rest of a finished stage's folder is the trained model.
RUN_FILES = ("checkpoints", "best", "log.jsonl", "run_config.json")
# What the untrained model depends on.
_OF_THE_INITIAL = (
    "model.",
    "optimisation.seed",
    "data.folders",
    "data.image_sizes",
    "data.rename",
    "data.label_parents",
    "data.single_cell_parents",
    "data.boxes_as_crops",
    "data.exact_classes",
    "data.absent_classes",
)


@dataclass(frozen=True)
class Stage:
    """One stage.

    Args:
        number (`int`): From 1.
        name (`str`): What it is called in folders and tables.
        tasks (`tuple[str, ...]`): Tasks whose data it trains on; those that a mix lacks are left out.
        trained_parts (`tuple[str, ...]`): Of `PARTS` in training/run/build.py; all others are frozen.
        why (`str`): What the stage is for.
        settings (`Mapping[str, Any]`): Settings of the run that this stage needs, by dotted name.
    """

    number: int
    name: str
    tasks: tuple[str, ...]
    trained_parts: tuple[str, ...]
    why: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """Name of the folder that the stage is trained in."""
        return f"{self.number}-{self.name}"


SIX_STAGES = (
    Stage(
        1,
        "single_cell",
        ("single_cell",),
        ("backbone", "input_projection", "image_encoder", "single_cell_feature_extraction", "single_cell_head"),
        "What a cell looks like: crops are many and cheap.",
    ),
    Stage(
        2,
        "text",
        ("question_answering", "cloze"),
        ("text_embedding", "text_encoder", "text_decoder", "language_head"),
        "The language of haematology, without images.",
        {"data.text_only": True},
    ),
    Stage(
        3,
        "joint_visual",
        ("detection", "segmentation", "single_cell"),
        (
            "backbone",
            "input_projection",
            "image_encoder",
            "query_selection",
            "image_decoder",
            "text_guided_visual_refinement",
            "single_cell_feature_extraction",
            "query_guided_mask_finder",
            "detection_head",
            "denoising",
            "mask_head",
            "single_cell_head",
        ),
        "All visual tasks at once, so that the image features serve each of them.",
    ),
    Stage(
        4,
        "detection",
        ("detection",),
        ("query_selection", "image_decoder", "text_guided_visual_refinement", "detection_head", "denoising"),
        "Boxes, classes and morphology, on image features that no longer move.",
    ),
    Stage(
        5,
        "segmentation",
        ("segmentation",),
        ("query_guided_mask_finder", "mask_head"),
        "Masks; nothing that the other tasks read is touched.",
    ),
    Stage(
        6,
        "language",
        ("question_answering", "cloze"),
        ("cross_modal_fusion", "text_decoder", "language_head"),
        "Answers that look at the image: the visual side is done, and only the fusion learns to read it.",
    ),
)

RECIPES: dict[str, tuple[Stage, ...]] = {"six-stages": SIX_STAGES}


def train_stages(
    config: RunConfig,
    stages: Sequence[Stage] = SIX_STAGES,
    changes: Mapping[str, Mapping[str, Any]] | None = None,
    only: int | None = None,
    resume: bool = False,
    callbacks: Iterable[Callable[[dict], None]] = (),
) -> list[dict[str, Any]]:
    """Trains a model stage by stage.

    Each stage is a run in `output_dir/stages/<number>-<name>`. After each, all tasks trained so far are evaluated, and
    `stages.json` and `stages.md` show what was gained and whether anything was forgotten. At the end the last stage's model
    lies in `output_dir`. A language task reads its text alone until a stage teaches it to look at the image.

    Args:
        config ([`RunConfig`]): Settings of all stages; its tasks, trained parts and initial checkpoint are the stages'.
        stages (`Sequence[Stage]`): The stages.
        changes (`Mapping[str, Mapping[str, Any]]`, *optional*): Stage name -> settings that differ there.
        only (`int`, *optional*): Run the stage of this number only; those before it must be finished.
        resume (`bool`): Go on with what an earlier call left; finished stages are not run again.
        callbacks (`Iterable[Callable[[dict], None]]`): Called with every line of the stages' logs.

    Returns:
        `list[dict[str, Any]]`: A row for each finished stage, as in `stages.json`.

    Raises:
        RunConfigError: Settings that cannot be, a stage that does not exist, an earlier one that is not finished, or, without
            `resume`, a folder that holds stages already.
        DatasetError: Data that cannot be used.
        TrainingError: See [`train`].
    """
    changes = {name: dict(settings) for name, settings in (changes or {}).items()}
    callbacks = tuple(callbacks)
    config.check()
    _check_names(stages, changes, only)
    join_processes(config.optimisation.device)
    folder = Path(config.output_dir)
    whole = training_rows(config.with_overrides({"data.tasks": None}))
    present = [stage for stage in stages if any(task in whole for task in stage.tasks)]
    if only is not None:
        if only not in [stage.number for stage in present]:
            raise RunConfigError(
                f"Stage {only} trains {', '.join(stages[only - 1].tasks)}, which the data do not have."
            )
        finished = read_record(folder, REPORT)["runs"]
        for stage in present:
            if stage.number < only and stage.name not in finished:
                raise RunConfigError(
                    f"Stage {only} goes on from stage {stage.number} ({stage.name}), which is not finished."
                )
    mix = Mix(config, changes)
    runs = [_initial_run(mix, whole, folder / STAGES_FOLDER / INITIAL)]
    for position, stage in enumerate(present):
        if only is not None and stage.number > only:
            break
        run = _stage_config(config, stage, present[: position + 1], changes, runs[-1].leaves, list(whole))
        runs.append(_stage_run(mix, stage, run, runs[-1].name, resume, callbacks))
    results = run_study(folder, REPORT, runs, _report, resume=resume or only is not None)
    if present[-1].name in results and is_main_process():
        _publish(folder / STAGES_FOLDER / present[-1].folder, folder)
    return _rows(results)


def _initial_run(mix: Mix, rows: Mapping[str, Sequence[Row]], folder: Path) -> Run:
    """The untrained model that the first stage goes on from."""

    def measure(_: Mapping[str, Any]) -> dict[str, Any]:
        from accelerate.utils import set_seed

        if is_main_process():
            set_seed(mix.run.optimisation.seed)
            save_trained(*build(mix.run, dict(rows)), folder)
        return {}

    settings = {name: value for name, value in figure_settings(mix.run).items() if name.startswith(_OF_THE_INITIAL)}
    return Run(INITIAL, settings, measure, folder)


def _stage_run(
    mix: Mix, stage: Stage, config: RunConfig, before: str, resume: bool, callbacks: Sequence[Callable[[dict], None]]
) -> Run:
    def measure(_: Mapping[str, Any]) -> dict[str, Any]:
        if is_main_process():
            mix.save(mix.run.output_dir)
        metrics = train(config, resume=resume, callbacks=callbacks)
        figures = {
            task: {
                "figure": HEADLINES[task],
                "value": values.get(HEADLINES[task]),
                "rows": values.get("rows"),
                "text_only": bool(values.get("text_only", False)),
            }
            for task, values in metrics.items()
        }
        return {"number": stage.number, "stage": stage.name, "trained_tasks": config.data.tasks, "metrics": figures}

    settings = figure_settings(config)
    # The stage before decides which checkpoint that is; its folder may have been moved.
    settings.pop("model.initial_checkpoint")
    return Run(stage.name, settings, measure, Path(config.output_dir), [before])


def _check_names(stages: Sequence[Stage], changes: Mapping[str, Any], only: int | None) -> None:
    names = [stage.name for stage in stages]
    unknown = [name for name in changes if name not in names]
    if unknown:
        raise RunConfigError(f"stages: unknown stage '{unknown[0]}'; stages are {', '.join(names)}.")
    if only is not None and only not in [stage.number for stage in stages]:
        raise RunConfigError(f"There is no stage {only}; stages are 1 to {len(stages)}: {', '.join(names)}.")


def _stage_config(
    config: RunConfig,
    stage: Stage,
    so_far: Sequence[Stage],
    changes: Mapping[str, Mapping[str, Any]],
    before: Path,
    available: Sequence[str],
) -> RunConfig:
    """The settings of a stage."""
    trained = {task for earlier in so_far for task in earlier.tasks}
    sees_images = any(
        task in LANGUAGE_TASKS for s in so_far for task in s.tasks if not s.settings.get("data.text_only", False)
    )
    return config.with_overrides(
        {
            "output_dir": str(Path(config.output_dir) / STAGES_FOLDER / stage.folder),
            "data.tasks": [task for task in TASKS if task in stage.tasks and task in available],
            "data.evaluation_tasks": [task for task in TASKS if task in trained and task in available],
            "data.text_only": not sees_images,
            "model.initial_checkpoint": str(before),
            "model.backbone_weights": None,
            "model.overrides": {},
            "model.trained_parts": list(stage.trained_parts),
            **stage.settings,
            **changes.get(stage.name, {}),
        }
    )


def _publish(stage_folder: Path, folder: Path) -> None:
    """Copies the trained model to where the user looks for it; its configuration last."""
    files = [path for path in stage_folder.iterdir() if path.name not in RUN_FILES and not path.name.startswith(".")]
    for path in sorted(files, key=lambda path: path.name == "config.json"):
        with path.open("rb") as file:
            write_atomically(folder / path.name, partial(shutil.copyfileobj, file))


def _rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The finished stages in their order."""
    return sorted((result for result in results.values() if result), key=lambda row: row["number"])


def _report(results: Mapping[str, Any]) -> Report:
    """A row for each task, a column for each finished stage, and what is lost of the best figure."""
    rows = _rows(results)
    cells = []
    for task in dict.fromkeys(task for row in rows for task in row["metrics"]):
        found, seen = [], []
        for row in rows:
            entry = row["metrics"].get(task)
            if entry is None or entry["value"] is None:
                found.append("")
                continue
            text = shown(entry["value"])
            if entry["text_only"]:
                text += " (text alone)"
            else:
                seen.append(entry["value"])
            found.append(f"**{text}**" if task in row["trained_tasks"] else text)
        cells.append((f"{task}, {HEADLINES[task]}", *found, shown(max(seen) - seen[-1] if seen else None)))
    header = ("task", *(f"after {row['number']} {row['stage']}" for row in rows), "below its best")
    notes = ["", "Bold: the stage trained this task. Figures are of the validation split."]
    return Report({}, [*table(header, cells), *notes] if rows else ())


__all__ = ["RECIPES", "SIX_STAGES", "Stage", "train_stages"]
