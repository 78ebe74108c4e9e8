"""Detection labels: their format, and the class targets that follow from them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torchvision.ops import box_convert

from unihema.errors import InputError, InputTypeError

from .cell_masks import GRID, MASKS, UNKNOWN


MISSING = -100
# Boxes come from divisions in float32, so an edge may pass the image's by rounding.
BOX_TOLERANCE = 1e-4
# False where the cell lies somewhere in its box, and its edges are not known.
BOXES_KNOWN = "boxes_known"
# Boxes of cells that nobody could tell apart or name, and the class of each: what is found there is neither right nor wrong.
IGNORED_BOXES, IGNORED_CLASSES = "ignored_boxes", "ignored_classes"
CLASS_MASKS = ("annotated_classes", "taught_classes", "exact_classes")


def check_detection_labels(
    labels: Sequence[dict[str, torch.Tensor]],
    batch_size: int | None,
    num_labels: int,
    num_attributes: int,
    value_counts: Sequence[int] | None = None,
) -> None:
    """Checks the format of labels, in a few microseconds an image.

    Args:
        labels (`Sequence[dict[str, torch.Tensor]]`): One dict an image with `class_labels` int64 `[n]`, `boxes`
            cxcywh `[n, 4]` in 0..1 of the image itself, optionally `morphology` int64 `[n, num_attributes]` (-100
            missing), `annotated_classes`, `taught_classes` and `exact_classes` bool `[num_labels]`, `boxes_known` bool `[n]`,
            `masks` uint8 `[n, 32, 32]`: samples of each cell's mask over its box and an eighth of its sides around it
            (`mask_points`), 1 inside, 0 outside, 255 not known. Cells and images without masks are no background:
            they cost nothing. Optionally `ignored_boxes` cxcywh `[m, 4]` and `ignored_classes` int64 `[m]`: regions where a
            class, its coarser and its finer ones are neither target nor background.
        batch_size (`int`, *optional*): Number of images; not checked when `None`.
        num_labels (`int`): Detection classes of the model.
        num_attributes (`int`): Morphology attributes of the model.
        value_counts (`Sequence[int]`, *optional*): Values of each attribute; when given, morphology must name one of
            them.

    Raises:
        TypeError: Labels are not a list of dicts of tensors, or a tensor has the wrong dtype.
        ValueError: The number of dicts is not the number of images, a key is missing, a shape does not fit, a class
            or a value is out of range, or a box is not a normalised cxcywh box with an area.
    """
    if isinstance(labels, (dict, torch.Tensor)) or not isinstance(labels, Sequence):
        raise InputTypeError(f"Detection labels must be a list with one dict per image, got {type(labels).__name__}.")
    if batch_size is not None and len(labels) != batch_size:
        raise InputError(f"Got {len(labels)} label dicts for {batch_size} images; give one dict per image.")
    for index, image in enumerate(labels):
        _check_image(image, index, num_labels, num_attributes)
    _check_values(labels, num_labels, value_counts)


def _check_image(image: dict[str, torch.Tensor], index: int, num_labels: int, num_attributes: int) -> None:
    if not hasattr(image, "keys"):
        raise InputTypeError(f"Labels of image {index} must be a dict, got {type(image).__name__}.")
    missing = [key for key in ("class_labels", "boxes") if key not in image]
    if missing:
        raise InputError(f"Labels of image {index} lack {' and '.join(missing)}; got {sorted(image.keys())}.")
    for key in (
        "class_labels",
        "boxes",
        "morphology",
        BOXES_KNOWN,
        MASKS,
        IGNORED_BOXES,
        IGNORED_CLASSES,
        *CLASS_MASKS,
    ):
        value = image.get(key)
        if value is not None and not isinstance(value, torch.Tensor):
            raise InputTypeError(f"{key} of image {index} must be a tensor, got {type(value).__name__}.")
    classes, boxes = image["class_labels"], image["boxes"]
    if classes.is_floating_point() or classes.dtype == torch.bool:
        raise InputTypeError(f"class_labels of image {index} must be integers, got {classes.dtype}.")
    if not boxes.is_floating_point():
        raise InputTypeError(f"boxes of image {index} must be floating point (normalised cxcywh), got {boxes.dtype}.")
    if classes.ndim != 1:
        raise InputError(f"class_labels of image {index} must be [n], got shape {tuple(classes.shape)}.")
    if boxes.shape != (len(classes), 4):
        raise InputError(
            f"boxes of image {index} must be [{len(classes)}, 4] to fit its {len(classes)} class_labels, "
            f"got shape {tuple(boxes.shape)}."
        )
    morphology = image.get("morphology")
    if morphology is not None:
        if morphology.shape != (len(classes), num_attributes):
            raise InputError(
                f"morphology of image {index} must be [{len(classes)}, {num_attributes}] (cells, attributes of the "
                f"configuration), got shape {tuple(morphology.shape)}."
            )
        if morphology.is_floating_point():
            raise InputTypeError(f"morphology of image {index} must be integers, got {morphology.dtype}.")
    for key, length in (*((key, num_labels) for key in CLASS_MASKS), (BOXES_KNOWN, len(classes))):
        mask = image.get(key)
        if mask is not None and (mask.dtype != torch.bool or mask.shape != (length,)):
            raise InputError(f"{key} of image {index} must be bool [{length}], got {mask.dtype} {list(mask.shape)}.")

    ignored = [image.get(key) for key in (IGNORED_BOXES, IGNORED_CLASSES)]
    if any(part is not None for part in ignored):
        regions, names = ignored
        fits = regions is not None and names is not None and regions.shape == (len(names), 4) and names.ndim == 1
        if not fits or not regions.is_floating_point() or not ((names >= 0) & (names < num_labels)).all():
            raise InputError(
                f"{IGNORED_BOXES} and {IGNORED_CLASSES} of image {index} must be cxcywh [m, 4] and class ids [m] from 0 to "
                f"{num_labels - 1}."
            )
    masks = image.get(MASKS)
    if masks is not None and (masks.dtype != torch.uint8 or masks.shape != (len(classes), GRID, GRID)):
        raise InputError(
            f"masks of image {index} must be uint8 [{len(classes)}, {GRID}, {GRID}], samples of each cell's mask over its box; "
            f"got {masks.dtype} {list(masks.shape)}."
        )


def boxes_known(image: dict[str, torch.Tensor]) -> torch.Tensor:
    """Which cells of an image have a box of their own, bool `[n]`: all where the labels do not say."""
    known = image.get(BOXES_KNOWN)
    return torch.ones_like(image["class_labels"], dtype=torch.bool) if known is None else known


def _check_values(
    labels: Sequence[dict[str, torch.Tensor]], num_labels: int, value_counts: Sequence[int] | None
) -> None:
    """All values of the batch at once: on an accelerator this waits for the device once, not once an image."""
    if not labels:
        return
    classes = torch.cat([image["class_labels"] for image in labels])
    boxes = torch.cat([image["boxes"] for image in labels])
    owner = torch.arange(len(labels)).repeat_interleave(torch.tensor([len(image["class_labels"]) for image in labels]))
    wrong_class = (classes < 0) | (classes >= num_labels)
    # Written so that NaN fails.
    inside = ((boxes >= -BOX_TOLERANCE) & (boxes <= 1 + BOX_TOLERANCE)).all(-1)
    wrong_box = ~(inside & (boxes[:, 2:] > 0).all(-1))
    wrong = [wrong_class.any(), wrong_box.any()]

    described = [image.get("morphology") for image in labels] if value_counts is not None else []
    described = [(index, values) for index, values in enumerate(described) if values is not None]
    if described:
        values = torch.cat([values for _, values in described])
        counts = torch.tensor(list(value_counts), device=values.device)
        wrong_value = ((values < 0) | (values >= counts)) & (values != MISSING)
        wrong.append(wrong_value.any())
    wrong = torch.stack(wrong).tolist()

    if wrong[0]:
        row = int(wrong_class.nonzero()[0])
        raise InputError(
            f"Class id {int(classes[row])} in class_labels of image {int(owner[row])} is out of range: the model has "
            f"{num_labels} classes, ids 0 to {num_labels - 1}."
        )
    if wrong[1]:
        row = int(wrong_box.nonzero()[0])
        image = int(owner[row])
        number = row - int((owner < image).sum())
        raise InputError(
            f"Box {number} of image {image} is {[round(v, 4) for v in boxes[row].tolist()]}: boxes must be centre x, "
            "centre y, width, height as fractions (0..1) of the image, with width and height above 0."
        )
    if wrong[2:] == [True]:
        row, attribute = wrong_value.nonzero()[0].tolist()
        owner = [index for index, values in described for _ in range(len(values))]
        raise InputError(
            f"Value {int(values[row, attribute])} of attribute {attribute} in morphology of image {owner[row]} is out "
            f"of range: the attribute has {int(counts[attribute])} values; use {MISSING} where it is missing."
        )


def ancestors_of(config: Any) -> torch.Tensor | None:
    """Which classes are coarser than which, `config.ancestor_matrix` as a tensor.

    Args:
        config ([`UniHemaConfig`]): Of the model.

    Returns:
        `torch.Tensor` or `None`: bool `[C, C]`, `True` where the second class is coarser than the first.
    """
    return None if config.ancestor_matrix is None else torch.tensor(config.ancestor_matrix)


def is_target(image: dict[str, torch.Tensor], ancestors: torch.Tensor | None = None) -> torch.Tensor:
    """Which cells of an image are targets: those of a class that its data set annotates, or of a finer one.

    Args:
        image (`dict[str, torch.Tensor]`): Labels of one image.
        ancestors (`torch.Tensor`, *optional*): See `ancestors_of`.

    Returns:
        `torch.Tensor`: Boolean `[n]`.
    """
    classes = image["class_labels"]
    annotated = image.get("annotated_classes")
    if annotated is None:
        return torch.ones_like(classes, dtype=torch.bool)
    annotated = annotated.to(classes.device)
    found = annotated[classes]
    if ancestors is not None:
        found = found | (ancestors.to(classes.device)[classes] & annotated).any(-1)
    return found


def class_targets(image: dict[str, Any], num_labels: int, ancestors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Class targets of the query matched to each cell.

    A neutrophil is a positive of `WBC` as well, even in an image whose data set does not annotate `WBC`, provided that
    another data set does (`taught_classes`): a class trained on positives alone would be predicted everywhere. A cell
    labelled `WBC` may be a neutrophil or not, so finer classes have no loss there, unless its data set gives each cell the finest
    name (`exact_classes`): a red cell of a set that boxes infected ones by their stage is not infected.

    Args:
        image (`dict[str, torch.Tensor]`): Labels of one image: `class_labels` `[n]`, optionally `annotated_classes`,
            `taught_classes` and `exact_classes`, bool `[num_labels]`.
        num_labels (`int`): Classes of the model.
        ancestors (`torch.Tensor`): See `ancestors_of`.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: bool `[n, num_labels]` each: the classes that the cell has, and those
        that have a loss in its query.
    """
    classes = image["class_labels"]
    device = classes.device
    annotated = image.get("annotated_classes")
    annotated = torch.ones(num_labels, dtype=torch.bool) if annotated is None else annotated
    annotated = annotated.to(device)
    own = torch.zeros(len(classes), num_labels, dtype=torch.bool, device=device)
    own[torch.arange(len(classes), device=device), classes] = True
    ancestors = ancestors.to(device)
    taught = image.get("taught_classes")
    coarser, finer = ancestors[classes], ancestors.T[classes]
    implied = coarser if taught is None else coarser & (annotated | taught.to(device))
    positive = (own & annotated) | implied
    exact = image.get("exact_classes")
    if exact is not None:
        finer = finer & ~exact.to(device)[classes][:, None]
    return positive, positive | (annotated & ~finer)


