"""Layers that several parts share: attention between tokens, MLP, feed-forward, layers with one row for each class."""

import math
from collections.abc import Callable
from functools import partial

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

        # Private: every model of Transformers reads the requested attention here.
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)  # noqa: SLF001
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


class MLP(nn.Module):
    """Linears with ReLU between."""

    def __init__(self, *widths: int):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True)])

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """`[..., widths[0]]` to `[..., widths[-1]]`."""
        for layer in self.layers[:-1]:
            states = nn.functional.relu(layer(states))
        return self.layers[-1](states)


# Tokens of a feed-forward's chunk on the CPU.
CHUNK = 1024


class FeedForward(nn.Module):
    """Two linears with ReLU between, and dropout."""

    def __init__(self, width: int, hidden: int, dropout: float):
        super().__init__()
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """`[..., width]` to `[..., width]`."""
        if states.device.type != "cpu" or torch.compiler.is_compiling() or torch.compiler.is_exporting():
            return self._transform(states)
        # On a CPU the wide states of a chunk stay in its cache, and their memory is reused.
        parts = states.flatten(0, -2).split(CHUNK)
        return torch.cat([self._transform(part) for part in parts]).view_as(states)

    def _transform(self, states: torch.Tensor) -> torch.Tensor:
        return self.linear2(self.dropout(self.linear1(states).relu_()))


# Where PEFT keeps an adapter's own copy of a module (`modules_to_save`).
_ADAPTER_COPY = ".modules_to_save."


class _ClassRows(nn.Module):
    """What [`ClassLinear`] and [`ClassEmbedding`] have in common."""

    _count_name: str

    def set_rows(self, sources: list[int | None], fresh: torch.Tensor | None = None) -> None:
        """Replaces the rows of the layer.

        Args:
            sources (`list[int | None]`): For each new row the old row that it copies. `None` takes the mean of all old rows, or
                the row of `fresh` where that is given.
            fresh (`torch.Tensor`, *optional*): `[len(sources), width]`; biases of such rows are 0.
        """
        for name, value in list(self.named_parameters(recurse=False)):
            new = value.new_empty(len(sources), *value.shape[1:])
            for row, source in enumerate(sources):
                if source is not None:
                    new[row] = value.detach()[source]
                elif fresh is None:
                    new[row] = value.detach().mean(0)
                else:
                    new[row] = fresh[row] if value.ndim > 1 else 0.0
            setattr(self, name, nn.Parameter(new, requires_grad=value.requires_grad))
        setattr(self, self._count_name, len(sources))

    # Private: load_state_dict has no public place where a layer may take another size.
    def _load_from_state_dict(self, state_dict, prefix, *args):
        weight = state_dict.get(f"{prefix}weight")
        if weight is not None and _ADAPTER_COPY in f".{prefix}" and len(weight) != len(self.weight):
            self.set_rows([0] * len(weight))
        super()._load_from_state_dict(state_dict, prefix, *args)


class ClassLinear(_ClassRows, nn.Linear):
    """A linear layer with one output for each class."""

    _count_name = "out_features"


class ClassEmbedding(_ClassRows, nn.Embedding):
    """An embedding with one row for each class."""

    _count_name = "num_embeddings"


def initialised(layer: nn.Linear, gain: float = 1.0, bias: Callable[[], torch.Tensor] | None = None) -> nn.Linear:
    """Marks a linear layer with initial values of its own, which `_init_weights` reads.

    Args:
        layer (`nn.Linear`): The layer.
        gain (`float`): Gain of its Xavier-uniform weight; 0 for a zero weight.
        bias (`Callable[[], torch.Tensor]`, *optional*): Makes its initial bias; zero when missing.

    Returns:
        `nn.Linear`: The same layer.
    """
    layer.initial_gain = gain
    layer.initial_bias = bias
    return layer


def class_scores(width: int, classes: int, probability: float = 0.01) -> nn.Linear:
    """A sigmoid classifier that starts at `probability` for every class (focal loss, arXiv 1708.02002, section 4.1)."""
    start = -math.log((1 - probability) / probability)
    return initialised(ClassLinear(width, classes), bias=partial(torch.full, (classes,), start))


def inverse_sigmoid(x: torch.Tensor, eps: float = 1e-3) -> torch.Tensor:
    """Logit of `x` in 0..1, finite at both ends.

    Args:
        x (`torch.Tensor`): Any shape; clamped to 0..1.
        eps (`float`): Smallest numerator and denominator (DINO's 1e-3).
    """
    return torch.log(x.clamp(eps, 1.0) / (1 - x).clamp(eps, 1.0))
