"""Heads of detection, segmentation and single-cell classification."""

import torch
from torch import nn

from .configuration_unihema import UniHemaConfig
from .layers import ClassLinear, class_scores
from .padding import hold_edge, ignore_padding, without_padding


class DetectionHead(nn.Module):
    """Class scores and morphology of each query; the boxes come from the decoder, which refines them layer by layer."""

    def __init__(self, config: UniHemaConfig):
        super().__init__()
        self.class_head = class_scores(config.d_model, config.num_labels)
        values = sum(config.morphology_sizes)
        self.morphology_head = nn.Linear(config.d_model, values) if values else None

    def forward(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Decoder states `[..., d]` to class logits `[..., num_labels]` and morphology logits `[..., all values]`."""
        if self.morphology_head is None:
            return self.class_head(states), states[..., :0]
        return self.class_head(states), self.morphology_head(states)


class SingleCellHead(nn.Module):
    """Class of a single-cell crop: an MLP d, d, d/2, n with LeakyReLU and dropout."""

    def __init__(self, config: UniHemaConfig):
        super().__init__()
        width = config.d_model
        self.layers = nn.Sequential(
            nn.Linear(width, width),
            nn.LeakyReLU(0.01),
            nn.Dropout(config.single_cell_dropout),
            nn.Linear(width, width // 2),
            nn.LeakyReLU(0.01),
            nn.Dropout(config.single_cell_dropout),
            ClassLinear(width // 2, len(config.single_cell_labels)),
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Single-cell features `[B, d]` to logits `[B, classes]`."""
        return self.layers(features)


def _convolution_block(channels_in: int, channels_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    )


def _twice(valid: torch.Tensor | None) -> torch.Tensor | None:
    return None if valid is None else valid.repeat_interleave(2, 1).repeat_interleave(2, 2)


class MaskHead(nn.Module):
    """Brings a mask from the finest feature level to the image's own size, by bilinear or learned upsampling."""

    def __init__(self, config: UniHemaConfig):
        super().__init__()
        self.learnable = config.upsampler == "learnable"
        if self.learnable:
            width = config.d_model
            self.features = nn.Sequential(_convolution_block(2 * width, width), _convolution_block(width, width))
            self.upsample = nn.ModuleList(
                [_convolution_block(width + 1, width // 2), _convolution_block(width // 2, width // 4)]
            )
            self.output = nn.Conv2d(width // 4, 1, kernel_size=3, padding=1)
            ignore_padding(self)

    def forward(
        self,
        logits: torch.Tensor,
        features: torch.Tensor,
        size: tuple[int, int],
        valid: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            logits (`torch.Tensor`): Mask logits `[B, 1, h, w]`.
            features (`torch.Tensor`): QueryGuidedMaskFinder's maps `[B, 2d, h, w]`.
            size (`tuple[int, int]`): `(H, W)` wanted.
            valid (`torch.Tensor`, *optional*): Boolean `[B, h, w]`, `False` on padding that must not be seen.

        Returns:
            `torch.Tensor`: Mask logits `[B, H, W]`.
        """
        if self.learnable:
            with without_padding(valid):
                logits = torch.cat((self.features(features), logits), 1)
            for block in self.upsample:
                logits = nn.functional.interpolate(hold_edge(logits, valid), scale_factor=2, mode="bilinear")
                valid = _twice(valid)
                with without_padding(valid):
                    logits = block(logits)
            with without_padding(valid):
                logits = self.output(logits)
        return nn.functional.interpolate(hold_edge(logits, valid), size=size, mode="bilinear")[:, 0]
