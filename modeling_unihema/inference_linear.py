"""Linear layers that read their weights once from memory at its full speed: what a text token's time on the CPU is made of."""

import torch
from torch import nn

from .tracing import is_traced


# A smaller weight stays in the processor's cache, where PyTorch's own call has the least to do around the product.
_LARGE = 2**18
# More rows at once, and the product with the weight on the left is no longer bound by memory.
_FEW_ROWS = 4


class InferenceLinear(nn.Linear):
    """`nn.Linear`, with another order of work for large float32 weights on the CPU, without gradients.

    PyTorch's own kernel reads the weight of a single row at about half of the memory's speed, and of a few rows more slowly
    still. Results are the same up to float rounding.
    """

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """`[..., in]` to `[..., out]`."""
        if not self._takes_another_order(states):
            return super().forward(states)
        rows = states.reshape(-1, self.in_features)
        if len(rows) > _FEW_ROWS or self.out_features < self.in_features:
            result = torch.ops.mkldnn._linear_pointwise(rows, self.weight, self.bias, "none", [], "")
        else:
            # A product with one column would fall to the kernel for vectors.
            columns = torch.cat((rows, rows)) if len(rows) == 1 else rows
            result = (self.weight @ columns.t())[:, : len(rows)].t()
            if self.bias is not None:
                result = result + self.bias
        return result.reshape(*states.shape[:-1], self.out_features)

    def _takes_another_order(self, states: torch.Tensor) -> bool:
        weight = self.weight
        return (
            not is_traced()
            and not torch.is_grad_enabled()
            and weight.numel() >= _LARGE
            and states.dtype == weight.dtype == torch.float32
            and states.device.type == weight.device.type == "cpu"
            and states.numel() > 0
            and weight.is_contiguous()
            and type(weight) is nn.Parameter
            and not torch.is_autocast_enabled("cpu")
            and torch.backends.mkldnn.is_available()
        )


def with_inference_linears(module: nn.Module) -> nn.Module:
    """Makes every plain `nn.Linear` within a module an [`InferenceLinear`], in place.

    Args:
        module (`nn.Module`): Any part of a model.

    Returns:
        The same module.
    """
    return _change(module, nn.Linear, InferenceLinear)


def with_plain_linears(module: nn.Module) -> nn.Module:
    """Undoes [`with_inference_linears`], for what looks for `nn.Linear` by its exact type."""
    return _change(module, InferenceLinear, nn.Linear)


def _change(module: nn.Module, before: type, after: type) -> nn.Module:
    for part in module.modules():
        if type(part) is before:
            part.__class__ = after
    return module


__all__ = ["InferenceLinear", "with_inference_linears", "with_plain_linears"]
