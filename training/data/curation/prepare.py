"""Data folders of our own layout, made of downloaded archives or folders; and Parquet shards, made of data folders."""

import csv
import io
import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from unihema.errors import DatasetError, UnreadableImageError
from unihema.files import real_path, shortened, whole_folder, write_json, write_text
from unihema.processing_unihema.image_io import load_mask
from unihema.results.export import table_text
from unihema.training.data.class_tree import OFFICIAL_NAMES, label_map, rename_rows, row_names
from unihema.training.data.curation.archives import OTHER_ARCHIVES, ArchiveError, ArchiveLimits, is_archive, unpack
from unihema.training.data.curation.catalog import CatalogEntry
from unihema.training.data.layouts.tables import WBCATT_ATTRIBUTES
from unihema.training.data.readers import (
    DESCRIPTION_FILE,
    FOREIGN_LAYOUTS,
    load_folder,
    read_folder,
    read_foreign,
    recognise_foreign,
    splits_of,
)
from unihema.training.data.rows import PROVENANCE_KEYS, BadRows, BadRowsError, OnInvalid, Row
from unihema.training.data.shards import write_shards
from unihema.training.data.splits import by_split, check_val_share, compile_patterns, groups_of
from unihema.training.data.verify import verify_rows


_UNSAFE = re.compile(r"[^\w.\- ]+")
_NO_FOLDER = re.compile(r'[/\\:*?"<>|\x00-\x1f]')


@dataclass
class PreparedData:
    """What [`prepare_data`] wrote.

    Args:
        folder (`Path`): The data folder.
        layout (`str`): The layout that was read.
        counts (`dict[str, dict[str, int]]`): Split -> task -> rows.
        labels (`dict[str, dict[str, str]]`): Task -> class name -> the name it got.
        unmapped (`dict[str, list[str]]`): Task -> class names that no official name was found for; they stay as they are.
        left_out (`list[str]`): Bad rows, each with its file and its line or entry.
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
        entry ([`CatalogEntry`], *optional*): The data set's entry: name, licence and links.
        layout (`str`, *optional*): One of `FOREIGN_LAYOUTS`; recognised when not given.
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
        OutputError: Another run is writing `output`, or it cannot be written.
    """
    source, output = Path(source).expanduser(), Path(output).expanduser()
    check_val_share(val_share)
    compiled = compile_patterns(patterns or {})
    if not source.is_dir() and not source.is_file():
        raise DatasetError(f"{source}: no such archive or folder.")
    with whole_folder(output) as whole:
        if output.exists():
            raise DatasetError(f"{output}: is there already. Choose a new folder or delete it.")
        unpacked = whole.with_name(f"{output.name}.archive")
        folder = unpacked if source.is_file() else source
        try:
            if source.is_file():
                _unpack(source, unpacked, limits, progress)
            bad = BadRows()
            used, rows = _read(folder, output.name, layout, masks_show, attributes, bad)
            rows = verify_rows({used: rows}, bad, progress=progress).get(used, [])
            _stop_if(bad, on_invalid, folder, source)
            rows = [row | groups_of(row, compiled) for row in rows]
            labels, unmapped = _names(rows, official_names, rename or {})
            prepared = PreparedData(output, used, labels=labels, unmapped=unmapped)
            rows = [named for row in rows for named in rename_rows([row], labels.get(row["task"], {}))]
            _write(whole, rows, val_share, bad, prepared, progress)
            _stop_if(bad, on_invalid, folder, source)
            prepared.left_out = bad.messages
            bad.tell_notes()
            if not prepared.counts:
                raise DatasetError(f"{source}: nothing in it could be read as {used}.")
            _describe(whole, source, entry, masks_show, licence, prepared)
        except DatasetError as error:
            # The unpacked folder is deleted, so the message names the archive.
            if isinstance(error, (ArchiveError, BadRowsError)) or str(unpacked) not in str(error):
                raise
            raise DatasetError(str(error).replace(str(unpacked), str(source))) from error
    return prepared


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
    if real_path(source) == real_path(output):
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
            # Which splits a layout of others has shows only on reading.
            if splits:
                raise
            missing = missing or error
            continue
        bad = BadRows()
        rows = verify_rows(rows, bad, progress=bool(options.get("progress")))
        bad.settle(on_invalid)
        written[split] = write_shards(rows, output / split, real_path(source).name, **options)
    if not written and missing is not None:
        raise missing
    for name in (DESCRIPTION_FILE, "README.md"):
        if (source / name).is_file():
            shutil.copyfile(source / name, output / name)
    return written


