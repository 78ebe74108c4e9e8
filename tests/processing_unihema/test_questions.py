"""Answers that can be checked: counted among the cells, or supported by them."""

import pytest
from PIL import Image
from tiny_checkpoint import save_lively
from transformers import pipeline

from unihema import Analyzer
from unihema.loading import load_model
from unihema.modeling_unihema.modeling_unihema import UniHemaForDetection
from unihema.processing_unihema.questions import answer_from_cells, counts_infected_cells, is_count


PARENTS = {"basophil": "WBC", "neutrophil": "WBC", "lymphocyte": "WBC", "reactive lymphocyte": "lymphocyte"}
CLASSES = ["RBC", "WBC", "Platelets", "neutrophil", "basophil", "lymphocyte", "reactive lymphocyte"]
ATTRIBUTES = {
    "nucleus_shape": ["irregular", "segmented-bilobed", "unsegmented-round"],
    "cytoplasm_vacuole": ["no", "yes"],
    "cytoplasm_colour": ["blue", "light blue"],
    "granule_colour": ["nil", "pink"],
    "cell_shape": ["irregular", "round"],
}
FIELD = ["RBC"] * 5 + ["neutrophil"] * 3 + ["lymphocyte", "reactive lymphocyte", "WBC", "Platelets"]


def cell(label: str, box=(0, 0, 10, 10), **attributes: str) -> dict:
    read = {name: {"value": value, "score": 0.9} for name, value in attributes.items()}
    return {"label": label, "score": 0.8, "box": box, "attributes": read}


def asked(question: str, text: str | None = None, labels: list[str] = FIELD):
    return answer_from_cells(question, text, [cell(label) for label in labels], CLASSES, PARENTS, size=(100, 100))


@pytest.mark.parametrize(
    ("question", "answer", "cells"),
    [
        ("How many neutrophils are there?", "3", 3),
        ("how many white blood cells can you see", "6", 6),
        ("How many leucocytes are in the image?", "6", 6),
        ("How many lymphocytes?", "2", 2),
        ("How many red cells do you see?", "5", 5),
        ("How many thrombocytes are visible?", "1", 1),
        ("How many cells are shown?", "12", 12),
        ("How many of the white cells are neutrophils?", "3", 3),
        ("Is there any basophil?", "no", 0),
        ("Is there a neutrophil in this field?", "yes, 3", 3),
        ("Are there any platelets here?", "yes, 1", 1),
        ("Are any basophils present?", "no", 0),
        (
            "What per cent of the white cells are neutrophils?",
            "50 % (3 of 6 white cells; exact limits 11.8 to 88.2 %)",
            3,
        ),
        ("What percentage of leukocytes are lymphocytes?", "33 % (2 of 6 leukocytes; exact limits 4.3 to 77.7 %)", 2),
        ("What percent are neutrophils?", "50 % (3 of 6 white blood cells; exact limits 11.8 to 88.2 %)", 3),
        ("What is the percentage of neutrophils?", "50 % (3 of 6 white blood cells; exact limits 11.8 to 88.2 %)", 3),
        ("What is the proportion of platelets among all cells?", "8 % (1 of 12 cells; exact limits 0.2 to 38.5 %)", 1),
        ("How many schistocytes are there?", "cannot know", 0),
        ("What per cent of blasts are neutrophils?", "cannot know", 0),
        # What a question says of the cells is not passed over.
        ("How many cells are neutrophils?", "3", 3),
        ("How many white blood cells are lymphocytes in this image?", "2", 2),
        ("How many of these are neutrophils?", "3", 3),
        ("How many red blood cells are infected with malaria?", "cannot know", 0),
        ("How many red cells have parasites?", "cannot know", 0),
        ("How many cells are not neutrophils?", "cannot know", 0),
        ("How many of the neutrophils are platelets?", "cannot know", 0),
        ("What per cent of the white cells are platelets?", "cannot know", 0),
        (
            "What per cent of lymphocytes are white cells?",
            "100 % (2 of 2 lymphocytes; exact limits 15.8 to 100.0 %)",
            2,
        ),
        (
            "What percentage of cells in the image are platelets?",
            "8 % (1 of 12 cells in the image; exact limits 0.2 to 38.5 %)",
            1,
        ),
    ],
)
def test_counts_are_of_the_cells_that_were_found(question, answer, cells):
    found = asked(question, "many")
    assert (found.answer, found.source, len(found.cells)) == (answer, "cells", cells)
    assert is_count(question) and found.text == "many" and sum(found.counts.values()) == cells
    assert all(set(each) == {"label", "score", "box"} for each in found.cells)


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("How many infected red blood cells are there?", "2"),
        ("How many red blood cells are infected with malaria?", "2"),
        ("Are there any infected cells?", "yes, 2"),
        ("What percentage of red cells are infected?", "20 % (2 of 10 red cells; exact limits 2.5 to 55.6 %)"),
        ("What per cent are infected?", "20 % (2 of 10 red blood cells; exact limits 2.5 to 55.6 %)"),
    ],
)
def test_infected_cells_are_counted_where_they_were_looked_for(question, answer):
    cells = [cell(label) for label in ["RBC"] * 8 + ["infected red cell"] * 2 + ["neutrophil"] * 5]
    found = answer_from_cells(question, None, cells, [*CLASSES, "infected red cell"], PARENTS)
    assert (found.answer, found.counts) == (answer, {"infected red cell": 2})
    assert counts_infected_cells(question)


