"""Classes and differential of a sample, as the page shows them."""

from collections.abc import Mapping
from typing import Any

from unihema.report.sample import sample_figures

from ..processing_unihema.class_names import (
    MEGAKARYOCYTE,
    NUCLEATED_RED_CELL,
    PLATELET,
    RED_CELL,
    SMUDGE_CELL,
    WHITE_CELL,
    cell_kind,
)
from .state import ReviewedSample


# In this order the page shows kinds of cells, those that a person looks at first before the others.
_KINDS = (WHITE_CELL, NUCLEATED_RED_CELL, SMUDGE_CELL, MEGAKARYOCYTE, None, PLATELET, RED_CELL)


def class_rows(sample: ReviewedSample, counts: Mapping[str, int]) -> list[dict[str, Any]]:
    """The classes of a sample, white cells first: `name`, `count`, `kind` and `key`, the key that moves a cell to it.

    Args:
        sample ([`ReviewedSample`]): The sample.
        counts (`Mapping[str, int]`): Its cells of each class.
    """
    parents = sample.class_parents
    kinds = {name: cell_kind(name, parents) for name in counts}
    keys = class_keys(list(counts))
    # The sort is stable: within a kind classes keep the order of the checkpoint.
    names = sorted(counts, key=lambda name: _KINDS.index(kinds[name]))
    return [{"name": name, "count": counts[name], "kind": kinds[name], "key": keys.get(name)} for name in names]


def class_keys(names: list[str]) -> dict[str, str]:
    """A key for each class: the first letter of its name that is free, else a free digit or letter; none for the 37th class."""
    keys: dict[str, str] = {}
    free = [*"abcdefghijklmnopqrstuvwxyz", *"1234567890"]
    for name in names:
        own = [letter for letter in name.lower() if letter in free]
        key = next(iter(own or free[::-1]), None)
        if key is not None:
            keys[name] = key
            free.remove(key)
    return keys


def differential_rows(sample: ReviewedSample, counts: Mapping[str, int]) -> dict[str, Any]:
    """The differential of a sample as its report has it, see [`sample_figures`]: `total` white cells, `rows` that the report
    shows, `beside` what is counted beside them, and `notes`.

    Args:
        sample ([`ReviewedSample`]): The sample.
        counts (`Mapping[str, int]`): Its cells of each class.
    """
    reported, opened = sample.reported(counts)
    figures = sample_figures(reported, sample.class_parents)
    white = figures["white_cells"]
    rows = [row for row in white["rows"] if not row["hidden"]]
    beside = [row for row in figures["beside"] if row["count"]]
    return {"total": white["total"], "rows": rows, "beside": beside, "notes": figures["notes"] + opened}


__all__ = ["class_keys", "class_rows", "differential_rows"]