def _stop_if(bad: BadRows, on_invalid: OnInvalid, folder: Path, source: Path) -> None:
    # The unpacked folder is deleted, so messages name the archive.
    if folder != source:
        bad.messages = [message.replace(str(folder), str(source)) for message in bad.messages]
        bad.notes = [note.replace(str(folder), str(source)) for note in bad.notes]
    if on_invalid == "error":
        bad.settle("error")


def _unpack(source: Path, into: Path, limits: ArchiveLimits | None, progress: bool) -> None:
    from tqdm.auto import tqdm

    if not is_archive(source) and source.suffix.lower() not in OTHER_ARCHIVES:
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
    given, layout = layout, layout or recognise_foreign(folder)
    if layout is None:
        raise DatasetError(
            f"{folder}: no known layout; known are {', '.join(FOREIGN_LAYOUTS)}. Name one with --layout."
        )
    return layout, read_foreign(folder, dataset, bad, layout=given, prompt=prompt, attributes=attributes)


def _names(
    rows: list[Row], use_official: bool, rename: Mapping[str, str]
) -> tuple[dict[str, dict[str, str]], dict[str, list[str]]]:
    used: dict[str, dict[str, None]] = {task: {} for task in OFFICIAL_NAMES}
    for row in rows:
        if row["task"] in used and not row.get("from_attributes"):
            used[row["task"]].update(dict.fromkeys(row_names(row)))
    known = dict.fromkeys(name for names in used.values() for name in names)
    for name in rename:
        if name not in known:
            raise DatasetError(f"No class '{name}' to rename; classes are {', '.join(known) or 'none'}.")
    labels, unmapped = {}, {}
    for task, names in used.items():
        found = label_map(names, task) if use_official else {}
        found |= {name: rename[name] for name in names if name in rename}
        if found:
            labels[task] = found
        rest = [name for name in names if name not in found]
        if rest and use_official:
            unmapped[task] = rest
    return labels, unmapped


def _write(
    folder: Path, rows: list[Row], val_share: float, bad: BadRows, prepared: PreparedData, progress: bool
) -> None:
    from tqdm.auto import tqdm

    splits = by_split(rows, val_share)
    with tqdm(total=len(rows), desc="writing", unit="row", disable=not progress) as bar:
        for split, found in splits.items():
            counts = write_split(folder / split, found, bad, bar.update)
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


def write_split(
    folder: Path, rows: Sequence[Row], bad: BadRows, report: Callable[[int], object] | None = None
) -> dict[str, int]:
    """Writes the rows of one split; images are copied byte by byte.

    Args:
        folder (`Path`): `<data folder>/<split>`.
        rows (`Sequence[Row]`): Of all tasks; `image` and `mask` are paths.
        bad (`BadRows`): Gets rows whose files cannot be copied; they are left out.
        report (`Callable`, *optional*): Gets the number of rows done since its last call.

    Returns:
        `dict[str, int]`: Task, or `attributes`, -> rows written.
    """
    writer = _SplitWriter(folder, {str(row["image"]): row["label"] for row in rows if row["task"] == "single_cell"})
    for row in rows:
        with bad.collecting():
            writer.add(row)
        if report:
            report(1)
    return writer.finish()


