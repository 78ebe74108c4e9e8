"""Matching of queries to cells: its costs, its assignments, and the overlap of boxes (DINO, arXiv 2203.03605)."""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.nn import functional
from torchvision.ops import box_convert

from unihema.errors import NotFiniteError

from .labels import CellTargets


def matching(
    logits: torch.Tensor, boxes: torch.Tensor, cells: CellTargets, weights: Mapping[str, float], alpha: float = 0.25
) -> Callable[[], torch.Tensor]:
    """Starts the cheapest one-to-one assignment of queries to the cells of each image, for several sets of predictions.

    The cost is that of the losses: focal classification, the mean over the classes of a cell, L1 and generalised IoU. A cell
    whose box is not known is matched by class alone.

    An accelerator gets the costs of everything in one piece, and sends them to the host in one copy, while it goes on with
    whatever is asked of it next. A processor gets an image at a time, whose costs fit into its cache.

    Args:
        logits (`torch.Tensor`): Class logits `[K, B, Q, C]`, float32.
        boxes (`torch.Tensor`): Boxes cxcywh `[K, B, Q, 4]`, float32.
        cells ([`CellTargets`]): Of the B images.
        weights (`Mapping[str, float]`): Of the costs `class`, `bbox` and `giou`.
        alpha (`float`): Focal loss alpha.

    Returns:
        `Callable`: Waits for the costs, and gives the query of each cell, int64 `[K, B, N]` on the device of `logits`; Q, which
        is no query, for what is no target, and for targets that are more than the queries. It raises `NotFiniteError` where a
        logit or box is NaN or infinite.
    """
    sets, images, queries, _ = logits.shape
    parts = (cells.boxes, cells.boxes_known, cells.own_classes, cells.class_shares)
    to_solve = [(k, b) for k in range(sets) for b, targets in enumerate(cells.targets) if len(targets)]
    ready = None
    with torch.no_grad():
        if logits.device.type == "cpu":
            problems = {
                (k, b): _costs(
                    logits[k, b][None],
                    boxes[k, b][None],
                    *(p[b, cells.targets[b]][None] for p in parts),
                    weights,
                    alpha,
                )[0]
                for k, b in to_solve
            }
        else:
            repeated = [part.expand(sets, *part.shape).flatten(0, 1) for part in parts]
            costs = _costs(logits.flatten(0, 1), boxes.flatten(0, 1), *repeated, weights, alpha)
            costs = _to_host(costs).unflatten(0, (sets, images))
            if logits.is_cuda:
                ready = torch.cuda.Event()
                ready.record()
            problems = {(k, b): costs[k, b] for k, b in to_solve}

    def finish() -> torch.Tensor:
        if ready is not None:
            ready.synchronize()
        if logits.device.type != "cpu":
            for (k, b), cost in problems.items():
                problems[k, b] = cost[:, cells.targets[b]]
        found = torch.full((sets, images, cells.boxes.shape[1]), queries)
        for (k, b), (query, chosen) in zip(problems, _assignments(problems)):
            found[k, b, cells.targets[b][torch.as_tensor(chosen)]] = torch.as_tensor(query)
        return found.to(logits.device, non_blocking=True)

    return finish


def _to_host(costs: torch.Tensor) -> torch.Tensor:
    """The one copy from the device in a training step."""
    return costs.to("cpu", non_blocking=costs.is_cuda)


