"""Drafts of an answer, so that one pass of the decoder can settle several tokens (prompt lookup: the continuation of what the
last tokens matched earlier in the text, checked by the model itself as in speculative decoding, arXiv 2211.17192)."""

from collections.abc import Iterable
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation import CandidateGenerator, GenerationMode


# Longest draft.
DRAFT_TOKENS = 12
# Tokens drafted after so many matched ones: a chance match is soon wrong, and four rows cost little more than one.
_LENGTHS = {3: DRAFT_TOKENS, 2: 8, 1: 3}
_KEPT_TOKENS = 400

# What sees, or decides, token by token.
_PER_TOKEN_ARGUMENTS = (
    "assistant_model",
    "cache",
    "custom_generate",
    "decoder_input_ids",
    "logits_processor",
    "past_key_values",
    "prefix_allowed_tokens_fn",
    "stopping_criteria",
    "streamer",
    "synced_gpus",
)
_PER_TOKEN_SETTINGS = ("cache_implementation", "max_time", "stop_strings", "watermarking_config")


class AnswerMemory:
    """The tokens of the answers given last: the next ones are often worded like them."""

    def __init__(self):
        self.forget()

    def forget(self) -> None:
        """Frees what is kept."""
        self.tokens: tuple[int, ...] = ()

    def remember(self, answers: torch.Tensor, padding: int | None) -> None:
        """Keeps answers, the oldest making room.

        Args:
            answers (`torch.Tensor`): Generated tokens `[B, T]`, the start token first.
            padding (`int`, *optional*): The token behind shorter answers.
        """
        new = [token for start, *rest in answers.tolist() for token in (start, *without(rest, padding))]
        # Assigned at once: another thread may be reading.
        self.tokens = (*self.tokens, *new)[-_KEPT_TOKENS:]

    def __reduce__(self) -> tuple:
        # Neither a copy nor a file holds what was said about someone's images.
        return AnswerMemory, ()


def without(tokens: list[int], padding: int | None) -> list[int]:
    """Tokens of a text without its padding."""
    return [token for token in tokens if token != padding]


class AnswerDrafts(CandidateGenerator):
    """Drafts from the question, earlier answers, and the answer so far.

    A masked sentence is mostly copied from the question, and answers repeat each other's phrases.

    Args:
        earlier (`Iterable[int]`): Tokens to look up in, the likeliest last.
        longest (`int`): Most tokens of a draft.
        max_length (`int`): Of the whole answer, start token included.
        ends (`Iterable[int]`): Tokens that end an answer; they are never drafted, nor is what is beyond the vocabulary.
        vocabulary (`int`): Number of tokens.
    """

    def __init__(self, earlier: Iterable[int], longest: int, max_length: int, ends: Iterable[int], vocabulary: int):
        self.earlier = list(earlier)
        self.longest = longest
        self.max_length = max_length
        self.ends = set(ends)
        self.vocabulary = vocabulary

    def get_candidates(self, input_ids: torch.LongTensor, **kwargs) -> tuple[torch.LongTensor, None]:
        """The answer so far `[1, T]` with a draft behind it `[1, T + n]`; without, where nothing matches."""
        answer = input_ids[0].tolist()
        # The pass that checks a draft adds a token of its own.
        room = min(self.longest, self.max_length - len(answer) - 1)
        draft = self._continuation(answer)[: max(room, 0)]
        return torch.cat((input_ids, input_ids.new_tensor([draft])), dim=1), None

    def update_candidate_strategy(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, num_matches: int):
        """Nothing to learn: every draft is looked up anew."""

    def _continuation(self, answer: list[int]) -> list[int]:
        text = self.earlier + answer
        for matched, length in _LENGTHS.items():
            if matched > len(answer):
                continue
            end = answer[-matched:]
            for start in range(len(text) - matched - 1, -1, -1):
                if text[start : start + matched] == end:
                    draft = self._following(text, start + matched, length)
                    if draft:
                        return draft
        return []

    def _following(self, text: list[int], start: int, length: int) -> list[int]:
        # A match near the end goes round: what follows the text is what follows the match.
        period = len(text) - start
        draft = []
        for step in range(length):
            token = text[start + step % period]
            if token in self.ends or not 0 <= token < self.vocabulary:
                break
            draft.append(token)
        return draft


def takes_drafts(config: GenerationConfig, arguments: dict[str, Any]) -> bool:
    """Whether drafts leave an answer what it is: a greedy one, nothing waiting for single tokens.

    Args:
        config (`GenerationConfig`): All settings, as `generate` resolves them.
        arguments (`dict[str, Any]`): Of a call of `generate` for one question.
    """
    return (
        config.get_generation_mode() == GenerationMode.GREEDY_SEARCH
        and config.use_cache is True
        # Guidance runs a model of its own on every token; 1 is none.
        and config.guidance_scale in (None, 1)
        and all(getattr(config, name, None) is None for name in _PER_TOKEN_SETTINGS)
        and all(arguments.get(name) is None for name in _PER_TOKEN_ARGUMENTS)
    )


__all__ = ["DRAFT_TOKENS", "AnswerDrafts", "AnswerMemory", "takes_drafts", "without"]
