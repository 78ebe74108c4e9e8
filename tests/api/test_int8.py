"""Models with 8-bit linear layers: how far they are from the exact ones, and what cannot be quantised."""

import pytest
import torch
from torch import nn

from unihema.inference.int8 import is_int8, to_int8
from unihema.loading import load_model


@pytest.fixture
def model(checkpoint):
    return load_model(checkpoint, "cpu")[0]


def test_results_stay_close_and_heads_stay_exact(model):
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        exact = model(pixel_values=image, task="single_cell").logits
        assert to_int8(model) is model and is_int8(model)
        found = model(pixel_values=image, task="single_cell").logits
    assert 0 < (found - exact).abs().max() < 0.1 * exact.abs().max().clamp(min=1)
    kinds = {name: type(part) for name, part in model.named_modules()}
    kept = [name for name, kind in kinds.items() if kind is nn.Linear]
    assert kept and all("head" in n or n.endswith(("offsets", "attention_weights")) or "query_s" in n for n in kept)
    decoder = [kind for name, kind in kinds.items() if name.endswith("decoder.block.0.layer.0.SelfAttention.q")]
    assert decoder and nn.Linear not in decoder
    text = torch.tensor([[5, 9, 1]])
    answer = model.generate(input_ids=text, pixel_values=image, max_new_tokens=4)
    assert answer.shape[0] == 1


def test_what_cannot_be_quantised_says_why(model):
    with pytest.raises(ValueError, match="float32 model on the CPU, got torch.bfloat16"):
        to_int8(model.to(torch.bfloat16))
    with pytest.raises(ValueError, match="no PyTorch model"):
        to_int8(object())
    with pytest.raises(ValueError, match="quantised already"):
        to_int8(to_int8(model.float()))


def test_nothing_to_quantise():
    class Empty(nn.Linear):
        device, dtype = torch.device("cpu"), torch.float32

    with pytest.raises(ValueError, match="no linear layer"):
        to_int8(Empty(2, 2))
