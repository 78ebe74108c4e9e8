"""Multi-scale deformable attention on the CPU: bilinear gather with `embedding_bag`, and its backward.

A bilinear sample is a weighted sum of four pixels. The value, reshaped to one row for each pixel and head, is the table;
`embedding_bag` sums all rows of a query and head at once. A point near the edge of a level reads the four nearest pixels of
that level. Their weights fall to 0 with distance, so a point outside reads zeros. Queries are processed in chunks whose
indices and weights fit into the processor's cache.
"""

from typing import NamedTuple

import torch
from torch import nn


# Queries of a chunk: 8 heads x 4 levels x 4 points x 4 pixels of them are half a megabyte of indices.
CHUNK = 1024
# Pixels of a level are numbered in float32, and rows of the table in int32.
LARGEST_LEVEL = 2**24


def fits(level_shapes: list[tuple[int, int]]) -> bool:
    """Whether the pixels of every level can be numbered exactly."""
    return all(h * w < LARGEST_LEVEL for h, w in level_shapes)


def gather_rows(
    value: torch.Tensor,
    level_shapes: list[tuple[int, int]],
    sampling_points: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """Weighted sum of bilinear samples, computed in at least float32; see [`multi_scale_deformable_attention`]."""
    precise = torch.promote_types(torch.float32, value.dtype)
    arguments = [tensor.to(precise) for tensor in (value, sampling_points, weights)]
    return _GatherRows.apply(level_shapes, *arguments).to(value.dtype)


class Places(NamedTuple):
    """Position and size of each level in the table; every tensor has the shape `[heads, levels, points]`.

    The innermost loops then run over all samples of a query, which is faster than over the points of one level.

    Args:
        width (`torch.Tensor`): Columns of a level.
        height (`torch.Tensor`): Rows of a level.
        last_left (`torch.Tensor`): The last column with a right neighbour; 0 in a level of one column.
        last_top (`torch.Tensor`): The last row with a row below; 0 in a level of one row.
        step_right (`torch.Tensor`): Distance to the column on the right: 1, or the largest float where there is none.
        step_down (`torch.Tensor`): Distance to the row below, likewise.
        origin (`torch.Tensor`): Row of the table with the first pixel, int32.
        last (`torch.Tensor`): Row of the table with pixel (`last_left`, `last_top`), int32.
        right (`torch.Tensor`): Offset in the table from a pixel to the one on its right, int32.
        down (`torch.Tensor`): Offset to the one below, int32.
    """

    width: torch.Tensor
    height: torch.Tensor
    last_left: torch.Tensor
    last_top: torch.Tensor
    step_right: torch.Tensor
    step_down: torch.Tensor
    origin: torch.Tensor
    last: torch.Tensor
    right: torch.Tensor
    down: torch.Tensor


class _Table:
    """The table of all pixels: sizes, and the [`Places`] of the levels.

    Args:
        level_shapes (`list[tuple[int, int]]`): `(h, w)` of each level.
        heads (`int`): Attention heads; a pixel has a row for each.
        points (`int`): Sampling points a level.
        like (`torch.Tensor`): Gives dtype and device.
    """

    def __init__(self, level_shapes: list[tuple[int, int]], heads: int, points: int, like: torch.Tensor):
        self.heads = heads
        self.shapes = level_shapes
        self.sizes = [h * w for h, w in level_shapes]
        self.tokens = sum(self.sizes)
        starts = [sum(self.sizes[:level]) for level in range(len(level_shapes))]
        spread = (heads, len(level_shapes), points)

        def of_levels(numbers: list[float], dtype: torch.dtype = like.dtype) -> torch.Tensor:
            return torch.tensor(numbers, dtype=dtype, device=like.device)[:, None].expand(spread).contiguous()

        def rows(numbers: list[int]) -> torch.Tensor:
            return of_levels([number * heads for number in numbers], torch.int32)

        none = torch.finfo(like.dtype).max
        heights, widths = zip(*level_shapes)
        lefts, tops = [max(w - 2, 0) for w in widths], [max(h - 2, 0) for h in heights]
        head = torch.arange(heads, dtype=torch.int32, device=like.device)[:, None, None]
        last = [start + top * w + left for start, top, w, left in zip(starts, tops, widths, lefts)]
        self.places = Places(
            width=of_levels(widths),
            height=of_levels(heights),
            last_left=of_levels(lefts),
            last_top=of_levels(tops),
            step_right=of_levels([1 if w > 1 else none for w in widths]),
            step_down=of_levels([1 if h > 1 else none for h in heights]),
            origin=rows(starts) + head,
            last=rows(last) + head,
            right=rows([int(w > 1) for w in widths]),
            down=rows([w if h > 1 else 0 for h, w in level_shapes]),
        )

    def queries(self, batch: int, number: int, device: torch.device) -> torch.Tensor:
        """First row of each query's image, int32 `[B * Q, 1, 1, 1]`."""
        images = torch.arange(batch, dtype=torch.int32, device=device) * (self.tokens * self.heads)
        return images.repeat_interleave(number)[:, None, None, None]


def locate(
    points: torch.Tensor, images: torch.Tensor, places: Places, heads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The pixel up and left of each point, or the nearest one that has a neighbour to the right and below.

    Args:
        points (`torch.Tensor`): `[Q, heads, levels, points, 2]`.
        images (`torch.Tensor`): First row of each query's image, int32 `[Q, 1, 1, 1]`.
        places ([`Places`]): Of the levels.
        heads (`int`): Attention heads.

    Returns:
        `tuple`: Its row of the table, int32, and how many pixels the point lies to its right and below (less than 0 or more
        than 1 at the edges), `[Q, heads, levels, points]` each.
    """
    x = points[..., 0] * places.width - 0.5
    y = points[..., 1] * places.height - 0.5
    left = torch.minimum(x.floor().clamp_(min=0), places.last_left)
    top = torch.minimum(y.floor().clamp_(min=0), places.last_top)
    rows = torch.addcmul(left, top, places.width).int().mul_(heads).add_(places.origin)
    # The row of a NaN point is undefined, so it is clamped into the table. The weight is NaN, and so is the result.
    rows = torch.minimum(rows, places.last).clamp_(min=0).add_(images)
    return rows, x.sub_(left), y.sub_(top)


def corners(rows: torch.Tensor, places: Places) -> torch.Tensor:
    """The four pixels around each point, `[Q * heads, 4 * levels * points]`."""
    down = rows + places.down
    return _bags([rows, rows + places.right, down, down + places.right])


def corner_weights(
    right: torch.Tensor, down: torch.Tensor, weights: torch.Tensor, places: Places
) -> list[torch.Tensor]:
    """Bilinear weight of each of the four pixels, times the attention weight of the sample."""
    at_left = _nearer(weights, right.abs())
    at_right = _nearer(weights, (right - places.step_right).abs_())
    above, below = down.abs(), (down - places.step_down).abs_()
    return [_nearer(at_left, above), _nearer(at_right, above), _nearer(at_left, below), _nearer(at_right, below)]


def _nearer(weights: torch.Tensor, distance: torch.Tensor) -> torch.Tensor:
    return torch.addcmul(weights, weights, distance.clamp_(max=1), value=-1)


def _bags(of_corners: list[torch.Tensor]) -> torch.Tensor:
    """Stacks four `[Q, heads, levels, points]` tensors to `[Q * heads, 4 * levels * points]`, bags of `embedding_bag`."""
    queries, heads, *samples = of_corners[0].shape
    if torch.compiler.is_compiling():
        return torch.stack(of_corners, 2).view(queries * heads, -1)
    bags = of_corners[0].new_empty(queries, heads, 4, *samples)
    for number, corner in enumerate(of_corners):
        bags[:, :, number] = corner
    return bags.view(queries * heads, -1)


def slopes(
    products: torch.Tensor, right: torch.Tensor, down: torch.Tensor, weights: torch.Tensor, places: Places
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of points and weights.

    Args:
        products (`torch.Tensor`): Dot products of the output's gradient with each pixel read,
            `[Q * heads, 4 * levels * points]`.
        right, down (`torch.Tensor`): Of [`locate`].
        weights (`torch.Tensor`): `[Q, heads, levels, points]`.
        places ([`Places`]): Of the levels.

    Returns:
        `tuple`: Gradients of `points` and `weights`, and the weight of each pixel, `[4, Q * heads * levels * points]`.
    """
    heads, samples = weights.shape[1], weights.shape[2:]
    upper_left, upper_right, lower_left, lower_right = (
        products.unflatten(0, (-1, heads)).unflatten(2, (4, *samples)).movedim(2, 0).contiguous()
    )
    (at_left, to_left), (at_right, to_right) = _share(right), _share(right - places.step_right)
    (above, to_above), (below, to_below) = _share(down), _share(down - places.step_down)
    left = torch.addcmul(upper_left * above, lower_left, below)
    along_x = torch.addcmul(left * to_left, torch.addcmul(upper_right * above, lower_right, below), to_right)
    upper = torch.addcmul(upper_left * at_left, upper_right, at_right)
    lower = torch.addcmul(lower_left * at_left, lower_right, at_right)
    along_y = torch.addcmul(upper * to_above, lower, to_below)
    of_weights = torch.addcmul(upper * above, lower, below)
    along = torch.stack((along_x.mul_(weights).mul_(places.width), along_y.mul_(weights).mul_(places.height)), -1)
    at_left, at_right = at_left * weights, at_right * weights
    counts = torch.stack((at_left * above, at_right * above, at_left * below, at_right * below)).flatten(1)
    return along, of_weights, counts


def _share(beyond: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bilinear weight along one axis, and its derivative.

    Args:
        beyond (`torch.Tensor`): Signed distance from the pixel to the point, in pixels.
    """
    grows = torch.where(beyond < 0, 1.0, -1.0).masked_fill_((beyond < -1) | (beyond >= 1), 0)
    return 1 - beyond.abs().clamp_(max=1), grows


def _chunks(number: int) -> list[slice]:
    if torch.compiler.is_compiling():
        # The compiler unrolls the loop, which takes minutes. Compiled code needs no chunks.
        return [slice(0, number)]
    return [slice(start, start + CHUNK) for start in range(0, number, CHUNK)]


def read(
    level_shapes: list[tuple[int, int]],
    value: torch.Tensor,
    points: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """The forward pass of [`gather_rows`], for tensors of one dtype."""
    batch, _, heads, width = value.shape
    number = points.shape[1]
    table = _Table(level_shapes, heads, points.shape[4], points)
    pixels, images = value.reshape(-1, width), table.queries(batch, number, value.device)
    points, weights = points.flatten(0, 1), weights.flatten(0, 1)
    sums = []
    for part in _chunks(batch * number):
        rows, right, down = locate(points[part], images[part], table.places, heads)
        counts = _bags(corner_weights(right, down, weights[part], table.places))
        rows = corners(rows, table.places)
        sums.append(nn.functional.embedding_bag(rows, pixels, per_sample_weights=counts, mode="sum"))
    return torch.cat(sums).view(batch, number, heads * width)


def gradients(
    level_shapes: list[tuple[int, int]],
    gradient: torch.Tensor,
    value: torch.Tensor,
    all_points: torch.Tensor,
    all_weights: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The backward pass of [`read`]: gradients of value, points and weights."""
    batch, _, heads, width = value.shape
    number, samples = all_points.shape[1], all_points.shape[3] * all_points.shape[4]
    table = _Table(level_shapes, heads, all_points.shape[4], all_points)
    pixels, images = value.reshape(-1, width), table.queries(batch, number, value.device)
    points, weights = all_points.flatten(0, 1), all_weights.flatten(0, 1)
    gradient = gradient.reshape(-1, width)
    of_points, of_weights, all_rows, all_counts = [], [], [], []
    for part in _chunks(batch * number):
        rows, right, down = locate(points[part], images[part], table.places, heads)
        of_part = gradient[part.start * heads : part.stop * heads]
        products = _dot_products(of_part, pixels, corners(rows, table.places))
        along, steep, counts = slopes(products, right, down, weights[part], table.places)
        of_points.append(along)
        of_weights.append(steep)
        all_rows.append(rows.flatten())
        all_counts.append(counts)
    of_value = _spread(gradient, torch.cat(all_rows), torch.cat(all_counts, 1), samples, batch, table)
    return of_value, torch.cat(of_points).view_as(all_points), torch.cat(of_weights).view_as(all_weights)


class _GatherRows(torch.autograd.Function):
    """[`read`] with [`gradients`] as its backward. Only the inputs are saved between them."""

    @staticmethod
    def forward(ctx, level_shapes, value, points, weights):
        ctx.save_for_backward(value, points, weights)
        ctx.level_shapes = level_shapes
        return read(level_shapes, value, points, weights)

    @staticmethod
    def backward(ctx, gradient):
        return None, *gradients(ctx.level_shapes, gradient, *ctx.saved_tensors)


def _dot_products(gradient: torch.Tensor, pixels: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Dot products `[N, K]` of each bag's gradient `[N, width]` with the K pixels in its `rows` `[N, K]`."""
    bags, samples = rows.shape
    starts = torch.arange(0, bags * samples, samples, dtype=rows.dtype, device=rows.device)
    bag_of_row = torch.arange(bags, dtype=rows.dtype, device=rows.device).repeat_interleave(samples)
    # Private: no public operator gives dot products of rows of two tables without copying the rows.
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(  # noqa: SLF001
        gradient, pixels, rows.flatten(), starts, bag_of_row, 0
    ).view(bags, samples)


def _spread(
    gradient: torch.Tensor,
    rows: torch.Tensor,
    counts: torch.Tensor,
    samples: int,
    batch: int,
    table: _Table,
) -> torch.Tensor:
    """Gradient of the value `[B, S, heads, width]`: the sum over all points that read a pixel.

    Points are sorted by their upper left pixel. The sum over the points of a pixel is then a bag as well, one for each of the
    four corners. Finally the sums of the other three corners are shifted to their own pixels and added.
    """
    total = batch * table.tokens * table.heads
    rows, order = torch.sort(rows)
    starts = torch.searchsorted(rows, torch.arange(total, dtype=rows.dtype, device=rows.device), out_int32=True)
    bags = torch.div(order, samples, rounding_mode="floor").int()
    corner = [
        nn.functional.embedding_bag(
            bags, gradient, starts, per_sample_weights=count.index_select(0, order), mode="sum"
        ).view(batch, table.tokens * table.heads, -1)
        for count in counts
    ]
    heads = table.heads
    # Sums of the last column for the right, and of the last row for below, are 0: no shift crosses a row or a level.
    for upper, lower in ((0, 1), (2, 3)):
        corner[upper][:, heads:] += corner[lower][:, :-heads]
    levels = zip(
        corner[0].split([n * heads for n in table.sizes], 1), corner[2].split([n * heads for n in table.sizes], 1)
    )
    for (upper, lower), (_, w) in zip(levels, table.shapes):
        down = w * heads
        upper[:, down:] += lower[:, :-down]
    return corner[0].view(batch, table.tokens, heads, -1)


__all__ = ["fits", "gather_rows"]
