"""Boxes: formats, overlap, and the logit they are refined in."""

import torch


def box_cxcywh_to_xyxy(boxes: torch.Tensor) -> torch.Tensor:
    """`[..., 4]` centre, width and height to corners."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat((centre - half, centre + half), -1)


def box_xyxy_to_cxcywh(boxes: torch.Tensor) -> torch.Tensor:
    """`[..., 4]` corners to centre, width and height."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat(((low + high) / 2, high - low), -1)


def inverse_sigmoid(x: torch.Tensor, eps: float = 1e-3) -> torch.Tensor:
    """Logit of `x` in 0..1, finite at both ends.

    Args:
        x (`torch.Tensor`): Any shape; clamped to 0..1.
        eps (`float`): Smallest numerator and denominator (DINO's 1e-3).
    """
    return torch.log(x.clamp(eps, 1.0) / (1 - x).clamp(eps, 1.0))


def _area(boxes: torch.Tensor) -> torch.Tensor:
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def _overlap(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """IoU and union of xyxy boxes, broadcast over the leading dimensions."""
    size = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
    intersection = size[..., 0] * size[..., 1]
    union = _area(a) + _area(b) - intersection
    return intersection / union.clamp(min=1e-9), union


def _generalized(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    iou, union = _overlap(a, b)
    size = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    hull = size[..., 0] * size[..., 1]
    return iou - (hull - union) / hull.clamp(min=1e-9)


def box_iou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Intersection over union `[n, m]` of every pair of xyxy boxes `[n, 4]` and `[m, 4]`."""
    return _overlap(a[:, None], b[None])[0]


def generalized_box_iou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Generalised IoU (arXiv 1902.09630) `[n, m]` of every pair of xyxy boxes `[n, 4]` and `[m, 4]`."""
    return _generalized(a[:, None], b[None])


def generalized_box_iou_pairs(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Generalised IoU `[n]` of xyxy boxes `[n, 4]`, pair by pair."""
    return _generalized(a, b)
