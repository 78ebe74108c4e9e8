"""Peers that answer questions and fill in sentences: a T5 that sees no image, and one whose decoder attends to it."""

import copy

import torch
from torch import nn
from transformers import T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from benchmarks.peers.peer import Peer, make_backbone
from unihema.modeling_unihema.configuration_unihema import UniHemaConfig
from unihema.modeling_unihema.padding import valid_at
from unihema.modeling_unihema.visual_backbone import feature_levels


class TextOnlyT5(Peer):
    """A T5 of the size of UniHema's text branch that never sees the image, which is what the official code amounts to."""

    backbone_part = None
    text_only = True
    backbone_network = None

    def __init__(self, config: UniHemaConfig):
        super().__init__(config)
        self.network = _t5(config)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs,
    ) -> Seq2SeqLMOutput:
        """
        Args:
            input_ids (`torch.Tensor`): Questions `[N, L]`.
            attention_mask (`torch.Tensor`, *optional*): `[N, L]`.
            labels (`torch.Tensor`, *optional*): Answers `[N, T]`, -100 ignored.
        """
        return self.network(input_ids=input_ids, attention_mask=attention_mask, labels=labels)

    def generate(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, text_only: bool = True, **options
    ) -> torch.Tensor:
        """Token ids of the answers `[N, T]`; `options` are those of `generate`. `text_only` is a mark of batches."""
        return self.network.generate(input_ids=input_ids, attention_mask=attention_mask, **options)


class BlipLike(Peer):
    """A T5 whose decoder attends to image tokens and question states side by side.

    BLIP (arXiv 2201.12086) mixes both inside its question encoder; here they meet in the decoder's cross-attention, over
    the two coarser maps of UniHema's backbone.
    """

    def __init__(self, config: UniHemaConfig):
        super().__init__(config)
        self.network = _t5(config)
        self.backbone = make_backbone(config)
        width = config.text_config.d_model
        self.projections = nn.ModuleList(
            nn.Sequential(nn.Linear(channels, width), nn.LayerNorm(width)) for channels in self.backbone.channels[-2:]
        )
        self.freeze_norms()

    def forward(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor,
        pixel_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs,
    ) -> Seq2SeqLMOutput:
        """
        Args:
            pixel_values (`torch.Tensor`): `[B, 3, H, W]`.
            input_ids (`torch.Tensor`): As many questions of each image, those of an image together, `[N, L]`.
            pixel_mask (`torch.Tensor`, *optional*): `[B, H, W]`, 1 on the image.
            attention_mask (`torch.Tensor`, *optional*): `[N, L]`.
            labels (`torch.Tensor`, *optional*): Answers `[N, T]`, -100 ignored.
        """
        states, mask = self._encoded(pixel_values, pixel_mask, input_ids, attention_mask)
        return self.network(encoder_outputs=states, attention_mask=mask, labels=labels)

    def generate(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor,
        pixel_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **options,
    ) -> torch.Tensor:
        """Token ids of the answers `[N, T]`; `options` are those of `generate`."""
        states, mask = self._encoded(pixel_values, pixel_mask, input_ids, attention_mask)
        return self.network.generate(encoder_outputs=states, attention_mask=mask, **options)

    def _encoded(self, pixel_values, pixel_mask, input_ids, attention_mask) -> tuple[BaseModelOutput, torch.Tensor]:
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        text = self.network.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        pixels = None if pixel_mask is None else pixel_mask.bool()
        maps = [
            projection(level.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, level.shape[-2:])
            for projection, level in zip(self.projections, self.backbone(pixel_values).feature_maps[-2:])
        ]
        valid = None if pixels is None else [valid_at(pixels, level) for level in maps]
        levels = feature_levels(maps, valid, self.config.position_temperature)
        questions = len(input_ids) // len(pixel_values)
        image = (levels.tokens + levels.positions).repeat_interleave(questions, 0)
        seen = torch.cat([mask.flatten(1) for mask in levels.valid], 1)
        seen = seen.repeat_interleave(questions, 0).to(attention_mask.dtype)
        return BaseModelOutput(torch.cat((image, text), 1)), torch.cat((seen, attention_mask), 1)


def _t5(config: UniHemaConfig) -> T5ForConditionalGeneration:
    text_config = copy.deepcopy(config.text_config)
    text_config.decoder_start_token_id = text_config.pad_token_id
    return T5ForConditionalGeneration(text_config)
