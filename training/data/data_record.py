"""Which data a run was trained on: sizes, licences where the folders tell them, and images that splits share."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from unihema.errors import DatasetError
from unihema.files import real_path, sha256
from unihema.hub_cards import DataRecord, DataSource, dataset_card
from unihema.training.data.readers import folder_licence, load_folder, read_description
from unihema.training.data.rows import TASKS, Row, class_names, single_cell_names
from unihema.training.data.shards import StoredFile


def data_record(
    folders: Sequence[str], rows_by_split: Mapping[str, Mapping[str, Sequence[Row]]], val_split: str
) -> DataRecord:
    """Records the data of a run.

    Args:
        folders (`Sequence[str]`): The data folders.
        rows_by_split (`Mapping[str, Mapping[str, Sequence[Row]]]`): Split -> task -> rows.
        val_split (`str`): The split that is measured on.

    Returns:
        [`DataRecord`]: One data set for each folder, with the licence and origin that its `dataset.json` or the metadata
            of its README.md declare.

    Raises:
        DatasetError: A `dataset.json` that is broken.
    """
    images = {split: _images(rows) for split, rows in rows_by_split.items()}
    sources = []
    for folder in dict.fromkeys(real_path(folder) for folder in folders):
        counts = {split: len(found.get(folder.name, ())) for split, found in images.items()}
        sources.append(_source(folder, {split: count for split, count in counts.items() if count}))
    files = {
        split: [path for paths in found.values() for path in paths if isinstance(path, Path)]
        for split, found in images.items()
    }
    files = {split: paths for split, paths in files.items() if paths}
    if val_split not in files or len(files) < 2:
        return DataRecord(tuple(sources))
    others = [path for split, paths in files.items() if split != val_split for path in paths]
    compared = {split: len(paths) for split, paths in files.items()}
    return DataRecord(tuple(sources), compared, len(same_files(files[val_split], others)))


def data_folder_card(
    folder: str | Path,
    *,
    licence: str | None,
    source: str | None,
    description: str | None,
    name: str | None = None,
    licence_name: str | None = None,
    licence_link: str | None = None,
    splits: Sequence[str] = ("train", "val"),
) -> str:
    """The dataset card of a data folder, from what the readers find in it.

    Args:
        folder (`str` or `Path`): The folder.
        licence (`str`, *optional*): As the Hub calls it; the one that the folder declares when missing.
        source (`str`, *optional*): Where it is from: an address, or the id of a dataset on the Hub; as the folder says
            when missing.
        description (`str`, *optional*): What the images show, and who annotated them.
        name (`str`, *optional*): Title; the folder's name when missing.
        licence_name (`str`, *optional*): Name of a licence that the Hub calls `other`.
        licence_link (`str`, *optional*): Where that is to be read.
        splits (`Sequence[str]`): Splits to count; those that the folder lacks are left out.

    Returns:
        `str`: The text of `README.md`.

    Raises:
        DatasetError: The folder cannot be read as data.
        CardError: Licence, origin or description are missing.
    """
    found: dict[str, dict[str, list[Row]]] = {}
    for split in splits:
        try:
            found[split] = load_folder(folder, split)
        except DatasetError:
            # A folder with one split is one; nothing in any split is reported as the readers do.
            if split == splits[-1] and not found:
                raise
    record = data_record([str(folder)], found, splits[-1])
    entry = record.sources[0]
    # The Hub writes identifiers small.
    licence = licence or (entry.licence.lower() if entry.licence else None)
    told = replace(entry, name=name or entry.name, licence=licence, source=source or entry.source)
    tasks = [task for task in TASKS if any(task in rows for rows in found.values())]
    everything = [row for rows in found.values() for of_task in rows.values() for row in of_task]
    labels = {"detection": class_names(everything), "single_cell": single_cell_names(everything)}
    return dataset_card(
        replace(record, sources=(told,)),
        {task: {split: len(rows.get(task, ())) for split, rows in found.items()} for task in tasks},
        labels,
        description=description or "",
        licence_name=licence_name,
        licence_link=licence_link,
    )


def same_files(files: Sequence[Path], others: Sequence[Path]) -> list[Path]:
    """Those of `files` whose bytes are also among `others`."""
    # Files of different sizes cannot be the same, and need not be read.
    sizes = {path.stat().st_size for path in files}
    by_size: dict[int, list[Path]] = {}
    for path in others:
        if (size := path.stat().st_size) in sizes:
            by_size.setdefault(size, []).append(path)
    digests = {size: {sha256(path) for path in paths} for size, paths in by_size.items()}
    return [path for path in files if (s := path.stat().st_size) in digests and sha256(path) in digests[s]]


def _images(rows_by_task: Mapping[str, Sequence[Row]]) -> dict[str, list[Path | StoredFile]]:
    """Image files of each data set, each once; those inside shards are only counted."""
    found: dict[str, dict[Path | StoredFile, None]] = {}
    for rows in rows_by_task.values():
        for row in rows:
            if isinstance(row["image"], (str, Path)):
                image = row["image"] if isinstance(row["image"], StoredFile) else Path(row["image"])
                found.setdefault(row["dataset"], {})[image] = None
    return {name: list(paths) for name, paths in found.items()}


def _source(folder: Path, images: Mapping[str, int]) -> DataSource:
    """A data folder with what it says about itself."""
    licence = folder_licence(folder)
    # "other" says only that the Hub has no name for it.
    licence = None if licence in ("", "other") else licence
    return DataSource(folder.name, licence, read_description(folder).get("data_link") or None, images)


__all__ = ["data_folder_card", "data_record", "same_files"]
