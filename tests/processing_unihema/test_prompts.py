import pytest

from unihema.processing_unihema.prompts import (
    cloze_prompt,
    fill_blanks,
    names_prompt,
    number_blanks,
    question_prompt,
    task_prompt,
)


def test_templates():
    assert names_prompt("malaria") == "This image is for the detection of malaria cells"
    assert names_prompt(["RBC", "WBC", "RBC"]) == "This image is for the detection of RBC, WBC cells"
    assert names_prompt(["RBC ", "", "RBC"]) == "This image is for the detection of RBC cells"
    assert question_prompt(" What is it? ") == "Q: What is it?"
    assert cloze_prompt("A ___ cell.") == "mask: A <extra_id_0> cell."


def test_blanks_are_numbered_from_left_to_right():
    repeated = "<extra_id_0> nucleus, ____ cytoplasm and <extra_id_0> granules"
    numbered = number_blanks(repeated)
    assert numbered == "<extra_id_0> nucleus, <extra_id_1> cytoplasm and <extra_id_2> granules"
    assert fill_blanks(numbered, ["round", "clear", "pink"]) == "round nucleus, clear cytoplasm and pink granules"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: names_prompt([]), "at least one"),
        (lambda: question_prompt("  "), "question is empty"),
        (lambda: number_blanks("no blank"), "No blank"),
        (lambda: fill_blanks("a ___ b", ["x", "y"]), "2 answers for 1 blanks"),
        (lambda: task_prompt("single_cell", "x"), "reads no text"),
    ],
)
def test_what_cannot_be_a_prompt_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
