"""Our own small T5-style tokenizer, shipped as tokenizer.json (see tokenizer/train_tokenizer.py)."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase, T5Tokenizer


DEFAULT_TOKENIZER = Path(__file__).parent / "tokenizer"


def load_default_tokenizer() -> PreTrainedTokenizerBase:
    """The tokenizer trained on our hematology text: about a thousand pieces, sentinels in T5's order.

    Needs neither the network nor sentencepiece.
    """
    return T5Tokenizer.from_pretrained(DEFAULT_TOKENIZER)
