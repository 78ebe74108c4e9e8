"""A trained model made faster for inference, with the same results up to float rounding."""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.nn.utils.parametrize import is_parametrized

from unihema.errors import PreparedModelError
from unihema.modeling_unihema.modeling_unihema import UniHemaPreTrainedModel
from unihema.modeling_unihema.padding import blanked_in_place


# Of the largest value of the backbone's maps; fusing changes the order of float operations, nothing else.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Preparation:
    """What [`prepare_for_inference`] did.

    Args:
        fused_norms (`int`): BatchNorms that became part of the convolution before them.
        channels_last (`bool`): Whether the backbone's weights are laid out channels last.
        notes (`tuple[str, ...]`): What was left as it is, and why.
    """

    fused_norms: int = 0
    channels_last: bool = False
    notes: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        layout = "channels last" if self.channels_last else "channels first"
        return "; ".join((f"{self.fused_norms} norms fused into convolutions, {layout}", *self.notes))


class FusedConvolution(nn.Module):
    """A convolution and the BatchNorm after it as one convolution. It reads padding as if the image ended there.

    Args:
        convolution (`nn.Conv2d`): Of any kind, such as one that pads in a way of its own.
        norm (`nn.BatchNorm2d`): In evaluation mode.
    """

    def __init__(self, convolution: nn.Conv2d, norm: nn.BatchNorm2d):
        super().__init__()
        self.fused = fuse_conv_bn_eval(convolution, norm)
        self.looks_around = convolution.kernel_size != (1, 1)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """`[B, C, h, w]` to `[B, C', h', w']`."""
        if self.looks_around:
            maps = blanked_in_place(maps)
        # Its hook would blank a copy of the maps.
        return self.fused.forward(maps)


def prepare_for_inference(model: UniHemaPreTrainedModel) -> Preparation:
    """Makes a model faster for inference, in place: evaluation mode, no gradients, BatchNorms of the backbone fused into its
    convolutions, channels last. Linear layers and everything behind the backbone stay as they are. Calling it again changes
    nothing.

    Results are those of the unprepared model up to float rounding. A prepared model cannot be saved, and adapters cannot change
    its fused convolutions: load the checkpoint again for that.

    Args:
        model (`UniHemaPreTrainedModel`): Any UniHema model, its weights in memory.

    Returns:
        [`Preparation`]: What was done.
    """
    done = getattr(model, "preparation", None)
    if done is not None:
        return done
    model.eval().requires_grad_(False)
    visual = model.base_model.visual_backbone
    faster, fused, notes = _faster_backbone(visual.backbone)
    if faster is not None:
        visual.backbone = faster
    # Not by a hook on the state dict, which PEFT reads when it loads an adapter.
    model.save_pretrained = _refuse_to_save
    model.preparation = Preparation(fused, faster is not None, notes)
    return model.preparation


@torch.no_grad()
def _faster_backbone(backbone: nn.Module) -> tuple[nn.Module | None, int, tuple[str, ...]]:
    """A copy that gives the same maps, how many norms it has fused, and what was left."""
    first = next(backbone.parameters())
    picture = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(first.device, first.dtype)
    expected = backbone(picture).feature_maps
    plain = copy.deepcopy(backbone).to(memory_format=torch.channels_last)
    fused = copy.deepcopy(backbone)
    count = _fuse_norms(fused)
    fused = fused.to(memory_format=torch.channels_last)
    # That a norm declared after a convolution also follows it is true of the usual networks; it is checked.
    if count and _same_maps(expected, fused(picture).feature_maps):
        return fused, count, ()
    notes = ("norms not fused: one of them does not follow the convolution before it",) if count else ()
    if _same_maps(expected, plain(picture).feature_maps):
        return plain, 0, notes
    return None, 0, (*notes, "backbone left as it is: it gives other results with channels last")


def _fuse_norms(backbone: nn.Module) -> int:
    count = 0
    for parent in list(backbone.modules()):
        children = list(parent.named_children())
        for (name, convolution), (norm_name, norm) in zip(children, children[1:]):
            # The layers of an adapter, which do more, are no `nn.Conv2d`.
            pair = isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
            if pair and not is_parametrized(convolution) and norm.track_running_stats and norm.affine:
                setattr(parent, name, FusedConvolution(convolution, norm))
                # timm's norms have the activation, which comes after them, within.
                setattr(parent, norm_name, nn.Sequential(*norm.children()))
                count += 1
    for part in backbone.modules():
        if isinstance(part, nn.ReLU):
            # What comes out of a convolution is read by its activation alone; checked with the norms.
            part.inplace = True
    return count


def _same_maps(expected, found) -> bool:
    bound = max(TOLERANCE, 20 * torch.finfo(expected[0].dtype).eps)
    return all(bool((b - a).abs().max() <= bound * a.abs().max()) for a, b in zip(expected, found, strict=True))


def _refuse_to_save(*args: Any, **kwargs: Any) -> None:
    raise PreparedModelError(
        "This model was prepared for inference and no longer has the weights of its checkpoint. Load the checkpoint again to "
        "save it or to train it."
    )


__all__ = ["Preparation", "prepare_for_inference"]
