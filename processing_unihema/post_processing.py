"""Model outputs to results in pixels of the original image."""

import difflib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torchvision.ops import box_area, box_iou

from unihema.errors import InputError
from unihema.modeling_unihema.cell_masks import masks_in_boxes
from unihema.modeling_unihema.configuration_unihema import ancestors

from .class_names import has_nucleus, plain_name, usual_name


# Overlaps from which two boxes are one cell when results are shown: IoU, and the share of a box inside one of its class.
NMS_IOU = 0.6
NMS_WITHIN = 0.75
# How many times larger or smaller than those whose masks were learned a cell may be.
MASK_MARGIN = 1.1
# Pixels of the masks of an image's cells together.
MOST_MASK_PIXELS = 1 << 28
# A finer name needs this share of the coarser name's score.
FINER_SHARE = 0.5


def asked_classes(config, prompt: str | Sequence[str] | None) -> torch.Tensor | None:
    """The detection classes that are answered: those that a prompt names, else all that the checkpoint is known to find.

    Args:
        config (`UniHemaConfig`): With `class_names`.
        prompt (`str` or `Sequence[str]`, *optional*): Class names in any spelling, one text with commas or a list.

    Returns:
        `torch.Tensor` or `None`: bool `[num_labels]`; `None`, which is all of them, without a prompt, or where some part of it is
        no class (a disease or a description), if none is among `config.trained.unfound_classes`.
    """
    asked = classes_named(config, prompt)
    if asked is not None:
        return torch.tensor([name in asked for name in config.class_names])
    unfound = set(config.trained.unfound_classes)
    return torch.tensor([name not in unfound for name in config.class_names]) if unfound else None


def classes_named(config, prompt: str | Sequence[str] | None) -> list[str] | None:
    """The detection classes that a prompt names, as the checkpoint spells them.

    Args:
        config (`UniHemaConfig`): With `class_names`.
        prompt (`str` or `Sequence[str]`, *optional*): As for [`asked_classes`].

    Returns:
        `list[str]` or `None`: The classes; `None` without a prompt, or where some part of it is no class.
    """
    found: list[str] = []
    for name in _parts_of(prompt):
        # A synonym only where no class has the name itself.
        same = [known for known in config.class_names if plain_name(known) == plain_name(name)] or [
            known for known in config.class_names if usual_name(known) == usual_name(name)
        ]
        if not same:
            return None
        found += same
    return list(dict.fromkeys(found)) or None


def _parts_of(prompt: str | Sequence[str] | None) -> list[str]:
    parts = [prompt] if isinstance(prompt, str) else list(prompt or ())
    return [name.strip() for part in parts for name in part.split(",") if name.strip()]


def misspelled_classes(config, prompt: str | Sequence[str] | None) -> dict[str, str | None]:
    """Parts of a prompt that are no class, but were meant to be: they stand beside classes, or are much like one.

    Args:
        config (`UniHemaConfig`): With `class_names`.
        prompt (`str` or `Sequence[str]`, *optional*): As for [`asked_classes`].

    Returns:
        `dict[str, str | None]`: Each with the class that it is most like, if any.
    """
    names = _parts_of(prompt)
    usual = {usual_name(name) for name in config.class_names}
    unknown = [name for name in names if usual_name(name) not in usual]
    known = {plain_name(name): name for name in config.class_names}
    like = {name: difflib.get_close_matches(plain_name(name), known, n=1, cutoff=0.8) for name in unknown}
    return {name: known[like[name][0]] if like[name] else None for name in unknown if like[name] or unknown != names}


