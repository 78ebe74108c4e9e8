"""Linear layers for inference on the CPU: oneDNN's products, and weights read once at the full speed of the memory.

A text token's time on the CPU is that of reading the decoder's weights.
"""

import zlib

import torch
from torch import nn
from torch.autograd import forward_ad


# A smaller weight stays in the processor's cache, and a smaller product is done before another kernel is chosen.
_LARGE_WEIGHT = 2**18
_LARGE_PRODUCT = 2**22
# More rows at once, and the product with the weight on the left is no longer bound by memory.
_FEW_ROWS = 4
_HAS_ONEDNN = torch.backends.mkldnn.is_available()


def product(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`states @ weight.T + bias` in another order of work than PyTorch's own, which reads the weight of a single row at half
    of the memory's speed and that of a few rows more slowly still.

    Args:
        states (`torch.Tensor`): `[..., in]`, float32 on the CPU.
        weight (`torch.Tensor`): `[out, in]`.
        bias (`torch.Tensor`, *optional*): `[out]`.

    Returns:
        `torch.Tensor`: `[..., out]`.
    """
    rows = states.reshape(-1, weight.shape[1])
    if len(rows) <= _FEW_ROWS and _LARGE_WEIGHT <= weight.numel() <= weight.shape[0] ** 2:
        # A product with one column would fall to the kernel for vectors.
        columns = torch.cat((rows, rows)) if len(rows) == 1 else rows
        result = (weight @ columns.t())[:, : len(rows)].t().contiguous()
        if bias is not None:
            result = result + bias
    else:
        result = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return result.reshape(*states.shape[:-1], weight.shape[0])


# torch.compile does not look into it; a checkpoint's own copy of this code may be loaded beside the package.
_opaque_product = torch.library.custom_op(
    f"unihema_{zlib.crc32(__name__.encode()):08x}::product", product, mutates_args=(), device_types="cpu"
)


@_opaque_product.register_fake
def _(states, weight, bias):
    return states.new_empty(*states.shape[:-1], weight.shape[0])


class InferenceLinear(nn.Linear):
    """`nn.Linear` by [`product`], for float32 on the CPU without gradients. Results are the same up to float rounding."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """`[..., in]` to `[..., out]`."""
        if torch.jit.is_tracing():
            return super().forward(states)
        compiling = torch.compiler.is_compiling()
        if not compiling and self._is_small(states) or not self._is_inference(states):
            return super().forward(states)
        return (_opaque_product if compiling else product)(states, self.weight, self.bias)

    def _is_small(self, states: torch.Tensor) -> bool:
        return self.weight.numel() < _LARGE_WEIGHT and states.numel() * self.out_features < _LARGE_PRODUCT

    def _is_inference(self, states: torch.Tensor) -> bool:
        weight = self.weight
        return (
            not torch.compiler.is_exporting()
            and not torch.is_grad_enabled()
            and forward_ad._current_level < 0
            and states.dtype == weight.dtype == torch.float32
            and states.device.type == weight.device.type == "cpu"
            and states.shape[-1] == self.in_features
            and states.numel() > 0
            and type(weight) is nn.Parameter
            and weight.is_contiguous()
            and not torch.is_autocast_enabled("cpu")
            and _HAS_ONEDNN
        )


def with_inference_linears(module: nn.Module) -> nn.Module:
    """Makes every plain `nn.Linear` within a module an [`InferenceLinear`], in place.

    Args:
        module (`nn.Module`): Any part of a model, its weights in memory: quantisers look for `nn.Linear` by its exact type
            before they load them.

    Returns:
        The same module.
    """
    for part in module.modules():
        if type(part) is nn.Linear:
            part.__class__ = InferenceLinear
    return module


def with_plain_linears(module: nn.Module) -> nn.Module:
    """Undoes [`with_inference_linears`]."""
    for part in module.modules():
        # By name: a checkpoint's own copy of this code has a class of its own.
        if isinstance(part, nn.Linear) and type(part).__name__ == InferenceLinear.__name__:
            part.__class__ = nn.Linear
    return module


__all__ = ["InferenceLinear", "product", "with_inference_linears", "with_plain_linears"]
