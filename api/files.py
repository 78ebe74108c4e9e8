"""Files: finding and opening images, hashing, and writing so that nothing is ever half there."""

import glob
import hashlib
import json
import math
import os
import re
import shutil
import socket
import tempfile
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy
from PIL import Image

from unihema.errors import InputError, OutputError, UniHemaError, printable

from .processing_unihema.image_io import IMAGE_SUFFIXES, SLIDE_SUFFIXES, image_size, read_image


# Names of files that are being written: with host and process, so that what a killed one left is known.
_PARTIAL = f".unihema-{re.sub(r'[^0-9A-Za-z.]', '', socket.gethostname())[:64]}-"
# Folders that this process has cleaned of such files.
_cleaned: set[str] = set()
_LOCK, _OWNER = ".unihema.lock", ".unihema.run"


class OpenedImage(NamedTuple):
    """An image that was read.

    Args:
        pixels (`PIL.Image.Image`): RGB, perhaps reduced.
        width (`int`): Of the file.
        height (`int`): Of the file.
        name (`str`, *optional*): Its path, where it came from one.
        notes (`tuple[str, ...]`): A sentence for each thing that was guessed about its pixels, see [`read_image`].
    """

    pixels: Image.Image
    width: int
    height: int
    name: str | None
    notes: tuple[str, ...] = ()


def find_images(inputs: Sequence[str | Path], exclude: Path | None = None) -> tuple[list[Path], list[tuple[str, str]]]:
    """Images named by files, folders (with their subfolders) and glob patterns.

    Args:
        inputs (`Sequence[str | Path]`): What the user named. A file is taken whatever its name ends with.
        exclude (`Path`, *optional*): The folder results are written to; its images are not taken where it lies inside
            another, and neither are those of other results folders.

    Returns:
        `tuple`: The images, each once and in order, and (input, message) for each input that gave none.
    """
    images: dict[Path, Path] = {}
    problems: list[tuple[str, str]] = []
    for item in map(str, inputs):
        path = Path(item)
        if os.path.isdir(path):
            found, message = _images_in(path, exclude), "no image in this folder or its subfolders"
        elif os.path.exists(path) or not glob.has_magic(item):
            found, message = [path] if os.path.exists(path) else [], "no such file or folder"
        else:
            matches = [Path(match) for match in sorted(glob.glob(_pattern(path), recursive=True))]
            found = [
                image for match in matches for image in (_images_in(match, exclude) if match.is_dir() else [match])
            ]
            message = "no file matches this pattern"
        if not found:
            problems.append((item, message))
        for image in found:
            images.setdefault(real_path(image), image)
    return list(images.values()), problems


def _pattern(path: Path) -> str:
    """A glob pattern; the folders of it that are there are taken by name, brackets and all."""
    folder = next(parent for parent in path.parents if os.path.isdir(parent) or parent == path.parents[-1])
    return os.path.join(glob.escape(str(folder)), str(path.relative_to(folder)))


def _images_in(folder: Path, exclude: Path | None) -> list[Path]:
    excluded = real_path(exclude) if exclude else None
    found = []
    # Links to folders are followed, each folder once: a link may lead in a circle.
    seen = {os.path.realpath(folder)}
    for place, folders, names in os.walk(folder, followlinks=True):
        inner = [Path(place) / name for name in folders if not name.startswith(".")]
        inner = [path for path in inner if real_path(path) != excluded and not is_results_folder(path)]
        targets = {path.name: os.path.realpath(path) for path in inner}
        folders[:] = [name for name, target in targets.items() if target not in seen]
        seen |= set(targets.values())
        found += [Path(place) / name for name in names if not name.startswith(".")]
    return sorted(path for path in found if path.suffix.lower() in (*IMAGE_SUFFIXES, *SLIDE_SUFFIXES))


def is_results_folder(folder: Path) -> bool:
    """Whether `unihema predict` wrote it: its overlays and masks are no images to analyse."""
    return (folder / "results.json").is_file() and (folder / "records").is_dir()


def real_path(path: str | Path) -> Path:
    """An absolute path without links. A link in a circle stays: before Python 3.13 `Path.resolve` raises a `RuntimeError`."""
    return Path(os.path.realpath(path))


