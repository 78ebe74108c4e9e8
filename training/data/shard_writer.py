"""Data folders to Parquet shards, for corpora that do not fit in memory or are too many files.

A shard is an ordinary Parquet file of `datasets` (`load_dataset("parquet", ...)` opens it): the files of images and masks as
they are, and the schema rows (rows.py) as JSON. Samples are shuffled once when they are written, since only samples of
neighbouring row groups are shuffled among each other when they are read.
"""

import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Picture
from tqdm.auto import tqdm

from unihema.errors import DatasetError, InputError
from unihema.training.data.bad_rows import BadRowsError, OnInvalid
from unihema.training.data.description import DESCRIPTION_FILE
from unihema.training.data.label_names import row_names
from unihema.training.data.lazy_rows import rows_by_sample
from unihema.training.data.readers import load_folder
from unihema.training.data.rows import Row, check_rows
from unihema.training.data.stored_rows import FORMAT, INDEX_FILE, StoredFile
from unihema.training.files import write_json


PLAN_FILE = "shards.plan.json"
SHARD_SAMPLES = 512
GROUP_SAMPLES = 16
_FILES = ("image", "mask")


def write_shards(
    rows_by_task: Mapping[str, Sequence[Row]],
    folder: str | Path,
    dataset: str,
    shard_samples: int = SHARD_SAMPLES,
    group_samples: int = GROUP_SAMPLES,
    progress: bool = False,
) -> dict[str, int]:
    """Writes the rows of one split. A shard appears when it is whole, the index, without which nothing is read, last; what an
    interrupted call has written is not written again.

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
    plan = {
        "format": FORMAT,
        "dataset": dataset,
        "shard_samples": shard_samples,
        "group_samples": group_samples,
        "rows": {task: _fingerprint(rows) for task, rows in rows_by_task.items()},
    }
    _keep_to(plan, folder)
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
    write_json(folder / INDEX_FILE, {"format": FORMAT, "dataset": dataset, "tasks": tasks})
    return {task: sum(sum(shard["row_groups"]) for shard in entry["shards"]) for task, entry in tasks.items()}


def shard_folder(
    source: str | Path,
    output: str | Path,
    splits: Sequence[str] = (),
    tasks: Sequence[str] | None = None,
    attributes_as_detection: bool | Sequence[str] = False,
    on_invalid: OnInvalid = "error",
    **options: Any,
) -> dict[str, dict[str, int]]:
    """Writes a data folder as shards, with what it says about itself (`dataset.json`, `README.md`).

    Args:
        source (`str` or `Path`): The data folder, of any layout.
        output (`str` or `Path`): Where its shards go: a new folder, or one that an interrupted call left behind.
        splits (`Sequence[str]`): Splits to write; those among train, val and test that there are when not given.
        tasks (`Sequence[str]`, *optional*): Tasks to write; all when not given.
        attributes_as_detection (`bool` or `Sequence[str]`): See `load_folder`.
        on_invalid (`"error"` or `"skip"`): See `load_folder`.
        **options: See [`write_shards`].

    Returns:
        `dict[str, dict[str, int]]`: Split -> task -> samples.

    Raises:
        DatasetError: No such split, a bad row, or an output that holds something else.
    """
    source, output = Path(source).expanduser(), Path(output).expanduser()
    if source.resolve() == output.resolve():
        raise DatasetError(f"{output} is the data folder itself: write its shards into another.")
    written = {}
    missing: DatasetError | None = None
    for split in splits or ("train", "val", "test"):
        try:
            rows = load_folder(
                source, split, tasks=tasks, attributes_as_detection=attributes_as_detection, on_invalid=on_invalid
            )
        except BadRowsError:
            raise
        except DatasetError as error:
            # Which splits there are shows only on reading, where the layout is not our own.
            if splits:
                raise
            missing = missing or error
            continue
        written[split] = write_shards(rows, output / split, source.resolve().name, **options)
    if not written and missing is not None:
        raise missing
    for name in (DESCRIPTION_FILE, "README.md"):
        if (source / name).is_file():
            shutil.copyfile(source / name, output / name)
    return written


def _keep_to(plan: dict[str, Any], folder: Path) -> None:
    path = folder / PLAN_FILE
    if path.is_file():
        if json.loads(path.read_text(encoding="utf-8")) != plan:
            raise DatasetError(
                f"{folder} holds shards of other data or other sizes: delete it, or write somewhere else."
            )
    elif folder.is_dir() and any(folder.iterdir()):
        raise DatasetError(f"{folder} is not empty: write shards into a new folder.")
    else:
        write_json(path, plan)


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
    import pyarrow
    import pyarrow.parquet as parquet
    from datasets import Features, Image, Value

    columns: dict[str, Any] = {"image": Image()}
    if task == "segmentation":
        columns["mask"] = Image()
    schema = Features({**columns, "row_count": Value("int32"), "rows": Value("string")}).arrow_schema
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with parquet.ParquetWriter(partial, schema) as writer:
            for start in range(0, len(samples), group_samples):
                group = samples[start : start + group_samples]
                content = {name: [_file(rows[sample[0]], name) for sample in group] for name in columns}
                content["row_count"] = [len(sample) for sample in group]
                content["rows"] = [
                    json.dumps([_stored(rows[number]) for number in sample], ensure_ascii=False) for sample in group
                ]
                writer.write_table(pyarrow.Table.from_pydict(content, schema=schema), row_group_size=group_samples)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _group_sizes(path: Path) -> list[int]:
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path) as file:
            return [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
    except (OSError, ValueError) as error:
        raise DatasetError(
            f"{path}: not a readable Parquet file ({error}). Delete it and write the shards again."
        ) from error


def _file(row: Row, column: str) -> dict[str, Any]:
    source = row[column]
    if isinstance(source, StoredFile):
        return {"bytes": source.content(), "path": Path(row["file_name"]).name}
    if isinstance(source, (str, Path)):
        try:
            return {"bytes": Path(source).read_bytes(), "path": Path(source).name}
        except OSError as error:
            raise DatasetError(f"{source}: cannot be read ({error}).") from error
    picture = source if isinstance(source, Picture.Image) else Picture.fromarray(np.asarray(source))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": f"{Path(row['file_name']).stem}.png"}


def _stored(row: Row) -> dict[str, Any]:
    """What is kept of a row beside its files and what all rows share."""
    return {key: value for key, value in row.items() if key not in (*_FILES, "task", "dataset")}


def _witnesses(rows: Sequence[Row]) -> list[Row]:
    """The first row with each class, label, declaration of classes, attribute value and prompt."""
    known: set[Any] = set()
    found = []
    for row in rows:
        facts: set[Any] = {("name", name) for name in row_names(row)} | {("prompt", row.get("prompt"))}
        if row.get("task") == "detection":
            declared = row.get("annotated_classes")
            facts.add(("declared", None if declared is None else tuple(declared)))
            for attributes in row["objects"].get("morphology", ()):
                facts |= {("attribute", *pair) for pair in attributes.items()}
        if not facts <= known:
            known |= facts
            found.append(row)
    return found
