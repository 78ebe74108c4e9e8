"""An adapter for a lab's own images: trained from few of them, with what was gained and forgotten."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from unihema.checkpoint_files import is_adapter
from unihema.errors import CheckpointError, DatasetError, RunConfigError
from unihema.hub_cards import is_repo_id
from unihema.training.adapters import CONFIG, WEIGHTS
from unihema.training.data.rows import Row, class_names, single_cell_names
from unihema.training.run.adapter_config import AdapterConfig
from unihema.training.run.build import training_rows
from unihema.training.run.config import (
    AugmentationSettings,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    OptimisationConfig,
    RunConfig,
)
from unihema.training.run.early_stopping import best_step
from unihema.training.run.loop import train
from unihema.training.studies.before_after import BeforeAfter


# What a user calls a task -> the tasks of the model.
ADAPTED_TASKS = {
    "detection": ["detection"],
    "segmentation": ["segmentation"],
    "classification": ["single_cell"],
    "qa": ["question_answering", "cloze"],
}
BATCH = {"detection": 4, "segmentation": 4, "single_cell": 16, "question_answering": 8, "cloze": 8}
STEPS, STEPS_BETWEEN_EVALUATIONS, PATIENCE = 800, 50, 6
# Where nothing is set aside for validation, one of this many parts is.
HELD_OUT_PART = 5
# Beyond the defaults of a task: few images show a stain and a focus only as they happened to be that day.
FEW_IMAGES = {"stain": 0.25, "brightness": 0.2, "hue": 0.03, "blur": 0.2}


def adapt(
    base: str | Path,
    data: str | Path | Sequence[str | Path],
    task: str,
    output_dir: str | Path,
    *,
    labels: Sequence[str] | None = None,
    method: str = "lora",
    start_from: Mapping[str, str] | None = None,
    folds: int | None = None,
    base_data: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    resume: bool = False,
    callbacks: Iterable[Callable[[dict], None]] = (),
) -> dict[str, Any]:
    """Trains an adapter of a checkpoint on a lab's images and labels; the checkpoint itself is not changed.

    Writes the adapter into `output_dir`, with its classes, thresholds, processor and figures, and `before_after.json` and
    `before_after.md`: the lab's validation images, and those of the base where given, before and after.

    Args:
        base (`str` or `Path`): Folder of the checkpoint, or a repository of the Hub.
        data (`str`, `Path` or `Sequence`): Data folders. Without a `val` split a fifth of the images is held out.
        task (`str`): `detection`, `segmentation`, `classification` or `qa`.
        output_dir (`str` or `Path`): Where.
        labels (`Sequence[str]`, *optional*): The lab's classes, in their order; those of the data when missing.
        method (`str`): `lora`, `dora` or `ia3`.
        start_from (`Mapping[str, str]`, *optional*): New class -> class of the base that it starts from.
        folds (`int`, *optional*): First train this many adapters, each on all but one part of the training images and
            measured on that one, to tell how much the figures depend on the choice of images.
        base_data (`str` or `Path`, *optional*): Data folder whose `val` split the base is measured on.
        overrides (`Mapping[str, Any]`, *optional*): Any setting of the run, such as `{"adapter.rank": 4}`.
        resume (`bool`): Go on with an interrupted run.
        callbacks (`Iterable[Callable[[dict], None]]`): Called with every line of the log.

    Returns:
        `dict[str, Any]`: What `before_after.json` has, see [`BeforeAfter`].

    Raises:
        CheckpointError: The base is not there, or is an adapter itself.
        DatasetError: Data that cannot be used.
        RunConfigError: An unknown task, or settings that cannot be.
        ValueError: Labels that do not fit the data or the base.
    """
    folder, base_name = find_base(base)
    config = adapt_config(
        folder, [data] if isinstance(data, (str, Path)) else data, task, output_dir, labels=labels, method=method,
        start_from=start_from, base_name=base_name,
    ).with_overrides(dict(overrides or {}))  # fmt: skip
    if config.adapter.labels is None:
        # Neither a fold nor a draw may have all classes.
        config.adapter.labels = _all_labels(config)
    callbacks = tuple(callbacks)
    parts = config
    if folds is not None and config.data.folds is not None:
        # The folds are the only validation; then all images are trained on.
        config = config.with_overrides(
            {"data.folds": None, "data.val_split": "", "optimisation.patience": None, "logging.keep_best": False}
        )
    report = BeforeAfter(config, base_data)
    report.measure_base()
    if folds is not None:
        report.folds = _train_folds(parts, folds, resume, callbacks)
        if not config.data.val_split:
            steps = statistics.median(run["best_step"] for run in report.folds)
            config = config.with_overrides({"optimisation.max_steps": max(1, round(steps))})
    train(config, resume=resume, callbacks=callbacks)
    report.measure_adapter()
    return report.write()


def adapt_config(
    base: Path,
    data: Sequence[str | Path],
    task: str,
    output_dir: str | Path,
    *,
    labels: Sequence[str] | None = None,
    method: str = "lora",
    start_from: Mapping[str, str] | None = None,
    base_name: str | None = None,
) -> RunConfig:
    """The run that trains an adapter from few images: settings that hold for 5 to 100 of them.

    Args:
        base (`Path`): Folder of the checkpoint.
        data, task, output_dir, labels, method, start_from: As for [`adapt`].
        base_name (`str`, *optional*): What the adapter calls its base.

    Returns:
        [`RunConfig`]: To be changed, or given to `unihema.training.run.loop.train`.

    Raises:
        RunConfigError: An unknown task or method.
        DatasetError: No data for the task.
    """
    if task not in ADAPTED_TASKS:
        raise RunConfigError(f"Unknown task '{task}'; choose among {', '.join(ADAPTED_TASKS)}.")
    if method not in ("lora", "dora", "ia3"):
        raise RunConfigError(f"Unknown method '{method}'; choose lora, dora or ia3.")
    tasks = ADAPTED_TASKS[task]
    config = RunConfig(
        output_dir=str(output_dir),
        data=DataConfig(folders=[str(folder) for folder in data], batch_size=dict(BATCH), workers=0),
        model=ModelConfig(initial_checkpoint=str(base)),
        optimisation=OptimisationConfig(max_steps=STEPS, learning_rate=1e-3, warmup_steps=20, patience=PATIENCE),
        augmentation=AugmentationSettings(
            overrides={name: dict(FEW_IMAGES) for name in tasks if name in ("detection", "segmentation", "single_cell")}
        ),
        logging=LoggingConfig(evaluation_samples=None, keep_best=True),
        adapter=AdapterConfig(
            method=method,
            labels=None if labels is None else list(labels),
            start_from=dict(start_from or {}),
            base_name=base_name,
        ),
    )
    rows = _rows_of_any(config, tasks)
    config.data.tasks = list(rows)
    if not has_split(config, config.data.val_split):
        config.data.folds = max(2, min(HELD_OUT_PART, *(_images(found) for found in rows.values())))
    batches = sum(math.ceil(_images(found) / config.data.batch_size[name]) for name, found in rows.items())
    config.logging.evaluate_every = max(1, round(STEPS_BETWEEN_EVALUATIONS / batches))
    return config


def find_base(base: str | Path) -> tuple[Path, str]:
    """The folder of a base, and the name by which its adapters find it.

    Args:
        base (`str` or `Path`): A folder, or a repository of the Hub, which is downloaded where it is not yet.

    Raises:
        CheckpointError: Neither, or an adapter.
    """
    folder = Path(base)
    if is_adapter(folder):
        raise CheckpointError(f"{folder} is an adapter itself; adapt its base, or merge it first (save_merged).")
    if folder.is_dir():
        return folder, str(folder.resolve())
    if not is_repo_id(str(base)):
        raise CheckpointError(f"{base}: no such checkpoint folder, and no name of a repository on the Hub.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(str(base))), str(base)
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise CheckpointError(
            f"{base}: no such checkpoint folder, and not to be had from the Hub ({error})."
        ) from error


def has_split(config: RunConfig, split: str) -> bool:
    """Whether the data folders have rows of the run's tasks in a split."""
    if not split:
        return False
    probe = dataclasses.replace(config, data=dataclasses.replace(config.data, train_split=split, folds=None))
    try:
        return bool(training_rows(probe))
    except DatasetError:
        return False