def open_image(image: str | Path | Image.Image | numpy.ndarray) -> OpenedImage:
    """Reads an image.

    Args:
        image (`str`, `Path`, `PIL.Image.Image` or `np.ndarray`): The image.

    Raises:
        UnreadableImageError: The image cannot be read.
    """
    opened, notes = read_image(image)
    if isinstance(image, (str, Path)):
        height, width = image_size(image)
        return OpenedImage(opened, width, height, str(image), tuple(notes))
    height, width = image_size(opened)
    return OpenedImage(opened, width, height, None, tuple(notes))


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal.

    Raises:
        InputError: Not a regular file: a pipe would be waited for, and a device has no end.
    """
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: not a regular file. Take it out.")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# The largest tokenizers have some 30 MB; every other file of a checkpoint or of results has a few.
MOST_JSON_BYTES = 64 << 20
SETTINGS_FILE = "settings.json"


def read_json_object(path: Path, error: type[UniHemaError], remedy: str, most: int = MOST_JSON_BYTES) -> dict[str, Any]:
    """A JSON file that holds an object.

    Args:
        path (`Path`): The file.
        error (`type[UniHemaError]`): Kind of the error.
        remedy (`str`): Last sentence of its message.
        most (`int`): Bytes that it may have.

    Raises:
        UniHemaError: It is missing, no regular file, larger than `most`, or holds anything else.
    """
    try:
        if path.exists() and not path.is_file():
            raise InputError("not a regular file")
        if path.stat().st_size > most:
            raise InputError(f"larger than {most >> 20} MB")
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise InputError("a dictionary is expected")
    except FileNotFoundError:
        raise error(f"{path}: no such file. {remedy}") from None
    except (OSError, ValueError, RecursionError) as problem:
        said = "nested too deeply" if isinstance(problem, RecursionError) else shortened(problem)
        raise error(f"{path}: not readable as JSON ({said}). {remedy}") from problem
    return values


def claim_folder(folder: Path, settings: Mapping[str, Any], made: Sequence[str] = (), overwrite: bool = False) -> None:
    """Writes what decides the contents of a folder, by which a later call knows whether it goes on with the same work.

    Args:
        folder (`Path`): The folder; made when missing.
        settings (`Mapping[str, Any]`): Everything that decides what is written there.
        made (`Sequence[str]`): Names of the results. `overwrite` deletes them; without settings beside them they are others'.
        overwrite (`bool`): Start anew.

    Raises:
        OutputError: The folder was written with other settings; the message names the first of them.
    """
    path = folder / SETTINGS_FILE
    now = json.loads(json.dumps(settings))
    remedy = "Name another folder, or start anew (--overwrite, or overwrite=True)."
    if overwrite:
        for name in made:
            remove_file(folder / name)
    elif path.exists():
        then = read_json_object(path, OutputError, remedy)
        other = next((name for name in {**then, **now} if then.get(name) != now.get(name)), None)
        if other is not None:
            values = (then.get(other), now.get(other))
            said = (
                "has changed"
                if any(isinstance(value, (dict, list)) for value in values)
                else "was {}, now it is {}".format(*(shortened(repr(value), 100) for value in values))
            )
            raise OutputError(f"{folder} holds results of other settings: {shortened(other, 100)} {said}. {remedy}")
    elif there := [name for name in made if (folder / name).exists()]:
        raise OutputError(f"{folder} holds {there[0]} of something else. {remedy}")
    write_text(path, [json.dumps(now, indent=2, ensure_ascii=False), "\n"])


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Writes a file beside its place and moves it there when it is complete.

    What a killed process left in the folder is removed by the next one on this machine that writes there.

    Args:
        path (`Path`): The file; its folder is made when missing.
        write (`Callable`): Gets the open binary file.

    Raises:
        OutputError: The file cannot be written; nothing is left of it, and what was there before is still there.
    """
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _clean(path.parent)
        prefix = f"{_PARTIAL}{os.getpid()}-"
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=prefix, suffix=".partial")
        try:
            with os.fdopen(descriptor, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def append_line(path: Path, value: Any) -> None:
    """Appends a value as a line of JSON that [`read_lines`] takes for whole only if all of it is there.

    Raises:
        OutputError: The file cannot be written.
    """
    line = json.dumps(value, ensure_ascii=False)
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with _writing(path), path.open("ab") as file:
        file.write(f"{_line_sum(line)} {line}\n".encode("utf-8", "surrogateescape"))
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path) -> Generator[Any, None, None]:
    """The values that [`append_line`] wrote, up to the first that is not whole; what a killed process left of that is cut off."""
    if not path.is_file():
        return
    whole = 0
    with path.open("rb") as file:
        for line in file:
            with suppress(ValueError):
                digest, _, text = line.decode("utf-8", "surrogateescape").partition(" ")
                if text.endswith("\n") and digest == _line_sum(text[:-1]):
                    yield json.loads(text)
                    whole += len(line)
                    continue
            break
    if whole < path.stat().st_size:
        with _writing(path):
            os.truncate(path, whole)


