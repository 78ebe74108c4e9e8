"""Multi-head attention between two sets of tokens, on any of Transformers' attention backends."""

from collections.abc import Callable

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_unihema import UniHemaConfig


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention that also returns its weights.

    Args:
        module (`nn.Module`): The attention module; its `training` decides on dropout.
        query (`torch.Tensor`): `[B, heads, Lq, width]`.
        key (`torch.Tensor`): `[B, heads, Lk, width]`.
        value (`torch.Tensor`): `[B, heads, Lk, width]`.
        attention_mask (`torch.Tensor`, *optional*): Added to the scores, broadcastable to `[B, heads, Lq, Lk]`.
        scaling (`float`): Factor on the scores.
        dropout (`float`): Dropout of the weights.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Output `[B, Lq, heads, width]` and weights `[B, heads, Lq, Lk]`.
    """
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class MultiHeadAttention(nn.Module):
    """Plain q/k/v/o attention of `config.num_attention_heads` heads at width `config.d_model`."""

    is_causal = False

    def __init__(self, config: UniHemaConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.d_model // config.num_attention_heads
        self.q_proj = nn.Linear(config.d_model, config.d_model)
        self.k_proj = nn.Linear(config.d_model, config.d_model)
        self.v_proj = nn.Linear(config.d_model, config.d_model)
        self.o_proj = nn.Linear(config.d_model, config.d_model)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        blocked: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            query (`torch.Tensor`): `[B, Lq, d]`.
            key (`torch.Tensor`): `[B, Lk, d]`.
            value (`torch.Tensor`): `[B, Lk, d]`.
            blocked (`torch.Tensor`, *optional*): Boolean, `True` where attention is not allowed, broadcastable to
                `[B, 1, Lq, Lk]`. Every query must keep one key.

        Returns:
            `tuple`: Output `[B, Lq, d]`, and the weights `[B, heads, Lq, Lk]` where the backend gives them.
        """

        def heads(states: torch.Tensor) -> torch.Tensor:
            return states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        query = heads(self.q_proj(query))
        mask = None
        if blocked is not None:
            mask = torch.zeros_like(blocked, dtype=query.dtype).masked_fill(blocked, torch.finfo(query.dtype).min)
            mask = mask.expand(query.shape[0], -1, query.shape[2], key.shape[1])
        output, weights = attend(
            self,
            query,
            heads(self.k_proj(key)),
            heads(self.v_proj(value)),
            mask,
            dropout=0.0,
            scaling=self.head_dim**-0.5,
        )
        return self.o_proj(output.flatten(-2)), weights
