"""Crops of single cells: the nucleus is found, and the crop is framed and coloured as the crops of the training are."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from unihema.results.nuclei import STAINED, blueness, optical_density


if TYPE_CHECKING:
    import torch


# Longer side at which the nucleus is looked for, in pixels; and lobes that are nearer than twice this many are one nucleus.
SIDE, GAP = 96, 3
# Of a nucleus: how much bluer it is than the rest at least (optical density), the root of its area at least, as a part of that
# of the crop, and how far from the middle its box may lie, as a part of the crop's sides.
BLUER, LEAST_SHARE, FURTHEST = 0.05, 0.15, 0.3
# How much bluer it is than it is dark (to green light), at least: azure, as in nuclei, is 0.4 to 1.6 (PBC, WBC5, Bio-Net, LMU),
# the middle of a dense red cell 0.2 to 0.31 (Chula RBC-12). And how much of it is so itself: between lobes little is not, between
# the grains of noise much. With all of these 95 to 100 % of the nucleated cells of PBC, WBC5 and Bio-Net have a nucleus, and no
# red cell of Chula RBC-12.
LEAST_AZURE, LEAST_FILLED = 0.32, 0.6
# Of a lobe: how much less it counts away from the middle of the crop, where the cell lies and not its neighbour.
NEAR = 0.3
# A channel that varies less is not stretched further: it is no picture.
LEAST_DEVIATION = 4.0
# How much of the way a crop's colours are taken to those of the training, as measured (docs/results/abroad.md): all of it
# throws away what is right about them.
STRENGTH = 0.5
# Crops with a nucleus by which a frame is told.
FEWEST = 20


class Nucleus(NamedTuple):
    """A nucleus in a crop.

    Args:
        centre (`tuple[float, float]`): x, y in pixels.
        side (`float`): Root of the area of its box, in pixels.
    """

    centre: tuple[float, float]
    side: float


class CropFrame(NamedTuple):
    """What crops of nucleated cells look like in a checkpoint's training.

    Args:
        nucleus (`float`): Side of the box of a nucleus, as a part of the crop's.
        mean, deviation (`tuple[float, float, float]`): Of the red, green and blue of a crop, 0..255.
    """

    nucleus: float
    mean: tuple[float, float, float]
    deviation: tuple[float, float, float]

    @classmethod
    def of_checkpoint(cls, stored: Mapping[str, Sequence[float]] | None) -> "CropFrame | None":
        """What `config.trained.crop_frame` says."""
        if stored is None:
            return None
        mean, deviation = (tuple(float(value) for value in stored[name]) for name in ("mean", "deviation"))
        return cls(float(stored["nucleus"][0]), mean, deviation)  # type: ignore[arg-type]


def find_nucleus(image: Image.Image) -> Nucleus | None:
    """The nucleus of the cell that a crop shows: what absorbs red and green light more than blue, nearest to the middle.

    Args:
        image (`PIL.Image.Image`): The crop, RGB.

    Returns:
        [`Nucleus`] or `None`: `None` where there is nothing like one, as in a crop of a red cell or of a platelet.
    """
    from scipy import ndimage

    scale = min(1.0, SIDE / max(image.size))
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    pixels = np.asarray(image.convert("RGB").resize(size, Image.Resampling.BILINEAR))
    density = optical_density(pixels, np.percentile(pixels.reshape(-1, 3), 98, axis=0))
    blue = blueness(density)
    mask = (blue > max(_between(blue), BLUER)) & (density[..., 1] > STAINED)
    joined = ndimage.binary_closing(np.pad(mask, GAP + 1), iterations=GAP)[GAP + 1 : -GAP - 1, GAP + 1 : -GAP - 1]
    parts, number = ndimage.label(joined)
    if not number:
        return None
    areas = np.bincount(parts.ravel(), minlength=number + 1)[1:]
    middles = np.array(ndimage.center_of_mass(joined, parts, range(1, number + 1))) + 0.5
    away = np.hypot(*(middles / parts.shape - 0.5).T)
    best = int(np.argmax(areas * np.exp(-((away / NEAR) ** 2))))
    rows, columns = ndimage.find_objects(parts)[best]
    centre = (columns.start + columns.stop) / 2, (rows.start + rows.stop) / 2
    inside = parts == best + 1
    hollow = mask[inside].mean() < LEAST_FILLED
    not_azure = blue[inside & mask].mean() < LEAST_AZURE * density[inside & mask][:, 1].mean()
    too_small = math.sqrt(areas[best] / joined.size) < LEAST_SHARE
    if (
        hollow
        or not_azure
        or too_small
        or max(abs(x / side - 0.5) for x, side in zip(centre, size, strict=True)) > FURTHEST
    ):
        return None
    side = math.sqrt((columns.stop - columns.start) * (rows.stop - rows.start))
    to_x, to_y = image.width / size[0], image.height / size[1]
    return Nucleus((centre[0] * to_x, centre[1] * to_y), side * math.sqrt(to_x * to_y))


def _between(values: np.ndarray) -> float:
    """The value that parts values into two classes with the largest variance between them (Otsu 1979)."""
    counts, edges = np.histogram(values, 128)
    middles = (edges[:-1] + edges[1:]) / 2
    below, sums = np.cumsum(counts)[:-1], np.cumsum(counts * middles)
    above = counts.sum() - below
    variance = below * above * (sums[:-1] / np.maximum(below, 1) - (sums[-1] - sums[:-1]) / np.maximum(above, 1)) ** 2
    return float(edges[1:-1][np.argmax(variance)])


def framed(image: Image.Image, centre: Sequence[float], side: float) -> tuple[Image.Image, tuple[int, int, int, int]]:
    """A square part of a picture; its last pixels are repeated beyond its edges.

    Args:
        image (`PIL.Image.Image`): The picture.
        centre (`Sequence[float]`): x, y of the middle of the part, in pixels.
        side (`float`): Of the part, in pixels.

    Returns:
        `tuple[PIL.Image.Image, tuple[int, int, int, int]]`: The part, and where it lies: x_min, y_min, x_max, y_max.
    """
    pixels, edge = np.asarray(image), max(1, round(side))
    left, top = (round(middle - edge / 2) for middle in centre)
    rows = np.arange(top, top + edge).clip(0, pixels.shape[0] - 1)
    columns = np.arange(left, left + edge).clip(0, pixels.shape[1] - 1)
    return Image.fromarray(pixels[np.ix_(rows, columns)]), (left, top, left + edge, top + edge)


def recoloured(image: Image.Image, known: CropFrame, strength: float = STRENGTH) -> Image.Image:
    """A picture whose channels have the mean and the deviation that a checkpoint knows.

    Args:
        image (`PIL.Image.Image`): The picture, RGB.
        known ([`CropFrame`]): Of the checkpoint.
        strength (`float`): How much of the way, 0 to 1.
    """
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    mean, deviation = pixels.mean((0, 1)), pixels.std((0, 1)).clip(LEAST_DEVIATION)
    matched = (pixels - mean) / deviation * np.float32(known.deviation) + np.float32(known.mean)
    mixed = pixels + strength * (matched.clip(0, 255) - pixels)
    return Image.fromarray(np.rint(mixed.clip(0, 255)).astype(np.uint8))


def views_of(image: Image.Image, known: CropFrame) -> tuple[list[Image.Image], dict[str, Any]] | None:
    """A crop of a nucleated cell as a model knows such crops: as it was cut, and framed around the nucleus, both recoloured.

    Args:
        image (`PIL.Image.Image`): The crop.
        known ([`CropFrame`]): Of the checkpoint.

    Returns:
        `tuple[list[PIL.Image.Image], dict[str, Any]]` or `None`: The views, and what was done: `box` of the frame in pixels of
        the crop, `nucleus` (side of its box, as a part of the crop's) and `colour` (how much of the way to the training's).
        `None` where no nucleus is found.
    """
    nucleus = find_nucleus(image)
    if nucleus is None:
        return None
    view, box = framed(image, nucleus.centre, nucleus.side / known.nucleus)
    share = nucleus.side / math.sqrt(image.width * image.height)
    told = {"box": list(map(float, box)), "nucleus": round(share, 4), "colour": STRENGTH}
    return [recoloured(image, known), recoloured(view, known)], told


def logits_in_frame(
    images: Sequence[Image.Image],
    logits: "torch.Tensor",
    known: CropFrame,
    classify: "Callable[[list[Image.Image]], torch.Tensor]",
) -> "tuple[torch.Tensor, list[dict[str, Any] | None]]":
    """Logits of crops, of those of nucleated cells by their views.

    Args:
        images (`Sequence[PIL.Image.Image]`): The crops.
        logits (`torch.Tensor`): Of the crops as they are, `[B, classes]`.
        known ([`CropFrame`]): Of the checkpoint.
        classify (`Callable`): From pictures to logits `[n, classes]`; it gets at most as many as there are crops.

    Returns:
        `tuple[torch.Tensor, list[dict | None]]`: `[B, classes]`, of those with a nucleus the mean of the logarithms of the
        probabilities of their views; and of each crop what [`views_of`] says was done.
    """
    found = [views_of(image, known) for image in images]
    views = [view for each in found if each is not None for view in each[0]]
    if views:
        import torch

        parts = [
            classify(views[start : start + len(images)]).float().log_softmax(-1)
            for start in range(0, len(views), len(images))
        ]
        framed = [number for number, each in enumerate(found) if each is not None]
        logits = logits.clone()
        logits[framed] = torch.cat(parts).view(len(framed), -1, logits.shape[-1]).mean(1)
    return logits, [None if each is None else each[1] for each in found]


def measure_frame(crops: Sequence[Image.Image]) -> dict[str, list[float]] | None:
    """What crops of nucleated cells look like: `config.trained.crop_frame`.

    Args:
        crops (`Sequence[PIL.Image.Image]`): Of a training; those without a nucleus are left out.

    Returns:
        `dict[str, list[float]]` or `None`: Medians; `None` where fewer than `FEWEST` have a nucleus.
    """
    shares, means, deviations = [], [], []
    for crop in crops:
        nucleus = find_nucleus(crop)
        if nucleus is not None:
            pixels = np.asarray(crop.convert("RGB"), dtype=np.float32)
            shares.append(nucleus.side / math.sqrt(crop.width * crop.height))
            means.append(pixels.mean((0, 1)))
            deviations.append(pixels.std((0, 1)))
    if len(shares) < FEWEST:
        return None
    found: dict[str, Any] = {"nucleus": [np.median(shares)]}
    found |= {"mean": np.median(means, 0), "deviation": np.median(deviations, 0)}
    return {name: [round(float(value), 4) for value in values] for name, values in found.items()}


__all__ = [
    "CropFrame",
    "Nucleus",
    "find_nucleus",
    "framed",
    "logits_in_frame",
    "measure_frame",
    "recoloured",
    "views_of",
]
