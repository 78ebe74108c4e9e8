"""What inference keeps is not given again when an adapter was switched, which changes no tensor."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import HEADS, batch, lively, very_tiny_config


@pytest.mark.parametrize(
    ("task", "targets"),
    [
        ("detection", r".*text_branch\.encoder.*\.(q|v)"),
        ("question_answering", r".*visual_backbone\.input_projection\.\d\.0"),
        ("single_cell", r".*visual_backbone\.backbone.*\.convolution"),
    ],
)
@torch.no_grad()
def test_switching_an_adapter_switches_the_result(task, targets):
    torch.manual_seed(0)
    plain = lively(HEADS[task](very_tiny_config(num_queries=12))).eval()
    inputs = batch(task)
    if task == "detection":
        del inputs["labels"]
    expected = plain(**inputs).logits
    adapted = get_peft_model(plain, LoraConfig(target_modules=targets, init_lora_weights=False)).eval()
    with_adapter = adapted(**inputs).logits
    with adapted.disable_adapter():
        without = adapted(**inputs).logits
    assert (with_adapter - expected).abs().max() > 1e-3
    torch.testing.assert_close(without, expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(adapted(**inputs).logits, with_adapter, rtol=0, atol=2e-5)
