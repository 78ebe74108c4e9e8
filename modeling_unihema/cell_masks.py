"""Masks of single cells: the product of a query and of pixels at the finest level, looked at within the cell's box alone.

Labels are small for the same reason. The mask of a cell is stored as [`GRID`] x [`GRID`] samples over its box and a margin, so
neither labels nor losses grow with the image, and padding and views change nothing about them.
"""

from collections.abc import Sequence

import torch
from torch.nn import functional


# Name among the labels of an image, samples along a side, and how much larger than the box their square is.
MASKS = "masks"
GRID = 32
MARGIN = 1.25
# A sample of which it is not known whether it lies in the cell: of a cell without a mask, or beyond the image.
UNKNOWN = 255
# Queries whose whole maps are computed at once.
AT_ONCE = 64


def mask_points(boxes: torch.Tensor) -> torch.Tensor:
    """Where the mask of each cell is sampled.

    Args:
        boxes (`torch.Tensor`): cxcywh `[..., 4]`, in any unit.

    Returns:
        `torch.Tensor`: x and y in the unit of the boxes, row by row, `[..., GRID * GRID, 2]`.
    """
    steps = ((torch.arange(GRID, device=boxes.device, dtype=boxes.dtype) + 0.5) / GRID - 0.5) * MARGIN
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    offsets = torch.stack((x, y), -1).flatten(0, 1)
    return boxes[..., None, :2] + offsets * boxes[..., None, 2:]


def sampled_masks(instances: torch.Tensor, numbers: Sequence[int | None], boxes: torch.Tensor) -> torch.Tensor:
    """Labels of masks, from an image of instances.

    Args:
        instances (`torch.Tensor`): Number of the cell whose pixel it is, integers `[h, w]`.
        numbers (`Sequence[int | None]`): Number of each cell; `None` for a cell without a mask.
        boxes (`torch.Tensor`): cxcywh in pixels of it `[n, 4]`.

    Returns:
        `torch.Tensor`: uint8 `[n, GRID, GRID]`: 1 inside, 0 outside, `UNKNOWN`.
    """
    height, width = instances.shape
    x, y = mask_points(boxes.float()).floor().long().unbind(-1)
    outside = (x < 0) | (y < 0) | (x >= width) | (y >= height)
    seen = instances[y.clamp(0, height - 1), x.clamp(0, width - 1)].long()
    known = torch.tensor([number is not None for number in numbers], dtype=torch.bool)
    wanted = torch.tensor([-1 if number is None else number for number in numbers], dtype=torch.long)
    samples = (seen == wanted[:, None]).to(torch.uint8)
    samples = samples.masked_fill(outside | ~known[:, None], UNKNOWN)
    return samples.unflatten(1, (GRID, GRID))


def cell_mask_logits(
    queries: torch.Tensor, pixels: torch.Tensor, ratios: torch.Tensor, points: torch.Tensor
) -> torch.Tensor:
    """Mask logits of cells at points.

    Args:
        queries (`torch.Tensor`): Of the cells `[n, d]`.
        pixels (`torch.Tensor`): Of their image `[d, h, w]`.
        ratios (`torch.Tensor`): Share of the map's (width, height) that is image, `[2]`.
        points (`torch.Tensor`): x and y in 0..1 of the image itself `[n, P, 2]`.

    Returns:
        `torch.Tensor`: float32 `[n, P]`, interpolated between the centres of pixels; beyond the last one it is its value.
    """
    h, w = pixels.shape[-2:]
    maps = torch.einsum("nd,dhw->nhw", queries, pixels).float()
    size = torch.stack((points.new_tensor(w), points.new_tensor(h)))
    inside = ratios.to(points.dtype) * size
    # In pixels of the map, whose centres are whole numbers; padding has no part in it.
    place = torch.minimum((points * inside - 0.5).clamp(min=0), inside - 1)
    place = (2 * place + 1) / size - 1
    return functional.grid_sample(maps[:, None], place[:, :, None].float(), align_corners=False)[:, 0, :, 0]