def test_kinds_that_are_counted_beside_white_cells_are_counted_by_their_names():
    classes = ["erythroblast", "ig", "neutrophil", "RBC", "smudge", "megakaryocyte"]
    cells = [cell(label) for label in ("erythroblast", "erythroblast", "ig", "neutrophil", "smudge")]
    for what, count in (
        ("nucleated red cells", "2"), ("NRBCs", "2"), ("erythroblasts", "2"), ("immature granulocytes", "1"), ("igs", "1"),
        ("smudge cells", "1"), ("megakaryocytes", "0"), ("neutrophils", "1"),
    ):  # fmt: skip
        found = answer_from_cells(f"How many {what} are there?", None, cells, classes, {}, size=(100, 100))
        assert found.answer == count, what


def test_other_counts_need_no_look_for_parasites():
    for question in (
        "How many cells are there?",
        "How many red cells?",
        "How many uninfected cells?",
        "Is it infected?",
    ):
        assert not counts_infected_cells(question)


def test_whether_there_are_cells_of_a_kind_that_is_no_class_is_for_the_text():
    for question in ("Are any neutrophils in the image toxic?", "Are there neutrophils in the picture that are toxic?"):
        found = asked(question, "No.")
        assert (found.answer, found.source) == ("No.", "text")


def test_a_share_of_none_is_no_number():
    assert asked("What per cent are neutrophils?", labels=["RBC"]).answer == "no white blood cells were found"


def test_unsure_types_and_other_numbers_are_said():
    assert asked("How many neutrophils are there?").note == "1 white cell is of no sure type"
    assert asked("How many white blood cells are there?").note is None
    assert "the text says '7', 3 were found" in asked("How many neutrophils are there?", "7").disagreement
    assert asked("How many neutrophils are there?", "3 neutrophils").disagreement is None
    assert "the text says 'Yes.', 0 were found" in asked("Is there any basophil?", "Yes.").disagreement


ONE = [
    cell(
        "neutrophil",
        (10, 10, 90, 90),
        nucleus_shape="segmented-bilobed",
        cytoplasm_vacuole="no",
        cytoplasm_colour="light blue",
        granule_colour="pink",
        cell_shape="round",
    )
]


@pytest.mark.parametrize(
    ("question", "text", "attribute", "differs"),
    [
        ("What is the shape of the nucleus?", "The nucleus is segmented bilobed.", "nucleus_shape", False),
        ("What is the shape of the nucleus?", "The nucleus is unsegmented round.", "nucleus_shape", True),
        ("Are there vacuoles in the cytoplasm?", "No, vacuoles are absent.", "cytoplasm_vacuole", False),
        ("Are there vacuoles in the cytoplasm?", "Yes, vacuoles are present.", "cytoplasm_vacuole", True),
        ("What is the color of the cytoplasm?", "It is light blue.", "cytoplasm_colour", False),
        ("What is the colour of the cytoplasm?", "It is blue.", "cytoplasm_colour", True),
        ("What is the colour of the granules?", "There are no granules.", "granule_colour", True),
        ("What is the shape of the cell?", "The cell is round.", "cell_shape", False),
    ],
)
def test_attributes_support_an_answer_or_contradict_it(question, text, attribute, differs):
    found = answer_from_cells(question, text, ONE, CLASSES, PARENTS, None, (100, 100), ATTRIBUTES)
    assert (found.answer, found.source, list(found.attributes)) == (text, "text", [attribute])
    assert found.attributes[attribute] == ONE[0]["attributes"][attribute]
    assert (found.disagreement is not None) == differs
    if differs:
        assert f"the head reads {attribute} {ONE[0]['attributes'][attribute]['value']}" in found.disagreement


