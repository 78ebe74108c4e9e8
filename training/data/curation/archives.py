"""Unpacking of untrusted archives: nothing outside the folder, no links or devices, bounded numbers and sizes."""

import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO

from unihema.errors import DatasetError
from unihema.files import shortened, whole_folder
from unihema.training.data.layouts.files import UnsafeNameError, inside
from unihema.training.data.rows import first_lines


ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
OTHER_ARCHIVES = (".rar", ".7z")
UNPACK_YOURSELF = "If you trust it, unpack it yourself and give the folder."
_MEGABYTE = 1 << 20
_EXTENDED_HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


class ArchiveError(DatasetError):
    """An archive that is damaged, unsafe or larger than allowed; the message names the members."""


@dataclass
class ArchiveLimits:
    """How much an archive may unpack to, archives inside it included.

    Args:
        files (`int`): Files and folders.
        bytes (`int`): All files together.
        file_bytes (`int`): One file.
        ratio (`int`): Unpacked bytes for each byte of the archive; looked at above 1 GB.
        depth (`int`): Archives within archives.
    """

    files: int = 2_000_000
    bytes: int = 500 << 30
    file_bytes: int = 50 << 30
    ratio: int = 200
    depth: int = 2


@dataclass
class _Member:
    name: str
    folder: bool
    size: int
    # Why it is refused, whatever its name.
    refusal: str | None
    open: Callable[[], IO[bytes]]


@dataclass
class _Budget:
    """What is left of the limits."""

    limits: ArchiveLimits
    archive_bytes: int
    files: int = 0
    bytes: int = 0
    names: set[str] = field(default_factory=set)

    def count_file(self, path: Path) -> None:
        self.files += 1
        if self.files > self.limits.files:
            raise ArchiveError(f"{path}: more than {self.limits.files} files. {UNPACK_YOURSELF}")

    def count_bytes(self, path: Path, name: str, added: int, of_file: int) -> None:
        self.bytes += added
        if of_file > self.limits.file_bytes:
            raise ArchiveError(f"{path}: {name} is larger than {self.limits.file_bytes} bytes. {UNPACK_YOURSELF}")
        if self.bytes > self.limits.bytes:
            raise ArchiveError(f"{path}: unpacks to more than {self.limits.bytes} bytes. {UNPACK_YOURSELF}")
        if self.bytes > 1 << 30 and self.bytes > self.limits.ratio * self.archive_bytes:
            raise ArchiveError(f"{path}: unpacks to more than {self.limits.ratio} times its size, as no images do.")


def is_archive(path: Path) -> bool:
    """Whether a file name is that of an archive that can be unpacked."""
    return path.name.lower().endswith(ARCHIVE_SUFFIXES)


def unsafe_members(path: Path, limits: ArchiveLimits | None = None) -> list[str]:
    """What is wrong with an archive, without unpacking it; archives inside it are not looked into.

    Args:
        path (`Path`): The archive.
        limits (`ArchiveLimits`, *optional*): Compared with the sizes the archive claims.

    Returns:
        `list[str]`: One message for each member that leads out of the folder, is a link or a device, is encrypted or occurs
            twice; empty when it may be unpacked.

    Raises:
        ArchiveError: Not an archive, damaged, or beyond the limits.
    """
    return _read_members(path, None, _budget(path, limits))


def unpack(
    path: Path, into: Path, limits: ArchiveLimits | None = None, report: Callable[[int], object] | None = None
) -> Path:
    """Unpacks an archive, and archives inside it. The folder appears when everything is written.

    Args:
        path (`Path`): A zip or tar file.
        into (`Path`): The folder; must not be there.
        limits (`ArchiveLimits`, *optional*): How much it may unpack to.
        report (`Callable`, *optional*): Gets the number of bytes written since its last call.

    Returns:
        `Path`: `into`.

    Raises:
        ArchiveError: Not an archive, damaged, unsafe (every such member is named) or beyond the limits.
        DatasetError: `into` is there already.
    """
    with whole_folder(into) as whole:
        if into.exists():
            raise DatasetError(f"{into}: is there already. Choose a new folder or delete it.")
        try:
            budget = _budget(path, limits)
            _unpack_one(path, whole, budget, report)
            _unpack_inner(whole, budget, report)
        except ArchiveError as error:
            # The folder is deleted, so the message names the archive.
            raise ArchiveError(str(error).replace(str(whole), str(path))) from error
    return into


def _unpack_inner(folder: Path, budget: _Budget, report: Callable[[int], object] | None) -> None:
    for _ in range(budget.limits.depth):
        inner = sorted(path for path in folder.rglob("*") if path.is_file() and is_archive(path))
        for archive in inner:
            suffix = next(suffix for suffix in ARCHIVE_SUFFIXES if archive.name.lower().endswith(suffix))
            target = archive.with_name(archive.name[: -len(suffix)] or "archive")
            if target.exists():
                target = archive.with_name(f"{archive.name}.unpacked")
            target.mkdir()
            budget.names = set()
            _unpack_one(archive, target, budget, report)
            archive.unlink()
        if not inner:
            break


