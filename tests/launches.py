"""Operators that a CUDA device would be sent, counted without one.

The model and its images are tensors of the meta device, which have shapes and no values: the code takes the way that it takes on
an accelerator, and whatever reads a value back to the host raises an error. Labels are real, on the host, as in training.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


# Operators that launch nothing, besides views.
FREE = {
    "_reshape_alias", "_unsafe_view", "alias", "detach", "empty", "empty_like", "empty_strided", "is_same_size", "lift_fresh",
    "new_empty", "new_empty_strided", "promote_types", "result_type", "sym_size", "_fused_sdp_choice",
}  # fmt: skip


class Launches(TorchDispatchMode):
    """Counts operators by name, and keeps the shapes of what is copied from the host."""

    def __init__(self):
        super().__init__()
        self.count: Counter[str] = Counter()
        self.from_host: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        space, name = func._schema.name.split("::")
        returned = [value.alias_info for value in func._schema.returns]
        is_view = bool(returned) and all(alias is not None and not alias.is_write for alias in returned)
        given = [_device(value) for value in torch.utils._pytree.tree_leaves((args, kwargs))]
        on_device = "meta" in (*given, *map(_device, torch.utils._pytree.tree_leaves(result)))
        if name in ("_to_copy", "copy_") and on_device and "cpu" in given:
            self.from_host.append(tuple(result.shape))
        if space != "prim" and name not in FREE and not is_view and on_device:
            self.count[name] += 1
        return result

    @property
    def total(self) -> int:
        return sum(self.count.values())


def _device(value: Any) -> str | None:
    return value.device.type if isinstance(value, torch.Tensor) else None


LOWER = {
    functional.linear, functional.conv2d, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.einsum,
    functional.scaled_dot_product_attention,
}  # fmt: skip
FLOAT32 = {
    functional.layer_norm, functional.group_norm, functional.softmax, torch.softmax, torch.Tensor.softmax, torch.Tensor.pow,
    torch.Tensor.__pow__, torch.Tensor.sum, torch.Tensor.cumsum, torch.Tensor.log, torch.log, functional.softplus, torch.cdist,
    functional.cross_entropy,
}  # fmt: skip


class CudaAutocast(TorchFunctionMode):
    """What autocast to bfloat16 does on CUDA, which it does not do for meta tensors: the operators that PyTorch's documentation
    lists get bfloat16 or float32, and the cast of a weight is kept until the end."""

    def __init__(self):
        super().__init__()
        self.kept: dict[int, torch.Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in LOWER or func in FLOAT32:
            dtype = torch.bfloat16 if func in LOWER else torch.float32
            args, kwargs = torch.utils._pytree.tree_map(lambda value: self._cast(value, dtype), (args, kwargs))
        return func(*args, **kwargs)

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if _device(value) != "meta" or not value.is_floating_point() or value.dtype == dtype:
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.to(dtype)
        if id(value) not in self.kept:
            self.kept[id(value)] = value.to(dtype)
        return self.kept[id(value)]


def fused_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """Attention as CUDA runs it, in one operator."""
    bias = None if attn_mask is None else attn_mask.to(query.dtype)
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
    )[0]


class FusedNorm(torch.autograd.Function):
    """RMSNorm as CUDA runs it, in one operator each way; meta tensors would get several."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(states, weight)
        return states.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        states, weight = ctx.saved_tensors
        return gradient.clone(memory_format=torch.contiguous_format), torch.empty_like(weight)


@contextmanager
def as_on_cuda(monkeypatch: Any, autocast: bool = True) -> Iterator[Launches]:
    """Context that counts what is launched for meta tensors, with the Triton kernels, fused attention and autocast of CUDA."""
    from unihema.modeling_unihema import deformable_attention

    monkeypatch.setattr(deformable_attention, "kernels_work", lambda device: True)
    monkeypatch.setattr(functional, "scaled_dot_product_attention", fused_attention)
    monkeypatch.setattr(functional, "rms_norm", lambda states, shape, weight, eps: FusedNorm.apply(states, weight))
    with ExitStack() as stack:
        counted = stack.enter_context(Launches())
        if autocast:
            stack.enter_context(CudaAutocast())
        yield counted


def on_meta(make: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """The module that `make` builds, without values."""
    with torch.device("meta"):
        return make()
