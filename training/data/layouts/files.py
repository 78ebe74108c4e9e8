"""Files of data folders: JSON, JSON lines, tables, the images that they name, and boxes within an image.

What a file may hold is bounded: `LARGEST_TEXT` bytes of text, and fewer where a layout's files are small.
"""

import codecs
import csv
import json
import math
import os
import posixpath
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from unihema.errors import DatasetError, InputError
from unihema.files import real_path, shortened
from unihema.processing_unihema.image_io import IMAGE_SUFFIXES
from unihema.processing_unihema.image_io import image_size as upright_size
from unihema.results.export import table_text
from unihema.training.data.rows import KNOWN_COLUMNS, BadRows, Row, column_name, shown


# Where images lie, seen from the folder of the file that names them.
BESIDE = ("", "images", "JPEGImages", "../images", "../JPEGImages")
# Bytes of a JSON file or table. Annotations of a million cells take less; parsing takes about ten times as much memory.
LARGEST_TEXT = 512 << 20
# Characters of a class name, and of a question or an answer.
LONGEST_NAME = 200
LONGEST_TEXT = 100_000
# Pixels of a side: what a reader believes of a recorded size.
LARGEST_SIDE = 10_000_000
# Pixels of an image. Decoded, one takes four bytes each at most.
LARGEST_IMAGE = 400_000_000
# Bytes of a file beyond which it must not be much larger than its pixels; a stack of sixteen pages in 16-bit colours is not.
LARGEST_SMALL_IMAGE = 256 << 20
MOST_BYTES_OF_PIXEL = 128
# Folders within folders.
DEEPEST = 64
_ANNOTATION_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".xml", ".txt", ".yaml", ".yml", ".parquet")
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
        path = os.path.join(self.root, checked_name(within(file_name, self.root), source))
        folder, name = os.path.split(path)
        if folder not in self._listings:
            self._listings[folder] = _regular_files(folder)
        if name not in self._listings[folder]:
            raise DatasetError(f"{source}: no image {path}. Put it there, or take its entry out.")
        return path


def _regular_files(folder: str) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except (OSError, ValueError):
        return set()


class DataFiles:
    """The files of a folder and its subfolders, in order; links to folders are followed.

    Hidden files and folders (such as `__MACOSX`) are left out.

    Args:
        root (`Path`): The data set.

    Attributes:
        files (`list[Path]`): Regular files.
        problems (`list[str]`): What is there and cannot be read: broken links, links that lead in a circle, folders without
            permission, pipes, names that are not UTF-8.
    """

    def __init__(self, root: Path):
        self.root = root
        self.files: list[Path] = []
        self.problems: list[str] = []
        self._links: list[Path] = []
        # A folder that is linked to and is in the tree as well is read where it is.
        self._read: set[str] = set()
        self._above = {str(folder) for folder in (real_path(root), *real_path(root).parents)}
        self._walk(root)
        while self._links:
            link = self._links.pop(0)
            target = os.path.realpath(link)
            if target in self._above:
                self.problems.append(f"{link}: a link to a folder around it. Take it out.")
            elif target in self._read:
                self.problems.append(f"{link}: a link to {target}, which is read already. Take it out.")
            else:
                self._walk(link)
        self.files.sort()
        self.problems.sort()

    def _walk(self, start: Path) -> None:
        folders = [(start, 0)]
        while folders:
            folder, depth = folders.pop()
            self._read.add(os.path.realpath(folder))
            try:
                with os.scandir(folder) as entries:
                    found = sorted(entries, key=lambda entry: entry.name)
            except OSError as error:
                self.problems.append(f"{folder}: cannot be read ({error.strerror}).")
                continue
            for entry in found:
                path = folder / entry.name
                if is_hidden(Path(entry.name)):
                    continue
                if not _is_utf8(entry.name):
                    self.problems.append(f"{os.fsencode(path)!r}: the name is not UTF-8. Rename it.")
                elif _is_a(entry.is_dir, follow_symlinks=False):
                    if depth < DEEPEST:
                        folders.append((path, depth + 1))
                    else:
                        self.problems.append(f"{folder}: folders deeper than {DEEPEST} are not read.")
                elif _is_a(entry.is_dir):
                    self._links.append(path)
                elif _is_a(entry.is_file):
                    self.files.append(path)
                elif path.suffix.lower() in (*IMAGE_SUFFIXES, *_ANNOTATION_SUFFIXES):
                    what = "a broken link" if entry.is_symlink() else "neither a file nor a folder"
                    self.problems.append(f"{path}: {what}. Copy the file again, or take it out.")

    def named(self, *suffixes: str) -> list[Path]:
        """Files whose names end so; suffixes in lower case."""
        return [path for path in self.files if path.suffix.lower() in suffixes]


