"""A downloaded archive, or the folder it was unpacked to, turned into a data folder of our own layout."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from unihema.errors import DatasetError
from unihema.training.data.bad_rows import BadRows, BadRowsError, OnInvalid
from unihema.training.data.curation.archives import ArchiveError, ArchiveLimits, is_archive, unpack
from unihema.training.data.curation.catalog import CatalogEntry
from unihema.training.data.curation.folder_writer import renamed, write_split
from unihema.training.data.description import DESCRIPTION_FILE
from unihema.training.data.groups import compile_patterns, groups_of
from unihema.training.data.label_names import OFFICIAL_NAMES, label_map
from unihema.training.data.layouts.foreign_layouts import FOREIGN_LAYOUTS, read_foreign, recognise_foreign
from unihema.training.data.layouts.tables import WBCATT_ATTRIBUTES
from unihema.training.data.readers import read_folder, splits_of
from unihema.training.data.rows import Row
from unihema.training.data.splits import by_split, check_val_share
from unihema.training.files import write_json


@dataclass
class PreparedData:
    """What [`prepare_data`] wrote.

    Args:
        folder (`Path`): The data folder.
        layout (`str`): The layout that was read.
        counts (`dict[str, dict[str, int]]`): Split -> task -> rows.
        labels (`dict[str, dict[str, str]]`): Task -> class name -> the name it got.
        unmapped (`dict[str, list[str]]`): Task -> class names that no official name was found for; they stay as they are.
        left_out (`list[str]`): Bad rows, with file and line.
    """

    folder: Path
    layout: str
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    labels: dict[str, dict[str, str]] = field(default_factory=dict)
    unmapped: dict[str, list[str]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


def prepare_data(
    source: str | Path,
    output: str | Path,
    *,
    entry: CatalogEntry | None = None,
    layout: str | None = None,
    official_names: bool = True,
    rename: Mapping[str, str] | None = None,
    masks_show: str = "white blood cell",
    attributes: Sequence[str] = WBCATT_ATTRIBUTES,
    licence: str | None = None,
    val_share: float = 0.1,
    patterns: Mapping[str, str] | None = None,
    on_invalid: OnInvalid = "error",
    limits: ArchiveLimits | None = None,
    progress: bool = False,
) -> PreparedData:
    """Unpacks, reads, checks and rewrites a data set. The output folder appears when everything is written.

    Splits that the data set has are kept; without a validation split, one is drawn from its training images, all images
    of a patient, slide or field together where these are known.

    Args:
        source (`str` or `Path`): A zip or tar file, or a folder.
        output (`str` or `Path`): The data folder to write; must not be there.
        entry ([`CatalogEntry`], *optional*): The data set's entry: layout, label map, licence.
        layout (`str`, *optional*): A key of `FOREIGN_LAYOUTS`; the entry's, or recognised, when not given.
        official_names (`bool`): Give classes the names of the official model where there is one.
        rename (`Mapping[str, str]`, *optional*): Class names to replace; comes before everything else.
        masks_show (`str`): What the masks show.
        attributes (`Sequence[str]`): Columns of tables that are attributes of a cell.
        licence (`str`, *optional*): Over the entry's.
        val_share (`float`): Part of the training images that becomes the validation split, 0..1.
        patterns (`Mapping[str, str]`, *optional*): See [`compile_patterns`]; for data sets that give no patient or slide.
        on_invalid (`"error"` or `"skip"`): Whether bad rows stop it, all named at once, or are left out.
        limits (`ArchiveLimits`, *optional*): How much the archive may unpack to.
        progress (`bool`): Show bars.

    Returns:
        [`PreparedData`].

    Raises:
        ArchiveError: An archive that is damaged, unsafe or too large.
        BadRowsError: Bad rows, with `on_invalid="error"`.
        DatasetError: `output` is there already, no known layout, a class to rename that is not there, or nothing to write.
    """
    source, output = Path(source).expanduser(), Path(output).expanduser()
    check_val_share(val_share)
    compiled = compile_patterns(patterns or {})
    if output.exists():
        raise DatasetError(f"{output}: is there already. Choose a new folder or delete it.")
    if not source.is_dir() and not source.is_file():
        raise DatasetError(f"{source}: no such archive or folder.")
    output.parent.mkdir(parents=True, exist_ok=True)
    unpacked = output.with_name(f".{output.name}.archive")
    partial = output.with_name(f".{output.name}.partial")
    for leftover in (unpacked, partial):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        if source.is_file():
            _unpack(source, unpacked, limits, progress)
            folder = unpacked
        else:
            folder = source
        bad = BadRows()
        layout = layout or (entry.reader if entry else "") or None
        used, rows = _read(folder, output.name, layout, masks_show, attributes, bad)
        _stop_if(bad, on_invalid, folder, source)
        rows = [row | groups_of(row, compiled) for row in rows]
        labels, unmapped = _names(rows, entry, official_names, dict(rename or {}))
        prepared = PreparedData(output, used, labels=labels, unmapped=unmapped)
        _write(partial, renamed(rows, labels), val_share, bad, prepared, progress)
        _stop_if(bad, on_invalid, folder, source)
        prepared.left_out = bad.messages
        if not prepared.counts:
            raise DatasetError(f"{source}: nothing in it could be read as {used}.")
        _describe(partial, source, entry, masks_show, licence, prepared)
        partial.rename(output)
    except DatasetError as error:
        # The folder it was unpacked to is gone when the message is read.
        if isinstance(error, (ArchiveError, BadRowsError)) or str(unpacked) not in str(error):
            raise
        raise DatasetError(str(error).replace(str(unpacked), str(source))) from error
    finally:
        for leftover in (unpacked, partial):
            shutil.rmtree(leftover, ignore_errors=True)
    return prepared


def _stop_if(bad: BadRows, on_invalid: OnInvalid, folder: Path, source: Path) -> None:
    # The folder an archive was unpacked to is gone when the message is read.
    if folder != source:
        bad.messages = [message.replace(str(folder), str(source)) for message in bad.messages]
    if bad.messages and on_invalid == "error":
        bad.settle("error")


def _unpack(source: Path, into: Path, limits: ArchiveLimits | None, progress: bool) -> None:
    from tqdm.auto import tqdm

    if not is_archive(source) and source.suffix.lower() not in (".rar", ".7z"):
        raise DatasetError(f"{source}: not a zip or tar file. Give the archive as it was downloaded, or a folder.")
    with tqdm(desc="unpacking", unit="B", unit_scale=True, disable=not progress) as bar:
        unpack(source, into, limits, bar.update)


def _read(
    folder: Path, dataset: str, layout: str | None, prompt: str, attributes: Sequence[str], bad: BadRows
) -> tuple[str, list[Row]]:
    # An archive usually holds one folder with everything in it.
    inner = folder
    while not splits_of(inner):
        entries = [entry for entry in inner.iterdir() if not entry.name.startswith((".", "__MACOSX"))]
        if len(entries) != 1 or not entries[0].is_dir():
            break
        inner = entries[0]
    splits = splits_of(inner)
    if splits and layout is None:
        rows = []
        # A folder prepared before says itself what its attributes are.
        wanted = True if tuple(attributes) == WBCATT_ATTRIBUTES else attributes
        for split in splits:
            found = read_folder(inner, split, bad, prompt=prompt, attributes_as_detection=wanted)
            rows += [row | {"split": split} for task_rows in found.values() for row in task_rows]
        return "own", rows
    layout = layout or recognise_foreign(folder)
    if layout is None:
        raise DatasetError(
            f"{folder}: no known layout; known are {', '.join(FOREIGN_LAYOUTS)}. Name one with --layout."
        )
    return layout, read_foreign(folder, dataset, bad, layout=layout, prompt=prompt, attributes=attributes)


def _names(
    rows: list[Row], entry: CatalogEntry | None, official_names: bool, rename: dict[str, str]
) -> tuple[dict[str, dict[str, str]], dict[str, list[str]]]:
    used: dict[str, dict[str, None]] = {task: {} for task in OFFICIAL_NAMES}
    for row in rows:
        if row["task"] == "single_cell":
            used["single_cell"][row["label"]] = None
        elif row["task"] == "detection" and not row.get("from_attributes"):
            names = [*(row.get("annotated_classes") or ()), *row["objects"]["category"]]
            used["detection"].update(dict.fromkeys(names))
    known = dict.fromkeys(name for names in used.values() for name in names)
    for name in rename:
        if name not in known:
            raise DatasetError(f"No class '{name}' to rename; classes are {', '.join(known) or 'none'}.")
    labels, unmapped = {}, {}
    for task, names in used.items():
        official = label_map(names, task, entry.labels if entry else None) if official_names else {}
        found = official | {name: rename[name] for name in names if name in rename}
        if found:
            labels[task] = found
        rest = [name for name in names if name not in found]
        if rest and official_names:
            unmapped[task] = rest
    return labels, unmapped


def _write(
    partial: Path, rows: list[Row], val_share: float, bad: BadRows, prepared: PreparedData, progress: bool
) -> None:
    from tqdm.auto import tqdm

    splits = by_split(rows, val_share)
    with tqdm(total=len(rows), desc="writing", unit="row", disable=not progress) as bar:
        for split, found in splits.items():
            counts = write_split(partial / split, found, bad, bar.update)
            if counts:
                prepared.counts[split] = counts


def _describe(
    folder: Path, source: Path, entry: CatalogEntry | None, masks_show: str, licence: str | None, prepared: PreparedData
) -> None:
    from unihema.files import sha256

    write_json(
        folder / DESCRIPTION_FILE,
        {
            "catalog": entry.key if entry else None,
            "name": entry.name if entry else prepared.folder.name,
            "licence": licence or (entry.licence if entry else ""),
            "data_link": entry.data_link if entry else "",
            "paper_link": entry.paper_link if entry else "",
            "source": source.name,
            "source_sha256": sha256(source) if source.is_file() else None,
            "layout": prepared.layout,
            "masks_show": masks_show if any("segmentation" in counts for counts in prepared.counts.values()) else None,
            "labels": prepared.labels,
            "counts": prepared.counts,
            "left_out": len(prepared.left_out),
        },
    )
