"""The text branch: T5 encoder and decoder from Transformers on one embedding."""

import copy
import inspect

import torch
from torch import nn
from transformers import T5EncoderModel, T5Model
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPastAndCrossAttentions

from .configuration_unihema import UniHemaConfig


# The decoder's name for the keys and values of earlier steps, which Transformers 5.24 changed, also in outputs.
CACHE_NAME = "cache" if "cache" in inspect.signature(T5Model.forward).parameters else "past_key_values"


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
        whole = (T5Model if with_decoder else T5EncoderModel)(copy.deepcopy(config.text_config))
        self.encoder = whole.encoder
        self.decoder = whole.decoder if with_decoder else None
        for stack in (self.encoder, self.decoder):
            if stack is not None:
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
        return self.encoder(inputs_embeds=embedded, attention_mask=attention_mask, use_cache=False, **kwargs)

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
            encoder_attention_mask=attention_mask,
            use_cache=use_cache,
            **{CACHE_NAME: cache},
            **kwargs,
        )
