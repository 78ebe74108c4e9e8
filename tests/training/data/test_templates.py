"""Questions and sentences templated from labels: only what the labels answer."""

import pytest

from unihema.training.data.templates import cell_texts, field_texts, texts_of_labels


def field(names, annotated, iscrowd=None, exact=()):
    objects = {"bbox": [[0, 0, 9, 9]] * len(names), "category": names}
    row = {"image": "a.png", "file_name": "a.png", "dataset": "lab", "task": "detection", "slide": "3"}
    row |= {"objects": objects, "annotated_classes": annotated, "exact_classes": list(exact)}
    if iscrowd:
        objects["iscrowd"] = iscrowd
    return row


def answers(row, texts=field_texts):
    questions, sentences = texts(row)
    for masked, completed in sentences:
        assert masked.count("<extra_id_0>") == 1
        start, end = masked.split("<extra_id_0>")
        assert completed.startswith(start) and completed.endswith(end) and len(completed) > len(start + end)
    return dict(questions)


TYPES = ["neutrophil", "eosinophil", "basophil", "lymphocyte", "monocyte"]
MALARIA = ["RBC", "ring", "trophozoite", "schizont", "gametocyte"]


def test_types_of_white_cells_without_red_ones():
    asked = answers(field(["monocyte"], TYPES))
    assert asked["How many white blood cells are in the field?"] == "1."
    assert (
        asked["Is there a monocyte in the field?"] == "Yes." and asked["Is there an eosinophil in the field?"] == "No."
    )
    assert asked["What type of white blood cell is this?"] == "Monocyte."
    assert not any("red" in question or "platelet" in question or "parasite" in question for question in asked)


def test_a_white_cell_without_a_type_leaves_types_open():
    asked = answers(field(["WBC", "neutrophil", "Platelets"], ["RBC", "WBC", "Platelets", "neutrophil", "eosinophil"]))
    assert asked["How many white blood cells are in the field?"] == "2."
    assert asked["How many platelets are in the field?"] == "1."
    assert not any("neutrophil" in question or "type" in question for question in asked)


def test_parasites_and_their_share():
    asked = answers(field([*["RBC"] * 46, "ring", "ring", "schizont", "gametocyte"], MALARIA, exact=["RBC"]))
    assert asked["How many red blood cells hold a parasite?"] == "4."
    assert asked["Which stages of the parasite are seen?"] == "Ring, schizont, gametocyte."
    # Three of fifty: gametocytes do not count.
    assert asked["What is the parasitaemia?"] == "6.0 per cent."
    assert not any("white" in question for question in asked)
    healthy = answers(field(["RBC"] * 9, MALARIA, exact=["RBC"]))
    assert healthy["Are there malaria parasites in the field?"] == "No."
    assert healthy["Which stages of the parasite are seen?"] == "None."
    # A red cell of a set that does not tell them apart may be infected, and so may one that nobody could name.
    assert not any("parasite" in question for question in answers(field(["RBC"] * 9, MALARIA)))
    crowd = field(["RBC", "ring"], MALARIA, iscrowd=[0, 1], exact=["RBC"])
    assert not any("parasite" in question for question in answers(crowd))


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("parasitized", {"Is the red blood cell infected with malaria?": "Yes."}),
        ("uninfected", {"Is the red blood cell infected with malaria?": "No."}),
        ("ring", {"Which stage of the parasite does the red blood cell hold?": "Ring."}),
        ("myeloblast", {"Is the cell a blast?": "Yes.", "What type of white blood cell is this?": "Myeloblast."}),
        ("ig", {"Is the cell a blast?": "No.", "What kind of cell is this?": "A white blood cell."}),
        ("sickle_cell", {"Is this a sickle cell?": "Yes."}),
        ("burr_cell", {"Is this a sickle cell?": "No.", "Which shape does the red blood cell have?": "Burr cell."}),
        ("all_early", {"Which class of lymphoid cells does the field show?": "Early."}),
        ("all_benign", {"Does the field show acute lymphoblastic leukaemia?": "No."}),
        ("Platelets", {"What kind of cell is this?": "A platelet."}),
    ],
)
def test_crops(label, expected):
    asked = answers({"label": label}, cell_texts)
    assert expected.items() <= asked.items()
    assert ("Is the red blood cell infected with malaria?" in asked) == (label in ("parasitized", "uninfected", "ring"))
    assert ("Is the cell a blast?" in asked) == (label in ("myeloblast", "ig"))


def test_what_is_no_cell_is_not_asked_about():
    assert cell_texts({"label": "artefact"}) == ([], [])
    assert answers({"label": "WBC"}, cell_texts) == {"What kind of cell is this?": "A white blood cell."}
    assert field_texts(field(["RBC"], None)) == ([], [])


def test_rows_say_where_their_image_comes_from():
    crop = {"image": "c.png", "file_name": "c.png", "dataset": "lab", "task": "single_cell", "label": "ring"}
    rows = texts_of_labels(
        {"detection": [field(["monocyte"], TYPES)], "single_cell": [crop, crop | {"box": [0, 0, 9, 9]}]}
    )
    assert {row["file_name"] for row in rows["question_answering"]} == {"a.png", "c.png"}
    first = rows["question_answering"][0]
    assert first["task"] == "question_answering" and first["slide"] == "3" and first["image"] == "a.png"
    stages = [row for row in rows["cloze"] if "stage" in row["masked"]]
    assert len(stages) == 1 and stages[0]["completed"] == "The red blood cell holds a parasite of the stage ring."
