"""Classes of data sets: one name for a class that is spelled in several ways, and which classes are kinds of which."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cache

from unihema.official.labels import OFFICIAL_CELLS, OFFICIAL_CLASSES
from unihema.processing_unihema.class_names import STANDARD_PARENTS, short_name, usual_name
from unihema.training.data.rows import Row, witnesses


OFFICIAL_NAMES = {
    # Logit 0 of the official detector was never used.
    "detection": tuple(name for name in OFFICIAL_CLASSES if name != "unused"),
    "single_cell": tuple(OFFICIAL_CELLS),
}


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


def label_map(names: Iterable[str], task: str) -> dict[str, str]:
    """Class names of a data set -> official names, for those that have one; see [`official_name`]."""
    found = {name: official_name(name, task) for name in names}
    return {name: official for name, official in found.items() if official is not None}


def unify_names(rows_by_task: Mapping[str, Sequence[Row]]) -> dict[str, list[Row]]:
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
        for name in dict.fromkeys(name for row in witnesses(rows) for name in row_names(row)):
            spellings.setdefault(usual_name(name), []).append(name)
        new_names = {}
        for key, names in spellings.items():
            if len(names) > 1:
                chosen = _official_by_key(task).get(key, names[0])
                new_names |= {name: chosen for name in names if name != chosen}
        unified[task] = rename_rows(rows, new_names)
    return unified


def as_known(rows: Sequence[Row], known: Sequence[str]) -> list[Row]:
    """Rows of one task with the names that a model has: a name it does not know becomes the known one spelled otherwise.

    Args:
        rows (`Sequence[Row]`): Rows of one task.
        known (`Sequence[str]`): The model's classes or labels.

    Returns:
        `list[Row]`: The same; rows with another name are copies. Names without a counterpart stay.
    """
    plain = {short_name(name): name for name in reversed(known)}
    by_key = {usual_name(name): name for name in reversed(known)}
    names = dict.fromkeys(name for row in witnesses(rows) for name in row_names(row))
    found = {name: plain.get(short_name(name)) or by_key.get(usual_name(name)) for name in names if name not in known}
    return rename_rows(rows, {name: other for name, other in found.items() if other is not None})


def row_names(row: Row) -> list[str]:
    """Class names that a row has or whose annotation it declares."""
    if row.get("task") == "single_cell":
        return [row["label"]] if isinstance(row.get("label"), str) else []
    objects = row.get("objects") or {}
    return [*(row.get("annotated_classes") or ()), *objects.get("category", ())]


def rename_rows(rows: Sequence[Row], names: Mapping[str, str]) -> list[Row]:
    """Rows with some classes renamed: copies of those that have them, the others themselves."""
    if hasattr(rows, "renamed"):
        return rows.renamed(names) if names else rows
    if not names:
        return list(rows)
    return [_renamed(row, names) if any(name in names for name in row_names(row)) else row for row in rows]


def known_parents(names: Sequence[str]) -> dict[str, str]:
    """The closest coarser class in the list of each class that has one, by the usual names of `class_names.py`.

    Nucleated red cells, stages of a parasite (the box may be that of the red cell it is in), debris and cells of no known
    kind have no parent: a wrong one would teach a class its opposite.

    Args:
        names (`Sequence[str]`): Detection classes, in any spelling.

    Returns:
        `dict[str, str]`: Class -> its parent, both as they are spelled in `names`.
    """
    listed = {usual_name(name): name for name in reversed(names)}
    found = {}
    for name in names:
        parent = STANDARD_PARENTS.get(usual_name(name))
        while parent is not None and parent not in listed:
            parent = STANDARD_PARENTS.get(parent)
        if parent is not None:
            found[name] = listed[parent]
    return found


def with_covered_parents(annotated: Sequence[str], parents: Mapping[str, str]) -> list[str]:
    """The classes that a data set annotates, and the coarser ones that it thereby boxes as well.

    A set that boxes the types of white cells boxes white cells: what it leaves without a box is none. With one type only,
    nobody knows; so a coarser class counts from two of its kinds on, and half of them.

    Args:
        annotated (`Sequence[str]`): Classes that the set annotates.
        parents (`Mapping[str, str]`): Class -> its parent, of all the model's classes.

    Returns:
        `list[str]`: `annotated`, and behind them those parents.
    """
    found = list(annotated)
    # A parent that is covered may complete its own parent: from the finest up.
    for _ in range(len(parents)):
        kinds: dict[str, list[bool]] = {}
        for child, parent in parents.items():
            kinds.setdefault(parent, []).append(child in found)
        new = [p for p, has in kinds.items() if p not in found and sum(has) >= 2 and 2 * sum(has) >= len(has)]
        if not new:
            break
        found += new
    return found


def _renamed(row: Row, names: Mapping[str, str]) -> Row:
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
