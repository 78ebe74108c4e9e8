"""The Triton kernels beside the plain form, in Triton's interpreter on the CPU: odd sizes, padding, points outside."""

import os
import subprocess
import sys

import pytest


pytest.importorskip("triton")

# The interpreter is chosen before Triton is imported, so in a process of its own.
PROGRAM = """
import torch
from unihema.modeling_unihema.deformable_attention import sample_grid
from unihema.modeling_unihema.deformable_triton import level_sizes, run_kernels

for batch, width, queries, shapes in ((2, 8, 19, [(5, 7), (3, 2)]), (1, 12, 3, [(1, 1), (1, 6), (5, 1)])):
    torch.manual_seed(0)
    tokens, levels = sum(h * w for h, w in shapes), len(shapes)
    value = torch.randn(batch, tokens, 2, width)
    value[:, ::5] = 0  # padding
    points = torch.rand(batch, queries, 2, levels, 2, 2) * 1.8 - 0.4
    points[0, 0] = 1e6
    weights = torch.rand(batch, queries, 2, levels, 2)
    direction = torch.randn(batch, queries, 2 * width)
    found = []
    sizes = level_sizes(shapes, points)
    for form, levels, whole in ((sample_grid, shapes, False), (run_kernels, sizes, False), (run_kernels, sizes, True)):
        torch.use_deterministic_algorithms(whole)
        parts = [part.clone().requires_grad_() for part in (value, points, weights)]
        output = form(parts[0], levels, parts[1], parts[2])
        found.append([output, *torch.autograd.grad((output * direction).sum(), parts)])
        torch.use_deterministic_algorithms(False)
    for plain, *kernels in zip(*found, strict=True):
        scale = max(1, plain.abs().max().item())
        for kernel in kernels:
            torch.testing.assert_close(kernel, plain, rtol=1e-5, atol=1e-5 * scale)
    half = run_kernels(value.bfloat16(), sizes, points, weights)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), found[0][0], rtol=0.02, atol=0.04)
print("equal")
"""


def test_kernels_agree_with_the_plain_form_forward_and_backward():
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    probe = "import triton.runtime.interpreter"
    if subprocess.run([sys.executable, "-c", probe], env=environment, capture_output=True).returncode:
        pytest.skip("Triton's interpreter does not work here")
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("equal\n"), done.stderr[-3000:]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_kernels_compile_for_a_gpu_that_is_not_there(dtype):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from unihema.modeling_unihema import deformable_triton as kernels

    values, floats = f"*{dtype}", "*fp32"
    inputs = {"value": values, "sizes": floats, "points": floats, "weights": floats}
    numbers = {"NUMBER": "i32", "TOKENS": "i32"}
    constants = {"HEADS": 8, "LEVELS": 4, "POINTS": 4, "WIDTH": 32, "PADDED": 32, "QUERIES": kernels.QUERIES}
    gradients = {"scale": "*fp64", "of_points": floats, "of_weights": floats}
    for kernel, signature, extra in (
        (kernels._forward, {**inputs, "output": values}, {}),
        (kernels._backward, {"gradient": values, **inputs, **gradients, "of_value": floats}, {"WHOLE": False}),
        (kernels._backward, {"gradient": values, **inputs, **gradients, "of_value": "*i64"}, {"WHOLE": True}),
    ):
        known = constants | extra
        types = signature | numbers | dict.fromkeys(known, "constexpr")
        source = ASTSource(kernel, {name: types[name] for name in kernel.arg_names}, constexprs=known)
        assert "ptx" in compile(source, target=GPUTarget("cuda", 90, 32)).asm
