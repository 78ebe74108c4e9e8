"""Answers that can be checked: the cells that a question is about, counts of them, and where text and heads disagree."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from scipy.special import betaincinv

from unihema.modeling_unihema.configuration_unihema import ancestors

from .class_names import (
    INFECTED,
    MEGAKARYOCYTE,
    NUCLEATED_RED_CELL,
    PLATELET,
    RED_CELL,
    SMUDGE_CELL,
    WHITE_CELL,
    cell_kind,
    has_nucleus,
    is_infected,
    is_untyped_white_cell,
    is_white_cell,
    plain_name,
    usual_name,
)


# Share of samples whose limits hold the true share.
LEVEL = 0.95
TEXT, CELLS = "text", "cells"
CANNOT_KNOW = "cannot know"
# The largest nucleated cell of a picture of one cell covers at least this share of it.
_ONE_CELL = 0.1

# Words at the end of a question that say nothing of which cells are meant.
_SAYS_NOTHING = re.compile(
    r"there|here|present|visible|shown|seen|found|counted|detected|in|on|within|of|the|this|these|an?|image|picture|photo(?:graph)?"
    r"|field|smear|slide|view|film|sample|frame|total|all|altogether|do|does|did|can|could|be|been|are|is|were|was|have|has|had"
    r"|you|we|i|one|see|count|find|detect|show|contain|please"
)
# Red cells are infected by nothing else that is known of here.
_BY_PARASITES = re.compile(r"(?<=infected) (?:with|by) (?:malaria|(?:malarial? )?parasites?)$")
_HOW_MANY = (
    re.compile(r"how many of (?:the |all )?(?P<whole>.+?) (?:are|is|were) (?P<what>.+)$"),
    re.compile(r"how many (?P<whole>.+?) (?:are|is|were) (?P<what>.+)$"),
    re.compile(r"how many (?:of )?(?P<what>.+)$"),
)
_ANY = (
    re.compile(r"(?:is|are) there (?:any |an? |some )?(?P<what>.+)$"),
    re.compile(r"(?:is|are) any (?P<what>.+)$"),
)
_SHARE = r"(?:per ?cent(?:age)?|%|proportion|share|fraction)"
_PER_CENT = (
    re.compile(rf"what (?:is the )?{_SHARE} of (?:the |all )?(?P<whole>.+?) (?:are|is) (?P<what>.+)$"),
    re.compile(rf"what (?:is the )?{_SHARE} of (?P<what>.+?)(?: (?:among|of|in) (?:the |all )?(?P<whole>.+))?$"),
    re.compile(rf"what {_SHARE} (?:are|is) (?P<what>.+)$"),
)
# What each of these asks.
_QUESTIONS = {"many": _HOW_MANY, "any": _ANY, "share": _PER_CENT}
_KINDS = {"wbc": WHITE_CELL, "rbc": RED_CELL, "platelet": PLATELET, "smudge cell": SMUDGE_CELL, "smudge": SMUDGE_CELL}
_KINDS |= dict.fromkeys(("nrbc", "nucleated red cell", "nucleated red blood cell", "nucleated rbc"), NUCLEATED_RED_CELL)
_KINDS["megakaryocyte"] = MEGAKARYOCYTE
_SPELLINGS = {"color": "colour", "nuclear": "nucleus", "nuclei": "nucleus"}
_OF_ANY_QUESTION = {"cell", "type"}
_SAME_VALUE = {"nil": "no"}
# Words of the longest class names that are looked for in a text.
_LONGEST_NAME = 5


@dataclass(frozen=True)
class Answer:
    """An answer and what supports it.

    Args:
        question (`str`): The question.
        answer (`str`): The answer.
        source (`str`): `cells`: counted among the cells that were found; `text`: written by the text decoder.
        cells (`list[dict]`): The cells that it is about: `label`, `score`, `box` in pixels, and where there are any `id`,
            `probability`, `odd` and `attributes`.
        counts (`dict[str, int]`): How many cells of each class these are.
        attributes (`dict[str, dict]`): Attributes that a question of one cell names -> `{"value", "score"}` of that cell.
        single_cell (`dict`, *optional*): `label` and `score` of the classifier of single cells, where the picture shows one.
        text (`str`, *optional*): What the text decoder said, where it was asked.
        disagreement (`str`, *optional*): Where text and heads say different things.
        note (`str`, *optional*): What a reader must know: classes that the checkpoint lacks, cells of no sure type.
    """

    question: str
    answer: str
    source: str = TEXT
    cells: list[dict[str, Any]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)
    single_cell: dict[str, Any] | None = None
    text: str | None = None
    disagreement: str | None = None
    note: str | None = None

    def __str__(self) -> str:
        return self.answer

    def support(self) -> dict[str, Any]:
        """All but question and answer, as JSON types; what is empty is left out."""
        values = {name: value for name, value in vars(self).items() if name not in ("question", "answer")}
        return {name: value for name, value in values.items() if value not in (None, [], {})}


def exact_limits(count: int, of: int) -> tuple[float, float]:
    """The exact binomial (Clopper-Pearson) 95 % limits of a share, in per cent.

    Args:
        count (`int`): Cells of a class.
        of (`int`): Cells in all, at least 1.
    """
    tail = (1 - LEVEL) / 2
    low = 0.0 if count == 0 else 100 * float(betaincinv(count, of - count + 1, tail))
    high = 100.0 if count == of else 100 * float(betaincinv(count + 1, of - count, 1 - tail))
    return low, high


def is_count(question: str) -> bool:
    """Whether a question asks how many cells there are, whether there are any, or what per cent they are."""
    return _asked(question) is not None


def counts_infected_cells(question: str) -> bool:
    """Whether a question asks how many infected red cells there are, whether there are any, or what per cent they are."""
    asked = _asked(question)
    return asked is not None and _meant(asked[1]) == INFECTED


def answer_from_cells(
    question: str,
    text: str | None,
    cells: Sequence[Mapping[str, Any]],
    classes: Sequence[str],
    parents: Mapping[str, str] | None = None,
    single_cell: Mapping[str, Any] | None = None,
    size: tuple[int, int] | None = None,
    morphology: Mapping[str, Sequence[str]] | None = None,
) -> Answer:
    """An answer with the cells that support it.

    Args:
        question (`str`): The question.
        text (`str`, *optional*): What the text decoder answered.
        cells (`Sequence[Mapping]`): The cells that were found: `label`, `score`, `box`, `attributes`, `probability`.
        classes (`Sequence[str]`): Classes that were looked for, found or not.
        parents (`Mapping[str, str]`, *optional*): Class -> coarser class.
        single_cell (`Mapping`, *optional*): What the classifier of single cells says.
        size (`tuple[int, int]`, *optional*): Width and height of the image; without it no picture is taken for one of one cell.
        morphology (`Mapping[str, Sequence[str]]`, *optional*): The attributes and their values.

    Returns:
        [`Answer`]
    """
    shown = [_shown(cell) for cell in cells]
    asked = _asked(question)
    if asked is not None:
        counted = _counted(question, text, asked, shown, classes, parents or {})
        if counted is not None:
            return counted
    one = _the_cell(shown, parents, size)
    about = [one] if one is not None else shown
    attributes = {} if one is None else _named_attributes(question, one.get("attributes", {}))
    single = dict(single_cell) if single_cell is not None and one is not None else None
    named = _named_classes(text or "", classes) | _named_classes(question, classes)
    if named and one is None:
        about = [cell for cell in shown if named & {cell["label"], *ancestors(cell["label"], parents or {})}]
    said = _named_classes(text or "", [*classes, *([single["label"]] if single else [])])
    return Answer(
        question,
        text or "",
        TEXT,
        about,
        _counts(about),
        attributes,
        single,
        text,
        _disagreement(text or "", said, one, shown, attributes, single, parents or {}, morphology or {}),
        f"{CANNOT_KNOW} from cells: none of this checkpoint's classes is asked about"
        if asked is not None and not attributes
        else None,
    )


def _asked(question: str) -> tuple[str, str, str | None] | None:
    """What a question of counts asks: `many`, `any` or `share`, of what, and of which whole."""
    asked = _without_place(question.strip().rstrip("?!. ").lower())
    for how, patterns in _QUESTIONS.items():
        for pattern in patterns:
            if found := pattern.match(asked):
                return how, found["what"], found.groupdict().get("whole")
    return None


def _without_place(text: str) -> str:
    """A text in single blanks, without the words at its end that say nothing of which cells are meant."""
    words = text.split()
    while words and _SAYS_NOTHING.fullmatch(words[-1]):
        words.pop()
    return " ".join(words)


def _meant(name: str) -> str:
    """The usual name of the cells that a part of a question names."""
    name = _BY_PARASITES.sub("", re.sub(r"^(?:the|any|all|an?) ", "", _without_place(name)))
    return usual_name(name)


def _members(name: str, classes: Sequence[str], parents: Mapping[str, str]) -> set[str] | None:
    """The classes that a name stands for; `None` where the checkpoint has none of them."""
    usual = _meant(name)
    # "these" and the like say nothing either.
    if usual in ("cell", ""):
        return set(classes)
    kind = _KINDS.get(usual)
    found = {
        label
        for label in classes
        if usual in {usual_name(each) for each in (label, *ancestors(label, parents))}
        or (kind is not None and cell_kind(label, parents) == kind)
    }
    return found or None


def _counted(
    question: str,
    text: str | None,
    asked: tuple[str, str, str | None],
    shown: list[dict[str, Any]],
    classes: Sequence[str],
    parents: Mapping[str, str],
) -> Answer | None:
    how, what, whole = asked
    members = _members(what, classes, parents)
    if members is None:
        if how == "any":
            # Granules and vacuoles are no cells; the text decoder may know.
            return None
        return Answer(question, CANNOT_KNOW, CELLS, text=text, note=f"this checkpoint has no class {what!r}")
    white = all(is_white_cell(label, parents) for label in members)
    infected = all(is_infected(label, parents) for label in members)
    name = whole or ("white blood cells" if white else "red blood cells" if infected else "cells")
    base = _members(name, classes, parents)
    if base is None:
        return Answer(question, CANNOT_KNOW, CELLS, text=text, note=f"this checkpoint has no class {name!r}")
    if not base & members:
        return Answer(question, CANNOT_KNOW, CELLS, text=text, note=f"{what!r} are not counted among {name!r}")
    found = [cell for cell in shown if cell["label"] in base & members]
    unsure = sum(is_untyped_white_cell(cell["label"]) for cell in shown)
    note = None
    if unsure and white and not any(is_untyped_white_cell(label) for label in members):
        note = f"{unsure} white {'cell is' if unsure == 1 else 'cells are'} of no sure type"
    if how == "many":
        said = str(len(found))
    elif how == "any":
        said = f"yes, {len(found)}" if found else "no"
    else:
        of = [cell for cell in shown if cell["label"] in base]
        said = f"no {name} were found"
        if of:
            low, high = exact_limits(len(found), len(of))
            counts = f"{len(found)} of {len(of)} {name}"
            said = f"{100 * len(found) / len(of):.0f} % ({counts}; exact limits {low:.1f} to {high:.1f} %)"
    numbers = re.findall(r"\d+", text or "")
    differs = how == "many" and numbers and int(numbers[0][:9]) != len(found)
    disagreement = f"the text says {text!r}, {len(found)} were found" if differs else None
    if (
        how == "any"
        and text
        and re.match(r"(yes|no)\b", text.lower())
        and text.lower().startswith("yes") != bool(found)
    ):
        disagreement = f"the text says {text!r}, {len(found)} were found"
    return Answer(question, said, CELLS, found, _counts(found), text=text, disagreement=disagreement, note=note)


def _shown(cell: Mapping[str, Any]) -> dict[str, Any]:
    names = ("id", "label", "score", "probability", "odd", "box", "attributes")
    return {name: cell[name] for name in names if cell.get(name) not in (None, {})}


def _counts(cells: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for cell in cells:
        counts[cell["label"]] = counts.get(cell["label"], 0) + 1
    return counts


def _the_cell(
    shown: Sequence[dict[str, Any]], parents: Mapping[str, str] | None, size: tuple[int, int] | None
) -> dict[str, Any] | None:
    """The nucleated cell that the picture is of, if it is of one."""

    def area(cell: Mapping[str, Any]) -> float:
        return (cell["box"][2] - cell["box"][0]) * (cell["box"][3] - cell["box"][1])

    nucleated = [cell for cell in shown if has_nucleus(cell["label"], parents)]
    if size is None or not nucleated:
        return None
    largest = max(nucleated, key=area)
    return largest if area(largest) >= _ONE_CELL * size[0] * size[1] else None


def _words(text: str) -> list[str]:
    return [_SPELLINGS.get(word, word) for word in map(plain_name, re.findall(r"[^\W_]+", text.lower()))]


def _named_classes(text: str, classes: Sequence[str]) -> set[str]:
    """The classes that a text names, the longest names first: `neutrophil` is not named by `band neutrophil`."""
    known = {usual_name(name): name for name in reversed(classes)}
    words = re.findall(r"[^\W_]+", text)
    found: set[str] = set()
    used: set[int] = set()
    for length in range(min(_LONGEST_NAME, len(words)), 0, -1):
        for start in range(len(words) - length + 1):
            place = set(range(start, start + length))
            name = known.get(usual_name(" ".join(words[start : start + length])))
            if name is not None and not place & used:
                found.add(name)
                used |= place
    return found


def _named_attributes(question: str, attributes: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The attributes of whose words a question has most, and at least half."""
    words = set(_words(question))
    shares = {}
    for name in attributes:
        parts = set(_words(name.replace("_", " ")))
        # Every question may speak of the cell and its type.
        named = parts & words if not parts & words <= _OF_ANY_QUESTION else set()
        shares[name] = len(named) / len(parts)
    most = max(shares.values(), default=0)
    return {name: dict(attributes[name]) for name, share in shares.items() if share == most >= 0.5}


