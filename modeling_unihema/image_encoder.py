"""The image encoder: deformable self-attention over all feature levels (DINO, arXiv 2203.03605)."""

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput

from .configuration_unihema import UniHemaConfig
from .deformable_attention import MultiScaleDeformableAttention
from .layers import FeedForward
from .visual_backbone import FeatureLevels


class ImageEncoderLayer(GradientCheckpointingLayer):
    """Deformable self-attention and a feed-forward, each with residual and LayerNorm."""

    def __init__(self, config: UniHemaConfig):
        super().__init__()
        self.self_attention = MultiScaleDeformableAttention(config)
        self.self_attention_norm = nn.LayerNorm(config.d_model)
        self.feed_forward = FeedForward(config.d_model, config.encoder_ffn_dim, config.dropout)
        self.feed_forward_norm = nn.LayerNorm(config.d_model)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        reference: torch.Tensor,
        level_shapes: list[tuple[int, int]],
        sizes: torch.Tensor,
        padding: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens `[B, S, d]` to tokens `[B, S, d]` and sampling weights; `reference` `[B, S, levels, 2]`, `padding` `[B, S]`."""
        attended, weights = self.self_attention(tokens + positions, reference, tokens, level_shapes, sizes, padding)
        tokens = self.self_attention_norm(tokens + self.dropout(attended))
        return self.feed_forward_norm(tokens + self.dropout(self.feed_forward(tokens))), weights


class ImageEncoder(nn.Module):
    """Refines the projected feature levels."""

    def __init__(self, config: UniHemaConfig):
        super().__init__()
        self.level_embedding = nn.Parameter(torch.empty(config.num_feature_levels, config.d_model))
        self.layers = nn.ModuleList([ImageEncoderLayer(config) for _ in range(config.encoder_layers)])

    def forward(
        self, levels: FeatureLevels, output_hidden_states: bool = False, output_attentions: bool = False
    ) -> BaseModelOutput:
        """
        Args:
            levels ([`FeatureLevels`]): The projected feature levels.
            output_hidden_states (`bool`): Also return the tokens before and after each layer.
            output_attentions (`bool`): Also return the sampling weights of each layer.

        Returns:
            `BaseModelOutput`: `last_hidden_state`: encoded tokens `[B, S, d]`, levels concatenated. `attentions`:
            `[B, S, heads, levels, points]` each.
        """
        tokens = levels.tokens
        padding = levels.padding
        counts = [h * w for h, w in levels.shapes]
        of_levels = [row.expand(count, -1) for row, count in zip(self.level_embedding, counts, strict=True)]
        positions = levels.positions + torch.cat(of_levels)
        reference = levels.centres[:, :, None] * levels.valid_ratios[:, None]
        states, weights = [tokens], []
        for layer in self.layers:
            tokens, sampled = layer(tokens, positions, reference, levels.shapes, levels.sizes, padding)
            if output_hidden_states:
                states.append(tokens)
            if output_attentions:
                weights.append(sampled)
        return BaseModelOutput(
            tokens, tuple(states) if output_hidden_states else None, tuple(weights) if output_attentions else None
        )
