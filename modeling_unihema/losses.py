"""Every loss: detection with its matching (DINO, arXiv 2203.03605), attributes, masks, single cells, text."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional
from torchvision.ops import box_convert

from unihema.errors import InputError, NotFiniteError

from .configuration_unihema import UniHemaConfig
from .denoising import DenoisingQueries
from .labels import BOXES_KNOWN, MISSING, ancestors_of, boxes_known, check_detection_labels, class_targets, is_target


def sigmoid_focal_loss(
    logits: torch.Tensor, targets: torch.Tensor, alpha: float | None = 0.25, gamma: float = 2.0
) -> torch.Tensor:
    """Focal loss (arXiv 1708.02002) of independent binary decisions, element by element.

    Args:
        logits (`torch.Tensor`): Any shape.
        targets (`torch.Tensor`): 0 or 1, of the same shape and a floating dtype.
        alpha (`float`, *optional*): Weight of ones; zeros weigh `1 - alpha`. `None` weighs both 1.
        gamma (`float`): Focusing exponent: the larger, the less easy elements count.

    Returns:
        `torch.Tensor`: Not reduced, of the same shape.
    """
    probability = logits.sigmoid()
    mistake = probability + targets - 2 * probability * targets
    loss = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none") * mistake**gamma
    if alpha is None:
        return loss
    return loss * (alpha * targets + (1 - alpha) * (1 - targets))


def detection_loss(
    layer_logits: torch.Tensor,
    layer_boxes: torch.Tensor,
    layer_morphology: torch.Tensor | None,
    selection_logits: torch.Tensor,
    selection_boxes: torch.Tensor,
    labels: Sequence[dict[str, torch.Tensor]],
    config: UniHemaConfig,
    denoising: DenoisingQueries | None = None,
    denoising_logits: torch.Tensor | None = None,
    denoising_boxes: torch.Tensor | None = None,
    num_items: Mapping[str, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Losses of classes, boxes and morphology on every decoder layer, the selected proposals and the denoising queries.

    Class and box losses are sums over the batch divided by its number of cells (for denoising: of positive queries),
    averaged over the processes of a distributed run, so every process has to call this in the same step. A class that
    is `False` in an image's `annotated_classes` costs nothing there, and its cells are not targets. A cell has its
    coarser classes (`config.ancestor_matrix`) as well, and leaves the finer ones open, see `class_targets`. A cell whose box is
    not known (`boxes_known`) is matched by class alone, and has no box loss and no denoising queries.

    Args:
        layer_logits (`torch.Tensor`): Class logits of each decoder layer, `[L, B, Q, num_labels]`.
        layer_boxes (`torch.Tensor`): cxcywh in 0..1, `[L, B, Q, 4]`.
        layer_morphology (`torch.Tensor`, *optional*): Logits `[L, B, Q, values]`, attributes in the configuration's order.
        selection_logits (`torch.Tensor`): Class logits of the selected encoder tokens, `[B, Q, num_labels]`.
        selection_boxes (`torch.Tensor`): Their boxes, with gradient, `[B, Q, 4]`.
        labels (`Sequence[dict[str, torch.Tensor]]`): See `check_detection_labels`; without `morphology` all is missing.
        config ([`UniHemaConfig`]): `loss_weights`, `matching_weights`, `official_losses`, `focal_alpha`, `auxiliary_loss`,
            `num_labels`, `morphology`, `ancestor_matrix`.
        denoising ([`DenoisingQueries`], *optional*): How the denoising queries were made.
        denoising_logits (`torch.Tensor`, *optional*): Class logits of the denoising queries, `[L, B, P, num_labels]`.
        denoising_boxes (`torch.Tensor`, *optional*): Their boxes, `[L, B, P, 4]`.
        num_items (`Mapping[str, torch.Tensor]`, *optional*): Numbers of `cells` and `attributes` to divide by instead, such
            as those of several accumulated batches, see `count_loss_items`. Denoising is scaled like the cells.

    Returns:
        `tuple[torch.Tensor, dict[str, torch.Tensor]]`: The weighted sum, with a graph, and the unweighted, detached
        terms: `loss_ce`, `loss_bbox`, `loss_giou`, `loss_morphology` of the last layer; the same with `_{i}` for
        earlier layers, `_enc` for the proposals (no morphology), `_dn` and `_dn_{i}` for denoising (no morphology).

    Raises:
        TypeError: See `check_detection_labels`.
        ValueError: See `check_detection_labels` and `morphology_loss`.
        NotFiniteError: Predictions hold NaN or infinity.
    """
    device, batch_size = layer_logits.device, layer_logits.shape[1]
    value_counts = [len(values) for values in (config.morphology or {}).values()]
    check_detection_labels(labels, batch_size, config.num_labels, len(value_counts), value_counts)
    ancestors = ancestors_of(config)
    targets = [_to_targets(image, len(value_counts), config.num_labels, ancestors, device) for image in labels]
    class_weight = _annotated_class_weight(labels, config.num_labels, device)
    num_cells = sum(len(image["class_labels"]) for image in targets)
    has_target = is_positive = None
    if denoising is not None:
        has_target = _has_target(denoising.target_indices, labels, ancestors)
        is_positive = denoising.positive & has_target
    num_positives = 0 if is_positive is None else is_positive.sum()
    num_attributes = None
    if num_items is None:
        num_cells, num_positives = average_over_processes(num_cells, num_positives, device=device)
    else:
        num_positives = torch.as_tensor(num_positives).clamp(min=1) * num_items["cells"] / max(num_cells, 1)
        num_cells, num_attributes = num_items["cells"], num_items["attributes"]

    last = layer_logits.shape[0] - 1
    layers = range(last + 1) if config.auxiliary_loss else [last]
    losses = {}
    for layer in layers:
        suffix = "" if layer == last else f"_{layer}"
        logits, boxes = layer_logits[layer].float(), layer_boxes[layer].float()
        pairs = _match(logits, boxes, targets, config)
        terms = _class_and_box_losses(logits, boxes, targets, pairs, class_weight, num_cells, config)
        if layer_morphology is not None and value_counts:
            image, query, cell = pairs
            values = _gather(targets, "morphology", image, cell)
            described = layer_morphology[layer][image, query]
            terms["loss_morphology"] = (
                asymmetric_morphology_loss(described, values, value_counts, num_cells)
                if config.official_losses
                else morphology_loss(described, values, value_counts, num_attributes)
            )
        losses.update({name + suffix: value for name, value in terms.items()})

    logits, boxes = selection_logits.float(), selection_boxes.float()
    pairs = _match(logits, boxes, targets, config)
    terms = _class_and_box_losses(logits, boxes, targets, pairs, class_weight, num_cells, config)
    losses.update({f"{name}_enc": value for name, value in terms.items()})

    if denoising is not None:
        image, query = is_positive.nonzero(as_tuple=True)
        pairs = (image, query, denoising.target_indices[image, query])
        # A slot without a target has no class loss.
        weight = class_weight * has_target[..., None]
        everything = [_to_device(image, config.num_labels, ancestors, device) for image in labels]
        for layer in layers:
            suffix = "_dn" if layer == last else f"_dn_{layer}"
            logits, boxes = denoising_logits[layer].float(), denoising_boxes[layer].float()
            terms = _class_and_box_losses(logits, boxes, everything, pairs, weight, num_positives, config)
            losses.update({name + suffix: value for name, value in terms.items()})

    weights = {**config.loss_weights, "ce": config.loss_weights["class"]}
    loss = sum(weights[name.split("_")[1]] * value for name, value in losses.items())
    return loss, {name: value.detach() for name, value in losses.items()}


