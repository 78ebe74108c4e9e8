"""Schema rows written as a data folder of our own layout (see readers.py)."""

import csv
import io
import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from unihema.errors import DatasetError, UnreadableImageError
from unihema.processing_unihema.image_io import load_mask
from unihema.training.data.bad_rows import BadRows
from unihema.training.data.rows import PROVENANCE_KEYS, Row
from unihema.training.files import write_text


_UNSAFE = re.compile(r"[^\w.\- ]+")
_NO_FOLDER = re.compile(r'[/\\:*?"<>|\x00-\x1f]')


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
        # Masks are paired with images/ by name; for all else an image that is a crop lies there only.
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
            categories = [{"id": number, "name": name} for name, number in self.categories.items()]
            coco = {"images": self.images, "annotations": self.annotations, "categories": categories}
            parts = (
                f'"{key}": [\n' + ",\n".join(json.dumps(one, ensure_ascii=False) for one in entries) + "\n]"
                for key, entries in coco.items()
            )
            # A line an entry, so that a message can name its line.
            write_text(self.folder / "annotations.json", "{" + ",\n".join(parts) + "}\n")
        self._write_table("origins.csv", self.origins, PROVENANCE_KEYS)
        columns = dict.fromkeys(name for attributes in self.attributes.values() for name in attributes)
        self._write_table("attributes.csv", self.attributes, tuple(columns))
        return self.counts

    def _write_table(self, name: str, lines: Mapping[str, Mapping[str, str]], columns: Iterable[str]) -> None:
        if not lines:
            return
        table = io.StringIO()
        writer = csv.DictWriter(table, ["file_name", *columns], lineterminator="\n")
        writer.writeheader()
        writer.writerows({"file_name": image, **values} for image, values in lines.items())
        write_text(self.folder / name, table.getvalue())

    def _place(self, row: Row, place: str) -> str:
        """Copies the image once for each place; its name tells where it came from, and is unique as a stem."""
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
            raise DatasetError(f"{row['image']}: cannot be copied ({error}).") from error
        self._taken.add(f"{place}/{candidate}".lower())
        self._placed[key] = name
        return name

    def _add_objects(self, row: Row, name: str) -> None:
        number = len(self.images)
        size = {"width": row["size"][0], "height": row["size"][1]} if row.get("size") else {}
        groups = {group: row[group] for group in PROVENANCE_KEYS if row.get(group)}
        self.images.append({"id": number, "file_name": name, **size, **groups})
        objects = row["objects"]
        for label in [*(row.get("annotated_classes") or ()), *objects["category"]]:
            self.categories.setdefault(label, len(self.categories))
        crowds = objects.get("iscrowd") or [0] * len(objects["bbox"])
        for box, label, attributes, crowd in zip(objects["bbox"], objects["category"], objects["morphology"], crowds):
            annotation = {
                "id": len(self.annotations),
                "image_id": number,
                "category_id": self.categories[label],
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": crowd,
            }
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
        # JPEG leaves a little of everything around the edges of a mask, which would all count as cell.
        try:
            values = load_mask(mask)
        except UnreadableImageError as error:
            raise DatasetError(str(error)) from error
        values = values.max(axis=-1) if values.ndim == 3 else values
        Image.fromarray(np.where(values > 127, 255, 0).astype(np.uint8)).save(target.with_suffix(".png"))


def folder_name(label: str, source: str) -> str:
    """A class name as a folder's name.

    Raises:
        DatasetError: It has characters that no folder may have.
    """
    if _NO_FOLDER.search(label) or label.strip(". ") != label or not label:
        raise DatasetError(
            f"{source}: class {label!r} cannot be a folder's name. Rename it, such as --rename '{label}=...'."
        )
    return label


def renamed(rows: Sequence[Row], names: Mapping[str, Mapping[str, str]]) -> list[Row]:
    """Rows with class names replaced: task -> old name -> new one."""
    changed = []
    for row in rows:
        mapping = names.get(row["task"], {})
        if row["task"] == "single_cell":
            row = row | {"label": mapping.get(row["label"], row["label"])}
        elif row["task"] == "detection":
            objects = row["objects"] | {"category": [mapping.get(name, name) for name in row["objects"]["category"]]}
            annotated = [mapping.get(name, name) for name in row.get("annotated_classes") or ()]
            row = row | {"objects": objects, "annotated_classes": list(dict.fromkeys(annotated))}
        changed.append(row)
    return changed
