"""SAHI: prediction in slices with a UniHema checkpoint.

SAHI's own class for models of Transformers takes the scores of every class that it does not know by name through a softmax with
a last "no object" class. UniHema's are a sigmoid for each class, so a class of its own stands here.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from unihema.analyzer import Analyzer
from unihema.errors import PackageMissingError
from unihema.results.export import outline
from unihema.results.smear_result import SmearResult


try:
    from sahi.models.base import DetectionModel
    from sahi.prediction import ObjectPrediction
    from sahi.utils.compatibility import fix_full_shape_list, fix_shift_amount_list
except ImportError as error:
    raise PackageMissingError("SAHI is not installed: pip install 'unihema[sahi]'.") from error


class UniHemaDetectionModel(DetectionModel):
    """A checkpoint as SAHI's functions take a model.

    Args:
        model_path (`str` or `Path`, *optional*): As of [`Analyzer.from_pretrained`].
        model ([`Analyzer`], *optional*): Instead of `model_path`.
        confidence_threshold (`float`, *optional*): Smallest score for all classes, instead of the checkpoint's calibrated one of
            each.
        **options: `device`, `category_remapping` and others of SAHI's `DetectionModel`.

    Example:

    ```python
    >>> from sahi.predict import get_sliced_prediction
    >>> from unihema.plugs.sahi import UniHemaDetectionModel

    >>> model = UniHemaDetectionModel("unihema", device="cpu")
    >>> found = get_sliced_prediction("smear.png", model, slice_height=512, slice_width=512)
    ```
    """

    def __init__(
        self,
        model_path: Any = None,
        model: Analyzer | None = None,
        confidence_threshold: float | None = None,
        **options: Any,
    ):
        super().__init__(model_path, model, confidence_threshold=confidence_threshold, **options)

    @property
    def num_categories(self) -> int:
        """Number of classes."""
        return len(self.category_mapping)

    def load_model(self) -> None:
        """Loads the checkpoint."""
        self.set_model(Analyzer.from_pretrained(self.model_path, device=self.device))

    def set_model(self, model: Analyzer, **options: Any) -> None:
        """Takes an analyzer."""
        self.model = model
        # SAHI compares it with numbers, so the lowest of the calibrated ones stands for them all.
        self.calibrated = min(model.model.config.class_thresholds(None))
        if self.confidence_threshold is None:
            self.confidence_threshold = self.calibrated
        self.category_mapping = dict(enumerate(model.model.config.class_names))

    def perform_inference(self, image: np.ndarray) -> None:
        """Finds the cells of a slice, RGB `[h, w, 3]`."""
        self.perform_batch_inference([image])

    def perform_batch_inference(self, images: list[np.ndarray]) -> None:
        """Finds the cells of slices together."""
        threshold = None if self.confidence_threshold == self.calibrated else self.confidence_threshold
        # A slice is what the model sees; tiles of a slice would cut the image twice.
        self._original_predictions = self.model.analyze_images(images, "detection", threshold=threshold, tiles="off")

    def _create_object_prediction_list_from_original_predictions(
        self, shift_amount_list: Any = ((0, 0),), full_shape_list: Any = None
    ) -> None:
        # SAHI's base class asks its subclasses for this method.
        results: Sequence[SmearResult] = self._original_predictions
        shifts = fix_shift_amount_list(shift_amount_list)
        shapes = fix_full_shape_list(full_shape_list) or [None] * len(results)
        numbers = {name: number for number, name in self.category_mapping.items()}
        self._object_prediction_list_per_image = [
            [
                ObjectPrediction(
                    bbox=list(cell.box),
                    category_id=numbers[cell.label],
                    category_name=cell.label,
                    # None, not an empty list, is a cell without a mask there.
                    segmentation=[np.ravel(outer[:-1]).tolist() for outer, *_ in outline(cell)] or None,
                    score=cell.score,
                    shift_amount=shift,
                    full_shape=shape,
                )
                for cell in result.cells
            ]
            for result, shift, shape in zip(results, shifts, shapes, strict=True)
        ]


__all__ = ["UniHemaDetectionModel"]
