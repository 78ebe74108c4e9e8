"""Rows of splits that are Parquet shards: written once, and read a few at a time.

A shard is an ordinary Parquet file of `datasets` (`load_dataset("parquet", ...)` opens it): the files of images and masks as
they are, and the schema rows (rows.py) as JSON. Samples are shuffled once when they are written, since only samples of
neighbouring row groups are shuffled among each other when they are read.

A run needs what an index says (how many samples there are, which names occur) and the rows of the batch at hand, so memory
does not grow with the data. The order of samples follows from the index alone. A row group, which is what Parquet reads at
once, is kept while the samples shuffled with it are used.
"""

import hashlib
import io
import itertools
import json
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from unihema.errors import DatasetError, InputError
from unihema.files import contents, exclusive, shortened, write_atomically, write_json
from unihema.modeling_unihema.tasks import LANGUAGE_TASKS, TASKS
from unihema.processing_unihema.image_io import load_image
from unihema.training.data.class_tree import rename_rows, row_names
from unihema.training.data.layouts.files import UnsafeNameError, inside, parse_json, read_json
from unihema.training.data.rows import REQUIRED_KEYS, Row, check_rows, check_types, shown


INDEX_FILE = "shards.json"
PLAN_FILE = "shards.plan.json"
FORMAT = "unihema-shards-1"
SHARD_SAMPLES = 512
GROUP_SAMPLES = 16
# Blocks of samples (what is read at once) that are shuffled together, and so are in use at the same time.
WINDOW = 16
# Bytes of a row group, unpacked: what is read at once.
LARGEST_GROUP = 2 << 30


class LazyRows(Sequence):
    """Rows of one task that need not be in memory. The attributes describe them without reading a row.

    Attributes:
        witnesses (`list[Row]`): Rows among which every class, label, attribute value and prompt occurs.
        sources (`list[tuple[str, list[range]]]`): For each data set its name and its blocks: the numbers of samples that
            are read together.
        groups (`Sequence[Sequence[int]]`): The row numbers of each sample.
    """

    witnesses: list[Row]
    sources: list[tuple[str, list[range]]]
    groups: Sequence[Sequence[int]]

    @abstractmethod
    def renamed(self, names: Mapping[str, str]) -> Self:
        """The same rows with other class names."""


class ListedRows(LazyRows):
    """Rows in memory, behind the interface of those that are not.

    Args:
        rows (`Sequence[Row]`): Of one task and one data set.
    """

    def __init__(self, rows: Sequence[Row]):
        self.rows = self.witnesses = list(rows)
        self.groups = rows_by_sample(self.rows)
        self.sources = [(self.rows[0]["dataset"], [range(len(self.groups))])]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Row:
        return self.rows[number]

    def renamed(self, names: Mapping[str, str]) -> "ListedRows":
        """The same rows with other class names."""
        return ListedRows(rename_rows(self.rows, names))


class JoinedRows(LazyRows):
    """Rows of several data sets, some of which are not in memory.

    Args:
        parts (`Sequence[LazyRows | list[Row]]`): The rows of each, of one task.
    """

    def __init__(self, parts: Sequence[Any]):
        self.parts: list[LazyRows] = [
            part if isinstance(part, LazyRows) else ListedRows(part) for part in parts if len(part)
        ]
        self.witnesses = [row for part in self.parts for row in part.witnesses]
        self._rows = np.cumsum([0, *map(len, self.parts)]).tolist()
        samples = np.cumsum([0, *(len(part.groups) for part in self.parts)]).tolist()
        self.sources = [
            (name, [range(block.start + first, block.stop + first) for block in blocks])
            for part, first in zip(self.parts, samples)
            for name, blocks in part.sources
        ]
        self.groups = _JoinedGroups([part.groups for part in self.parts], samples, self._rows)

    def __len__(self) -> int:
        return self._rows[-1]

    def __getitem__(self, number: int) -> Row:
        part = int(np.searchsorted(self._rows, number, side="right")) - 1
        return self.parts[part][number - self._rows[part]]

    def __iter__(self) -> Iterator[Row]:
        for part in self.parts:
            yield from part

    def renamed(self, names: Mapping[str, str]) -> "JoinedRows":
        """The same rows with other class names."""
        return JoinedRows([part.renamed(names) for part in self.parts])


