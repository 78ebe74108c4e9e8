"""The text branch: T5 encoder and decoder from Transformers on one embedding."""

import copy
import inspect

import torch
from torch import nn
from transformers import T5EncoderModel, T5Model
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPastAndCrossAttentions
from transformers.models.t5.modeling_t5 import T5LayerNorm

from .configuration_unihema import UniHemaConfig


# The decoder's name for the keys and values of earlier steps, which Transformers 5.24 changed, also in outputs.
CACHE_NAME = "cache" if "cache" in inspect.signature(T5Model.forward).parameters else "past_key_values"


def _fuse_norms(stack: nn.Module) -> None:
    """T5's norms as PyTorch's, which are one operator instead of six, with the same weights and names."""
    for parent in list(stack.modules()):
        for name, norm in list(parent.named_children()):
            if isinstance(norm, T5LayerNorm):
                setattr(parent, name, nn.RMSNorm(len(norm.weight), norm.variance_epsilon))


# Added to scores of padding; every float dtype can hold it.
UNSEEN = -3e4


def _padding_mask(attention_mask: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A mask `[B, L]` as T5 takes it without reading it back from an accelerator: `[B, 1, 1, L]`, added to the scores."""
    if attention_mask.device.type == "cpu" or attention_mask.ndim == 4:
        return attention_mask
    return (attention_mask[:, None, None].to(like.dtype) - 1) * -UNSEEN


class TextBranch(nn.Module):
    """T5's shared embedding and encoder, and its decoder where a task generates text.

    Args:
        config ([`UniHemaConfig`]): Gives `text_config`.
        with_decoder (`bool`): Whether to build the decoder.
    """

    def __init__(self, config: UniHemaConfig, with_decoder: bool = True):
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.text_config.vocab_size, config.text_config.d_model)
        # T5EncoderModel changes the configuration it is given.
        text_config = copy.deepcopy(config.text_config)
        if text_config.dense_act_fn == "gelu_new":
            # The same function, in one operator instead of eight.
            text_config.dense_act_fn = "gelu_pytorch_tanh"
        whole = (T5Model if with_decoder else T5EncoderModel)(text_config)
        self.encoder = whole.encoder
        self.decoder = whole.decoder if with_decoder else None
        for stack in (self.encoder, self.decoder):
            if stack is not None:
                _fuse_norms(stack)
                # Both stacks are given embedded tokens, so that the shared embedding exists (and is saved) once.
                stack.set_input_embeddings(None)

    def encode(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **kwargs) -> BaseModelOutput:
        """States of a text.

        Args:
            input_ids (`torch.Tensor`): `[B, L]`.
            attention_mask (`torch.Tensor`): `[B, L]`, 0 on padding.
            kwargs: `output_hidden_states` and `output_attentions`.

        Returns:
            `BaseModelOutput`: `last_hidden_state` `[B, L, text width]`.
        """
        embedded = self.shared(input_ids)
        mask = _padding_mask(attention_mask, embedded)
        return self.encoder(inputs_embeds=embedded, attention_mask=mask, use_cache=False, **kwargs)

    def decode(
        self,
        decoder_input_ids: torch.Tensor | None,
        fused_states: torch.Tensor,
        attention_mask: torch.Tensor,
        decoder_inputs_embeds: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """Decoder states that attend to the fused text and image.

        Args:
            decoder_input_ids (`torch.Tensor`): `[B, T]`; or `decoder_inputs_embeds` `[B, T, text width]`.
            fused_states (`torch.Tensor`): CrossModalFusion output `[B, L, text width]`.
            attention_mask (`torch.Tensor`): `[B, L]`.
            decoder_inputs_embeds (`torch.Tensor`, *optional*): Embedded decoder tokens.
            decoder_attention_mask (`torch.Tensor`, *optional*): `[B, T]`.
            cache (`Cache`, *optional*): Keys and values of earlier decoding steps.
            use_cache (`bool`, *optional*): Whether to return them.
            kwargs: `output_hidden_states` and `output_attentions`.
        """
        if decoder_inputs_embeds is None:
            decoder_inputs_embeds = self.shared(decoder_input_ids)
        return self.decoder(
            inputs_embeds=decoder_inputs_embeds,
            attention_mask=decoder_attention_mask,
            encoder_hidden_states=fused_states,
            encoder_attention_mask=_padding_mask(attention_mask, fused_states),
            use_cache=use_cache,
            **{CACHE_NAME: cache},
            **kwargs,
        )
