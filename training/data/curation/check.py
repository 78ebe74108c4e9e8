"""Checks of data folders before training: bad rows, duplicate photographs, patients in two splits, classes, licences."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from unihema.errors import DatasetError
from unihema.files import real_path
from unihema.training.data.curation.archives import ArchiveError, is_archive, unsafe_members
from unihema.training.data.curation.duplicates import (
    HASH_DISTANCE,
    SIMILARITY,
    CheckedImage,
    Repeat,
    find_repeats,
    fingerprint,
)
from unihema.training.data.curation.licences import MixLicence, mix_licence
from unihema.training.data.readers import (
    LAYOUTS,
    folder_licence,
    read_folder,
    read_foreign,
    recognise_foreign,
    splits_of,
)
from unihema.training.data.rows import BadRows, Row
from unihema.training.data.shards import INDEX_FILE, StoredFile
from unihema.training.data.splits import SPLITS, compile_patterns, groups_of
from unihema.training.data.verify import verify_rows


UNSPLIT = "all"


@dataclass
class SharedGroup:
    """A patient, slide or field with images in more than one split.

    Args:
        dataset (`str`): The data set.
        group (`str`): `patient`, `slide` or `source_image`.
        identifier (`str`): Which one.
        images (`dict[str, int]`): Split -> number of its images there.
    """

    dataset: str
    group: str
    identifier: str
    images: dict[str, int]


@dataclass
class CheckReport:
    """What [`check_data`] found.

    Args:
        counts (`dict`): Data set -> split -> task -> `rows` and, where there are any, `classes` with their numbers.
        bad_rows (`list[str]`): Rows and files that cannot be used, each with its file and its line or entry; the same at
            which a training run would stop.
        notes (`list[str]`): What is read otherwise than it stands, such as two entries of one image merged.
        repeats (`list[Repeat]`): Photographs that are there more than once.
        shared_groups (`list[SharedGroup]`): Patients, slides and fields in more than one split.
        unsafe_archives (`dict[str, list[str]]`): Archive -> what is wrong with it.
        licence (`MixLicence`): Of all data sets together.
    """

    counts: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    bad_rows: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    repeats: list[Repeat] = field(default_factory=list)
    shared_groups: list[SharedGroup] = field(default_factory=list)
    unsafe_archives: dict[str, list[str]] = field(default_factory=dict)
    licence: MixLicence = field(default_factory=MixLicence)

    @property
    def clean(self) -> bool:
        """Whether nothing has to be corrected."""
        return not (self.bad_rows or self.repeats or self.shared_groups or any(self.unsafe_archives.values()))

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON takes it."""
        return {"clean": self.clean} | asdict(self)


def check_data(
    paths: Sequence[str | Path],
    *,
    licences: Mapping[str, str] | None = None,
    patterns: Mapping[str, str] | None = None,
    near: bool = True,
    max_distance: int = HASH_DISTANCE,
    min_similarity: float = SIMILARITY,
    progress: bool = False,
) -> CheckReport:
    """Checks data folders together, and archives without unpacking them.

    Args:
        paths (`Sequence[str | Path]`): Data folders in any layout that is read, and zip or tar files.
        licences (`Mapping[str, str]`, *optional*): Data set -> licence, over what the folder declares.
        patterns (`Mapping[str, str]`, *optional*): `patient`, `slide` or `source_image` -> regular expression whose first
            group is its identifier in a file name, for data sets that give none otherwise.
        near (`bool`): Also look for the same photograph re-encoded, scaled, mirrored or turned.
        max_distance (`int`): See [`near_pairs`].
        min_similarity (`float`): See [`near_pairs`].
        progress (`bool`): Show bars.

    Returns:
        [`CheckReport`].

    Raises:
        DatasetError: No such path, a folder without data, an unknown data set in `licences`, a wrong pattern or similarity.
    """
    if not 0 < min_similarity <= 1:
        raise DatasetError(f"A similarity of {min_similarity} must be above 0 and at most 1.")
    compiled = compile_patterns(patterns or {})
    report = CheckReport()
    images: dict[str, CheckedImage] = {}
    declared: dict[str, str] = {}
    folders = [Path(path).expanduser() for path in paths]
    if not folders:
        raise DatasetError("Nothing to check: name data folders or archives.")
    bad = BadRows()
    for folder, dataset in zip(folders, _distinct_names(folders)):
        if folder.is_file() and is_archive(folder):
            report.unsafe_archives[str(folder)] = _archive_problems(folder)
            continue
        if not folder.is_dir():
            raise DatasetError(f"{folder}: neither a data folder nor a zip or tar file.")
        declared[dataset] = folder_licence(folder)
        report.counts[dataset] = {}
        found = _rows_by_split(folder, dataset, bad)
        for split, rows in found.items():
            report.counts[dataset][split] = _count(rows)
        for split, rows in verify_rows(found, bad, progress=progress).items():
            _collect(images, rows, dataset, split, compiled, bad)
    report.licence = mix_licence(_with_given(declared, licences or {}))
    _fingerprint(images, bad, progress)
    report.bad_rows, report.notes = list(dict.fromkeys(bad.messages)), bad.notes
    report.shared_groups = _shared_groups(images.values())
    report.repeats = find_repeats(list(images.values()), near, max_distance, min_similarity, progress)
    return report


