"""Classes of data sets: one name for a class that is spelled in several ways, and which classes are kinds of which."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache

from unihema.errors import RunConfigError
from unihema.modeling_unihema.configuration_unihema import ancestors
from unihema.official.labels import OFFICIAL_CELLS, OFFICIAL_CLASSES
from unihema.processing_unihema.class_names import (
    RED_CELL_SHAPES,
    STANDARD_PARENTS,
    UNINFECTED,
    short_name,
    usual_name,
)
from unihema.training.data.rows import Row, witnesses


OFFICIAL_NAMES = {
    # Logit 0 of the official detector was never used.
    "detection": tuple(name for name in OFFICIAL_CLASSES if name != "unused"),
    "single_cell": tuple(OFFICIAL_CELLS),
}

# How groups of single cells are spelled.
GROUP_NAMES = {"rbc": "RBC", "wbc": "WBC", "platelet": "Platelets"}
# What sets of red-cell shapes call the rest. Elsewhere these words say nothing about the kind of cell.
_BESIDE_SHAPES = ("normal", "normal cell", "uncategorised", "uncategorized")
# Labels of whole fields, which are no cells.
_FIELDS = ("all benign", "all early", "all pre", "all pro")
# Of single cells every label has its kind: a crop has one label, so unlike a box it cannot be left out.
_SINGLE_CELL_PARENTS = (
    STANDARD_PARENTS
    | dict.fromkeys(map(usual_name, RED_CELL_SHAPES), UNINFECTED)
    | {"sickle cell": UNINFECTED}
    | dict.fromkeys(_FIELDS, "field")
)


def official_name(name: str, task: str) -> str | None:
    """The official name of which a class name is another spelling.

    Spellings are compared by `short_name`. Synonyms stay apart, since the official lists have some of them as separate classes.

    Args:
        name (`str`): As a data set has it.
        task (`str`): `detection` or `single_cell`; other tasks have no list.

    Returns:
        `str` or `None`: None without such an official name.
    """
    return _spellings(task).get(short_name(name))


def label_map(names: Iterable[str], task: str) -> dict[str, str]:
    """Class names of a data set -> official names, for those that have one; see [`official_name`]."""
    found = {name: official_name(name, task) for name in names}
    return {name: official for name, official in found.items() if official is not None}


def unify_names(rows_by_task: Mapping[str, Sequence[Row]]) -> dict[str, list[Row]]:
    """Rows in which each class has one name, however the data sets spell it.

    A class with several spellings gets its official name, or else the spelling that comes first. Other classes keep their name.

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
    """Rows of one task in a model's spelling of the class names.

    Args:
        rows (`Sequence[Row]`): Rows of one task.
        known (`Sequence[str]`): The model's classes or labels.

    Returns:
        `list[Row]`: The same; rows with another name are copies. Names that the model does not have stay.
    """
    plain = {short_name(name): name for name in reversed(known)}
    by_key = {usual_name(name): name for name in reversed(known)}
    names = dict.fromkeys(name for row in witnesses(rows) for name in row_names(row))
    found = {name: plain.get(short_name(name)) or by_key.get(usual_name(name)) for name in names if name not in known}
    return rename_rows(rows, {name: other for name, other in found.items() if other is not None})


def row_names(row: Row) -> list[str]:
    """Class names of a row: of its label or objects, and of `annotated_classes`."""
    if row.get("task") == "single_cell":
        return [row["label"]] if isinstance(row.get("label"), str) else []
    objects = row.get("objects") or {}
    return [*(row.get("annotated_classes") or ()), *objects.get("category", ())]


def rename_rows(rows: Sequence[Row], names: Mapping[str, str]) -> list[Row]:
    """Rows with some classes renamed; rows with such a class are copied, the others are not."""
    if hasattr(rows, "renamed"):
        return rows.renamed(names) if names else rows
    if not names:
        return list(rows)
    return [_renamed(row, names) if any(name in names for name in row_names(row)) else row for row in rows]