def _said_value(text: str, values: Sequence[str]) -> str | None:
    """Which value of an attribute a text gives: of `blue` and `light blue` the longer, if it is there."""
    words = set(_words(text))
    parts = {value: set(_words(_SAME_VALUE.get(value, value))) for value in values}
    found = [value for value in values if parts[value] and parts[value] <= words]
    return max(found, key=lambda value: len(parts[value]), default=None)


def _disagreement(
    text: str,
    said: set[str],
    one: Mapping[str, Any] | None,
    shown: Sequence[Mapping[str, Any]],
    attributes: Mapping[str, Mapping[str, Any]],
    single: Mapping[str, Any] | None,
    parents: Mapping[str, str],
    morphology: Mapping[str, Sequence[str]],
) -> str | None:
    parts = []

    def same(name: str, label: str) -> bool:
        first, second = ({usual_name(each) for each in (of, *ancestors(of, parents))} for of in (name, label))
        return usual_name(name) in second or usual_name(label) in first

    types = {name for name in said if not is_untyped_white_cell(name)}
    if types and one is not None:
        others = [("detection", one["label"]), *([("single cells", single["label"])] if single else [])]
        parts += [
            f"the text names {' and '.join(sorted(types))}, the head of {head} {label}"
            for head, label in others
            if not any(same(name, label) for name in types)
        ]
    elif types and shown and not any(same(name, cell["label"]) for name in types for cell in shown):
        parts.append(f"the text names {' and '.join(sorted(types))}, of which no cell was found")
    for name, read in attributes.items():
        value = _said_value(text, morphology.get(name, ()))
        if value is not None and value != read["value"]:
            parts.append(f"the text says {text!r}, the head reads {name} {read['value']}")
    return "; ".join(parts) or None


__all__ = ["CELLS", "TEXT", "Answer", "answer_from_cells", "counts_infected_cells", "exact_limits", "is_count"]
