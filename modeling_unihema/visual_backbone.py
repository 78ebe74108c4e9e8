"""Image to feature levels: AutoBackbone, input projection, padding masks and sine positions."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import AutoBackbone

from unihema.errors import InputError

from .configuration_unihema import UniHemaConfig
from .deformable_triton import level_sizes
from .padding import MaskedGroupNorm, filled, ignore_padding, valid_at, without_padding


@dataclass
class FeatureLevels:
    """The projected feature maps of a batch, finest first, and where they lie. Without padding all images are alike: then the
    batch of `positions`, `centres` and `valid_ratios` is 1, which broadcasts.

    Attributes:
        maps (`list[torch.Tensor]`): `[B, d, h, w]` of each level.
        valid (`list[torch.Tensor]`): Boolean `[B, h, w]`, `True` on the image, `False` on padding.
        padded (`bool`): Whether any image may have padding.
        sizes (`torch.Tensor`): (w, h) of each level, `[levels, 2]`.
        positions (`torch.Tensor`): Sine positions of all tokens, `[B, S, d]`.
        centres (`torch.Tensor`): Centre of each token relative to the image itself, not to its padding: (x, y) `[B, S, 2]`;
            beyond 1 on padding.
        valid_ratios (`torch.Tensor`): Share of each level's (width, height) that is image, `[B, levels, 2]`.
        padding (`torch.Tensor`, *optional*): `[B, S]`, `True` on padded tokens; `None` when there are none.
        backbone_means (`torch.Tensor`, *optional*): Mean of each channel of the backbone's own maps over the image, levels
            concatenated, float32 `[B, D]`, without gradient. No task reads it; out-of-distribution scores do.
    """

    maps: list[torch.Tensor]
    valid: list[torch.Tensor]
    padded: bool
    sizes: torch.Tensor
    positions: torch.Tensor
    centres: torch.Tensor
    valid_ratios: torch.Tensor
    padding: torch.Tensor | None = None
    backbone_means: torch.Tensor | None = None

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """`(h, w)` of each level."""
        return [tuple(level.shape[-2:]) for level in self.maps]

    @property
    def tokens(self) -> torch.Tensor:
        """All levels as tokens, `[B, S, d]`."""
        return flatten_levels(self.maps)

    def repeat_images(self, times: int) -> "FeatureLevels":
        """Repeats each image `times` times in a row, for several questions about one image."""

        def repeated(part: Any) -> Any:
            if isinstance(part, list):
                return [repeated(level) for level in part]
            return part.repeat_interleave(times, 0) if isinstance(part, torch.Tensor) and len(part) > 1 else part

        if len(self.maps[0]) == 1:
            grown = [level.expand(times, -1, -1, -1) for level in self.maps]
            valid = [mask.expand(times, -1, -1) for mask in self.valid]
            return replace(self, maps=grown, valid=valid)
        parts = ("maps", "valid", "positions", "centres", "valid_ratios", "padding", "backbone_means")
        return replace(self, **{name: repeated(getattr(self, name)) for name in parts})


def flatten_levels(maps: list[torch.Tensor]) -> torch.Tensor:
    """`[B, d, h, w]` maps to tokens `[B, S, d]`, levels one after the other, row-major."""
    return torch.cat([level.flatten(2) for level in maps], dim=2).transpose(1, 2)


def feature_levels(
    maps: list[torch.Tensor],
    valid: list[torch.Tensor] | None,
    temperature: float,
    backbone_means: torch.Tensor | None = None,
) -> FeatureLevels:
    """Where the tokens of feature maps lie. All that depends on a row or a column alone is computed once for it.

    Args:
        maps (`list[torch.Tensor]`): `[B, d, h, w]` of each level.
        valid (`list[torch.Tensor]`, *optional*): Boolean `[B, h, w]`, `True` on the image, a rectangle; all when missing.
        temperature (`float`): Base of the sine positions' wavelengths.
        backbone_means (`torch.Tensor`, *optional*): See [`FeatureLevels`].
    """
    like = maps[0]
    # Half precision would move sampling points by whole pixels.
    precise = torch.empty((), dtype=torch.promote_types(torch.float32, like.dtype), device=like.device)
    shapes = [tuple(level.shape[-2:]) for level in maps]
    sizes = level_sizes(shapes, precise)
    # Rows of a level, then its columns, level after level.
    lengths = [length for shape in shapes for length in shape]
    ramp = torch.arange(max(lengths), dtype=precise.dtype, device=like.device)
    place = torch.cat([ramp[:length] for length in lengths])
    whole = torch.cat([sizes[number // 2, 1 - number % 2].expand(length) for number, length in enumerate(lengths)])
    place, whole = place[None], whole[None]
    centres = (place + 0.5) / whole
    if valid is None:
        padding, ratios = None, torch.ones_like(sizes)[None]
        counted, last = place + 1, whole
    else:
        inside = [axis for mask in valid for axis in (mask.any(2), mask.any(1))]
        counts = [axis.cumsum(1, dtype=precise.dtype) for axis in inside]
        padding = ~torch.cat([mask.flatten(1) for mask in valid], dim=1)
        ratios = torch.stack([count[:, -1] for count in counts], 1).unflatten(1, (-1, 2)).flip(2) / sizes
        counted = torch.cat(counts, 1)
        last = torch.cat([count[:, -1:].expand_as(count) for count in counts], 1)
    wavelength = sine_wavelengths(like.shape[1] // 2, temperature, place.float())
    codes = sine_codes(counted.float() / (last.float() + 1e-6), wavelength).to(like.dtype)
    # Nothing is counted where a whole row or column is padding. 0 and 1 are sine and cosine of that.
    none = torch.arange(codes.shape[-1], device=like.device).remainder(2).to(codes.dtype) if valid is not None else None
    of_levels, of_tokens = [], []
    for level, ((y, x), (down, right)) in enumerate(
        zip(_pairs(codes.split(lengths, 1)), _pairs(centres.split(lengths, 1)))
    ):
        h, w = shapes[level]
        if valid is not None:
            rows, columns = inside[2 * level : 2 * level + 2]
            y = torch.where(columns[:, None, :, None], y[:, :, None], none)
            x = torch.where(rows[:, :, None, None], x[:, None], none)
            map_of = torch.cat((y, x), -1)
        else:
            map_of = torch.cat((y[:, :, None].expand(-1, -1, w, -1), x[:, None].expand(-1, h, -1, -1)), -1)
        of_levels.append(map_of.flatten(1, 2))
        grid = torch.stack((right[:, None].expand(-1, h, -1), down[:, :, None].expand(-1, -1, w)), -1).flatten(1, 2)
        of_tokens.append(grid if valid is None else grid / ratios[:, level, None])
    if valid is None:
        everywhere = torch.ones((), dtype=torch.bool, device=like.device)
        valid = [everywhere.expand(like.shape[0], *shape) for shape in shapes]
    return FeatureLevels(
        maps=maps,
        valid=valid,
        padded=padding is not None,
        sizes=sizes,
        positions=torch.cat(of_levels, 1),
        centres=torch.cat(of_tokens, 1),
        valid_ratios=ratios,
        padding=padding,
        backbone_means=backbone_means,
    )


def _pairs(axes: Sequence[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Rows and columns of each level."""
    return zip(axes[0::2], axes[1::2])


