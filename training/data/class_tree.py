"""Which classes are kinds of which: a neutrophil is a white cell."""

from collections.abc import Mapping, Sequence

from unihema.processing_unihema.class_names import STANDARD_PARENTS, usual_name


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