def _is_a(kind: Any, **options: Any) -> bool:
    try:
        return kind(**options)
    except OSError:
        # A link that leads to itself.
        return False


def _is_utf8(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


class ImageFinder:
    """The images of a folder and its subfolders, by path, name and stem.

    Args:
        root (`Path`): The data set; nothing outside it is found.
    """

    def __init__(self, root: Path):
        self.root = root
        self._by_name_only: list[str] = []

    @cached_property
    def listing(self) -> DataFiles:
        """All files of the data set."""
        return DataFiles(self.root)

    @cached_property
    def files(self) -> list[Path]:
        """All images, in order, hidden files and folders (such as `__MACOSX`) left out."""
        return self.listing.named(*IMAGE_SUFFIXES)

    def report(self, bad: BadRows, used: Sequence[Row] | None = None, what: str = "has an annotation") -> None:
        """Tells what was found otherwise than expected.

        Args:
            bad (`BadRows`): Gets files that cannot be read as bad rows, and notes on the rest.
            used (`Sequence[Row]`, *optional*): All rows made of the folder: images without one are counted.
            what (`str`): What those images lack.
        """
        bad.messages += self.listing.problems
        if self._by_name_only:
            bad.note(
                f"{self.root}: {_number(self._by_name_only, 'image')} named by a path that is not in the folder, and found "
                f"by the file's name: {self._by_name_only[0]}."
            )
        if used is not None:
            known = {str(row["image"]) for row in used} | {str(row["mask"]) for row in used if "mask" in row}
            unused = [self.relative(path) for path in self.files if str(path) not in known]
            if unused:
                bad.note(
                    f"{self.root}: {_number(unused, 'image')} without a row, since nothing {what}: {_some(unused)}."
                )

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
        # A path on another computer says nothing but the file's name.
        elsewhere = [name for name in names if isinstance(name, str) and _is_absolute(name)]
        inner = [within(name, self.root) for name in names]
        checked = [checked_name(_tail(name) if name in elsewhere else name, source) for name in inner]
        for name in checked:
            for place in BESIDE:
                path = _joined(annotation.parent, place, name)
                if path in self._paths:
                    return str(path)
            if self.root / name in self._paths:
                return str(self.root / name)
        for name in checked:
            found = self._like(name)
            if len(found) == 1:
                if "/" in name:
                    self._by_name_only.append(f"{name} as {self.relative(found[0])}")
                return str(found[0])
            if found:
                raise DatasetError(
                    f"{source}: {len(found)} images are called {name}: {', '.join(map(self.relative, found[:3]))}. "
                    "Give the folder as well."
                )
        if elsewhere:
            checked_name(elsewhere[0], source)
        raise DatasetError(f"{source}: no image {checked[0]} in {self.root}. Put it there, or take its entry out.")

    def _like(self, name: str) -> list[Path]:
        """Images of that name or stem; of several, those that share the most folders with it."""
        parts = PurePosixPath(name).parts
        found = self._by_name.get(parts[-1], [])
        if len(found) < 2:
            return found
        shared = [_shared_folders(path.relative_to(self.root).parts[:-1], parts[:-1]) for path in found]
        return [path for path, number in zip(found, shared) if number == max(shared)]


def is_hidden(path: Path) -> bool:
    """Whether a relative path is a hidden file, in a hidden folder, or what macOS adds to archives."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def _number(items: Sequence[Any], what: str) -> str:
    return f"{len(items)} {what}{'' if len(items) == 1 else 's'}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _shared_folders(first: Sequence[str], second: Sequence[str]) -> int:
    """How many folders two paths share, counted from the file."""
    number = 0
    for one, other in zip(reversed(first), reversed(second)):
        if one != other:
            break
        number += 1
    return number


def _is_absolute(name: str) -> bool:
    return name.startswith(("/", "\\")) or bool(_DRIVE.match(name))


def _tail(name: str) -> str:
    """An absolute path without its root."""
    return _DRIVE.sub("", name).replace("\\", "/").lstrip("/")


def within(name: Any, root: Path) -> Any:
    """A name that is an absolute path in a folder, as a path from that folder; other names as they are."""
    if not isinstance(name, str) or not _is_absolute(name):
        return name
    for folder in (os.path.abspath(root), os.path.realpath(root)):
        if name.startswith(folder + os.sep):
            return name[len(folder) + 1 :]
    return name


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
        raise DatasetError(f"{source}: a file name is needed, got {shown(file_name)}.")
    try:
        return inside(file_name)
    except UnsafeNameError as error:
        raise DatasetError(f"{source}: {error}. File names are relative to the data folder.") from error


def checked_label(value: Any, source: str) -> str:
    """A class name: a text of 1 to `LONGEST_NAME` characters, without spaces around it; a number is taken as text.

    Raises:
        DatasetError: It is none.
    """
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise DatasetError(f"{source}: a class name is needed, got {shown(value)}.")
    name = str(value).strip()
    if not name or len(name) > LONGEST_NAME or any(ord(character) < 32 for character in name):
        raise DatasetError(
            f"{source}: class name {shown(name)} must have 1 to {LONGEST_NAME} characters, all of which can be seen."
        )
    return name


def checked_text(value: Any, source: str) -> str:
    """A question, an answer or a sentence; a number is taken as text.

    Raises:
        DatasetError: Another type, nothing to read, or more than `LONGEST_TEXT` characters.
    """
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise DatasetError(f"{source}: a text is needed, got {shown(value)}.")
    text = str(value)
    if not text.strip() or len(text) > LONGEST_TEXT:
        raise DatasetError(f"{source}: a text of 1 to {LONGEST_TEXT} characters is needed, got {len(text)}.")
    return text


def read_bytes(path: Path, limit: int) -> bytes:
    """The content of a regular file.

    Raises:
        DatasetError: Not there, no regular file (a pipe would be waited for), not readable, or larger than `limit` bytes.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise DatasetError(f"{path}: not a regular file. Copy it again, or take it out.")
        if status.st_size > limit:
            size = f"{limit >> 20} MB" if limit >> 20 else f"{limit} bytes"
            raise DatasetError(f"{path}: larger than {size}, so not read. Divide it.")
        with path.open("rb") as file:
            return file.read(status.st_size)
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({shortened(error)}).") from error


def read_text(path: Path, limit: int = LARGEST_TEXT) -> str:
    """A text file in UTF-8, or in UTF-16 with a byte order mark, as Excel and PowerShell write it.

    Raises:
        DatasetError: See [`read_bytes`]; or of another encoding.
    """
    content = read_bytes(path, limit)
    try:
        return content.decode(encoding_of(content))
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{path}: cannot be read as UTF-8 text ({error.reason} at byte {error.start}). Save it as UTF-8."
        ) from error


