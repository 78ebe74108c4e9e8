"""Classes of single-cell images."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from unihema.processing_unihema.class_names import cell_kind, is_white_cell
from unihema.processing_unihema.post_processing import most_probable_labels, single_cell_probabilities
from unihema.results.crop_framing import CropFrame, logits_in_frame
from unihema.training.data.rows import Row
from unihema.training.evaluation.measured import Measured, Resampler
from unihema.training.metrics.single_cell import classification_scores, one_hot_counts, scores_of_counts


class MeasuredCells(Measured):
    """Predicted and true label of each image, and the probabilities of all classes. Crops are framed as `unihema predict` frames
    them. Where the truth is a group, such as any white cell, all its classes are right."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.scored: list[tuple[str, float, bool]] = []

    def answers(self) -> list[tuple[str, float, bool]]:
        return self.scored

    def add(self, batch: dict[str, Any], rows: Sequence[Row]) -> None:
        config = self.model.config
        logits = self.model(task="single_cell", **self.inputs(batch)).logits.float()
        if (known := CropFrame.of_checkpoint(config.trained.crop_frame)) is not None:
            crops = [Image.fromarray(crop.permute(1, 2, 0).numpy()) for crop in batch["crops"]]
            logits, _ = logits_in_frame(crops, logits, known, self._logits)
        probabilities = single_cell_probabilities(logits, config)
        predicted = most_probable_labels(probabilities, config)
        scores = probabilities.gather(1, predicted[:, None].to(probabilities.device))[:, 0].tolist()
        members = config.single_cell_members
        for index, found, score, true, of_all in zip(
            batch["row_indices"],
            predicted.tolist(),
            scores,
            batch["labels"].tolist(),
            probabilities.cpu().numpy(),
            strict=True,
        ):
            self.keep(rows[index], (true if members[true][found] else found, true, of_all))
            if true >= 0:
                self.scored.append((config.single_cell_labels[found], score, bool(members[true][found])))

    def _logits(self, views: list[Image.Image]) -> torch.Tensor:
        batch = dict(self.processor.image_processor(views, task="single_cell").to(self.model.device))
        return self.model(task="single_cell", **batch).logits

    def figures(self, part: bool = False) -> dict[str, Any]:
        predicted, true, of_all = zip(*self.records)
        figures = classification_scores(predicted, true, self.model.config.single_cell_names)
        known = [number for number, label in enumerate(true) if label >= 0]
        if known:
            labels = [true[number] for number in known]
            figures |= self._kinds([predicted[number] for number in known], labels)
            figures |= self._types(labels, np.stack([of_all[number] for number in known]))
        if part:
            figures["per_class"] = {name: values for name, values in figures["per_class"].items() if values["cells"]}
            del figures["confusion"]
        return figures

    def _kinds(self, predicted: Sequence[int], true: Sequence[int]) -> dict[str, Any]:
        """How often the kind of cell is right, of those whose kind is known."""
        config = self.model.config
        kinds = [cell_kind(name, config.single_cell_parents) for name in config.single_cell_names]
        right = [kinds[found] == kinds[label] for found, label in zip(predicted, true, strict=True) if kinds[label]]
        return {"kinds": {"accuracy": float(np.mean(right)), "cells": len(right)}} if right else {}

    def _types(self, true: Sequence[int], probabilities: np.ndarray) -> dict[str, Any]:
        """How often the type of a white cell is right where it must be one of those that the data have."""
        config = self.model.config
        of_white = [is_white_cell(name, config.single_cell_parents) for name in config.single_cell_labels]
        among = sorted({label for label in true if label < len(of_white) and of_white[label]})
        chosen = np.isin(true, among)
        if len(among) < 2:
            return {}
        best = np.array(among)[probabilities[chosen][:, among].argmax(1)]
        right = best == np.array(true)[chosen]
        recalls = [float(right[np.array(true)[chosen] == label].mean()) for label in among]
        names = [config.single_cell_labels[label] for label in among]
        found = {"accuracy": float(right.mean()), "mean_recall": float(np.mean(recalls)), "cells": int(chosen.sum())}
        return {"types": found | {"among": names}}

    def resampler(self) -> Resampler:
        names = self.model.config.single_cell_names
        predicted, true, _ = zip(*self.records)
        counts = one_hot_counts(predicted, true, len(names))

        def figures(weights: np.ndarray) -> dict[str, float | None]:
            right, cells, found = np.tensordot(weights, counts, 1)
            scores, f1 = scores_of_counts(right, cells, found)
            return scores | {f"per_class {name} f1": f1[n] for n, name in enumerate(names) if cells[n]}

        return figures
