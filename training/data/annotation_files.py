"""Reading and checking of the files that data folders are made of: JSON, JSON lines, COCO, image lists."""

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from unihema.training.data.rows import DatasetError, Row


logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")


class ImageFolder:
    """Looks images up by relative path, listing each directory once instead of asking the disk for every row."""

    def __init__(self, root: Path):
        self.root = root
        self._listings: dict[str, set[str]] = {}

    def path(self, file_name: Any, source: str) -> str:
        """Absolute path of an image.

        Raises:
            DatasetError: No such file; `source` says who refers to it.
        """
        if not isinstance(file_name, str) or not file_name:
            raise DatasetError(f"{source}: a file name is needed, got {file_name!r}.")
        path = os.path.join(self.root, file_name)
        folder, name = os.path.split(path)
        if folder not in self._listings:
            self._listings[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if name not in self._listings[folder] and not os.path.isfile(path):
            raise DatasetError(f"{source}: no image {path}. Put it there, or take its line out.")
        return path


def read_json(path: Path) -> Any:
    """A JSON file.

    Raises:
        DatasetError: Not JSON; the message gives file, line and column.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DatasetError(f"{path}:{error.lineno}: broken JSON at column {error.colno} ({error.msg}).") from error
    except (UnicodeDecodeError, OSError) as error:
        raise DatasetError(f"{path}: cannot be read as UTF-8 text ({error}).") from error


def read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Records of a JSON-lines file, each with `file:line` for messages; empty lines are skipped.

    Raises:
        DatasetError: A line that is not a JSON object.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (UnicodeDecodeError, OSError) as error:
        raise DatasetError(f"{path}: cannot be read as UTF-8 text ({error}).") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DatasetError(f"{path}:{number}: broken JSON ({error.msg} at column {error.colno}).") from error
        if not isinstance(record, dict):
            raise DatasetError(f"{path}:{number}: a JSON object {{...}} is needed, got {type(record).__name__}.")
        yield f"{path}:{number}", record


def require(record: Mapping[str, Any], key: str, source: str) -> Any:
    """A field that must be there.

    Raises:
        DatasetError: It is not.
    """
    if record.get(key) is None:
        raise DatasetError(f"{source}: field '{key}' is missing; found {', '.join(map(str, record)) or 'nothing'}.")
    return record[key]


def checked_box(
    box: Any, width: int, height: int, source: str, on_invalid: Literal["error", "skip"] = "error"
) -> list[float] | None:
    """A box clipped to its image.

    Args:
        box (`list[float]`): `[x, y, width, height]` in pixels.
        width (`int`): Of the image, pixels.
        height (`int`): Of the image, pixels.
        source (`str`): File and annotation, for the message.
        on_invalid (`"error"` or `"skip"`): What to do with a box that holds nothing of the image.

    Returns:
        `list[float]` or `None`: The part inside the image; None for a skipped box.

    Raises:
        DatasetError: Not four finite numbers, zero area or wholly outside, with `on_invalid="error"`.
    """
    problem = None
    try:
        x, y, w, h = (float(value) for value in box)
    except (TypeError, ValueError):
        x = y = w = h = math.nan
    if not all(map(math.isfinite, (x, y, w, h))):
        problem = "is not four finite numbers [x, y, width, height]"
    elif w <= 0 or h <= 0:
        problem = "has no area"
    else:
        left, top, right, bottom = max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height))
        if right - left > 0 and bottom - top > 0:
            return [left, top, right - left, bottom - top]
        problem = f"lies outside the image of {width}x{height} pixels"
    message = f"{source}: box {box} {problem}."
    if on_invalid == "skip":
        logger.warning("%s Skipped.", message)
        return None
    raise DatasetError(f'{message} Correct it (boxes are xywh in pixels), or read with on_invalid="skip".')


def read_coco(
    path: Path,
    image_root: Path,
    dataset: str,
    rename: Mapping[str, str],
    on_invalid: Literal["error", "skip"] = "error",
) -> list[Row]:
    """Detection rows of a COCO file.

    Args:
        path (`Path`): `images`, `annotations`, `categories`; an annotation may have `attributes` {name: value}.
        image_root (`Path`): Folder that `file_name` is relative to.
        dataset (`str`): Name of the data set.
        rename (`Mapping[str, str]`): Category names to replace.
        on_invalid (`"error"` or `"skip"`): For boxes without area or outside the image.

    Raises:
        DatasetError: Missing part, unknown id, missing image, or invalid box.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise DatasetError(f"{path}: a COCO object with images, annotations and categories is needed.")
    images = require(content, "images", str(path))
    categories = require(content, "categories", str(path))
    if not categories:
        raise DatasetError(f"{path}: no categories. List the annotated classes as {{'id', 'name'}}.")
    names = {
        require(category, "id", f"{path}: category"): _renamed(require(category, "name", f"{path}: category"), rename)
        for category in categories
    }
    annotated = list(dict.fromkeys(names.values()))

    folder = ImageFolder(image_root)
    rows: dict[Any, Row] = {}
    sizes: dict[Any, tuple[int, int]] = {}
    for image in images:
        source = f"{path}: image {image.get('id')}"
        identifier = require(image, "id", source)
        if identifier in rows:
            raise DatasetError(f"{source}: this id occurs twice.")
        file_name = require(image, "file_name", source)
        rows[identifier] = {
            "image": folder.path(file_name, source),
            "file_name": file_name,
            "dataset": dataset,
            "task": "detection",
            "objects": {"bbox": [], "category": [], "morphology": [], "iscrowd": []},
            "annotated_classes": annotated,
        }
        sizes[identifier] = recorded_size(image, rows[identifier]["image"])
        rows[identifier]["size"] = sizes[identifier]

    for annotation in require(content, "annotations", str(path)):
        source = f"{path}: annotation {annotation.get('id')}"
        image_id = require(annotation, "image_id", source)
        if image_id not in rows:
            raise DatasetError(f"{source}: image_id {image_id} is not among the images.")
        category = require(annotation, "category_id", source)
        if category not in names:
            known = ", ".join(f"{key} {name}" for key, name in names.items())
            raise DatasetError(f"{source}: category_id {category} is not among the categories ({known}).")
        row = rows[image_id]
        source = f"{source} ({row['file_name']})"
        box = checked_box(require(annotation, "bbox", source), *sizes[image_id], source, on_invalid)
        if box is None:
            continue
        attributes = annotation.get("attributes") or {}
        row["objects"]["bbox"].append(box)
        row["objects"]["category"].append(names[category])
        row["objects"]["morphology"].append({key: str(value) for key, value in attributes.items() if value is not None})
        row["objects"]["iscrowd"].append(int(annotation.get("iscrowd") or 0))
    return list(rows.values())


def recorded_size(record: Mapping[str, Any], path: str) -> tuple[int, int]:
    """Width and height as the record has them, else from the file's header."""
    if record.get("width") and record.get("height"):
        return int(record["width"]), int(record["height"])
    return image_size(path)


def image_size(path: str) -> tuple[int, int]:
    """Width and height from the file's header.

    Raises:
        DatasetError: Not an image.
    """
    try:
        with Image.open(path) as image:
            return image.size
    except (OSError, SyntaxError, ValueError) as error:
        raise DatasetError(f"{path}: not a readable image ({error}). Copy it again or take it out.") from error


def _renamed(name: Any, rename: Mapping[str, str]) -> str:
    return rename.get(str(name), str(name))