def encoding_of(content: bytes) -> str:
    """UTF-8, or UTF-16 where a text begins with its byte order mark."""
    return "utf-16" if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"


def read_json(path: Path) -> Any:
    """A JSON file.

    Raises:
        DatasetError: Not a text file, or not JSON; the message names line and column.
    """
    return _parsed(read_text(path), path)


def parse_json(text: str, source: str) -> Any:
    """The JSON value of a text; `source` says where it stands.

    Raises:
        DatasetError: Broken, nested too deeply, a number of thousands of digits, a key that an object has twice, or half of a
            surrogate pair, which is no text.
    """
    try:
        value = json.loads(text, object_pairs_hook=_object)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError:
        raise
    except UnicodeEncodeError as error:
        raise DatasetError(f"{source}: half a surrogate pair (\\ud800 and the like) is no text.") from error
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{source}: cannot be read as JSON ({shortened(error)}).") from error
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"an object has the key {shown(twice)} twice")
    return made


def _parsed(text: str, path: Path, line: int = 1) -> Any:
    """The JSON value of a text that begins on a line of a file."""
    try:
        return parse_json(text, f"{path}:{line}")
    except json.JSONDecodeError as error:
        place = f"{path}:{line + error.lineno - 1}"
        raise DatasetError(f"{place}: broken JSON at column {error.colno} ({error.msg}).") from error


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

    Columns that readers know are taken in any case and with spaces for underscores (`Patient ID` is `patient_id`).

    Args:
        path (`Path`): The file.
        bad (`BadRows`): Gets the lines with more or fewer cells than the header.

    Raises:
        DatasetError: Not a text file, no header, or a column named twice.
    """
    lines = read_text(path).splitlines()
    first, delimiter = table_start(lines[:2])
    reader = csv.reader(lines[first:], delimiter=delimiter)
    source = f"{path}:{first + 1}"
    try:
        columns = [_column(name) for name in next(reader, [])]
    except csv.Error as error:
        raise DatasetError(f"{source}: not a table row ({shortened(error)}).") from error
    if not any(columns):
        raise DatasetError(f"{source}: a header line with the names of the columns is needed.")
    if len(set(columns)) != len(columns):
        raise DatasetError(f"{source}: a column is named twice: {shown(columns)}.")
    while True:
        record = None
        with bad.collecting():
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise DatasetError(
                    f"{path}:{first + reader.line_num}: not a table row ({shortened(error)})."
                ) from error
            if cells is None:
                return
            source = f"{path}:{first + reader.line_num}"
            if cells and len(cells) != len(columns):
                raise DatasetError(f"{source}: {len(cells)} cells, but {len(columns)} columns.")
            record = {name: from_table_text(cell) or None for name, cell in zip(columns, cells)} if any(cells) else None
        if record is not None:
            yield source, record


def table_start(lines: Sequence[str]) -> tuple[int, str]:
    """The header's place among the first lines of a table, and what stands between cells.

    Excel writes what stands between cells into a line of its own, `sep=;`.
    """
    first = 1 if lines and lines[0].strip('" ').lower().startswith("sep=") else 0
    header = lines[first] if len(lines) > first else ""
    return first, max(",;\t", key=header.count)


def from_table_text(cell: str) -> str:
    """A cell without spaces around it, and without the apostrophe that [`table_text`] puts before what looks like a formula."""
    text = cell.strip()
    return text[1:] if text.startswith("'") and table_text(text[1:]) == text else text


def _column(name: str) -> str:
    usual = column_name(name)
    return usual if usual in KNOWN_COLUMNS else from_table_text(name)


def require(record: Mapping[str, Any], key: str, source: str, *others: str) -> Any:
    """A field that must be there, under its name or one of its other names.

    Raises:
        DatasetError: It is not.
    """
    for name in (key, *others):
        if record.get(name) is not None:
            return record[name]
    raise DatasetError(f"{source}: field '{key}' is missing; found {shown(list(record)) if record else 'nothing'}.")


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
        DatasetError: Not four finite numbers, zero area, smaller than a pixel both ways or wholly outside.
    """
    try:
        x, y, w, h = (float(value) for value in box) if not isinstance(box, str) else ()
    except (TypeError, ValueError, OverflowError):
        x = y = w = h = math.nan
    if not all(map(math.isfinite, (x, y, w, h))):
        problem = "is not four finite numbers [x, y, width, height]"
    elif w <= 0 or h <= 0:
        problem = "has no area"
    elif w < 1 and h < 1 and min(width, height) > 8:
        problem = "is smaller than a pixel; is it in fractions of the image?"
    else:
        left, top, right, bottom = max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height))
        if right - left > 0 and bottom - top > 0:
            return [left, top, right - left, bottom - top]
        problem = f"lies outside the image of {width}x{height} pixels"
    raise DatasetError(f"{source}: box {shown(box)} {problem} (boxes are xywh in pixels).")


