"""Multi-scale deformable attention as Triton kernels, forward and backward, for CUDA tensors.

A program takes a block of queries and one head, and reads four pixels for each of their samples. Only the inputs are saved
between forward and backward.
"""

import logging
from collections.abc import Callable
from functools import lru_cache

import torch


try:
    import triton
    import triton.language as tl

    constexpr, jit = tl.constexpr, triton.jit
except ImportError:
    triton, constexpr = None, int

    def jit(function):
        """Stands in where there is no Triton; the kernels are not called then."""
        return function


logger = logging.getLogger(__name__)

# Queries handled by one program.
QUERIES = 16
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@jit
def _program(NUMBER, HEADS: constexpr, QUERIES: constexpr):
    """Image, head and output rows of a program's block of queries, and which of these queries exist."""
    query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    image = tl.program_id(1) // HEADS
    head = tl.program_id(1) % HEADS
    bag = (image.to(tl.int64) * NUMBER + query) * HEADS + head
    return image, head, bag, query < NUMBER


@jit
def _locate(points, levels, place, sample, POINTS: constexpr, known):
    """Size and start of a sample's level, and the sample in pixels; 0 is the centre of the first pixel."""
    level = sample // POINTS
    height = tl.load(levels + level * 3)
    width = tl.load(levels + level * 3 + 1)
    start = tl.load(levels + level * 3 + 2)
    x = tl.load(points + place * 2, mask=known, other=0.0) * width - 0.5
    y = tl.load(points + place * 2 + 1, mask=known, other=0.0) * height - 0.5
    return height, width, start, x, y


@jit
def _pixel(x, y, height, width, start, image, head, TOKENS, HEADS: constexpr, known):
    """Row of the value that holds the pixel at the integers (x, y), and whether that pixel exists."""
    there = known & (x >= 0) & (x < width) & (y >= 0) & (y < height)
    column = tl.where(there, x, 0.0).to(tl.int32)
    row = tl.where(there, y, 0.0).to(tl.int32)
    pixel = (image.to(tl.int64) * TOKENS + start + row * width + column) * HEADS + head
    return pixel, there


@jit
def _forward(
    value,
    levels,
    points,
    weights,
    output,
    NUMBER,
    TOKENS,
    HEADS: constexpr,
    SAMPLES: constexpr,
    POINTS: constexpr,
    WIDTH: constexpr,
    PADDED: constexpr,
    QUERIES: constexpr,
):
    image, head, bag, known = _program(NUMBER, HEADS, QUERIES)
    channel = tl.arange(0, PADDED)
    used = channel < WIDTH
    total = tl.zeros((QUERIES, PADDED), dtype=tl.float32)
    for sample in range(SAMPLES):
        place = bag * SAMPLES + sample
        height, width, start, x, y = _locate(points, levels, place, sample, POINTS, known)
        weight = tl.load(weights + place, mask=known, other=0.0)
        left = tl.floor(x)
        top = tl.floor(y)
        for corner in tl.static_range(4):
            column = left + corner % 2
            row = top + corner // 2
            share = weight * (1 - tl.abs(x - column)) * (1 - tl.abs(y - row))
            pixel, there = _pixel(column, row, height, width, start, image, head, TOKENS, HEADS, known)
            mask = there[:, None] & used[None, :]
            read = tl.load(value + pixel[:, None] * WIDTH + channel[None, :], mask=mask, other=0.0)
            total += share[:, None] * read.to(tl.float32)
    tl.store(output + bag[:, None] * WIDTH + channel[None, :], total, mask=known[:, None] & used[None, :])