def match_queries(
    logits: torch.Tensor,
    boxes: torch.Tensor,
    labels: Sequence[dict[str, torch.Tensor]],
    class_cost: float = 2.0,
    bbox_cost: float = 5.0,
    giou_cost: float = 2.0,
    alpha: float = 0.25,
    ancestors: torch.Tensor | None = None,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The assignment that `matching` makes for one set of predictions.

    Args:
        logits (`torch.Tensor`): Class logits `[B, Q, C]`.
        boxes (`torch.Tensor`): Boxes cxcywh `[B, Q, 4]`.
        labels (`Sequence[dict[str, torch.Tensor]]`): See `check_detection_labels`.
        class_cost, bbox_cost, giou_cost (`float`): Weights of the costs.
        alpha (`float`): Focal loss alpha.
        ancestors (`torch.Tensor`, *optional*): See `ancestors_of`.

    Returns:
        `list[tuple[torch.Tensor, torch.Tensor]]`: For each image the matched queries, ascending, and their cells.
    """
    cells = CellTargets.of(labels, logits.shape[-1], 0, ancestors, logits.device)
    weights = {"class": class_cost, "bbox": bbox_cost, "giou": giou_cost}
    matches = []
    for query in matching(logits[None].float(), boxes[None].float(), cells, weights, alpha)()[0]:
        cell = (query < logits.shape[1]).nonzero().flatten()
        order = query[cell].argsort()
        matches.append((query[cell][order], cell[order]))
    return matches


def _assignments(problems: Mapping[tuple[int, int], torch.Tensor]) -> Sequence[tuple]:
    # Only training needs SciPy's optimiser, and it is slow to import.
    from scipy.optimize import linear_sum_assignment

    for (_, image), cost in problems.items():
        if not cost.isfinite().all():
            raise NotFiniteError(
                f"The matching cost of image {image} in the batch is not finite: the model predicts NaN or infinite "
                "values. Lower the learning rate or restart from an earlier checkpoint."
            )
    arrays = [cost.numpy() for cost in problems.values()]
    threads = min(len(arrays), os.cpu_count() or 1, 16)
    if threads < 2:
        return [linear_sum_assignment(array) for array in arrays]
    # SciPy computes without Python's lock.
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(linear_sum_assignment, arrays))


def _costs(
    logits: torch.Tensor,
    boxes: torch.Tensor,
    true_boxes: torch.Tensor,
    known: torch.Tensor,
    classes: torch.Tensor,
    shares: torch.Tensor,
    weights: Mapping[str, float],
    alpha: float,
) -> torch.Tensor:
    """Costs `[G, Q, N]` of logits `[G, Q, C]` and boxes `[G, Q, 4]` for the cells of G images, see [`CellTargets`]."""
    groups, queries = logits.shape[:2]
    index = classes.flatten(1)[:, None].expand(-1, queries, -1)
    of_classes = _focal_cost(logits, alpha).gather(2, index).view(groups, queries, *classes.shape[1:])
    classification = (of_classes * shares[:, None]).sum(-1)
    overlap = generalized_box_iou(
        box_convert(boxes, "cxcywh", "xyxy")[:, :, None], box_convert(true_boxes, "cxcywh", "xyxy")[:, None]
    )
    distance = weights["bbox"] * torch.cdist(boxes, true_boxes, p=1) - weights["giou"] * overlap
    return weights["class"] * classification + distance * known[:, None]


def _focal_cost(logits: torch.Tensor, alpha: float, gamma: float = 2.0) -> torch.Tensor:
    probability = logits.sigmoid()
    # softplus(-x) is -log(sigmoid(x)) and softplus(x) is -log(1 - sigmoid(x)), without overflow.
    positive = alpha * (1 - probability) ** gamma * functional.softplus(-logits)
    negative = (1 - alpha) * probability**gamma * functional.softplus(logits)
    return positive - negative


def generalized_box_iou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Generalised IoU (arXiv 1902.09630) of xyxy boxes `[..., 4]`, which broadcast against each other.

    Unlike torchvision's it is finite for boxes without an area, which an untrained model predicts.
    """
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    size = (high - low).clamp(min=0)
    intersection = size[..., 0] * size[..., 1]
    union = _area(a) + _area(b) - intersection
    hull_size = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    hull = hull_size[..., 0] * hull_size[..., 1]
    return intersection / union.clamp(min=1e-9) - (hull - union) / hull.clamp(min=1e-9)


def _area(boxes: torch.Tensor) -> torch.Tensor:
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


__all__ = ["generalized_box_iou", "match_queries", "matching"]