def find_cells(
    outputs,
    config,
    target_sizes: torch.Tensor | Sequence[tuple[int, int]] | None = None,
    prompt: str | Sequence[str] | None = None,
    threshold: float | None = None,
) -> list[list[dict[str, Any]]]:
    """The cells of each image as they are shown and counted, with the checkpoint's names and thresholds.

    Args:
        outputs (`UniHemaDetectionOutput`): With `logits` `[B, Q, C]`, `pred_boxes` `[B, Q, 4]` and `pred_morphology`
            `[B, Q, values]`.
        config (`UniHemaConfig`): Of the checkpoint.
        target_sizes (`torch.Tensor` or `Sequence[tuple[int, int]]`, *optional*): `(h, w)` of each original image in
            pixels. Without it boxes stay in 0..1.
        prompt (`str` or `Sequence[str]`, *optional*): What was asked for. Where it names classes and nothing else, only these
            are answered; see [`asked_classes`].
        threshold (`float`, *optional*): Smallest score for all classes, instead of the calibrated one of each.

    Returns:
        `list[list[dict]]`: For each image its cells, best first: `label` (`str`), `score` (`float`), `box` (xyxy, `list` of
        4 `float`), `attributes` (attribute -> `{"value": str, "score": float}`, empty for cells without a nucleus),
        `query` (`int`), the query it came from, and `mask` (bool array of the pixels that the box touches, `None` where the
        checkpoint was not trained on masks of cells or boxes are not in pixels).

    Raises:
        ValueError: Not as many target sizes as images, or a threshold outside 0..1.
    """
    if threshold is not None and not 0 <= threshold <= 1:
        raise InputError(f"threshold must be a number from 0 to 1, got {threshold}.")
    found = post_process_object_detection(
        outputs,
        config.class_thresholds(threshold),
        target_sizes,
        nms_iou=NMS_IOU,
        nms_within=NMS_WITHIN,
        classes=asked_classes(config, prompt),
        ancestors=config.ancestor_matrix,
    )
    described = post_process_morphology(outputs, found, config.morphology)
    masks = post_process_cell_masks(outputs, found, target_sizes, config.trained.cell_mask_sides)
    names = config.class_names
    nucleated = [has_nucleus(name, config.label_parents) for name in names]
    keys = ("labels", "scores", "boxes", "queries")
    return [
        [
            {
                "label": names[label],
                "score": score,
                "box": box,
                "attributes": attributes if nucleated[label] else {},
                "query": query,
                "mask": mask,
            }
            for label, score, box, query, attributes, mask in zip(
                *(image[key].tolist() for key in keys), morphology, of_image, strict=True
            )
        ]
        for image, morphology, of_image in zip(found, described, masks, strict=True)
    ]


def single_cell_probabilities(logits: torch.Tensor, config, labels: Sequence[str] | None = None) -> torch.Tensor:
    """How probable each label of a single cell is.

    Args:
        logits (`torch.Tensor`): Of the single-cell head, `[B, classes]`.
        config (`UniHemaConfig`): Of the checkpoint.
        labels (`Sequence[str]`, *optional*): The labels that the cell may have, classes or groups in any spelling
            (`config.single_cell_names`); all classes when not given. The others are left out of the softmax. A class counts for
            the finest label asked for that it is a kind of: beside `neutrophil`, `WBC` is any other white cell.

    Returns:
        `torch.Tensor`: float32 `[B, labels]`, in the order of `labels`; rows sum to 1.

    Raises:
        ValueError: A label that the checkpoint does not have, none, or one that is there twice.
    """
    probabilities = logits.float().softmax(-1)
    if labels is None:
        return probabilities
    members = torch.tensor(config.single_cell_members)[_asked_labels(config, labels)]
    # The finest label is the one with the fewest classes.
    finest = torch.where(members, members.sum(1, keepdim=True), members.shape[1] + 1).argmin(0)
    counted = members & (torch.arange(len(members))[:, None] == finest)
    logits = logits.float().masked_fill(~counted.any(0).to(logits.device), -torch.inf)
    return logits.softmax(-1) @ counted.to(logits.device, torch.float32).T


def most_probable_labels(probabilities: torch.Tensor, config, labels: Sequence[str] | None = None) -> torch.Tensor:
    """The label of each single cell, chosen from coarse to fine: the kind of cell first, then what it is among its kind. So a
    white cell whose type is unsure is never called a red cell's shape.

    Args:
        probabilities (`torch.Tensor`): Of [`single_cell_probabilities`], `[B, labels]`.
        config (`UniHemaConfig`): Of the checkpoint.
        labels (`Sequence[str]`, *optional*): As there.

    Returns:
        `torch.Tensor`: Numbers of the labels, int64 `[B]`; the most probable one each where the checkpoint has no groups.
    """
    parents = config.single_cell_parents or {}
    names = list(config.single_cell_labels)
    if labels is not None:
        names = single_cell_names_of(config, labels)
    lines = [[*reversed(ancestors(name, parents)), name] for name in names]
    left = probabilities
    for depth in range(max(map(len, lines))):
        # A label that is reached stands for itself from there on.
        nodes = [line[min(depth, len(line) - 1)] for line in lines]
        same = torch.tensor([[node == other for other in nodes] for node in nodes], device=left.device)
        best = (left @ same.to(left.dtype)).argmax(-1)
        left = left.masked_fill(~same[best], 0)
    return left.argmax(-1)


