"""An adapter for a lab's own images: trained from few of them, with what was gained there and forgotten of the base's."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from unihema.checkpoint_files import is_adapter
from unihema.errors import CheckpointError, DatasetError, RunConfigError
from unihema.files import real_path, shortened
from unihema.hub_cards import is_repo_id
from unihema.loading import available_tasks, load_model
from unihema.training.adapters import WEIGHTS
from unihema.training.data.class_tree import as_known, row_names
from unihema.training.data.rows import Row, class_names, said_once, single_cell_names
from unihema.training.data.splits import image_groups
from unihema.training.evaluation import HEADLINES, evaluate_model
from unihema.training.evaluation.class_agnostic import class_agnostic_precision
from unihema.training.run.build import build, load_rows, training_rows, validation_rows
from unihema.training.run.checkpoint import check_unused_folder
from unihema.training.run.config import (
    AdapterConfig,
    AugmentationSettings,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    OptimisationConfig,
    RunConfig,
)
from unihema.training.run.loop import train
from unihema.training.studies.folds import fold_lines, fold_runs
from unihema.training.studies.study import Report, Run, figure_settings, run_study, shown, table


# What a user calls a task -> the tasks of the model.
ADAPTED_TASKS = {
    "detection": ["detection"],
    "segmentation": ["segmentation"],
    "classification": ["single_cell"],
    "qa": ["question_answering", "cloze"],
    "question_answering": ["question_answering"],
    "cloze": ["cloze"],
}
# Tasks whose classes may be a lab's own.
WITH_CLASSES = ("detection", "classification")
BATCH = {"detection": 4, "segmentation": 4, "single_cell": 16, "question_answering": 8, "cloze": 8}
STEPS, STEPS_BETWEEN_EVALUATIONS, PATIENCE = 800, 50, 6
# Where nothing is set aside for validation, one of this many parts is.
HELD_OUT_PART = 5
# Beyond the defaults of a task: few images show a stain and a focus only as they happened to be that day.
FEW_IMAGES = {"stain": 0.25, "brightness": 0.2, "hue": 0.03, "blur": 0.2}


@said_once()
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
        data (`str`, `Path` or `Sequence`): Data folders. Without a `val` split about a fifth of the images is
            held out, whole patients and slides where the data name them.
        task (`str`): `detection`, `segmentation`, `classification`, or `question_answering`, `cloze` or both, `qa`.
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
        `dict[str, Any]`: `lab` and `base`, each with its `data`, `rows` and `figures` (row of the table -> column -> figure), and
        `folds`, as in `before_after.json`.

    Raises:
        CheckpointError: The base is not there, or is an adapter itself.
        DatasetError: Data that cannot be used.
        RunConfigError: An unknown task, or settings that cannot be.
        ValueError: Labels that do not fit the data or the base.
    """
    folder, base_name = find_base(base)
    if real_path(folder) == real_path(output_dir):
        raise RunConfigError(
            f"{output_dir} is the base itself, which stays as it is. Name another folder for the adapter."
        )
    if not resume:
        # Before anything is measured and written beside it.
        check_unused_folder(Path(output_dir))
    config = adapt_config(
        folder, [data] if isinstance(data, (str, Path)) else data, task, output_dir, labels=labels, method=method,
        start_from=start_from, base_name=base_name, overrides=overrides,
    )  # fmt: skip
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
    measured = _BeforeAfter(config, base_data)

    def train_adapter(done: Mapping[str, Any]) -> dict[str, Any]:
        run = config
        if folds is not None and not config.data.val_split:
            steps = statistics.median(result["best_step"] for result in _fold_results(done))
            run = config.with_overrides({"optimisation.max_steps": max(1, round(steps))})
        return train(run, resume=resume, callbacks=callbacks)

    of_run = figure_settings(config)
    of_data = {name: of_run[name] for name in of_run if name.startswith(("data.", "model.", "adapter."))}
    of_data |= {"optimisation.seed": config.optimisation.seed, "base_data": measured.base_data}
    weights = Path(config.output_dir) / WEIGHTS
    runs = [
        Run("before", of_data, lambda _: measured.before()),
        *(() if folds is None else fold_runs(parts, folds, resume, callbacks)),
        Run("adapter", of_run, train_adapter, weights),
        Run("after", of_data, lambda _: measured.after(), needs=["adapter"]),
    ]
    results = run_study(output_dir, "before_after", runs, measured.report, resume=resume)
    return dict(measured.report(results).summary)


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
    overrides: Mapping[str, Any] | None = None,
) -> RunConfig:
    """The run that trains an adapter from few images: settings that hold for 5 to 100 of them.

    Args:
        base (`Path`): Folder of the checkpoint.
        data, task, output_dir, labels, method, start_from, overrides: As for [`adapt`].
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
    if task not in WITH_CLASSES and (labels is not None or start_from):
        given = "labels" if labels is not None else "start_from"
        raise RunConfigError(f"{given}: {task} has no classes; they are of {' and '.join(WITH_CLASSES)}.")
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
    overrides = dict(overrides or {})
    if isinstance(batches := overrides.get("data.batch_size"), Mapping):
        overrides["data.batch_size"] = {**BATCH, **batches}
    # How the data are read decides what is found in them.
    config = config.with_overrides({name: value for name, value in overrides.items() if name.startswith("data.")})
    rows = _rows_of_any(config, tasks)
    config.data.tasks = list(rows)
    if not has_split(config, config.data.val_split):
        config.data.folds = max(2, min(HELD_OUT_PART, *(len(image_groups(found)) for found in rows.values())))
    batches = sum(math.ceil(_images(found) / config.data.batch_size[name]) for name, found in rows.items())
    config.logging.evaluate_every = max(1, round(STEPS_BETWEEN_EVALUATIONS / batches))
    return config.with_overrides(overrides)


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
            f"{base}: no such checkpoint folder, and not to be had from the Hub ({shortened(error)})."
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


_ANY_CLASS = "mAP50 of boxes, whatever their class"
_Figures = dict[str, dict[str, float | None]]


class _BeforeAfter:
    """Measures a base, and then its adapter, on the same images.

    On the lab's validation images: the task's main figure of the base, where it has all of the lab's classes, and of the
    adapter before its first step (`start`) and after its last; for detection also how well boxes fit whatever their class,
    which is what a base can do with classes that it has never been taught. On the base's: the same figures of the base,
    with the adapter switched off (which must not change them) and with it on (what the adapter has forgotten).

    Args:
        config ([`RunConfig`]): The run that trains the adapter.
        base_data (`str` or `Path`, *optional*): Data folder of the base.
    """

    def __init__(self, config: RunConfig, base_data: str | Path | None):
        self.config = config
        self.progress = config.logging.progress
        self.device = config.optimisation.device
        self.rows = validation_rows(config, config.data.tasks)
        self.base_data = None if base_data is None else str(base_data)

    @cached_property
    def base(self) -> tuple[Any, Any]:
        """The base and its processor."""
        return load_model(self.config.model.initial_checkpoint, self.device)

    @cached_property
    def base_rows(self) -> dict[str, list[Row]]:
        """Validation rows of the base's data, with its names of classes.

        Raises:
            DatasetError: There is nothing that the base was trained on.
        """
        if self.base_data is None:
            return {}
        model, _ = self.base
        found = load_rows(DataConfig(folders=[self.base_data]), "val", list(available_tasks(model)))
        found = {
            task: as_known(rows, names) if (names := _names(model, task)) else rows for task, rows in found.items()
        }
        odd = [task for task, rows in found.items() if not _knows(model, task, rows)]
        if odd:
            raise DatasetError(f"{self.base_data}: its {odd[0]} classes are not those of the base.")
        return found

    def before(self) -> dict[str, Any]:
        """Figures before training."""
        from accelerate.utils import set_seed

        model, processor = self.base
        known = available_tasks(model)
        taught = {task: rows for task, rows in self.rows.items() if task in known}
        lab: _Figures = {task: {"before": None} for task in self.rows}
        self._add(lab, "before", model, processor, taught)
        if self.rows:
            # The heads that the run will draw.
            set_seed(self.config.optimisation.seed)
            starting, its_processor = build(self.config, training_rows(self.config))
            starting.to(model.device)
            for task, rows in self.rows.items():
                lab[task]["start"] = self._figure(starting, its_processor, task, rows)
        base: _Figures = {}
        self._add(base, "before", model, processor, self.base_rows)
        # Neither stays in memory while the adapter is trained.
        del self.base
        rows = {"rows": _counts(self.rows), "base_rows": _counts(self.base_rows)}
        return {"lab": lab, "base": base, **rows}

    def after(self) -> dict[str, Any]:
        """Figures of the adapter in the run's output folder."""
        model, processor = load_model(self.config.output_dir, self.device)
        lab: _Figures = {}
        self._add(lab, "after", model, processor, self.rows)
        base: _Figures = {}
        if self.base_rows:
            self._add(base, "adapter on", model, processor, self.base_rows)
            model.disable_adapters()
            self._add(base, "adapter off", model, self.base[1], self.base_rows)
        return {"lab": lab, "base": base}

    def _add(self, found: _Figures, when: str, model: Any, processor: Any, rows_by_task: Mapping[str, Sequence[Row]]):
        for task, rows in rows_by_task.items():
            found.setdefault(task, {})[when] = self._figure(model, processor, task, rows)
        if "detection" in rows_by_task:
            figures = class_agnostic_precision(model, processor, rows_by_task["detection"], progress=self.progress)
            found.setdefault(_ANY_CLASS, {})[when] = figures["mAP50"]

    def _figure(self, model: Any, processor: Any, task: str, rows: Sequence[Row]) -> float | None:
        """The task's main figure; `None` where the model lacks classes of the rows."""
        rows = as_known(rows, names) if (names := _names(model, task)) else rows
        if not _knows(model, task, rows):
            return None
        report = evaluate_model(model, processor, {task: rows}, progress=self.progress, bootstrap=0)
        return report[task].get(HEADLINES[task])

    def report(self, results: Mapping[str, Any]) -> Report:
        """The study as far as it is done."""
        before, after = results.get("before", {}), results.get("after", {})

        def part(name: str, data: Any, rows: str) -> dict[str, Any]:
            figures: _Figures = {}
            for found in (before, after):
                for row, columns in found.get(name, {}).items():
                    figures.setdefault(row, {}).update(columns)
            return {"data": data, "rows": before.get(rows, {}), "figures": figures}

        values = {
            "lab": part("lab", self.config.data.folders, "rows"),
            "base": part("base", self.base_data, "base_rows"),
            "folds": _fold_results(results),
        }
        return Report(values, before_after_lines(values))


