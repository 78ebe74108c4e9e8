"""Home and abroad: figures of the sources that a model was trained on and of those that it was not, and whether it can tell."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch

from unihema.modeling_unihema.outputs import UniHemaImageFeatures
from unihema.results.out_of_distribution import TaskReference, image_scores
from unihema.training.data.rows import Row


HOME, ABROAD = "sources in training", "sources not in training"
# Share of the images of sources in training that are warned of, where the share of the others is stated.
FALSE_ALARMS = 0.01


def groups_of(names: Sequence[str], home: Collection[str]) -> dict[str, list[str]]:
    """Names of data sets by group, those of the training first; a group without any is left out.

    Args:
        names (`Sequence[str]`): Data sets that are measured.
        home (`Collection[str]`): Data sets of the training; empty where they are not known, and then there are no groups.
    """
    if not home:
        return {}
    found = {HOME: [name for name in names if name in home], ABROAD: [name for name in names if name not in home]}
    return {group: own for group, own in found.items() if own}


class Distances:
    """How far images are from those that a model was trained on, in parts of the limit of the nearest data set.

    Args:
        reference ([`TaskReference`]): Of the task.
        processor ([`UniHemaProcessor`]): Of the model.
    """

    def __init__(self, reference: TaskReference, processor: Any):
        self.reference, self.processor = reference, processor
        self._found: list[np.ndarray] = []

    def __call__(self, features: UniHemaImageFeatures, pixels: torch.Tensor) -> None:
        """Takes the images of a batch."""
        pooled, _ = image_scores(features, pixels, self.processor)
        self._found.append((self.reference.gaussians.distances(pooled) / self.reference.limits).min(1))

    def figures(self, rows: Sequence[Row], home: Collection[str]) -> dict[str, Any]:
        """What a warning of such images is worth.

        Args:
            rows (`Sequence[Row]`): Of the images, in the order in which they came.
            home (`Collection[str]`): Data sets of the training.

        Returns:
            `dict[str, Any]`: `warned`: data set -> share of its images beyond the limit; where there are images of both groups,
            `auc` (how often one from elsewhere is further away than one of the training), and `warned_at_1_percent`: the share of
            those from elsewhere that is warned of where 1 % of the others are.
        """
        distances, names = np.concatenate(self._found), np.array([row["dataset"] for row in rows])
        warned = {name: float((distances[names == name] > 1).mean()) for name in dict.fromkeys(names.tolist())}
        found: dict[str, Any] = {"warned": warned}
        of_home = np.isin(names, list(home))
        if of_home.any() and not of_home.all():
            known, other = distances[of_home], distances[~of_home]
            below = np.searchsorted(np.sort(known), other, "left") + np.searchsorted(np.sort(known), other, "right")
            found["auc"] = float(below.mean() / 2 / len(known))
            found["warned_at_1_percent"] = float((other > np.quantile(known, 1 - FALSE_ALARMS)).mean())
        return found


__all__ = ["ABROAD", "HOME", "Distances", "groups_of"]
