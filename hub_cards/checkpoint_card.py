"""The card written beside a checkpoint: what it does, what it was trained on, what was measured, how to use it."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData

from unihema.modeling_unihema.tasks import TASK_TABLE

from .data_sources import DataRecord, data_lines, hub_datasets
from .fields import check_fields, is_repo_id
from .results import eval_results, metric_ids, result_lines
from .terms import (
    CITATION,
    INTENDED_USE,
    PAPER,
    TAGS,
    environment_line,
    licence_fields,
    limits_lines,
    terms_section,
    training_line,
)
from .usage import checkpoint_usage, pipeline_of


if TYPE_CHECKING:
    from unihema.modeling_unihema.configuration_unihema import UniHemaConfig


DOES = {
    "detection": "finds cells: box, class, score and the attributes of white cells",
    "segmentation": "masks the cells that the prompt names",
    "single_cell": "names the cell of a single-cell crop",
    "question_answering": "answers questions about an image",
    "cloze": "fills in sentences about an image",
}


def checkpoint_card(
    config: "UniHemaConfig",
    metrics: Mapping[str, Any] | None = None,
    *,
    data: DataRecord | None = None,
    run: Mapping[str, Any] | None = None,
    name: str = "A UniHema checkpoint",
    licence: str | None = None,
    licence_name: str | None = None,
    licence_link: str | None = None,
    base_model: str | None = None,
) -> str:
    """The card of a checkpoint. What is not known it says in words, and leaves out of its metadata.

    Args:
        config ([`UniHemaConfig`]): The checkpoint's configuration.
        metrics (`Mapping`, *optional*): The report of `evaluate_model` on the validation data: task -> figures.
        data ([`DataRecord`], *optional*): What it was trained on.
        run (`Mapping`, *optional*): The run's configuration, as in `run_config.json`.
        name (`str`): Its title.
        licence (`str`, *optional*): Of the weights, as the Hub calls it.
        licence_name (`str`, *optional*): Name of a licence that the Hub calls `other`.
        licence_link (`str`, *optional*): Where that is to be read.
        base_model (`str`, *optional*): Id of the checkpoint that training went on from; the run's when missing and on
            the Hub.

    Returns:
        `str`: The text of `README.md`.

    Raises:
        CardError: An empty field, or a licence that the Hub does not know.
    """
    tasks = trained_tasks(config)
    record = data or DataRecord()
    licences = licence_fields(licence, licence_name, licence_link)
    split = ((run or {}).get("data") or {}).get("val_split") or "val"
    initial = ((run or {}).get("model") or {}).get("initial_checkpoint")
    if base_model is None and initial and is_repo_id(initial) and not _is_folder(initial):
        base_model = initial
    results = eval_results(metrics, record, split)
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag=pipeline_of(tasks),
        **licences,
        base_model=base_model,
        datasets=hub_datasets(record),
        metrics=metric_ids(metrics),
        tags=list(TAGS),
        eval_results=results,
        model_name=name if results else None,
    )
    check_fields(metadata.to_dict(), "metadata of the card")
    shown = result_lines(metrics)
    measured = [*shown, "", "By class and question: `metrics.md`."] if shown else []
    sections = {
        "What it does": _does(config, tasks),
        "Intended use": INTENDED_USE,
        "Use": checkpoint_usage(tasks),
        "Training data": data_lines(record),
        "Training": [line for line in (training_line(run),) if line],
        "Measured on its validation data": measured,
        "Limits": limits_lines(tasks, bool(shown), bool(config.trained.detection_thresholds)),
        "Terms": terms_section(licences, record),
        "Environment": [line for line in (environment_line(run),) if line],
        "Citation": CITATION,
    }
    if not shown:
        sections["Limits"] = ["- Nothing was measured on validation data.", *sections["Limits"]]
    summary = f"A checkpoint of [UniHema]({PAPER}), one model for blood smears."
    return card_text(ModelCard, metadata, name, summary, sections)


def card_text(card_class: type, metadata: Any, name: str, summary: str, sections: Mapping[str, Sequence[str]]) -> str:
    """A card of metadata, title, summary and those sections that say something."""
    lines = [f"# {name}", "", summary, ""]
    for heading, body in sections.items():
        if body:
            lines += [f"## {heading}", "", *body, ""]
    return str(card_class(f"---\n{metadata.to_yaml()}\n---\n\n" + "\n".join(lines)))


def trained_tasks(config: "UniHemaConfig") -> list[str]:
    """What a checkpoint was trained for; all that its head does where that is not recorded."""
    architecture = (getattr(config, "architectures", None) or [""])[0]
    trained = config.trained.tasks
    head = [name for name, task in TASK_TABLE.items() if task.model_class == architecture] or list(TASK_TABLE)
    return [task for task in head if task in (trained or head)]


def classes_lines(config: "UniHemaConfig", tasks: Sequence[str]) -> list[str]:
    """The names that a checkpoint gives to cells."""
    lines = []
    if "detection" in tasks:
        lines += ["", f"Detection classes: {', '.join(config.id2label.values())}.", ""]
        lines += [f"- {name}: {', '.join(values)}" for name, values in config.morphology.items()]
    if "single_cell" in tasks:
        lines += ["", f"Single-cell classes: {', '.join(config.single_cell_labels)}."]
    return lines


def _does(config: "UniHemaConfig", tasks: Sequence[str]) -> list[str]:
    return [*(f"- `{task}`: {DOES[task]}" for task in tasks), *classes_lines(config, tasks)]


def _is_folder(name: str) -> bool:
    from pathlib import Path

    return Path(name).is_dir()


__all__ = ["DOES", "card_text", "checkpoint_card", "classes_lines", "trained_tasks"]
