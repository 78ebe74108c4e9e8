"""Answers and completed sentences."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unihema.training.data.rows import Row
from unihema.training.evaluation.measured import Measured, Resampler
from unihema.training.metrics.text import (
    blank_counts,
    normalise,
    text_scores,
    text_statistics,
    weighted_text_scores,
)


# Questions that the report lists one by one: those asked most often, and more than once.
LISTED_QUESTIONS = 40


class MeasuredTexts(Measured):
    """Generated and true text of each question or masked sentence.

    Args:
        model (`UniHemaForMultiTask`): The model.
        processor (`UniHemaProcessor`): Its processor.
        task (`str`): `question_answering` or `cloze`.
        generate_kwargs (`Mapping[str, Any]`): For `generate`; greedy by default.
    """

    def __init__(self, model: Any, processor: Any, task: str, generate_kwargs: Mapping[str, Any]):
        super().__init__(model, processor)
        self.options = {"max_new_tokens": processor.max_text_length, "num_beams": 1, "do_sample": False}
        self.options |= generate_kwargs
        self.asked, self.answer = ("question", "answer") if task == "question_answering" else ("masked", "completed")

    def add(self, batch: dict[str, Any], rows: Sequence[Row]) -> None:
        generated = self.model.generate(**self.inputs(batch), **self.options)
        for index, answer in zip(batch["row_indices"], self.processor.decode_answers(generated), strict=True):
            # The places left over in an image's last sample repeat a question under index -1.
            if index >= 0:
                self.keep(rows[index], answer)

    def figures(self, part: bool = False) -> dict[str, Any]:
        figures = text_scores(self.records, self._expected())
        if self.answer == "completed":
            right, blanks = self._blanks().sum(axis=0)
            figures["blank_accuracy"] = float(right / blanks) if blanks else None
        elif not part:
            figures["per_question"] = self._per_question()
        return figures

    def resampler(self) -> Resampler:
        statistics = text_statistics(self.records, self._expected())
        blanks = self._blanks() if self.answer == "completed" else None

        def figures(weights: np.ndarray) -> dict[str, float | None]:
            scores = weighted_text_scores(statistics, weights)
            if blanks is not None:
                right, total = weights @ blanks
                scores["blank_accuracy"] = float(right / total) if total else None
            return scores

        return figures

    def _expected(self) -> list[str]:
        return [row[self.answer] for row in self.rows]

    def _blanks(self) -> np.ndarray:
        return blank_counts(self.records, self._expected(), [row[self.asked] for row in self.rows])

    def _per_question(self) -> dict[str, dict[str, Any]]:
        asked, right = Counter(), Counter()
        for row, answer in zip(self.rows, self.records):
            asked[row[self.asked]] += 1
            right[row[self.asked]] += normalise(answer) == normalise(row[self.answer])
        return {
            question: {"exact_match": right[question] / count, "texts": count}
            for question, count in asked.most_common(LISTED_QUESTIONS)
            if count > 1
        }