@jit
def _backward(
    gradient,
    value,
    levels,
    points,
    weights,
    of_value,
    of_points,
    of_weights,
    NUMBER,
    TOKENS,
    HEADS: constexpr,
    SAMPLES: constexpr,
    POINTS: constexpr,
    WIDTH: constexpr,
    PADDED: constexpr,
    QUERIES: constexpr,
):
    image, head, bag, known = _program(NUMBER, HEADS, QUERIES)
    channel = tl.arange(0, PADDED)
    used = channel < WIDTH
    wanted = known[:, None] & used[None, :]
    slope = tl.load(gradient + bag[:, None] * WIDTH + channel[None, :], mask=wanted, other=0.0).to(tl.float32)
    for sample in range(SAMPLES):
        place = bag * SAMPLES + sample
        height, width, start, x, y = _locate(points, levels, place, sample, POINTS, known)
        weight = tl.load(weights + place, mask=known, other=0.0)
        left = tl.floor(x)
        top = tl.floor(y)
        along_x = tl.zeros((QUERIES,), dtype=tl.float32)
        along_y = tl.zeros((QUERIES,), dtype=tl.float32)
        along_weight = tl.zeros((QUERIES,), dtype=tl.float32)
        for corner in tl.static_range(4):
            column = left + corner % 2
            row = top + corner // 2
            across = 1 - tl.abs(x - column)
            down = 1 - tl.abs(y - row)
            pixel, there = _pixel(column, row, height, width, start, image, head, TOKENS, HEADS, known)
            mask = there[:, None] & used[None, :]
            offset = pixel[:, None] * WIDTH + channel[None, :]
            read = tl.load(value + offset, mask=mask, other=0.0).to(tl.float32)
            product = tl.sum(read * slope, axis=1)
            along_weight += product * across * down
            # Moving the point to the right raises the weight of the right pixel and lowers that of the left one.
            along_x += product * down * (2 * (corner % 2) - 1)
            along_y += product * across * (2 * (corner // 2) - 1)
            share = weight * across * down
            tl.atomic_add(of_value + offset, share[:, None] * slope, mask=mask)
        tl.store(of_weights + place, along_weight, mask=known)
        tl.store(of_points + place * 2, along_x * weight * width, mask=known)
        tl.store(of_points + place * 2 + 1, along_y * weight * height, mask=known)


def _sizes(value: torch.Tensor, points: torch.Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    batch, tokens, heads, width = value.shape
    number, levels, each = points.shape[1], points.shape[3], points.shape[4]
    constants = {
        "NUMBER": number,
        "TOKENS": tokens,
        "HEADS": heads,
        "SAMPLES": levels * each,
        "POINTS": each,
        "WIDTH": width,
        "PADDED": triton.next_power_of_2(width),
        "QUERIES": QUERIES,
    }
    return (triton.cdiv(number, QUERIES), batch * heads), constants


class _Kernels(torch.autograd.Function):
    @staticmethod
    def forward(ctx, level_shapes, value, points, weights):
        starts, rows = 0, []
        for h, w in level_shapes:
            rows.append((h, w, starts))
            starts += h * w
        levels = torch.tensor(rows, dtype=torch.int32).to(value.device)
        ctx.save_for_backward(value, levels, points, weights)
        batch, _, heads, width = value.shape
        output = value.new_empty(batch, points.shape[1], heads * width)
        grid, constants = _sizes(value, points)
        _forward[grid](value, levels, points, weights, output, **constants)
        return output

    @staticmethod
    def backward(ctx, gradient):
        value, levels, points, weights = ctx.saved_tensors
        of_value = torch.zeros_like(value, dtype=torch.float32)
        of_points, of_weights = torch.empty_like(points), torch.empty_like(weights)
        grid, constants = _sizes(value, points)
        _backward[grid](
            gradient.contiguous(), value, levels, points, weights, of_value, of_points, of_weights, **constants
        )
        return None, of_value.to(value.dtype), of_points, of_weights


def run_kernels(
    value: torch.Tensor,
    level_shapes: list[tuple[int, int]],
    sampling_points: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """Weighted sum of bilinear samples; see [`multi_scale_deformable_attention`]. Sums are float32.

    Args:
        value, level_shapes, sampling_points, weights: As there; `value` of one of `DTYPES`.
    """
    return _Kernels.apply(
        level_shapes, value.contiguous(), sampling_points.float().contiguous(), weights.float().contiguous()
    )


def takes_kernels(value: torch.Tensor, sampling_points: torch.Tensor, plain: Callable) -> bool:
    """Whether the kernels run on the device of these tensors and support their dtypes.

    Args:
        value (`torch.Tensor`): Of any device.
        sampling_points (`torch.Tensor`): Of float32 or less.
        plain (`Callable`): The plain form that the kernels are checked against.
    """
    if triton is None or value.device.type != "cuda" or torch.compiler.is_compiling():
        return False
    if value.dtype not in DTYPES or sampling_points.dtype not in DTYPES:
        return False
    return _work_on(value.device, plain)


@lru_cache
def _work_on(device: torch.device, plain: Callable) -> bool:
    """Whether kernels and plain form agree on a device, tried once on a small problem."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 7), (3, 2)]
    value = torch.randn(2, 41, 2, 32, generator=generator)
    points = torch.rand(2, 19, 2, 2, 3, 2, generator=generator) * 1.6 - 0.3
    weights = torch.rand(2, 19, 2, 2, 3, generator=generator)
    found = []
    try:
        for form in (plain, run_kernels):
            with torch.enable_grad():
                parts = [part.to(device).requires_grad_() for part in (value, points, weights)]
                output = form(parts[0], shapes, parts[1], parts[2])
                found.append([output, *torch.autograd.grad(output.square().sum(), parts)])
        right = all(torch.allclose(a, b, rtol=1e-4, atol=1e-3) for a, b in zip(*found))
    except Exception as error:
        logger.warning("The Triton kernels do not run on %s, the plain form is used: %s", device, error)
        return False
    if not right:
        logger.warning("The Triton kernels give other results on %s, so the plain form is used.", device)
    return right


__all__ = ["run_kernels", "takes_kernels"]
