"""Finding the image that an annotation of a foreign data set names, wherever its authors put it."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath

from unihema.errors import DatasetError
from unihema.processing_unihema.image_io import IMAGE_SUFFIXES
from unihema.training.data.layouts.annotation_files import checked_name


BESIDE = ("", "images", "JPEGImages", "../images", "../JPEGImages")


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