class _SplitWriter:
    def __init__(self, folder: Path, labels: Mapping[str, str]):
        self.folder = folder
        self.labels = labels
        self.attributes: dict[str, dict[str, str]] = {}
        self.counts: dict[str, int] = {}
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []
        self.categories: dict[str, int] = {}
        self.texts: dict[str, list[dict[str, Any]]] = {"qa.jsonl": [], "cloze.jsonl": []}
        self.origins: dict[str, dict[str, str]] = {}
        self._placed: dict[tuple[str, str], str] = {}
        self._taken: set[str] = set()
        self._masked: set[str] = set()

    def add(self, row: Row) -> None:
        label = row["label"] if row["task"] == "single_cell" else self.labels.get(str(row["image"]))
        # A mask is paired with images/ by name. For other tasks a crop lies in its class folder only.
        crop = label is not None and row["task"] != "segmentation"
        name = self._place(row, f"crops/{folder_name(label, row['file_name'])}" if crop else "images")
        groups = {group: str(row[group]) for group in PROVENANCE_KEYS if row.get(group)}
        if groups:
            self.origins[name] = groups
        if row.get("from_attributes"):
            self.attributes[name] = row["objects"]["morphology"][0]
        elif row["task"] == "detection":
            self._add_objects(row, name)
        elif row["task"] == "segmentation":
            self._write_mask(row, name)
        elif row["task"] == "question_answering":
            self.texts["qa.jsonl"].append({"image": name, "question": row["question"], "answer": row["answer"]})
        elif row["task"] == "cloze":
            self.texts["cloze.jsonl"].append({"image": name, "masked": row["masked"], "completed": row["completed"]})
        what = "attributes" if row.get("from_attributes") else row["task"]
        self.counts[what] = self.counts.get(what, 0) + 1

    def finish(self) -> dict[str, int]:
        for name, records in self.texts.items():
            if records:
                write_text(self.folder / name, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in records))
        if self.images:
            for image in self.images:
                # Said of an image only where it is not what the file says of all.
                if set(image["annotated_classes"]) == set(self.categories):
                    del image["annotated_classes"]
            categories = [{"id": number, "name": name} for name, number in self.categories.items()]
            coco = {"images": self.images, "annotations": self.annotations, "categories": categories}
            write_text(self.folder / "annotations.json", json.dumps(coco, ensure_ascii=False) + "\n")
        self._write_table("origins.csv", self.origins, PROVENANCE_KEYS)
        columns = dict.fromkeys(name for attributes in self.attributes.values() for name in attributes)
        self._write_table("attributes.csv", self.attributes, tuple(columns))
        return self.counts

    def _write_table(self, name: str, lines: Mapping[str, Mapping[str, str]], columns: Iterable[str]) -> None:
        if not lines:
            return
        table = io.StringIO()
        columns = tuple(columns)
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(map(table_text, ("file_name", *columns)))
        for image, values in lines.items():
            writer.writerow(table_text(value) for value in (image, *map(values.get, columns)))
        write_text(self.folder / name, table.getvalue())

    def _place(self, row: Row, place: str) -> str:
        """Copies an image into a folder, once. Its name is made of the original one, and its stem is unique there."""
        key = (str(row["image"]), place)
        if key in self._placed:
            return self._placed[key]
        original = PurePosixPath(row["file_name"])
        stem = _UNSAFE.sub("_", original.stem).strip(". ") or "image"
        candidate, number = stem, 1
        while f"{place}/{candidate}".lower() in self._taken:
            number += 1
            candidate = f"{stem}_{number}"
        name = f"{place}/{candidate}{original.suffix.lower()}"
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(row["image"], target)
        except OSError as error:
            raise DatasetError(f"{row['image']}: cannot be copied ({shortened(error)}).") from error
        self._taken.add(f"{place}/{candidate}".lower())
        self._placed[key] = name
        return name

    def _add_objects(self, row: Row, name: str) -> None:
        number = len(self.images)
        size = {"width": row["size"][0], "height": row["size"][1]} if row.get("size") else {}
        groups = {group: row[group] for group in PROVENANCE_KEYS if row.get(group)}
        objects = row["objects"]
        annotated = list(dict.fromkeys([*(row.get("annotated_classes") or ()), *objects["category"]]))
        self.images.append({"id": number, "file_name": name, **size, **groups, "annotated_classes": annotated})
        for label in annotated:
            self.categories.setdefault(label, len(self.categories))
        crowds = objects.get("iscrowd") or [0] * len(objects["bbox"])
        outlines = objects.get("segmentation") or [None] * len(objects["bbox"])
        cells = zip(objects["bbox"], objects["category"], objects["morphology"], crowds, outlines, strict=True)
        for box, label, attributes, crowd, outline in cells:
            annotation = {
                "id": len(self.annotations),
                "image_id": number,
                "category_id": self.categories[label],
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": crowd,
            }
            annotation |= {} if outline is None else {"segmentation": outline}
            self.annotations.append(annotation | ({"attributes": attributes} if attributes else {}))

    def _write_mask(self, row: Row, name: str) -> None:
        mask = Path(row["mask"])
        stem = PurePosixPath(name).stem
        target = self.folder / "masks" / f"{stem}{mask.suffix.lower()}"
        if stem in self._masked:
            raise DatasetError(f"{mask}: its image {row['image']} has a mask already; there is one for each image.")
        self._masked.add(stem)
        target.parent.mkdir(parents=True, exist_ok=True)
        if mask.suffix.lower() not in (".jpg", ".jpeg"):
            shutil.copyfile(mask, target)
            return
        # JPEG leaves noise around the edges of a mask, which would count as cell.
        try:
            values = load_mask(mask)
        except UnreadableImageError as error:
            raise DatasetError(str(error)) from error
        values = values.max(axis=-1) if values.ndim == 3 else values
        Image.fromarray(np.where(values > 127, 255, 0).astype(np.uint8)).save(target.with_suffix(".png"))


def folder_name(label: str, source: str) -> str:
    """Checks that a class name can be the name of a folder.

    Raises:
        DatasetError: It has characters that no folder may have.
    """
    if _NO_FOLDER.search(label) or label.strip(". ") != label or not label:
        raise DatasetError(
            f"{source}: class {label!r} cannot be a folder's name. Rename it, such as --rename '{label}=...'."
        )
    return label
