"""The card of a PEFT adapter: which base it belongs to, what it changes, what was measured with it."""

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from unihema.errors import CardError

from .checkpoint_card import DOES, card_text
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
from .usage import adapter_usage, class_of_task, pipeline_of


# Longer patterns nobody reads.
_SHOWN_PATTERN = 100


def adapter_card(
    adapter: Mapping[str, Any],
    base_model: str,
    task: str,
    *,
    name: str,
    licence: str,
    data: DataRecord,
    licence_name: str | None = None,
    licence_link: str | None = None,
    metrics: Mapping[str, Any] | None = None,
    run: Mapping[str, Any] | None = None,
    own_processor: bool = False,
) -> str:
    """The card of an adapter.

    Args:
        adapter (`Mapping`): Its `adapter_config.json`.
        base_model (`str`): Id of its base on the Hub.
        task (`str`): What it was trained for.
        name (`str`): Title.
        licence (`str`): Of the adapter's weights, as the Hub calls it.
        data ([`DataRecord`]): What it was trained on.
        licence_name (`str`, *optional*): Name of a licence that the Hub calls `other`.
        licence_link (`str`, *optional*): Where that is to be read.
        metrics (`Mapping`, *optional*): What was measured with it: task -> figures.
        run (`Mapping`, *optional*): The run's configuration.
        own_processor (`bool`): Whether a processor lies beside it.

    Returns:
        `str`: The text of `README.md`.

    Raises:
        CardError: A base that is a folder of one machine, an unknown task, an empty field, or data without a licence.
    """
    if not is_repo_id(base_model):
        raise CardError(
            f"The adapter's base is {base_model!r}, which nobody else has. Push the base first and give its repository: "
            "--base lab/base."
        )
    if task not in DOES:
        raise CardError(f"Unknown task {task!r}; choose among {', '.join(DOES)}.")
    data.check()
    licences = licence_fields(licence, licence_name, licence_link)
    split = ((run or {}).get("data") or {}).get("val_split") or "val"
    results = eval_results(metrics, data, split)
    metadata = ModelCardData(
        library_name="peft",
        pipeline_tag=pipeline_of([task]),
        **licences,
        base_model=base_model,
        datasets=hub_datasets(data),
        metrics=metric_ids(metrics),
        tags=[*TAGS, "peft", str(adapter["peft_type"]).lower()],
        eval_results=results,
        model_name=name if results else None,
        base_model_relation="adapter",
    )
    check_fields(metadata.to_dict(), "metadata of the card")
    shown = result_lines(metrics)
    sections = {
        "What it does": [f"- `{task}`: {DOES[task]}", "", *_changes(adapter)],
        "Intended use": INTENDED_USE,
        "Use": adapter_usage(base_model, adapter_class(adapter, task), task, own_processor),
        "Training data": data_lines(data),
        "Training": [line for line in (training_line(run),) if line],
        "Measured on its validation data": shown,
        "Limits": [
            *([] if shown else ["- Nothing was measured on validation data."]),
            *limits_lines([task], bool(shown), False),
            f"- It fits `{base_model}` only; what that cannot do, the adapter need not mend.",
        ],
        "Terms": terms_section(licences, data, "Adapter weights"),
        "Environment": [line for line in (environment_line(run),) if line],
        "Citation": CITATION,
    }
    summary = f"A PEFT adapter for `{base_model}`, a checkpoint of [UniHema]({PAPER})."
    return card_text(ModelCard, metadata, name, summary, sections)


def adapter_class(adapter: Mapping[str, Any], task: str) -> str:
    """The class that an adapter was trained on; the one with the head of its task where PEFT did not note it."""
    noted = (adapter.get("auto_mapping") or {}).get("base_model_class") or ""
    return noted if noted.startswith("UniHemaFor") else class_of_task(task)


def _changes(adapter: Mapping[str, Any]) -> Sequence[str]:
    """What of the base it changes."""
    kind = str(adapter["peft_type"])
    targets = adapter.get("target_modules") or []
    # PEFT takes a pattern or a list of names.
    if isinstance(targets, str):
        short = len(targets) <= _SHOWN_PATTERN
        shown = [f"`{targets}`" if short else "the layers that `target_modules` in `adapter_config.json` matches"]
    else:
        shown = [f"`{target}`" for target in sorted(targets)]
    rank = f", rank {adapter['r']}" if adapter.get("r") else ""
    trained = [f"`{name}`" for name in adapter.get("modules_to_save") or []]
    lines = [f"{kind}{rank}, on {', '.join(shown)}." if shown else f"{kind}{rank}."]
    if trained:
        lines.append(f"Trained in full: {', '.join(trained)}.")
    return lines


__all__ = ["adapter_card", "adapter_class"]
