import pytest
import torch

from unihema.modeling_unihema import deformable_attention
from unihema.modeling_unihema.configuration_unihema import UniHemaConfig
from unihema.modeling_unihema.deformable_attention import (
    MultiScaleDeformableAttention,
    multi_scale_deformable_attention,
)


def reference(value, level_shapes, points, weights):
    """Bilinear sampling by its definition, one sample at a time."""
    batch, _, heads, width = value.shape
    output = value.new_zeros(batch, points.shape[1], heads, width)
    start = 0
    for level, (h, w) in enumerate(level_shapes):
        for b, q, head, p in torch.cartesian_prod(
            *[torch.arange(n) for n in (batch, points.shape[1], heads, points.shape[4])]
        ).tolist():
            x, y = (points[b, q, head, level, p] * torch.tensor([w, h]) - 0.5).tolist()
            for column in (int(x // 1), int(x // 1) + 1):
                for row in (int(y // 1), int(y // 1) + 1):
                    if 0 <= column < w and 0 <= row < h:
                        share = (1 - abs(x - column)) * (1 - abs(y - row)) * weights[b, q, head, level, p]
                        output[b, q, head] += share * value[b, start + row * w + column, head]
        start += h * w
    return output.flatten(2)


@pytest.fixture
def problem():
    torch.manual_seed(0)
    shapes = [(5, 7), (3, 4), (1, 2)]
    tokens = sum(h * w for h, w in shapes)
    value = torch.randn(2, tokens, 2, 4, dtype=torch.double, requires_grad=True)
    # From well outside the image on one side to well outside on the other.
    points = (torch.rand(2, 6, 2, 3, 2, 2, dtype=torch.double) * 2 - 0.5).requires_grad_()
    weights = torch.rand(2, 6, 2, 3, 2, dtype=torch.double, requires_grad=True)
    return value, shapes, points, weights


@pytest.mark.parametrize("backend", ["_sample_grid", "_gather_rows"])
def test_each_backend_is_bilinear_sampling(problem, backend):
    value, shapes, points, weights = problem
    output = getattr(deformable_attention, backend)(value, shapes, points, weights)
    torch.testing.assert_close(output, reference(value, shapes, points, weights), rtol=1e-9, atol=1e-9)


def test_backends_agree_in_every_gradient(problem):
    gradients = []
    for backend in ("_sample_grid", "_gather_rows"):
        output = getattr(deformable_attention, backend)(*problem)
        gradients.append(torch.autograd.grad((output**2).sum(), [problem[0], problem[2], problem[3]]))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_points_far_outside_the_image_read_zero(problem):
    value, shapes, points, weights = problem
    for far in (-1e6, 1e6):
        output = multi_scale_deformable_attention(value, shapes, torch.full_like(points, far), weights)
        assert output.abs().max() == 0


def test_padded_tokens_do_not_reach_the_output():
    torch.manual_seed(0)
    config = UniHemaConfig.tiny(num_feature_levels=3)
    attention = MultiScaleDeformableAttention(config)
    shapes = [(4, 6), (2, 3), (1, 2)]
    padding = torch.zeros(1, 32, dtype=torch.bool)
    padding[0, [5, 11, 17, 23]] = True
    query, reference_points = torch.randn(1, 9, config.d_model), torch.rand(1, 9, 3, 2)
    tokens = torch.randn(1, 32, config.d_model)
    with torch.no_grad():
        before = attention(query, reference_points, tokens, shapes, padding)
        after = attention(query, reference_points, tokens + padding[..., None] * 100, shapes, padding)
    torch.testing.assert_close(before, after, rtol=0, atol=0)
