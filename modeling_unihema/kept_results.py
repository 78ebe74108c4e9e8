"""When a result may be kept and given again: in ordinary evaluation, by layers that depend on nothing but their tensors."""

from collections.abc import Iterator
from functools import cache

import torch
from torch import nn

from .padding import PADDING_HOOKS
from .tracing import is_traced


# Transformers' hooks that record states when a caller asks for them; a part that is recorded runs anyway.
_RECORDERS = "transformers.utils.output_capturing"
# An adapter, say, can be switched off without a tensor changing, so other layers are not trusted.
_KNOWN = ("torch.nn.", "torch.ao.nn.quantized.", "transformers.", "timm.", f"{__name__.rpartition('.')[0]}.")


def keeping_state(module: nn.Module) -> tuple | None:
    """What a kept result of a module belongs to: it is valid as long as this stays the same.

    Args:
        module (`nn.Module`): Any part of a model.

    Returns:
        `tuple`: Place, version and dtype of every tensor; `None` where nothing may be kept: with gradients, in training,
        while a graph is traced, with layers that are not known, or with weights that are elsewhere.
    """
    if is_traced() or torch.is_grad_enabled():
        return None
    found: list[tuple] = []
    for part in _parts(module):
        if part.training or "_hf_hook" in vars(part) or not _is_known(type(part)):
            return None
        tensors = (*part._parameters.values(), *part._buffers.values())
        found += [(tensor.data_ptr(), tensor._version, tensor.dtype) for tensor in tensors if tensor is not None]
    return tuple(found)


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    # This runs on every call of a model; `modules()` goes through a generator for each level of nesting.
    waiting = [module]
    while waiting:
        part = waiting.pop()
        if part is not None:
            yield part
            waiting.extend(part._modules.values())


@cache
def _is_known(kind: type) -> bool:
    return kind.__module__.startswith(_KNOWN)


def is_watched(module: nn.Module) -> bool:
    """Whether someone's hook waits for a layer within a module to run, as it does not where a kept result is given.

    Args:
        module (`nn.Module`): Any part of a model; hooks on itself do not count.
    """
    return any(
        hook not in PADDING_HOOKS and getattr(hook, "__module__", None) != _RECORDERS
        for part in _parts(module)
        if part is not module and (part._forward_hooks or part._forward_pre_hooks)
        for hook in (*part._forward_hooks.values(), *part._forward_pre_hooks.values())
    )


__all__ = ["is_watched", "keeping_state"]
