"""Multi-scale deformable attention as Triton kernels, forward and backward, for CUDA tensors.

A program takes a block of queries and one head, and reads four pixels for each of their samples. Only the inputs are saved
between forward and backward. The kernels are registered operators of PyTorch (`torch.ops.unihema.deformable_attention`), so
torch.compile, torch.export and fake tensors know their shapes and gradients.
"""

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


# Queries handled by one program.
QUERIES = 16
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Sums of the deterministic backward are whole numbers of this share of the largest possible summand. 2**21 summands fit.
FINEST = 2.0**-41


@jit
def _program(NUMBER, HEADS: constexpr, QUERIES: constexpr):
    """Image, head and output rows of a program's block of queries, and which of these queries exist."""
    query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    image = tl.program_id(1) // HEADS
    head = tl.program_id(1) % HEADS
    bag = (image.to(tl.int64) * NUMBER + query) * HEADS + head
    return image, head, bag, query < NUMBER


@jit
def _level(sizes, level):
    """Width and height of a level in pixels."""
    return tl.load(sizes + level * 2).to(tl.int32), tl.load(sizes + level * 2 + 1).to(tl.int32)


@jit
def _locate(points, weights, place, width, height, known):
    """A sample in pixels of its level, 0 being the centre of the first pixel; the pixel up and left of it; its weight."""
    x = tl.load(points + place * 2, mask=known, other=0.0) * width - 0.5
    y = tl.load(points + place * 2 + 1, mask=known, other=0.0) * height - 0.5
    weight = tl.load(weights + place, mask=known, other=0.0).to(tl.float32)
    return x, y, tl.floor(x), tl.floor(y), weight


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
    sizes,
    points,
    weights,
    output,
    NUMBER,
    TOKENS,
    HEADS: constexpr,
    LEVELS: constexpr,
    POINTS: constexpr,
    WIDTH: constexpr,
    PADDED: constexpr,
    QUERIES: constexpr,
):
    image, head, bag, known = _program(NUMBER, HEADS, QUERIES)
    channel = tl.arange(0, PADDED)
    used = channel < WIDTH
    total = tl.zeros((QUERIES, PADDED), dtype=tl.float32)
    start = 0
    for level in range(LEVELS):
        width, height = _level(sizes, level)
        for point in range(POINTS):
            place = (bag * LEVELS + level) * POINTS + point
            x, y, left, top, weight = _locate(points, weights, place, width, height, known)
            for corner in tl.static_range(4):
                column = left + corner % 2
                row = top + corner // 2
                share = weight * (1 - tl.abs(x - column)) * (1 - tl.abs(y - row))
                pixel, there = _pixel(column, row, height, width, start, image, head, TOKENS, HEADS, known)
                mask = there[:, None] & used[None, :]
                read = tl.load(value + pixel[:, None] * WIDTH + channel[None, :], mask=mask, other=0.0)
                total += share[:, None] * read.to(tl.float32)
        start += height * width
    tl.store(output + bag[:, None] * WIDTH + channel[None, :], total, mask=known[:, None] & used[None, :])


@jit
def _backward(
    gradient,
    value,
    sizes,
    points,
    weights,
    scale,
    of_value,
    of_points,
    of_weights,
    NUMBER,
    TOKENS,
    HEADS: constexpr,
    LEVELS: constexpr,
    POINTS: constexpr,
    WIDTH: constexpr,
    PADDED: constexpr,
    QUERIES: constexpr,
    WHOLE: constexpr,
):
    image, head, bag, known = _program(NUMBER, HEADS, QUERIES)
    channel = tl.arange(0, PADDED)
    used = channel < WIDTH
    wanted = known[:, None] & used[None, :]
    slope = tl.load(gradient + bag[:, None] * WIDTH + channel[None, :], mask=wanted, other=0.0).to(tl.float32)
    start = 0
    for level in range(LEVELS):
        width, height = _level(sizes, level)
        for point in range(POINTS):
            place = (bag * LEVELS + level) * POINTS + point
            x, y, left, top, weight = _locate(points, weights, place, width, height, known)
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
                part = (weight * across * down)[:, None] * slope
                # Relaxed: nothing else is ordered by these sums, and the default order costs a fence each.
                if WHOLE:
                    counted = (part.to(tl.float64) * tl.load(scale)).to(tl.int64)
                    tl.atomic_add(of_value + offset, counted, mask=mask, sem="relaxed")
                else:
                    tl.atomic_add(of_value + offset, part, mask=mask, sem="relaxed")
            tl.store(of_weights + place, along_weight, mask=known)
            tl.store(of_points + place * 2, along_x * weight * width, mask=known)
            tl.store(of_points + place * 2 + 1, along_y * weight * height, mask=known)
        start += height * width


