"""Names of classes: spellings of one class, and which class is a kind of which.

`config.label_parents` gives the hierarchy of a checkpoint's classes. The tables below are for classes that it leaves out.
"""

import re
from collections.abc import Mapping


WHITE_CELL = "white blood cell"
RED_CELL = "red blood cell"
PLATELET = "platelet"
NUCLEATED_RED_CELL = "nucleated red cell"
SMUDGE_CELL = "smudge cell"
MEGAKARYOCYTE = "megakaryocyte"
# Groups of red cells, of malaria and of no parasite.
INFECTED, UNINFECTED = "infected red cell", "uninfected red cell"
# What masks of the nuclei of white cells are asked for with.
NUCLEUS = "nucleus"

# How a differential count calls white cells without a type.
UNIDENTIFIED = "unidentified"

_WRITTEN_OUT = {"red blood cell": "rbc", "white blood cell": "wbc"}
# Words for the same cell, beside those written out.
_SAME_CELL = {
    "red cell": "rbc",
    "erythrocyte": "rbc",
    "white cell": "wbc",
    "leukocyte": "wbc",
    "leucocyte": "wbc",
    "thrombocyte": "platelet",
    "neutrophil granulocyte": "neutrophil",
    "eosinophil granulocyte": "eosinophil",
    "basophil granulocyte": "basophil",
    "neutrophil band": "band neutrophil",
    "neutrophil segmented": "segmented neutrophil",
    "immature granulocyte": "ig",
    "sickle": "sickle cell",
    "infected": "infected red cell",
    "infected cell": "infected red cell",
    "infected rbc": "infected red cell",
    "infected red blood cell": "infected red cell",
    "parasitized": "infected red cell",
    "parasitised": "infected red cell",
    "uninfected": "uninfected red cell",
    "uninfected cell": "uninfected red cell",
    "uninfected rbc": "uninfected red cell",
    "uninfected red blood cell": "uninfected red cell",
}

# Coarser class -> its kinds.
_KINDS = {
    "wbc": (
        "neutrophil",
        "eosinophil",
        "basophil",
        "lymphocyte",
        "monocyte",
        "blast",
        "granulocyte",
        "ig",
        "promyelocyte",
        "myelocyte",
        "metamyelocyte",
        "promonocyte",
        "prolymphocyte",
        "immature lymphocyte",
        "atypical lymphocyte",
        "reactive lymphocyte",
        "variant lymphocyte",
        "lymphocyte variant",
        "plasma cell",
        "hairy cell",
        "faggot cell",
    ),
    "neutrophil": (
        "band neutrophil",
        "band",
        "band cell",
        "segmented neutrophil",
        "segmented",
        "segmented cell",
    ),
    "blast": ("myeloblast", "lymphoblast", "monoblast", "blast no lineage"),
    "promyelocyte": ("abnormal promyelocyte",),
    "eosinophil": ("abnormal eosinophil",),
    "rbc": ("sickle cell", "infected red cell", "uninfected red cell"),
    "infected red cell": ("ring", "trophozoite", "schizont", "gametocyte"),
    "platelet": ("giant thrombocyte", "giant platelet"),
    "parasite": ("concentrated leishman parasite", "leishman parasite"),
}
# Shapes and stains of red cells. Training does not take them for kinds of a class `RBC`: a data set may box the odd shapes
# and leave ordinary red cells without a box, or box those under a name such as "normal cell", and would then teach that
# these are no red cells.
RED_CELL_SHAPES = (
    "acanthocyte",
    "bite cell",
    "blister cell",
    "burr cell",
    "codocyte",
    "dacrocyte",
    "dacryocyte",
    "degmacyte",
    "discocyte",
    "drepanocyte",
    "echinocyte",
    "elliptocyte",
    "helmet cell",
    "hypochromia",
    "irregularly contracted cell",
    "macrocyte",
    "microcyte",
    "normal red blood cell",
    "normocyte",
    "oval macrocyte",
    "ovalocyte",
    "polychromatic red cell",
    "reticulocyte",
    "schistocyte",
    "spherocyte",
    "spur cell",
    "stomatocyte",
    "target cell",
    "teardrop",
    "teardrop cell",
)
# Counted beside the white cells. Training knows no coarser class of theirs either.
_BESIDE = {
    NUCLEATED_RED_CELL: (
        "nucleated red blood cell",
        "nucleated rbc",
        "nrbc",
        "erythroblast",
        "proerythroblast",
        "basophilic erythroblast",
        "polychromatic erythroblast",
        "orthochromatic erythroblast",
        "normoblast",
        "pronormoblast",
        "basophilic normoblast",
        "polychromatic normoblast",
        "orthochromatic normoblast",
    ),
    SMUDGE_CELL: ("smudge", "basket cell", "gumprecht shadow"),
    MEGAKARYOCYTE: ("micromegakaryocyte",),
}


def plain_name(name: str) -> str:
    """A class name without case, plural, and the `_`, `-` or spaces between its words."""
    return re.sub(r"[\s_\-]+", " ", name.lower()).strip().removesuffix("s").strip()