def before_after_lines(values: Mapping[str, Any]) -> list[str]:
    """The tables of `before_after.md`.

    Args:
        values (`Mapping[str, Any]`): As [`adapt`] gives them.
    """
    lines = _table("The lab's validation images", values["lab"], ("before", "start", "after"))
    if not values["lab"]["rows"]:
        lines = ["Nothing was set aside to measure the adapter on; see the folds."]
    if values["base"]["data"] is not None:
        lines += ["", *_table("The base's validation images", values["base"], ("before", "adapter off", "adapter on"))]
    return lines + (["", *fold_lines(values["folds"])] if values["folds"] else [])


def _table(title: str, part: Mapping[str, Any], columns: Sequence[str]) -> list[str]:
    counts = ", ".join(f"{count} {task}" for task, count in part["rows"].items())
    rows = []
    for name, figures in part["figures"].items():
        label = f"{name} {HEADLINES[name]}" if name in HEADLINES else name
        known = [figures[column] for column in columns if figures.get(column) is not None]
        first, last = (known[0] if len(known) > 1 else None), figures.get(columns[-1])
        change = "" if first is None or last is None else f"{last - first:+.3f}"
        rows.append((label, *(shown(figures.get(column), missing="-") for column in columns), change))
    return [f"{title} ({counts} rows):", "", *table(("figure", *columns, "change"), rows)]


def _fold_results(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [result for name, result in results.items() if name.startswith("fold-")]


def _counts(rows: Mapping[str, Sequence[Row]]) -> dict[str, int]:
    return {task: len(found) for task, found in rows.items()}


def _names(model: Any, task: str) -> list[str]:
    if task == "detection":
        return [model.config.id2label[index] for index in range(model.config.num_labels)]
    return list(model.config.single_cell_labels) if task == "single_cell" else []


def _knows(model: Any, task: str, rows: Sequence[Row]) -> bool:
    names = _names(model, task)
    return not names or {name for row in rows for name in row_names(row)} <= set(names)


__all__ = ["ADAPTED_TASKS", "adapt", "adapt_config", "before_after_lines", "find_base", "has_split"]