def segmentation_loss(
    mask_logits: torch.Tensor,
    labels: torch.Tensor,
    dice_weight: float = 2.0,
    focal_weight: float = 1.0,
    alpha: float = 0.25,
    gamma: float = 2.0,
    dice_over_batch: bool = False,
    num_items: Mapping[str, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Dice and focal loss of each image over its own valid pixels, averaged over the images.

    Args:
        mask_logits (`torch.Tensor`): `[B, H, W]`.
        labels (`torch.Tensor`): Integers `[B, H, W]`: 1 cell, 0 background, -100 ignored. An image that is ignored
            throughout counts for nothing.
        dice_weight (`float`): Weight of the Dice loss.
        focal_weight (`float`): Weight of the focal loss.
        alpha (`float`): Constant factor of the focal loss, the same for cell and background.
        gamma (`float`): Focal exponent.
        dice_over_batch (`bool`): One Dice loss over all pixels of the batch, as the official code has it, instead of one
            an image.
        num_items (`Mapping[str, torch.Tensor]`, *optional*): Number of labelled `images` to divide by instead, see
            `count_loss_items`.

    Returns:
        `tuple[torch.Tensor, dict[str, torch.Tensor]]`: The weighted sum, with a graph, and the unweighted, detached
        `loss_dice` and `loss_focal`.

    Raises:
        ValueError: Shapes differ, or a label is none of 1, 0, -100.
    """
    if mask_logits.shape != labels.shape or labels.ndim != 3:
        raise InputError(
            f"Segmentation labels must be [B, H, W] like the mask logits {tuple(mask_logits.shape)}, got "
            f"{tuple(labels.shape)}."
        )
    labels = labels.to(mask_logits.device).flatten(1)
    logits = mask_logits.float().flatten(1)
    valid = labels != MISSING
    strange = labels[valid & (labels != 0) & (labels != 1)]
    if len(strange):
        raise InputError(
            f"Segmentation labels must be 1 (cell), 0 (background) or {MISSING} (ignored), got {strange[0].item()}."
        )
    weight = valid.to(logits.dtype)
    mask = labels.to(logits.dtype) * weight
    probability = logits.sigmoid() * weight
    overlap = (probability * mask).sum(1)
    areas = probability.sum(1) + mask.sum(1)
    if dice_over_batch:
        overlap, areas = overlap.sum().expand_as(overlap), areas.sum().expand_as(areas)
    dice = 1 - (2 * overlap + 1) / (areas + 1)
    focal = alpha * sigmoid_focal_loss(logits, mask, alpha=None, gamma=gamma) * weight
    pixels = weight.sum(1)
    focal = focal.sum(1) / pixels.clamp(min=1)
    counts = (pixels > 0).to(logits.dtype)
    if num_items is None:
        (images,) = average_over_processes(counts.sum(), device=logits.device)
    else:
        images = num_items["images"]
    dice, focal = (dice * counts).sum() / images, (focal * counts).sum() / images
    loss = dice_weight * dice + focal_weight * focal
    return loss, {"loss_dice": dice.detach(), "loss_focal": focal.detach()}


def single_cell_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    label_smoothing: float = 0.0,
    num_items: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Cross-entropy of the class of a single cell, averaged over the labelled images.

    Args:
        logits (`torch.Tensor`): `[B, n]`.
        labels (`torch.Tensor`): Class ids, int64 `[B]`; -100 has no label and costs nothing.
        label_smoothing (`float`): Share of the target spread over all classes.
        num_items (`torch.Tensor` or `int`, *optional*): Number of labelled images to divide by instead.

    Returns:
        `torch.Tensor`: Scalar; 0, but with a graph, without any label.

    Raises:
        ValueError: Shapes do not fit, or a class id is out of range.
    """
    if labels.shape != logits.shape[:1]:
        raise InputError(
            f"Single-cell labels must be one class id per image, [{len(logits)}], got shape {tuple(labels.shape)}."
        )
    return _cross_entropy(logits, labels, label_smoothing, "Single-cell class id", num_items)


def text_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    label_smoothing: float = 0.0,
    num_items: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Cross-entropy of each token, averaged over the labelled tokens of the batch.

    Args:
        logits (`torch.Tensor`): `[B, T, vocabulary]`.
        labels (`torch.Tensor`): Token ids, int64 `[B, T]`; -100 (padding) costs nothing.
        label_smoothing (`float`): Share of the target spread over the vocabulary.
        num_items (`torch.Tensor` or `int`, *optional*): Number of labelled tokens to divide by instead.

    Returns:
        `torch.Tensor`: Scalar; 0, but with a graph, without any label.

    Raises:
        ValueError: Shapes do not fit, or a token id is out of range.
    """
    if labels.shape != logits.shape[:2]:
        raise InputError(f"Text labels must be {list(logits.shape[:2])} token ids, got shape {tuple(labels.shape)}.")
    return _cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing, "Token id", num_items)


def _cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    label_smoothing: float,
    what: str,
    num_items: torch.Tensor | int | None,
) -> torch.Tensor:
    labels = labels.to(logits.device, torch.int64)
    classes = logits.shape[-1]
    wrong = labels[((labels < 0) | (labels >= classes)) & (labels != MISSING)]
    if len(wrong):
        raise InputError(
            f"{what} {wrong[0].item()} is out of range: the model has ids 0 to {classes - 1} ({MISSING} for none)."
        )
    total = functional.cross_entropy(
        logits.float(), labels, ignore_index=MISSING, reduction="sum", label_smoothing=label_smoothing
    )
    if num_items is None:
        (num_items,) = average_over_processes((labels != MISSING).sum(), device=logits.device)
    return total / num_items


def count_loss_items(task: str, labels: Any, config: UniHemaConfig) -> dict[str, int]:
    """What the losses of a batch are averages over. Batches that are accumulated divide by the sum of their counts, so that
    together they give the gradient of one large batch.

    Args:
        task (`str`): One of `TASKS`.
        labels (`Any`): As the model's `forward` takes them for this task.
        config ([`UniHemaConfig`]): `ancestor_matrix`.

    Returns:
        `dict[str, int]`: `cells` and `attributes` (labelled ones) for detection; `images` with a label for segmentation and
        single cells; labelled `tokens` for questions and sentences.
    """
    if task == "detection":
        ancestors = ancestors_of(config)
        kept = [
            torch.ones(len(image["class_labels"]), dtype=torch.bool)
            if image.get("annotated_classes") is None
            else is_target(image, ancestors).cpu()
            for image in labels
        ]
        described = [
            int((image["morphology"].cpu()[of_image] != MISSING).sum())
            for image, of_image in zip(labels, kept, strict=True)
            if image.get("morphology") is not None
        ]
        return {"cells": sum(int(of_image.sum()) for of_image in kept), "attributes": sum(described)}
    labelled = labels != MISSING
    if task == "segmentation":
        return {"images": int(labelled.flatten(1).any(1).sum())}
    return {"images" if task == "single_cell" else "tokens": int(labelled.sum())}


def _to_device(
    image: dict[str, torch.Tensor], num_labels: int, ancestors: torch.Tensor | None, device: torch.device
) -> dict[str, torch.Tensor]:
    moved = {
        "class_labels": image["class_labels"].to(device, torch.int64),
        "boxes": image["boxes"].to(device, torch.float32),
        BOXES_KNOWN: boxes_known(image).to(device),
    }
    if ancestors is not None:
        positive, counted = class_targets(image, num_labels, ancestors)
        moved |= {"positive": positive.to(device), "counted": counted.to(device)}
    return moved


def _to_targets(
    image: dict[str, torch.Tensor],
    num_attributes: int,
    num_labels: int,
    ancestors: torch.Tensor | None,
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """Labels of one image without the cells of classes that are not annotated, morphology filled in."""
    target = _to_device(image, num_labels, ancestors, device)
    morphology = image.get("morphology")
    if morphology is None:
        target["morphology"] = torch.full((len(target["boxes"]), num_attributes), MISSING, device=device)
    else:
        target["morphology"] = morphology.to(device, torch.int64)
    if image.get("annotated_classes") is None:
        return target
    kept = is_target(image, ancestors).to(device)
    return {key: value[kept] for key, value in target.items()}


def _has_target(
    target_indices: torch.Tensor, labels: Sequence[dict[str, torch.Tensor]], ancestors: torch.Tensor | None
) -> torch.Tensor:
    """Which denoising slots `[B, P]` hold a cell whose class is annotated; indices are into all labels of an image."""
    kept = target_indices >= 0
    for row, image in enumerate(labels):
        if image.get("annotated_classes") is not None and len(image["class_labels"]):
            kept[row] &= is_target(image, ancestors).to(kept.device)[target_indices[row].clamp(min=0)]
    return kept


def _annotated_class_weight(
    labels: Sequence[dict[str, torch.Tensor]], num_labels: int, device: torch.device
) -> torch.Tensor:
    """1 where a class is annotated in an image, else 0: `[B, 1, num_labels]`."""
    weight = torch.ones(len(labels), 1, num_labels, device=device)
    for row, image in enumerate(labels):
        if image.get("annotated_classes") is not None:
            weight[row, 0] = image["annotated_classes"].to(device, weight.dtype)
    return weight


def _match(
    logits: torch.Tensor, boxes: torch.Tensor, targets: list[dict[str, torch.Tensor]], config: UniHemaConfig
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Matched pairs of the whole batch as three index vectors: image, query, cell."""
    costs = config.matching_weights
    matches = match_queries(logits, boxes, targets, costs["class"], costs["bbox"], costs["giou"], config.focal_alpha)
    image = torch.cat([torch.full_like(query, row) for row, (query, _) in enumerate(matches)])
    query, cell = (torch.cat(indices) for indices in zip(*matches, strict=True))
    return image, query, cell


def _gather(targets: list[dict[str, torch.Tensor]], key: str, image: torch.Tensor, cell: torch.Tensor) -> torch.Tensor:
    """Rows of one label of the batch."""
    sizes = torch.tensor([len(target[key]) for target in targets], device=cell.device)
    return torch.cat([target[key] for target in targets])[(sizes.cumsum(0) - sizes)[image] + cell]


def _class_and_box_losses(
    logits: torch.Tensor,
    boxes: torch.Tensor,
    targets: list[dict[str, torch.Tensor]],
    pairs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    class_weight: torch.Tensor,
    normaliser: torch.Tensor,
    config: UniHemaConfig,
) -> dict[str, torch.Tensor]:
    """`class_weight` broadcasts to `logits`; a query without a pair is background."""
    image, query, cell = pairs
    wanted = torch.zeros_like(logits)
    if targets and "positive" in targets[0]:
        wanted[image, query] = _gather(targets, "positive", image, cell).to(logits.dtype)
        class_weight = class_weight.expand_as(logits).clone()
        class_weight[image, query] = _gather(targets, "counted", image, cell).to(class_weight.dtype)
    else:
        wanted[image, query, _gather(targets, "class_labels", image, cell)] = 1
    focal = sigmoid_focal_loss(logits, wanted, config.focal_alpha) * class_weight
    predicted, true = boxes[image, query], _gather(targets, "boxes", image, cell)
    overlap = generalized_box_iou_pairs(box_convert(predicted, "cxcywh", "xyxy"), box_convert(true, "cxcywh", "xyxy"))
    known = _gather(targets, BOXES_KNOWN, image, cell).to(boxes.dtype)
    return {
        "loss_ce": focal.sum() / normaliser,
        "loss_bbox": ((predicted - true).abs() * known[:, None]).sum() / normaliser,
        "loss_giou": ((1 - overlap) * known).sum() / normaliser,
    }


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
        NotFiniteError: A logit or box is NaN or infinite.
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
        overlap = generalized_box_iou(
            box_convert(image_boxes, "cxcywh", "xyxy"), box_convert(target_boxes, "cxcywh", "xyxy")
        )
        distance = bbox_cost * torch.cdist(image_boxes, target_boxes, p=1) - giou_cost * overlap
        cost = (class_cost * classification + distance * boxes_known(image_labels).to(distance.device)).cpu()
        if not cost.isfinite().all():
            raise NotFiniteError(
                f"The matching cost of image {image} in the batch is not finite: the model predicts NaN or infinite "
                "values. Lower the learning rate or restart from an earlier checkpoint."
            )
        queries, targets = linear_sum_assignment(cost.numpy())
        matches.append((torch.as_tensor(queries, device=logits.device), torch.as_tensor(targets, device=logits.device)))
    return matches


def _class_costs(logits: torch.Tensor, labels: dict[str, torch.Tensor], alpha: float, gamma: float) -> torch.Tensor:
    """Focal cost `[Q, n]` of assigning the classes of cell n to query q."""
    positive = labels.get("positive")
    if positive is None or not len(positive):
        return _focal_cost(logits[:, labels["class_labels"]], alpha, gamma)
    counts = positive.sum(-1)
    # A cell has few classes. Sorting them first avoids the cost of every class for every pair.
    classes = positive.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[:, : int(counts.max())]
    costs = _focal_cost(logits[:, classes], alpha, gamma)
    return (costs * positive.gather(-1, classes)).sum(-1) / counts


def _focal_cost(logits: torch.Tensor, alpha: float, gamma: float) -> torch.Tensor:
    probability = logits.sigmoid()
    # softplus(-x) is -log(sigmoid(x)) and softplus(x) is -log(1 - sigmoid(x)), without overflow.
    positive = alpha * (1 - probability) ** gamma * functional.softplus(-logits)
    negative = (1 - alpha) * probability**gamma * functional.softplus(logits)
    return positive - negative


def morphology_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    value_counts: Sequence[int],
    num_items: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax cross-entropy of each attribute over its own values, averaged over the labelled entries of all processes.

    Args:
        logits (`torch.Tensor`): `[N, sum(value_counts)]`, attributes one after another.
        targets (`torch.Tensor`): Index of the value, int64 `[N, attributes]`; -100 (missing) costs nothing.
        value_counts (`Sequence[int]`): Values of each attribute.
        num_items (`torch.Tensor`, *optional*): Number of labelled entries to divide by instead.

    Returns:
        `torch.Tensor`: Scalar; 0, but with a graph, when every entry is missing.

    Raises:
        ValueError: The width of `logits` is not `sum(value_counts)`, or that of `targets` not the attributes.
    """
    if logits.shape[-1] != sum(value_counts):
        raise InputError(
            f"Morphology logits are {logits.shape[-1]} wide, but the attributes have {sum(value_counts)} values "
            f"({list(value_counts)})."
        )
    if targets.shape[-1] != len(value_counts):
        raise InputError(f"Morphology labels have {targets.shape[-1]} attributes, but the model {len(value_counts)}.")
    logits = logits.float()
    total = logits.sum() * 0
    for attribute, values in enumerate(logits.split(list(value_counts), -1)):
        total = total + functional.cross_entropy(values, targets[:, attribute], ignore_index=MISSING, reduction="sum")
    if num_items is None:
        (num_items,) = average_over_processes((targets != MISSING).sum(), device=logits.device)
    return total / num_items


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


def average_over_processes(*counts: int | torch.Tensor, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Global loss normaliser for distributed training: each count averaged over the processes, of at least 1 in all.

    A process divides its own sum of losses by this. Gradients are averaged over processes, so together they learn from the
    sum over all samples divided by the total count. Every process must call this in the same step.

    Args:
        *counts (`int` or `torch.Tensor`): Cells, tokens or images of this process's part of the batch.
        device (`torch.device`): Of the loss.

    Returns:
        `tuple[torch.Tensor, ...]`: float32 scalars.
    """
    values = torch.stack([torch.as_tensor(count, dtype=torch.float32, device=device) for count in counts])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
        return tuple(values.clamp(min=1) / torch.distributed.get_world_size())
    return tuple(values.clamp(min=1))


def _area(boxes: torch.Tensor) -> torch.Tensor:
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


# Unlike torchvision's, these are finite for boxes without an area, which an untrained model predicts.
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
