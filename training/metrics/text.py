"""Scores of answers and completed sentences."""

import re
from collections.abc import Sequence
from typing import Any


_SENTINEL = re.compile(r"<extra_id_\d+>")


def normalise(text: str) -> str:
    """Lower case, single spaces, no spaces before punctuation and no punctuation at the end."""
    text = re.sub(r"\s+", " ", text.lower()).strip()
    return re.sub(r" ([.,;:!?])", r"\1", text).rstrip(" .,;:!?")


def text_scores(predictions: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """Exact match, BLEU-4 and ROUGE-L.

    Args:
        predictions (`Sequence[str]`): Generated texts.
        references (`Sequence[str]`): True ones.

    Returns:
        `dict`: `exact_match` in 0..1, after `normalise`; `bleu4` in 0..100, sacrebleu's, of the whole corpus, lower
        case; `rougeL` in 0..1, mean F1; `texts`. `None` without texts.

    Raises:
        ValueError: Lists of different lengths.
    """
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references.")
    if not predictions:
        return {"exact_match": None, "bleu4": None, "rougeL": None, "texts": 0}
    from sacrebleu.metrics import BLEU

    exact = [normalise(a) == normalise(b) for a, b in zip(predictions, references)]
    bleu = BLEU(lowercase=True).corpus_score(list(predictions), [list(references)])
    rouge = [rouge_l(a, b) for a, b in zip(predictions, references)]
    return {
        "exact_match": sum(exact) / len(exact),
        "bleu4": float(bleu.score),
        "rougeL": sum(rouge) / len(rouge),
        "texts": len(exact),
    }


def rouge_l(prediction: str, reference: str) -> float:
    """F1 of the longest common subsequence of words (letters and digits, lower case), without stemming."""
    predicted, true = (re.findall(r"[a-z0-9]+", text.lower()) for text in (prediction, reference))
    if not predicted or not true:
        return 0.0
    row = [0] * (len(true) + 1)
    for word in predicted:
        diagonal = 0
        for index, other in enumerate(true, start=1):
            above = row[index]
            row[index] = diagonal + 1 if word == other else max(above, row[index - 1])
            diagonal = above
    return 2 * row[-1] / (len(predicted) + len(true))


def blank_accuracy(predictions: Sequence[str], references: Sequence[str], masked: Sequence[str]) -> float | None:
    """Share of blanks filled with the true words; none of a sentence whose other words were changed.

    Args:
        predictions (`Sequence[str]`): Completed sentences.
        references (`Sequence[str]`): True sentences.
        masked (`Sequence[str]`): The sentences with sentinels that were to be completed.

    Returns:
        `float` or `None`: In 0..1; `None` without blanks.
    """
    right = total = 0
    for predicted, true, blanks in zip(predictions, references, masked, strict=True):
        parts = [normalise_inside(part) for part in _SENTINEL.split(blanks)]
        pattern = re.compile(r"\s*(.+?)\s*".join(re.escape(part) for part in parts), re.DOTALL)
        wanted = pattern.fullmatch(normalise_inside(true))
        if wanted is None:
            continue
        given = pattern.fullmatch(normalise_inside(predicted))
        total += len(wanted.groups())
        if given is not None:
            right += sum(a == b for a, b in zip(given.groups(), wanted.groups()))
    return right / total if total else None


def normalise_inside(text: str) -> str:
    """Lower case and single spaces; punctuation stays."""
    return re.sub(r" ([.,;:!?])", r"\1", re.sub(r"\s+", " ", text.lower()).strip())
