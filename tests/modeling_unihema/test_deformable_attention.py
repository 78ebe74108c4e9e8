"""Every backend of multi-scale deformable attention: its definition, its gradients, and points in odd places."""

import pytest
import torch

from unihema.modeling_unihema import deformable_cpu
from unihema.modeling_unihema.configuration_unihema import UniHemaConfig
from unihema.modeling_unihema.deformable_attention import (
    MultiScaleDeformableAttention,
    multi_scale_deformable_attention,
    sample_grid,
)
from unihema.modeling_unihema.deformable_cpu import gather_rows
from unihema.modeling_unihema.deformable_triton import level_sizes


BACKENDS = {"plain": sample_grid, "rows": gather_rows}
each_backend = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)


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


@each_backend
def test_each_backend_is_bilinear_sampling(problem, backend):
    value, shapes, points, weights = problem
    output = backend(value, shapes, points, weights)
    torch.testing.assert_close(output, reference(value, shapes, points, weights), rtol=1e-9, atol=1e-9)


@each_backend
def test_gradients_are_those_of_finite_differences(problem, backend):
    value, shapes, points, weights = problem

    def attend(value, points, weights):
        return backend(value, shapes, points, weights)

    assert torch.autograd.gradcheck(attend, (value, points, weights), eps=1e-6, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("chunk", [1, 5, 1024])
# More points than pixels, fewer, and levels of one row, column or pixel.
@pytest.mark.parametrize("shapes", [[(13, 9), (7, 5), (4, 3), (2, 2)], [(40, 50), (20, 25)], [(1, 1), (1, 6), (5, 1)]])
def test_backends_agree_in_float32_whatever_the_chunk(shapes, chunk, monkeypatch):
    monkeypatch.setattr(deformable_cpu, "CHUNK", chunk)
    torch.manual_seed(0)
    tokens, levels = sum(h * w for h, w in shapes), len(shapes)
    value = torch.randn(3, tokens, 4, 8, requires_grad=True)
    points = (torch.rand(3, 17, 4, levels, 4, 2) * 1.6 - 0.3).requires_grad_()
    weights = torch.rand(3, 17, 4, levels, 4).flatten(-2).softmax(-1).view(3, 17, 4, levels, 4).requires_grad_()
    direction = torch.randn(3, 17, 32)
    found = {}
    for name, backend in BACKENDS.items():
        output = backend(value, shapes, points, weights)
        found[name] = (output, *torch.autograd.grad((output * direction).sum(), [value, points, weights]))
    for plain, rows in zip(found["plain"], found["rows"], strict=True):
        # Gradients of points are as large as their level is wide.
        torch.testing.assert_close(rows, plain, rtol=1e-5, atol=1e-5 * max(1, plain.abs().max().item()))


@pytest.mark.parametrize("needed", [0, 1, 2])
def test_only_what_needs_a_gradient_gets_one(problem, needed):
    value, shapes, points, weights = [part.detach() if torch.is_tensor(part) else part for part in problem]
    part = (value, points, weights)[needed].requires_grad_()
    expected = torch.autograd.grad(sample_grid(value, shapes, points, weights).sum(), part)
    found = torch.autograd.grad(gather_rows(value, shapes, points, weights).sum(), part)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(problem, dtype):
    value, shapes, points, weights = problem
    expected = gather_rows(value, shapes, points, weights)
    half = value.detach().to(dtype).requires_grad_()
    output = gather_rows(half, shapes, points.float(), weights.to(dtype))
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), expected, rtol=0.02, atol=0.04)
    output.sum().backward()
    assert half.grad.dtype == dtype


@each_backend
def test_what_is_not_a_number_stays_where_it_is(problem, backend):
    value, shapes, points, weights = [part.detach() if torch.is_tensor(part) else part for part in problem]
    clean = backend(value, shapes, points, weights)
    points = points.clone()
    points[0, 2, 1] = torch.nan
    spoilt = backend(value, shapes, points, weights)
    width = value.shape[-1]
    assert spoilt[0, 2, width:].isnan().all() or backend is sample_grid
    rest = torch.ones_like(spoilt, dtype=torch.bool)
    rest[0, 2, width:] = False
    torch.testing.assert_close(spoilt[rest], clean[rest], rtol=0, atol=0)


def test_a_level_with_too_many_pixels_for_float32_takes_the_plain_form(monkeypatch, problem):
    expected = sample_grid(*problem)
    monkeypatch.setattr(deformable_cpu, "LARGEST_LEVEL", 30)
    assert not deformable_cpu.fits(problem[1])
    torch.testing.assert_close(multi_scale_deformable_attention(*problem), expected, rtol=0, atol=0)


def test_compiled_forward_and_backward_agree(problem):
    value, shapes, points, weights = [part.detach().float() if torch.is_tensor(part) else part for part in problem]
    torch.compiler.reset()
    compiled = torch.compile(multi_scale_deformable_attention, fullgraph=True, backend="aot_eager")
    # The second number of queries is compiled for any number.
    for queries in (6, 5):
        parts = [value, points[:, :queries], weights[:, :queries]]
        parts = [part.clone().requires_grad_() for part in parts]
        expected = multi_scale_deformable_attention(parts[0], shapes, *parts[1:])
        gradients = torch.autograd.grad(expected.square().sum(), parts)
        found = compiled(parts[0], shapes, *parts[1:])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        for a, b in zip(torch.autograd.grad(found.square().sum(), parts), gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compiled_to_machine_code_values_and_gradients_agree(problem):
    value, shapes, points, weights = [part.detach().float() if torch.is_tensor(part) else part for part in problem]
    parts = [value.requires_grad_(), points.requires_grad_(), weights.requires_grad_()]
    torch.compiler.reset()
    found = []
    for form in (multi_scale_deformable_attention, torch.compile(multi_scale_deformable_attention, fullgraph=True)):
        output = form(parts[0], shapes, *parts[1:])
        found.append([output, *torch.autograd.grad(output.square().sum(), parts)])
    for compiled, plain in zip(*reversed(found), strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)


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
    sizes = level_sizes(shapes, torch.zeros(()))
    padding = torch.zeros(1, 32, dtype=torch.bool)
    padding[0, [5, 11, 17, 23]] = True
    query, reference_points = torch.randn(1, 9, config.d_model), torch.rand(1, 9, 3, 2)
    tokens = torch.randn(1, 32, config.d_model)
    with torch.no_grad():
        before = attention(query, reference_points, tokens, shapes, sizes, padding)
        after = attention(query, reference_points, tokens + padding[..., None] * 100, shapes, sizes, padding)
    torch.testing.assert_close(before, after, rtol=0, atol=0)
