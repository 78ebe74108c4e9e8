"""Which image belongs to which sample."""

import csv
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from unihema.errors import InputError, RequestError, printable
from unihema.files import shortened
from unihema.result_folder import StoredResult


COLUMNS = ("image", "sample")
MOST_TABLE_BYTES = 64 << 20


def sample_of(stored: StoredResult, folder: Path, by: str | None, table: Mapping[str, str] | None = None) -> str:
    """The sample that an image belongs to.

    Args:
        stored ([`StoredResult`]): The image.
        folder (`Path`): Its results folder.
        by (`str`, *optional*): `image` (each is one), `folder` (that in which the image lies), a table (see [`read_samples`]), or
            a regular expression with one group, which is looked for in its path. All images are one sample when missing.
        table (`Mapping[str, str]`, *optional*): What [`read_samples`] read of `by`.

    Raises:
        RequestError: The expression is none, or does not fit; the table has no such image.
    """
    if by is None:
        return printable(folder.absolute().name) or "sample"
    if by == "image":
        return printable(stored.name)
    place = place_of(stored)
    if by == "folder":
        return printable(place.parent.name)
    if table is not None:
        keys = (*_keys(place), *_keys(stored.source), stored.name)
        name = next((table[key] for key in keys if key in table), None)
        if name is None:
            raise RequestError(f"--sample-by {shortened(by, 100)}: it has no line for {place}.")
        return printable(name)
    try:
        found = re.search(by, place.as_posix())
        name = found and found[1]
    except (re.error, IndexError) as error:
        raise RequestError(
            f"--sample-by {shortened(by, 100)}: no regular expression with one group ({error})."
        ) from error
    if not name:
        raise RequestError(f"--sample-by {shortened(by, 100)}: not found in {place}.")
    return printable(name)


def place_of(stored: StoredResult) -> Path:
    """Where an image lies as it was given: what links lead to may be a store of all samples."""
    given = Path(stored.result.image or "")
    if given.is_absolute():
        return Path(os.path.normpath(given))
    # Of a name alone the folder is not known but by the file that it was.
    linked = len(given.parts) > 1 and stored.source.parts[-len(given.parts) :] != given.parts
    return given if linked else stored.source


def _keys(place: Path) -> tuple[str, str, str]:
    return str(place), place.as_posix(), place.name


def check_samples(images: Iterable[StoredResult], by: str | None, table: Mapping[str, str] | None = None) -> None:
    """Checks that images of several samples would not be taken for one, see [`sample_of`].

    Args:
        images (`Iterable[StoredResult]`): All images.
        by, table: As there.

    Raises:
        RequestError: Two folders of one name, or two images of which the table has the name alone.
    """
    places: dict[str, Path] = {}
    for each in images:
        source = place_of(each)
        by_path = {*_keys(source)[:2], *_keys(each.source)[:2]} & (table or {}).keys()
        if table is not None and source.name in table and not by_path:
            name, place, remedy = source.name, source, "Write their paths into the table."
        elif by == "folder":
            name, place = source.parent.name, source.parent
            remedy = r"Give a regular expression that tells them apart, such as '([^/]+/[^/]+)/[^/]+$'."
        else:
            continue
        other = places.setdefault(name, place)
        if other != place:
            raise RequestError(
                f"--sample-by {shortened(by or '', 100)}: {other} and {place} have the same name. {remedy}"
            )


def read_samples(by: str | None) -> dict[str, str] | None:
    """Image -> sample, of a CSV file with the columns `image` (path, or name of the file) and `sample`.

    Args:
        by (`str`, *optional*): The file; `None` is returned for what does not end with `.csv`.

    Raises:
        InputError: It cannot be read, or lacks a column or a value.
    """
    if by is None or not by.lower().endswith(".csv"):
        return None
    path, found = Path(by), {}
    try:
        if path.stat().st_size > MOST_TABLE_BYTES:
            raise InputError(f"{path}: larger than {MOST_TABLE_BYTES >> 20} MB.")
        with path.open(encoding="utf-8-sig", newline="") as lines:
            rows = csv.DictReader(lines, strict=True)
            missing = [name for name in COLUMNS if name not in (rows.fieldnames or ())]
            if missing:
                raise InputError(
                    f"{path}: no column {missing[0]!r}. Its first line names the columns image and sample."
                )
            for number, row in enumerate(rows, 2):
                if not row["image"] or not row["sample"]:
                    raise InputError(f"{path}, line {number}: an image and its sample are needed.")
                if found.setdefault(row["image"], row["sample"]) != row["sample"]:
                    raise InputError(f"{path}, line {number}: {shortened(row['image'], 100)} belongs to two samples.")
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a CSV file in UTF-8 ({error}).") from error
    return found


__all__ = ["check_samples", "read_samples", "sample_of"]
