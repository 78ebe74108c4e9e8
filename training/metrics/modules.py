"""The metrics as `evaluate` modules: instantiate one and `compute`, `add_batch` or `evaluate.combine`; nothing is loaded.

```python
>>> from unihema.training.metrics.modules import DiceMetric

>>> DiceMetric().compute(predictions=[[[0, 1]]], references=[[[0, 1]]])["dice"]
1.0
```
"""

from typing import Any

import datasets
import evaluate

from unihema.training.metrics.detection import mean_average_precision
from unihema.training.metrics.dice import dice_scores, mask_counts
from unihema.training.metrics.morphology import morphology_scores
from unihema.training.metrics.single_cell import classification_scores
from unihema.training.metrics.text import text_scores


class _OfflineMetric(evaluate.Metric):
    """What the metrics share; each gives its `summary` and `_features()`."""

    summary = ""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.summary,
            citation="",
            inputs_description="See the function of the same name in unihema.training.metrics.",
            features=self._features(),
        )


class DetectionMetric(_OfflineMetric):
    """See `mean_average_precision`; `compute` takes `class_names`. An empty `annotated_classes` stands for all. Crowds
    (`iscrowd`) are for the function alone."""

    summary = "COCO mean average precision of boxes."

    def _features(self) -> datasets.Features:
        boxes = datasets.List(datasets.List(datasets.Value("float32")))
        labels = datasets.List(datasets.Value("int64"))
        scores = datasets.List(datasets.Value("float32"))
        return datasets.Features(
            {
                "predictions": {"boxes": boxes, "scores": scores, "labels": labels},
                "references": {"boxes": boxes, "labels": labels, "annotated_classes": labels},
            }
        )

    def _compute(self, predictions: list, references: list, class_names: list[str]) -> dict[str, Any]:
        references = [
            {**reference, "annotated_classes": reference.get("annotated_classes") or None} for reference in references
        ]
        return mean_average_precision(predictions, references, class_names)


class DiceMetric(_OfflineMetric):
    """See `dice_scores`; masks `[H, W]`, nonzero = cell."""

    summary = "Dice and intersection over union of masks, means over images and pooled over pixels."

    def _features(self) -> datasets.Features:
        mask = datasets.List(datasets.List(datasets.Value("uint8")))
        return datasets.Features({"predictions": mask, "references": mask})

    def _compute(self, predictions: list, references: list) -> dict[str, Any]:
        return dice_scores(mask_counts(a, b) for a, b in zip(predictions, references))


class SingleCellMetric(_OfflineMetric):
    """See `classification_scores`; `compute` takes `class_names`."""

    summary = "Accuracy, macro-F1 and weighted F1 of a classification."

    def _features(self) -> datasets.Features:
        return datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})

    def _compute(self, predictions: list, references: list, class_names: list[str]) -> dict[str, Any]:
        return classification_scores(predictions, references, class_names)


class MorphologyMetric(_OfflineMetric):
    """See `morphology_scores`; `compute` takes `schema`, and optionally `cells`."""

    summary = "Accuracy and macro-F1 of each attribute of matched cells."

    def _features(self) -> datasets.Features:
        values = datasets.List(datasets.Value("int64"))
        return datasets.Features({"predictions": values, "references": values})

    def _compute(self, predictions: list, references: list, schema: dict, cells: int | None = None) -> dict[str, Any]:
        return morphology_scores(predictions, references, schema, cells)


class TextMetric(_OfflineMetric):
    """See `text_scores`."""

    summary = "Exact match, BLEU-1 to 4 and ROUGE-L of generated text."

    def _features(self) -> datasets.Features:
        return datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})

    def _compute(self, predictions: list, references: list) -> dict[str, Any]:
        return text_scores(predictions, references)