def _line_sum(line: str) -> str:
    return hashlib.sha256(line.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def write_text(path: str | Path, text: str | Iterable[str]) -> None:
    """Writes text, or its pieces one after another, atomically as UTF-8.

    What a file name that is not UTF-8 holds beside characters is written as `\\udcXX`, which JSON reads back as it was.
    """
    pieces = [text] if isinstance(text, str) else text
    encoded = (piece.encode("utf-8", "backslashreplace") for piece in pieces)
    write_atomically(Path(path), lambda file: file.writelines(encoded))


def write_json(path: str | Path, value: Any) -> None:
    """Writes indented JSON atomically; numbers that JSON does not know (NaN, infinity) become null."""
    write_text(path, json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def folder_sha256(folder: Path) -> str:
    """SHA-256 of what is in a folder, wherever it lies: names and sizes of its images, names and contents of its other files.

    Args:
        folder (`Path`): The folder.
    """
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        image = path.suffix.lower() in IMAGE_SUFFIXES
        said = path.stat().st_size if image else sha256(path)
        digest.update(os.fsencode(path.relative_to(folder)) + f"\0{said}\0".encode())
    return digest.hexdigest()


def json_sha256(value: Any) -> str:
    """SHA-256 of a value as JSON, in any order of its keys: tells one that was damaged, or changed by hand."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def plain(value: Any) -> Any:
    """`value` with every part turned into what JSON knows."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Path):
        return str(value)
    return value


def shortened(text: object, most: int = 300) -> str:
    """The beginning of a text of others, in one printable line.

    Args:
        text (`object`): The text, or an error that has one.
        most (`int`): Characters.
    """
    # Cut first: a text of gigabytes is not searched.
    line = " ".join(printable(each) for each in str(text)[: 4 * most].split())
    return line if len(line) <= most else f"{line[:most]}..."


@contextmanager
def scratch_folder(within: Path | None = None) -> Iterator[Path]:
    """A new folder for files that are being written by their path, which is gone afterwards.

    What killed processes left of theirs is removed by the next one on this machine.

    Args:
        within (`Path`, *optional*): Where, for files that are moved to their place when they are complete. The system's
            folder of temporary files by default.

    Raises:
        OutputError: The folder cannot be made.
    """
    place = Path(tempfile.gettempdir()) if within is None else within
    with _writing(place):
        place.mkdir(parents=True, exist_ok=True)
        _clean(place)
        folder = tempfile.mkdtemp(dir=place, prefix=f"{_PARTIAL}{os.getpid()}-", suffix=".partial")
        if within is not None:
            # Made for its owner's eyes only.
            os.chmod(folder, 0o777 & ~_umask())
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder to write into, which becomes `folder` when it is complete.

    It lies in `.NAME.partial` beside `folder`, with all that a killed run left there removed. Whether `folder` may be replaced
    is asked within, where no other run writes it; nothing replaces it if the new folder is deleted.

    Args:
        folder (`Path`): The folder; not there at the end, or empty. The folders above it are made when missing.

    Raises:
        OutputError: Another run is writing the same folder, which is named; or it cannot be written.
    """
    place = Path(os.path.abspath(folder))
    partial = place.parent / f".{place.name}.partial"
    whole = partial / (place.name or "root")
    with exclusive(partial, temporary=True):
        try:
            with _writing(folder):
                _empty(partial)
                whole.mkdir()
            yield whole
            with _writing(folder):
                if whole.is_dir():
                    if folder.is_dir():
                        folder.rmdir()
                    os.replace(whole, folder)
        finally:
            with suppress(OSError):
                _empty(partial)


@contextmanager
def exclusive(folder: Path, subfolders: Sequence[str] = (), temporary: bool = False) -> Iterator[None]:
    """Keeps other runs out of a folder, and removes what killed ones left of files they were writing.

    The system gives the lock back when a process ends, however it ends. Within a run it may be asked for again.

    Args:
        folder (`Path`): The folder that is written to; made when missing.
        subfolders (`Sequence[str]`): Its folders that are written to as well.
        temporary (`bool`): Remove the folder afterwards if nothing is in it, also when it was there before.

    Raises:
        OutputError: Another run is writing there, which is named; or the folder cannot be written.
    """
    from filelock import FileLock, Timeout

    # One lock a folder and process, so that a run within a run knows that it has it.
    lock, owner = FileLock(real_path(folder) / _LOCK, mode=0o666 & ~_umask(), is_singleton=True), folder / _OWNER
    if lock.is_locked:
        yield
        return
    made = temporary or not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise OutputError(
            f"{folder}: {_owner(owner)} is writing there. Wait for it or stop it, or name another folder."
        ) from None
    except NotImplementedError:
        warnings.warn(f"{folder}: this file system has no locks. Let only one run at a time write there.", stacklevel=3)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written ({error.strerror or error}).") from error
    try:
        for place in (folder, *(folder / name for name in subfolders)):
            _remove_partials(place, alone=True)
        run = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        write_text(owner, [json.dumps(run)])
        yield
    finally:
        with suppress(OSError):
            owner.unlink(missing_ok=True)
        with suppress(OSError):
            # Nothing was written, so the folder is not left behind either.
            if made and os.listdir(folder) == [_LOCK]:
                (folder / _LOCK).unlink()
                folder.rmdir()
        lock.release()
        if made and os.name == "nt":
            # There the lock's file cannot be deleted before, and is deleted with it.
            with suppress(OSError):
                folder.rmdir()


def contents(folder: Path) -> list[Path]:
    """What is in a folder, without the files by which [`exclusive`] keeps other runs out, and what these were writing."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".unihema"))


def empty_folder(folder: Path, last: Sequence[str] = ()) -> None:
    """Deletes what is in a folder. Nothing in it is ever half there.

    Args:
        folder (`Path`): The folder; it stays.
        last (`Sequence[str]`): What goes after all else: by these names it is known what the folder was.

    Raises:
        OutputError: Another run is writing there.
    """
    with exclusive(folder):
        for path in sorted(contents(folder), key=lambda path: path.name in last):
            remove_whole(path)


def remove_whole(path: Path) -> None:
    """Deletes a file or folder that nobody shall meet half deleted; what a killed process left of it, the next run removes.

    Args:
        path (`Path`): The file or folder.

    Raises:
        OutputError: It cannot be deleted.
    """
    with scratch_folder(path.parent) as scratch, _writing(path):
        os.replace(path, scratch / path.name)


def remove_file(path: Path) -> None:
    """Deletes a file, where there is one.

    Args:
        path (`Path`): The file.

    Raises:
        OutputError: It cannot be deleted, or is a folder.
    """
    with _writing(path):
        path.unlink(missing_ok=True)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Errors of the system as one that names what could not be written."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error}).") from error


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name not in (_LOCK, _OWNER):
            _delete(path)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _clean(folder: Path) -> None:
    """Removes, once for each folder, what killed processes were writing there."""
    place = os.path.abspath(folder)
    if place not in _cleaned:
        _cleaned.add(place)
        _remove_partials(folder)


def _remove_partials(folder: Path, alone: bool = False) -> None:
    """Removes what killed processes were writing; with `alone` also what seems to be written by others, who cannot be."""
    for partial in folder.glob(".unihema-*.partial"):
        process = re.fullmatch(rf"{re.escape(_PARTIAL)}(\d+)-\w+\.partial", partial.name)
        if alone or (process and not _is_running(int(process[1]))):
            with suppress(OSError):
                _delete(partial)


def _is_running(process: int) -> bool:
    # On Windows the question would end the process.
    if os.name == "nt":
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _owner(path: Path) -> str:
    """The run that holds a folder, in words."""
    # It writes down who it is right after it got the lock.
    for _ in range(20):
        with suppress(OSError, ValueError, KeyError, TypeError):
            run = json.loads(path.read_text(encoding="utf-8"))
            return f"another run (process {run['pid']} on {run['host']}, since {run['since']})"
        time.sleep(0.05)
    return "another run"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


__all__ = [
    "OpenedImage",
    "append_line",
    "claim_folder",
    "contents",
    "empty_folder",
    "exclusive",
    "find_images",
    "folder_sha256",
    "json_sha256",
    "open_image",
    "plain",
    "printable",
    "read_json_object",
    "read_lines",
    "real_path",
    "remove_file",
    "remove_whole",
    "scratch_folder",
    "sha256",
    "shortened",
    "whole_folder",
    "write_atomically",
    "write_json",
    "write_text",
]
