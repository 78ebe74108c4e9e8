"""Mosaics of fields: windows of several fields of a data set side by side, at the scale of one field or smaller."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torchvision.transforms.v2 import functional as F

from unihema.training.data.augmentation import LEAST_VISIBLE
from unihema.training.data.rows import Row


# Rows and columns of a mosaic, each as likely.
GRIDS = ((1, 2), (2, 1), (2, 2), (3, 3))
# Cells of a mosaic at most: fewer than the queries of the smallest preset.
MOST_CELLS = 150
# Of `objects`, what has an entry for each cell.
_OF_CELLS = ("bbox", "category", "morphology", "iscrowd", "segmentation")


@dataclass
class Field:
    """A field with its cells.

    Attributes:
        row (`Row`): Of detection.
        image (`torch.Tensor`): uint8 `[3, H, W]`.
        boxes (`torch.Tensor`): float32 `[n, 4]`, xywh pixels of the image.
        instances (`torch.Tensor`, *optional*): int32 `[H, W]`, the number of each cell, from 1, on its mask.
    """

    row: Row
    image: torch.Tensor
    boxes: torch.Tensor
    instances: torch.Tensor | None = None


def share_seen(cells: Sequence[int], grid: tuple[int, int], draw: float) -> float:
    """Sides of the window of each field, as part of the largest window that has its place's proportions: from where cells are as
    large as in a field seen whole, to 1, unless that would be more than `MOST_CELLS`.

    Args:
        cells (`Sequence[int]`): Of each field.
        grid (`tuple[int, int]`): Rows and columns.
        draw (`float`): 0..1.
    """
    share = (1 / min(grid)) ** (1 - draw)
    seen_at_most = sum(cells) * min(grid) / max(grid)
    return min(share, (MOST_CELLS / max(1, seen_at_most)) ** 0.5)


def mosaic_of(
    fields: Sequence[Field],
    grid: tuple[int, int],
    share: float,
    size: tuple[int, int],
    rng: np.random.Generator,
    min_visible: float,
) -> tuple[Field, list[int]]:
    """One image of windows of several fields.

    Cells are clipped at the seams. One of which less than `min_visible` is left is no target, and no background either: it
    becomes a crowd, whose box is ignored.

    Args:
        fields (`Sequence[Field]`): As many as the grid has places; of one data set, whose annotated classes are the same.
        grid (`tuple[int, int]`): Rows and columns.
        share (`float`): Sides of each window, see `share_seen`.
        size (`tuple[int, int]`): Height and width of what is given.
        rng (`np.random.Generator`): Where the windows lie.
        min_visible (`float`): Least part of a box that has to be seen.

    Returns:
        `tuple[Field, list[int]]`: The mosaic, whose row has the cells of all fields; and for each of its boxes the number of the
        cell in that row.
    """
    edges = [[round(side * number / parts) for number in range(parts + 1)] for side, parts in zip(size, grid)]
    image = torch.empty(3, *size, dtype=torch.uint8)
    has_masks = any(field.instances is not None for field in fields)
    instances = torch.zeros(size, dtype=torch.int32) if has_masks else None
    row = _joined([field.row for field in fields], size)
    boxes, numbers, first = [], [], 0
    for place, field in enumerate(fields):
        down, right = divmod(place, grid[1])
        top, left = edges[0][down], edges[1][right]
        tile = edges[0][down + 1] - top, edges[1][right + 1] - left
        window = _window(field.image.shape[-2:], tile, share, rng)
        seen, visible = _visible(field.boxes, window, tile)
        # A sliver below 1 pixel is nothing, whatever part of its cell it is.
        kept = torch.nonzero((visible >= min(LEAST_VISIBLE, min_visible)) & (seen[:, 2:].amin(-1) >= 1)).flatten()
        boxes.append(seen[kept] + torch.tensor([left, top, 0, 0]))
        numbers += (kept + first).tolist()
        for cell in kept[visible[kept] < min_visible].tolist():
            row["objects"]["iscrowd"][cell + first] = 1
        image[:, top : top + tile[0], left : left + tile[1]] = F.resize(_cut(field.image, window), tile, antialias=True)
        if field.instances is not None:
            cut = F.resize(_cut(field.instances[None], window), tile, interpolation=F.InterpolationMode.NEAREST_EXACT)[
                0
            ]
            instances[top : top + tile[0], left : left + tile[1]] = torch.where(cut > 0, cut + first, 0)
        first += len(field.boxes)
    return Field(row, image, torch.cat(boxes), instances), numbers


def _window(size: Sequence[int], tile: tuple[int, int], share: float, rng: np.random.Generator) -> tuple[int, ...]:
    """Top, left, height and width of a window of the tile's proportions: the largest that fits, times the share."""
    scale = share * min(size[0] / tile[0], size[1] / tile[1])
    height, width = (max(1, min(whole, round(side * scale))) for whole, side in zip(size, tile))
    top, left = rng.integers(0, size[0] - height + 1), rng.integers(0, size[1] - width + 1)
    return int(top), int(left), height, width


def _cut(image: torch.Tensor, window: tuple[int, ...]) -> torch.Tensor:
    top, left, height, width = window
    return image[:, top : top + height, left : left + width]


def _visible(boxes: torch.Tensor, window: tuple[int, ...], tile: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """What is seen of each box, in pixels of the tile, and what part of it that is."""
    top, left, height, width = window
    low = (boxes[:, :2] - torch.tensor([left, top])).clamp(min=0)
    high = torch.minimum(boxes[:, :2] + boxes[:, 2:] - torch.tensor([left, top]), torch.tensor([width, height]))
    sides = (high - low).clamp(min=0)
    scale = torch.tensor([tile[1] / width, tile[0] / height])
    visible = sides.prod(-1) / boxes[:, 2:].prod(-1).clamp(min=1e-6)
    return torch.cat([low * scale, sides * scale], -1), visible


def _joined(rows: Sequence[Row], size: tuple[int, int]) -> Row:
    """The row of a mosaic: all cells of its fields, one field after another."""
    names = [name for name in _OF_CELLS if name == "iscrowd" or any(name in row["objects"] for row in rows)]
    empty = {"morphology": {}, "iscrowd": 0, "segmentation": None}
    objects: dict[str, list] = {name: [] for name in names}
    for row in rows:
        for name in names:
            objects[name] += row["objects"].get(name) or [empty.get(name)] * len(row["objects"]["bbox"])
    return rows[0] | {"objects": objects, "size": (size[1], size[0])}


__all__ = ["GRIDS", "MOST_CELLS", "Field", "mosaic_of", "share_seen"]
