"""Rows of splits that were written as Parquet shards (see shard_writer.py), read a few at a time.

A run needs what an index says (how many samples there are, which names occur) and the rows of the batch at hand; so memory
does not grow with the data. The order of samples is decided from the index alone, and a row group, which is what Parquet
reads at once, is kept while the samples shuffled with it are used.
"""

import io
import itertools
import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unihema.errors import DatasetError
from unihema.modeling_unihema.tasks import LANGUAGE_TASKS
from unihema.training.data.label_names import rename_rows
from unihema.training.data.lazy_rows import WINDOW, ConsecutiveGroups, LazyRows


Row = dict[str, Any]
INDEX_FILE = "shards.json"
FORMAT = "unihema-shards-1"


class StoredFile(str):
    """An image or mask inside a shard, under a name that no other has; a `str`, so that rows of one image are known by it.

    Args:
        name (`str`): The name.
        rows ([`StoredRows`]): Where it is.
        sample (`int`): Number of its sample.
        column (`str`): `"image"` or `"mask"`.
    """

    def __new__(cls, name: str, rows: "StoredRows", sample: int, column: str):
        made = super().__new__(cls, name)
        made.rows, made.sample, made.column = rows, sample, column
        return made

    def __getnewargs__(self):
        return str(self), self.rows, self.sample, self.column

    def content(self) -> bytes:
        """The bytes of the file it was made from."""
        return self.rows.content(self.sample, self.column)

    def opened(self) -> Image.Image:
        """The image, as PIL opens it.

        Raises:
            DatasetError: It is none.
        """
        try:
            return Image.open(io.BytesIO(self.content()))
        except OSError as error:
            raise DatasetError(f"{self}: not a readable image ({error}). Write the shards again without it.") from error


class StoredRows(LazyRows):
    """Rows of one task in the shards of one split.

    Args:
        folder (`str` or `Path`): The split, which holds `shards.json`.
        task (`str`): The task.
        names (`Mapping[str, str]`, *optional*): Class names to replace.

    Raises:
        DatasetError: The index cannot be used, or a shard of it is missing.
    """

    def __init__(self, folder: str | Path, task: str, names: Mapping[str, str] | None = None):
        self.folder, self.task, self.names = Path(folder), task, dict(names or {})
        index = read_index(self.folder)
        entry = index["tasks"][task]
        # As of any data folder, wherever it was copied; the index keeps the name of the one it was written from.
        self.dataset = self.folder.resolve().parent.name
        # They tell names only, and have no files.
        nowhere = {"image": str(self.folder), "mask": str(self.folder)}
        self.witnesses = rename_rows([self._complete(row) | nowhere for row in entry["witnesses"]], self.names)
        self._files: list[tuple[str, int]] = []
        sizes: list[int] = []
        for shard in entry["shards"]:
            if not (self.folder / shard["file"]).is_file():
                raise DatasetError(
                    f"{self.folder / shard['file']} is missing: write the shards again, or copy all of them."
                )
            self._files += [(shard["file"], number) for number in range(len(shard["row_groups"]))]
            sizes += shard["row_groups"]
        self._starts = np.concatenate([[0], np.cumsum(sizes)])
        bounds = self._starts.tolist()
        self.sources = [(self.dataset, [range(first, last) for first, last in itertools.pairwise(bounds)])]
        self.groups = ConsecutiveGroups(self._row_counts(entry))
        self._kept: OrderedDict[int, dict[str, list]] = OrderedDict()

    def _row_counts(self, entry: Mapping[str, Any]) -> np.ndarray:
        """How many rows each sample has: one, but for an image with several questions."""
        samples = int(self._starts[-1])
        if self.task not in LANGUAGE_TASKS:
            return np.ones(samples, dtype=np.int32)
        import pyarrow.parquet as parquet

        columns = [
            parquet.read_table(self.folder / shard["file"], columns=["row_count"])["row_count"].to_numpy()
            for shard in entry["shards"]
        ]
        return np.concatenate(columns).astype(np.int32)

    def __getstate__(self) -> dict[str, Any]:
        # A loader process reads for itself.
        return {**self.__dict__, "_kept": OrderedDict()}

    def __len__(self) -> int:
        return self.groups.rows

    def __getitem__(self, number: int) -> Row:
        sample, place = self.groups.locate(number)
        return self._rows_of(sample, self._group_of(sample))[place]

    def __iter__(self) -> Iterator[Row]:
        """Every row in turn, without its image, which is read when it is opened."""
        for number, (first, last) in enumerate(itertools.pairwise(self._starts.tolist())):
            group = self._read(number, ["rows"])
            for sample in range(first, last):
                yield from self._rows_of(sample, group)

    def renamed(self, names: Mapping[str, str]) -> "StoredRows":
        """The same rows with other class names."""
        chained = {old: names.get(new, new) for old, new in self.names.items()}
        return StoredRows(self.folder, self.task, {**names, **chained})

    def content(self, sample: int, column: str) -> bytes:
        """The bytes of a sample's image or mask."""
        number = self._number_of(sample)
        return self._group_of(sample)[column][sample - int(self._starts[number])]["bytes"]

    def _number_of(self, sample: int) -> int:
        return int(np.searchsorted(self._starts, sample, side="right")) - 1

    def _group_of(self, sample: int) -> dict[str, list]:
        number = self._number_of(sample)
        if number in self._kept:
            self._kept.move_to_end(number)
        else:
            self._kept[number] = self._read(number, None)
            # One window ends while the next begins.
            while len(self._kept) > WINDOW + 2:
                self._kept.popitem(last=False)
        return self._kept[number]

    def _read(self, number: int, columns: list[str] | None) -> dict[str, list]:
        import pyarrow.parquet as parquet

        name, group = self._files[number]
        try:
            with parquet.ParquetFile(self.folder / name) as file:
                table = file.read_row_group(group, columns=columns)
        except (OSError, ValueError, IndexError) as error:
            raise DatasetError(f"{self.folder / name}: row group {group} cannot be read ({error}).") from error
        return {column: table[column].to_pylist() for column in table.column_names}

    def _rows_of(self, sample: int, group: Mapping[str, list]) -> list[Row]:
        place = sample - int(self._starts[self._number_of(sample)])
        rows = []
        for stored in json.loads(group["rows"][place]):
            row = self._complete(stored)
            row["image"] = StoredFile(f"{self.folder}/{self.task}#{sample}", self, sample, "image")
            if self.task == "segmentation":
                row["mask"] = StoredFile(f"{self.folder}/{self.task}#{sample}.mask", self, sample, "mask")
            rows.append(row)
        return rename_rows(rows, self.names)

    def _complete(self, row: Row) -> Row:
        row = {"dataset": self.dataset, "task": self.task, **row}
        if row.get("size") is not None:
            row["size"] = tuple(row["size"])
        return row


def read_index(folder: Path) -> dict[str, Any]:
    """What `shards.json` of a split says.

    Raises:
        DatasetError: It cannot be read, or is of another format.
    """
    path = folder / INDEX_FILE
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path}: cannot be read as JSON ({error}). Write the shards again.") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise DatasetError(
            f"{path}: not an index of shards that this version reads ({FORMAT}). Write the shards again."
        )
    return index


def read_stored(folder: Path, tasks: Sequence[str], names: Mapping[str, str]) -> dict[str, StoredRows]:
    """Rows of each of `tasks` that a split of shards has.

    Raises:
        DatasetError: The index or a shard cannot be used.
    """
    there = read_index(folder)["tasks"]
    return {task: StoredRows(folder, task, names) for task in tasks if task in there}