class ConsecutiveGroups(Sequence):
    """Row numbers of samples whose rows follow each other.

    Args:
        counts (`np.ndarray`): Rows of each sample.
    """

    def __init__(self, counts: np.ndarray):
        self._single = bool((counts == 1).all())
        self._samples = len(counts)
        # Samples of one row each need no table.
        self._starts = None if self._single else np.concatenate([[0], np.cumsum(counts)])
        self.rows = self._samples if self._single else int(self._starts[-1])
        self.largest = int(counts.max(initial=0))

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, sample: int) -> range:
        if not 0 <= sample < self._samples:
            raise IndexError(f"Sample {sample} of {self._samples}.")
        if self._single:
            return range(sample, sample + 1)
        return range(int(self._starts[sample]), int(self._starts[sample + 1]))

    def locate(self, row: int) -> tuple[int, int]:
        """The sample of a row, and its place there."""
        if not 0 <= row < self.rows:
            raise IndexError(f"Row {row} of {self.rows}.")
        if self._single:
            return row, 0
        sample = int(np.searchsorted(self._starts, row, side="right")) - 1
        return sample, row - int(self._starts[sample])


class _JoinedGroups(Sequence):
    def __init__(self, parts: list[Sequence[Sequence[int]]], samples: list[int], rows: list[int]):
        self.parts, self.samples, self.rows = parts, samples, rows
        self.largest = max(largest_group(part) for part in parts)

    def __len__(self) -> int:
        return self.samples[-1]

    def __getitem__(self, sample: int) -> list[int]:
        part = int(np.searchsorted(self.samples, sample, side="right")) - 1
        return [row + self.rows[part] for row in self.parts[part][sample - self.samples[part]]]


def largest_group(groups: Sequence[Sequence[int]]) -> int:
    """The most rows that a sample has."""
    return groups.largest if hasattr(groups, "largest") else max(map(len, groups))


def rows_by_sample(rows: Sequence[Row]) -> list[list[int]]:
    """Row numbers of each sample: a row, but for language tasks all rows of an image."""
    groups: dict[Any, list[int]] = {}
    for number, row in enumerate(rows):
        image = row["image"] if isinstance(row["image"], str) else id(row["image"])
        groups.setdefault(image if row["task"] in LANGUAGE_TASKS else number, []).append(number)
    return list(groups.values())


def one_cell_samples(rows: Sequence[Row]) -> np.ndarray:
    """Which samples of detection are crops of one cell (rows `from_attributes`), bool `[samples]`.

    Of rows that are not in memory, all count as such crops if all witnesses are.
    """
    if isinstance(rows, JoinedRows):
        return np.concatenate([one_cell_samples(part) for part in rows.parts])
    if isinstance(rows, LazyRows) and not isinstance(rows, ListedRows):
        return np.full(len(rows.groups), all(row.get("from_attributes") for row in rows.witnesses))
    return np.array([bool(row.get("from_attributes")) for row in rows])


def joined(parts: Sequence[Any]) -> "list[Row] | JoinedRows":
    """The rows of several data sets: one list, or, where some are not in memory, [`JoinedRows`]."""
    if any(isinstance(part, LazyRows) for part in parts):
        return JoinedRows(parts)
    return [row for part in parts for row in part]


