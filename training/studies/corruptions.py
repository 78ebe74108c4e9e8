"""What can go wrong with a photograph of a smear, each in five severities.

The idea and the five levels are those of Hendrycks and Dietterich (arXiv 1903.12261); what is corrupted, and how far, is
chosen for a microscope: focus, light, stain, camera, file and magnification. An image keeps its size; boxes and masks
follow a magnification.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from unihema.errors import InputError, InputTypeError
from unihema.processing_unihema.image_io import image_size, load_image
from unihema.results.tile_layout import border_colour
from unihema.training.data.layouts.masks import read_mask
from unihema.training.data.rows import Row
from unihema.training.data.shards import StoredFile, readable


LEVELS = 5
# A cell is still one to find if so much of its box is in the image, as in training.
MIN_VISIBLE = 0.5
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
    options = {"fillcolor": border_colour(image)} if amount < 1 else {}
    small = image
    if amount < 1:
        # What is sampled more coarsely than it is must be smoothed first.
        size = max(1, round(width * amount)), max(1, round(height * amount))
        small = image.resize(size, Image.Resampling.LANCZOS).resize(image.size, Image.Resampling.BICUBIC)
    return small.transform(image.size, Image.Transform.AFFINE, inverse, Image.Resampling.BILINEAR, **options)


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


class CorruptedFile(StoredFile):
    """An image, or its mask, that is corrupted when it is opened.

    Args:
        source (`str`, `StoredFile`, `PIL.Image.Image` or `np.ndarray`): The image or mask as it is.
        corruption (`str`): Name of the corruption.
        severity (`int`): From 1 to `LEVELS`.
        name (`str`): What its random numbers are drawn by.
        is_mask (`bool`): A mask only follows a magnification.
        levels (`Sequence[int]`, *optional*): Of a mask, those that are shown; see `read_mask`.
    """

    def __new__(
        cls,
        source: Any,
        corruption: str,
        severity: int,
        name: str,
        is_mask: bool = False,
        levels: Sequence[int] | None = None,
    ):
        place = source if isinstance(source, str) else f"{name}@{id(source)}"
        # Masks of other levels of one file are other masks.
        kind = f"|mask{levels or ''}" if is_mask else ""
        made = str.__new__(cls, f"{place}|{corruption}{severity}{kind}")
        made.source, made.corruption, made.severity, made.name = source, corruption, severity, name
        made.is_mask, made.levels = is_mask, levels
        return made

    def __getnewargs__(self):
        return self.source, self.corruption, self.severity, self.name, self.is_mask, self.levels

    def content(self) -> bytes:
        """There is no file of it.

        Raises:
            TypeError: Always.
        """
        raise InputTypeError(f"{self}: a corrupted image is not in a file.")

    def opened(self) -> Image.Image:
        """The corrupted image, or the mask that goes with it."""
        corruption = CORRUPTIONS[self.corruption]
        amount = corruption.amounts[self.severity - 1]
        if self.is_mask:
            return _magnified_mask(read_mask(self.source, self.levels), amount)
        image = load_image(readable(self.source))
        return corruption.apply(image, amount, np.random.default_rng([zlib.crc32(self.name.encode()), self.severity]))


def shifted_rows(rows: Sequence[Row], corruption: Corruption, severity: int) -> list[Row]:
    """Rows of one task under a corruption.

    Args:
        rows (`Sequence[Row]`): Rows of any task.
        corruption ([`Corruption`]): Which one; of `density` the fields of that fifth of each data set.
        severity (`int`): From 1 to `LEVELS`; 0 leaves the rows as they are.

    Raises:
        ValueError: There is no such severity.
    """
    if not 0 <= severity <= LEVELS:
        raise InputError(f"Severities go from 0 (as it is) to {LEVELS}, got {severity}.")
    if severity == 0:
        return list(rows)
    if corruption.apply is None:
        return _fifth_by_count(rows, severity)
    shifted = []
    for row in rows:
        changed = row | {"image": CorruptedFile(row["image"], corruption.name, severity, row["file_name"])}
        if corruption.zooms and row["task"] == "segmentation":
            # What it gives is cell or not; levels are looked for in the mask that it is made of.
            levels = changed.pop("mask_levels", None)
            changed["mask"] = CorruptedFile(
                row["mask"], corruption.name, severity, row["file_name"], is_mask=True, levels=levels
            )
        if corruption.zooms and row["task"] == "detection":
            changed["objects"] = _magnified_objects(row, corruption.amounts[severity - 1])
        shifted.append(changed)
    return shifted


def _magnified_objects(row: Row, amount: float) -> dict[str, Any]:
    """Boxes in the magnified image, clipped to it; cells of which less than `MIN_VISIBLE` is left are gone."""
    source = readable(row["image"])
    size = np.array(row.get("size") or image_size(source)[::-1], float)
    boxes = np.asarray(row["objects"]["bbox"], float).reshape(-1, 4)
    corners = np.concatenate((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), 1)
    middle = np.tile(size / 2, 2)
    moved = (corners - middle) * amount + middle
    clipped = moved.clip(0, np.tile(size, 2))
    sides = clipped[:, 2:] - clipped[:, :2]
    visible = sides.prod(1) / np.maximum((moved[:, 2:] - moved[:, :2]).prod(1), 1e-6)
    kept = np.flatnonzero((visible >= MIN_VISIBLE) & (sides.min(1, initial=np.inf) >= 1))
    objects = {name: [values[number] for number in kept] for name, values in row["objects"].items()}
    # Masks are not magnified; what is measured here are boxes.
    objects.pop("segmentation", None)
    objects["bbox"] = np.concatenate((clipped[:, :2], sides), 1)[kept].tolist()
    return objects


def _magnified_mask(mask: np.ndarray, amount: float) -> Image.Image:
    height, width = mask.shape
    inverse = (1 / amount, 0, width / 2 * (1 - 1 / amount), 0, 1 / amount, height / 2 * (1 - 1 / amount))
    return Image.fromarray(mask).transform((width, height), Image.Transform.AFFINE, inverse, Image.Resampling.NEAREST)


def _fifth_by_count(rows: Sequence[Row], number: int) -> list[Row]:
    """Of each data set's fields, sorted by their cells, one of `LEVELS` equal parts; so every part has all data sets."""
    chosen = []
    for dataset in dict.fromkeys(row["dataset"] for row in rows):
        own = sorted((row for row in rows if row["dataset"] == dataset), key=lambda row: len(row["objects"]["bbox"]))
        chosen += [own[place] for place in np.array_split(np.arange(len(own)), LEVELS)[number - 1]]
    return chosen


__all__ = ["CORRUPTIONS", "LEVELS", "CorruptedFile", "Corruption", "magnified", "shifted_rows"]