def cell_mask_loss(
    queries: torch.Tensor,
    pixels: torch.Tensor,
    ratios: torch.Tensor,
    boxes: torch.Tensor,
    masks: torch.Tensor,
    query: torch.Tensor,
    normaliser: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Cross-entropy and Dice loss of the masks of matched queries, each cell over its own samples.

    Args:
        queries (`torch.Tensor`): `[B, Q, d]`.
        pixels (`torch.Tensor`): `[B, d, h, w]`.
        ratios (`torch.Tensor`): `[B or 1, 2]`.
        boxes (`torch.Tensor`): True boxes cxcywh in 0..1 of the image itself `[B, N, 4]`.
        masks (`torch.Tensor`): uint8 `[B, N, GRID, GRID]`, see `sampled_masks`.
        query (`torch.Tensor`): Query of each cell `[B, N]`, Q for none.
        normaliser (`torch.Tensor`): What sums over cells are divided by.

    Returns:
        `dict[str, torch.Tensor]`: `loss_mask_bce` and `loss_mask_dice`, scalars with a graph.
    """
    count = queries.shape[1]
    bce = dice = queries.new_zeros((), dtype=torch.float32)
    for image in range(len(queries)):
        known = (masks[image].flatten(1) != UNKNOWN) & (query[image] < count)[:, None]
        wanted = masks[image].flatten(1).float() * known
        own = queries[image, query[image].clamp(max=count - 1)]
        points = mask_points(boxes[image])
        logits = cell_mask_logits(own, pixels[image], ratios[image % len(ratios)], points)
        entropy = functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none") * known
        seen = known.sum(1)
        bce = bce + (entropy.sum(1) / seen.clamp(min=1)).sum()
        found = logits.sigmoid() * known
        overlap = 1 - (2 * (found * wanted).sum(1) + 1) / (found.sum(1) + wanted.sum(1) + 1)
        dice = dice + (overlap * (seen > 0)).sum()
    return {"loss_mask_bce": bce / normaliser, "loss_mask_dice": dice / normaliser}


@torch.no_grad()
def masks_in_boxes(
    queries: torch.Tensor,
    pixels: torch.Tensor,
    ratios: torch.Tensor,
    boxes: Sequence[Sequence[int]],
    size: tuple[int, int],
) -> list[torch.Tensor]:
    """Masks of cells, each of the pixels of its box alone.

    Args:
        queries (`torch.Tensor`): Of the cells `[n, d]`.
        pixels (`torch.Tensor`): Of their image `[d, h, w]`.
        ratios (`torch.Tensor`): Share of the map's (width, height) that is image, `[2]`.
        boxes (`Sequence`): Left, top, right and bottom of each cell's pixels.
        size (`tuple[int, int]`): Height and width of the image in such pixels.

    Returns:
        `list[torch.Tensor]`: bool, on the host.
    """
    found = []
    (h, w), (height, width) = pixels.shape[-2:], size
    across, down = (ratios.tolist()[axis] * side for axis, side in ((0, w), (1, h)))
    for start in range(0, len(queries), AT_ONCE):
        maps = torch.einsum("nd,dhw->nhw", queries[start : start + AT_ONCE], pixels).float().cpu()
        for logits, (left, top, right, bottom) in zip(maps, boxes[start : start + AT_ONCE], strict=True):
            # One axis after the other, as bilinear interpolation is.
            columns = _along(logits, left, right, width, across, 1)
            found.append(_along(columns, top, bottom, height, down, 0) > 0)
    return found


def _along(logits: torch.Tensor, first: int, last: int, length: int, cells: float, axis: int) -> torch.Tensor:
    """Values of a map, interpolated along an axis, at the centres of pixels `first` to `last` of `length`."""
    place = ((torch.arange(first, last) + 0.5) / length * cells - 0.5).clamp(0, max(cells - 1, 0))
    low = place.floor().long()
    high = (low + 1).clamp(max=logits.shape[axis] - 1)
    share = (place - low).unsqueeze(1 - axis)
    return torch.lerp(logits.index_select(axis, low), logits.index_select(axis, high), share)


__all__ = [
    "GRID",
    "MARGIN",
    "MASKS",
    "UNKNOWN",
    "cell_mask_logits",
    "cell_mask_loss",
    "mask_points",
    "masks_in_boxes",
    "sampled_masks",
]
