"""Stain, light, lens and camera of another microscope: what of an image says nothing about its cells.

Amounts are those of the trials whose classifiers held best on microscopes that they had never seen.
"""

import io
import json
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F


# Draws beyond are clipped: one image in eighty, and the strangest.
MOST_DEVIATION = 2.5
# Standard deviations at full strength: of logarithms of factors, and of what is added.
OVERALL, EACH_STAIN, MIXING, BACKGROUND = 0.35, 0.2, 0.12, 0.06
GAMMA, CHANNEL, OFFSET, SATURATION = 0.25, 0.12, 0.04, 0.35
# Shares of images at full strength.
COARSE, DEFOCUSED, SHARPENED, NOISY, COMPRESSED = 1 / 3, 0.2, 0.2, 0.5, 0.3
MOST_NOISE = 0.03
JPEG_QUALITY = (30, 95)
_DENSITY = -np.log((np.arange(256, dtype=np.float32) + 1) / 256)
_LUMA = torch.tensor([0.299, 0.587, 0.114])


@cache
def stain_directions() -> torch.Tensor:
    """Directions of optical density of azure, of eosin and of what is neither, float32 `[3, 3]`, a column each.

    `stains.json` says how they were found.
    """
    read = json.loads(Path(__file__).with_name("stains.json").read_text(encoding="utf-8"))
    azure, eosin = (np.array(read[name]) for name in ("azure", "eosin"))
    neither = np.cross(azure, eosin)
    return torch.from_numpy(np.stack([v / np.linalg.norm(v) for v in (azure, eosin, neither)], 1)).float()


def recoloured(
    image: torch.Tensor, strength: float, rng: np.random.Generator, azure_and_eosin: bool = False
) -> torch.Tensor:
    """An image under another stain and light.

    Optical density is multiplied by a random 3 x 3 matrix near the identity, and has a background; then come gamma, the gain of
    each channel, an offset and saturation.

    Args:
        image (`torch.Tensor`): uint8 `[3, H, W]`.
        strength (`float`): Factor of all amounts.
        rng (`np.random.Generator`): Always asked for the same numbers.
        azure_and_eosin (`bool`): The factors are those of the two stains and of what is neither, instead of the channels.

    Returns:
        `torch.Tensor`: float32 `[3, H, W]` in 0..1.
    """
    drawn = rng.standard_normal(22).clip(-MOST_DEVIATION, MOST_DEVIATION) * strength
    drawn = torch.from_numpy(drawn).float()
    mixing = MIXING * drawn[:9].view(3, 3)
    mixing.fill_diagonal_(0)
    stains = torch.diag((EACH_STAIN * drawn[9:12]).exp())
    if azure_and_eosin:
        stains = stain_directions() @ stains @ stain_directions().inverse()
    stains = stains + mixing
    gamma = (GAMMA * drawn[12]).exp()
    matrix = gamma * (OVERALL * drawn[13]).exp() * stains
    background = gamma * BACKGROUND * drawn[14:17].abs() - CHANNEL * drawn[19:22]
    density = np.empty(image.shape, np.float32)
    for channel, out in zip(image.numpy(), density):
        np.take(_DENSITY, channel, out=out, mode="clip")
    density = torch.from_numpy(density).flatten(1)
    light = torch.addmm(background[:, None], matrix, density).neg_().exp_().clamp_(max=1)
    saturation = (SATURATION * drawn[17]).exp()
    colours = saturation * torch.eye(3) + (1 - saturation) * _LUMA.expand(3, 3)
    offset = (OFFSET * drawn[18]).expand(3, 1)
    return torch.addmm(offset, colours, light).clamp_(0, 1).view(image.shape)


def through_another_lens(pixels: torch.Tensor, strength: float, rng: np.random.Generator) -> torch.Tensor:
    """An image at less resolution, out of focus, sharpened, noisy or compressed, each now and then.

    Args:
        pixels (`torch.Tensor`): float32 `[3, H, W]` in 0..1.
        strength (`float`): Factor of how often each happens, 0..1.
        rng (`np.random.Generator`): The random numbers.

    Returns:
        `torch.Tensor`: float32 `[3, H, W]` in 0..1.
    """
    happens = rng.random(5) < strength * np.array([COARSE, DEFOCUSED, SHARPENED, NOISY, COMPRESSED])
    amounts = rng.random(5)
    if happens[0]:
        size = list(pixels.shape[-2:])
        factor = 2 if amounts[0] < 0.5 else 3
        coarse = F.resize(pixels, [max(1, side // factor) for side in size], antialias=True)
        pixels = F.resize(coarse, size, antialias=False)
    if happens[1]:
        pixels = smoothed(pixels, 0.5 + amounts[1])
    if happens[2]:
        pixels = pixels + (0.3 + 1.2 * float(amounts[2])) * (pixels - smoothed(pixels, 1.0))
    if happens[3]:
        noise = torch.from_numpy(rng.standard_normal(tuple(pixels.shape), dtype=np.float32))
        pixels = pixels + float(MOST_NOISE * amounts[3]) * noise
    pixels = pixels.clamp(0, 1)
    return _compressed(pixels, round(float(np.interp(amounts[4], (0, 1), JPEG_QUALITY)))) if happens[4] else pixels


def smoothed(pixels: torch.Tensor, sigma: float) -> torch.Tensor:
    """An image `[3, H, W]` of floats under a Gaussian of five pixels a side, mirrored at its edges.

    One axis after the other, by sums of shifted images: five times as fast as torchvision's, whose convolution has both at once.
    """
    weights = torch.exp(-0.5 * (torch.arange(3) / sigma) ** 2)
    centre, near, far = (weights / (weights[0] + 2 * weights[1:].sum())).tolist()
    for axis in (2, 1):
        size = pixels.shape[axis]
        # Images narrower than the Gaussian repeat their edge instead.
        mode = "reflect" if size > 2 else "replicate"
        padded = torch.nn.functional.pad(pixels[None], (2, 2, 0, 0) if axis == 2 else (0, 0, 2, 2), mode=mode)[0]
        shifted = [padded.narrow(axis, start, size) for start in range(5)]
        pixels = shifted[2] * centre
        pixels.add_(shifted[1], alpha=near).add_(shifted[3], alpha=near)
        pixels.add_(shifted[0], alpha=far).add_(shifted[4], alpha=far)
    return pixels


def _compressed(pixels: torch.Tensor, quality: int) -> torch.Tensor:
    image = Image.fromarray(as_bytes(pixels).permute(1, 2, 0).contiguous().numpy())
    kept = io.BytesIO()
    image.save(kept, "JPEG", quality=quality)
    read = np.asarray(Image.open(kept), dtype=np.float32).transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(read)) / 255


def as_bytes(pixels: torch.Tensor) -> torch.Tensor:
    """float32 in 0..1 as uint8."""
    return (pixels * 255).round_().to(torch.uint8)


__all__ = ["as_bytes", "recoloured", "smoothed", "stain_directions", "through_another_lens"]
