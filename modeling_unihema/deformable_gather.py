"""Multi-scale deformable attention on the CPU: the samples read as weighted rows of one table, with a backward by hand.

Bilinear samples are sums of four rows (pixels) with weights; `embedding_bag` sums all rows of a query and head at once.
Each level is laid into the table with a border of zeros, so that points outside need no case of their own. Queries go
through in chunks whose indices and weights stay in the processor's cache.
"""

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
        # Innermost loops then run over all of a query's samples, not over the points of one level.
        spread = (heads, len(level_shapes), points)

        def of_levels(numbers: list[int], dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(numbers, dtype=dtype, device=like.device)[:, None].expand(spread).contiguous()

        self.width = of_levels([w for _, w in level_shapes], like.dtype)
        self.height = of_levels([h for h, _ in level_shapes], like.dtype)
        self.row = of_levels([w + 2 for _, w in level_shapes], like.dtype)
        self.last_column, self.last_row = self.width - 1, self.height - 1
        # The first pixel lies one row and one column inside the border.
        head = torch.arange(heads, dtype=torch.int32, device=like.device)[:, None, None]
        origin = [(start + w + 3) * heads for start, (_, w) in zip(starts, level_shapes)]
        self.origin = of_levels(origin, torch.int32) + head
        self.down = of_levels([(w + 2) * heads for _, w in level_shapes], torch.int32)

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

    def locate(self, points: torch.Tensor, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The row of the pixel up and left of each point, and how far the point is beyond it.

        Args:
            points (`torch.Tensor`): `[Q, heads, levels, points, 2]`.
            images (`torch.Tensor`): First row of each query's image, int32 `[Q, 1, 1, 1]`.

        Returns:
            `tuple`: Rows int32, and fractions of a pixel to the right and down, `[Q, heads, levels, points]` each.
        """
        x, y = self.pixels(points)
        x = torch.minimum(x.clamp_(min=-1), self.width)
        y = torch.minimum(y.clamp_(min=-1), self.height)
        left, top = torch.minimum(x.floor(), self.last_column), torch.minimum(y.floor(), self.last_row)
        rows = torch.addcmul(left, top, self.row).int().mul_(self.heads).add_(self.origin)
        # A point that is not a number must not read outside the table; its weight is not a number either.
        rows = rows.clamp_(0, self.tokens * self.heads - 1).add_(images)
        return rows, x.sub_(left), y.sub_(top)

    def pixels(self, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(x, y) in pixels of each level, 0 being the centre of the first."""
        return points[..., 0] * self.width - 0.5, points[..., 1] * self.height - 0.5

    def corners(self, rows: torch.Tensor) -> torch.Tensor:
        """The four pixels around each point, `[Q * heads, 4 * levels * points]`."""
        down = rows + self.down
        return _bags([rows, rows + self.heads, down, down + self.heads])

    def queries(self, batch: int, number: int, device: torch.device) -> torch.Tensor:
        """First row of each query's image, int32 `[B * Q, 1, 1, 1]`."""
        images = torch.arange(batch, dtype=torch.int32, device=device) * (self.tokens * self.heads)
        return images.repeat_interleave(number)[:, None, None, None]


def _bags(corners: list[torch.Tensor]) -> torch.Tensor:
    """Four of `[Q, heads, levels, points]` side by side, `[Q * heads, 4 * levels * points]`."""
    queries, heads, *samples = corners[0].shape
    bags = corners[0].new_empty(queries, heads, 4, *samples)
    for number, corner in enumerate(corners):
        bags[:, :, number] = corner
    return bags.view(queries * heads, -1)


def _corner_weights(right: torch.Tensor, down: torch.Tensor, weights: torch.Tensor) -> list[torch.Tensor]:
    """What each of the four pixels counts."""
    at_right = weights * right
    at_left = weights - at_right
    low_right, low_left = at_right * down, at_left * down
    return [at_left - low_left, at_right - low_right, low_left, low_right]


def _chunks(number: int):
    # A compiled graph needs no chunks: it makes no tensors in between.
    step = number if torch.compiler.is_compiling() else CHUNK
    return [slice(start, start + step) for start in range(0, number, step)]


class _GatherRows(torch.autograd.Function):
    """Forward and backward; nothing but the inputs is kept between them."""

    @staticmethod
    def forward(ctx, level_shapes, value, points, weights):
        ctx.save_for_backward(value, points, weights)
        ctx.level_shapes = level_shapes
        batch, _, heads, width = value.shape
        number = points.shape[1]
        table = _Table(level_shapes, heads, points.shape[4], points)
        pixels, images = table.fill(value), table.queries(batch, number, value.device)
        points, weights = points.flatten(0, 1), weights.flatten(0, 1)
        sums = []
        for part in _chunks(batch * number):
            rows, right, down = table.locate(points[part], images[part])
            counts = _bags(_corner_weights(right, down, weights[part]))
            sums.append(nn.functional.embedding_bag(table.corners(rows), pixels, per_sample_weights=counts, mode="sum"))
        return torch.cat(sums).view(batch, number, heads * width)

    @staticmethod
    def backward(ctx, gradient):
        value, all_points, all_weights = ctx.saved_tensors
        batch, _, heads, width = value.shape
        number, samples = all_points.shape[1], all_points.shape[3] * all_points.shape[4]
        table = _Table(ctx.level_shapes, heads, all_points.shape[4], all_points)
        pixels, images = table.fill(value), table.queries(batch, number, value.device)
        points, weights = all_points.flatten(0, 1), all_weights.flatten(0, 1)
        gradient = gradient.reshape(-1, width)
        point_gradients, weight_gradients, all_rows, all_counts = [], [], [], []
        for part in _chunks(batch * number):
            rows, right, down = table.locate(points[part], images[part])
            products = _dot_products(gradient[part.start * heads : part.stop * heads], pixels, table.corners(rows))
            upper_left, upper_right, lower_left, lower_right = (
                products.unflatten(0, (-1, heads)).unflatten(2, (4, *points.shape[2:4])).unbind(2)
            )
            to_right, below_to_right = upper_right - upper_left, lower_right - lower_left
            upper = torch.addcmul(upper_left, right, to_right)
            to_below = torch.addcmul(lower_left, right, below_to_right) - upper
            weight_gradients.append(torch.addcmul(upper, down, to_below))
            to_right = torch.addcmul(to_right, down, below_to_right - to_right)
            # Where a point outside was moved to the border, moving it on changes nothing.
            x, y = table.pixels(points[part])
            x_moves = (x > -1) & (x < table.width)
            y_moves = (y > -1) & (y < table.height)
            along_x = to_right * weights[part] * table.width * x_moves
            along_y = to_below * weights[part] * table.height * y_moves
            point_gradients.append(torch.stack((along_x, along_y), -1))
            all_rows.append(rows.flatten())
            all_counts.append(torch.stack([c.flatten() for c in _corner_weights(right, down, weights[part])]))
        value_gradient = _spread(gradient, torch.cat(all_rows), torch.cat(all_counts, 1), samples, batch, table)
        point_gradient = torch.cat(point_gradients).view_as(all_points)
        return None, value_gradient, point_gradient, torch.cat(weight_gradients).view_as(all_weights)


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
    down = table.down.flatten(1).expand(len(rows) // samples // table.heads, -1, -1).reshape(-1)
    corners = (rows, rows + table.heads, rows + down, rows + down + table.heads)
    for corner, count in zip(corners, counts):
        shares = count.view(-1, samples, 1) * gradient[:, None]
        collected.scatter_add_(0, corner.long()[:, None].expand(-1, gradient.shape[1]), shares.flatten(0, 1))
    return collected


__all__ = ["fits", "gather_rows"]
