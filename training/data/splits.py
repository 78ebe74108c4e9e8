"""Splits of data: their names, drawing them, cross-validation folds, and the images that stay together in one."""

import math
import re
import zlib
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from unihema.errors import DatasetError, InputError, RunConfigError
from unihema.files import shortened
from unihema.training.data.rows import GROUP_KEYS, PROVENANCE_KEYS, Row, image_key


SPLITS = ("train", "val", "test")
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}


def split_in_path(file_name: str) -> str | None:
    """The split that a folder in a relative path names; None when none does."""
    for part in PurePosixPath(file_name).parts[:-1]:
        if part.lower() in SPLIT_NAMES:
            return SPLIT_NAMES[part.lower()]
    return None


def split_in_name(file_name: str) -> str | None:
    """The split that the stem of an annotation file names as a word of its own, as in `attributes_val.csv`."""
    words = PurePosixPath(file_name).stem.lower().replace("-", "_").replace(".", "_").split("_")
    found = [SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES]
    return found[0] if len(found) == 1 else None


def draw_split(row: Row, val_share: float) -> str:
    """Draws `train` or `val` for a row, always the same one.

    All rows of a patient, else of a slide, else of a field fall into one split. Without these, the bytes of the image decide:
    a photograph falls into the same split in every data set that has it.

    Raises:
        DatasetError: The image cannot be read.
    """
    group = next((f"{key}:{row[key]}".encode() for key in GROUP_KEYS if row.get(key)), None)
    number = _crc32(row["image"]) if group is None else zlib.crc32(group)
    return "val" if number < val_share * 2**32 else "train"


def _crc32(path: str) -> int:
    number = 0
    try:
        with Path(path).open("rb") as file:
            while block := file.read(1 << 20):
                number = zlib.crc32(block, number)
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({shortened(error)}).") from error
    return number


def check_val_share(val_share: float) -> None:
    """Checks the share of a validation split.

    Raises:
        DatasetError: Not in 0..1, or 1.
    """
    if not 0 <= val_share < 1:
        raise DatasetError(f"A validation share of {val_share} must be 0 or more and below 1, such as 0.1.")


def by_split(rows: Sequence[Row], val_share: float) -> dict[str, list[Row]]:
    """Rows by split. The key `split` of a row is removed; rows without one are drawn into `train` and `val`.

    Without a validation split, one is drawn from the training rows. `test` stays `test`.

    Raises:
        DatasetError: An image that cannot be read.
    """
    named = {row["split"] for row in rows if row.get("split")}
    sorted_rows: dict[str, list[Row]] = {}
    for row in rows:
        split = row.get("split")
        if split is None or (split == "train" and "val" not in named):
            split = draw_split(row, val_share)
        sorted_rows.setdefault(split, []).append({key: value for key, value in row.items() if key != "split"})
    return {split: sorted_rows[split] for split in SPLITS if split in sorted_rows}


def compile_patterns(patterns: Mapping[str, str]) -> dict[str, re.Pattern]:
    """Regular expressions whose first group is an identifier in a file name.

    Args:
        patterns (`Mapping[str, str]`): `patient`, `slide` or `source_image` -> expression.

    Raises:
        DatasetError: Another key, a broken expression, or one without a group.
    """
    compiled = {}
    for group, pattern in patterns.items():
        if group not in GROUP_KEYS:
            raise DatasetError(f"Unknown group '{group}'; groups are {', '.join(GROUP_KEYS)}.")
        try:
            compiled[group] = re.compile(pattern)
        except re.error as error:
            raise DatasetError(f"{group} pattern {pattern!r} is no regular expression ({shortened(error)}).") from error
        if compiled[group].groups < 1:
            raise DatasetError(f"{group} pattern {pattern!r} needs brackets around the identifier, such as '-(\\d+)_'.")
    return compiled


