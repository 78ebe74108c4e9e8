"""Trains the shipped tokenizer.json; run once, by hand: `python -m tools.train_tokenizer`.

Needs sentencepiece and protobuf (`pip install .[tokenizer-training]`); using the tokenizer needs neither.
"""

import argparse
import io
from pathlib import Path

import sentencepiece
from transformers import T5Tokenizer

from tools.corpus import sentences


VOCABULARY = 1400
SENTINELS = 100
REQUIRED = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZµμ×°±≥≤%/:;()–?!,.'\"-<>_+=^"
TOKENIZER = Path(__file__).parents[1] / "processing_unihema" / "tokenizer"


def main() -> None:
    """Writes tokenizer.json and tokenizer_config.json."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("-o", "--output", type=Path, default=TOKENIZER, help="Folder; that of the package by default.")
    folder = parser.parse_args().output
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences()),
        model_writer=model,
        vocab_size=VOCABULARY,
        model_type="unigram",
        character_coverage=1.0,
        required_chars=REQUIRED,
        hard_vocab_limit=False,
        num_threads=1,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    vocabulary = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(pieces.get_piece_size())]
    # T5's order: the first sentinel has the highest id.
    vocabulary += [(f"<extra_id_{i}>", 0.0) for i in reversed(range(SENTINELS))]
    tokenizer = T5Tokenizer(vocab=vocabulary, extra_ids=SENTINELS, model_max_length=64)
    tokenizer.save_pretrained(folder)
    print(f"{len(tokenizer)} tokens, {(folder / 'tokenizer.json').stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