class StoredFile(str):
    """An image or mask inside a shard. It is a unique `str`, by which rows of one image can be grouped.

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

    def check(self) -> None:
        """Decodes the image.

        Raises:
            DatasetError: It cannot be read whole.
        """
        try:
            load_image(self.content())
        except DatasetError:
            raise
        except Exception as error:
            # PIL's readers raise anything on bytes that were damaged on purpose.
            raise DatasetError(f"{self}: {error} Write the shards again without it.") from error

    def opened(self) -> Image.Image:
        """The image, as PIL opens it.

        Raises:
            DatasetError: It is none.
        """
        try:
            return Image.open(io.BytesIO(self.content()))
        except DatasetError:
            raise
        except Exception as error:
            # PIL's readers raise anything on bytes that were damaged on purpose.
            raise DatasetError(
                f"{self}: not a readable image ({shortened(error)}). Write the shards again without it."
            ) from error


def readable(image: Any) -> Any:
    """The image of a row as `load_image` and `open_regions` take it: what lies in a table is opened."""
    return image.opened() if isinstance(image, StoredFile) else image


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
        # Named after its folder, as any other data set. The index keeps the name of the folder that it was made from.
        self.dataset = self.folder.resolve().parent.name
        # Witnesses are read for their names; their files are in the shards.
        nowhere = {"image": str(self.folder), "mask": str(self.folder)}
        self.witnesses = rename_rows([self._complete(row) | nowhere for row in entry["witnesses"]], self.names)
        self._files: list[tuple[str, int]] = []
        sizes: list[int] = []
        for shard in entry["shards"]:
            path = self.folder / shard["file"]
            if not path.is_file():
                raise DatasetError(f"{path} is missing: write the shards again, or copy all of them.")
            there = _group_sizes(path, ("image", "mask") if task == "segmentation" else ("image",))
            if there != shard["row_groups"]:
                raise DatasetError(
                    f"{path}: row groups of {shown(there)} samples, but {INDEX_FILE} says {shown(shard['row_groups'])}. "
                    "Write the shards again."
                )
            self._files += [(shard["file"], number) for number in range(len(shard["row_groups"]))]
            sizes += shard["row_groups"]
        self._starts = np.concatenate([[0], np.cumsum(sizes)])
        bounds = self._starts.tolist()
        self.sources = [(self.dataset, [range(first, last) for first, last in itertools.pairwise(bounds)])]
        self.groups = ConsecutiveGroups(self._row_counts(entry))
        self._kept: OrderedDict[int, dict[str, list]] = OrderedDict()
        if len(self) != entry["rows"]:
            raise DatasetError(
                f"{self.folder / INDEX_FILE}: {entry['rows']} rows of {task}, but the shards have {len(self)}. "
                "Write the shards again."
            )

    def _row_counts(self, entry: Mapping[str, Any]) -> np.ndarray:
        """How many rows each sample has: one, but for an image with several questions."""
        samples = int(self._starts[-1])
        if self.task not in LANGUAGE_TASKS:
            return np.ones(samples, dtype=np.int32)
        import pyarrow.parquet as parquet

        columns = [np.zeros(0, np.int32)]
        for shard in entry["shards"]:
            path = self.folder / shard["file"]
            with _reading(path):
                counts = parquet.read_table(path, columns=["row_count"])["row_count"].to_numpy()
                if counts.dtype.kind not in "iu" or counts.min(initial=1) < 1:
                    raise ValueError("row_count must be 1 or more")
                columns.append(counts.astype(np.int32))
        return np.concatenate(columns)

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
        stored = self._group_of(sample)[column][sample - int(self._starts[number])]
        content = stored.get("bytes") if isinstance(stored, Mapping) else None
        if not isinstance(content, bytes):
            raise DatasetError(f"{self._where(sample)}: no {column}. Write the shards again.")
        return content

    def _where(self, sample: int) -> str:
        return f"{self.folder / self._files[self._number_of(sample)][0]}: sample {sample} of {self.task}"

    def _number_of(self, sample: int) -> int:
        return int(np.searchsorted(self._starts, sample, side="right")) - 1

    def _group_of(self, sample: int) -> dict[str, list]:
        number = self._number_of(sample)
        if number in self._kept:
            self._kept.move_to_end(number)
        else:
            self._kept[number] = self._read(number, None)
            # The next window begins before the last samples of this one are used.
            while len(self._kept) > WINDOW + 2:
                self._kept.popitem(last=False)
        return self._kept[number]

    def _read(self, number: int, columns: list[str] | None) -> dict[str, list]:
        import pyarrow.parquet as parquet

        name, group = self._files[number]
        with _reading(self.folder / name, f"row group {group}"):
            with parquet.ParquetFile(self.folder / name) as file:
                size = file.metadata.row_group(group).total_byte_size
                if size > LARGEST_GROUP:
                    raise ValueError(f"{size} bytes are more than {LARGEST_GROUP}")
                table = file.read_row_group(group, columns=columns)
            found = {column: table[column].to_pylist() for column in table.column_names}
        if any(len(values) != self._starts[number + 1] - self._starts[number] for values in found.values()):
            raise DatasetError(f"{self.folder / name}: row group {group} has another length than {INDEX_FILE} says.")
        return found

    def _rows_of(self, sample: int, group: Mapping[str, list]) -> list[Row]:
        place = sample - int(self._starts[self._number_of(sample)])
        rows = []
        for stored in self._parsed(group["rows"][place], sample):
            row = self._complete(stored)
            check_types(row, self._where(sample))
            row["image"] = StoredFile(f"{self.folder}/{self.task}#{sample}", self, sample, "image")
            if self.task == "segmentation":
                row["mask"] = StoredFile(f"{self.folder}/{self.task}#{sample}.mask", self, sample, "mask")
            rows.append(row)
        return rename_rows(rows, self.names)

    def _parsed(self, text: Any, sample: int) -> list[dict[str, Any]]:
        where = self._where(sample)
        try:
            found = parse_json(text, where) if isinstance(text, str) else None
        except json.JSONDecodeError as error:
            raise DatasetError(f"{where}: broken JSON at column {error.colno} ({error.msg}).") from error
        if not isinstance(found, list) or len(found) != len(self.groups[sample]):
            raise DatasetError(f"{where}: a list of {len(self.groups[sample])} rows is needed, got {shown(found)}.")
        for stored in found:
            needed = {"file_name", *REQUIRED_KEYS[self.task]} - {"mask"}
            if not isinstance(stored, dict) or needed - set(stored):
                raise DatasetError(f"{where}: a {self.task} row is needed, got {shown(stored)}.")
        return found

    def _complete(self, row: Row) -> Row:
        row = {**row, "dataset": self.dataset, "task": self.task}
        if isinstance(row.get("size"), list):
            row["size"] = tuple(row["size"])
        return row


def read_index(folder: Path) -> dict[str, Any]:
    """What `shards.json` of a split says.

    Raises:
        DatasetError: It cannot be read, or is of another format.
    """
    path = folder / INDEX_FILE
    index = read_json(path)
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise DatasetError(
            f"{path}: not an index of shards that this version reads ({FORMAT}). Write the shards again."
        )
    tasks = index.get("tasks")
    if not isinstance(tasks, dict):
        raise DatasetError(f"{path}: 'tasks' must be an object, got {shown(tasks)}. Write the shards again.")
    for task, entry in tasks.items():
        problem = _problem_of_entry(task, entry)
        if problem:
            raise DatasetError(f"{path}: tasks.{shown(task)}: {problem}. Write the shards again.")
    return index


def _problem_of_entry(task: str, entry: Any) -> str | None:
    """What is wrong with what an index says of a task."""
    if task not in TASKS:
        return f"no such task; tasks are {', '.join(TASKS)}"
    if not isinstance(entry, dict) or not isinstance(entry.get("rows"), int):
        return f"an object with rows, shards and witnesses is needed, got {shown(entry)}"
    if not isinstance(entry.get("shards"), list) or not isinstance(entry.get("witnesses"), list):
        return "shards and witnesses must be lists"
    for shard in entry["shards"]:
        sizes = shard.get("row_groups") if isinstance(shard, dict) else None
        name = shard.get("file") if isinstance(shard, dict) else None
        if not isinstance(name, str) or not isinstance(sizes, list):
            return f"a shard has a file and row_groups, got {shown(shard)}"
        try:
            if "/" in inside(name):
                return f"{shown(name)} lies in another folder"
        except UnsafeNameError as error:
            return str(error)
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            return f"row_groups must be whole numbers above 0, got {shown(sizes)}"
    for number, row in enumerate(entry["witnesses"]):
        if not isinstance(row, dict):
            return f"witnesses[{number}] must be an object, got {shown(row)}"
        missing = [key for key in REQUIRED_KEYS[task] if key != "mask" and key not in row]
        if missing:
            return f"witnesses[{number}] lacks {', '.join(missing)}"
        try:
            check_types({**row, "task": task}, f"witnesses[{number}]")
        except DatasetError as error:
            return str(error).rstrip(".")
    return None


def read_stored(folder: Path, tasks: Sequence[str], names: Mapping[str, str]) -> dict[str, StoredRows]:
    """Rows of each of `tasks` that a split of shards has.

    Raises:
        DatasetError: The index or a shard cannot be used.
    """
    there = read_index(folder)["tasks"]
    return {task: StoredRows(folder, task, names) for task in tasks if task in there}


def write_shards(
    rows_by_task: Mapping[str, Sequence[Row]],
    folder: str | Path,
    dataset: str,
    shard_samples: int = SHARD_SAMPLES,
    group_samples: int = GROUP_SAMPLES,
    progress: bool = False,
) -> dict[str, int]:
    """Writes the rows of one split. A shard appears when it is whole; the index, without which nothing is read, comes last. What
    an interrupted call has written is not written again.

    Args:
        rows_by_task (`Mapping[str, Sequence[Row]]`): Task -> rows, as `load_folder` gives them.
        folder (`str` or `Path`): Folder of the split, such as `OUT/train`.
        dataset (`str`): Name of the data folder that the rows are from.
        shard_samples (`int`): Samples of a shard.
        group_samples (`int`): Samples of a row group, which is read at once.
        progress (`bool`): Show a progress bar.

    Returns:
        `dict[str, int]`: Samples of each task; a sample of a language task is an image with all its questions.

    Raises:
        DatasetError: The folder holds other shards, or a file cannot be read.
        OutputError: Another run is writing there, or it cannot be written.
        BadRowsError: Rows that are not of the schema.
        ValueError: Sizes below 1.
    """
    if min(shard_samples, group_samples) < 1:
        raise InputError(
            f"Shards of {shard_samples} samples and row groups of {group_samples}: both must be 1 or more."
        )
    folder = Path(folder)
    for rows in rows_by_task.values():
        check_rows(rows)
        if len({bool(row.get("from_attributes")) for row in rows}) > 1:
            raise DatasetError(
                f"{folder}: fields and crops with attributes cannot be told apart in shards. Write them into two folders, one "
                "with attributes and one without."
            )
    plan = {
        "format": FORMAT,
        "dataset": dataset,
        "shard_samples": shard_samples,
        "group_samples": group_samples,
        "rows": {task: _fingerprint(rows) for task, rows in rows_by_task.items()},
    }
    if folder.is_dir() and contents(folder) and not (folder / PLAN_FILE).is_file():
        raise DatasetError(f"{folder} is not empty: write shards into a new folder.")
    with exclusive(folder):
        _keep_to(plan, folder)
        tasks = _write_tasks(rows_by_task, folder, shard_samples, group_samples, progress)
        write_json(folder / INDEX_FILE, {"format": FORMAT, "dataset": dataset, "tasks": tasks})
    return {task: sum(sum(shard["row_groups"]) for shard in entry["shards"]) for task, entry in tasks.items()}


def _write_tasks(
    rows_by_task: Mapping[str, Sequence[Row]], folder: Path, shard_samples: int, group_samples: int, progress: bool
) -> dict[str, dict[str, Any]]:
    """The shards that are not there yet; what the index says of each task."""
    tasks = {}
    total = sum(-(-len(rows_by_sample(rows)) // shard_samples) for rows in rows_by_task.values())
    with tqdm(total=total, desc="shards", unit="shard", disable=not progress) as bar:
        for task, rows in rows_by_task.items():
            shards = []
            for name, samples in _planned(task, rows, shard_samples):
                path = folder / name
                if not path.is_file():
                    _write_shard(path, task, rows, samples, group_samples)
                shards.append({"file": name, "row_groups": _group_sizes(path)})
                bar.update()
            tasks[task] = {"rows": len(rows), "shards": shards, "witnesses": [_stored(row) for row in _witnesses(rows)]}
    return tasks


def _keep_to(plan: dict[str, Any], folder: Path) -> None:
    path = folder / PLAN_FILE
    if not path.is_file():
        write_json(path, plan)
    elif read_json(path) != plan:
        raise DatasetError(f"{folder} holds shards of other data or other sizes: delete it, or write somewhere else.")


def _fingerprint(rows: Sequence[Row]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(_stored(row), sort_keys=True).encode())
    return digest.hexdigest()


def _planned(task: str, rows: Sequence[Row], shard_samples: int) -> Iterator[tuple[str, list[list[int]]]]:
    """Name of each shard and the row numbers of its samples."""
    groups = rows_by_sample(rows)
    order = np.random.default_rng(0).permutation(len(groups))
    for number, start in enumerate(range(0, len(order), shard_samples)):
        yield f"{task}-{number:05d}.parquet", [groups[sample] for sample in order[start : start + shard_samples]]


def _write_shard(
    path: Path, task: str, rows: Sequence[Row], samples: Sequence[Sequence[int]], group_samples: int
) -> None:
    import datasets
    import pyarrow
    import pyarrow.parquet as parquet

    columns: dict[str, Any] = {"image": datasets.Image()}
    if task == "segmentation":
        columns["mask"] = datasets.Image()
    features = {**columns, "row_count": datasets.Value("int32"), "rows": datasets.Value("string")}
    schema = datasets.Features(features).arrow_schema

    def write(file: IO[bytes]) -> None:
        with parquet.ParquetWriter(file, schema) as writer:
            for start in range(0, len(samples), group_samples):
                group = samples[start : start + group_samples]
                content = {name: [_file(rows[sample[0]], name) for sample in group] for name in columns}
                content["row_count"] = [len(sample) for sample in group]
                content["rows"] = [
                    json.dumps([_stored(rows[number]) for number in sample], ensure_ascii=False) for sample in group
                ]
                writer.write_table(pyarrow.Table.from_pydict(content, schema=schema), row_group_size=group_samples)

    write_atomically(path, write)


@contextmanager
def _reading(path: Path, part: str = "the file") -> Iterator[None]:
    try:
        yield
    except DatasetError:
        raise
    except Exception as error:
        # Arrow raises many kinds on bytes that were damaged on purpose.
        message = str(error).split("\n")[0]
        raise DatasetError(
            f"{path}: {part} cannot be read ({message}). Delete it and write the shards again."
        ) from error


def _group_sizes(path: Path, columns: Sequence[str] = ()) -> list[int]:
    """The samples of each row group; the file must have `columns`, and those that all shards have."""
    import pyarrow.parquet as parquet

    with _reading(path), parquet.ParquetFile(path) as file:
        missing = {*columns, "rows", "row_count"} - set(file.schema_arrow.names)
        if missing:
            raise ValueError(f"no column {', '.join(sorted(missing))}")
        return [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]


def _file(row: Row, column: str) -> dict[str, Any]:
    source = row[column]
    if isinstance(source, StoredFile):
        return {"bytes": source.content(), "path": Path(row["file_name"]).name}
    if isinstance(source, (str, Path)):
        try:
            return {"bytes": Path(source).read_bytes(), "path": Path(source).name}
        except OSError as error:
            raise DatasetError(f"{source}: cannot be read ({shortened(error)}).") from error
    picture = source if isinstance(source, Image.Image) else Image.fromarray(np.asarray(source))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": f"{Path(row['file_name']).stem}.png"}


def _stored(row: Row) -> dict[str, Any]:
    """What is kept of a row beside its files and what all rows share."""
    return {key: value for key, value in row.items() if key not in ("image", "mask", "task", "dataset")}


def _witnesses(rows: Sequence[Row]) -> list[Row]:
    """The first row with each class, listed or boxed, and each label, declaration of classes, attribute value and prompt."""
    known: set[Any] = set()
    found = []
    for row in rows:
        facts: set[Any] = {("name", name) for name in row_names(row)} | {("prompt", row.get("prompt"))}
        if row.get("task") == "detection":
            declared = row.get("annotated_classes")
            facts.add(("declared", None if declared is None else tuple(declared)))
            facts |= {("boxed", name) for name in row["objects"]["category"]}
            facts |= {
                ("mask", any(row["objects"].get("segmentation") or ())),
                ("one cell", bool(row.get("from_attributes"))),
            }
            for attributes in row["objects"].get("morphology", ()):
                facts |= {("attribute", *pair) for pair in attributes.items()}
        if not facts <= known:
            known |= facts
            found.append(row)
    return found
