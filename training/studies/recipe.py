"""Training in stages: each goes on from the one before, and none is run twice."""

import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from unihema.errors import RunConfigError
from unihema.modeling_unihema.tasks import LANGUAGE_TASKS, TASKS
from unihema.training.run.build import build, training_rows
from unihema.training.run.checkpoint import save_trained
from unihema.training.run.config import RunConfig
from unihema.training.run.loop import train
from unihema.training.run.mix import Mix
from unihema.training.studies.stage_report import StageReport
from unihema.training.studies.stages import SIX_STAGES, Stage


STAGES_FOLDER = "stages"
INITIAL_FOLDER = "0-initial"
# What a run leaves for itself; the rest of a finished stage's folder is the trained model.
RUN_FILES = ("checkpoints", "best", "log.jsonl", "run_config.json")


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
    from accelerate import PartialState
    from accelerate.utils import set_seed

    changes = {name: dict(settings) for name, settings in (changes or {}).items()}
    config.check()
    _check_names(stages, changes, only)
    state = PartialState(cpu=config.optimisation.device == "cpu")
    folder = Path(config.output_dir)
    report = StageReport(folder)
    if report.finished and not resume and only is None:
        raise RunConfigError(
            f"{folder} holds the stages of an earlier run ({', '.join(report.finished)}). Go on with it (resume=True), start "
            "anew (--overwrite), or train into another."
        )
    whole = training_rows(config.with_overrides({"data.tasks": None}))
    present = [stage for stage in stages if any(task in whole for task in stage.tasks)]
    if only is not None and only not in [stage.number for stage in present]:
        raise RunConfigError(f"Stage {only} trains {', '.join(stages[only - 1].tasks)}, which the data do not have.")
    initial = folder / STAGES_FOLDER / INITIAL_FOLDER
    runs = []
    for position, stage in enumerate(present):
        before = Path(runs[-1].output_dir) if runs else initial
        runs.append(_stage_run(config, stage, present[: position + 1], changes, before, list(whole)))
        if stage.name in report.finished:
            report.check_same(stage, runs[-1])
    if state.is_main_process:
        Mix(config, changes).save(folder)
        if not (initial / "config.json").is_file():
            set_seed(config.optimisation.seed)
            model, processor = build(config, whole)
            initial.mkdir(parents=True, exist_ok=True)
            save_trained(model, processor, initial)
    state.wait_for_everyone()
    for stage, run in zip(present, runs):
        if stage.name in report.finished:
            continue
        if only is not None and stage.number < only:
            raise RunConfigError(
                f"Stage {only} goes on from stage {stage.number} ({stage.name}), which is not finished."
            )
        if only is not None and stage.number > only:
            break
        metrics = train(run, resume=resume, callbacks=callbacks)
        if state.is_main_process:
            report.add(stage, run, metrics)
        state.wait_for_everyone()
        report = StageReport(folder)
    if present[-1].name in report.finished and state.is_main_process:
        _publish(Path(runs[-1].output_dir), folder)
    return report.rows


def _check_names(stages: Sequence[Stage], changes: Mapping[str, Any], only: int | None) -> None:
    names = [stage.name for stage in stages]
    unknown = [name for name in changes if name not in names]
    if unknown:
        raise RunConfigError(f"stages: unknown stage '{unknown[0]}'; stages are {', '.join(names)}.")
    if only is not None and only not in [stage.number for stage in stages]:
        raise RunConfigError(f"There is no stage {only}; stages are 1 to {len(stages)}: {', '.join(names)}.")


def _stage_run(
    config: RunConfig,
    stage: Stage,
    so_far: Sequence[Stage],
    changes: Mapping[str, Mapping[str, Any]],
    before: Path,
    available: Sequence[str],
) -> RunConfig:
    """The run of a stage."""
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
        partial = folder / f".{path.name}.partial"
        shutil.copyfile(path, partial)
        os.replace(partial, folder / path.name)


__all__ = ["train_stages"]
