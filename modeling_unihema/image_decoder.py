"""Query selection and the image decoder (DINO, arXiv 2203.03605: two-stage, look forward twice)."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_unihema import UniHemaConfig
from .deformable_attention import MultiScaleDeformableAttention
from .denoising import DenoisingQueries
from .layers import MLP, FeedForward, MultiHeadAttention, class_scores, initialised, inverse_sigmoid
from .visual_backbone import FeatureLevels, sine_codes, sine_wavelengths


def box_head(config: UniHemaConfig) -> MLP:
    """Change of a box, in logits: nothing at the start."""
    head = MLP(config.d_model, config.d_model, config.d_model, 4)
    initialised(head.layers[-1], gain=0.0)
    return head


@dataclass
class Proposals:
    """The encoder tokens chosen to become queries, best first.

    Attributes:
        content (`torch.Tensor`): Learned content queries `[B, Q, d]`.
        reference_logits (`torch.Tensor`): Boxes cxcywh before the sigmoid, `[B, Q, 4]`, without gradient.
        logits (`torch.Tensor`): Class scores of the chosen tokens `[B, Q, num_labels]`.
        boxes (`torch.Tensor`): Boxes cxcywh `[B, Q, 4]`, with gradient.
        token_indices (`torch.Tensor`): Which token each query came from, `[B, Q]`.
        padding (`torch.Tensor`, *optional*): Boolean `[B, Q]`: the image had no token left for this query, which came
            from padding. `None` when there is no padding.
    """

    content: torch.Tensor
    reference_logits: torch.Tensor
    logits: torch.Tensor
    boxes: torch.Tensor
    token_indices: torch.Tensor
    padding: torch.Tensor | None = None


class QuerySelection(nn.Module):
    """Scores every encoder token and turns the best into queries with a reference box."""

    def __init__(self, config: UniHemaConfig):
        super().__init__()
        self.num_queries = config.num_queries
        self.attend_to_padding = config.attend_to_padding
        self.token_projection = nn.Linear(config.d_model, config.d_model)
        self.token_norm = nn.LayerNorm(config.d_model)
        self.class_head = class_scores(config.d_model, config.num_labels)
        self.box_head = box_head(config)
        self.content_queries = nn.Embedding(config.num_queries, config.d_model)

    def forward(self, tokens: torch.Tensor, levels: FeatureLevels) -> Proposals:
        """
        Args:
            tokens (`torch.Tensor`): Encoded tokens `[B, S, d]`.
            levels ([`FeatureLevels`]): Their shapes and padding.

        Returns:
            [`Proposals`]: `min(num_queries, S)` of them; usable tokens come before padding and the very edge.
        """
        anchors, usable = self._anchors(levels)
        states = self.token_norm(self.token_projection(torch.where(usable[..., None], tokens, 0.0)))
        logits = self.class_head(states)
        scores = logits.amax(-1).float()
        if not self.attend_to_padding:
            # Tokens at the edge come last, in their order, so that it does not depend on the padding behind them.
            last = -1e4 - torch.arange(scores.shape[1], device=scores.device, dtype=scores.dtype)
            scores = torch.where(usable, scores, last)
            if levels.padded:
                scores = scores.masked_fill(levels.padding, -torch.inf)
        chosen = scores.topk(min(self.num_queries, tokens.shape[1]), dim=1).indices

        def gather(values: torch.Tensor) -> torch.Tensor:
            index = chosen[..., None].expand(-1, -1, values.shape[-1])
            return values.expand(index.shape[0], -1, -1).gather(1, index)

        box_logits = self.box_head(gather(states)) + gather(anchors)
        content = self.content_queries(torch.arange(chosen.shape[1], device=tokens.device))
        content = content.expand(tokens.shape[0], -1, -1)
        padding = levels.padding.gather(1, chosen) if levels.padded and not self.attend_to_padding else None
        return Proposals(content, box_logits.detach(), gather(logits), box_logits.sigmoid(), chosen, padding)

    @staticmethod
    def _anchors(levels: FeatureLevels) -> tuple[torch.Tensor, torch.Tensor]:
        """One square box a token, its side doubling from level to level, as logits `[B, S, 4]`, and whether it is usable
        (on the image and not at its very edge, where the logit explodes)."""
        centres = levels.centres
        sides = torch.cat(
            [centres.new_full((h * w, 2), 0.05 * 2.0**level) for level, (h, w) in enumerate(levels.shapes)]
        )
        boxes = torch.cat((centres, sides.expand_as(centres)), -1)
        usable = ((boxes > 0.01) & (boxes < 0.99)).all(-1)
        if levels.padded:
            usable &= ~levels.padding
        # Unusable tokens get a box at the far corner; clamped so that no infinity can reach a gradient.
        return torch.where(usable[..., None], boxes.clamp(0.01, 0.99).logit(), 100.0), usable


def sine_embed_boxes(boxes: torch.Tensor, wavelength: torch.Tensor) -> torch.Tensor:
    """Sine code of boxes: y, x, width and height, `d_model / 2` channels each.

    Args:
        boxes (`torch.Tensor`): cxcywh `[B, Q, 4]` in 0..1.
        wavelength (`torch.Tensor`): Of each channel, `[d_model / 2]`, see `sine_wavelengths`.

    Returns:
        `torch.Tensor`: `[B, Q, 2 * d_model]`.
    """
    x, y, size = boxes.split((1, 1, 2), -1)
    return sine_codes(torch.cat((y, x, size), -1), wavelength).flatten(-2)


class ImageDecoderLayer(GradientCheckpointingLayer):
    """Self-attention among queries, deformable attention to the image, feed-forward."""

    def __init__(self, config: UniHemaConfig):
        super().__init__()
        self.self_attention = MultiHeadAttention(config)
        self.self_attention_norm = nn.LayerNorm(config.d_model)
        self.cross_attention = MultiScaleDeformableAttention(config)
        self.cross_attention_norm = nn.LayerNorm(config.d_model)
        self.feed_forward = FeedForward(config.d_model, config.decoder_ffn_dim, config.dropout)
        self.feed_forward_norm = nn.LayerNorm(config.d_model)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        queries: torch.Tensor,
        positions: torch.Tensor,
        reference: torch.Tensor,
        tokens: torch.Tensor,
        level_shapes: list[tuple[int, int]],
        sizes: torch.Tensor,
        padding: torch.Tensor | None,
        blocked: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Queries `[B, Q, d]` to queries `[B, Q, d]`, their attention to each other and their sampling weights; `reference`
        boxes `[B, Q, levels, 4]`, `blocked` `[1, 1, Q, Q]`."""
        positioned = queries + positions
        attended, weights = self.self_attention(positioned, positioned, queries, blocked)
        queries = self.self_attention_norm(queries + self.dropout(attended))
        attended, sampled = self.cross_attention(queries + positions, reference, tokens, level_shapes, sizes, padding)
        queries = self.cross_attention_norm(queries + self.dropout(attended))
        return self.feed_forward_norm(queries + self.dropout(self.feed_forward(queries))), weights, sampled


