"""Reading of the files that data folders are made of: JSON, JSON lines, tables, the images they name."""

import csv
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from unihema.errors import DatasetError
from unihema.processing_unihema.image_io import IMAGE_SUFFIXES
from unihema.training.data.bad_rows import BadRows
from unihema.training.data.curation.member_names import UnsafeNameError, inside


_SPACE = re.compile(r"[ \t\n\r]*")


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
            raise DatasetError(f"{source}: no image {path}. Put it there, or take its line out.")
        return path


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


def read_located_json(path: Path) -> tuple[Any, dict[str, list[int]]]:
    """A JSON file and, where it is an object, the line on which each entry of its lists begins.

    Returns:
        `tuple`: The content, and key -> line numbers of the entries.

    Raises:
        DatasetError: Not JSON; the message gives file, line and column.
    """
    text = read_text(path)
    try:
        start = _SPACE.match(text).end()
        if text[start : start + 1] != "{":
            return json.loads(text), {}
        return _located_object(text, start)
    except json.JSONDecodeError as error:
        raise DatasetError(f"{path}:{error.lineno}: broken JSON at column {error.colno} ({error.msg}).") from error
    except RecursionError as error:
        raise DatasetError(f"{path}: nested too deeply to be an annotation file.") from error


def _located_object(text: str, at: int) -> tuple[dict[str, Any], dict[str, list[int]]]:
    decode = json.JSONDecoder().raw_decode
    content: dict[str, Any] = {}
    lines: dict[str, list[int]] = {}
    newlines, counted = 1, 0

    def skip(position: int) -> int:
        return _SPACE.match(text, position).end()

    def expect(position: int, characters: str) -> int:
        if text[position : position + 1] not in characters or position >= len(text):
            raise json.JSONDecodeError(f"Expecting one of {characters}", text, position)
        return position + 1

    at = skip(at + 1)
    while text[at : at + 1] != "}":
        if content:
            at = skip(expect(at, ","))
        expect(at, '"')
        key, at = decode(text, at)
        at = skip(expect(skip(at), ":"))
        if text[at : at + 1] != "[":
            content[key], at = decode(text, at)
        else:
            entries, where = [], []
            at = skip(at + 1)
            while text[at : at + 1] != "]":
                if entries:
                    at = skip(expect(at, ","))
                newlines, counted = newlines + text.count("\n", counted, at), at
                where.append(newlines)
                entry, at = decode(text, at)
                entries.append(entry)
                at = skip(at)
            at += 1
            content[key], lines[key] = entries, where
        at = skip(at)
    if skip(at + 1) != len(text):
        raise json.JSONDecodeError("Extra data", text, at + 1)
    return content, lines


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
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise DatasetError(f"{source}: broken JSON ({error.msg} at column {error.colno}).") from error
            except RecursionError as error:
                raise DatasetError(f"{source}: nested too deeply to be a record.") from error
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
    raise DatasetError(f"{source}: box {box} {problem} (boxes are xywh in pixels).")


def recorded_size(record: Mapping[str, Any], path: str) -> tuple[int, int]:
    """Width and height as the record has them, else from the file's header.

    Raises:
        DatasetError: Recorded, but no numbers above 0; or the file is no image.
    """
    if record.get("width") and record.get("height"):
        try:
            size = int(record["width"]), int(record["height"])
        except (TypeError, ValueError):
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
