"""Masks, measured at the size of the image."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from unihema.training.data.layouts.masks import read_mask
from unihema.training.data.rows import Row
from unihema.training.evaluation.measured import Measured, Resampler
from unihema.training.metrics.dice import dice_scores, mask_counts, weighted_dice


class MeasuredMasks(Measured):
    """Pixels of each image that are in the predicted and in the true mask."""

    def add(self, batch: dict[str, Any], rows: Sequence[Row]) -> None:
        output = self.model(task="segmentation", **self.inputs(batch))
        masks = self.processor.image_processor.post_process_semantic_segmentation(
            output,
            target_sizes=batch["target_sizes"],
            pixel_mask=batch["pixel_mask"],
            threshold=self.model.config.trained.segmentation_threshold,
        )
        for index, mask in zip(batch["row_indices"], masks):
            true = torch.from_numpy(read_mask(rows[index]["mask"], rows[index].get("mask_levels")))
            if true.shape != mask.shape:
                # Very large images are reduced on opening; the mask follows.
                true = torch.nn.functional.interpolate(true[None, None].float(), size=mask.shape)[0, 0]
            self.keep(rows[index], mask_counts(mask.cpu().numpy(), true.numpy()))

    def figures(self, part: bool = False) -> dict[str, Any]:
        return dice_scores(self.records)

    def resampler(self) -> Resampler:
        counts = np.array(self.records)
        return lambda weights: weighted_dice(counts, weights)