def short_name(name: str) -> str:
    """The plain name, `rbc` and `wbc` for the two that are usually abbreviated."""
    plain = plain_name(name)
    return _WRITTEN_OUT.get(plain, plain)


def usual_name(name: str) -> str:
    """One name for all spellings and synonyms of a class, such as `leukocyte` and `WBC`."""
    short = short_name(name)
    return _SAME_CELL.get(short, short)


# Class -> the next coarser one, both by their usual names.
STANDARD_PARENTS = {usual_name(kind): coarser for coarser, kinds in _KINDS.items() for kind in kinds}

_KINDS_OF_CELLS = {"wbc": WHITE_CELL, "rbc": RED_CELL, "platelet": PLATELET}
_BESIDE_BY_NAME = {usual_name(name): kind for kind, names in _BESIDE.items() for name in (kind, *names)}


def _standard_kind(name: str) -> str | None:
    while (parent := STANDARD_PARENTS.get(name)) is not None:
        name = parent
    return _KINDS_OF_CELLS.get(name) or _BESIDE_BY_NAME.get(name)


_KIND_BY_NAME = dict.fromkeys(map(usual_name, RED_CELL_SHAPES), RED_CELL) | {
    name: _standard_kind(name) for name in (*STANDARD_PARENTS, *_KINDS_OF_CELLS, *_BESIDE_BY_NAME)
}


def cell_kind(name: str, parents: Mapping[str, str] | None = None) -> str | None:
    """What kind of cell a class is of.

    Args:
        name (`str`): The class, in any spelling.
        parents (`Mapping[str, str]`, *optional*): A checkpoint's own tree, class -> coarser class (`config.label_parents`).
            It takes precedence over the tables here.

    Returns:
        `str` or `None`: `WHITE_CELL`, `RED_CELL`, `PLATELET`, `NUCLEATED_RED_CELL`, `SMUDGE_CELL`, `MEGAKARYOCYTE`; `None` for
        parasites, debris and unknown names.
    """
    own = {usual_name(child): usual_name(parent) for child, parent in (parents or {}).items()}
    line = [usual_name(name)]
    while line[-1] not in _KINDS_OF_CELLS and (parent := own.get(line[-1])) is not None and parent not in line:
        line.append(parent)
    kind = None
    for ancestor in reversed(line):
        usual = _KIND_BY_NAME.get(ancestor)
        # A nucleated red cell remains one where a checkpoint calls it a red cell.
        if kind is None or (kind == RED_CELL and usual == NUCLEATED_RED_CELL):
            kind = usual
    return kind


def is_white_cell(name: str, parents: Mapping[str, str] | None = None) -> bool:
    """Whether cells of a class are among the white cells of a differential count; see [`cell_kind`]."""
    return cell_kind(name, parents) == WHITE_CELL


def is_untyped_white_cell(name: str) -> bool:
    """Whether a class is that of white cells without a type."""
    return usual_name(name) == "wbc"


def is_beside_differential(name: str, parents: Mapping[str, str] | None = None) -> bool:
    """Whether cells of a class are reported beside a differential count: nucleated red cells, smudge cells, megakaryocytes;
    see [`cell_kind`]."""
    return cell_kind(name, parents) in _BESIDE


def has_nucleus(name: str, parents: Mapping[str, str] | None = None) -> bool:
    """Whether cells of a class have a nucleus, and so attributes; red cells and platelets have none. See [`cell_kind`]."""
    return cell_kind(name, parents) not in (RED_CELL, PLATELET)


def lineage(name: str, parents: Mapping[str, str]) -> list[str]:
    """A class and its coarser classes by their usual names, the next one first: as the checkpoint has them, then as is usual.

    Args:
        name (`str`): The class, in any spelling.
        parents (`Mapping[str, str]`): Class -> coarser class, as the checkpoint has it.
    """
    own = {usual_name(child): usual_name(parent) for child, parent in parents.items()}
    line = [usual_name(name)]
    while (parent := own.get(line[-1], STANDARD_PARENTS.get(line[-1]))) is not None and parent not in line:
        line.append(parent)
    return line


def is_infected(name: str, parents: Mapping[str, str] | None = None) -> bool:
    """Whether a class is of infected red cells. A checkpoint may know stages without the class that they are kinds of.

    Args:
        name (`str`): The class, in any spelling.
        parents (`Mapping[str, str]`, *optional*): Class -> coarser class, as the checkpoint has it.
    """
    return any(INFECTED in lineage(each, {}) for each in lineage(name, parents or {}))


__all__ = [
    "INFECTED",
    "MEGAKARYOCYTE",
    "NUCLEATED_RED_CELL",
    "PLATELET",
    "RED_CELL",
    "RED_CELL_SHAPES",
    "SMUDGE_CELL",
    "STANDARD_PARENTS",
    "UNIDENTIFIED",
    "UNINFECTED",
    "WHITE_CELL",
    "cell_kind",
    "has_nucleus",
    "is_beside_differential",
    "is_infected",
    "is_untyped_white_cell",
    "is_white_cell",
    "lineage",
    "plain_name",
    "short_name",
    "usual_name",
]
