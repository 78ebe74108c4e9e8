"""Files of data folders: JSON, JSON lines, tables, the images that they name, and boxes within an image."""

import csv
import json
import math
import os
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from unihema.errors import DatasetError, InputError
from unihema.processing_unihema.image_io import IMAGE_SUFFIXES
from unihema.training.data.rows import BadRows, Row


# Where images lie, seen from the folder of the file that names them.
BESIDE = ("", "images", "JPEGImages", "../images", "../JPEGImages")
_DRIVE = re.compile(r"^[A-Za-z]:")


class ImageFolder:
    """Looks images up by relative path, listing each directory once instead of asking the disk for every row."""

    def __init__(self, root: Path):
        self.root = root
        self._listings: dict[str, set[str]] = {}

    def path(self, file_name: Any, source: str) -> str:
        """Path of an image.

        Raises:
            DatasetError: No such file, or a name that leads out of the folder; `source` says who refers to it.
        """
        path = os.path.join(self.root, checked_name(file_name, source))
        folder, name = os.path.split(path)
        if folder not in self._listings:
            self._listings[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if name not in self._listings[folder] and not os.path.isfile(path):
            raise DatasetError(f"{source}: no image {path}. Put it there, or take its entry out.")
        return path


class ImageFinder:
    """The images of a folder and its subfolders, by path, name and stem.

    Args:
        root (`Path`): The data set; nothing outside it is found.
    """

    def __init__(self, root: Path):
        self.root = root

    @cached_property
    def files(self) -> list[Path]:
        """All images, in order, hidden files and folders (such as `__MACOSX`) left out."""
        return [
            path
            for path in sorted(self.root.rglob("*"))
            if path.suffix.lower() in IMAGE_SUFFIXES and not is_hidden(path.relative_to(self.root)) and path.is_file()
        ]

    @cached_property
    def _by_name(self) -> dict[str, list[Path]]:
        found: dict[str, list[Path]] = {}
        for path in self.files:
            for key in {path.name, path.stem}:
                found.setdefault(key, []).append(path)
        return found

    @cached_property
    def _paths(self) -> set[Path]:
        return set(self.files)

    def relative(self, path: str | Path) -> str:
        """Path from the data set's folder, with forward slashes."""
        return Path(path).relative_to(self.root).as_posix()

    def row(self, path: str | Path, dataset: str, task: str) -> Row:
        """What a row of any task says of its image."""
        return {"image": str(path), "file_name": self.relative(path), "dataset": dataset, "task": task}

    def find(self, names: Sequence[str], annotation: Path, source: str) -> str:
        """Path of an image.

        Args:
            names (`Sequence[str]`): What it may be called, best first; with or without folder and suffix.
            annotation (`Path`): The file that names it: images near it come first.
            source (`str`): Who refers to it, for the message.

        Raises:
            DatasetError: None, several of the same name, or a name that leads out of the data set.
        """
        checked = [checked_name(name, source) for name in names]
        for name in checked:
            for place in BESIDE:
                path = _joined(annotation.parent, place, name)
                if path in self._paths:
                    return str(path)
            if self.root / name in self._paths:
                return str(self.root / name)
        for name in checked:
            found = self._by_name.get(PurePosixPath(name).name, [])
            if len(found) == 1:
                return str(found[0])
            if found:
                shown = ", ".join(self.relative(path) for path in found[:3])
                raise DatasetError(
                    f"{source}: {len(found)} images are called {name}: {shown}. Give the folder as well."
                )
        raise DatasetError(f"{source}: no image {checked[0]} in {self.root}. Put it there, or take its entry out.")


def is_hidden(path: Path) -> bool:
    """Whether a relative path is a hidden file, in a hidden folder, or what macOS adds to archives."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def _joined(folder: Path, place: str, name: str) -> Path:
    if place.startswith("../"):
        return folder.parent / place[3:] / name
    return folder / place / name


class UnsafeNameError(InputError):
    """A name that leads out of the folder it belongs to."""


def inside(name: str) -> str:
    """A relative name with forward slashes and without `.` and `..`.

    Args:
        name (`str`): As an annotation file or an archive has it; backslashes count as slashes.

    Raises:
        UnsafeNameError: Empty, absolute, with a drive, a control character, or leading out by `..`.
    """
    slashed = name.replace("\\", "/")
    if any(ord(character) < 32 for character in name):
        raise UnsafeNameError(f"{name!r} has a control character in it")
    if slashed.startswith("/") or _DRIVE.match(slashed):
        raise UnsafeNameError(f"{name!r} is an absolute path")
    normal = posixpath.normpath(slashed)
    if normal == ".." or normal.startswith("../"):
        raise UnsafeNameError(f"{name!r} leads out of the folder")
    if not slashed or normal == ".":
        raise UnsafeNameError(f"{name!r} names no file")
    return normal


def checked_name(file_name: Any, source: str) -> str:
    """A file name as an annotation gives it, relative and inside its folder.

    Raises:
        DatasetError: No name, an absolute path, or one that leads out by `..`.
    """
    if not isinstance(file_name, str) or not file_name:
        raise DatasetError(f"{source}: a file name is needed, got {file_name!r}.")
    try:
        return inside(file_name)
    except UnsafeNameError as error:
        raise DatasetError(f"{source}: {error}. File names are relative to the data folder.") from error


def read_text(path: Path) -> str:
    """A text file.

    Raises:
        DatasetError: Not there, or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        raise DatasetError(f"{path}: cannot be read as UTF-8 text ({error}).") from error


def read_json(path: Path) -> Any:
    """A JSON file.

    Raises:
        DatasetError: Not a text file, or not JSON; the message names line and column.
    """
    return _parsed(read_text(path), path)


def _parsed(text: str, path: Path, line: int = 1) -> Any:
    """The JSON value of a text that begins on a line of a file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{path}:{line + error.lineno - 1}"
        raise DatasetError(f"{place}: broken JSON at column {error.colno} ({error.msg}).") from error
    except (ValueError, RecursionError) as error:
        # A number of thousands of digits, or nesting of thousands of levels.
        raise DatasetError(f"{path}:{line}: cannot be read as JSON ({error}).") from error


def read_json_lines(path: Path, bad: BadRows) -> Iterator[tuple[str, dict[str, Any]]]:
    """Records of a JSON-lines file, each with `file:line` for messages; empty lines are skipped.

    Args:
        path (`Path`): The file.
        bad (`BadRows`): Gets the lines that are no JSON object.

    Raises:
        DatasetError: Not a text file.
    """
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        source = f"{path}:{number}"
        record = None
        with bad.collecting():
            record = _parsed(line, path, number)
            if not isinstance(record, dict):
                raise DatasetError(f"{source}: a JSON object {{...}} is needed, got {type(record).__name__}.")
        if isinstance(record, dict):
            yield source, record


def read_table(path: Path, bad: BadRows) -> Iterator[tuple[str, dict[str, Any]]]:
    """Records of a table with a header line (comma, semicolon or tab), each with `file:line`; empty cells are None.

    Args:
        path (`Path`): The file.
        bad (`BadRows`): Gets the lines with more or fewer cells than the header.

    Raises:
        DatasetError: Not a text file, no header, or a column named twice.
    """
    lines = read_text(path).splitlines()
    header = lines[0] if lines else ""
    delimiter = max(",;\t", key=header.count)
    reader = csv.reader(lines, delimiter=delimiter)
    columns = [name.strip() for name in next(reader, [])]
    if not any(columns):
        raise DatasetError(f"{path}:1: a header line with the names of the columns is needed.")
    if len(set(columns)) != len(columns):
        raise DatasetError(f"{path}:1: a column is named twice: {', '.join(columns)}.")
    while True:
        record = None
        with bad.collecting():
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise DatasetError(f"{path}:{reader.line_num}: not a table row ({error}).") from error
            if cells is None:
                return
            if cells and len(cells) != len(columns):
                raise DatasetError(f"{path}:{reader.line_num}: {len(cells)} cells, but {len(columns)} columns.")
            record = {name: cell.strip() or None for name, cell in zip(columns, cells)} if any(cells) else None
        if record is not None:
            yield f"{path}:{reader.line_num}", record


def require(record: Mapping[str, Any], key: str, source: str, *others: str) -> Any:
    """A field that must be there, under its name or one of its other names.

    Raises:
        DatasetError: It is not.
    """
    for name in (key, *others):
        if record.get(name) is not None:
            return record[name]
    raise DatasetError(f"{source}: field '{key}' is missing; found {', '.join(map(str, record)) or 'nothing'}.")


def checked_box(box: Any, width: int, height: int, source: str) -> list[float]:
    """A box clipped to its image.

    Args:
        box (`list[float]`): `[x, y, width, height]` in pixels.
        width (`int`): Of the image, pixels.
        height (`int`): Of the image, pixels.
        source (`str`): File and annotation, for the message.

    Returns:
        `list[float]`: The part inside the image.

    Raises:
        DatasetError: Not four finite numbers, zero area or wholly outside.
    """
    try:
        x, y, w, h = (float(value) for value in box)
    except (TypeError, ValueError, OverflowError):
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
    raise DatasetError(f"{source}: box {box} {problem} (boxes are xywh in pixels).")


def recorded_size(record: Mapping[str, Any], path: str) -> tuple[int, int]:
    """Width and height as the record has them, else from the file's header.

    Raises:
        DatasetError: Recorded, but no numbers above 0; or the file is no image.
    """
    if record.get("width") and record.get("height"):
        try:
            size = int(record["width"]), int(record["height"])
        except (TypeError, ValueError, OverflowError):
            size = (0, 0)
        if min(size) <= 0:
            raise DatasetError(f"{path}: its recorded size {record['width']}x{record['height']} is no size in pixels.")
        return size
    return image_size(path)


def image_size(path: str) -> tuple[int, int]:
    """Width and height from the file's header.

    Raises:
        DatasetError: Not an image.
    """
    try:
        with Image.open(path) as image:
            return image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DatasetError(f"{path}: not a readable image ({error}). Copy it again or take it out.") from error


def image_files(folder: Path) -> list[Path]:
    """The images directly in a folder, in order; none when there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
