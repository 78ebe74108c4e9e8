"""Parts of a small data set that take turns as validation data."""

from collections.abc import Mapping, Sequence

import numpy as np

from unihema.errors import DatasetError, InputError
from unihema.training.data.rows import GROUP_KEYS, Row


def fold_rows(
    rows_by_task: Mapping[str, Sequence[Row]], folds: int, fold: int, seed: int, held_out: bool
) -> dict[str, list[Row]]:
    """One side of one fold. What comes from one patient, slide or source image, where the rows say so, stays together, and
    so do all rows of an image, of every task.

    Args:
        rows_by_task (`Mapping[str, Sequence[Row]]`): Task -> rows.
        folds (`int`): Number of parts, at least 2.
        fold (`int`): Which of them is held out, from 0.
        seed (`int`): Of the division.
        held_out (`bool`): Give the rows held out rather than the others.

    Raises:
        DatasetError: Fewer groups than folds.
        ValueError: There is no such fold.
    """
    if folds < 2 or not 0 <= fold < folds:
        raise InputError(f"Fold {fold} of {folds}: there must be at least 2, counted from 0.")
    groups = sorted({_group(row) for rows in rows_by_task.values() for row in rows})
    if len(groups) < folds:
        raise DatasetError(
            f"{len(groups)} images (or patients, or slides) cannot be divided into {folds} folds; ask for fewer."
        )
    order = np.random.default_rng(seed).permutation(len(groups))
    chosen = {groups[position] for position in order[fold::folds]}
    parts = {task: [row for row in rows if (_group(row) in chosen) == held_out] for task, rows in rows_by_task.items()}
    return {task: rows for task, rows in parts.items() if rows}


def _group(row: Row) -> str:
    for kind in GROUP_KEYS:
        if row.get(kind):
            return f"{kind} {row['dataset']} {row[kind]}"
    return f"image {row['image'] if isinstance(row['image'], str) else id(row['image'])}"


__all__ = ["fold_rows"]