def single_cell_names_of(config, labels: Sequence[str]) -> list[str]:
    """Labels of single cells as a checkpoint spells them.

    Raises:
        ValueError: As [`single_cell_probabilities`].
    """
    return [config.single_cell_names[index] for index in _asked_labels(config, labels)]


def _asked_labels(config, labels: Sequence[str]) -> list[int]:
    """Numbers of labels among `config.single_cell_names`."""
    known = {usual_name(name): index for index, name in reversed(list(enumerate(config.single_cell_names)))}
    unknown = [name for name in labels if usual_name(name) not in known]
    if unknown or not labels:
        wrong = f"no single-cell label {unknown[0]!r}" if unknown else "no label is asked for"
        raise InputError(f"labels: {wrong}; there are {', '.join(config.single_cell_names)}.")
    asked = [known[usual_name(name)] for name in labels]
    if len(set(asked)) < len(asked):
        raise InputError(f"labels: one is there twice in {', '.join(labels)}.")
    return asked


def post_process_cell_masks(
    outputs,
    detections: Sequence[dict[str, torch.Tensor]],
    target_sizes: torch.Tensor | Sequence[tuple[int, int]] | None,
    sides: Sequence[float] | None = None,
) -> list[list[np.ndarray | None]]:
    """The mask of each cell, of the pixels that its box touches.

    Args:
        outputs (`UniHemaDetectionOutput`): With `cell_mask_queries`, `cell_mask_pixels` and `cell_mask_ratios` of a checkpoint
            that was trained on masks of cells.
        detections (`Sequence[dict[str, torch.Tensor]]`): Results of `post_process_object_detection`.
        target_sizes (`torch.Tensor` or `Sequence[tuple[int, int]]`, *optional*): `(h, w)` of each original image, in whose
            pixels the boxes are.
        sides (`Sequence[float]`, *optional*): Shortest and longest side, as a share of the image's longer one, of the cells whose
            masks were learned (`config.trained.cell_mask_sides`).

    Returns:
        `list[list[np.ndarray | None]]`: bool `[h, w]` from floor(x_min), floor(y_min) to ceil(x_max), ceil(y_max). `None` for
        all without such outputs or sizes, for cells beyond `sides` by more than `MASK_MARGIN`, and for the last cells of an image
        whose masks have more than `MOST_MASK_PIXELS`.
    """
    results: list[list[np.ndarray | None]] = []
    queries = getattr(outputs, "cell_mask_queries", None)
    for image, found in enumerate(detections):
        if queries is None or target_sizes is None:
            results.append([None] * len(found["queries"]))
            continue
        boxes = [[math.floor(x), math.floor(y), math.ceil(right), math.ceil(bottom)]
                 for x, y, right, bottom in found["boxes"].tolist()]  # fmt: skip
        areas = np.cumsum([(right - x) * (bottom - y) for x, y, right, bottom in boxes])
        few = int((areas <= MOST_MASK_PIXELS).sum())
        ratios = outputs.cell_mask_ratios
        masks = masks_in_boxes(
            queries[image, found["queries"][:few]],
            outputs.cell_mask_pixels[image],
            ratios[image % len(ratios)],
            boxes[:few],
            (int(target_sizes[image][0]), int(target_sizes[image][1])),
        )
        told = [
            mask.numpy() if _is_of_known_size(box, target_sizes[image], sides) else None
            for mask, box in zip(masks, found["boxes"].tolist())
        ]
        results.append([*told, *[None] * (len(boxes) - few)])
    return results


