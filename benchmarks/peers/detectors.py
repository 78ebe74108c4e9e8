"""Transformers' detectors as peers: RT-DETRv2 and two-stage DeformableDetr, of UniHema's widths and with its backbone."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import (
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    RTDetrV2Config,
    RTDetrV2ForObjectDetection,
)
from transformers.loss.loss_deformable_detr import DeformableDetrForObjectDetectionLoss

from benchmarks.peers.peer import Peer, make_backbone, padded
from unihema.modeling_unihema.configuration_unihema import UniHemaConfig
from unihema.modeling_unihema.outputs import UniHemaDetectionOutput


# A logit whose focal loss is 0, and whose gradient is.
NOT_ASKED = -1e4


class Detector(Peer):
    """A detector of Transformers. A class that an image's data set does not annotate costs it nothing there, as UniHema."""

    # Which axis of the logits of all decoder layers counts images.
    images_axis = 0

    def __init__(self, config: UniHemaConfig, network: Any):
        super().__init__(config)
        self.network = network
        # Transformers puts its own norms into the backbone it makes, which loses the activations inside timm's.
        network.model.backbone.model = make_backbone(config)
        network.loss_function = _of_annotated_classes(network.loss_function, self.images_axis)
        self.freeze_norms()

    @property
    def backbone_network(self) -> torch.nn.Module:
        return self.network.model.backbone.model

    def forward(
        self,
        pixel_values: torch.Tensor,
        pixel_mask: torch.Tensor | None = None,
        labels: Sequence[dict[str, torch.Tensor]] | None = None,
        **kwargs,
    ) -> UniHemaDetectionOutput:
        """
        Args:
            pixel_values (`torch.Tensor`): `[B, 3, H, W]`.
            pixel_mask (`torch.Tensor`, *optional*): `[B, H, W]`, 1 on the image.
            labels (`Sequence[dict[str, torch.Tensor]]`, *optional*): As UniHema's, boxes relative to the image itself.
        """
        pixel_values, pixel_mask = padded(pixel_values, pixel_mask)
        scale = self.box_scale(pixel_mask).to(pixel_values.dtype)
        if labels is not None:
            labels = [{**of_image, "boxes": of_image["boxes"] * scale[n]} for n, of_image in enumerate(labels)]
        output = self.network(pixel_values, pixel_mask=pixel_mask, labels=labels)
        loss = output.loss if labels is None else output.loss + self.further_loss(output, labels)
        return UniHemaDetectionOutput(loss=loss, logits=output.logits, pred_boxes=output.pred_boxes / scale[:, None])

    def box_scale(self, pixel_mask: torch.Tensor) -> torch.Tensor:
        """From boxes relative to the image to those that the network speaks of, `[B, 4]`."""
        return torch.ones(len(pixel_mask), 4, device=pixel_mask.device)

    def further_loss(self, output: Any, labels: Sequence[dict[str, torch.Tensor]]) -> torch.Tensor | float:
        """What Transformers' loss leaves out."""
        return 0.0


class RTDetrV2(Detector):
    """RT-DETRv2, which knows no padding: its boxes are relative to the padded image."""

    def __init__(self, config: UniHemaConfig):
        width, channels = config.d_model, make_backbone(config).channels
        own = RTDetrV2Config(
            **_sizes(config),
            freeze_backbone_batch_norms=False,
            encoder_hidden_dim=width,
            encoder_in_channels=list(channels),
            decoder_in_channels=[width] * len(channels),
            num_feature_levels=len(channels),
            num_denoising=config.denoising_queries,
        )
        super().__init__(config, RTDetrV2ForObjectDetection(own))

    def box_scale(self, pixel_mask: torch.Tensor) -> torch.Tensor:
        height, width = pixel_mask.shape[-2:]
        share = torch.stack((pixel_mask[:, 0].sum(1) / width, pixel_mask[:, :, 0].sum(1) / height), 1)
        return share.repeat(1, 2)


class DeformableDetr(Detector):
    """DeformableDetr, two-stage with box refinement."""

    images_axis = 1

    def __init__(self, config: UniHemaConfig):
        own = DeformableDetrConfig(
            **_sizes(config),
            two_stage=True,
            with_box_refine=True,
            two_stage_num_proposals=config.num_queries,
            num_feature_levels=config.num_feature_levels,
            dropout=config.dropout,
            auxiliary_loss=True,
        )
        super().__init__(config, DeformableDetrForObjectDetection(own))

    def further_loss(self, output: Any, labels: Sequence[dict[str, torch.Tensor]]) -> torch.Tensor:
        """The loss of the first stage, whose proposals otherwise stay as random as its weights began (Deformable DETR,
        arXiv 2010.04159, appendix A.4): any cell is its class 0."""
        cells = [{**of_image, "class_labels": torch.zeros_like(of_image["class_labels"])} for of_image in labels]
        boxes = output.enc_outputs_coord_logits.sigmoid()
        config = self.network.config
        own = type(config)(**{**config.to_dict(), "auxiliary_loss": False})
        return DeformableDetrForObjectDetectionLoss(output.enc_outputs_class, cells, self.device, boxes, own)[0]


def _sizes(config: UniHemaConfig) -> dict[str, Any]:
    """What both detectors are built like, in Transformers' names."""
    same = ("d_model", "encoder_layers", "decoder_layers", "encoder_ffn_dim", "decoder_ffn_dim", "num_queries")
    return {name: getattr(config, name) for name in (*same, "backbone_config", "id2label")} | dict.fromkeys(
        ("encoder_attention_heads", "decoder_attention_heads"), config.num_attention_heads
    )


def _of_annotated_classes(loss: Callable, images_axis: int) -> Callable:
    """A loss of Transformers for data sets that annotate different classes."""

    def of_annotated(logits, labels, device, pred_boxes, config, outputs_class=None, outputs_coord=None, **further):
        marks = [of_image.get("annotated_classes") for of_image in labels]
        if any(mark is not None for mark in marks):
            everything = torch.ones(logits.shape[-1], dtype=torch.bool)
            left_out = ~torch.stack([everything if mark is None else mark.cpu() for mark in marks]).to(logits.device)
            logits = logits.masked_fill(left_out[:, None], NOT_ASKED)
            of_layers = left_out[:, None, None] if images_axis == 0 else left_out[:, None]
            outputs_class = None if outputs_class is None else outputs_class.masked_fill(of_layers, NOT_ASKED)
            if further.get("enc_topk_logits") is not None:
                further["enc_topk_logits"] = further["enc_topk_logits"].masked_fill(left_out[:, None], NOT_ASKED)
        return loss(logits, labels, device, pred_boxes, config, outputs_class, outputs_coord, **further)

    return of_annotated
