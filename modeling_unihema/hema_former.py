"""The four parts that make Uni-Hema one model of image and text (arXiv 2511.13889, section 3)."""

import torch
from torch import nn

from unihema.errors import InputError

from .configuration_unihema import UniHemaConfig
from .layers import MLP, MultiHeadAttention
from .visual_backbone import FeatureLevels


class CrossModalFusionBlock(nn.Module):
    """Queries attend to text and image (in the configured order), then a feed-forward."""

    def __init__(self, config: UniHemaConfig):
        super().__init__()
        self.image_first = config.fusion_order == "image_text"
        self.text_attention = MultiHeadAttention(config)
        self.text_norm = nn.LayerNorm(config.d_model)
        self.image_attention = MultiHeadAttention(config)
        self.image_norm = nn.LayerNorm(config.d_model)
        self.feed_forward = nn.Sequential(
            nn.Linear(config.d_model, config.fusion_ffn_dim),
            nn.GELU(),
            nn.Linear(config.fusion_ffn_dim, config.d_model),
        )
        self.feed_forward_norm = nn.LayerNorm(config.d_model)

    def forward(
        self,
        queries: torch.Tensor,
        text: torch.Tensor,
        image: torch.Tensor,
        text_padding: torch.Tensor | None,
        image_padding: torch.Tensor | None,
    ) -> torch.Tensor:
        """Queries `[B, L, d]`; text `[B, L, d]`; image `[B, S, d]`; paddings `[B, 1, 1, L or S]`, `True` on padding."""
        steps = [
            (self.text_attention, self.text_norm, text, text_padding),
            (self.image_attention, self.image_norm, image, image_padding),
        ]
        for attention, norm, states, padding in reversed(steps) if self.image_first else steps:
            queries = norm(queries + attention(queries, states, states, padding)[0])
        return self.feed_forward_norm(queries + self.feed_forward(queries))


class CrossModalFusion(nn.Module):
    """CMF: learned queries gather what text and image say together; added to the text states, they are what the text
    decoder attends to.

    J = Norm(Q1 + Attn(Q1, T, T)); E_W = Norm(J + Attn(J, V, V)), V the projected backbone levels.
    """

    def __init__(self, config: UniHemaConfig):
        super().__init__()
        self.max_length = config.fusion_queries
        self.attend_to_padding = config.attend_to_padding
        self.queries = nn.Parameter(torch.empty(config.fusion_queries, config.d_model))
        self.text_projection = nn.Linear(config.text_config.d_model, config.d_model)
        self.image_projection = nn.Linear(config.d_model, config.d_model)
        self.blocks = nn.ModuleList([CrossModalFusionBlock(config) for _ in range(config.fusion_layers)])
        self.output_projection = nn.Linear(config.d_model, config.text_config.d_model)

    def forward(self, text_states: torch.Tensor, attention_mask: torch.Tensor, levels: FeatureLevels) -> torch.Tensor:
        """
        Args:
            text_states (`torch.Tensor`): Text encoder output `[B, L, text width]`.
            attention_mask (`torch.Tensor`): `[B, L]`, 0 on padding.
            levels ([`FeatureLevels`]): Projected backbone levels of the same B images.

        Returns:
            `torch.Tensor`: `[B, L, text width]`.

        Raises:
            ValueError: L is more than `config.fusion_queries`.
        """
        length = text_states.shape[1]
        if length > self.max_length:
            raise InputError(
                f"The text has {length} tokens; this checkpoint reads at most {self.max_length} "
                "(config.fusion_queries). Shorten the text."
            )
        text_padding = image_padding = None
        if not self.attend_to_padding:
            text_padding = ~attention_mask.bool()[:, None, None]
            image_padding = levels.padding[:, None, None] if levels.padded else None
        text = self.text_projection(text_states)
        image = self.image_projection(levels.tokens)
        fused = self.queries[:length].expand(text.shape[0], -1, -1)
        for block in self.blocks:
            fused = block(fused, text, image, text_padding, image_padding)
        return text_states + self.output_projection(fused)


