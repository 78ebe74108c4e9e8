"""The card of a folder on this disk, from what lies in it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unihema.errors import CardError

from .adapter_card import adapter_card
from .checkpoint_card import DOES, checkpoint_card, trained_tasks
from .data_sources import DataRecord
from .fields import PLACEHOLDERS, check_card
from .usage import HERE


CARD_FILE, ADAPTER_CONFIG = "README.md", "adapter_config.json"


def folder_card(
    folder: str | Path,
    *,
    licence: str | None,
    name: str | None = None,
    licence_name: str | None = None,
    licence_link: str | None = None,
    data_licences: Mapping[str, str] | None = None,
    data_sources: Mapping[str, str] | None = None,
    base_model: str | None = None,
    task: str | None = None,
) -> str:
    """A card that may be published, of a checkpoint or an adapter.

    It is written from `config.json` or `adapter_config.json`, and where they are there from `metrics.json`,
    `run_config.json` and `data.json`.

    Args:
        folder (`str` or `Path`): The checkpoint or adapter.
        licence (`str`, *optional*): Of the weights, as the Hub calls it; only the user knows it.
        name (`str`, *optional*): Title; the folder's name when missing.
        licence_name (`str`, *optional*): Name of a licence that the Hub calls `other`.
        licence_link (`str`, *optional*): Where that is to be read.
        data_licences (`Mapping[str, str]`, *optional*): Name of a data set -> its licence, where it is not recorded.
        data_sources (`Mapping[str, str]`, *optional*): Name of a data set -> where it is from.
        base_model (`str`, *optional*): Id of the base checkpoint; an adapter's own when missing.
        task (`str`, *optional*): What an adapter was trained for; what was measured with it when missing.

    Returns:
        `str`: The text of `README.md`.

    Raises:
        CardError: Something that a reader needs is not known; the message says how to give it.
        CheckpointError: The folder is neither checkpoint nor adapter, or not whole.
    """
    folder = Path(folder)
    name = name or folder.resolve().name
    metrics, run = read_json(folder / "metrics.json"), read_json(folder / "run_config.json")
    record = DataRecord.of_checkpoint(folder).with_terms(data_licences or {}, data_sources or {})
    record.check()
    if licence is None:
        raise CardError(
            "The licence of the weights is not known; give it: --license LICENCE. It must be one that the data allow: "
            + ", ".join(f"{source.name} ({source.licence})" for source in record.sources)
            + "."
        )
    terms = {"licence": licence, "licence_name": licence_name, "licence_link": licence_link}
    if (folder / ADAPTER_CONFIG).is_file():
        adapter = read_json(folder / ADAPTER_CONFIG)
        text = adapter_card(
            adapter,
            base_model or adapter.get("base_model_name_or_path") or "",
            task or _only_task(metrics, folder),
            name=name,
            data=record,
            metrics=metrics,
            run=run,
            own_processor=(folder / "processor_config.json").is_file(),
            **terms,
        )
    else:
        from unihema.checkpoint_files import checkpoint_files
        from unihema.modeling_unihema.configuration_unihema import UniHemaConfig

        checkpoint_files(folder)
        config = UniHemaConfig.from_pretrained(folder)
        stray = [measured for measured in metrics or {} if measured not in trained_tasks(config)]
        if stray:
            raise CardError(
                f"{folder / 'metrics.json'} measures {stray[0]}, which this checkpoint was not trained for: it is of "
                "another one. Measure again with `unihema evaluate`."
            )
        text = checkpoint_card(config, metrics, data=record, run=run, name=name, base_model=base_model, **terms)
    check_card(text, source=f"card of {folder}")
    return text


def check_replaceable(path: Path) -> None:
    """Checks that a card may be written over: that there is none, or one that was generated.

    Raises:
        CardError: Somebody wrote it by hand.
    """
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if text and HERE not in text and PLACEHOLDERS[0] not in text.lower():
        raise CardError(f"{path}: somebody wrote this file by hand. Replace it with --overwrite, or move it first.")


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON file of a folder; nothing where it is not there.

    Raises:
        CardError: It is broken.
    """
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CardError(f"{path}: broken JSON ({error}). Restore the file, or delete it.") from error


def _only_task(metrics: Mapping[str, Any] | None, folder: Path) -> str:
    tasks = [task for task in metrics or {} if task in DOES]
    if len(tasks) != 1:
        raise CardError(f"{folder}: what the adapter was trained for is not recorded; give it: --task TASK.")
    return tasks[0]


__all__ = ["ADAPTER_CONFIG", "CARD_FILE", "check_replaceable", "folder_card", "read_json"]
