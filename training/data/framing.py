"""How a single cell is framed: how much of its crop is seen, and where in it the cell lies."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torchvision.transforms.v2 import functional as F


if TYPE_CHECKING:
    # The module of the settings uses this one.
    from unihema.training.data.augmentation import AugmentationConfig


# Share of a crop's sides that a box has which is not framed at random: a crop of twice the box.
USUAL_FILL = 0.5
# A cell that lies at the edge of its crop may lose this share of its box.
MOST_CUT = 0.1


def framed(
    image: torch.Tensor,
    config: "AugmentationConfig | None",
    rng: np.random.Generator | None = None,
    cell: Sequence[float] | None = None,
    edge: int | None = None,
) -> torch.Tensor:
    """A single cell as it is framed: its crop as it is, or anew; a cell of a field cut out.

    Args:
        image (`torch.Tensor`): uint8 `[3, H, W]`, a crop or the field.
        config (`AugmentationConfig`, *optional*): How far to go; a cell of a field is cut out at twice its box, in the middle,
            without it or where `framing` does not happen.
        rng (`np.random.Generator`, *optional*): Needed with `config`.
        cell (`Sequence[float]`, *optional*): The box of the cell in a field, xywh pixels.
        edge (`int`, *optional*): The longest side of what is given, at most.

    Returns:
        `torch.Tensor`: uint8 `[3, h, w]`.
    """
    draws = rng.random(6) if config is not None else np.zeros(6)
    anew = config is not None and draws[0] < config.framing
    if not anew:
        return image if cell is None else seen_through(image, box_window(cell, USUAL_FILL, (0, 0), 1), 1, edge, False)
    stretch = (1 + config.aspect) ** (2 * draws[2] - 1)
    shift = config.shift * (2 * draws[3:5] - 1)
    mirrored = bool(draws[5] < 0.5)
    if cell is not None:
        fill = config.fill_min ** (1 - draws[1])
        return seen_through(image, box_window(cell, fill, shift, stretch), 1, edge, mirrored)
    height, width = image.shape[-2:]
    seen = config.seen_min + (config.seen_max - config.seen_min) * draws[1]
    window = whole_window((height, width), seen, shift, stretch)
    return seen_through(image, window, height / width, edge, mirrored)


def whole_window(size: Sequence[int], seen: float, shift: Sequence[float], stretch: float) -> np.ndarray:
    """A window over a crop: top, left, height, width in pixels, float64 `[4]`. It may reach beyond the crop.

    Args:
        size (`Sequence[int]`): Height and width of the crop.
        seen (`float`): Sides of the window, as part of the crop's.
        shift (`Sequence[float]`): How far its centre is from the crop's, down and right, as part of the crop's sides.
        stretch (`float`): Factor of its height to width beyond the crop's.
    """
    sides = np.array(size) * seen * np.array([math.sqrt(stretch), 1 / math.sqrt(stretch)])
    centre = np.array(size) * (0.5 + np.array(shift))
    return np.concatenate([centre - sides / 2, sides])


def box_window(box: Sequence[float], fill: float, shift: Sequence[float], stretch: float) -> np.ndarray:
    """A window around the box of a cell, as `whole_window` gives it.

    Args:
        box (`Sequence[float]`): xywh pixels.
        fill (`float`): The longer side of the box, as part of the window's.
        shift (`Sequence[float]`): How far the window's centre is from the box's, down and right, as part of the window's sides.
            It goes no further than to a cell at the edge that has lost `MOST_CUT` of its box.
        stretch (`float`): Factor of height to width.
    """
    x, y, width, height = box
    side = max(width, height) / fill
    sides = side * np.array([math.sqrt(stretch), 1 / math.sqrt(stretch)])
    reach = (sides - np.array([height, width])) / 2 + MOST_CUT * np.array([height, width])
    reach = reach.clip(min=0)
    centre = np.array([y + height / 2, x + width / 2]) + (np.array(shift) * sides).clip(-reach, reach)
    return np.concatenate([centre - sides / 2, sides])


def seen_through(
    image: torch.Tensor, window: np.ndarray, proportion: float, edge: int | None, mirrored: bool
) -> torch.Tensor:
    """What is seen through a window.

    Args:
        image (`torch.Tensor`): uint8 `[3, H, W]`.
        window (`np.ndarray`): Top, left, height, width.
        proportion (`float`): Height to width of what is given.
        edge (`int`, *optional*): Its longest side at most.
        mirrored (`bool`): Beyond its edge the image is mirrored; otherwise its last pixels are repeated.

    Returns:
        `torch.Tensor`: uint8 `[3, h, w]`.
    """
    top, left, height, width = (round(float(value)) for value in window)
    height, width = max(1, height), max(1, width)
    rows = _inside(top, height, image.shape[1], mirrored)
    columns = _inside(left, width, image.shape[2], mirrored)
    view = image[:, rows][:, :, columns]
    longest = max(height, width) if edge is None else min(edge, max(height, width))
    size = [max(1, round(longest * min(1.0, proportion))), max(1, round(longest / max(1.0, proportion)))]
    if size == [height, width]:
        return view.contiguous()
    return F.resize(view, size, antialias=True)


def _inside(start: int, length: int, size: int, mirrored: bool) -> slice | torch.Tensor:
    """Which pixels of an axis are seen."""
    if start >= 0 and start + length <= size:
        return slice(start, start + length)
    index = np.arange(start, start + length)
    if mirrored and size > 1:
        index = np.abs((index + size - 1) % (2 * size - 2) - (size - 1))
    return torch.from_numpy(index.clip(0, size - 1))


__all__ = ["MOST_CUT", "USUAL_FILL", "box_window", "framed", "seen_through", "whole_window"]