def _unpack_one(path: Path, into: Path, budget: _Budget, report: Callable[[int], object] | None) -> None:
    problems = _read_members(path, into, budget, report)
    if problems:
        number = "1 unsafe member" if len(problems) == 1 else f"{len(problems)} unsafe members"
        raise ArchiveError(f"{path}: {number}, so nothing was unpacked:\n{first_lines(problems)}")


def _read_members(
    path: Path, into: Path | None, budget: _Budget, report: Callable[[int], object] | None = None
) -> list[str]:
    """What is wrong with each member; as long as nothing is, they are written into a folder, if one is given."""
    problems: list[str] = []
    with _reading(path):
        for member in _members(path):
            budget.count_file(path)
            name, problem = _target(path, member, budget)
            if problem:
                problems.append(problem)
            elif into is None:
                budget.count_bytes(path, member.name, member.size, member.size)
            elif problems:
                # The rest is only looked at, to name all that is wrong.
                continue
            elif member.folder:
                (into / name).mkdir(parents=True, exist_ok=True)
            else:
                _write(path, member, into / name, budget, report)
    return problems


def _budget(path: Path, limits: ArchiveLimits | None) -> _Budget:
    return _Budget(limits or ArchiveLimits(), path.stat().st_size if path.is_file() else 0)


def _write(path: Path, member: _Member, target: Path, budget: _Budget, report: Callable[[int], object] | None) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with member.open() as source, target.open("xb") as file:
        while block := source.read(_MEGABYTE):
            written += len(block)
            # What is counted is what comes out: sizes in the archive may lie.
            budget.count_bytes(path, member.name, len(block), written)
            file.write(block)
            if report:
                report(len(block))


def _target(path: Path, member: _Member, budget: _Budget) -> tuple[str, str | None]:
    """Where a member goes, and what is wrong with it."""
    if member.folder and PurePosixPath(member.name.replace("\\", "/")) == PurePosixPath("."):
        return ".", None
    try:
        name = inside(member.name)
    except UnsafeNameError as error:
        return "", f"{path}: {error}."
    if member.refusal:
        return name, f"{path}: {member.refusal}."
    if not member.folder:
        if name in budget.names:
            return name, f"{path}: {member.name} occurs twice."
        budget.names.add(name)
    return name, None


def _members(path: Path) -> Iterator[_Member]:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                yield _Member(
                    info.orig_filename,
                    info.is_dir(),
                    info.file_size,
                    _zip_refusal(info),
                    lambda info=info: archive.open(info),
                )
        return
    with tarfile.open(path, "r:*", tarinfo=_BoundedTarInfo) as archive:
        while (info := archive.next()) is not None:
            yield _Member(
                info.name,
                info.isdir(),
                info.size,
                _tar_refusal(info),
                lambda info=info: archive.extractfile(info),
            )
            # tarfile keeps every member it has met.
            archive.members.clear()


def _zip_refusal(info: zipfile.ZipInfo) -> str | None:
    mode = info.external_attr >> 16
    if stat.S_ISLNK(mode):
        return f"{info.filename!r} is a symbolic link"
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        return f"{info.filename!r} is a device or pipe"
    return f"{info.filename!r} is encrypted" if info.flag_bits & 1 else None


def _tar_refusal(info: tarfile.TarInfo) -> str | None:
    # Not `tarfile.data_filter`, which Python 3.11.2, that of Debian 12, has not; where a member lies is checked for every kind of
    # archive, and nothing but its content is taken.
    if info.issym() or info.islnk():
        return f"{info.name!r} is a link to {info.linkname!r}"
    return None if info.isreg() or info.isdir() else f"{info.name!r} is a special file"


class _BoundedTarInfo(tarfile.TarInfo):
    """Refuses extended headers of absurd size, which tarfile would read into memory."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        info = super().frombuf(buf, encoding, errors)
        if info.type in _EXTENDED_HEADERS and info.size > _MEGABYTE:
            raise ArchiveError(f"a header of {info.size} bytes")
        return info


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What goes wrong in an archive is an [`ArchiveError`] with its name."""
    if not path.is_file():
        raise ArchiveError(f"{path}: no such file.")
    if path.name.lower().endswith(OTHER_ARCHIVES):
        raise ArchiveError(f"{path}: {path.suffix} archives are not read. {UNPACK_YOURSELF}")
    try:
        yield
    except ArchiveError as error:
        raise error if str(path) in str(error) else ArchiveError(f"{path}: {error}.") from error
    except tarfile.ReadError as error:
        raise ArchiveError(
            f"{path}: not a zip or tar archive, or a damaged one ({shortened(error)}). Download it again."
        ) from error
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise ArchiveError(f"{path}: damaged ({shortened(error)}). Download it again.") from error
    except OSError as error:
        raise ArchiveError(f"{path}: cannot be unpacked ({shortened(error)}).") from error
