"""The card of a data folder: what is in it, whose it is, and whether its splits share images."""

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData

from unihema.errors import CardError
from unihema.modeling_unihema.tasks import TASK_TABLE

from .checkpoint_card import card_text
from .data_sources import DataRecord, leakage_line
from .fields import check_fields
from .terms import TAGS, licence_fields
from .usage import dataset_usage


_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


def dataset_card(
    record: DataRecord,
    tasks: Mapping[str, Mapping[str, int]],
    labels: Mapping[str, Sequence[str]],
    *,
    description: str,
    licence_name: str | None = None,
    licence_link: str | None = None,
) -> str:
    """The card of one data folder.

    Args:
        record ([`DataRecord`]): One data set, with its licence, its origin, and its images of each split.
        tasks (`Mapping[str, Mapping[str, int]]`): Task -> split -> rows.
        labels (`Mapping[str, Sequence[str]]`): Task -> the names that its rows use.
        description (`str`): What the images show, and who annotated them.
        licence_name (`str`, *optional*): Name of a licence that the Hub calls `other`.
        licence_link (`str`, *optional*): Where that is to be read.

    Returns:
        `str`: The text of `README.md`.

    Raises:
        CardError: No licence, origin, description, row or image.
    """
    if len(record.sources) != 1:
        raise CardError(f"A dataset card is about one data set, not {len(record.sources)}.")
    source = record.sources[0]
    record.check()
    if not source.source:
        raise CardError(f"Where {source.name!r} is from is not known; give it: --data-source ADDRESS.")
    if not description.strip():
        raise CardError(f"What {source.name!r} shows is not said; give it: --description TEXT.")
    if not tasks or not sum(source.images.values()):
        raise CardError(f"{source.name!r} has no images that the readers find; see docs/data.md for the layouts.")
    text_tasks = {"question_answering", "cloze"} & set(tasks)
    metadata = DatasetCardData(
        pretty_name=source.name,
        **licence_fields(source.licence, licence_name, licence_link),
        task_categories=list(dict.fromkeys(TASK_TABLE[task].pipeline for task in tasks)),
        size_categories=_size(sum(source.images.values())),
        language="en" if text_tasks else None,
        source_datasets=[source.hub_id] if source.hub_id else None,
        tags=list(TAGS),
    )
    check_fields(metadata.to_dict(), "metadata of the card")
    splits = list(source.images)
    table = [f"| | {' | '.join(splits)} |", "|---|" + "---|" * len(splits)]
    table.append("| images | " + " | ".join(str(source.images[split]) for split in splits) + " |")
    for task, counts in tasks.items():
        table.append(f"| {task} rows | " + " | ".join(str(counts.get(split, 0)) for split in splits) + " |")
    names = [f"- {task}: {', '.join(found)}" for task, found in labels.items() if found]
    sections: dict[str, Any] = {
        "Contents": [*table, "", leakage_line(record)],
        "Labels": names,
        "Intended use": [
            "Research on images of blood smears. It is not a medical device, and a model trained on it is none either.",
        ],
        "Use": dataset_usage(splits[0]),
        "Origin": [source.source],
        "Terms": [f"- Images and annotations: {licence_name or source.licence}."],
    }
    return card_text(DatasetCard, metadata, source.name, description.strip(), sections)


def _size(images: int) -> str:
    return next((name for limit, name in _SIZES if images < limit), "1M<n<10M")


__all__ = ["dataset_card"]
