"""Prompt templates, and the numbering of sentinels (official code: models/dino/dino.py, app.py)."""

import re
from collections.abc import Sequence

from unihema.errors import InputError
from unihema.modeling_unihema.tasks import TASK_TABLE


_NAMES_TEMPLATE = "This image is for the detection of {names} cells"
_SENTINEL = re.compile(r"<extra_id_\d+>|_{3,}")


def names_prompt(names: str | Sequence[str]) -> str:
    """Prompt of detection and segmentation: which cells, or which disease, is asked for.

    Args:
        names (`str` or `Sequence[str]`): Class names or a disease; repeated names are kept once, in order.

    Raises:
        ValueError: No name.
    """
    names = [names] if isinstance(names, str) else names
    names = [name for name in dict.fromkeys(name.strip() for name in names) if name]
    if not names:
        raise InputError("A detection or segmentation prompt needs at least one class name or disease.")
    return _NAMES_TEMPLATE.format(names=", ".join(names))


def question_prompt(question: str) -> str:
    """`Q: ` and the question.

    Raises:
        ValueError: An empty question.
    """
    if not question.strip():
        raise InputError("The question is empty: ask something about the image.")
    return f"Q: {question.strip()}"


def cloze_prompt(sentence: str) -> str:
    """`mask: ` and the sentence, its blanks numbered with sentinels.

    Args:
        sentence (`str`): Blanks are sentinels of any number, or three or more underscores.

    Raises:
        ValueError: No blank.
    """
    return f"mask: {number_blanks(sentence)}"


def number_blanks(sentence: str) -> str:
    """Blanks (`<extra_id_N>`, or `___`) renumbered `<extra_id_0>`, `<extra_id_1>`... from left to right.

    Raises:
        ValueError: No blank.
    """
    parts = _SENTINEL.split(sentence.strip())
    if len(parts) < 2:
        raise InputError(f"No blank in {sentence!r}: mark each word to fill in with ___ or <extra_id_0>.")
    return parts[0] + "".join(f"<extra_id_{i}>{part}" for i, part in enumerate(parts[1:]))


def fill_blanks(sentence: str, answers: Sequence[str]) -> str:
    """The sentence with its blanks replaced by `answers`, in order.

    Raises:
        ValueError: As many answers as blanks are needed.
    """
    parts = _SENTINEL.split(sentence)
    if len(parts) - 1 != len(answers):
        raise InputError(f"{len(answers)} answers for {len(parts) - 1} blanks in {sentence!r}.")
    return parts[0] + "".join(answer + part for answer, part in zip(answers, parts[1:], strict=True))


def task_prompt(task: str, text: str | Sequence[str]) -> str:
    """The model's input text for a task.

    Args:
        task (`str`): One of `TASKS`, but for single_cell, which reads no text.
        text (`str` or `Sequence[str]`): Class names for detection and segmentation, else a question or sentence.

    Raises:
        ValueError: Unknown task, or a text the task cannot use.
    """
    reading = [name for name, row in TASK_TABLE.items() if row.reads_text]
    if task not in reading:
        raise InputError(f"Task '{task}' reads no text; texts go with {', '.join(reading)}.")
    if not TASK_TABLE[task].generates_text:
        return names_prompt(text)
    return cloze_prompt(text) if task == "cloze" else question_prompt(text)
