"""Losses of the attributes read off a cell; labels may be missing."""

from collections.abc import Sequence

import torch
from torch.nn import functional

from .detection_labels import MISSING
from .loss_counts import average_over_processes


def morphology_loss(logits: torch.Tensor, targets: torch.Tensor, value_counts: Sequence[int]) -> torch.Tensor:
    """Softmax cross-entropy of each attribute over its own values, averaged over the labelled entries of all processes.

    Args:
        logits (`torch.Tensor`): `[N, sum(value_counts)]`, attributes one after another.
        targets (`torch.Tensor`): Index of the value, int64 `[N, attributes]`; -100 (missing) costs nothing.
        value_counts (`Sequence[int]`): Values of each attribute.

    Returns:
        `torch.Tensor`: Scalar; 0, but with a graph, when every entry is missing.

    Raises:
        ValueError: The width of `logits` is not `sum(value_counts)`, or that of `targets` not the attributes.
    """
    if logits.shape[-1] != sum(value_counts):
        raise ValueError(
            f"Morphology logits are {logits.shape[-1]} wide, but the attributes have {sum(value_counts)} values "
            f"({list(value_counts)})."
        )
    if targets.shape[-1] != len(value_counts):
        raise ValueError(f"Morphology labels have {targets.shape[-1]} attributes, but the model {len(value_counts)}.")
    logits = logits.float()
    total = logits.sum() * 0
    for attribute, values in enumerate(logits.split(list(value_counts), -1)):
        total = total + functional.cross_entropy(values, targets[:, attribute], ignore_index=MISSING, reduction="sum")
    (count,) = average_over_processes((targets != MISSING).sum(), device=logits.device)
    return total / count


def asymmetric_morphology_loss(
    logits: torch.Tensor, targets: torch.Tensor, value_counts: Sequence[int], normaliser: torch.Tensor
) -> torch.Tensor:
    """The official code's morphology loss: asymmetric loss (arXiv 2009.14119) of each value on its own, summed.

    Focusing exponents 1 (the labelled value) and 4 (the others), probability shift 0.08, no gradient through the focus.

    Args:
        logits (`torch.Tensor`): `[N, sum(value_counts)]`, attributes one after another.
        targets (`torch.Tensor`): Index of the value, int64 `[N, attributes]`; -100 (missing) costs nothing.
        value_counts (`Sequence[int]`): Values of each attribute.
        normaliser (`torch.Tensor`): What the sum is divided by: the number of cells.

    Returns:
        `torch.Tensor`: Scalar, with a graph.
    """
    logits = logits.float()
    total = logits.sum() * 0
    for attribute, values in enumerate(logits.split(list(value_counts), -1)):
        known = targets[:, attribute] != MISSING
        values, value = values[known], targets[known, attribute]
        wanted = functional.one_hot(value, values.shape[-1]).to(values.dtype)
        probability = values.sigmoid()
        right = torch.where(wanted.bool(), probability, (1 - probability + 0.08).clamp(max=1))
        focus = (1 - right.detach()) ** (wanted + 4 * (1 - wanted))
        total = total - (focus * right.clamp(min=1e-8).log()).sum()
    return total / normaliser


__all__ = ["asymmetric_morphology_loss", "morphology_loss"]
