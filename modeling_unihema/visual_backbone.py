"""Image to feature levels: AutoBackbone, input projection, padding masks and sine positions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoBackbone

from .configuration_unihema import UniHemaConfig
from .padding import MaskedGroupNorm, filled, ignore_padding, valid_at, without_padding


@dataclass
class FeatureLevels:
    """The projected feature maps of a batch, finest first.

    Attributes:
        maps (`list[torch.Tensor]`): `[B, d, h, w]` of each level.
        valid (`list[torch.Tensor]`): Boolean `[B, h, w]`, `True` on the image, `False` on padding.
        positions (`list[torch.Tensor]`): Sine positions `[B, d, h, w]`.
        padded (`bool`): Whether any image has padding at all.
        backbone_means (`torch.Tensor`): Mean of each channel of the backbone's own maps over the image, levels
            concatenated, float32 `[B, D]`, without gradient. No task reads it; out-of-distribution scores do.
    """

    maps: list[torch.Tensor]
    valid: list[torch.Tensor]
    positions: list[torch.Tensor]
    padded: bool = True
    backbone_means: torch.Tensor | None = None

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """`(h, w)` of each level."""
        return [tuple(level.shape[-2:]) for level in self.maps]

    @property
    def tokens(self) -> torch.Tensor:
        """All levels as tokens, `[B, S, d]`."""
        return flatten_levels(self.maps)

    @property
    def padding(self) -> torch.Tensor | None:
        """`[B, S]`, `True` on padded tokens; `None` when there are none."""
        if not self.padded:
            return None
        return ~torch.cat([mask.flatten(1) for mask in self.valid], dim=1)

    @property
    def valid_ratios(self) -> torch.Tensor:
        """Share of each level's (width, height) that is image, `[B, levels, 2]`."""
        ratios = []
        for mask in self.valid:
            height = mask[:, :, 0].sum(1) / mask.shape[1]
            width = mask[:, 0, :].sum(1) / mask.shape[2]
            ratios.append(torch.stack((width, height), -1))
        # Half precision would move sampling points by whole pixels.
        return torch.stack(ratios, 1).to(torch.promote_types(torch.float32, self.maps[0].dtype))

    def repeat_images(self, times: int) -> "FeatureLevels":
        """Repeats each image `times` times in a row, for several questions about one image."""
        parts = (self.maps, self.valid, self.positions)
        repeated = [[level.repeat_interleave(times, 0) for level in part] for part in parts]
        means = None if self.backbone_means is None else self.backbone_means.repeat_interleave(times, 0)
        return FeatureLevels(*repeated, self.padded, means)


def flatten_levels(maps: list[torch.Tensor]) -> torch.Tensor:
    """`[B, d, h, w]` maps to tokens `[B, S, d]`, levels one after the other, row-major."""
    return torch.cat([level.flatten(2) for level in maps], dim=2).transpose(1, 2)


def sine_positions(valid: torch.Tensor, d_model: int, temperature: float) -> torch.Tensor:
    """Sine position map that counts from the image's edges, not the padding's (DETR, arXiv 2005.12872, appendix A.4).

    Args:
        valid (`torch.Tensor`): Boolean `[B, h, w]`.
        d_model (`int`): Channels: the first half for y, the second for x.
        temperature (`float`): Base of the wavelengths.

    Returns:
        `torch.Tensor`: `[B, d_model, h, w]` float32.
    """
    channels = d_model // 2
    wavelength = torch.arange(channels, dtype=torch.float32, device=valid.device)
    wavelength = temperature ** (2 * torch.div(wavelength, 2, rounding_mode="floor") / channels)
    halves = []
    for axis in (1, 2):
        count = valid.cumsum(axis, dtype=torch.float32)
        count = count / (count.narrow(axis, count.shape[axis] - 1, 1) + 1e-6) * (2 * math.pi)
        angle = count[..., None] / wavelength
        halves.append(torch.stack((angle[..., 0::2].sin(), angle[..., 1::2].cos()), dim=-1).flatten(-2))
    return torch.cat(halves, dim=-1).permute(0, 3, 1, 2)


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
        self.backbone = AutoBackbone.from_config(config.backbone_config)
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
            pixel_mask (`torch.Tensor`, *optional*): `[B, H, W]`, 1 on the image, 0 on padding. All image when missing.

        Returns:
            [`FeatureLevels`]: `config.num_feature_levels` levels, finest first.
        """
        padded = pixel_mask is not None and (torch.compiler.is_compiling() or not bool(pixel_mask.all()))
        pixels = pixel_mask.bool() if padded else None
        # Valid pixels for convolutions and norms; with the official weights padding takes part there.
        counted = None if self.config.attend_to_padding else pixels
        if self._trains_channels_last and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # Depthwise and 1x1 convolutions, and above all their backward, are faster with channels last.
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
        valid, positions = [], []
        for level in projected:
            mask = valid_at(pixels, level)
            if mask is None:
                mask = torch.ones(level.shape[0], *level.shape[-2:], dtype=torch.bool, device=level.device)
            valid.append(mask)
            positions.append(
                sine_positions(mask, self.config.d_model, self.config.position_temperature).to(level.dtype)
            )
        return FeatureLevels(projected, valid, positions, padded, channel_means(maps, valid if padded else None))
