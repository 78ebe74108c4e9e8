"""Multi-scale deformable attention on the CPU: the samples read as weighted rows of one table, with a backward by hand.

Bilinear samples are sums of four rows (pixels) with weights; `embedding_bag` sums all rows of a query and head at once. The
value is the table as it is. A point at the edge reads the nearest four pixels of its level like any other, each with the
weight that its distance gives it, so that outside no pixel counts. Queries go through in chunks whose indices and weights
stay in the processor's cache.
"""

from typing import NamedTuple

import torch
from torch import nn


# Queries a chunk: 8 heads x 4 levels x 4 points x 4 pixels of them are half a megabyte of indices.
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
    """Weighted sum of bilinear samples; see [`multi_scale_deformable_attention`]. In float32 at least, inside."""
    precise = torch.promote_types(torch.float32, value.dtype)
    arguments = [tensor.to(precise) for tensor in (value, sampling_points, weights)]
    return _GatherRows.apply(level_shapes, *arguments).to(value.dtype)


class Places(NamedTuple):
    """Where each level is in the table; every tensor spread over heads, levels and points.

    Innermost loops then run over all of a query's samples, not over the points of one level.

    Args:
        width (`torch.Tensor`): Pixels of a level in a row.
        height (`torch.Tensor`): And in a column.
        last_left (`torch.Tensor`): The last column that has one to its right, 0 where there is but one.
        last_top (`torch.Tensor`): The last row that has one below, 0 where there is but one.
        step_right (`torch.Tensor`): Pixels to the column on the right: 1, or farther than any point where there is none.
        step_down (`torch.Tensor`): Pixels to the row below, the same.
        origin (`torch.Tensor`): Row of the table with the first pixel, int32.
        last (`torch.Tensor`): Row of the table with pixel (`last_left`, `last_top`), int32.
        right (`torch.Tensor`): Rows of the table from a pixel to the one on the right, int32.
        down (`torch.Tensor`): And to the one below.
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
    """Where the pixels of each level are in the table, spread over heads, levels and points.

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
    # A point that is not a number must not read outside the table; its weight is not a number either.
    rows = torch.minimum(rows, places.last).clamp_(min=0).add_(images)
    return rows, x.sub_(left), y.sub_(top)


def corners(rows: torch.Tensor, places: Places) -> torch.Tensor:
    """The four pixels around each point, `[Q * heads, 4 * levels * points]`."""
    down = rows + places.down
    return _bags([rows, rows + places.right, down, down + places.right])


def corner_weights(
    right: torch.Tensor, down: torch.Tensor, weights: torch.Tensor, places: Places
) -> list[torch.Tensor]:
    """What each of the four pixels counts: 1 less its distance along each axis, where that is less than 1."""
    at_left = _nearer(weights, right.abs())
    at_right = _nearer(weights, (right - places.step_right).abs_())
    above, below = down.abs(), (down - places.step_down).abs_()
    return [_nearer(at_left, above), _nearer(at_right, above), _nearer(at_left, below), _nearer(at_right, below)]


def _nearer(weights: torch.Tensor, distance: torch.Tensor) -> torch.Tensor:
    return torch.addcmul(weights, weights, distance.clamp_(max=1), value=-1)


def _bags(of_corners: list[torch.Tensor]) -> torch.Tensor:
    """Four of `[Q, heads, levels, points]` side by side, `[Q * heads, 4 * levels * points]`."""
    queries, heads, *samples = of_corners[0].shape
    if torch.compiler.is_compiling():
        return torch.stack(of_corners, 2).view(queries * heads, -1)
    bags = of_corners[0].new_empty(queries, heads, 4, *samples)
    for number, corner in enumerate(of_corners):
        bags[:, :, number] = corner
    return bags.view(queries * heads, -1)


def bags_of_queries(points, weights, images, places: Places, heads: int):
    """Rows to read and their weights, `[Q * heads, 4 * levels * points]` each; arguments as of [`locate`]."""
    rows, right, down = locate(points, images, places, heads)
    return corners(rows, places), _bags(corner_weights(right, down, weights, places))


def located_bags(points, images, places: Places, heads: int):
    """What [`locate`] gives, and the rows to read."""
    located = locate(points, images, places, heads)
    return *located, corners(located[0], places)


