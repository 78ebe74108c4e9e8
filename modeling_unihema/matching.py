"""Hungarian matching of queries to cells, image by image (DETR, arXiv 2005.12872, section 3.1)."""

import torch

from .box_geometry import box_cxcywh_to_xyxy, generalized_box_iou
from .detection_labels import boxes_known


@torch.no_grad()
def match_queries(
    logits: torch.Tensor,
    boxes: torch.Tensor,
    labels: list[dict[str, torch.Tensor]],
    class_cost: float = 2.0,
    bbox_cost: float = 5.0,
    giou_cost: float = 2.0,
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The cheapest one-to-one assignment of queries to the cells of each image.

    The cost is that of the losses: focal classification, L1 and generalised IoU. One matrix an image, so the work grows
    linearly with the batch.

    Args:
        logits (`torch.Tensor`): Class logits `[B, Q, C]`.
        boxes (`torch.Tensor`): Boxes cxcywh `[B, Q, 4]`.
        labels (`list[dict[str, torch.Tensor]]`): `class_labels` `[n]` and `boxes` `[n, 4]` of each image. Where there is
            `positive`, bool `[n, C]`, the classification cost is the mean over the classes of a cell. A cell that is
            `False` in `boxes_known`, bool `[n]`, is matched by class alone.
        class_cost (`float`): Weight of the classification cost.
        bbox_cost (`float`): Weight of the L1 cost.
        giou_cost (`float`): Weight of the generalised IoU cost.
        alpha (`float`): Focal loss alpha.
        gamma (`float`): Focal loss gamma.

    Returns:
        `list[tuple[torch.Tensor, torch.Tensor]]`: For each image the matched query and target indices, int64, on the
        device of `logits`.

    Raises:
        RuntimeError: A logit or box is NaN or infinite.
    """
    # Only training needs SciPy's optimiser, and it is slow to import.
    from scipy.optimize import linear_sum_assignment

    matches = []
    for image, (image_logits, image_boxes, image_labels) in enumerate(zip(logits, boxes, labels, strict=True)):
        target_boxes = image_labels["boxes"].to(boxes.device, torch.float32)
        if not len(target_boxes):
            empty = torch.zeros(0, dtype=torch.long, device=logits.device)
            matches.append((empty, empty))
            continue
        classification = _class_costs(image_logits.float(), image_labels, alpha, gamma)
        image_boxes = image_boxes.float()
        overlap = generalized_box_iou(box_cxcywh_to_xyxy(image_boxes), box_cxcywh_to_xyxy(target_boxes))
        distance = bbox_cost * torch.cdist(image_boxes, target_boxes, p=1) - giou_cost * overlap
        cost = (class_cost * classification + distance * boxes_known(image_labels).to(distance.device)).cpu()
        if not cost.isfinite().all():
            raise RuntimeError(
                f"The matching cost of image {image} in the batch is not finite: the model predicts NaN or infinite "
                "values. Lower the learning rate or restart from an earlier checkpoint."
            )
        queries, targets = linear_sum_assignment(cost.numpy())
        matches.append((torch.as_tensor(queries, device=logits.device), torch.as_tensor(targets, device=logits.device)))
    return matches


def _class_costs(logits: torch.Tensor, labels: dict[str, torch.Tensor], alpha: float, gamma: float) -> torch.Tensor:
    """Focal cost `[Q, n]` of calling query q what cell n is."""
    positive = labels.get("positive")
    if positive is None or not len(positive):
        return _focal_cost(logits[:, labels["class_labels"]], alpha, gamma)
    counts = positive.sum(-1)
    # The few classes of each cell first, so that not every class of every pair is looked at.
    classes = positive.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[:, : int(counts.max())]
    costs = _focal_cost(logits[:, classes], alpha, gamma)
    return (costs * positive.gather(-1, classes)).sum(-1) / counts


def _focal_cost(logits: torch.Tensor, alpha: float, gamma: float) -> torch.Tensor:
    probability = logits.sigmoid()
    # softplus(-x) is -log(sigmoid(x)) and softplus(x) is -log(1 - sigmoid(x)), without overflow.
    positive = alpha * (1 - probability) ** gamma * torch.nn.functional.softplus(-logits)
    negative = (1 - alpha) * probability**gamma * torch.nn.functional.softplus(logits)
    return positive - negative
