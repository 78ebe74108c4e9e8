"""From data and settings to a model and its processor."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unihema.errors import DatasetError, RunConfigError
from unihema.modeling_unihema.configuration_unihema import UniHemaConfig
from unihema.modeling_unihema.modeling_unihema import UniHemaForMultiTask
from unihema.modeling_unihema.tasks import LANGUAGE_TASKS, TASKS
from unihema.processing_unihema.processing_unihema import UniHemaProcessor
from unihema.training.adapters import attach_adapter
from unihema.training.data.class_tree import known_parents, unify_names
from unihema.training.data.readers import load_folder
from unihema.training.data.rows import BadRows, Row, class_names, morphology_schema, single_cell_names, witnesses
from unihema.training.data.shards import joined
from unihema.training.data.splits import fold_rows, is_held_out
from unihema.training.data.verify import verify_rows
from unihema.training.evaluation import draw_rows
from unihema.training.run.config import DataConfig, RunConfig
from unihema.training.run.pretrained_backbone import (
    BACKBONES_IN_MINUS_ONE_TO_ONE,
    LITE0_BACKBONE,
    load_pretrained_backbone,
)


def load_rows(config: DataConfig, split: str, tasks: Sequence[str] | None = None) -> dict[str, list[Row]]:
    """Rows of each task from all folders; of `tasks`, or of `config.tasks` when not given. A folder may have none of them.

    Raises:
        DatasetError: No folder, a folder without the split, or none that has any of the tasks.
    """
    if not config.folders:
        raise DatasetError("No data folder given.")
    tasks = config.tasks if tasks is None else tasks
    several = len(config.folders) > 1
    parts: dict[str, list[Sequence[Row]]] = {}
    for folder in config.folders:
        found = load_folder(
            folder,
            split,
            tasks=None if several else tasks,
            prompt=config.segmentation_prompt,
            rename=config.rename,
            attributes_as_detection=config.attributes_as_detection,
            on_invalid=config.on_invalid,
        )
        for task, more in found.items():
            if tasks is None or task in tasks:
                parts.setdefault(task, []).append(
                    [row for row in more if not is_held_out(row, config.hold_out)] if config.hold_out else more
                )
    rows = {task: joined(found) for task, found in parts.items()}
    if not rows:
        raise DatasetError(
            f"No data for {', '.join(tasks or TASKS)} in split '{split}' of {', '.join(config.folders)}."
        )
    return {task: rows[task] for task in TASKS if len(rows.get(task, ()))}


def training_rows(config: RunConfig) -> dict[str, list[Row]]:
    """Rows of the training split, at most `max_samples` of a task.

    Raises:
        DatasetError: A task that was asked for is in no folder.
    """
    rows = load_rows(config.data, config.data.train_split)
    if config.data.canonical_names:
        rows = unify_names(rows)
    missing = [task for task in config.data.tasks or () if task not in rows]
    if missing:
        raise DatasetError(
            f"No data for {', '.join(missing)} in split '{config.data.train_split}' of "
            f"{', '.join(config.data.folders)}; they have {', '.join(rows)}. Take it out of data.tasks or add a folder."
        )
    seed, data = config.optimisation.seed, config.data
    if data.max_samples is not None:
        rows = {task: draw_rows(found, data.max_samples, seed) for task, found in rows.items()}
    return rows if data.folds is None else fold_rows(rows, data.folds, data.fold, seed, held_out=False)


def validation_rows(config: RunConfig, tasks: Any) -> dict[str, list[Row]]:
    """Rows of the validation split for `tasks`, or the fold held out of the training split; none without either."""
    data = config.data
    if data.folds is not None:
        whole = dataclasses.replace(config, data=dataclasses.replace(data, folds=None))
        held_out = fold_rows(training_rows(whole), data.folds, data.fold, config.optimisation.seed, held_out=True)
        return {task: held_out[task] for task in tasks if task in held_out}
    if not config.data.val_split:
        return {}
    rows = load_rows(config.data, config.data.val_split, list(tasks))
    return {task: rows[task] for task in tasks if task in rows}


def verified_rows(
    config: RunConfig, rows: dict[str, list[Row]], val_rows: dict[str, list[Row]]
) -> tuple[dict[str, list[Row]], dict[str, list[Row]]]:
    """Rows to train on and to validate on, once every image and mask that they list was read; see [`verify_rows`].

    Raises:
        BadRowsError: Files that cannot be used, all named, with `data.on_invalid="error"`.
        DatasetError: With `"skip"`: no row is left to train a task on.
    """
    bad = BadRows()
    groups = {("train", task): found for task, found in rows.items()} | {
        ("val", task): v for task, v in val_rows.items()
    }
    texts = [group for group in groups if config.data.text_only and group[1] in LANGUAGE_TASKS]
    kept = verify_rows(groups, bad, texts)
    bad.settle(config.data.on_invalid)
    for task in rows:
        if ("train", task) not in kept:
            raise DatasetError(f"Every training row of {task} is bad: {bad.messages[0]}")
    return tuple({task: found for (split, task), found in kept.items() if split == name} for name in ("train", "val"))


def build(config: RunConfig, rows: dict[str, list[Row]]) -> tuple[UniHemaForMultiTask, UniHemaProcessor]:
    """The model to train and its processor: from a checkpoint, or from a preset with the names found in the data.

    Args:
        config ([`RunConfig`]): The run.
        rows (`dict[str, list[Row]]`): Training rows.

    Returns:
        `tuple[UniHemaForMultiTask, UniHemaProcessor]`: Both on the CPU.

    Raises:
        RunConfigError: The initial checkpoint is not there, or files of it are missing.
    """
    source = config.model.initial_checkpoint
    if source:
        if config.model.backbone_weights:
            raise RunConfigError("model.backbone_weights start a new model; model.initial_checkpoint has a backbone.")
        _check_checkpoint(Path(source))
        processor = UniHemaProcessor.from_pretrained(source)
        for task, size in config.data.image_sizes.items():
            processor.image_processor.task_sizes[task] = dict(size)
        processor.image_processor.size = processor.image_processor.task_sizes["detection"]
        model = UniHemaForMultiTask.from_pretrained(source, **config.model.overrides)
        model.config.default_prompt_ids = processor.default_prompt_ids()
        trained = set(model.config.trained_tasks or ()) | set(rows)
        model.config.trained_tasks = [task for task in TASKS if task in trained]
        if config.adapter.method != "none":
            attach_adapter(model, processor, config.adapter, rows)
        elif config.data.label_parents is not None or model.config.label_parents is None:
            model.config.label_parents = _label_parents(config.data, list(model.config.id2label.values()))
        return model, processor
    processor = UniHemaProcessor.from_default(config.model.tokenizer, **config.data.image_sizes)
    model_config = _new_config(config, rows, processor)
    processor.max_text_length = model_config.max_text_length
    model = UniHemaForMultiTask(model_config)
    if weights := config.model.backbone_weights:
        load_pretrained_backbone(model.model.visual_backbone.backbone, weights)
        if weights in BACKBONES_IN_MINUS_ONE_TO_ONE:
            processor.image_processor.image_mean = processor.image_processor.image_std = [0.5, 0.5, 0.5]
    return model, processor


def _check_checkpoint(folder: Path) -> None:
    # Transformers would take a folder that is not there for a name on the Hub, and a missing weight for a new one.
    if not folder.is_dir():
        raise RunConfigError(f"model.initial_checkpoint {folder}: no such folder. Name one that a training run wrote.")
    missing = [
        name for name in ("config.json", "processor_config.json", "tokenizer.json") if not (folder / name).exists()
    ]
    if missing or not any(folder.glob("*.safetensors")):
        raise RunConfigError(
            f"model.initial_checkpoint {folder} lacks {', '.join(missing) or 'its weights'}: copy the whole folder again."
        )


def _label_parents(config: DataConfig, names: list[str]) -> dict[str, str]:
    """The hierarchy of the model's detection classes, as asked for or as known.

    Raises:
        RunConfigError: A class in `data.label_parents` is not among them.
    """
    if config.label_parents is None:
        return known_parents(names)
    unknown = [name for name in config.label_parents if name not in names]
    if unknown:
        raise RunConfigError(
            f"data.label_parents: no class '{unknown[0]}'; the model's classes are {', '.join(names)}."
        )
    return dict(config.label_parents)


def _new_config(config: RunConfig, rows: dict[str, list[Row]], processor: UniHemaProcessor) -> UniHemaConfig:
    everything = [row for found in rows.values() for row in witnesses(found)]
    fields: dict[str, Any] = {"trained_tasks": list(rows)}
    if names := class_names(everything):
        fields["id2label"] = dict(enumerate(names))
        fields["label_parents"] = _label_parents(config.data, names)
        processor.default_prompts["detection"] = ", ".join(names)
    if labels := single_cell_names(everything):
        fields["single_cell_labels"] = labels
    if "detection" in rows:
        fields["morphology"] = morphology_schema(everything)
    prompts = [row["prompt"] for row in witnesses(rows.get("segmentation", ())) if row.get("prompt")]
    if prompts:
        processor.default_prompts["segmentation"] = fields["segmentation_label"] = prompts[0]
    fields["default_prompt_ids"] = processor.default_prompt_ids()
    if config.model.backbone_weights == "efficientnet-lite0":
        fields |= {"backbone_config": LITE0_BACKBONE, "freeze_backbone_norm": True}
    preset = UniHemaConfig.tiny if config.model.preset == "tiny" else UniHemaConfig.base
    model_config = preset(**{**fields, **config.model.overrides})
    # flan-T5 has a few more rows than its tokenizer has pieces; a preset's vocabulary is only a placeholder.
    given = model_config.text_config.vocab_size if "text_config" in config.model.overrides else 0
    model_config.text_config.vocab_size = max(given, len(processor.tokenizer))
    return model_config
