"""What every peer has in common: UniHema's interface to training and evaluation, its backbone and its start."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import nn
from transformers import AutoBackbone

from unihema.modeling_unihema.configuration_unihema import UniHemaConfig
from unihema.training.run.build import timm_model


WEIGHTS = "model.safetensors"
# What the strides of the peers' networks divide.
MULTIPLE = 32


class Peer(nn.Module):
    """A single-task model that `train`, its batches and the metrics take in UniHema's place.

    Widths, layers, queries, text model and classes are those of a UniHema configuration, so that a peer is as large as the
    part of UniHema that does its task. BatchNorms of the backbone stay fixed where UniHema's do.

    Args:
        config (`UniHemaConfig`): UniHema's, for the same data; without attributes, which no peer reads.
    """

    # In the names of the backbone's parameters; `None` without one.
    backbone_part: str | None = "backbone"
    # Whether it never sees an image, so that none is read for it.
    text_only = False

    def __init__(self, config: UniHemaConfig):
        super().__init__()
        self.config = config

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes weights and configuration into a folder."""
        self.config.save_pretrained(folder)
        save_model(self, str(Path(folder) / WEIGHTS))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Peer":
        """A peer that [`save_pretrained`] wrote, in evaluation mode on the CPU."""
        peer = cls(UniHemaConfig.from_pretrained(folder))
        load_model(peer, str(Path(folder) / WEIGHTS))
        return peer.eval()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.parameters()).dtype

    @property
    def backbone_network(self) -> nn.Module | None:
        """The backbone."""
        return self.backbone

    def start_from(self, backbone: nn.Module) -> None:
        """Takes over the weights of UniHema's backbone as a run starts with it.

        Args:
            backbone (`nn.Module`): Of the same kind; Transformers' wrapper of timm networks or not.
        """
        if self.backbone_network is not None:
            timm_model(self.backbone_network).load_state_dict(timm_model(backbone).state_dict())
            self.freeze_norms()

    def freeze_norms(self) -> None:
        """Where the configuration freezes BatchNorms of the backbone, their weights get no gradient."""
        for norm in self._frozen_norms():
            norm.requires_grad_(False)

    def train(self, mode: bool = True) -> "Peer":
        """Sets the training mode; frozen BatchNorms stay in evaluation mode."""
        super().train(mode)
        for norm in self._frozen_norms():
            norm.eval()
        return self

    def _frozen_norms(self) -> list[nn.Module]:
        if self.backbone_part is None or not self.config.freeze_backbone_norm:
            return []
        return [module for module in self.backbone_network.modules() if isinstance(module, nn.BatchNorm2d)]


def make_backbone(config: UniHemaConfig) -> nn.Module:
    """A backbone of the kind that UniHema has, with random weights."""
    config.backbone_config._attn_implementation = None
    return AutoBackbone.from_config(config.backbone_config)


def padded(pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and their mask, grown to the right and below until both sides are multiples of 32 pixels.

    Args:
        pixel_values (`torch.Tensor`): `[B, 3, H, W]`.
        pixel_mask (`torch.Tensor`, *optional*): `[B, H, W]`, 1 on the image; all image when missing.
    """
    if pixel_mask is None:
        pixel_mask = pixel_values.new_ones((len(pixel_values), *pixel_values.shape[-2:]), dtype=torch.long)
    height, width = pixel_values.shape[-2:]
    grown = (0, -width % MULTIPLE, 0, -height % MULTIPLE)
    return nn.functional.pad(pixel_values, grown), nn.functional.pad(pixel_mask, grown)


def model_inputs(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of a batch that a model is called with, without labels."""
    names = ("pixel_values", "pixel_mask", "input_ids", "attention_mask")
    return {name: batch[name] for name in names if name in batch}
