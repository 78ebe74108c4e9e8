"""Which classes are kinds of which: a neutrophil is a white cell."""

from collections.abc import Mapping, Sequence

from unihema.training.data.label_names import spelling_key


# Nucleated red cells, stages of a parasite (the box may be that of the red cell it is in), debris and cells of no known
# kind have no parent: a wrong one would teach a class its opposite.
_PARENTS = {
    "band neutrophil": "neutrophil",
    "segmented neutrophil": "neutrophil",
    "myeloblast": "blast",
    "lymphoblast": "blast",
    "monoblast": "blast",
    "blast no lineage": "blast",
    "abnormal promyelocyte": "promyelocyte",
    "abnormal eosinophil": "eosinophil",
    "sickle cell": "rbc",
    "concentrated leishman parasite": "parasite",
    "leishman parasite": "parasite",
    "giant thrombocyte": "platelet",
}
_WHITE_CELLS = (
    "neutrophil",
    "eosinophil",
    "basophil",
    "lymphocyte",
    "monocyte",
    "blast",
    "promyelocyte",
    "myelocyte",
    "metamyelocyte",
    "immature granulocyte",
    "promonocyte",
    "prolymphocyte",
    "immature lymphocyte",
    "atypical lymphocyte",
    "lymphocyte variant",
    "plasma cell",
    "hairy cell",
    "faggot cell",
)


def known_parents(names: Sequence[str]) -> dict[str, str]:
    """The closest coarser class in the list of each class that has one.

    Args:
        names (`Sequence[str]`): Detection classes, in any spelling.

    Returns:
        `dict[str, str]`: Class -> its parent, both as they are spelled in `names`.
    """
    parents = {spelling_key(child): spelling_key(parent) for child, parent in _PARENTS.items()}
    parents |= {spelling_key(name): spelling_key("wbc") for name in _WHITE_CELLS}
    listed = {spelling_key(name): name for name in reversed(names)}
    found = {}
    for name in names:
        parent = parents.get(spelling_key(name))
        while parent is not None and parent not in listed:
            parent = parents.get(parent)
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
