"""Multi-scale deformable attention: one public function and its backends (Deformable DETR, arXiv 2010.04159, eq. 3)."""

import logging
import math
from functools import lru_cache

import torch
from torch import nn

from .configuration_unihema import UniHemaConfig
from .deformable_cpu import fits, gather_rows
from .deformable_triton import DTYPES, level_sizes, run_kernels, triton
from .layers import initialised


logger = logging.getLogger(__name__)


def multi_scale_deformable_attention(
    value: torch.Tensor,
    level_shapes: list[tuple[int, int]],
    sampling_points: torch.Tensor,
    weights: torch.Tensor,
    sizes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weighted sum of bilinear samples from several feature levels.

    On the CPU samples are gathered as weighted rows of a table ([`gather_rows`]), on a GPU by Triton kernels where these
    work ([`run_kernels`]), elsewhere and in exported graphs by `grid_sample`. All give the same values and gradients up
    to float rounding.

    Args:
        value (`torch.Tensor`): `[B, S, heads, width]`, S the sum of `h * w` over the levels, row-major in each level.
        level_shapes (`list[tuple[int, int]]`): `(h, w)` of each level.
        sampling_points (`torch.Tensor`): `[B, Q, heads, levels, points, 2]`, (x, y) relative to the (padded) level,
            0 and 1 being its outer edges. Points outside read zeros.
        weights (`torch.Tensor`): `[B, Q, heads, levels, points]`.
        sizes (`torch.Tensor`, *optional*): `level_sizes` of `level_shapes`; made when missing.

    Returns:
        `torch.Tensor`: `[B, Q, heads * width]`.
    """
    exporting = torch.jit.is_tracing() or torch.compiler.is_exporting()
    supported = value.dtype in DTYPES and sampling_points.dtype in DTYPES
    if not exporting and supported and kernels_work(str(value.device)):
        sizes = level_sizes(level_shapes, sampling_points) if sizes is None else sizes
        return run_kernels(value, sizes, sampling_points, weights)
    if value.device.type != "cpu" or exporting or not fits(level_shapes):
        return sample_grid(value, level_shapes, sampling_points, weights)
    return gather_rows(value, level_shapes, sampling_points, weights)


# torch.compile asks once, while it traces, and records the answer.
@torch.compiler.assume_constant_result
def kernels_work(device: str) -> bool:
    """Whether the Triton kernels give what the plain form gives on a device."""
    return _tried(device)


@lru_cache
def _tried(device: str) -> bool:
    """Runs both on a small problem, once in a process."""
    if triton is None or not device.startswith("cuda"):
        return False
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 7), (3, 2)]
    value = torch.randn(2, 41, 2, 32, generator=generator)
    points = torch.rand(2, 19, 2, 2, 3, 2, generator=generator) * 1.6 - 0.3
    weights = torch.rand(2, 19, 2, 2, 3, generator=generator)
    found = []
    try:
        for form, levels in ((sample_grid, shapes), (run_kernels, level_sizes(shapes, points.to(device)))):
            with torch.enable_grad():
                parts = [part.to(device).requires_grad_() for part in (value, points, weights)]
                output = form(parts[0], levels, parts[1], parts[2])
                found.append([output, *torch.autograd.grad(output.square().sum(), parts)])
        right = all(torch.allclose(a, b, rtol=1e-4, atol=1e-3) for a, b in zip(*found))
    except Exception as error:
        logger.warning("The Triton kernels do not run on %s, the plain form is used: %s", device, error)
        return False
    if not right:
        logger.warning("The Triton kernels give other results on %s, so the plain form is used.", device)
    return right


def sample_grid(
    value: torch.Tensor,
    level_shapes: list[tuple[int, int]],
    sampling_points: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """The plain form, in operators that every device and export format supports; see [`multi_scale_deformable_attention`]."""
    batch, _, heads, width = value.shape
    queries = sampling_points.shape[1]
    precise = torch.promote_types(value.dtype, sampling_points.dtype)
    grid = (2 * sampling_points - 1).to(precise)
    samples = []
    for level, tokens in enumerate(value.to(precise).split([h * w for h, w in level_shapes], dim=1)):
        h, w = level_shapes[level]
        maps = tokens.permute(0, 2, 3, 1).reshape(batch * heads, width, h, w)
        level_grid = grid[:, :, :, level].transpose(1, 2).flatten(0, 1)
        samples.append(
            nn.functional.grid_sample(maps, level_grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        )
    samples = torch.cat(samples, dim=-1)
    weights = weights.transpose(1, 2).reshape(batch * heads, 1, queries, -1)
    output = (samples * weights).sum(-1).view(batch, heads * width, queries).transpose(1, 2)
    return output.to(value.dtype)


class MultiScaleDeformableAttention(nn.Module):
    """Deformable attention of queries to the flattened feature levels, with learned offsets around reference points."""

    def __init__(self, config: UniHemaConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.num_levels = config.num_feature_levels
        self.num_points = config.num_sampling_points
        samples = self.num_heads * self.num_levels * self.num_points
        self.sampling_offsets = initialised(nn.Linear(config.d_model, samples * 2), 0.0, self.initial_offsets)
        self.attention_weights = initialised(nn.Linear(config.d_model, samples), gain=0.0)
        self.value_proj = nn.Linear(config.d_model, config.d_model)
        self.output_proj = nn.Linear(config.d_model, config.d_model)

    def initial_offsets(self) -> torch.Tensor:
        """Offsets that start each head in its own compass direction, further out point by point: the bias
        `[heads * levels * points * 2]` of `sampling_offsets`."""
        angles = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        directions = torch.stack((angles.cos(), angles.sin()), -1)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        distance = torch.arange(1, self.num_points + 1, dtype=directions.dtype)
        offsets = directions[:, None, None, :] * distance[:, None]
        return offsets.expand(-1, self.num_levels, -1, -1).reshape(-1)

    def forward(
        self,
        query: torch.Tensor,
        reference: torch.Tensor,
        tokens: torch.Tensor,
        level_shapes: list[tuple[int, int]],
        sizes: torch.Tensor,
        padding: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            query (`torch.Tensor`): `[B, Q, d]`, position included.
            reference (`torch.Tensor`): `[B, Q, levels, 2]` points (x, y), or `[B, Q, levels, 4]` boxes cxcywh, relative
                to the padded levels.
            tokens (`torch.Tensor`): `[B, S, d]`.
            level_shapes (`list[tuple[int, int]]`): `(h, w)` of each level.
            sizes (`torch.Tensor`): The same as `level_sizes`, `[levels, 2]`.
            padding (`torch.Tensor`, *optional*): `[B, S]`, `True` on padded tokens, which read as zeros.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: Output `[B, Q, d]`, and weights `[B, Q, heads, levels, points]`.
        """
        batch, queries, _ = query.shape
        value = self.value_proj(tokens)
        if padding is not None:
            value = torch.where(padding[..., None], 0.0, value)
        value = value.unflatten(-1, (self.num_heads, -1))
        per_level = (self.num_heads, self.num_levels, self.num_points)
        offsets = self.sampling_offsets(query).view(batch, queries, *per_level, 2)
        weights = self.attention_weights(query).view(batch, queries, self.num_heads, -1).softmax(-1)
        weights = weights.view(batch, queries, *per_level)
        # On a processor contiguous over levels and points, so that the innermost loops are long.
        spread = (-1, -1, -1, -1, self.num_points, -1)
        centre = reference[:, :, None, :, None, :2].expand(spread)
        if centre.device.type == "cpu":
            centre = centre.contiguous()
        if reference.shape[-1] == 2:
            points = torch.addcdiv(centre, offsets, sizes[:, None])
        else:
            reach = reference[:, :, None, :, None, 2:].expand(spread) * (0.5 / self.num_points)
            points = torch.addcmul(centre, offsets, reach)
        return self.output_proj(multi_scale_deformable_attention(value, level_shapes, points, weights, sizes)), weights
