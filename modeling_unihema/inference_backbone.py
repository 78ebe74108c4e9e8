"""The visual backbone as it runs fastest once trained: BatchNorm folded into the convolutions, channels last in memory."""

import copy

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .kept_results import is_watched, keeping_state
from .padding import ignore_padding_in_place


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
        state = keeping_state(backbone)
        if state is None or is_watched(backbone):
            return backbone
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
        `nn.Module`: The copy; `None` when its result is another.
    """
    folded = copy.deepcopy(backbone)
    for parent in folded.modules():
        children = list(parent.named_children())
        for (name, convolution), (norm_name, norm) in zip(children, children[1:]):
            pair = isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
            if pair and convolution.out_channels == norm.num_features and norm.track_running_stats:
                setattr(parent, name, fuse_conv_bn_eval(convolution, norm))
                # timm's norms have the activation, which comes after them, within.
                setattr(parent, norm_name, nn.Sequential(*norm.children()))
    folded = folded.to(memory_format=torch.channels_last)
    ignore_padding_in_place(folded)
    first = next(backbone.parameters())
    generator = torch.Generator().manual_seed(0)
    picture = torch.randn(1, 3, 64, 64, generator=generator).to(first.device, first.dtype)
    for expected, found in zip(backbone(picture).feature_maps, folded(picture).feature_maps):
        bound = max(_TOLERANCE, 20 * torch.finfo(first.dtype).eps) * expected.abs().max()
        if not (found - expected).abs().max() <= bound:
            return None
    return folded


__all__ = ["InferenceBackbone", "fold"]
