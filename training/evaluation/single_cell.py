"""Classes of single-cell images."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from unihema.processing_unihema.post_processing import most_probable_labels, single_cell_probabilities
from unihema.training.data.rows import Row
from unihema.training.evaluation.measured import Measured, Resampler
from unihema.training.metrics.single_cell import classification_scores, one_hot_counts, scores_of_counts


class MeasuredCells(Measured):
    """Predicted and true label of each image. Where the truth is a group, such as any white cell, all its classes are right."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.scored: list[tuple[str, float, bool]] = []

    def answers(self) -> list[tuple[str, float, bool]]:
        return self.scored

    def add(self, batch: dict[str, Any], rows: Sequence[Row]) -> None:
        config = self.model.config
        logits = self.model(task="single_cell", **self.inputs(batch)).logits
        probabilities = single_cell_probabilities(logits, config)
        predicted = most_probable_labels(probabilities, config)
        scores = probabilities.gather(1, predicted[:, None].to(probabilities.device))[:, 0].tolist()
        members = config.single_cell_members
        for index, found, score, true in zip(
            batch["row_indices"], predicted.tolist(), scores, batch["labels"].tolist()
        ):
            self.keep(rows[index], (true if members[true][found] else found, true))
            if true >= 0:
                self.scored.append((config.single_cell_labels[found], score, bool(members[true][found])))

    def figures(self, part: bool = False) -> dict[str, Any]:
        predicted, true = zip(*self.records)
        figures = classification_scores(predicted, true, self.model.config.single_cell_names)
        if part:
            figures["per_class"] = {name: values for name, values in figures["per_class"].items() if values["cells"]}
            del figures["confusion"]
        return figures

    def resampler(self) -> Resampler:
        names = self.model.config.single_cell_names
        predicted, true = zip(*self.records)
        counts = one_hot_counts(predicted, true, len(names))

        def figures(weights: np.ndarray) -> dict[str, float | None]:
            right, cells, found = np.tensordot(weights, counts, 1)
            scores, f1 = scores_of_counts(right, cells, found)
            return scores | {f"per_class {name} f1": f1[n] for n, name in enumerate(names) if cells[n]}

        return figures
