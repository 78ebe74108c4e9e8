"""The visual backbone as it runs fastest once trained: BatchNorm folded into the convolutions, channels last in memory."""

import copy

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def tensors_state(module: nn.Module) -> tuple:
    """Changes whenever a parameter or buffer of the module does: where it lies, its version and its type."""
    tensors = (*module.parameters(), *module.buffers())
    return tuple((tensor.data_ptr(), tensor._version, tensor.dtype) for tensor in tensors)


# Layers whose result depends on nothing but their tensors; an adapter, say, can be switched off without changing one.
_KNOWN = ("torch.nn.", "transformers.", "timm.")
# Of the largest value; folding changes the order of float operations, nothing else.
_TOLERANCE = 1e-3


class InferenceBackbone:
    """Makes and keeps the fast copy of a backbone, anew whenever a tensor of the original has changed."""

    def __init__(self):
        self.made_from: tuple | None = None
        self.copy: nn.Module | None = None

    def __call__(self, backbone: nn.Module) -> nn.Module:
        """The copy for evaluation without gradients, in ordinary execution; else the backbone itself.

        Args:
            backbone (`nn.Module`): Called with images, returns `feature_maps`.
        """
        special = torch.compiler.is_compiling() or torch.compiler.is_exporting() or torch.jit.is_tracing()
        if special or torch.is_grad_enabled() or any(module.training for module in backbone.modules()):
            return backbone
        if any(hasattr(module, "_hf_hook") for module in backbone.modules()):
            return backbone
        state = tensors_state(backbone)
        if state != self.made_from:
            self.made_from, self.copy = state, fold(backbone)
        return backbone if self.copy is None else self.copy

    def __deepcopy__(self, memo) -> "InferenceBackbone":
        copied = copy.copy(self)
        copied.made_from = copied.copy = None
        return copied


@torch.no_grad()
def fold(backbone: nn.Module) -> nn.Module | None:
    """A copy with every BatchNorm that follows a convolution folded into it, channels last.

    That a norm declared after a convolution also follows it is true of the usual networks and checked here.

    Args:
        backbone (`nn.Module`): In evaluation mode.

    Returns:
        `nn.Module`: The copy; `None` when its result is another, or when the backbone has layers that do not depend on
        their tensors alone.
    """
    if not all(type(module).__module__.startswith(_KNOWN) for module in backbone.modules()):
        return None
    folded = copy.deepcopy(backbone)
    for parent in folded.modules():
        children = list(parent.named_children())
        for (name, convolution), (norm_name, norm) in zip(children, children[1:]):
            pair = type(convolution) is nn.Conv2d and type(norm) is nn.BatchNorm2d
            if pair and convolution.out_channels == norm.num_features and norm.track_running_stats:
                setattr(parent, name, fuse_conv_bn_eval(convolution, norm))
                setattr(parent, norm_name, nn.Identity())
    folded = folded.to(memory_format=torch.channels_last)
    first = next(backbone.parameters())
    generator = torch.Generator().manual_seed(0)
    picture = torch.randn(1, 3, 64, 64, generator=generator).to(first.device, first.dtype)
    for expected, found in zip(backbone(picture).feature_maps, folded(picture).feature_maps):
        bound = max(_TOLERANCE, 20 * torch.finfo(first.dtype).eps) * expected.abs().max()
        if not (found - expected).abs().max() <= bound:
            return None
    return folded


__all__ = ["InferenceBackbone", "fold", "tensors_state"]