def _archive_problems(path: Path) -> list[str]:
    try:
        return unsafe_members(path)
    except ArchiveError as error:
        return [str(error)]


def _distinct_names(folders: Sequence[Path]) -> list[str]:
    names = [real_path(folder).name for folder in folders]
    return [name if names.count(name) == 1 else str(folder) for name, folder in zip(names, folders)]


def _rows_by_split(folder: Path, dataset: str, bad: BadRows) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    splits = splits_of(folder)
    for split in splits:
        with bad.collecting():
            rows = read_folder(folder, split, bad)
            found[split] = [row for task_rows in rows.values() for row in task_rows]
    for split in SPLITS:
        if (folder / split / INDEX_FILE).is_file():
            with bad.collecting():
                found[split] = _stored(read_folder(folder, split, bad), bad)
    if not splits and not found:
        if recognise_foreign(folder) is None:
            raise DatasetError(f"{folder}: no known layout, so nothing to check.\n{LAYOUTS}")
        with bad.collecting():
            for row in read_foreign(folder, dataset, bad):
                found.setdefault(row.get("split") or UNSPLIT, []).append(row)
    return found


def _stored(rows_by_task: Mapping[str, Sequence[Row]], bad: BadRows) -> list[Row]:
    """The rows of shards, each image and mask of which was read."""
    good = []
    for rows in rows_by_task.values():
        for row in rows:
            with bad.collecting():
                for file in (row["image"], row.get("mask")):
                    if isinstance(file, StoredFile):
                        file.check()
                good.append(row)
    bad.note("Shards are not searched for photographs that are there twice: check the folder that they are made from.")
    return good


def _count(rows: Sequence[Row]) -> dict[str, Any]:
    counts: dict[str, Any] = {}
    classes: dict[str, Counter] = {}
    for row in rows:
        task = counts.setdefault(row["task"], {"rows": 0})
        task["rows"] += 1
        names = row["objects"]["category"] if row["task"] == "detection" else [row["label"]] if "label" in row else []
        classes.setdefault(row["task"], Counter()).update(names)
        for name in row.get("annotated_classes") or ():
            classes[row["task"]].setdefault(name, 0)
    for task, counter in classes.items():
        if counter:
            counts[task]["classes"] = dict(counter.most_common())
    return counts


def _collect(
    images: dict[str, CheckedImage],
    rows: Sequence[Row],
    dataset: str,
    split: str,
    patterns: Mapping[str, re.Pattern],
    bad: BadRows,
) -> None:
    for row in rows:
        if isinstance(row["image"], StoredFile):
            continue
        path = str(real_path(row["image"]))
        image = images.setdefault(path, CheckedImage(dataset, split, row["file_name"], row["image"]))
        if image.place != f"{dataset}/{split}" and image.dataset == dataset:
            # One file, so not one of several that are the same photograph.
            with bad.collecting():
                raise DatasetError(f"{row['image']}: listed in {image.split} and in {split}. Take it out of one.")
        image.tasks.add(row["task"])
        image.groups |= groups_of(row, patterns)


def _fingerprint(images: dict[str, CheckedImage], bad: BadRows, progress: bool) -> None:
    from tqdm.auto import tqdm

    for image in tqdm(images.values(), desc="images", unit="image", disable=not progress):
        with bad.collecting():
            image.fingerprint = fingerprint(image.path)


def _shared_groups(images: Iterable[CheckedImage]) -> list[SharedGroup]:
    members: dict[tuple[str, str, str], Counter] = {}
    for image in images:
        for group, identifier in image.groups.items():
            members.setdefault((image.dataset, group, identifier), Counter())[image.split] += 1
    return [
        SharedGroup(dataset, group, identifier, dict(splits))
        for (dataset, group, identifier), splits in sorted(members.items())
        if len(splits) > 1
    ]


def _with_given(declared: Mapping[str, str], given: Mapping[str, str]) -> dict[str, str]:
    for dataset in given:
        if dataset not in declared:
            raise DatasetError(
                f"Licence for '{dataset}', which is not checked; the data sets are {', '.join(declared)}."
            )
    return {**declared, **given}
