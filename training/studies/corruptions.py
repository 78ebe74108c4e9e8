"""What can go wrong with a photograph of a smear, each in five severities.

The idea and the five levels are those of Hendrycks and Dietterich (arXiv 1903.12261); what is corrupted, and how far, is
chosen for a microscope: focus, light, stain, camera, file and magnification. An image keeps its size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F


LEVELS = 5
# Optical density that a Romanowsky stain's blue (azure on nuclei) and red (eosin) dye put into red, green and blue light:
# those of haematoxylin and eosin (Ruifrok and Johnston 2001), the third what neither explains.
_DYES = np.array([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105], [0.268, 0.570, 0.776]])


@dataclass(frozen=True)
class Corruption:
    """A kind of corruption.

    Args:
        name (`str`): Its name.
        unit (`str`): What the amounts are.
        amounts (`tuple[float, ...]`): One for each severity, from 1.
        apply (`Callable`): From an RGB image, an amount and random numbers to the corrupted image, of the same size. `None`
            where it chooses among images instead.
        zooms (`bool`): Whether the amount is a magnification, which boxes and masks follow.
    """

    name: str
    unit: str
    amounts: tuple[float, ...]
    apply: Callable[[Image.Image, float, np.random.Generator], Image.Image] | None
    zooms: bool = False


def _defocus(image: Image.Image, amount: float, rng: np.random.Generator) -> Image.Image:
    """Light of each point spread over a disc, as a lens out of focus does."""
    radius = amount / 1000 * max(image.size)
    reach = int(np.ceil(radius))
    steps = np.arange(-reach, reach + 1)
    # The rim of the disc counts as far as it reaches into a pixel.
    disc = np.clip(radius + 0.5 - np.hypot(steps[:, None], steps), 0, 1)
    kernel = torch.from_numpy(disc / disc.sum()).float().expand(3, 1, -1, -1)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
    padded = torch.nn.functional.pad(pixels[None], [reach] * 4, mode="replicate")
    blurred = torch.nn.functional.conv2d(padded, kernel, groups=3)[0]
    return Image.fromarray(blurred.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy())


def _jpeg(image: Image.Image, amount: float, rng: np.random.Generator) -> Image.Image:
    encoded = F.jpeg(F.pil_to_tensor(image), quality=int(amount))
    return F.to_pil_image(encoded)


def _noise(image: Image.Image, amount: float, rng: np.random.Generator) -> Image.Image:
    pixels = np.asarray(image, np.float32)
    return _rounded(pixels + amount * rng.standard_normal(pixels.shape, dtype=np.float32))


def _exposure(image: Image.Image, amount: float, rng: np.random.Generator) -> Image.Image:
    """More or less light by photographic stops, burnt out where the sensor is full."""
    return _lit(image, np.full(3, 2.0**amount))


def _light_colour(image: Image.Image, amount: float, rng: np.random.Generator) -> Image.Image:
    """A lamp with more red and less blue light than the camera was set for, or the reverse where negative."""
    return _lit(image, np.array([1 + amount, 1.0, 1 - amount]))


def _lit(image: Image.Image, gain: np.ndarray) -> Image.Image:
    """Gains of red, green and blue in linear light (the transfer function of sRGB, IEC 61966-2-1)."""
    values = np.linspace(0, 1, 256)
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    tables = []
    for factor in gain:
        lit = np.clip(linear * factor, 0, 1)
        tables.append(255 * np.where(lit <= 0.0031308, lit * 12.92, 1.055 * lit ** (1 / 2.4) - 0.055))
    return image.point(np.concatenate(tables).round().astype(int).tolist())


def _stain_strength(image: Image.Image, amount: float, rng: np.random.Generator) -> Image.Image:
    return _stained(image, np.array([amount, amount, amount]))


def _stain_balance(image: Image.Image, amount: float, rng: np.random.Generator) -> Image.Image:
    """More of the blue dye and less of the red, or the reverse where negative."""
    return _stained(image, np.array([1 + amount, 1 - amount, 1.0]))


def _stained(image: Image.Image, factors: np.ndarray) -> Image.Image:
    """Amounts of the dyes multiplied, in optical density relative to the image's own clear background."""
    pixels = np.asarray(image, np.float64).reshape(-1, 3)
    light = np.maximum(np.percentile(pixels, 98, axis=0), 1)
    density = -np.log(np.clip(pixels, 1, None) / light)
    dyes = _DYES / np.linalg.norm(_DYES, axis=1, keepdims=True)
    changed = density @ np.linalg.inv(dyes) @ np.diag(factors) @ dyes
    return _rounded((light * np.exp(-changed)).reshape(*image.size[::-1], 3))


def _rounded(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def magnified(image: Image.Image, amount: float, rng: np.random.Generator | None = None) -> Image.Image:
    """The image `amount` times as large about its centre, in its own size: cut off, or on the colour of its border."""
    width, height = image.size
    middle = width / 2, height / 2
    inverse = (1 / amount, 0, middle[0] * (1 - 1 / amount), 0, 1 / amount, middle[1] * (1 - 1 / amount))
    options = {"fillcolor": _border_colour(image)} if amount < 1 else {}
    small = image
    if amount < 1:
        # What is sampled more coarsely than it is must be smoothed first.
        size = max(1, round(width * amount)), max(1, round(height * amount))
        small = image.resize(size, Image.Resampling.LANCZOS).resize(image.size, Image.Resampling.BICUBIC)
    return small.transform(image.size, Image.Transform.AFFINE, inverse, Image.Resampling.BILINEAR, **options)


def _border_colour(image: Image.Image) -> tuple[int, ...]:
    pixels = np.asarray(image)
    border = np.concatenate((pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]))
    return tuple(int(value) for value in np.median(border, axis=0))


CORRUPTIONS = {
    corruption.name: corruption
    for corruption in (
        Corruption("defocus", "radius in 1/1000 of the longer side", (2, 4, 6, 10, 16), _defocus),
        Corruption("jpeg", "quality", (50, 30, 20, 10, 5), _jpeg),
        Corruption("noise", "standard deviation in grey values", (5, 10, 20, 30, 45), _noise),
        Corruption("underexposure", "stops", (-0.5, -1, -1.5, -2, -2.5), _exposure),
        Corruption("overexposure", "stops", (0.25, 0.5, 0.75, 1, 1.5), _exposure),
        Corruption("warm_light", "part of red more and of blue less", (0.1, 0.2, 0.3, 0.4, 0.5), _light_colour),
        Corruption("cold_light", "part of blue more and of red less", (-0.1, -0.2, -0.3, -0.4, -0.5), _light_colour),
        Corruption("pale_stain", "times the dyes", (0.8, 0.6, 0.45, 0.3, 0.2), _stain_strength),
        Corruption("strong_stain", "times the dyes", (1.25, 1.5, 2, 2.5, 3), _stain_strength),
        Corruption("blue_stain", "part of the blue dye more, of the red less", (0.2, 0.4, 0.6, 0.8, 1), _stain_balance),
        Corruption(
            "red_stain", "part of the red dye more, of the blue less", (-0.2, -0.4, -0.6, -0.8, -1), _stain_balance
        ),
        Corruption("smaller_cells", "magnification", (0.85, 0.7, 0.55, 0.4, 0.3), magnified, zooms=True),
        Corruption("larger_cells", "magnification", (1.2, 1.5, 2, 2.5, 3), magnified, zooms=True),
        Corruption("density", "fifth of each data set's fields, from sparse to dense", (1, 2, 3, 4, 5), None),
    )
}

__all__ = ["CORRUPTIONS", "LEVELS", "Corruption", "magnified"]