def groups_of(row: Row, patterns: Mapping[str, re.Pattern]) -> dict[str, str]:
    """Patient, slide and field of a row: as stated, or else as the patterns find them in its file name."""
    groups = {group: str(row[group]) for group in GROUP_KEYS if row.get(group)}
    for group, pattern in patterns.items():
        found = pattern.search(PurePosixPath(row["file_name"]).name)
        if found and found.group(1):
            groups.setdefault(group, found.group(1))
    return groups


def fold_rows(
    rows_by_task: Mapping[str, Sequence[Row]], folds: int, fold: int, seed: int, held_out: bool
) -> dict[str, list[Row]]:
    """The training rows of one cross-validation fold, or those it holds out.

    Rows of one patient, slide or source image stay together, and so do all rows of an image, of every task. Parts have about
    as many images each; those that a large patient or slide makes larger come last.

    Args:
        rows_by_task (`Mapping[str, Sequence[Row]]`): Task -> rows.
        folds (`int`): Number of parts, at least 2.
        fold (`int`): Which of them is held out, from 0.
        seed (`int`): Of the division.
        held_out (`bool`): Return the rows that are held out instead of the others.

    Raises:
        DatasetError: Fewer groups than folds.
        ValueError: There is no such fold.
    """
    if folds < 2 or not 0 <= fold < folds:
        raise InputError(f"Fold {fold} of {folds}: there must be at least 2, counted from 0.")
    everything = [row for rows in rows_by_task.values() for row in rows]
    # What one task's rows say of an image holds for those of another.
    known = {image_key(row): _group(row) for row in everything if any(row.get(kind) for kind in GROUP_KEYS)}
    sizes = dict(Counter(group for group, _ in {(_group(row, known), image_key(row)) for row in everything}))
    groups = sorted(sizes)
    if len(groups) < folds:
        raise DatasetError(
            f"{len(groups)} images (or patients, or slides) cannot be divided into {folds} folds; ask for fewer, "
            "or make a val split."
        )
    divided: list[list[str]] = [[] for _ in range(folds)]
    images = [0] * folds
    order = np.random.default_rng(seed).permutation(len(groups))
    for group in sorted((groups[position] for position in order), key=lambda group: -sizes[group]):
        smallest = images.index(min(images))
        divided[smallest].append(group)
        images[smallest] += sizes[group]
    share = math.ceil(sum(images) / folds)
    chosen = set(divided[sorted(range(folds), key=lambda part: images[part] > share)[fold]])
    parts = {
        task: [row for row in rows if (_group(row, known) in chosen) == held_out] for task, rows in rows_by_task.items()
    }
    return {task: rows for task, rows in parts.items() if rows}


def image_groups(rows: Iterable[Row]) -> dict[str, int]:
    """Images of each patient, slide or source image; an image without these is a group of its own.

    Args:
        rows (`Iterable[Row]`): Of any tasks.
    """
    return dict(Counter(group for group, _ in {(_group(row), image_key(row)) for row in rows}))


def _group(row: Row, known: Mapping[Hashable, str] | None = None) -> str:
    if known and image_key(row) in known:
        return known[image_key(row)]
    for kind in GROUP_KEYS:
        if row.get(kind):
            return f"{kind} {row['dataset']} {row[kind]}"
    return f"image {image_key(row)}"


def is_held_out(row: Row, hold_out: Mapping[str, Sequence[str]]) -> bool:
    """Whether a row belongs to a patient, slide, field or microscope that a run must not see.

    Args:
        row (`Row`): A schema row, see rows.py.
        hold_out (`Mapping[str, Sequence[str]]`): `patient`, `slide`, `source_image` or `origin` -> those held out.

    Raises:
        RunConfigError: Another kind of group.
    """
    for group, names in hold_out.items():
        if group not in PROVENANCE_KEYS:
            raise RunConfigError(f"data.hold_out: unknown group '{group}'; groups are {', '.join(PROVENANCE_KEYS)}.")
        if str(row.get(group)) in names:
            return True
    return False
