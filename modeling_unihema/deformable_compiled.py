"""Multi-scale deformable attention on the CPU within torch.compile: one operator, its index arithmetic compiled by itself.

Traced into the graph around it, the arithmetic would fill tables of indices for all queries at once, which do not fit the
processor's cache. As an operator of its own it goes on in chunks, and the arithmetic of a chunk is one loop.
"""

import logging
import zlib
from collections.abc import Callable

import torch

from .deformable_gather import PLAIN, Arithmetic, gradients, read


logger = logging.getLogger(__name__)

# A checkpoint's own copy of this code may be loaded beside the package; each registers its operators.
_NAMESPACE = f"unihema_{zlib.crc32(__name__.encode()):08x}"


class _Fused:
    """A function compiled on its first call; run as it is where no compiler works."""

    def __init__(self, plain: Callable):
        self.plain = plain
        self.fast: Callable | None = torch.compile(plain, dynamic=True)

    def __call__(self, *arguments):
        if self.fast is not None:
            try:
                return self.fast(*arguments)
            except Exception as error:
                logger.warning("Compiling %s failed; it runs uncompiled: %s", self.plain.__name__, error)
                self.fast = None
        return self.plain(*arguments)


_FUSED = Arithmetic(*map(_Fused, PLAIN))


def _pairs(sizes: list[int]) -> list[tuple[int, int]]:
    return list(zip(sizes[::2], sizes[1::2]))


@torch.library.custom_op(f"{_NAMESPACE}::gather_rows", mutates_args=(), device_types="cpu")
def _read(value: torch.Tensor, sizes: list[int], points: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return read(_pairs(sizes), value, points, weights, _FUSED)


@_read.register_fake
def _(value, sizes, points, weights):
    return value.new_empty(points.shape[0], points.shape[1], value.shape[2] * value.shape[3])


@torch.library.custom_op(f"{_NAMESPACE}::gather_rows_backward", mutates_args=(), device_types="cpu")
def _gradients(
    gradient: torch.Tensor, value: torch.Tensor, sizes: list[int], points: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return gradients(_pairs(sizes), gradient, value, points, weights, _FUSED)


@_gradients.register_fake
def _(gradient, value, sizes, points, weights):
    return tuple(tensor.new_empty(tensor.shape) for tensor in (value, points, weights))


def _keep(ctx, inputs, output):
    value, ctx.sizes, points, weights = inputs
    ctx.save_for_backward(value, points, weights)


def _backward(ctx, gradient):
    value, points, weights = ctx.saved_tensors
    of_value, of_points, of_weights = _gradients(gradient, value, ctx.sizes, points, weights)
    return of_value, None, of_points, of_weights


_read.register_autograd(_backward, setup_context=_keep)


def gather_rows_compiled(
    value: torch.Tensor,
    level_shapes: list[tuple[int, int]],
    sampling_points: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """[`gather_rows`] for a graph that torch.compile makes; arguments as of [`multi_scale_deformable_attention`]."""
    precise = torch.promote_types(torch.float32, value.dtype)
    value_, points, weights = (tensor.to(precise) for tensor in (value, sampling_points, weights))
    sizes = [side for shape in level_shapes for side in shape]
    return _read(value_, sizes, points, weights).to(value.dtype)


__all__ = ["gather_rows_compiled"]
