"""Spellings of class names, and which classes are white cells, have a nucleus, or are counted beside."""

import json
from importlib.resources import files
from pathlib import Path

import pytest

from unihema.official.labels import OFFICIAL_CELLS, OFFICIAL_CLASSES
from unihema.processing_unihema.class_names import (
    MEGAKARYOCYTE,
    NUCLEATED_RED_CELL,
    PLATELET,
    RED_CELL,
    SMUDGE_CELL,
    WHITE_CELL,
    cell_kind,
    has_nucleus,
    is_beside_differential,
    is_untyped_white_cell,
    is_white_cell,
    plain_name,
    usual_name,
)


# The rules that `plain_name` took the place of.
FORMER_RULES = {
    "prompts": lambda name: " ".join(name.lower().replace("_", " ").split()).removesuffix("s"),
    "differential": lambda name: name.strip().lower().replace("_", " ").replace("-", " ").removesuffix("s"),
    "attributes": lambda name: name.strip().lower().removesuffix("s"),
}


@pytest.fixture(scope="module")
def shipped():
    text = (Path(str(files("unihema"))) / "shipped_files" / "checkpoint-open" / "config.json").read_text(
        encoding="utf-8"
    )
    config = json.loads(text)
    return list(config["id2label"].values()), config["label_parents"]


@pytest.mark.parametrize("rule", FORMER_RULES)
def test_what_matched_before_matches(rule):
    """Of all official names, each in ten spellings: those that a former rule took for one are one."""
    former = FORMER_RULES[rule]
    spellings = [
        change(name)
        for name in dict.fromkeys(OFFICIAL_CELLS + OFFICIAL_CLASSES)
        for words in (name, f"{name}s", name.replace(" ", "_"), name.replace(" ", "-"), f" {name.replace(' ', '  ')} ")
        for change in (str.lower, str.title)
        for name in (words,)
    ]
    groups: dict[str, set[str]] = {}
    for spelling in spellings:
        groups.setdefault(former(spelling), set()).add(plain_name(spelling))
    assert len(groups) > 40 and all(len(group) == 1 for group in groups.values())


def test_spellings_and_other_words_for_the_same_cell():
    assert {plain_name(name) for name in ("Target_Cells", "target-cell", " target  cell ")} == {"target cell"}
    assert {usual_name(name) for name in ("WBCs", "White-Blood_Cell", "leucocytes", "Leukocyte")} == {"wbc"}
    assert plain_name("WBC") != plain_name("white blood cell")


def test_the_shipped_tree_and_the_usual_one_for_what_it_leaves_open(shipped):
    names, parents = shipped
    assert {name: cell_kind(name, parents) for name in names} == {
        "RBC": RED_CELL,
        "WBC": WHITE_CELL,
        "Platelets": PLATELET,
        "erythroblast": NUCLEATED_RED_CELL,
        **dict.fromkeys(["neutrophil", "eosinophil", "basophil", "lymphocyte", "monocyte", "ig"], WHITE_CELL),
    }
    assert [name for name in names if not has_nucleus(name, parents)] == ["RBC", "Platelets"]
    assert [name for name in names if is_untyped_white_cell(name)] == ["WBC"]
    assert [name for name in names if is_beside_differential(name, parents)] == ["erythroblast"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("Immature Granulocytes", WHITE_CELL),
        ("segmented", WHITE_CELL),
        ("Band-Neutrophil", WHITE_CELL),
        ("monoblast", WHITE_CELL),
        ("burr_cell", RED_CELL),
        ("Elliptocytes", RED_CELL),
        ("giant thrombocyte", PLATELET),
        ("NRBC", NUCLEATED_RED_CELL),
        ("Nucleated Red Blood Cells", NUCLEATED_RED_CELL),
        ("smudge_cell", SMUDGE_CELL),
        ("megakaryocytes", MEGAKARYOCYTE),
        ("trophozoite", RED_CELL),
        ("parasitized", RED_CELL),
        ("artefact", None),
    ],
)
def test_without_a_tree_names_say_it(name, kind):
    assert cell_kind(name) == cell_kind(name, {}) == kind


def test_a_labs_own_tree_comes_first():
    own = {
        "reactive T": "Lymphocytes",
        "lymphocyte": "myeloid or lymphoid",
        "megakaryocyte": "wbc",
        "basophil": "RBC",
        "NRBC": "red cell",
        "WBC": "cell",
        "a": "b",
        "b": "a",
    }
    assert cell_kind("Reactive_T", own) == WHITE_CELL
    # Where the own tree leads to no known kind, the usual one does.
    assert cell_kind("lymphocyte", own) == WHITE_CELL
    assert is_white_cell("megakaryocyte", own) and not is_beside_differential("megakaryocyte", own)
    assert not is_white_cell("basophil", own) and not has_nucleus("basophil", own)
    assert has_nucleus("NRBC", own) and is_beside_differential("NRBC", own)
    assert is_white_cell("WBC", own)
    assert cell_kind("a", own) is None and has_nucleus("a", own)
