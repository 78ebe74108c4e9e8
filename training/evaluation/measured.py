"""What every task's measurement has in common: results row by row, of which any part can be scored."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch

from unihema.modeling_unihema.outputs import UniHemaImageFeatures
from unihema.training.data.rows import Row


# From how often each row counts to figures; `None` where there is nothing to measure.
Resampler = Callable[[np.ndarray], Mapping[str, float | None]]
# Gets the image features and the pixels of a batch.
FeatureListener = Callable[[UniHemaImageFeatures, torch.Tensor], None]


class Measured(ABC):
    """What a model said of rows of one task.

    Args:
        model (`UniHemaForMultiTask`): The model.
        processor (`UniHemaProcessor`): Its processor.
        on_features (`Callable`, *optional*): Gets the image features and pixels of every batch.
    """

    def __init__(self, model: Any, processor: Any, on_features: FeatureListener | None = None):
        self.model, self.processor, self.on_features = model, processor, on_features
        self.rows: list[Row] = []
        self.records: list[Any] = []

    @abstractmethod
    def add(self, batch: dict[str, Any], rows: Sequence[Row]) -> None:
        """Asks the model about a batch of a `SmearDataset` of `rows`, and keeps what it says."""

    @abstractmethod
    def figures(self, part: bool = False) -> dict[str, Any]:
        """The scores.

        Args:
            part (`bool`): These are the rows of one data set among several: only the classes that it annotates are
                listed, and no long lists.
        """

    @abstractmethod
    def resampler(self) -> Resampler:
        """What gives the main figures of any resample of the rows, quickly."""

    def answers(self) -> list[tuple[str, float, bool]]:
        """Of each answer that has a score, as it is shown: its class, its score, and whether it is right."""
        return []

    def keep(self, row: Row, record: Any) -> None:
        """Keeps the result of a row."""
        self.rows.append(row)
        self.records.append(record)

    def of_datasets(self, names: Collection[str]) -> Self:
        """The results of some data sets."""
        part = copy.copy(self)
        chosen = [number for number, row in enumerate(self.rows) if row["dataset"] in names]
        part.rows, part.records = [self.rows[n] for n in chosen], [self.records[n] for n in chosen]
        return part

    def inputs(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The model's inputs of a batch, on its device."""
        names = ("pixel_values", "pixel_mask", "input_ids", "attention_mask", "text_only")
        inputs = {name: batch[name] for name in names if name in batch}
        inputs = {
            name: value.to(self.model.device) if hasattr(value, "to") else value for name, value in inputs.items()
        }
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        if self.on_features is not None:
            pixels = inputs.pop("pixel_values")
            inputs["image_features"] = self.model.get_image_features(pixels, inputs.pop("pixel_mask"))
            self.on_features(inputs["image_features"], pixels)
        return inputs


def class_names(model: Any) -> list[str]:
    """The detection classes of a model, in the order of their ids."""
    return model.config.class_names
