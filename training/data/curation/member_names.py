"""Names of files inside a data set or an archive: relative, and never leading out of it."""

import posixpath
import re

from unihema.errors import InputError


_DRIVE = re.compile(r"^[A-Za-z]:")


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
