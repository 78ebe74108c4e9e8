"""Multi-scale deformable attention on the CPU: the samples read as weighted rows of one table, with a backward by hand.

Bilinear samples are sums of four rows (pixels) with weights; `embedding_bag` sums all rows of a query and head at once.
Each level is laid into the table with a border of zeros, so that points outside need no case of their own. Queries go
through in chunks whose indices and weights stay in the processor's cache.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn


# Queries a chunk: 8 heads x 4 levels x 4 points x 4 pixels of them are half a megabyte of indices.
CHUNK = 1024
# Pixels of a level are numbered in float32, and rows of the table in int32.
LARGEST_LEVEL = 2**24


def fits(level_shapes: list[tuple[int, int]]) -> bool:
    """Whether the pixels of every level can be numbered exactly."""
    return all((h + 2) * (w + 2) < LARGEST_LEVEL for h, w in level_shapes)


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
        row (`torch.Tensor`): Pixels from one row to the next, border included.
        last_column (`torch.Tensor`): `width - 1`.
        last_row (`torch.Tensor`): `height - 1`.
        origin (`torch.Tensor`): Row of the table with the first pixel, int32.
        down (`torch.Tensor`): Rows of the table from a pixel to the one below, int32.
    """

    width: torch.Tensor
    height: torch.Tensor
    row: torch.Tensor
    last_column: torch.Tensor
    last_row: torch.Tensor
    origin: torch.Tensor
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
        self.sizes = [(h + 2) * (w + 2) for h, w in level_shapes]
        self.tokens = sum(self.sizes)
        starts = [sum(self.sizes[:level]) for level in range(len(level_shapes))]
        spread = (heads, len(level_shapes), points)

        def of_levels(numbers: list[int], dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(numbers, dtype=dtype, device=like.device)[:, None].expand(spread).contiguous()

        width = of_levels([w for _, w in level_shapes], like.dtype)
        height = of_levels([h for h, _ in level_shapes], like.dtype)
        # The first pixel lies one row and one column inside the border.
        head = torch.arange(heads, dtype=torch.int32, device=like.device)[:, None, None]
        origin = [(start + w + 3) * heads for start, (_, w) in zip(starts, level_shapes)]
        self.places = Places(
            width=width,
            height=height,
            row=width + 2,
            last_column=width - 1,
            last_row=height - 1,
            origin=of_levels(origin, torch.int32) + head,
            down=of_levels([(w + 2) * heads for _, w in level_shapes], torch.int32),
        )

    def fill(self, value: torch.Tensor) -> torch.Tensor:
        """`[B, S, heads, width]` to the rows `[B * tokens * heads, width]`."""
        batch, _, heads, width = value.shape
        table = value.new_empty(batch, self.tokens, heads * width)
        levels = value.flatten(2).split([h * w for h, w in self.shapes], 1)
        for level, padded, (h, w) in zip(levels, table.split(self.sizes, 1), self.shapes):
            padded = padded.unflatten(1, (h + 2, w + 2))
            padded[:, 1:-1, 1:-1] = level.unflatten(1, (h, w))
            for edge in (padded[:, :1], padded[:, -1:], padded[:, :, :1], padded[:, :, -1:]):
                edge.zero_()
        return table.view(-1, width)

    def read(self, rows: torch.Tensor, batch: int) -> torch.Tensor:
        """What [`fill`] put in: rows to `[B, S, heads, width]`."""
        levels = rows.view(batch, self.tokens, self.heads, -1).split(self.sizes, 1)
        inner = [
            level.unflatten(1, (h + 2, w + 2))[:, 1:-1, 1:-1].flatten(1, 2)
            for level, (h, w) in zip(levels, self.shapes)
        ]
        return torch.cat(inner, 1)

    def queries(self, batch: int, number: int, device: torch.device) -> torch.Tensor:
        """First row of each query's image, int32 `[B * Q, 1, 1, 1]`."""
        images = torch.arange(batch, dtype=torch.int32, device=device) * (self.tokens * self.heads)
        return images.repeat_interleave(number)[:, None, None, None]


def locate(
    points: torch.Tensor, images: torch.Tensor, places: Places, heads: int, rows_of_image: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The row of the pixel up and left of each point, and how far the point is beyond it.

    Args:
        points (`torch.Tensor`): `[Q, heads, levels, points, 2]`.
        images (`torch.Tensor`): First row of each query's image, int32 `[Q, 1, 1, 1]`.
        places ([`Places`]): Of the levels.
        heads (`int`): Attention heads.
        rows_of_image (`int`): Rows of the table that an image has.

    Returns:
        `tuple`: Rows int32, and fractions of a pixel to the right and down, `[Q, heads, levels, points]` each.
    """
    x, y = _pixels(points, places)
    x = torch.minimum(x.clamp_(min=-1), places.width)
    y = torch.minimum(y.clamp_(min=-1), places.height)
    left, top = torch.minimum(x.floor(), places.last_column), torch.minimum(y.floor(), places.last_row)
    rows = torch.addcmul(left, top, places.row).int().mul_(heads).add_(places.origin)
    # A point that is not a number must not read outside the table; its weight is not a number either.
    rows = rows.clamp_(0, rows_of_image - 1).add_(images)
    return rows, x.sub_(left), y.sub_(top)


def _pixels(points: torch.Tensor, places: Places) -> tuple[torch.Tensor, torch.Tensor]:
    """(x, y) in pixels of each level, 0 being the centre of the first."""
    return points[..., 0] * places.width - 0.5, points[..., 1] * places.height - 0.5


def corners(rows: torch.Tensor, places: Places, heads: int) -> torch.Tensor:
    """The four pixels around each point, `[Q * heads, 4 * levels * points]`."""
    down = rows + places.down
    return _bags([rows, rows + heads, down, down + heads])


def corner_weights(right: torch.Tensor, down: torch.Tensor, weights: torch.Tensor) -> list[torch.Tensor]:
    """What each of the four pixels counts."""
    at_right = weights * right
    at_left = weights - at_right
    low_right, low_left = at_right * down, at_left * down
    return [at_left - low_left, at_right - low_right, low_left, low_right]


def _bags(of_corners: list[torch.Tensor]) -> torch.Tensor:
    """Four of `[Q, heads, levels, points]` side by side, `[Q * heads, 4 * levels * points]`."""
    queries, heads, *samples = of_corners[0].shape
    if torch.compiler.is_compiling():
        return torch.stack(of_corners, 2).view(queries * heads, -1)
    bags = of_corners[0].new_empty(queries, heads, 4, *samples)
    for number, corner in enumerate(of_corners):
        bags[:, :, number] = corner
    return bags.view(queries * heads, -1)


def bags_of_queries(points, weights, images, places: Places, heads: int, rows_of_image: int):
    """Rows to read and their weights, `[Q * heads, 4 * levels * points]` each; arguments as of [`locate`]."""
    rows, right, down = locate(points, images, places, heads, rows_of_image)
    return corners(rows, places, heads), _bags(corner_weights(right, down, weights))


def located_bags(points, images, places: Places, heads: int, rows_of_image: int):
    """What [`locate`] gives, and the rows to read."""
    located = locate(points, images, places, heads, rows_of_image)
    return *located, corners(located[0], places, heads)


def slopes(
    products: torch.Tensor,
    right: torch.Tensor,
    down: torch.Tensor,
    points: torch.Tensor,
    weights: torch.Tensor,
    places: Places,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of points and weights.

    Args:
        products (`torch.Tensor`): Of the output's gradient and each pixel read, `[Q * heads, 4 * levels * points]`.
        right, down (`torch.Tensor`): Of [`locate`].
        points (`torch.Tensor`): `[Q, heads, levels, points, 2]`.
        weights (`torch.Tensor`): `[Q, heads, levels, points]`.
        places ([`Places`]): Of the levels.

    Returns:
        `tuple`: Gradients of `points` and `weights`, and what each pixel counts, `[4, Q * heads * levels * points]`.
    """
    heads, samples = weights.shape[1], weights.shape[2:]
    upper_left, upper_right, lower_left, lower_right = (
        products.unflatten(0, (-1, heads)).unflatten(2, (4, *samples)).unbind(2)
    )
    to_right, below_to_right = upper_right - upper_left, lower_right - lower_left
    upper = torch.addcmul(upper_left, right, to_right)
    to_below = torch.addcmul(lower_left, right, below_to_right) - upper
    of_weights = torch.addcmul(upper, down, to_below)
    to_right = torch.addcmul(to_right, down, below_to_right - to_right)
    # Where a point outside was moved to the border, moving it on changes nothing.
    x, y = _pixels(points, places)
    x_moves = (x > -1) & (x < places.width)
    y_moves = (y > -1) & (y < places.height)
    along_x = to_right * weights * places.width * x_moves
    along_y = to_below * weights * places.height * y_moves
    counts = torch.stack([count.flatten() for count in corner_weights(right, down, weights)])
    return torch.stack((along_x, along_y), -1), of_weights, counts


class Arithmetic(NamedTuple):
    """The parts between the reads, which a compiler can fuse: [`bags_of_queries`], [`located_bags`], [`slopes`]."""

    bags_of_queries: Callable = bags_of_queries
    located_bags: Callable = located_bags
    slopes: Callable = slopes


PLAIN = Arithmetic()


def _chunks(number: int) -> list[slice]:
    return [slice(start, start + CHUNK) for start in range(0, number, CHUNK)]


def read(
    level_shapes: list[tuple[int, int]],
    value: torch.Tensor,
    points: torch.Tensor,
    weights: torch.Tensor,
    arithmetic: Arithmetic = PLAIN,
) -> torch.Tensor:
    """[`gather_rows`] of tensors of one dtype, without gradient."""
    batch, _, heads, width = value.shape
    number = points.shape[1]
    table = _Table(level_shapes, heads, points.shape[4], points)
    pixels, images = table.fill(value), table.queries(batch, number, value.device)
    points, weights = points.flatten(0, 1), weights.flatten(0, 1)
    sums = []
    for part in _chunks(batch * number):
        rows, counts = arithmetic.bags_of_queries(
            points[part], weights[part], images[part], table.places, heads, table.tokens * heads
        )
        sums.append(nn.functional.embedding_bag(rows, pixels, per_sample_weights=counts, mode="sum"))
    return torch.cat(sums).view(batch, number, heads * width)


def gradients(
    level_shapes: list[tuple[int, int]],
    gradient: torch.Tensor,
    value: torch.Tensor,
    all_points: torch.Tensor,
    all_weights: torch.Tensor,
    arithmetic: Arithmetic = PLAIN,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of value, points and weights, from that of [`read`]'s result."""
    batch, _, heads, width = value.shape
    number, samples = all_points.shape[1], all_points.shape[3] * all_points.shape[4]
    table = _Table(level_shapes, heads, all_points.shape[4], all_points)
    pixels, images = table.fill(value), table.queries(batch, number, value.device)
    points, weights = all_points.flatten(0, 1), all_weights.flatten(0, 1)
    gradient = gradient.reshape(-1, width)
    of_points, of_weights, all_rows, all_counts = [], [], [], []
    for part in _chunks(batch * number):
        rows, right, down, bags = arithmetic.located_bags(
            points[part], images[part], table.places, heads, table.tokens * heads
        )
        products = _dot_products(gradient[part.start * heads : part.stop * heads], pixels, bags)
        along, steep, counts = arithmetic.slopes(products, right, down, points[part], weights[part], table.places)
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
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
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
    if len(rows) < total:
        return table.read(_add_up(gradient, rows, counts, samples, total, table), batch)
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
    # The border lies at the end of every row, so nothing is shifted from one row into the next.
    for upper, lower in ((0, 1), (2, 3)):
        corner[upper][:, heads:] += corner[lower][:, :-heads]
    levels = zip(
        corner[0].split([n * heads for n in table.sizes], 1), corner[2].split([n * heads for n in table.sizes], 1)
    )
    for (upper, lower), (_, w) in zip(levels, table.shapes):
        down = (w + 2) * heads
        upper[:, down:] += lower[:, :-down]
    return table.read(corner[0], batch)


def _add_up(
    gradient: torch.Tensor, rows: torch.Tensor, counts: torch.Tensor, samples: int, total: int, table: _Table
) -> torch.Tensor:
    """The same for fewer points than pixels, row by row."""
    collected = gradient.new_zeros(total, gradient.shape[1])
    down = table.places.down.flatten(1).expand(len(rows) // samples // table.heads, -1, -1).reshape(-1)
    corners = (rows, rows + table.heads, rows + down, rows + down + table.heads)
    for corner, count in zip(corners, counts):
        shares = count.view(-1, samples, 1) * gradient[:, None]
        collected.scatter_add_(0, corner.long()[:, None].expand(-1, gradient.shape[1]), shares.flatten(0, 1))
    return collected


__all__ = ["PLAIN", "Arithmetic", "fits", "gather_rows", "gradients", "read"]
