"""When a result may be kept and given again: in ordinary evaluation, by layers that depend on nothing but their tensors."""

import torch
from torch import nn


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
    tracing = torch.compiler.is_compiling() or torch.compiler.is_exporting() or torch.jit.is_tracing()
    if tracing or torch.is_grad_enabled():
        return None
    for part in module.modules():
        if part.training or hasattr(part, "_hf_hook") or not type(part).__module__.startswith(_KNOWN):
            return None
    tensors = (*module.parameters(), *module.buffers())
    return tuple((tensor.data_ptr(), tensor._version, tensor.dtype) for tensor in tensors)


__all__ = ["keeping_state"]