def known_parents(names: Sequence[str]) -> dict[str, str]:
    """For each class, its closest coarser class among `names`.

    Nucleated red cells, shapes of red cells, debris and unknown cells have no parent: a wrong one would teach the opposite.
    Stages of malaria are those of an infected red cell, which is what thin smears have a box for; for thick films, whose boxes
    are of the parasite alone, `data.label_parents` says otherwise.

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


def class_parents(names: Sequence[str], stated: Mapping[str, str] | None = None) -> dict[str, str]:
    """The hierarchy of detection classes, as stated or as known.

    Args:
        names (`Sequence[str]`): The classes.
        stated (`Mapping[str, str]`, *optional*): `data.label_parents`: class -> coarser class.

    Raises:
        RunConfigError: It gives a parent to a class that is not among them.
    """
    if stated is None:
        return known_parents(names)
    if unknown := [name for name in stated if name not in names]:
        raise RunConfigError(
            f"data.label_parents: no class '{unknown[0]}'; the model's classes are {', '.join(names)}."
        )
    return dict(stated)


def single_cell_tree(
    names: Sequence[str], parents: Mapping[str, str] | None = None, keep: Collection[str] = ()
) -> tuple[list[str], dict[str, str]]:
    """Classes and groups of single cells.

    A label of which the data have at least two kinds is a group, and no class: a cell labelled `WBC` is one of the white cells.

    Args:
        names (`Sequence[str]`): Labels of the data, and of the model, in any spelling.
        parents (`Mapping[str, str]`, *optional*): Label or group -> group; what is known when not given.
        keep (`Collection[str]`): Labels that stay classes, such as those of a checkpoint.

    Returns:
        `tuple[list[str], dict[str, str]]`: The classes; and class or group -> group, as `UniHemaConfig.single_cell_labels` and
        `single_cell_parents` take them.
    """
    if parents is None:
        shapes = set(map(usual_name, names)) & set(map(usual_name, RED_CELL_SHAPES))
        table = _SINGLE_CELL_PARENTS | (dict.fromkeys(_BESIDE_SHAPES, UNINFECTED) if len(shapes) > 1 else {})
        spelled = dict(GROUP_NAMES)
    else:
        table = {usual_name(name): usual_name(group) for name, group in parents.items()}
        spelled = {usual_name(group): group for group in parents.values()}
    kinds = Counter(group for key in {*map(usual_name, names)} for group in ancestors(key, table))
    classes = [name for name in names if name in keep or kinds[usual_name(name)] < 2]
    spelled |= {usual_name(name): name for name in reversed(classes)}
    found: dict[str, str] = {}
    for name in classes:
        for group in ancestors(usual_name(name), table):
            found[name] = spelled.get(group, group)
            name = found[name]
    return classes, found


def with_covered_parents(annotated: Sequence[str], parents: Mapping[str, str]) -> list[str]:
    """The classes that a data set annotates, and the coarser classes that they cover.

    A set that boxes the types of white cells has boxed the white cells: what has no box is not one. A single type does not show
    that. So a coarser class is covered by at least two of its kinds, and at least half of them. Kinds of a kind that is not
    listed show nothing: who boxes the stages of malaria has boxed the infected red cells, and not all red cells.

    Args:
        annotated (`Sequence[str]`): Classes that the set annotates.
        parents (`Mapping[str, str]`): Class -> its parent, of all the model's classes.

    Returns:
        `list[str]`: `annotated`, followed by the covered parents.
    """
    found = list(annotated)
    # A covered parent may complete its own parent.
    for _ in range(len(parents)):
        kinds: dict[str, list[bool]] = {}
        for child, parent in parents.items():
            if usual_name(STANDARD_PARENTS.get(usual_name(child), parent)) == usual_name(parent):
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
    for key in ("annotated_classes", "exact_classes"):
        if row.get(key) is not None:
            row[key] = list(dict.fromkeys(names.get(name, name) for name in row[key]))
    return row


@cache
def _official_by_key(task: str) -> dict[str, str]:
    # Of two official words for the same cell the first is taken.
    return {usual_name(name): name for name in reversed(OFFICIAL_NAMES.get(task, ()))}


@cache
def _spellings(task: str) -> dict[str, str]:
    return {short_name(name): name for name in OFFICIAL_NAMES.get(task, ())}
