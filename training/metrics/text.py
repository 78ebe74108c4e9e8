"""Scores of answers and completed sentences."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from unihema.errors import InputError


BLEU_ORDERS = (1, 2, 3, 4)
_SENTINEL = re.compile(r"<extra_id_\d+>")


def normalise(text: str) -> str:
    """Lower case, single spaces, no spaces before punctuation and no punctuation at the end."""
    text = re.sub(r"\s+", " ", text.lower()).strip()
    return re.sub(r" ([.,;:!?])", r"\1", text).rstrip(" .,;:!?")


def text_scores(predictions: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """Exact match, BLEU-1 to 4 and ROUGE-L.

    Args:
        predictions (`Sequence[str]`): Generated texts.
        references (`Sequence[str]`): True ones.

    Returns:
        `dict`: `exact_match` in 0..1, after `normalise`; `bleu1` to `bleu4` in 0..100, sacrebleu's, of the whole corpus,
        lower case, of the n-grams up to that length; `rougeL` in 0..1, mean F1; `texts`. `None` without texts.

    Raises:
        ValueError: Lists of different lengths.
    """
    statistics = text_statistics(predictions, references)
    return {**weighted_text_scores(statistics, np.ones(len(statistics))), "texts": len(statistics)}


def text_statistics(predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """What each text adds to the figures of a corpus.

    Returns:
        `np.ndarray`: `[n, 12]`: exact match, ROUGE-L, right n-grams of 1 to 4 words, all predicted ones, lengths of
        prediction and reference.

    Raises:
        ValueError: Lists of different lengths.
    """
    if len(predictions) != len(references):
        raise InputError(f"{len(predictions)} predictions for {len(references)} references.")
    from sacrebleu.metrics import BLEU

    bleu = BLEU(lowercase=True, effective_order=True)
    found: dict[tuple[str, str], list[float]] = {}
    for pair in zip(predictions, references):
        # Answers repeat: a question has few of them.
        if pair not in found:
            predicted, true = pair
            score = bleu.sentence_score(predicted, [true])
            exact = float(normalise(predicted) == normalise(true))
            lengths = (score.sys_len, score.ref_len)
            found[pair] = [exact, rouge_l(predicted, true), *score.counts, *score.totals, *lengths]
    return np.array([found[pair] for pair in zip(predictions, references)]).reshape(-1, 12)


def weighted_text_scores(statistics: np.ndarray, weights: np.ndarray) -> dict[str, float | None]:
    """The figures of `text_scores` where each text counts as often as its weight says.

    Args:
        statistics (`np.ndarray`): Of `text_statistics`, `[n, 12]`.
        weights (`np.ndarray`): Whole numbers, `[n]`.
    """
    texts = float(weights.sum())
    if not texts:
        return dict.fromkeys(("exact_match", *(f"bleu{order}" for order in BLEU_ORDERS), "rougeL"))
    from sacrebleu.metrics import BLEU

    sums = weights @ statistics
    right, total = (sums[start : start + 4].astype(int).tolist() for start in (2, 6))
    predicted, true = sums[10:].astype(int).tolist()
    bleu = {
        f"bleu{order}": float(
            BLEU.compute_bleu(
                right[:order], total[:order], predicted, true, smooth_method="exp", max_ngram_order=order
            ).score
        )
        for order in BLEU_ORDERS
    }
    return {"exact_match": float(sums[0] / texts), **bleu, "rougeL": float(sums[1] / texts)}


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
    right, total = np.sum(blank_counts(predictions, references, masked), axis=0)
    return float(right / total) if total else None


def blank_counts(predictions: Sequence[str], references: Sequence[str], masked: Sequence[str]) -> np.ndarray:
    """Blanks of each sentence that are filled with the true words, and all of them: `[n, 2]`; see `blank_accuracy`."""
    counts = np.zeros((len(predictions), 2), dtype=int)
    for number, (predicted, true, blanks) in enumerate(zip(predictions, references, masked, strict=True)):
        parts = [normalise_inside(part) for part in _SENTINEL.split(blanks)]
        pattern = re.compile(r"\s*(.+?)\s*".join(re.escape(part) for part in parts), re.DOTALL)
        wanted = pattern.fullmatch(normalise_inside(true))
        if wanted is None:
            continue
        given = pattern.fullmatch(normalise_inside(predicted))
        filled = 0 if given is None else sum(a == b for a, b in zip(given.groups(), wanted.groups()))
        counts[number] = filled, len(wanted.groups())
    return counts


def normalise_inside(text: str) -> str:
    """Lower case and single spaces; punctuation stays."""
    return re.sub(r" ([.,;:!?])", r"\1", re.sub(r"\s+", " ", text.lower()).strip())