class ClippedBoxes:
    """Counts boxes that reach out of their image, which are clipped.

    Args:
        bad (`BadRows`): Gets one note for all of them.
    """

    def __init__(self, bad: BadRows):
        self._bad = bad
        self._sources: list[str] = []
        self._boxes = 0

    def checked(self, box: Any, width: int, height: int, source: str) -> list[float]:
        """See [`checked_box`]."""
        kept = checked_box(box, width, height, source)
        self._boxes += 1
        x, y, w, h = (float(value) for value in box)
        if max(kept[0] - x, kept[1] - y, x + w - kept[0] - kept[2], y + h - kept[1] - kept[3]) > 1:
            self._sources.append(source)
        return kept

    def report(self) -> None:
        """Gives the note, if there is anything to note."""
        if self._sources:
            hint = " Are they corners instead of [x, y, width, height]?" if len(self._sources) > self._boxes / 4 else ""
            self._bad.note(
                f"{self._sources[0]}: {len(self._sources)} of {self._boxes} boxes reach out of their image and are "
                f"clipped.{hint}"
            )


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
        if not 0 < min(size) <= max(size) <= LARGEST_SIDE:
            raise DatasetError(
                f"{path}: its recorded size {shown(record['width'])}x{shown(record['height'])} is no size in pixels."
            )
        return size
    return image_size(path)


def image_size(path: str) -> tuple[int, int]:
    """Width and height of an upright image, from the file's header.

    Raises:
        DatasetError: Not an image.
    """
    try:
        if not os.path.isfile(path):
            raise ValueError("no file")
        with open(path, "rb") as file:
            head = file.read(24)
        # PIL decodes a whole PNG to find out how it is turned.
        if head.startswith(b"\x89PNG") and int.from_bytes(head[16:20]) * int.from_bytes(head[20:24]) > LARGEST_IMAGE:
            raise ValueError(f"more than {LARGEST_IMAGE} pixels")
        height, width = upright_size(path)
        size = os.path.getsize(path)
        if size > LARGEST_SMALL_IMAGE and size > MOST_BYTES_OF_PIXEL * height * width:
            raise ValueError(f"{size} bytes for {width}x{height} pixels")
    except Exception as error:
        # PIL's readers raise anything on bytes that were damaged on purpose.
        raise DatasetError(
            f"{path}: not a readable image ({shortened(error)}). Copy it again or take it out."
        ) from error
    return width, height