@dataclass
class CellTargets:
    """The labelled cells of a batch, B images with up to N cells each, filled up with what is no cell.

    Attributes:
        targets (`list[torch.Tensor]`): Indices of the cells that are targets, see `is_target`, of each image; on the host.
        boxes (`torch.Tensor`): cxcywh float32 `[B, N, 4]`.
        boxes_known (`torch.Tensor`): float32 `[B, N]`, 1 where the cell has a box of its own.
        is_target (`torch.Tensor`): bool `[B, N]`.
        positive (`torch.Tensor`): float32 `[B, N, C]`, 1 for the classes that a cell has, see `class_targets`.
        counted (`torch.Tensor`): float32 `[B, N, C]`, 1 for the classes that have a loss in its query.
        own_classes (`torch.Tensor`): int64 `[B, N, P]`, the classes that a cell has, at most P of them.
        class_shares (`torch.Tensor`): float32 `[B, N, P]`, their shares of the cell, 0 for what only fills up.
        morphology (`torch.Tensor`): int64 `[B, N, attributes]`, -100 where missing.
        annotated (`torch.Tensor`): float32 `[B, 1, C]`, 1 where a class is annotated in an image.
        masks (`torch.Tensor`, *optional*): uint8 `[B, N, GRID, GRID]`, see `check_detection_labels`; `None` without any.
        num_masks (`int`): Targets that have a mask.
        ignored_boxes (`torch.Tensor`, *optional*): xyxy float32 `[B, M, 4]`, see `check_detection_labels`; `None` without any.
        ignored_classes (`torch.Tensor`, *optional*): float32 `[B, M, C]`, 1 for the classes that are ignored there.
    """

    targets: list[torch.Tensor]
    boxes: torch.Tensor
    boxes_known: torch.Tensor
    is_target: torch.Tensor
    positive: torch.Tensor
    counted: torch.Tensor
    own_classes: torch.Tensor
    class_shares: torch.Tensor
    morphology: torch.Tensor
    annotated: torch.Tensor
    masks: torch.Tensor | None = None
    num_masks: int = 0
    ignored_boxes: torch.Tensor | None = None
    ignored_classes: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        labels: Sequence[dict[str, torch.Tensor]],
        num_labels: int,
        num_attributes: int,
        ancestors: torch.Tensor | None,
        device: torch.device,
    ) -> "CellTargets":
        """
        Args:
            labels (`Sequence[dict[str, torch.Tensor]]`): See `check_detection_labels`. Labels on the host are sent to the device
                without waiting for it.
            num_labels (`int`): Classes of the model.
            num_attributes (`int`): Attributes of the model; 0 leaves them out.
            ancestors (`torch.Tensor`, *optional*): See `ancestors_of`.
            device (`torch.device`): Of the predictions.
        """
        labels = on_host(labels)
        if ancestors is None:
            ancestors = torch.zeros(num_labels, num_labels, dtype=torch.bool)
        images, most = len(labels), max((len(image["class_labels"]) for image in labels), default=0)
        boxes = torch.full((images, most, 4), 0.5)
        known, targeted = torch.zeros(images, most), torch.zeros(images, most, dtype=torch.bool)
        positive, counted = torch.zeros(images, most, num_labels), torch.zeros(images, most, num_labels)
        morphology = torch.full((images, most, num_attributes), MISSING)
        annotated = torch.ones(images, 1, num_labels)
        for row, image in enumerate(labels):
            number = len(image["class_labels"])
            boxes[row, :number] = image["boxes"].float()
            known[row, :number] = boxes_known(image).float()
            targeted[row, :number] = is_target(image, ancestors)
            of_cells = class_targets(image, num_labels, ancestors)
            positive[row, :number], counted[row, :number] = (mask.float() for mask in of_cells)
            if num_attributes and image.get("morphology") is not None:
                morphology[row, :number] = image["morphology"]
            if image.get("annotated_classes") is not None:
                annotated[row, 0] = image["annotated_classes"].float()
        of_cell = positive.sum(-1)
        # A cell has few classes; picking them out avoids the cost of every class for every pair.
        classes = positive.argsort(dim=-1, descending=True, stable=True)
        classes = classes[..., : int(of_cell.max()) if of_cell.numel() else 0]
        shares = positive.gather(-1, classes) / of_cell.clamp(min=1)[..., None]
        parts = (boxes, known, targeted, positive, counted, classes, shares, morphology, annotated)
        targets = [row.nonzero().flatten() for row in targeted]
        masks, num_masks = None, 0
        if any(MASKS in image for image in labels):
            masks = torch.full((images, most, GRID, GRID), UNKNOWN, dtype=torch.uint8)
            for row, image in enumerate(labels):
                if MASKS in image:
                    masks[row, : len(image["class_labels"])] = image[MASKS]
            num_masks = int(((masks != UNKNOWN).flatten(2).any(-1) & targeted).sum())
            masks = masks.to(device, non_blocking=True)
        found = cls(targets, *(part.to(device, non_blocking=True) for part in parts), masks, num_masks)
        if any(len(image.get(IGNORED_CLASSES, ())) for image in labels):
            ignored = _ignored(labels, num_labels, ancestors)
            found.ignored_boxes, found.ignored_classes = (part.to(device, non_blocking=True) for part in ignored)
        return found


def _ignored(
    labels: Sequence[dict[str, torch.Tensor]], num_labels: int, ancestors: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    most = max(len(image.get(IGNORED_CLASSES, ())) for image in labels)
    boxes, classes = torch.zeros(len(labels), most, 4), torch.zeros(len(labels), most, num_labels)
    related = torch.eye(num_labels, dtype=torch.bool) | ancestors | ancestors.T
    for row, image in enumerate(labels):
        if IGNORED_CLASSES in image:
            number = len(image[IGNORED_CLASSES])
            boxes[row, :number] = box_convert(image[IGNORED_BOXES].float(), "cxcywh", "xyxy")
            classes[row, :number] = related[image[IGNORED_CLASSES]].float()
    return boxes, classes


def on_host(labels: Sequence[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """The labels, on the host. Those that are elsewhere are fetched, which waits for their device."""
    return [{key: value.cpu() for key, value in image.items() if isinstance(value, torch.Tensor)} for image in labels]