def sine_wavelengths(channels: int, temperature: float, like: torch.Tensor) -> torch.Tensor:
    """Wavelengths `[channels]` of [`sine_codes`], 1 to `temperature` radians, in images, of the dtype and on the device of
    `like`."""
    channel = torch.arange(channels, dtype=like.dtype, device=like.device)
    return temperature ** (2 * torch.div(channel, 2, rounding_mode="floor") / channels) / (2 * math.pi)


def sine_codes(share: torch.Tensor, wavelength: torch.Tensor) -> torch.Tensor:
    """Sine code of places along an axis (DETR, arXiv 2005.12872, appendix A.4).

    Args:
        share (`torch.Tensor`): Any shape: how much of the image lies before the place's end, up to 1.
        wavelength (`torch.Tensor`): See `sine_wavelengths`.

    Returns:
        `torch.Tensor`: `[..., channels]`, sines and cosines by turns, of the dtype of `share`.
    """
    angle = share[..., None] / wavelength
    return torch.stack((angle[..., 0::2].sin(), angle[..., 1::2].cos()), dim=-1).flatten(-2)


@torch.no_grad()
def channel_means(maps: Sequence[torch.Tensor], valid: Sequence[torch.Tensor] | None) -> torch.Tensor:
    """Mean of each channel over the image.

    Args:
        maps (`Sequence[torch.Tensor]`): `[B, channels, h, w]` of each level.
        valid (`Sequence[torch.Tensor]`, *optional*): Boolean `[B, h, w]` of each level, `False` on padding.

    Returns:
        `torch.Tensor`: float32 `[B, D]`, D the channels of all levels.
    """
    if valid is None:
        return torch.cat([level.float().mean((2, 3)) for level in maps], 1)
    means = []
    for level, inside in zip(maps, valid):
        weight = inside[:, None].float()
        means.append((level.float() * weight).sum((2, 3)) / weight.sum((2, 3)).clamp(min=1))
    return torch.cat(means, 1)


