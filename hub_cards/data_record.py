"""What a model was trained on: names, licences and sizes of the data sets, and whether splits share images."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from unihema.checkpoint_files import read_json
from unihema.errors import CardError

from .check import is_repo_id


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
    def of_checkpoint(cls, folder: str | Path) -> "DataRecord":
        """The record beside a checkpoint; an empty one where there is none.

        Raises:
            CardError: `data.json` has another form.
            CheckpointError: It is no JSON.
        """
        path = Path(folder) / RECORD_FILE
        if not path.is_file():
            return cls()
        values: Any = read_json(path)
        try:
            sources = tuple(DataSource(**entry) for entry in values["sources"])
            return cls(sources, dict(values["compared"]), int(values["shared"]))
        except (KeyError, TypeError, ValueError) as error:
            raise CardError(f"{path}: not the record of a run's data ({error!r}). Restore it, or delete it.") from error

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
            replace(one, licence=licences.get(one.name, one.licence), source=origins.get(one.name, one.source))
            for one in sources
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

    @property
    def leakage(self) -> str:
        """What is known of images that both splits have, in a sentence or two."""
        if len(self.compared) < 2:
            return "Whether validation images are also among the training images was not checked."
        counts = " and ".join(f"{count} {split} images" for split, count in self.compared.items())
        found = f"{self.shared} validation images are also training images" if self.shared else "none is in both"
        return (
            f"Leakage: the files of {counts} were compared (SHA-256): {found}. Images that were saved anew, and other "
            "images of the same slide or patient, are not found that way."
        )


__all__ = ["RECORD_FILE", "DataRecord", "DataSource"]
