"""The text branch: T5 encoder and decoder from Transformers, with the states of fixed prompts cached."""

import copy
import inspect
from collections import OrderedDict

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPastAndCrossAttentions
from transformers.models.t5.modeling_t5 import T5Stack

from .configuration_unihema import UniHemaConfig
from .kept_results import keeping_state


CACHED_PROMPTS = 32

# What the decoder calls the keys and values of earlier steps: Transformers 5.24 renamed it, also in its outputs.
CACHE_NAME = "cache" if "cache" in inspect.signature(T5Stack.forward).parameters else "past_key_values"


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
        self.encoder = self._stack(config.text_config)
        self.decoder = self._stack(self._decoder_config(config)) if with_decoder else None
        self._prompt_states = OrderedDict()

    @staticmethod
    def _decoder_config(config: UniHemaConfig) -> PreTrainedConfig:
        decoder_config = copy.deepcopy(config.text_config)
        decoder_config.is_decoder = True
        decoder_config.num_layers = config.text_config.num_decoder_layers
        return decoder_config

    @staticmethod
    def _stack(stack_config: PreTrainedConfig) -> T5Stack:
        stack = T5Stack(stack_config)
        # Both stacks are given embedded tokens, so that the shared embedding exists (and is saved) once.
        stack.embed_tokens = None
        return stack

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

    def encode_prompt(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Last states `[B, L, text width]` of a text; those of a prompt seen before are not computed again, where
        [`keeping_state`] allows it."""
        weights = keeping_state(self.shared), keeping_state(self.encoder)
        if None in weights:
            return self.encode(input_ids, attention_mask).last_hidden_state
        if self._prompt_states.get("weights") != weights:
            self._prompt_states = OrderedDict(weights=weights)
        key = (tuple(map(tuple, input_ids.tolist())), tuple(map(tuple, attention_mask.tolist())))
        if key not in self._prompt_states:
            self._prompt_states[key] = self.encode(input_ids, attention_mask).last_hidden_state
            if len(self._prompt_states) > CACHED_PROMPTS + 1:
                self._prompt_states.pop(next(k for k in self._prompt_states if k != "weights"))
        return self._prompt_states[key]

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