def _is_strided_pointwise(module: nn.Module) -> bool:
    """Whether oneDNN (in PyTorch 2.14.1) writes past the end of its memory in the module's backward with channels last."""
    return isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.stride != (1, 1)


class InputProjection(nn.Sequential):
    """Convolution and GroupNorm that bring a map of the backbone to `d_model` channels."""

    def forward(self, maps: torch.Tensor, pixels: torch.Tensor | None) -> torch.Tensor:
        """Maps `[B, C, h, w]` of images whose valid pixels are `pixels`, boolean `[B, H, W]`, to `[B, d, h', w']`."""
        convolution, norm = self
        maps = convolution(maps)
        return norm(maps, valid_at(pixels, maps))


class VisualBackbone(nn.Module):
    """Backbone maps (C3, C4, C5), projected to `d_model`, plus coarser levels by stride-2 convolution."""

    def __init__(self, config: UniHemaConfig):
        super().__init__()
        self.config = config
        if config.backbone_config._attn_implementation != "eager":  # noqa: SLF001
            # Private, as in layers.py. Convolutional backbones refuse an attention requested by name. With none requested
            # each backbone takes its best.
            config.backbone_config._attn_implementation = None  # noqa: SLF001
        try:
            self.backbone = AutoBackbone.from_config(config.backbone_config)
        except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            # Each family of backbones raises its own at fields that contradict each other.
            raise InputError(f"backbone_config makes no backbone: {str(error)[:200]!r}.") from error
        groups = math.gcd(32, config.d_model // 4)
        channels = self.backbone.channels
        self.input_projection = nn.ModuleList()
        for level in range(config.num_feature_levels):
            if level < len(channels):
                convolution = nn.Conv2d(channels[level], config.d_model, kernel_size=1)
            else:
                width = channels[-1] if level == len(channels) else config.d_model
                convolution = nn.Conv2d(width, config.d_model, kernel_size=3, stride=2, padding=1)
            self.input_projection.append(InputProjection(convolution, MaskedGroupNorm(groups, config.d_model)))
        ignore_padding(self.backbone)
        ignore_padding(self.input_projection)
        self._trains_channels_last = not any(map(_is_strided_pointwise, self.backbone.modules()))
        self.freeze_norms()

    def freeze_norms(self) -> None:
        """Where the configuration freezes BatchNorms, their weights get no gradient."""
        if self.config.freeze_backbone_norm:
            for module in self._norms():
                module.requires_grad_(False)

    def _norms(self):
        return (m for m in self.backbone.modules() if isinstance(m, nn.BatchNorm2d))

    def train(self, mode: bool = True) -> "VisualBackbone":
        """Sets the training mode; frozen BatchNorms stay in evaluation mode."""
        super().train(mode)
        if self.config.freeze_backbone_norm:
            for module in self._norms():
                module.eval()
        return self

    def forward(self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None = None) -> FeatureLevels:
        """
        Args:
            pixel_values (`torch.Tensor`): `[B, 3, H, W]`, normalised.
            pixel_mask (`torch.Tensor`, *optional*): `[B, H, W]`, 1 on the image, 0 on padding. All image when missing. It may
                stay on the host, where it can be read without waiting for the device.

        Returns:
            [`FeatureLevels`]: `config.num_feature_levels` levels, finest first.
        """
        # A mask on the host is read there. One on an accelerator is not read back: then there may be padding.
        unread = pixel_mask is not None and (torch.compiler.is_compiling() or pixel_mask.device.type != "cpu")
        padded = unread or (pixel_mask is not None and not bool(pixel_mask.all()))
        pixels = pixel_mask.to(pixel_values.device, non_blocking=True).bool() if padded else None
        # Valid pixels for convolutions and norms; with the official weights padding takes part there.
        counted = None if self.config.attend_to_padding else pixels
        trains = self._trains_channels_last and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if trains or pixel_values.is_cuda:
            # Depthwise and 1x1 convolutions, and above all their backward, are faster with channels last; on a GPU all are
            # in half precision.
            pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        if counted is not None:
            # Layers may write into the padding of their input, so the caller's images are copied.
            pixel_values = filled(pixel_values, counted, 0.0)
        with without_padding(counted):
            maps = list(self.backbone(pixel_values).feature_maps)
            # The first extra level comes from the last backbone map, further ones from the level before.
            sources = [*maps, maps[-1]]
            projected = []
            for level, project in enumerate(self.input_projection):
                projected.append(project(sources[level] if level < len(sources) else projected[-1], counted))
        valid = [valid_at(pixels, level) for level in projected] if padded else None
        return feature_levels(projected, valid, self.config.position_temperature, channel_means(maps, valid))
