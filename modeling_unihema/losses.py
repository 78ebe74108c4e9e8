"""Every loss: detection (DINO, arXiv 2203.03605), attributes, masks, single cells, text."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional
from torchvision.ops import box_convert

from unihema.errors import InputError

from .cell_masks import MASKS, UNKNOWN, cell_mask_loss
from .configuration_unihema import UniHemaConfig
from .denoising import DenoisingQueries
from .labels import MISSING, CellTargets, ancestors_of, check_detection_labels, is_target
from .matching import generalized_box_iou, matching


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
    masks: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
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
        num_items (`Mapping[str, torch.Tensor]`, *optional*): Numbers of `cells`, `attributes` and `masks` to divide by instead,
            such as those of several accumulated batches, see `count_loss_items`. Denoising is scaled like the cells.
        masks (`tuple[torch.Tensor, torch.Tensor, torch.Tensor]`, *optional*): `cell_mask_queries`, `cell_mask_pixels` and
            `cell_mask_ratios` of the trunk, for the masks of matched cells on the last layer.

    Returns:
        `tuple[torch.Tensor, dict[str, torch.Tensor]]`: The weighted sum, with a graph, and the unweighted, detached
        terms: `loss_ce`, `loss_bbox`, `loss_giou`, `loss_morphology` of the last layer; the same with `_{i}` for
        earlier layers, `_enc` for the proposals (no morphology), `_dn` and `_dn_{i}` for denoising (no morphology);
        `loss_mask_bce` and `loss_mask_dice` where a cell has a mask.

    Raises:
        TypeError: See `check_detection_labels`.
        ValueError: See `check_detection_labels` and `morphology_loss`.
        NotFiniteError: Predictions hold NaN or infinity.
    """
    device, (layers, batch_size) = layer_logits.device, layer_logits.shape[:2]
    value_counts = [len(values) for values in (config.morphology or {}).values()]
    check_detection_labels(labels, batch_size, config.num_labels, len(value_counts), value_counts)
    cells = CellTargets.of(labels, config.num_labels, len(value_counts), ancestors_of(config), device)
    first = 0 if config.auxiliary_loss else layers - 1
    suffixes = [f"_{layer}" for layer in range(first, layers - 1)] + [""]
    # The proposals are one more set of predictions.
    logits = torch.cat((layer_logits[first:], selection_logits[None])).float()
    boxes = torch.cat((layer_boxes[first:], selection_boxes[None])).float()
    matched = matching(logits, boxes, cells, config.matching_weights, config.focal_alpha)

    # What needs no matching runs meanwhile.
    num_cells = sum(map(len, cells.targets))
    placed = None if denoising is None else _denoised_cells(denoising, cells)
    num_positives = 0 if placed is None else placed[2].sum()
    num_attributes = None
    num_masks: Any = cells.num_masks
    if num_items is None:
        num_cells, num_positives, num_masks = average_over_processes(num_cells, num_positives, num_masks, device=device)
    else:
        num_masks = num_items.get("masks", torch.as_tensor(num_masks).clamp(min=1))
        num_positives = torch.as_tensor(num_positives).clamp(min=1) * num_items["cells"] / max(num_cells, 1)
        num_cells, num_attributes = num_items["cells"], num_items["attributes"]
    noisy = {}
    if placed is not None:
        noisy_predictions = denoising_logits[first:].float(), denoising_boxes[first:].float()
        noisy = _denoising_losses(*noisy_predictions, cells, *placed, num_positives, config.focal_alpha)

    query = matched()
    plain = _matched_losses(logits, boxes, cells, query, num_cells, config.focal_alpha)
    terms = [(name, vector, [*suffixes, "_enc"]) for name, vector in plain.items()]
    terms += [(name, vector, [f"_dn{suffix}" for suffix in suffixes]) for name, vector in noisy.items()]
    if layer_morphology is not None and value_counts:
        described, values = _matched_attributes(layer_morphology[first:], cells, query[:-1])
        if config.official_losses:
            vector = asymmetric_morphology_loss(described, values, value_counts, num_cells)
        else:
            vector = morphology_loss(described, values, value_counts, num_attributes)
        terms.append(("loss_morphology", vector, suffixes))

    if masks is not None and cells.num_masks:
        of_masks = cell_mask_loss(*masks, cells.boxes, cells.masks, query[-2], num_masks)
        terms += [(name, value[None], [""]) for name, value in of_masks.items()]

    weights = {**config.loss_weights, "ce": config.loss_weights["class"]}
    loss = sum(weights[name.removeprefix("loss_")] * vector.sum() for name, vector, _ in terms)
    return loss, {
        name + suffix: value
        for name, vector, of_sets in terms
        for suffix, value in zip(of_sets, vector.detach().unbind(), strict=True)
    }


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
    strange = labels[(labels != MISSING) & (labels != 0) & (labels != 1)]
    if len(strange):
        raise InputError(
            f"Segmentation labels must be 1 (cell), 0 (background) or {MISSING} (ignored), got {strange[0].item()}."
        )
    # Labels that come from the host are checked there, and sent without waiting for the device.
    labels = labels.to(mask_logits.device, non_blocking=True).flatten(1)
    logits = mask_logits.float().flatten(1)
    valid = labels != MISSING
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
    members: Sequence[Sequence[bool]] | None = None,
) -> torch.Tensor:
    """Cross-entropy of the class of a single cell, averaged over the labelled images.

    A label may be a group of classes: its loss is minus the logarithm of their probabilities' sum, so that a cell known to be
    white says nothing about which white cell it is.

    Args:
        logits (`torch.Tensor`): `[B, n]`.
        labels (`torch.Tensor`): Class ids, int64 `[B]`; -100 has no label and costs nothing.
        label_smoothing (`float`): Share of the target spread over all classes.
        num_items (`torch.Tensor` or `int`, *optional*): Number of labelled images to divide by instead.
        members (`Sequence[Sequence[bool]]`, *optional*): `[m, n]`, which classes each of m labels is made of
            (`config.single_cell_members`); each label is the class of that number when not given.

    Returns:
        `torch.Tensor`: Scalar; 0, but with a graph, without any label.

    Raises:
        ValueError: Shapes do not fit, or a class id is out of range.
    """
    if labels.shape != logits.shape[:1]:
        raise InputError(
            f"Single-cell labels must be one class id per image, [{len(logits)}], got shape {tuple(labels.shape)}."
        )
    if members is None or len(members) == logits.shape[-1]:
        return _cross_entropy(logits, labels, label_smoothing, "Single-cell class id", num_items)
    labels = _sent(labels, len(members), "Single-cell class id", logits.device)
    # On the host first, so that nothing waits for the device.
    own = torch.tensor(members).to(logits.device, non_blocking=True)[labels.clamp(min=0)]
    log_probability = logits.float().log_softmax(-1)
    costs = -log_probability.masked_fill(~own, -torch.inf).logsumexp(-1)
    costs = (1 - label_smoothing) * costs - label_smoothing * log_probability.mean(-1)
    labelled = labels != MISSING
    if num_items is None:
        (num_items,) = average_over_processes(labelled.sum(), device=logits.device)
    return (costs * labelled).sum() / num_items


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
    labels = _sent(labels, logits.shape[-1], what, logits.device)
    total = functional.cross_entropy(
        logits.float(), labels, ignore_index=MISSING, reduction="sum", label_smoothing=label_smoothing
    )
    if num_items is None:
        (num_items,) = average_over_processes((labels != MISSING).sum(), device=logits.device)
    return total / num_items


