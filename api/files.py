"""Files: finding and opening images, hashing, and writing so that nothing is ever half there."""

import glob
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy
from PIL import Image

from unihema.errors import OutputError

from .processing_unihema.image_io import IMAGE_SUFFIXES, image_size, load_image


class OpenedImage(NamedTuple):
    """An image that was read.

    Args:
        pixels (`PIL.Image.Image`): RGB, perhaps reduced.
        width (`int`): Of the file.
        height (`int`): Of the file.
        name (`str`, *optional*): Its path, where it came from one.
    """

    pixels: Image.Image
    width: int
    height: int
    name: str | None


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
        if path.is_dir():
            found, message = _images_in(path, exclude), "no image in this folder or its subfolders"
        elif path.exists() or not glob.has_magic(item):
            found, message = [path] if path.exists() else [], "no such file or folder"
        else:
            matches = [Path(match) for match in sorted(glob.glob(item, recursive=True))]
            found = [
                image for match in matches for image in (_images_in(match, exclude) if match.is_dir() else [match])
            ]
            message = "no file matches this pattern"
        if not found:
            problems.append((item, message))
        for image in found:
            images.setdefault(image.resolve(), image)
    return list(images.values()), problems


def _images_in(folder: Path, exclude: Path | None) -> list[Path]:
    excluded = exclude.resolve() if exclude else None
    found = []
    # Links to folders are followed, each folder once: a link may lead in a circle.
    seen = {os.path.realpath(folder)}
    for place, folders, names in os.walk(folder, followlinks=True):
        inner = [Path(place) / name for name in folders if not name.startswith(".")]
        inner = [path for path in inner if path.resolve() != excluded and not is_results_folder(path)]
        targets = {path.name: os.path.realpath(path) for path in inner}
        folders[:] = [name for name, target in targets.items() if target not in seen]
        seen |= set(targets.values())
        found += [Path(place) / name for name in names if not name.startswith(".")]
    return sorted(path for path in found if path.suffix.lower() in IMAGE_SUFFIXES)


def is_results_folder(folder: Path) -> bool:
    """Whether `unihema predict` wrote it: its overlays and masks are no images to analyse."""
    return (folder / "results.json").is_file() and (folder / "records").is_dir()


def open_image(image: str | Path | Image.Image | numpy.ndarray) -> OpenedImage:
    """Reads an image.

    Args:
        image (`str`, `Path`, `PIL.Image.Image` or `np.ndarray`): The image.

    Raises:
        UnreadableImageError: The image cannot be read.
    """
    opened = load_image(image)
    if isinstance(image, (str, Path)):
        height, width = image_size(image)
        return OpenedImage(opened, width, height, str(image))
    height, width = image_size(opened)
    return OpenedImage(opened, width, height, None)


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Writes a file beside its place and moves it there when it is complete.

    Args:
        path (`Path`): The file; its folder is made when missing.
        write (`Callable`): Gets the open binary file.

    Raises:
        OutputError: The file cannot be written; nothing is left of it, and what was there before is still there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".partial")
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
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error}).") from error


def write_text(path: Path, lines: Iterable[str]) -> None:
    """Writes text atomically, piece by piece, as UTF-8."""
    write_atomically(path, lambda file: file.writelines(line.encode("utf-8") for line in lines))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


__all__ = ["OpenedImage", "find_images", "open_image", "sha256", "write_atomically", "write_text"]
