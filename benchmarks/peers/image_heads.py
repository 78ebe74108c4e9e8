"""The backbone with linear heads for single cells and their attributes, and inside a U-Net for masks."""

import torch
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput

from benchmarks.peers.peer import Peer, make_backbone, padded
from unihema.modeling_unihema.configuration_unihema import UniHemaConfig
from unihema.modeling_unihema.losses import morphology_loss
from unihema.modeling_unihema.outputs import UniHemaDetectionOutput, UniHemaSegmentationOutput
from unihema.modeling_unihema.padding import valid_at


# Channels of the U-Net's decoder, coarsest first: half those of the library's default.
DECODER_CHANNELS = (128, 64, 32, 16, 16)
IGNORED = -100


class PooledHead(Peer):
    """The whole backbone, fine-tuned, under a linear layer on its last map's mean over the image.

    Args:
        config (`UniHemaConfig`): See [`Peer`].
        outputs (`int`): Width of the layer.
    """

    def __init__(self, config: UniHemaConfig, outputs: int):
        super().__init__(config)
        self.backbone = make_backbone(config)
        self.dropout = nn.Dropout(config.single_cell_dropout)
        self.head = nn.Linear(self.backbone.channels[-1], outputs)
        self.freeze_norms()

    def read(self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None) -> torch.Tensor:
        """Logits `[B, outputs]` of images `[B, 3, H, W]`; `pixel_mask` `[B, H, W]` is 1 on the image."""
        last = self.backbone(pixel_values).feature_maps[-1]
        valid = valid_at(None if pixel_mask is None else pixel_mask.bool(), last)
        weight = torch.ones_like(last[:, :1]) if valid is None else valid[:, None].to(last.dtype)
        pooled = (last * weight).sum((2, 3)) / weight.sum((2, 3))
        return self.head(self.dropout(pooled))


class LinearHead(PooledHead):
    """Names the cell of a crop."""

    def __init__(self, config: UniHemaConfig):
        super().__init__(config, len(config.single_cell_labels))

    def forward(self, pixel_values, pixel_mask=None, labels=None, **kwargs) -> ImageClassifierOutput:
        """
        Args:
            pixel_values, pixel_mask (`torch.Tensor`): See [`PooledHead.read`].
            labels (`torch.Tensor`, *optional*): `[B]`.
        """
        logits = self.read(pixel_values, pixel_mask)
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


class AttributeHeads(PooledHead):
    """Reads the attributes of a crop's cell. To evaluation it is a detector that finds one cell, the crop."""

    def __init__(self, config: UniHemaConfig):
        super().__init__(config, sum(config.morphology_sizes))

    def forward(self, pixel_values, pixel_mask=None, labels=None, **kwargs) -> UniHemaDetectionOutput:
        """
        Args:
            pixel_values, pixel_mask (`torch.Tensor`): See [`PooledHead.read`].
            labels (`Sequence[dict[str, torch.Tensor]]`, *optional*): As UniHema's, of one cell an image.
        """
        attributes = self.read(pixel_values, pixel_mask)
        loss = None
        if labels is not None:
            values = torch.cat([of_image["morphology"] for of_image in labels]).to(attributes.device)
            loss = morphology_loss(attributes, values, self.config.morphology_sizes)
        whole = attributes.new_tensor([0.5, 0.5, 1.0, 1.0]).expand(len(attributes), 1, 4)
        logits = attributes.new_zeros(len(attributes), 1, len(self.config.id2label))
        return UniHemaDetectionOutput(loss=loss, logits=logits, pred_boxes=whole, pred_morphology=attributes[:, None])


class UNet(Peer):
    """segmentation_models_pytorch's U-Net around the timm network of UniHema's backbone; Dice and cross-entropy."""

    backbone_part = "network.encoder"

    def __init__(self, config: UniHemaConfig):
        super().__init__(config)
        try:
            import segmentation_models_pytorch as smp
        except ImportError as error:
            raise ImportError(
                "The U-Net peer needs segmentation_models_pytorch: pip install 'unihema[peers]'."
            ) from error
        self.network = smp.Unet(
            f"tu-{config.backbone_config.backbone}",
            encoder_weights=None,
            decoder_channels=DECODER_CHANNELS,
            classes=1,
        )
        self.dice = smp.losses.DiceLoss("binary", ignore_index=IGNORED)
        self.freeze_norms()

    @property
    def backbone_network(self) -> nn.Module:
        return self.network.encoder.model

    def forward(
        self,
        pixel_values: torch.Tensor,
        pixel_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs,
    ) -> UniHemaSegmentationOutput:
        """
        Args:
            pixel_values (`torch.Tensor`): `[B, 3, H, W]`.
            pixel_mask (`torch.Tensor`, *optional*): `[B, H, W]`, 1 on the image.
            labels (`torch.Tensor`, *optional*): `[B, H, W]`: 1 cell, 0 background, -100 ignored.
        """
        height, width = pixel_values.shape[-2:]
        logits = self.network(padded(pixel_values, pixel_mask)[0])[:, 0, :height, :width]
        loss = None
        if labels is not None:
            known = labels != IGNORED
            entropy = nn.functional.binary_cross_entropy_with_logits(logits[known].float(), labels[known].float())
            loss = entropy + self.dice(logits.float()[:, None], labels[:, None])
        return UniHemaSegmentationOutput(loss=loss, mask_logits=logits)