def _is_of_known_size(box: Sequence[float], size: Sequence[int], sides: Sequence[float] | None) -> bool:
    side = max(box[2] - box[0], box[3] - box[1]) / max(int(size[0]), int(size[1]))
    return sides is None or sides[0] / MASK_MARGIN <= side <= sides[1] * MASK_MARGIN


def post_process_object_detection(
    outputs,
    threshold: float | Sequence[float] | torch.Tensor = 0.3,
    target_sizes: torch.Tensor | Sequence[tuple[int, int]] | None = None,
    top_k: int | None = None,
    nms_iou: float | None = None,
    nms_within: float | None = None,
    one_class_per_query: bool = True,
    clip: bool = True,
    classes: torch.Tensor | Sequence[torch.Tensor | None] | None = None,
    ancestors: Sequence[Sequence[bool]] | torch.Tensor | None = None,
    finest: float | Sequence[float] | torch.Tensor | None = None,
) -> list[dict[str, torch.Tensor]]:
    """Cells above the threshold, best first. [`find_cells`] does it with a checkpoint's own settings.

    Args:
        outputs (`UniHemaDetectionOutput`): With `logits` `[B, Q, C]` and `pred_boxes` `[B, Q, 4]`.
        threshold (`float`, `Sequence[float]` or `torch.Tensor`): Smallest score, one for all classes or `[C]`.
        target_sizes (`torch.Tensor` or `Sequence[tuple[int, int]]`, *optional*): `(h, w)` of each original image in
            pixels. Without it boxes stay in 0..1.
        top_k (`int`, *optional*): At most this many cells an image.
        nms_iou (`float`, *optional*): Of cells whose intersection over union is more than this only the best is kept.
        nms_within (`float`, *optional*): Of cells of one class also when this part of the smaller lies in the larger.
        one_class_per_query (`bool`): A cell has one name. `False` lets every query stand once for each class above the
            threshold, as mAP is computed, and overlap is then judged within a class.
        clip (`bool`): Cut boxes at the edge of the image.
        classes (`torch.Tensor` or `Sequence[torch.Tensor | None]`, *optional*): Classes to answer with, bool `[C]` for all
            images, or one (or `None`: all) for each; see [`asked_classes`].
        ancestors (`Sequence[Sequence[bool]]` or `torch.Tensor`, *optional*): bool `[C, C]`, whether the second class is
            coarser than the first (`config.ancestor_matrix`). Where a cell has one name, it is then the finest one above the
            threshold: not WBC where it may be called neutrophil; and a cell that two queries call WBC and
            neutrophil is one neutrophil. A finer name with less than half the score of the coarser one is not given:
            thresholds are those of the stains they were chosen on, and on another a surely white cell may be of no sure
            type.
        finest (`float`, `Sequence[float]` or `torch.Tensor`, *optional*): Score above which the finer name is taken;
            `threshold` when not given.

    Returns:
        `list[dict[str, torch.Tensor]]`: `scores` `[n]`, `labels` `[n]`, `boxes` `[n, 4]` xyxy and `queries` `[n]`, the
        query each cell came from.

    Raises:
        ValueError: Not as many target sizes as images, a size that is none, or not as many thresholds as classes.
    """
    probabilities = outputs.logits.float().sigmoid()
    _check_target_sizes(target_sizes, len(probabilities))
    threshold = _thresholds(threshold, probabilities)
    finest = threshold if finest is None else _thresholds(finest, probabilities)
    ancestors = None if ancestors is None else torch.as_tensor(ancestors, device=probabilities.device)
    per_image = not isinstance(classes, torch.Tensor) and classes is not None
    results = []
    for image, scores in enumerate(probabilities):
        centre, size = outputs.pred_boxes[image].float().split(2, dim=-1)
        boxes = torch.cat((centre - size / 2, centre + size / 2), -1)
        if clip:
            boxes = boxes.clamp(0, 1)
        if target_sizes is not None:
            height, width = (float(side) for side in target_sizes[image])
            boxes = boxes * boxes.new_tensor([width, height, width, height])
        asked = classes[image] if per_image else classes
        if asked is not None:
            # Below every threshold, 0 included.
            scores = scores.masked_fill(~asked.to(scores.device), -1.0)
        if one_class_per_query:
            score, label = (scores if ancestors is None else _finest_names(scores, ancestors, finest)).max(-1)
            query = torch.arange(len(score), device=score.device)
        else:
            score = scores.flatten()
            query = torch.arange(len(score), device=score.device) // scores.shape[-1]
            label = torch.arange(len(score), device=score.device) % scores.shape[-1]
        keep = score > (threshold if threshold.ndim == 0 else threshold[label])
        order = score.masked_fill(~keep, -1).argsort(descending=True, stable=True)[: int(keep.sum())]
        if nms_iou is not None or nms_within is not None:
            found = boxes[query[order]]
            distinct = distinct_cells(
                found,
                label[order],
                nms_iou,
                nms_within,
                across_classes=one_class_per_query,
                ancestors=ancestors,
                scores=score[order],
            )
            order = order[distinct]
        order = order[:top_k]
        results.append(
            {"scores": score[order], "labels": label[order], "boxes": boxes[query[order]], "queries": query[order]}
        )
    return results


