"""Questions, answers and cloze sentences that follow from the exact truth of a synthetic smear."""

from collections.abc import Mapping, Sequence

import numpy as np

from unihema.training.data.synthetic.cells import WHITE_CELLS


_CELL_QUESTIONS = {
    "nuclear_chromatin": ("Is the nuclear chromatin open or coarse?", {"open": "open", "coarse": "coarse"}),
    "nuclear_shape": ("Is the outline of the nucleus regular or irregular?", {}),
    "nucleolus": ("Is a prominent nucleolus seen?", {"inconspicuous": "no", "prominent": "yes"}),
    "cytoplasm": ("Is the cytoplasm scanty or abundant?", {}),
    "basophilia": ("How basophilic is the cytoplasm?", {}),
    "vacuoles": ("Are there vacuoles in the cytoplasm?", {"absent": "no", "prominent": "yes"}),
}

_BLANK_SLOTS = ("label", "nuclear_shape", "nuclear_chromatin", "cytoplasm", "basophilia", "vacuoles")
_SENTENCE = (
    "{label} with {nuclear_shape} nucleus, {nuclear_chromatin} chromatin, {nucleolus} nucleolus, {cytoplasm} cytoplasm "
    "of {basophilia} basophilia, vacuoles {vacuoles}."
)


def cell_questions(label: str, attributes: Mapping[str, str]) -> list[dict[str, str]]:
    """Questions about the one cell that an image is about.

    Args:
        label (`str`): Its class.
        attributes (`Mapping[str, str]`): Its morphology; empty unless it is a white cell.

    Returns:
        `list[dict[str, str]]`: `question` and `answer`.
    """
    if label not in WHITE_CELLS:
        return [{"question": "Which cell is this?", "answer": label}]
    pairs = [("Which cell is this?", label), ("What type of white blood cell is this?", label)]
    for name, value in attributes.items():
        question, answers = _CELL_QUESTIONS[name]
        pairs.append((question, answers.get(value, value)))
    return [{"question": question, "answer": answer} for question, answer in pairs]


def field_questions(labels: Sequence[str]) -> list[dict[str, str]]:
    """Questions about a whole field, as far as a field reduced to a crop's size still shows the answer.

    Red cells are too many to be counted in words (their number is what detection gives), and the fine looks of a
    white cell are asked of its crop.

    Args:
        labels (`Sequence[str]`): Class of each visible cell.
    """
    white = [index for index, label in enumerate(labels) if label in WHITE_CELLS]
    pairs = [
        ("How many white blood cells are in the field?", str(len(white))),
        ("How many platelets are in the field?", str(sum(label == "platelet" for label in labels))),
        ("Are platelets seen in the field?", "yes" if "platelet" in labels else "no"),
    ]
    pairs += [(f"Is there a {name} in the field?", "yes" if name in labels else "no") for name in WHITE_CELLS]
    questions = [{"question": question.replace(" a eos", " an eos"), "answer": answer} for question, answer in pairs]
    if len(white) == 1:
        questions.append({"question": "What type of white blood cell is this?", "answer": labels[white[0]]})
    return questions


def cell_cloze(label: str, attributes: Mapping[str, str], rng: np.random.Generator) -> dict[str, str]:
    """A sentence about a white cell with one to three words left out.

    Returns:
        `dict[str, str]`: `masked` with sentinels in T5's order, `completed` the whole sentence.
    """
    words = {"label": label.capitalize(), **attributes}
    count = int(rng.integers(1, 4))
    blanks = set(rng.choice(_BLANK_SLOTS, size=count, replace=False).tolist())
    order = sorted(blanks, key=lambda name: _SENTENCE.index(f"{{{name}}}"))
    sentinels = {name: f"<extra_id_{number}>" for number, name in enumerate(order)}
    return {"masked": _SENTENCE.format(**(words | sentinels)), "completed": _SENTENCE.format(**words)}


def field_cloze(labels: Sequence[str], rng: np.random.Generator) -> list[dict[str, str]]:
    """Sentences about a field: one on its counts, and one on its white cell where there is only one."""
    white = [index for index, label in enumerate(labels) if label in WHITE_CELLS]
    words = [str(len(white)), str(sum(label == "platelet" for label in labels))]
    template = "The field shows {} white blood cells and {} platelets among the red blood cells."
    hidden = int(rng.integers(len(words)))
    masked = ["<extra_id_0>" if slot == hidden else word for slot, word in enumerate(words)]
    sentences = [{"masked": template.format(*masked), "completed": template.format(*words)}]
    if len(white) == 1:
        template = "The only white blood cell in the field is of the type {}."
        completed = template.format(labels[white[0]])
        sentences.append({"masked": template.format("<extra_id_0>"), "completed": completed})
    return sentences
