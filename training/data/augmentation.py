"""Random views of a smear: orientation, zoom and stain, for image, boxes and mask together."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from unihema.errors import InputError
from unihema.training.data.framing import framed
from unihema.training.data.optics import as_bytes, recoloured, smoothed, through_another_lens


# Least part of a cell that is anything: below, what is left is as good as background.
LEAST_VISIBLE = 0.1


@dataclass
class AugmentationConfig:
    """How far training images may be changed. All zero (`AugmentationConfig.none()`) leaves them as they are.

    Args:
        flip (`float`): Probability of a mirror image, for each axis.
        transpose (`float`): Probability of exchanging the axes; with the flips, all 8 orientations (a smear has none).
            The view keeps the proportions of the image, or batches would be mostly padding: an oblong image is turned
            only where its window fits.
        brightness (`float`): Largest relative change of brightness.
        contrast (`float`): Largest relative change of contrast.
        saturation (`float`): Largest relative change of saturation.
        hue (`float`): Largest rotation of hue, as part of a full turn.
        stain (`float`): Largest relative change of the optical density of each colour channel.
        blur (`float`): Probability of a slight defocus.
        zoom (`float`): Probability of cutting a window out of the image.
        zoom_min (`float`): Smallest side of the window, as part of the image's.
        min_visible (`float`): A cell stays a target if at least this part of its box is inside the window; one of which less is
            seen is no background either.
        scale (`float`): Largest relative change of the size at which the images of a batch are seen, for microscopes of other
            magnifications: 0.5 draws a size between 1 / 1.5 and 1.5 times the task's. Larger sizes take longer.
        mosaic (`float`): Probability that a field of detection becomes part of a mosaic of 1 x 2 to 3 x 3 windows of fields of
            its data set, in which cells are as large as in a field seen whole, down to a third. Fields in shards stand alone.
        colour (`float`): Strength of the stain and light of another microscope, 0 to 2, instead of `brightness`, `contrast`,
            `saturation`, `hue` and `stain`. At 1 the optical density has an overall factor of exp(0.35 n), one of exp(0.2 n) for
            each channel, mixing of 0.12 n between channels and a background of 0.06 |n|; gamma is exp(0.25 n), the gain of each
            channel exp(0.12 n), an offset 0.04 n, saturation exp(0.35 n), each n normally distributed. Answers about colours
            would not stay true.
        azure_eosin (`float`): Probability that `colour`'s factors of channels are those of azure, of eosin and of what is neither
            (`stains.json`).
        optics (`float`): How often an image is of another lens or camera, instead of `blur`. At 1 every third is at half or a
            third of its resolution, every fifth out of focus, every fifth sharpened, every second noisy, three in ten compressed.
        framing (`float`): Probability of framing a single cell anew, instead of `zoom`. Beyond the edge the image goes on
            mirrored, or its last pixels are repeated.
        seen_min (`float`): Least of the crop's sides that is seen.
        seen_max (`float`): Most of them; above 1 the crop is seen with a margin.
        shift (`float`): How far the middle of what is seen may be from the crop's, as part of its sides; of a cell cut from a
            field, from the middle of its box, so that the cell is still the one nearest to the middle.
        aspect (`float`): Largest relative change of height to width.
        fill_min (`float`): Least part of the view's sides that a cell cut from a field fills; the most is all of it.
    """

    flip: float = 0.5
    transpose: float = 0.5
    brightness: float = 0.15
    contrast: float = 0.15
    saturation: float = 0.2
    hue: float = 0.02
    stain: float = 0.15
    blur: float = 0.1
    zoom: float = 0.5
    zoom_min: float = 0.6
    min_visible: float = 0.5
    scale: float = 0.0
    mosaic: float = 0.0
    colour: float = 0.0
    azure_eosin: float = 0.0
    optics: float = 0.0
    framing: float = 0.0
    seen_min: float = 0.45
    seen_max: float = 1.15
    shift: float = 0.17
    aspect: float = 0.1
    fill_min: float = 0.25

    def __post_init__(self):
        for name, value in vars(self).items():
            most = 2 if name in ("colour", "seen_max") else 1
            if not 0 <= value <= most:
                raise InputError(f"AugmentationConfig.{name}={value} must lie in [0, {most}].")
        if self.framing and not (0.1 <= self.seen_min <= self.seen_max and self.fill_min >= 0.05):
            raise InputError(
                f"AugmentationConfig: seen_min={self.seen_min} must be 0.1 or more and at most seen_max={self.seen_max}, "
                f"fill_min={self.fill_min} 0.05 or more, or nothing of a cell is seen."
            )
        if self.zoom and self.zoom_min < 0.1:
            raise InputError(
                f"AugmentationConfig.zoom_min={self.zoom_min} leaves nothing of the image: use 0.1 or more."
            )

    @classmethod
    def none(cls) -> "AugmentationConfig":
        """Images stay as they are."""
        return cls(**dict.fromkeys(cls.__dataclass_fields__, 0.0))

    @classmethod
    def for_task(cls, task: str) -> "AugmentationConfig":
        """The defaults of a task.

        A window would make answers about counts and sizes untrue, and strong colour changes those about colours, so
        language tasks have neither. A classifier of single cells that has seen one framing and one stain knows no other; in
        fields cells of all sizes and places are seen anyway, and half the colour is enough.
        """
        if task in ("question_answering", "cloze"):
            return cls(brightness=0.1, contrast=0.1, saturation=0.1, hue=0.0, stain=0.08, zoom=0.0)
        if task == "single_cell":
            return cls(zoom=0.0, colour=1.0, optics=1.0, framing=1.0)
        return cls(colour=0.5, optics=0.5)


class View(NamedTuple):
    """What is seen of an image.

    Args:
        image (`torch.Tensor`): uint8 `[3, h, w]`.
        boxes (`torch.Tensor`, *optional*): `[m, 4]`, xywh pixels, of the cells that are still targets.
        kept (`torch.Tensor`): Their indices, int64 `[m]`.
        mask (`torch.Tensor`, *optional*): `[h, w]`.
        cut_boxes (`torch.Tensor`, *optional*): `[k, 4]`, of cells of which too little is left for a target; they are no
            background either.
        cut (`torch.Tensor`): Their indices, int64 `[k]`.
    """

    image: torch.Tensor
    boxes: torch.Tensor | None
    kept: torch.Tensor
    mask: torch.Tensor | None
    cut_boxes: torch.Tensor | None
    cut: torch.Tensor


def augmentation_rng(seed: int, view: int, index: int) -> np.random.Generator:
    """The random numbers of one view of a sample, independent of the order in which samples are read."""
    return np.random.default_rng(np.random.SeedSequence([seed, view, index]))


def drawn_scale(config: AugmentationConfig, rng: np.random.Generator) -> float:
    """A factor of the image size, as often below 1 as above."""
    return (1 + config.scale) ** rng.uniform(-1, 1)


def augment(
    image: torch.Tensor,
    config: AugmentationConfig,
    rng: np.random.Generator,
    boxes: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
    cell: Sequence[float] | None = None,
    edge: int | None = None,
) -> View:
    """One random view.

    Args:
        image (`torch.Tensor`): uint8 `[3, H, W]`.
        config (`AugmentationConfig`): How far to go.
        rng (`np.random.Generator`): See `augmentation_rng`.
        boxes (`torch.Tensor`, *optional*): float `[n, 4]`, xywh pixels.
        mask (`torch.Tensor`, *optional*): uint8 `[H, W]`.
        reduce (`Callable`, *optional*): Gives of a window the pixels that the model sees of it, where these are fewer. Colour and
            focus are then changed in these alone.
        cell (`Sequence[float]`, *optional*): The box of the cell that the view is of, xywh pixels; the view is cut around it.
        edge (`int`, *optional*): The longest side of the model's input, where a view that is framed anew need not be larger.

    Returns:
        [`View`].
    """
    # Always the same draws, so that changing one setting does not change what the others do.
    draws = rng.random(16)
    framing, nuisance = rng.spawn(2)
    if boxes is None and mask is None:
        image = framed(image, config, framing, cell, edge)
    count = 0 if boxes is None else len(boxes)
    kept, visible = torch.arange(count), torch.ones(count)
    parts: list[torch.Tensor] = [tv_tensors.Image(image)]
    if boxes is not None:
        parts.append(tv_tensors.BoundingBoxes(boxes, format="XYWH", canvas_size=image.shape[-2:]))
    if mask is not None:
        parts.append(tv_tensors.Mask(mask))

    if draws[0] < config.flip:
        parts = [F.horizontal_flip(part) for part in parts]
    if draws[1] < config.flip:
        parts = [F.vertical_flip(part) for part in parts]
    height, width = image.shape[-2:]
    side = config.zoom_min + (1 - config.zoom_min) * draws[4] if draws[3] < config.zoom else 1.0
    window = max(1, round(height * side)), max(1, round(width * side))
    if draws[2] < config.transpose:
        nearly_square = max(height, width) <= 1.1 * min(height, width)
        if nearly_square:
            window = window[::-1]
        if nearly_square or (window[0] <= width and window[1] <= height):
            parts = [_transpose(part) for part in parts]
            height, width = width, height
    if window != (height, width):
        corner = int(draws[5] * (height - window[0] + 1)), int(draws[6] * (width - window[1] + 1))
        parts, kept, visible = _crop(parts, corner, window, config.min_visible, boxes is not None)

    share = 1.0
    if reduce is not None:
        smaller = reduce(parts[0].as_subclass(torch.Tensor))
        if smaller.shape[-2:] != parts[0].shape[-2:]:
            share = smaller.shape[-1] / parts[0].shape[-1]
            parts = [tv_tensors.Image(smaller), *(_at_size(part, smaller.shape[-2:]) for part in parts[1:])]
    pixels = parts[0].as_subclass(torch.Tensor)
    if not config.optics and draws[7] < config.blur:
        pixels = smoothed(pixels.float(), share * (0.5 + 0.7 * draws[8])).round_().to(torch.uint8)
    if not config.colour:
        pixels = _stain(pixels, config, draws[9:16] * 2 - 1)
    if config.colour or config.optics:
        stains = bool(nuisance.spawn(1)[0].random() < config.azure_eosin)
        changed = recoloured(pixels, config.colour, nuisance, stains) if config.colour else pixels.float() / 255
        pixels = as_bytes(through_another_lens(changed, config.optics, nuisance))
    rest = [part.as_subclass(torch.Tensor) for part in parts[1:]]
    seen = rest.pop(0) if boxes is not None else None
    whole = visible >= config.min_visible
    return View(
        pixels,
        None if seen is None else seen[whole],
        kept[whole],
        rest.pop(0) if mask is not None else None,
        None if seen is None else seen[~whole],
        kept[~whole],
    )


def _at_size(part: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    return F.resize(part, list(size), interpolation=F.InterpolationMode.NEAREST_EXACT)


def _transpose(part: torch.Tensor) -> torch.Tensor:
    if isinstance(part, tv_tensors.BoundingBoxes):
        height, width = part.canvas_size
        return tv_tensors.BoundingBoxes(
            part.as_subclass(torch.Tensor)[:, [1, 0, 3, 2]], format="XYWH", canvas_size=(width, height)
        )
    return tv_tensors.wrap(part.as_subclass(torch.Tensor).transpose(-1, -2).contiguous(), like=part)


def _crop(
    parts: list[torch.Tensor], corner: tuple[int, int], window: tuple[int, int], min_visible: float, has_boxes: bool
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """The parts within a window, the indices of the boxes of which something is left there, and how much of each."""
    (top, left), (h, w) = corner, window
    whole = parts[1].as_subclass(torch.Tensor) if has_boxes else torch.zeros(0, 4)
    parts = [part if isinstance(part, tv_tensors.BoundingBoxes) else F.crop(part, top, left, h, w) for part in parts]
    origin = torch.tensor([left, top], dtype=whole.dtype)
    start = (whole[:, :2] - origin).clamp(min=0)
    end = torch.minimum(whole[:, :2] + whole[:, 2:] - origin, torch.tensor([w, h], dtype=whole.dtype))
    size = (end - start).clamp(min=0)
    visible = size.prod(-1) / whole[:, 2:].prod(-1).clamp(min=1e-6)
    # A sliver below 1 pixel is nothing, whatever part of its cell it is.
    kept = torch.nonzero((visible >= min(LEAST_VISIBLE, min_visible)) & (size.amin(-1) >= 1)).flatten()
    if has_boxes:
        inside = torch.cat([start, size], dim=-1)[kept]
        parts[1] = tv_tensors.BoundingBoxes(inside, format="XYWH", canvas_size=(h, w))
    return parts, kept, visible[kept]


def _stain(image: torch.Tensor, config: AugmentationConfig, draws: np.ndarray) -> torch.Tensor:
    """Colour changes of a uint8 image in one table look-up and one 3x3 matrix.

    Multiplying the optical density of a channel is a power of its intensity, a table of 256 entries; brightness,
    contrast, saturation and hue are linear, so they are one matrix and an offset.
    """
    amounts = (config.brightness, config.contrast, config.saturation, config.hue)
    if not any(amounts) and not config.stain:
        return image
    if config.stain:
        powers = torch.from_numpy(1 + config.stain * draws[:3]).float()
        tables = (255 * torch.linspace(0, 1, 256)[None] ** powers[:, None]).numpy()
        looked_up = np.empty(image.shape, np.float32)
        for table, channel, out in zip(tables, image.numpy(), looked_up):
            # NumPy looks up bytes directly, torch would first widen them; "clip" spares the check of what a byte cannot exceed.
            np.take(table, channel, out=out, mode="clip")
        pixels = torch.from_numpy(looked_up)
    else:
        pixels = image.float()
    brightness, contrast, saturation = (1 + amount * draw for amount, draw in zip(amounts, draws[3:6]))
    angle = 2 * math.pi * config.hue * draws[6]
    luma = torch.tensor([0.299, 0.587, 0.114])
    grey = luma.expand(3, 3)
    matrix = _hue_rotation(angle) @ (saturation * torch.eye(3) + (1 - saturation) * grey)
    mean = pixels.mean(dim=(1, 2))
    offset = brightness * (1 - contrast) * (luma @ mean)
    pixels = torch.addmm(offset.expand(3, 1), brightness * contrast * matrix, pixels.flatten(1))
    return pixels.clamp_(0, 255).round_().to(torch.uint8).view_as(image)


def _hue_rotation(angle: float) -> torch.Tensor:
    """Rotation of RGB about the grey axis (Rodrigues' formula)."""
    cosine, sine = math.cos(angle), math.sin(angle) / math.sqrt(3)
    cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]])
    return cosine * torch.eye(3) + sine * cross + (1 - cosine) / 3 * torch.ones(3, 3)