def slopes(
    products: torch.Tensor, right: torch.Tensor, down: torch.Tensor, weights: torch.Tensor, places: Places
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of points and weights.

    Args:
        products (`torch.Tensor`): Of the output's gradient and each pixel read, `[Q * heads, 4 * levels * points]`.
        right, down (`torch.Tensor`): Of [`locate`].
        weights (`torch.Tensor`): `[Q, heads, levels, points]`.
        places ([`Places`]): Of the levels.

    Returns:
        `tuple`: Gradients of `points` and `weights`, and what each pixel counts, `[4, Q * heads * levels * points]`.
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
    """What a pixel counts along an axis by how far the point is beyond it, and how that grows with the point."""
    grows = torch.where(beyond < 0, 1.0, -1.0).masked_fill_((beyond < -1) | (beyond >= 1), 0)
    return 1 - beyond.abs().clamp_(max=1), grows


def _chunks(number: int) -> list[slice]:
    if torch.compiler.is_compiling():
        # A loop is traced turn by turn, which takes minutes; compiled code needs no chunks.
        return [slice(0, number)]
    return [slice(start, start + CHUNK) for start in range(0, number, CHUNK)]


def read(
    level_shapes: list[tuple[int, int]],
    value: torch.Tensor,
    points: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """[`gather_rows`] of tensors of one dtype, without gradient."""
    batch, _, heads, width = value.shape
    number = points.shape[1]
    table = _Table(level_shapes, heads, points.shape[4], points)
    pixels, images = value.reshape(-1, width), table.queries(batch, number, value.device)
    points, weights = points.flatten(0, 1), weights.flatten(0, 1)
    sums = []
    for part in _chunks(batch * number):
        rows, counts = bags_of_queries(points[part], weights[part], images[part], table.places, heads)
        sums.append(nn.functional.embedding_bag(rows, pixels, per_sample_weights=counts, mode="sum"))
    return torch.cat(sums).view(batch, number, heads * width)


def gradients(
    level_shapes: list[tuple[int, int]],
    gradient: torch.Tensor,
    value: torch.Tensor,
    all_points: torch.Tensor,
    all_weights: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of value, points and weights, from that of [`read`]'s result."""
    batch, _, heads, width = value.shape
    number, samples = all_points.shape[1], all_points.shape[3] * all_points.shape[4]
    table = _Table(level_shapes, heads, all_points.shape[4], all_points)
    pixels, images = value.reshape(-1, width), table.queries(batch, number, value.device)
    points, weights = all_points.flatten(0, 1), all_weights.flatten(0, 1)
    gradient = gradient.reshape(-1, width)
    of_points, of_weights, all_rows, all_counts = [], [], [], []
    for part in _chunks(batch * number):
        rows, right, down, bags = located_bags(points[part], images[part], table.places, heads)
        products = _dot_products(gradient[part.start * heads : part.stop * heads], pixels, bags)
        along, steep, counts = slopes(products, right, down, weights[part], table.places)
        of_points.append(along)
        of_weights.append(steep)
        all_rows.append(rows.flatten())
        all_counts.append(counts)
    of_value = _spread(gradient, torch.cat(all_rows), torch.cat(all_counts, 1), samples, batch, table)
    return of_value, torch.cat(of_points).view_as(all_points), torch.cat(of_weights).view_as(all_weights)


class _GatherRows(torch.autograd.Function):
    """Forward and backward; nothing but the inputs is kept between them."""

    @staticmethod
    def forward(ctx, level_shapes, value, points, weights):
        ctx.save_for_backward(value, points, weights)
        ctx.level_shapes = level_shapes
        return read(level_shapes, value, points, weights)

    @staticmethod
    def backward(ctx, gradient):
        return None, *gradients(ctx.level_shapes, gradient, *ctx.saved_tensors)


def _dot_products(gradient: torch.Tensor, pixels: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Of each bag's gradient `[N, width]` and each of its pixels; `rows` `[N, K]` to `[N, K]`."""
    bags, samples = rows.shape
    starts = torch.arange(0, bags * samples, samples, dtype=rows.dtype, device=rows.device)
    bag_of_row = torch.arange(bags, dtype=rows.dtype, device=rows.device).repeat_interleave(samples)
    # Private: no public operator gives the dot product of rows of two tables without a copy of the rows.
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
    """Gradient of the value `[B, S, heads, width]`: each pixel collects from the points around it.

    Points are sorted by the pixel up and left of them. Then each pixel's sum over its points is a bag too, one for each
    of the four corners, and the corners' sums are shifted into place.
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
    # The last column has nothing for the right, and the last row nothing for below: no shift leaves its row or level.
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
