"""From data and settings to a model and its processor."""

from pathlib import Path
from typing import Any

from unihema.modeling_unihema.configuration_unihema import UniHemaConfig
from unihema.modeling_unihema.modeling_unihema import UniHemaForMultiTask
from unihema.processing_unihema.processing_unihema import UniHemaProcessor
from unihema.processing_unihema.prompts import TASKS, task_prompt
from unihema.training.data.readers import load_folder
from unihema.training.data.rows import DatasetError, Row, class_names, morphology_schema, single_cell_names
from unihema.training.evaluation import draw_rows
from unihema.training.run_config import DataConfig, RunConfig, RunConfigError


def load_rows(config: DataConfig, split: str) -> dict[str, list[Row]]:
    """Rows of each task from all folders.

    Raises:
        DatasetError: No folder, or a folder without the split or without any of the tasks.
    """
    if not config.folders:
        raise DatasetError("No data folder given.")
    rows: dict[str, list[Row]] = {}
    for folder in config.folders:
        found = load_folder(
            folder,
            split,
            tasks=config.tasks,
            prompt=config.segmentation_prompt,
            rename=config.rename,
            attributes_as_detection=config.attributes_as_detection,
            on_invalid=config.on_invalid,
        )
        for task, more in found.items():
            rows.setdefault(task, []).extend(more)
    return {task: rows[task] for task in TASKS if task in rows}


def training_rows(config: RunConfig) -> dict[str, list[Row]]:
    """Rows of the training split, at most `max_samples` of a task.

    Raises:
        DatasetError: A task that was asked for is in no folder.
    """
    rows = load_rows(config.data, config.data.train_split)
    missing = [task for task in config.data.tasks or () if task not in rows]
    if missing:
        raise DatasetError(
            f"No data for {', '.join(missing)} in split '{config.data.train_split}' of "
            f"{', '.join(config.data.folders)}; they have {', '.join(rows)}. Take it out of data.tasks or add a folder."
        )
    return {task: draw_rows(found, config.data.max_samples, config.optimisation.seed) for task, found in rows.items()}


def validation_rows(config: RunConfig, tasks: Any) -> dict[str, list[Row]]:
    """Rows of the validation split for `tasks`; none without a split."""
    if not config.data.val_split:
        return {}
    rows = load_rows(config.data, config.data.val_split)
    return {task: rows[task] for task in tasks if task in rows}


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
        _check_checkpoint(Path(source))
        processor = UniHemaProcessor.from_pretrained(source)
        for task, size in config.data.image_sizes.items():
            processor.image_processor.task_sizes[task] = dict(size)
        processor.image_processor.size = processor.image_processor.task_sizes["detection"]
        model = UniHemaForMultiTask.from_pretrained(source, **config.model.overrides)
        trained = set(model.config.trained_tasks or ()) | set(rows)
        model.config.trained_tasks = [task for task in TASKS if task in trained]
        return model, processor
    processor = UniHemaProcessor.from_default(config.model.tokenizer, **config.data.image_sizes)
    model_config = _new_config(config, rows, processor)
    processor.max_text_length = model_config.max_text_length
    return UniHemaForMultiTask(model_config), processor


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


def _new_config(config: RunConfig, rows: dict[str, list[Row]], processor: UniHemaProcessor) -> UniHemaConfig:
    everything = [row for found in rows.values() for row in found]
    fields: dict[str, Any] = {"trained_tasks": list(rows)}
    if names := class_names(everything):
        fields["id2label"] = dict(enumerate(names))
        processor.default_prompts["detection"] = ", ".join(names)
    if labels := single_cell_names(everything):
        fields["single_cell_labels"] = labels
    if "detection" in rows:
        fields["morphology"] = morphology_schema(everything)
    prompts = [row["prompt"] for row in rows.get("segmentation", ()) if row.get("prompt")]
    if prompts:
        processor.default_prompts["segmentation"] = fields["segmentation_label"] = prompts[0]
    fields["default_prompt_ids"] = {
        task: processor.tokenizer(task_prompt(task, names))["input_ids"]
        for task, names in processor.default_prompts.items()
    }
    preset = UniHemaConfig.tiny if config.model.preset == "tiny" else UniHemaConfig.base
    model_config = preset(**{**fields, **config.model.overrides})
    # flan-T5 has a few more rows than its tokenizer has pieces; a preset's vocabulary is only a placeholder.
    given = model_config.text_config.vocab_size if "text_config" in config.model.overrides else 0
    model_config.text_config.vocab_size = max(given, len(processor.tokenizer))
    return model_config