def test_a_question_of_the_type_names_no_attribute():
    one = [cell("neutrophil", (10, 10, 90, 90), granule_type="small", cell_shape="round")]
    for question, named in (
        ("What type of white blood cell is this?", []),
        ("What type of granules does the cell have?", ["granule_type"]),
        ("How large is the white blood cell?", []),
    ):
        assert list(answer_from_cells(question, "", one, CLASSES, PARENTS, None, (100, 100)).attributes) == named


def test_a_type_is_compared_with_both_heads():
    question = "What type of white blood cell is this?"
    arguments = (ONE, CLASSES, PARENTS, {"label": "basophil", "score": 0.7}, (100, 100))
    found = answer_from_cells(question, "Neutrophil.", *arguments)
    assert found.disagreement == "the text names neutrophil, the head of single cells basophil"
    assert found.single_cell == {"label": "basophil", "score": 0.7} and found.counts == {"neutrophil": 1}
    found = answer_from_cells(question, "Basophil.", *arguments)
    assert found.disagreement == "the text names basophil, the head of detection neutrophil"
    # A kind of a lymphocyte is one.
    one = [cell("reactive lymphocyte", (10, 10, 90, 90))]
    assert answer_from_cells(question, "A lymphocyte.", one, CLASSES, PARENTS, size=(100, 100)).disagreement is None
    # In a field the text may name any cell that is there.
    assert asked(question, "Neutrophil.").disagreement is None
    # The white cell without a type may be one.
    assert asked(question, "Basophil.").disagreement is None
    typed = [label for label in FIELD if label != "WBC"]
    assert "names basophil, of which no cell was found" in asked(question, "Basophil.", typed).disagreement


def test_a_hostile_question_is_a_question():
    for question in (
        "How many " + "a " * 5000,
        "<script>how many cells</script>",
        "How many %s\x00\x1b[2J?",
        "___",
        "",
    ):
        assert answer_from_cells(question, "no", [], CLASSES, PARENTS).question == question


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_lively(tmp_path_factory.mktemp("models") / "questions", 1)


IMAGE = Image.effect_noise((64, 64), 80).convert("RGB")


@pytest.mark.filterwarnings("ignore::unihema.analyzer.QueryCapWarning")
def test_the_analyzer_answers_with_the_cells_it_finds(checkpoint):
    analyzer = Analyzer.from_pretrained(checkpoint, device="cpu")
    result = analyzer(IMAGE, ["detection"])
    many, other = analyzer.ask(IMAGE, ["How many cells are there?", "What is it?"])
    assert str(many) == str(len(result.cells)) and many.counts == {k: v for k, v in result.counts.items() if v}
    assert [each["box"] for each in many.cells] == [list(cell.box) for cell in result.cells]
    assert other.source == "text" and other.answer == other.text
    # A detector without a text decoder can count, and do nothing else.
    analyzer.model = UniHemaForDetection.from_pretrained(checkpoint).eval()
    assert str(analyzer.ask(IMAGE, "How many cells are there?")) == str(many)


@pytest.mark.filterwarnings("ignore::unihema.analyzer.QueryCapWarning")
def test_the_pipeline_gains_keys_where_the_model_finds_cells(checkpoint):
    model, processor = load_model(checkpoint, "cpu")
    ask = pipeline(
        "visual-question-answering", model=model, processor=processor, tokenizer=processor.tokenizer, device="cpu"
    )
    (many,) = ask(image=IMAGE, question="How many cells are there?")
    assert many["answer"] == str(len(many["cells"])) and many["source"] == "cells" and 0 < many["score"] <= 1
    # A class that the checkpoint is known not to find is not looked for.
    assert ask(image=IMAGE, question="How many platelets are there?")[0]["answer"].isdecimal()
    model.config.trained.unfound_classes = ["platelet"]
    assert ask(image=IMAGE, question="How many platelets are there?")[0]["answer"] == "cannot know"
    model.config.trained.unfound_classes = []
    both = ask(image=[IMAGE, IMAGE], question=["How many cells are there?", "What is it?"], batch_size=2)
    assert both[0][0]["answer"] == many["answer"] and both[1][0]["source"] == "text"
    assert both[1][0]["answer"] == both[1][0]["text"]
