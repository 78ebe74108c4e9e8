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
from unihema.modeling_unihema.deformable_triton import run_kernels

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
    for form in (sample_grid, run_kernels):
        parts = [part.clone().requires_grad_() for part in (value, points, weights)]
        output = form(parts[0], shapes, parts[1], parts[2])
        found.append([output, *torch.autograd.grad((output * direction).sum(), parts)])
    for plain, kernel in zip(*found, strict=True):
        scale = max(1, plain.abs().max().item())
        torch.testing.assert_close(kernel, plain, rtol=1e-5, atol=1e-5 * scale)
    half = run_kernels(value.bfloat16(), shapes, points, weights)
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
    inputs = {"value": values, "levels": "*i32", "points": floats, "weights": floats}
    sizes = {"NUMBER": "i32", "TOKENS": "i32"}
    constants = {"HEADS": 8, "SAMPLES": 16, "POINTS": 4, "WIDTH": 32, "PADDED": 32, "QUERIES": kernels.QUERIES}
    gradients = {"of_value": floats, "of_points": floats, "of_weights": floats}
    for kernel, signature in (
        (kernels._forward, {**inputs, "output": values}),
        (kernels._backward, {"gradient": values, **inputs, **gradients}),
    ):
        types = signature | sizes | dict.fromkeys(constants, "constexpr")
        source = ASTSource(kernel, {name: types[name] for name in kernel.arg_names}, constexprs=constants)
        assert "ptx" in compile(source, target=GPUTarget("cuda", 80, 32)).asm
