"""The card written beside a trained checkpoint: what it does, what was measured, how to use it."""

from collections.abc import Iterator, Mapping
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
        metrics (`Mapping`, *optional*): What was measured on the validation data, numbers at any depth.

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
    numbers = list(_numbers(metrics or {}))
    if numbers:
        lines += ["## Measured on its validation data", "", "| metric | value |", "|---|---|"]
        lines += [f"| {name} | {value} |" for name, value in numbers]
        lines += ["", "Other laboratories, stains and microscopes were not measured.", ""]
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


def _numbers(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        label = f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{label}, ")
        elif isinstance(value, bool):
            yield label, "yes" if value else "no"
        elif isinstance(value, int):
            yield label, str(value)
        elif isinstance(value, float):
            yield label, f"{value:.4g}"


__all__ = ["checkpoint_card"]
