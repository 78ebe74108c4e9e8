"""What a model was trained on, as its card tells it: names, licences, sizes, and whether splits share images."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from unihema.errors import CardError

from .fields import is_repo_id


RECORD_FILE = "data.json"


@dataclass(frozen=True)
class DataSource:
    """A data set of a run.

    Args:
        name (`str`): What it is called.
        licence (`str`, *optional*): Its licence; an identifier of the Hub where there is one.
        source (`str`, *optional*): Where it is from: an address, or the id of a dataset on the Hub.
        images (`Mapping[str, int]`): Images of each split that was used; empty where nobody counted.
    """

    name: str
    licence: str | None = None
    source: str | None = None
    images: Mapping[str, int] = field(default_factory=dict)

    @property
    def hub_id(self) -> str | None:
        """Its id on the Hub, where that is its source."""
        return self.source if is_repo_id(self.source) else None


@dataclass(frozen=True)
class DataRecord:
    """The data of a run: `data.json` beside the checkpoint.

    Args:
        sources (`tuple[DataSource, ...]`): The data sets.
        compared (`Mapping[str, int]`): Files of each split that were compared; empty where none were.
        shared (`int`): How many files of the validation split are also in the training split, byte for byte.
    """

    sources: tuple[DataSource, ...] = ()
    compared: Mapping[str, int] = field(default_factory=dict)
    shared: int = 0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = RECORD_FILE) -> "DataRecord":
        """Reads what a run wrote.

        Raises:
            CardError: It has another form.
        """
        try:
            sources = tuple(DataSource(**entry) for entry in values["sources"])
            return cls(sources, dict(values["compared"]), int(values["shared"]))
        except (KeyError, TypeError, ValueError) as error:
            raise CardError(
                f"{source}: not the record of a run's data ({error!r}). Restore it, or delete it."
            ) from error

    @classmethod
    def of_checkpoint(cls, folder: str | Path) -> "DataRecord":
        """The record beside a checkpoint; an empty one where there is none.

        Raises:
            CardError: `data.json` is broken.
        """
        path = Path(folder) / RECORD_FILE
        if not path.is_file():
            return cls()
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CardError(f"{path}: broken JSON ({error}). Restore it, or delete it.") from error
        return cls.from_dict(values, str(path))

    def with_terms(self, licences: Mapping[str, str], origins: Mapping[str, str]) -> "DataRecord":
        """The record with licences and origins that the user knows.

        Args:
            licences (`Mapping[str, str]`): Name of a data set -> licence.
            origins (`Mapping[str, str]`): Name of a data set -> address or id on the Hub.

        Raises:
            CardError: A name that the record does not have; one without any data sets takes all names with a licence.
        """
        sources = self.sources or tuple(DataSource(name) for name in licences)
        known = {source.name for source in sources}
        for name in (*licences, *origins):
            if name not in known:
                raise CardError(f"No data set {name!r}; the run was trained on {', '.join(sorted(known)) or 'none'}.")
        told = (
            replace(
                source,
                licence=licences.get(source.name, source.licence),
                source=origins.get(source.name, source.source),
            )
            for source in sources
        )
        return replace(self, sources=tuple(told))

    def check(self) -> None:
        """Checks that a reader can tell what may be done with the model.

        Raises:
            CardError: No data set, or one without a licence.
        """
        if not self.sources:
            raise CardError("What the model was trained on is not recorded; name it: --data-license NAME=LICENCE.")
        for source in self.sources:
            if not source.licence:
                raise CardError(
                    f"The licence of the data set {source.name!r} is not known; give it: "
                    f"--data-license '{source.name}=LICENCE'."
                )


def data_lines(record: DataRecord) -> list[str]:
    """The section on training data: a table, and what the comparison of splits found."""
    if not record.sources:
        return ["What it was trained on is not recorded."]
    lines = ["| data | licence | images | from |", "|---|---|---|---|"]
    for source in record.sources:
        counts = ", ".join(f"{count} {split}" for split, count in source.images.items())
        cells = (source.name, source.licence or "not recorded", counts or "not counted", _link(source))
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", leakage_line(record)]


def leakage_line(record: DataRecord) -> str:
    """What is known of images that both splits have."""
    if len(record.compared) < 2:
        return "Whether validation images are also among the training images was not checked."
    counts = " and ".join(f"{count} {split} images" for split, count in record.compared.items())
    found = f"{record.shared} validation images are also training images" if record.shared else "none is in both"
    return (
        f"Leakage: the files of {counts} were compared (SHA-256): {found}. Images that were saved anew, and other images "
        "of the same slide or patient, are not found that way."
    )


def terms_lines(record: DataRecord) -> Iterable[str]:
    """A line for each data set's licence."""
    return [f"- Data, {source.name}: {source.licence or 'not recorded'}." for source in record.sources]


def hub_datasets(record: DataRecord) -> Sequence[str] | None:
    """Ids of those data sets that are on the Hub."""
    return [source.hub_id for source in record.sources if source.hub_id] or None


def _link(source: DataSource) -> str:
    if source.hub_id:
        return f"[{source.hub_id}](https://huggingface.co/datasets/{source.hub_id})"
    return source.source or "the folder of that name"


__all__ = ["RECORD_FILE", "DataRecord", "DataSource", "data_lines", "hub_datasets", "leakage_line", "terms_lines"]
