"""What a model sees of an image before any task: the backbone's features, averaged, and how sharp and bright the image is.

Both are taken while the model computes its answer anyway, so they cost an average and no forward pass.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch


QUALITIES = ("sharpness", "brightness", "white")
# From this grey value on (of 255) a pixel counts as burnt out.
_WHITE = 250


class Look(NamedTuple):
    """What was seen of the images of one forward pass.

    Args:
        features (`torch.Tensor`): `[B, D]` float32: mean of each channel of the backbone's maps.
        quality (`torch.Tensor`): `[B, 3]` float32, `QUALITIES`: variance of the Laplacian as part of the variance of the
            grey values; mean grey value, 0..255; share of burnt-out pixels.
    """

    features: torch.Tensor
    quality: torch.Tensor


@contextmanager
def looks_of(model: Any, processor: Any) -> Iterator[list[Look]]:
    """While it is open, collects a [`Look`] of every batch of images that goes through the model's backbone.

    Args:
        model ([`UniHemaForMultiTask`] or a model with one head): The model.
        processor ([`UniHemaProcessor`]): Its processor, for what normalised pixels mean.
    """
    backbone = model.model.visual_backbone
    normalised = processor.image_processor.image_mean, processor.image_processor.image_std
    looks: list[Look] = []
    maps: list[torch.Tensor] = []

    def started(module, inputs):
        maps.clear()

    def projecting(module, inputs):
        maps.append(inputs[0])

    def finished(module, inputs, options, levels):
        pixels = options.get("pixel_values", inputs[0] if inputs else None)
        looks.append(Look(pooled_features(maps, levels.valid), image_quality(pixels, levels.valid[0], *normalised)))
        maps.clear()

    # Not on the backbone itself: it runs as a faster copy of itself only where nobody watches its layers.
    projections = list(backbone.input_projection)[: len(backbone.backbone.channels)]
    handles = [backbone.register_forward_pre_hook(started)]
    handles += [convolution.register_forward_pre_hook(projecting) for convolution, _ in projections]
    handles.append(backbone.register_forward_hook(finished, with_kwargs=True))
    try:
        yield looks
    finally:
        for handle in handles:
            handle.remove()


def pooled_features(maps: Sequence[torch.Tensor], valid: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean of each channel over the image.

    Args:
        maps (`Sequence[torch.Tensor]`): `[B, channels, h, w]` of each level.
        valid (`Sequence[torch.Tensor]`): Boolean `[B, h, w]` of each level, `False` on padding.

    Returns:
        `torch.Tensor`: `[B, D]` float32, D the channels of all levels.
    """
    means = []
    for level, inside in zip(maps, valid):
        weight = inside[:, None].float()
        means.append((level.float() * weight).sum((2, 3)) / weight.sum((2, 3)).clamp(min=1))
    return torch.cat(means, 1)


def image_quality(
    pixel_values: torch.Tensor, valid: torch.Tensor, mean: Sequence[float], std: Sequence[float]
) -> torch.Tensor:
    """Sharpness, brightness and burnt-out share at the size at which the model sees the image; see [`Look`].

    Args:
        pixel_values (`torch.Tensor`): `[B, 3, H, W]`, normalised.
        valid (`torch.Tensor`): Boolean `[B, h, w]` of the finest level, `False` on padding.
        mean, std (`Sequence[float]`): With which they were normalised.

    Returns:
        `torch.Tensor`: `[B, 3]` float32.
    """
    shift, scale = (torch.tensor(list(values), device=pixel_values.device)[:, None, None] for values in (mean, std))
    found = []
    for pixels, inside in zip(pixel_values.float(), valid):
        # Padding lies at the right and bottom; a border cell of the level may still hold some of it, so that is left out.
        size = [
            side if bool(line.all()) else (int(line.sum()) - 1) * (side // len(line))
            for line, side in ((inside[:, 0], pixels.shape[1]), (inside[0], pixels.shape[2]))
        ]
        grey = 255 * (pixels[:, : max(size[0], 3), : max(size[1], 3)] * scale + shift).mean(0)
        centre = grey[1:-1, 1:-1]
        laplacian = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * centre
        sharpness = laplacian.var() / centre.var().clamp(min=1)
        found.append(torch.stack((sharpness, grey.mean(), (grey >= _WHITE).float().mean())))
    return torch.stack(found)


__all__ = ["QUALITIES", "Look", "image_quality", "looks_of", "pooled_features"]
