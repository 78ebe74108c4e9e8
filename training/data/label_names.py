"""Class names of data sets: the 29 + 45 names of the official model, and one name for a class spelled in several ways."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from unihema.official.labels import OFFICIAL_CELLS, OFFICIAL_CLASSES
from unihema.processing_unihema.class_names import short_name, usual_name


# Logit 0 of the official detector was never used.
DETECTION_NAMES = tuple(name for name in OFFICIAL_CLASSES if name != "unused")
OFFICIAL_NAMES = {"detection": DETECTION_NAMES, "single_cell": tuple(OFFICIAL_CELLS)}


def official_name(name: str, task: str) -> str | None:
    """The official name that a class name is another spelling of; see `short_name`.

    The official lists have some words for the same cell as classes of their own, and these are kept apart.

    Args:
        name (`str`): As a data set has it.
        task (`str`): `detection` or `single_cell`; other tasks have no list.

    Returns:
        `str` or `None`: None where no official name is spelled like it.
    """
    return _spellings(task).get(short_name(name))


def label_map(names: Iterable[str], task: str, known: Mapping[str, str] | None = None) -> dict[str, str]:
    """Class names -> official names, for those that have one.

    Args:
        names (`Iterable[str]`): As a data set has them.
        task (`str`): `detection` or `single_cell`.
        known (`Mapping[str, str]`, *optional*): The data set's own map, which comes first.
    """
    known = known or {}
    found = {name: known.get(name) or official_name(name, task) for name in names}
    return {name: official for name, official in found.items() if official is not None}


def unify_names(rows_by_task: Mapping[str, Sequence[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Rows in which a class that is spelled in several ways has one name, so that it is learned once.

    That is the official name, else the spelling that comes first. A class that all rows spell alike keeps its name.

    Args:
        rows_by_task (`Mapping[str, Sequence[Row]]`): Task -> rows of all data sets (see rows.py).

    Returns:
        `dict[str, list[Row]]`: The same; rows with another name are copies.
    """
    unified = {}
    for task, rows in rows_by_task.items():
        spellings: dict[str, list[str]] = {}
        for name in dict.fromkeys(name for row in _witnesses(rows) for name in row_names(row)):
            spellings.setdefault(usual_name(name), []).append(name)
        new_names = {}
        for key, names in spellings.items():
            if len(names) > 1:
                chosen = _official_by_key(task).get(key, names[0])
                new_names |= {name: chosen for name in names if name != chosen}
        unified[task] = rename_rows(rows, new_names)
    return unified


def as_known(rows: Sequence[dict[str, Any]], known: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of one task with the names that a model has: a name it does not know becomes the known one spelled otherwise.

    Args:
        rows (`Sequence[Row]`): Rows of one task.
        known (`Sequence[str]`): The model's classes or labels.

    Returns:
        `list[Row]`: The same; rows with another name are copies. Names without a counterpart stay.
    """
    plain = {short_name(name): name for name in reversed(known)}
    by_key = {usual_name(name): name for name in reversed(known)}
    names = dict.fromkeys(name for row in _witnesses(rows) for name in row_names(row))
    found = {name: plain.get(short_name(name)) or by_key.get(usual_name(name)) for name in names if name not in known}
    return rename_rows(rows, {name: other for name, other in found.items() if other is not None})


def row_names(row: Mapping[str, Any]) -> list[str]:
    """Class names that a row has or whose annotation it declares."""
    if row.get("task") == "single_cell":
        return [row["label"]] if isinstance(row.get("label"), str) else []
    objects = row.get("objects") or {}
    return [*(row.get("annotated_classes") or ()), *objects.get("category", ())]


def rename_rows(rows: Sequence[dict[str, Any]], names: Mapping[str, str]) -> list[dict[str, Any]]:
    """Rows with some classes renamed: copies of those that have them, the others themselves."""
    if hasattr(rows, "renamed"):
        return rows.renamed(names) if names else rows
    if not names:
        return list(rows)
    return [_renamed(row, names) if any(name in names for name in row_names(row)) else row for row in rows]


def _witnesses(rows: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    # Rows that are not in memory say which names occur (`LazyRows`, which imports this file).
    return getattr(rows, "witnesses", rows)


def _renamed(row: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    if row.get("task") == "single_cell":
        return row | {"label": names.get(row["label"], row["label"])}
    objects = row["objects"]
    row = row | {"objects": {**objects, "category": [names.get(name, name) for name in objects["category"]]}}
    if row.get("annotated_classes") is not None:
        row["annotated_classes"] = list(dict.fromkeys(names.get(name, name) for name in row["annotated_classes"]))
    return row


@cache
def _official_by_key(task: str) -> dict[str, str]:
    # Of two official words for the same cell the first is taken.
    return {usual_name(name): name for name in reversed(OFFICIAL_NAMES.get(task, ()))}


@cache
def _spellings(task: str) -> dict[str, str]:
    return {short_name(name): name for name in OFFICIAL_NAMES.get(task, ())}