class TextGuidedVisualRefinement(nn.Module):
    """TGVR: content queries read the prompt before they read the image.

    A = Attn(k, P(T), P(T)); then k' = (1 - g) k + g A with g = sigmoid(MLP([k; A])), or k' = P([k; A]).
    """

    def __init__(self, config: UniHemaConfig):
        super().__init__()
        self.attend_to_padding = config.attend_to_padding
        self.text_projection = nn.Linear(config.text_config.d_model, config.d_model)
        self.attention = MultiHeadAttention(config)
        self.gated = config.refinement == "gated"
        if self.gated:
            self.gate = MLP(2 * config.d_model, config.d_model, config.d_model)
        else:
            self.merge = nn.Linear(2 * config.d_model, config.d_model)

    def forward(self, queries: torch.Tensor, text_states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """
        Args:
            queries (`torch.Tensor`): Content queries `[B, Q, d]`.
            text_states (`torch.Tensor`): Prompt states `[B, L, text width]`.
            attention_mask (`torch.Tensor`): `[B, L]`, 0 on padding.

        Returns:
            `torch.Tensor`: `[B, Q, d]`.
        """
        text = self.text_projection(text_states)
        padding = None if self.attend_to_padding else ~attention_mask.bool()[:, None, None]
        attended, _ = self.attention(queries, text, text, padding)
        both = torch.cat((queries, attended), -1)
        if not self.gated:
            return self.merge(both)
        gate = self.gate(both).sigmoid()
        return (1 - gate) * queries + gate * attended


class SingleCellFeatureExtraction(nn.Module):
    """SCFE: one vector for an image of one cell, E_Z = W [c; mean of the encoded tokens], c learned.

    With `scfe_backbone_features` the mean of the last backbone level joins them (the paper's ablation).
    """

    def __init__(self, config: UniHemaConfig):
        super().__init__()
        self.attend_to_padding = config.attend_to_padding
        self.query = nn.Parameter(torch.empty(config.d_model))
        self.backbone_level = len(config.backbone_config.out_indices) - 1 if config.scfe_backbone_features else None
        parts = 2 if self.backbone_level is None else 3
        self.projection = nn.Linear(parts * config.d_model, config.d_model)

    def forward(self, tokens: torch.Tensor, levels: FeatureLevels) -> torch.Tensor:
        """
        Args:
            tokens (`torch.Tensor`): Encoded tokens `[B, S, d]`.
            levels ([`FeatureLevels`]): Projected backbone levels and their padding.

        Returns:
            `torch.Tensor`: `[B, d]`.
        """
        parts = [self.query.expand(tokens.shape[0], -1), self._mean(tokens, levels.padding)]
        if self.backbone_level is not None:
            level = levels.maps[self.backbone_level].flatten(2).transpose(1, 2)
            parts.append(self._mean(level, ~levels.valid[self.backbone_level].flatten(1)))
        return self.projection(torch.cat(parts, -1))

    def _mean(self, tokens: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
        if self.attend_to_padding or padding is None:
            return tokens.mean(1)
        weight = (~padding).to(tokens.dtype)[..., None]
        return (tokens * weight).sum(1) / weight.sum(1).clamp(min=1)


class QueryGuidedMaskFinder(nn.Module):
    """QGMF: masks of queries over a feature map made of the finest encoder and backbone levels.

    G = ReLU(W E_0) + conv1x1(F_1); Y = <MLP(Norm(h)), G>. The semantic mask of an image is that of query 0. In detection the
    mask of a query is that of its cell: `embed` gives the two sides of the product, of which `cell_mask_logits` makes what is
    wanted.
    """

    def __init__(self, config: UniHemaConfig):
        super().__init__()
        self.encoder_projection = nn.Linear(config.d_model, config.d_model)
        self.backbone_projection = nn.Conv2d(config.d_model, config.d_model, kernel_size=1)
        self.query_norm = nn.LayerNorm(config.d_model)
        self.query_head = MLP(config.d_model, config.d_model, config.d_model, config.d_model)

    def forward(
        self, query_states: torch.Tensor, tokens: torch.Tensor, levels: FeatureLevels
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            query_states (`torch.Tensor`): Decoder states of the queries whose masks are wanted, `[B, q, d]`.
            tokens (`torch.Tensor`): Encoded tokens `[B, S, d]`.
            levels ([`FeatureLevels`]): Projected backbone levels.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: Mask logits `[B, q, h, w]` at the finest level, and the two maps they
            were made from, `[B, 2d, h, w]`, for the upsampler.
        """
        encoder_map, backbone_map = self._maps(tokens, levels)
        logits = torch.einsum("bqd,bdhw->bqhw", self._of_queries(query_states), encoder_map + backbone_map)
        return logits, torch.cat((encoder_map, backbone_map), 1)

    def embed(
        self, query_states: torch.Tensor, tokens: torch.Tensor, levels: FeatureLevels
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries `[B, q, d]` and pixels `[B, d, h, w]` whose product are the mask logits; arguments as of `forward`."""
        encoder_map, backbone_map = self._maps(tokens, levels)
        return self._of_queries(query_states), encoder_map + backbone_map

    def _of_queries(self, query_states: torch.Tensor) -> torch.Tensor:
        return self.query_head(self.query_norm(query_states))

    def _maps(self, tokens: torch.Tensor, levels: FeatureLevels) -> tuple[torch.Tensor, torch.Tensor]:
        h, w = levels.shapes[0]
        encoder_map = nn.functional.relu(self.encoder_projection(tokens[:, : h * w])).transpose(1, 2)
        return encoder_map.unflatten(-1, (h, w)), self.backbone_projection(levels.maps[0])


class HemaFormer(nn.Module):
    """Holds those of the four fusion parts that the tasks at hand run.

    Args:
        config ([`UniHemaConfig`]): The configuration.
        parts (`set[str]`): Names of the parts to build.
    """

    def __init__(self, config: UniHemaConfig, parts: set[str]):
        super().__init__()
        for name, part in {
            "cross_modal_fusion": CrossModalFusion,
            "text_guided_visual_refinement": TextGuidedVisualRefinement,
            "single_cell_feature_extraction": SingleCellFeatureExtraction,
            "query_guided_mask_finder": QueryGuidedMaskFinder,
        }.items():
            if name in parts:
                self.add_module(name, part(config))