def _sent(labels: torch.Tensor, classes: int, what: str, device: torch.device) -> torch.Tensor:
    """Class ids, checked where they are and sent to the device."""
    wrong = labels[((labels < 0) | (labels >= classes)) & (labels != MISSING)]
    if len(wrong):
        raise InputError(
            f"{what} {wrong[0].item()} is out of range: the model has ids 0 to {classes - 1} ({MISSING} for none)."
        )
    return labels.to(device, torch.int64, non_blocking=True)


def count_loss_items(task: str, labels: Any, config: UniHemaConfig) -> dict[str, int]:
    """What the losses of a batch are averages over. Batches that are accumulated divide by the sum of their counts, so that
    together they give the gradient of one large batch.

    Args:
        task (`str`): One of `TASKS`.
        labels (`Any`): As the model's `forward` takes them for this task.
        config ([`UniHemaConfig`]): `ancestor_matrix`.

    Returns:
        `dict[str, int]`: `cells`, `attributes` (labelled ones) and `masks` for detection; `images` with a label for
        segmentation and single cells; labelled `tokens` for questions and sentences.
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
        masked = [
            int((image[MASKS].cpu()[of_image] != UNKNOWN).flatten(1).any(1).sum())
            for image, of_image in zip(labels, kept, strict=True)
            if image.get(MASKS) is not None
        ]
        return {
            "cells": sum(int(of_image.sum()) for of_image in kept),
            "attributes": sum(described),
            "masks": sum(masked),
        }
    labelled = labels != MISSING
    if task == "segmentation":
        return {"images": int(labelled.flatten(1).any(1).sum())}
    return {"images" if task == "single_cell" else "tokens": int(labelled.sum())}


def _matched_losses(
    logits: torch.Tensor,
    boxes: torch.Tensor,
    cells: CellTargets,
    query: torch.Tensor,
    normaliser: torch.Tensor,
    alpha: float,
) -> dict[str, torch.Tensor]:
    """Losses `[K]` of K sets of predictions, logits `[K, B, Q, C]` and boxes `[K, B, Q, 4]`, whose queries for the cells are
    `query` `[K, B, N]`, Q for none. A query without a cell is background, unless most of its box is where a class is ignored."""
    sets, images, queries, classes = logits.shape
    # One row more takes what belongs to no query.
    place = query[..., None].expand(-1, -1, -1, classes)
    wanted = logits.new_zeros(sets, images, queries + 1, classes)
    wanted = wanted.scatter(2, place, cells.positive.expand(sets, -1, -1, -1))[:, :, :queries]
    weight = cells.annotated.expand(sets, -1, queries + 1, -1)
    if cells.ignored_boxes is not None:
        weight = weight * (1 - functional.pad(_ignored(boxes.detach(), cells), (0, 0, 0, 1)))
    weight = weight.scatter(2, place, cells.counted.expand(sets, -1, -1, -1))[:, :, :queries]
    focal = sigmoid_focal_loss(logits, wanted, alpha) * weight
    predicted = boxes.gather(2, query.clamp(max=queries - 1)[..., None].expand(-1, -1, -1, 4))
    known = (query < queries) * cells.boxes_known
    return {"loss_ce": focal.sum((1, 2, 3)) / normaliser, **_box_losses(predicted, cells.boxes, known, normaliser)}


def _ignored(boxes: torch.Tensor, cells: CellTargets) -> torch.Tensor:
    """1 for the classes that are ignored where most of a predicted box `[K, B, Q, 4]` is, `[K, B, Q, C]`."""
    found, ignored = box_convert(boxes, "cxcywh", "xyxy")[:, :, :, None], cells.ignored_boxes[None, :, None]
    low, high = torch.maximum(found[..., :2], ignored[..., :2]), torch.minimum(found[..., 2:], ignored[..., 2:])
    area = boxes[..., 2:].prod(-1)[..., None].clamp(min=1e-9)
    inside = (high - low).clamp(min=0).prod(-1) > 0.5 * area
    return (inside.to(boxes.dtype) @ cells.ignored_classes).clamp(max=1)


def _box_losses(
    predicted: torch.Tensor, true: torch.Tensor, known: torch.Tensor, normaliser: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Losses `[K]` of boxes `[K, B, N, 4]`, of those that `known` `[K, B, N]` counts, to the true ones `[B, N, 4]`."""
    overlap = generalized_box_iou(box_convert(predicted, "cxcywh", "xyxy"), box_convert(true, "cxcywh", "xyxy"))
    return {
        "loss_bbox": ((predicted - true).abs().sum(-1) * known).sum((1, 2)) / normaliser,
        "loss_giou": ((1 - overlap) * known).sum((1, 2)) / normaliser,
    }


