"""Decoded images in files, so that each is decoded once a run: shared by all processes, and mapped into memory when read."""

import hashlib
import logging
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL

from unihema.errors import OutputError
from unihema.files import write_atomically


logger = logging.getLogger(__name__)

# Names the layout of an entry. What decoding or reducing gives changes with it, and with the release of Pillow.
FORMAT = f"unihema-pixels-1, Pillow {PIL.__version__}"
# Before the pixels: their height and width, and those that the image was opened with.
_HEADER = struct.Struct("<8sIIII")
_MAGIC = b"UHPIXELS"


class ImageCache:
    """Pixels of images by the path, size and time of change of their files, so that none is ever stale.

    Each entry is a file of its own, whole or absent however a run ends; a run that goes on finds what the one before it kept.

    Args:
        folder (`str` or `Path`): Where the entries are. Made when there is something to keep.
        limit (`float`): Bytes of all entries, at most half of what is free on the disk.
        writers (`int`): Processes that keep images here. Each has an equal part of what is left of the limit.
    """

    def __init__(self, folder: str | Path, limit: float, writers: int = 1):
        self.folder = Path(folder)
        used = sum(entry.stat().st_size for entry in os.scandir(self.folder)) if self.folder.is_dir() else 0
        place = next((parent for parent in self.folder.absolute().parents if parent.is_dir()), Path())
        self.room = max(0.0, min(limit - used, shutil.disk_usage(place).free / 2)) / max(1, writers)

    def load(
        self, path: str, rule: str, decode: Callable[[], tuple[np.ndarray, tuple[int, int]]]
    ) -> tuple[np.ndarray, tuple[int, int]]:
        """The pixels of an image file, kept or decoded now.

        Args:
            path (`str`): The file.
            rule (`str`): All else that decides the pixels.
            decode (`Callable`): Gives uint8 `[3, H, W]`, and height and width that the image was opened with.

        Returns:
            `tuple[np.ndarray, tuple[int, int]]`: What `decode` gives, as an array of its own.
        """
        try:
            state = os.stat(path)
        except OSError:
            # Whoever decodes says what is wrong with it.
            return decode()
        key = repr((FORMAT, os.path.abspath(path), state.st_size, state.st_mtime_ns, rule))
        entry = self.folder / hashlib.sha256(os.fsencode(key)).hexdigest()[:40]
        kept = _read(entry)
        if kept is not None:
            return kept
        pixels, opened = decode()
        needed = pixels.nbytes + _HEADER.size
        if needed <= self.room:
            header = _HEADER.pack(_MAGIC, *pixels.shape[1:], *opened)
            try:
                write_atomically(entry, lambda file: file.writelines((header, pixels.data)))
                self.room -= needed
            except OutputError as error:
                # Training needs no cache.
                logger.warning("%s No more images are kept.", error)
                self.room = 0
        return pixels, opened

    def clear(self) -> None:
        """Deletes all entries."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _read(entry: Path) -> tuple[np.ndarray, tuple[int, int]] | None:
    """What an entry holds; `None` without one, or with one that something else has damaged."""
    try:
        content = np.memmap(entry, np.uint8, "r")
        magic, height, width, *opened = _HEADER.unpack(content[: _HEADER.size].tobytes())
    except (OSError, ValueError, struct.error):
        return None
    if magic != _MAGIC or len(content) != _HEADER.size + 3 * height * width:
        return None
    return np.array(content[_HEADER.size :]).reshape(3, height, width), (opened[0], opened[1])
