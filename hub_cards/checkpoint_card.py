"""The card written beside a trained checkpoint: what it does, what was measured, how to use it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from unihema.modeling_unihema.configuration_unihema import UniHemaConfig


_DOES = {
    "detection": "finds cells: box, class, score and the attributes of white cells",
    "segmentation": "masks the cells that the prompt names",
    "single_cell": "names the cell of a single-cell crop",
    "question_answering": "answers questions about an image",
    "cloze": "fills in sentences about an image",
}


def checkpoint_card(config: "UniHemaConfig", metrics: Mapping[str, Any] | None = None) -> str:
    """A short Markdown card for a checkpoint.

    Args:
        config ([`UniHemaConfig`]): The checkpoint's configuration.
        metrics (`Mapping`, *optional*): The report of `evaluate_model` on the validation data: task -> figures.

    Returns:
        `str`: The text of `README.md`.
    """
    tasks = getattr(config, "trained_tasks", None) or list(_DOES)
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: object-detection" if "detection" in tasks else "pipeline_tag: image-classification",
        "tags: [unihema, hematology, blood-smear, microscopy]",
        "---",
        "",
        "# A UniHema checkpoint",
        "",
        "Written by [UniHema](https://arxiv.org/abs/2511.13889) training. For research; not a medical device.",
        "",
        "## What it does",
        "",
        *(f"- `{task}`: {_DOES[task]}" for task in tasks if task in _DOES),
        "",
    ]
    if "detection" in tasks:
        lines += [f"Detection classes: {', '.join(config.id2label.values())}.", ""]
        lines += [f"- {name}: {', '.join(values)}" for name, values in config.morphology.items()]
        lines += [""]
    if "single_cell" in tasks:
        lines += [f"Single-cell classes: {', '.join(config.single_cell_labels)}.", ""]
    figures = [(task, _figures(values)) for task, values in (metrics or {}).items()]
    if figures:
        lines += ["## Measured on its validation data", "", "| task | rows | figures |", "|---|---|---|"]
        lines += [f"| {task} | {metrics[task].get('rows', '')} | {shown} |" for task, shown in figures]
        lines += [
            "",
            "By class and question: `metrics.md`. Other laboratories, stains and microscopes were not measured.",
            "",
        ]
    else:
        lines += ["Nothing was measured on validation data.", ""]
    lines += [
        "## Use",
        "",
        "```bash",
        "unihema predict THIS_FOLDER smear.png --output results",
        "```",
        "",
        "## Terms",
        "",
        "The code is Apache-2.0. The weights follow the terms of the data they were trained on; `run_config.json`, where it",
        "is there, names the data folders.",
        "",
    ]
    return "\n".join(lines)


def _figures(values: Mapping[str, Any]) -> str:
    """The figures of a whole task, without those of its classes, attributes and questions."""
    shown = [f"{name} {value:.3f}" for name, value in values.items() if isinstance(value, float)]
    morphology = values.get("morphology") or {}
    shown += [f"morphology {name} {value:.3f}" for name, value in morphology.items() if isinstance(value, float)]
    return ", ".join(shown)


__all__ = ["checkpoint_card"]