def is_complete(folder: str | Path) -> bool:
    """Whether a run has left its adapter."""
    return all((Path(folder) / name).is_file() for name in (CONFIG, WEIGHTS))


def _rows_of_any(config: RunConfig, tasks: Sequence[str]) -> dict[str, list[Row]]:
    """Training rows of those of the tasks that the data have."""
    rows = {}
    for task in tasks:
        config.data.tasks = [task]
        try:
            rows |= training_rows(config)
        except DatasetError as error:
            problem = error
    if not rows:
        raise problem
    return rows


def _all_labels(config: RunConfig) -> list[str] | None:
    """Classes of the whole training split; `None` for tasks that have none."""
    data = dataclasses.replace(config.data, folds=None, max_samples=None)
    rows = training_rows(dataclasses.replace(config, data=data))
    if "detection" in rows:
        return class_names(rows["detection"])
    return single_cell_names(rows["single_cell"]) if "single_cell" in rows else None


def _images(rows: Sequence[Row]) -> int:
    return len({row["image"] if isinstance(row["image"], str) else id(row["image"]) for row in rows})


def _train_folds(config: RunConfig, folds: int, resume: bool, callbacks) -> list[dict[str, Any]]:
    found = []
    for fold in range(folds):
        part = config.with_overrides(
            {
                "output_dir": str(Path(config.output_dir) / f"fold-{fold + 1}"),
                "data.folds": folds,
                "data.fold": fold,
            }
        )
        if resume and is_complete(part.output_dir):
            report = load_report(part.output_dir)
        else:
            report = train(part, resume=resume, callbacks=callbacks)
        found.append({"fold": fold + 1, "best_step": best_step(part.output_dir), "report": report})
    return found


def load_report(folder: str | Path) -> dict[str, Any]:
    """The figures that a run has left."""
    import json

    return json.loads((Path(folder) / "metrics.json").read_text(encoding="utf-8"))


__all__ = ["ADAPTED_TASKS", "adapt", "adapt_config", "find_base", "has_split"]