def _launch(value: torch.Tensor, points: torch.Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and constants of both kernels."""
    batch, tokens, heads, width = value.shape
    number, levels, each = points.shape[1], points.shape[3], points.shape[4]
    constants = {
        "NUMBER": number,
        "TOKENS": tokens,
        "HEADS": heads,
        "LEVELS": levels,
        "POINTS": each,
        "WIDTH": width,
        "PADDED": triton.next_power_of_2(width),
        "QUERIES": QUERIES,
    }
    return (triton.cdiv(number, QUERIES), batch * heads), constants


def _sample(value: torch.Tensor, sizes: torch.Tensor, points: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    batch, _, heads, width = value.shape
    output = value.new_empty(batch, points.shape[1], heads * width)
    grid, constants = _launch(value, points)
    torch.library.wrap_triton(_forward)[grid](value, sizes, points, weights, output, **constants)
    return output


def _gradients(
    gradient: torch.Tensor,
    value: torch.Tensor,
    sizes: torch.Tensor,
    points: torch.Tensor,
    weights: torch.Tensor,
    deterministic: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    of_value = torch.zeros_like(value, dtype=torch.int64 if deterministic else torch.float32)
    of_points, of_weights = torch.empty_like(points), torch.empty_like(weights)
    # Whole numbers give the same sum in any order. No summand is larger than the largest weight times the largest slope.
    unit = gradient.new_ones((), dtype=torch.float64)
    if deterministic:
        unit = (gradient.abs().amax().double() * weights.abs().amax().double()).clamp(min=1e-300) * FINEST
    grid, constants = _launch(value, points)
    torch.library.wrap_triton(_backward)[grid](
        gradient,
        value,
        sizes,
        points,
        weights,
        unit.reciprocal(),
        of_value,
        of_points,
        of_weights,
        **constants,
        WHOLE=deterministic,
    )
    if deterministic:
        of_value = of_value.double() * unit
    return of_value.to(value.dtype), of_points, of_weights


def _save_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, gradient):
    value, sizes, points, weights = ctx.saved_tensors
    deterministic = torch.are_deterministic_algorithms_enabled()
    of_value, of_points, of_weights = torch.ops.unihema.deformable_attention_gradients(
        gradient.contiguous(), value, sizes, points, weights, deterministic
    )
    return of_value, None, of_points, of_weights


# Code that a checkpoint carries is a second copy of this module; an operator is registered once in a process.
if triton is not None and not hasattr(torch.ops.unihema, "deformable_attention"):
    torch.library.triton_op("unihema::deformable_attention_gradients", _gradients, mutates_args=())
    torch.library.triton_op("unihema::deformable_attention", _sample, mutates_args=()).register_autograd(
        _differentiate, setup_context=_save_inputs
    )


def level_sizes(level_shapes: list[tuple[int, int]], like: torch.Tensor) -> torch.Tensor:
    """(w, h) of each level, `[levels, 2]`, of the dtype and on the device of `like`.

    Nothing is copied from the host: that would wait for a device, and a CUDA graph that records it would read the host's
    memory again whenever it is replayed.
    """
    lengths = [length for h, w in level_shapes for length in (w, h)]
    numbers = torch.arange(max(lengths) + 1, dtype=like.dtype, device=like.device)
    return torch.stack([numbers[length] for length in lengths]).unflatten(0, (-1, 2))


def run_kernels(
    value: torch.Tensor,
    level_sizes: torch.Tensor,
    sampling_points: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """Weighted sum of bilinear samples; see [`multi_scale_deformable_attention`]. Sums are float32.

    Gradients of the value are sums in any order, so their last bits vary; `torch.use_deterministic_algorithms(True)` makes
    them the same in every run, in twice the memory.

    Args:
        value, sampling_points, weights: As there; `value` of one of `DTYPES`.
        level_sizes (`torch.Tensor`): (w, h) of each level, `[levels, 2]`, on the device of `value`.
    """
    return torch.ops.unihema.deformable_attention(
        value.contiguous(), level_sizes, sampling_points.float().contiguous(), weights.contiguous()
    )


__all__ = ["DTYPES", "level_sizes", "run_kernels", "triton"]
