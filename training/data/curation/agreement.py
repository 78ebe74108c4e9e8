"""Inter-annotator agreement: two experts on one set of smears, or two data sets that share photographs."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unihema.errors import DatasetError
from unihema.training.data.class_tree import rename_rows, unify_names
from unihema.training.data.curation.duplicates import SIMILARITY, fingerprint, near_pairs, upright_similarity
from unihema.training.data.readers import load_folder, splits_of
from unihema.training.data.rows import Row
from unihema.training.metrics.morphology import match_cells


@dataclass
class ClassAgreement:
    """Agreement on one class, in the photographs that both annotate.

    Args:
        first (`int`): Boxes of the first.
        second (`int`): Boxes of the second.
        both (`int`): Pairs of a box of each that overlap by half of their union or more; a box is in one pair.
        f1 (`float`): 2 both / (first + second), the F1 of either with the other as the truth.
        count_difference (`float`, *optional*): Median over photographs of |second - first| / first; None where the first
            has no such cell.
        photographs (`int`): Where the first has such a cell.
    """

    first: int
    second: int
    both: int
    f1: float
    count_difference: float | None
    photographs: int


@dataclass
class Agreement:
    """What [`annotation_agreement`] found.

    Args:
        photographs (`int`): That both annotate.
        classes (`dict[str, ClassAgreement]`): For each class that both know.
    """

    photographs: int
    classes: dict[str, ClassAgreement]

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)


def annotation_agreement(
    first: str | Path,
    second: str | Path,
    rename: Mapping[str, str] | None = None,
    min_similarity: float = SIMILARITY,
    progress: bool = False,
) -> Agreement:
    """Compares the boxes of two data folders on the photographs that are in both, in any split, whatever their file names.

    Args:
        first, second (`str` or `Path`): Data folders with boxes.
        rename (`Mapping[str, str]`, *optional*): Classes to rename in either; spellings of one class are one in any case.
        min_similarity (`float`): See [`near_pairs`].
        progress (`bool`): Show bars.

    Returns:
        [`Agreement`].

    Raises:
        DatasetError: A folder without boxes, no photograph or no class in both, or an image that cannot be read.
    """
    sides = [rename_rows(_detections(folder), rename or {}) for folder in (first, second)]
    together = unify_names({"detection": [*sides[0], *sides[1]]})["detection"]
    sides = [together[: len(sides[0])], together[len(sides[0]) :]]
    names = [
        {name for row in side for name in row["annotated_classes"] or row["objects"]["category"]} for side in sides
    ]
    shared = sorted(names[0] & names[1])
    if not shared:
        listed = " and ".join(", ".join(sorted(of_side)) for of_side in names)
        raise DatasetError(f"{first} and {second} have no class in common ({listed}): rename one (--rename).")
    pairs = _same_photographs(*sides, min_similarity, progress)
    if not pairs:
        raise DatasetError(f"No photograph of {first} is in {second}, upright and uncropped: nothing to compare.")
    return Agreement(len(pairs), {name: _of_class(name, pairs) for name in shared})


def _detections(folder: str | Path) -> list[Row]:
    rows = []
    for split in splits_of(Path(folder)):
        rows += load_folder(folder, split, tasks=["detection"]).get("detection", ())
    if not rows:
        raise DatasetError(
            f"{folder}: no data folder with boxes. `unihema data prepare` makes one of a downloaded set."
        )
    return rows


def _same_photographs(
    first: Sequence[Row], second: Sequence[Row], min_similarity: float, progress: bool
) -> list[tuple[Row, Row, float]]:
    """Pairs of rows of one photograph, and the scale from the second image to the first. A row is in one pair; the most similar
    are paired first."""
    from tqdm.auto import tqdm

    rows = tqdm([*first, *second], desc="images", unit="image", disable=not progress, leave=False)
    prints = [fingerprint(row["image"]) for row in rows]
    found = []
    for one, other, _ in near_pairs(prints, min_similarity=min_similarity):
        if not one < len(first) <= other:
            continue
        # Turned and mirrored copies have other boxes.
        similarity = upright_similarity(prints[one], prints[other])
        (width, height), (other_width, other_height) = prints[one].size, prints[other].size
        if (
            similarity >= min_similarity
            and abs(width * other_height - height * other_width) <= 0.01 * width * other_height
        ):
            found.append((similarity, one, other - len(first), width / other_width))
    pairs, used = [], (set(), set())
    for _, one, other, scale in sorted(found, reverse=True):
        if one not in used[0] and other not in used[1]:
            used[0].add(one)
            used[1].add(other)
            pairs.append((first[one], second[other], scale))
    return pairs


def _of_class(name: str, pairs: Sequence[tuple[Row, Row, float]]) -> ClassAgreement:
    counts, both = [], 0
    for one, other, scale in pairs:
        boxes, others = _boxes(one, name), _boxes(other, name) * scale
        counts.append((len(boxes), len(others)))
        both += len(match_cells(boxes, others, np.zeros((len(boxes), len(others))))[0])
    of_first, of_second = np.sum(counts, axis=0).tolist()
    differences = [abs(second - first) / first for first, second in counts if first]
    return ClassAgreement(
        of_first,
        of_second,
        both,
        f1=2 * both / (of_first + of_second) if of_first + of_second else 0.0,
        count_difference=float(np.median(differences)) if differences else None,
        photographs=len(differences),
    )


def _boxes(row: Row, name: str) -> np.ndarray:
    """Boxes of a class, xyxy `[n, 4]`."""
    objects = row["objects"]
    boxes = [box for box, category in zip(objects["bbox"], objects["category"], strict=True) if category == name]
    boxes = np.asarray(boxes, float).reshape(-1, 4)
    return np.concatenate((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), 1)


__all__ = ["Agreement", "ClassAgreement", "annotation_agreement"]
