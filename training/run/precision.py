"""Half precision in training: every weight is cast once a step, in one piece."""

import warnings
from typing import Any

import torch
from torch import nn
from torch.func import functional_call


# Layers whose weights autocast casts, wherever they are used.
CAST_LAYERS = (nn.Linear, nn.Conv2d)


class _Cast(torch.autograd.Function):
    """Copies of weights in another dtype, and their gradients back, without a launch for each."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.dtypes = [weight.dtype for weight in weights]
        return _copied(weights, [dtype] * len(weights))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        known = [gradient for gradient in gradients if gradient is not None]
        dtypes = [dtype for gradient, dtype in zip(gradients, ctx.dtypes) if gradient is not None]
        copies = iter(_copied(known, dtypes))
        return None, *(None if gradient is None else next(copies) for gradient in gradients)


def _copied(tensors: Any, dtypes: list[torch.dtype]) -> tuple[torch.Tensor, ...]:
    copies = tuple(torch.empty_like(tensor, dtype=dtype) for tensor, dtype in zip(tensors, dtypes))
    if copies:
        # Private: no public operator copies a list of tensors in one launch.
        torch._foreach_copy_(copies, list(tensors))
    return copies


def warn_of_slow_bf16(device: torch.device) -> None:
    """Says where bf16 is computed without instructions for it: with AVX2 alone a step takes several times as long.

    Args:
        device (`torch.device`): Where a run computes.
    """
    if device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2":
        warnings.warn(
            "This processor computes bf16 several times more slowly than float32. Train without --mixed-precision bf16.",
            stacklevel=2,
        )


def half_weights(model: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The float32 weights that autocast would cast, cast to `dtype` with a graph. What other layers share is left out.

    Args:
        model (`nn.Module`): Any model.
        dtype (`torch.dtype`): `torch.bfloat16` or `torch.float16`.

    Returns:
        `dict[str, torch.Tensor]`: By name, as `functional_call` takes them.
    """
    elsewhere = {
        id(weight)
        for module in model.modules()
        if not isinstance(module, CAST_LAYERS)
        for weight in module.parameters(recurse=False)
    }
    weights = {
        f"{name}.{of_layer}" if name else of_layer: weight
        for name, module in model.named_modules()
        if isinstance(module, CAST_LAYERS)
        for of_layer, weight in module.named_parameters(recurse=False)
        if weight.dtype == torch.float32 and id(weight) not in elsewhere
    }
    return dict(zip(weights, _Cast.apply(dtype, *weights.values()), strict=True))


def with_half_weights(model: nn.Module, dtype: torch.dtype, batch: dict[str, Any]) -> Any:
    """The model's output under autocast to `dtype`, with the same values and gradients, but each weight cast once.

    Args:
        model (`nn.Module`): Its `forward` runs under autocast.
        dtype (`torch.dtype`): Of autocast.
        batch (`dict[str, Any]`): Keyword arguments of `forward`.
    """
    return functional_call(model, half_weights(model, dtype), kwargs=batch)


__all__ = ["half_weights", "warn_of_slow_bf16", "with_half_weights"]
