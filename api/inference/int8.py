"""A model whose linear layers multiply 8-bit integers on the CPU: faster where weights must be read anew for every token."""

import warnings
from typing import TYPE_CHECKING

from unihema.errors import InputError


if TYPE_CHECKING:
    from unihema.modeling_unihema.modeling_unihema import UniHemaPreTrainedModel

# They decide places and scores, where a small error changes what is found, and take next to no time.
_KEPT = (
    "sampling_offsets",
    "attention_weights",
    "class_head",
    "box_head",
    "position_head",
    "detection_head",
    "single_cell_head",
    "mask_head",
    "query_head",
    "query_selection",
    "denoising",
)
_MARK = "_linears_are_int8"


def to_int8(model: "UniHemaPreTrainedModel") -> "UniHemaPreTrainedModel":
    """Quantises the linear layers of a model, in place, to int8 weights and dynamically quantised inputs.

    Heads, box and sampling layers stay as they are, and so do layers that an adapter changes. What it costs in accuracy depends
    on the checkpoint: `unihema evaluate --int8` measures it.

    Args:
        model ([`UniHemaForMultiTask`] or a model with one head): On the CPU, in float32; for inference only afterwards.

    Returns:
        The same model.

    Raises:
        ValueError: The model is on another device, in another dtype, quantised already, no PyTorch model or without
            linear layers, or this build of PyTorch has no int8 kernels.
    """
    import torch
    from torch import nn

    if not isinstance(model, nn.Module):
        raise InputError("int8: this is no PyTorch model; give a checkpoint folder, not an exported file.")
    if is_int8(model):
        raise InputError("int8: this model is quantised already.")
    if model.device.type != "cpu" or model.dtype != torch.float32:
        raise InputError(
            f"int8: needs a float32 model on the CPU, got {model.dtype} on {model.device}; load it with device='cpu' and "
            "dtype='float32'."
        )
    if torch.backends.quantized.engine == "none":
        raise InputError("int8: this build of PyTorch has no int8 kernels; run without it.")
    adapted = tuple(f"{name}." for name, part in model.named_modules() if hasattr(part, "base_layer"))
    names = [
        name
        for name, part in model.named_modules()
        if type(part) is nn.Linear
        and not any(kept in name.split(".") for kept in _KEPT)
        and not name.startswith(adapted)
    ]
    if not names:
        raise InputError("int8: this model has no linear layer to quantise.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.ao.quantization import default_dynamic_qconfig, quantize_dynamic

        model.eval().requires_grad_(False)
        quantize_dynamic(model, dict.fromkeys(names, default_dynamic_qconfig), dtype=torch.qint8, inplace=True)
    setattr(model, _MARK, True)
    # The new layers start in training mode.
    return model.eval()


def is_int8(model: object) -> bool:
    """Whether [`to_int8`] has quantised this model."""
    return getattr(model, _MARK, False)


__all__ = ["is_int8", "to_int8"]