def _finest_names(scores: torch.Tensor, ancestors: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """Scores `[Q, C]` with one name for each cell: coarser names are removed where a finer one is above the threshold, and
    finer names where they are below it or unlikely."""
    coarser = (scores[:, None, :] * ancestors).amax(-1)
    unlikely = scores < FINER_SHARE * coarser
    above = (scores > threshold) & ~unlikely
    has_finer = (above[:, :, None] & ancestors).any(1)
    has_coarser = (above[:, None, :] & ancestors).any(2)
    return scores.masked_fill(has_finer | unlikely | (has_coarser & ~above), -1.0)


def distinct_cells(
    boxes: torch.Tensor,
    labels: torch.Tensor,
    iou: float | None = NMS_IOU,
    within: float | None = NMS_WITHIN,
    across_classes: bool = True,
    ancestors: torch.Tensor | None = None,
    scores: torch.Tensor | None = None,
) -> torch.Tensor:
    """Non-maximum suppression: which cells stay, so that a cell boxed more than once counts once.

    `iou` alone keeps a box around a nucleus inside that of its cell; `within` removes it.

    Args:
        boxes (`torch.Tensor`): `[n, 4]` xyxy, best first.
        labels (`torch.Tensor`): `[n]`.
        iou (`float`, *optional*): A cell goes when its intersection over union with a better one is more than this.
        within (`float`, *optional*): And when more than this part of the smaller lies in the larger, of one class.
        across_classes (`bool`): Whether `iou` is judged between classes as well.
        ancestors (`torch.Tensor`, *optional*): bool `[C, C]`, as above. Of a cell under a finer and a coarser class the finer
            one is kept; `within` counts between them as it does within a class.
        scores (`torch.Tensor`, *optional*): `[n]`; a finer name with less than half the coarser one's score gives way to it.

    Returns:
        `torch.Tensor`: bool `[n]`.
    """
    keep = torch.ones(len(boxes), dtype=torch.bool)
    if not across_classes:
        # Class by class: pairs of all queries under all classes would take too much memory.
        for label in labels.unique():
            own = labels == label
            keep[own.cpu()] = distinct_cells(boxes[own], labels[own], iou, within).cpu()
        return keep.to(boxes.device)
    same = labels[:, None] == labels
    finer = torch.zeros_like(same)
    if ancestors is not None:
        finer = ancestors.to(labels.device)[labels[:, None], labels]
        same = same | finer | finer.T
        if scores is not None:
            finer = finer & (scores[:, None] >= FINER_SHARE * scores)
    overlap = box_iou(boxes, boxes)
    repeats = torch.zeros_like(same)
    if iou is not None:
        repeats |= overlap > iou
    if within is not None:
        area = box_area(boxes)
        intersection = overlap * (area[:, None] + area) / (1 + overlap)
        repeats |= (intersection > within * torch.minimum(area[:, None], area)) & same
    coarser_copies = (repeats & finer).any(0).cpu()
    # One transfer instead of one for each cell. Only cells that stay suppress others.
    repeats = repeats.triu(1).cpu()
    keep &= ~coarser_copies
    for cell in range(len(boxes)):
        if keep[cell]:
            keep &= ~repeats[cell]
    return keep.to(boxes.device)


def post_process_morphology(
    outputs, detections: Sequence[dict[str, torch.Tensor]], attributes: dict[str, list[str]]
) -> list[list[dict[str, dict]]]:
    """The most likely value of each attribute of each cell.

    Args:
        outputs (`UniHemaDetectionOutput`): With `pred_morphology` `[B, Q, values]`.
        detections (`Sequence[dict[str, torch.Tensor]]`): Results of `post_process_object_detection`.
        attributes (`dict[str, list[str]]`): `config.morphology`.

    Returns:
        `list[list[dict[str, dict]]]`: For each image and cell, attribute name to `{"value": str, "score": float}`.

    Raises:
        ValueError: The attributes are not those of the model.
    """
    widths = [len(values) for values in attributes.values()]
    if outputs.pred_morphology.shape[-1] != sum(widths):
        raise InputError(
            f"The attributes given have {sum(widths)} values, the model's output "
            f"{outputs.pred_morphology.shape[-1]}: pass config.morphology of the same checkpoint."
        )
    results = []
    for logits, found in zip(outputs.pred_morphology.float(), detections, strict=True):
        per_attribute = [part.softmax(-1).max(-1) for part in logits[found["queries"]].split(widths, dim=-1)]
        results.append(
            [
                {
                    name: {"value": values[int(best.indices[cell])], "score": float(best.values[cell])}
                    for (name, values), best in zip(attributes.items(), per_attribute, strict=True)
                }
                for cell in range(len(found["queries"]))
            ]
        )
    return results


def post_process_semantic_segmentation(
    outputs,
    target_sizes: torch.Tensor | Sequence[tuple[int, int]] | None = None,
    pixel_mask: torch.Tensor | None = None,
    threshold: float | None = 0.5,
) -> list[torch.Tensor]:
    """Semantic masks at the size of the original images.

    Args:
        outputs (`UniHemaSegmentationOutput`): With `mask_logits` `[B, H, W]`.
        target_sizes (`torch.Tensor` or `Sequence[tuple[int, int]]`, *optional*): `(h, w)` of each original image; the
            model's own size when missing.
        pixel_mask (`torch.Tensor`, *optional*): `[B, H, W]`, to cut padding off.
        threshold (`float`, *optional*): Probability above which a pixel is cell; `None` gives the probabilities.

    Returns:
        `list[torch.Tensor]`: int64 `[h, w]` of 0 and 1, or float probabilities.

    Raises:
        ValueError: Not as many target sizes as images.
    """
    _check_target_sizes(target_sizes, len(outputs.mask_logits))
    masks = []
    for image, logits in enumerate(outputs.mask_logits.float()):
        if pixel_mask is not None:
            valid = pixel_mask[image].bool()
            logits = logits[: int(valid[:, 0].sum()), : int(valid[0].sum())]
        if target_sizes is not None:
            size = [int(side) for side in target_sizes[image]]
            logits = torch.nn.functional.interpolate(logits[None, None], size=size, mode="bilinear")[0, 0]
        probability = logits.sigmoid()
        masks.append(probability if threshold is None else (probability > threshold).long())
    return masks


def _check_target_sizes(target_sizes, images: int) -> None:
    if target_sizes is None:
        return
    if len(target_sizes) != images:
        raise InputError(f"{len(target_sizes)} target_sizes for {images} images: give one for each image.")
    for size in target_sizes:
        try:
            height, width = (float(side) for side in size)
        except (TypeError, ValueError):
            height = width = 0
        if not (height > 0 and width > 0):
            raise InputError(f"target_sizes are height and width of each image in pixels, got {size}.")


def _thresholds(threshold: float | Sequence[float] | torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """One smallest score, or one for each class, on the device of the scores `[B, Q, C]`."""
    try:
        values = torch.as_tensor(threshold, dtype=scores.dtype, device=scores.device)
    except (TypeError, ValueError, RuntimeError):
        values = scores.new_empty(0)
    if values.shape not in ((), scores.shape[-1:]) or values.isnan().any():
        raise InputError(
            f"threshold must be one number, or one for each of {scores.shape[-1]} classes, got {threshold}."
        )
    return values