def _matched_attributes(
    morphology: torch.Tensor, cells: CellTargets, query: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits `[L, B * N, values]` of each cell's query and its labels `[L, B * N, attributes]`, -100 where it has none."""
    queries = morphology.shape[2]
    place = query.clamp(max=queries - 1)[..., None].expand(-1, -1, -1, morphology.shape[-1])
    values = torch.where((query < queries)[..., None], cells.morphology, MISSING)
    return morphology.gather(2, place).flatten(1, 2), values.flatten(1, 2)


def _denoised_cells(denoising: DenoisingQueries, cells: CellTargets) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cell of each slot, whether the slot has a target, and whether it must find it again, `[B, P]` each."""
    cell = denoising.target_indices.clamp(min=0)
    has_target = (denoising.target_indices >= 0) & cells.is_target.gather(1, cell)
    return cell, has_target, denoising.positive & has_target


def _denoising_losses(
    logits: torch.Tensor,
    boxes: torch.Tensor,
    cells: CellTargets,
    cell: torch.Tensor,
    has_target: torch.Tensor,
    is_positive: torch.Tensor,
    normaliser: torch.Tensor,
    alpha: float,
) -> dict[str, torch.Tensor]:
    """Losses `[L]` of denoising slots, logits `[L, B, P, C]` and boxes `[L, B, P, 4]`. A slot without a target has none."""
    place = cell[..., None].expand(-1, -1, logits.shape[-1])
    found = is_positive[..., None]
    wanted = (cells.positive.gather(1, place) * found).expand_as(logits)
    weight = torch.where(found, cells.counted.gather(1, place), cells.annotated * has_target[..., None])
    focal = sigmoid_focal_loss(logits, wanted, alpha) * weight
    true = cells.boxes.gather(1, cell[..., None].expand(-1, -1, 4))
    known = cells.boxes_known.gather(1, cell) * is_positive
    return {"loss_ce": focal.sum((1, 2, 3)) / normaliser, **_box_losses(boxes, true, known, normaliser)}


def morphology_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    value_counts: Sequence[int],
    num_items: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax cross-entropy of each attribute over its own values, averaged over the labelled entries of all processes.

    Args:
        logits (`torch.Tensor`): `[N, sum(value_counts)]`, attributes one after another; or `[L, N, ...]` of L layers.
        targets (`torch.Tensor`): Index of the value, int64 `[N, attributes]` or `[L, N, attributes]`; -100 (missing) costs
            nothing.
        value_counts (`Sequence[int]`): Values of each attribute.
        num_items (`torch.Tensor`, *optional*): Number of labelled entries to divide by instead.

    Returns:
        `torch.Tensor`: Scalar, or `[L]`; 0, but with a graph, when every entry is missing.

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
    total = logits.sum((-2, -1)) * 0
    for values, wanted in zip(logits.split(list(value_counts), -1), targets.unbind(-1), strict=True):
        costs = functional.cross_entropy(values.movedim(-1, 1), wanted, ignore_index=MISSING, reduction="none")
        total = total + costs.sum(-1)
    if num_items is None:
        (num_items,) = average_over_processes((targets != MISSING).sum((-2, -1)), device=logits.device)
    return total / num_items


def asymmetric_morphology_loss(
    logits: torch.Tensor, targets: torch.Tensor, value_counts: Sequence[int], normaliser: torch.Tensor
) -> torch.Tensor:
    """The official code's morphology loss: asymmetric loss (arXiv 2009.14119) of each value on its own, summed.

    Focusing exponents 1 (the labelled value) and 4 (the others), probability shift 0.08, no gradient through the focus.

    Args:
        logits (`torch.Tensor`): `[N, sum(value_counts)]`, attributes one after another; or `[L, N, ...]` of L layers.
        targets (`torch.Tensor`): Index of the value, int64 `[N, attributes]` or `[L, N, attributes]`; -100 (missing) costs
            nothing.
        value_counts (`Sequence[int]`): Values of each attribute.
        normaliser (`torch.Tensor`): What the sum is divided by: the number of cells.

    Returns:
        `torch.Tensor`: Scalar, or `[L]`, with a graph.
    """
    logits = logits.float()
    total = logits.sum((-2, -1)) * 0
    for values, value in zip(logits.split(list(value_counts), -1), targets.unbind(-1), strict=True):
        known = (value != MISSING)[..., None]
        wanted = functional.one_hot(value.clamp(min=0), values.shape[-1]).to(values.dtype)
        probability = values.sigmoid()
        right = torch.where(wanted.bool(), probability, (1 - probability + 0.08).clamp(max=1))
        focus = (1 - right.detach()) ** (wanted + 4 * (1 - wanted))
        total = total - (focus * right.clamp(min=1e-8).log() * known).sum((-2, -1))
    return total / normaliser


def average_over_processes(*counts: int | torch.Tensor, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Global loss normaliser for distributed training: each count averaged over the processes, of at least 1 in all.

    A process divides its own sum of losses by this. Gradients are averaged over processes, so together they learn from the
    sum over all samples divided by the total count. Every process must call this in the same step.

    Args:
        *counts (`int` or `torch.Tensor`): Cells, tokens or images of this process's part of the batch, numbers or all of one
            shape.
        device (`torch.device`): Of the loss.

    Returns:
        `tuple[torch.Tensor, ...]`: float32, of that shape.
    """
    # A number becomes a tensor by filling one, which no device waits for.
    values = torch.stack(
        [
            count.to(device, torch.float32) if isinstance(count, torch.Tensor) else torch.full((), count, device=device)
            for count in counts
        ]
    ).float()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
        return tuple(values.clamp(min=1) / torch.distributed.get_world_size())
    return tuple(values.clamp(min=1))
