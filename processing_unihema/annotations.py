"""COCO annotations of a field to detection labels."""

import math
import warnings

import torch

from unihema.errors import InputError


def detection_labels(
    annotation: dict, index: int, original: tuple[int, int], resized: tuple[int, int], invalid_boxes: str = "error"
) -> dict[str, torch.Tensor]:
    """Labels of one image.

    Args:
        annotation (`dict`): `annotations` (each with `bbox` x, y, width, height in pixels of the original image,
            `category_id`, optionally `iscrowd`, `area`, `morphology`) and optionally `image_id`.
        index (`int`): Position of the image in the batch, for messages.
        original (`tuple[int, int]`): `(h, w)` the boxes are in.
        resized (`tuple[int, int]`): `(h, w)` the model sees, padding not counted.
        invalid_boxes (`str`): `"error"`, or `"drop"` with a warning.

    Returns:
        `dict[str, torch.Tensor]`: `class_labels` `[n]`; `boxes` `[n, 4]` cxcywh in 0..1 of the image itself; `area` in
        resized pixels; `iscrowd`; `image_id`; `orig_size`; `size`; `morphology` `[n, attributes]` if any cell has it.

    Raises:
        ValueError: A missing key, a box that has not four values, lies outside the image or has no area, or rows of
            morphology of different lengths.
    """
    if "annotations" not in annotation:
        raise InputError(f"Annotations of image {index} have no 'annotations' list; expected COCO format.")
    name = annotation.get("image_id", index)
    height, width = original
    kept = []
    for row, cell in enumerate(annotation["annotations"]):
        missing = {"bbox", "category_id"} - cell.keys()
        if missing:
            raise InputError(f"Image {name}, annotation {row} has no {' and no '.join(sorted(missing))}.")
        if len(cell["bbox"]) != 4:
            raise InputError(
                f"Image {name}, annotation {row}: box {list(cell['bbox'])} has {len(cell['bbox'])} values; a COCO box has "
                "four: x, y, width, height in pixels."
            )
        box = _clipped(cell["bbox"], width, height)
        if box is None:
            message = (
                f"Image {name}, annotation {row}: box {list(cell['bbox'])} (x, y, width, height in pixels) has no area "
                f"inside the image of {width}x{height}."
            )
            if invalid_boxes == "error":
                raise InputError(f"{message} Correct it, or drop such boxes with invalid_boxes='drop'.")
            warnings.warn(f"{message} It is dropped.", stacklevel=2)
            continue
        kept.append((cell, box))

    boxes = torch.tensor([box for _, box in kept], dtype=torch.float32).reshape(-1, 4)
    scale = resized[0] * resized[1] / (height * width)
    default_area = (boxes[:, 2] * boxes[:, 3]).tolist()
    labels = {
        "class_labels": torch.tensor([cell["category_id"] for cell, _ in kept], dtype=torch.int64),
        "boxes": torch.cat((boxes[:, :2] + boxes[:, 2:] / 2, boxes[:, 2:]), 1)
        / torch.tensor([width, height, width, height], dtype=torch.float32),
        "area": torch.tensor(
            [cell.get("area", area) * scale for (cell, _), area in zip(kept, default_area, strict=True)],
            dtype=torch.float32,
        ),
        "iscrowd": torch.tensor([cell.get("iscrowd", 0) for cell, _ in kept], dtype=torch.int64),
        "orig_size": torch.tensor(original),
        "size": torch.tensor(resized),
    }
    if isinstance(name, int):
        labels["image_id"] = torch.tensor([name])
    if any(cell.get("morphology") is not None for cell, _ in kept):
        labels["morphology"] = _morphology([cell.get("morphology") for cell, _ in kept], name)
    return labels


def _clipped(bbox, width: int, height: int) -> tuple[float, float, float, float] | None:
    """The part of a box inside the image, or `None` when there is none."""
    x, y, w, h = (float(value) for value in bbox)
    left, top, right, bottom = max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height))
    if not all(map(math.isfinite, (left, top, right, bottom))) or right <= left or bottom <= top:
        return None
    return left, top, right - left, bottom - top


def _morphology(rows: list, name) -> torch.Tensor:
    widths = {len(row) for row in rows if row is not None}
    if len(widths) > 1:
        raise InputError(
            f"Image {name}: morphology rows have {' and '.join(map(str, sorted(widths)))} values; every cell needs one "
            "for each attribute (-100 where it is missing)."
        )
    width = widths.pop()
    return torch.tensor([[-100] * width if row is None else list(row) for row in rows], dtype=torch.int64)