@dataclass
class DecodedQueries:
    """Queries after the image decoder.

    Attributes:
        states (`torch.Tensor`): Normalised states of each layer `[layers, B, Q, d]`.
        boxes (`torch.Tensor`): Boxes cxcywh of each layer `[layers, B, Q, 4]`, relative to the image itself.
        hidden_states (`list[torch.Tensor]`): Queries after each layer, without the norm, `[B, Q, d]`.
        attentions (`list[torch.Tensor | None]`): Between queries, `[B, heads, Q, Q]` a layer, where the backend gives them.
        cross_attentions (`list[torch.Tensor]`): Sampling weights `[B, Q, heads, levels, points]` of each layer.
    """

    states: torch.Tensor
    boxes: torch.Tensor
    hidden_states: list[torch.Tensor]
    attentions: list[torch.Tensor | None]
    cross_attentions: list[torch.Tensor]


class ImageDecoder(nn.Module):
    """Refines queries and their boxes layer by layer."""

    def __init__(self, config: UniHemaConfig):
        super().__init__()
        self.config = config
        self.position_head = MLP(2 * config.d_model, config.d_model, config.d_model)
        self.layers = nn.ModuleList([ImageDecoderLayer(config) for _ in range(config.decoder_layers)])
        self.norm = nn.LayerNorm(config.d_model)
        self.box_head = box_head(config)

    def forward(
        self,
        content: torch.Tensor,
        reference_logits: torch.Tensor,
        tokens: torch.Tensor,
        levels: FeatureLevels,
        denoising: DenoisingQueries | None = None,
        query_padding: torch.Tensor | None = None,
    ) -> DecodedQueries:
        """
        Args:
            content (`torch.Tensor`): Content queries `[B, Q, d]`, denoising queries first.
            reference_logits (`torch.Tensor`): Their boxes before the sigmoid `[B, Q, 4]`.
            tokens (`torch.Tensor`): Encoded tokens `[B, S, d]`.
            levels ([`FeatureLevels`]): Their shapes and padding.
            denoising ([`DenoisingQueries`], *optional*): Which queries may see which.
            query_padding (`torch.Tensor`, *optional*): Boolean `[B, Q']` of the last Q' queries: seen by no other.

        Returns:
            [`DecodedQueries`]
        """
        blocked = None if denoising is None else denoising.attention_mask[None, None]
        if query_padding is not None:
            unseen = nn.functional.pad(query_padding, (content.shape[1] - query_padding.shape[1], 0))[:, None, None]
            # A query always sees itself, so that no row is empty.
            unseen = unseen & ~torch.eye(content.shape[1], dtype=torch.bool, device=content.device)
            blocked = unseen if blocked is None else blocked | unseen
        padding, ratios = levels.padding, levels.valid_ratios.repeat(1, 1, 2)[:, None]
        ratios_shape = (-1, -1, ratios.shape[2], -1)
        queries, reference = content, reference_logits.sigmoid()
        states, boxes, hidden_states, attentions, cross_attentions = [], [], [], [], []
        start = reference
        place = ratios if self.config.attend_to_padding else reference
        wavelength = sine_wavelengths(self.config.d_model // 2, 10000.0, place)
        for layer in self.layers:
            level_reference = reference[:, :, None].to(ratios.dtype)
            # Without padding every ratio is 1.
            level_reference = level_reference * ratios if levels.padded else level_reference.expand(ratios_shape)
            # The official weights know a box by its place in the padded batch, others by its place in the image.
            place = level_reference[:, :, 0] if self.config.attend_to_padding else reference
            sine = sine_embed_boxes(place, wavelength).to(queries.dtype)
            queries, weights, sampled = layer(
                queries,
                self.position_head(sine),
                level_reference,
                tokens,
                levels.shapes,
                levels.sizes,
                padding,
                blocked,
            )
            hidden_states.append(queries)
            attentions.append(weights)
            cross_attentions.append(sampled)
            normed = self.norm(queries)
            states.append(normed)
            # Look forward twice: the next layer's box loss reaches this layer's refinement, its attention does not.
            changes = self.box_head(torch.stack((normed, queries)))
            logits = inverse_sigmoid(start)
            box, start = (changes + torch.stack((logits, logits.detach()))).sigmoid()
            boxes.append(box)
            reference = start.detach()
        return DecodedQueries(torch.stack(states), torch.stack(boxes), hidden_states, attentions, cross_attentions)
