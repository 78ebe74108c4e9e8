"""Every head at its smallest, what it reads, and comparing what it gives."""

import torch
from tiny_models import HEADS, batch, lively, very_tiny_config


# Fewer queries than tokens, as in the real presets.
CONFIG = {"num_queries": 12}


def make(task: str, attention: str = "sdpa", **options):
    torch.manual_seed(0)
    config = very_tiny_config(**{**CONFIG, **options})
    return lively(HEADS[task]._from_config(config, attn_implementation=attention)).eval()


def inputs_for(task: str, **options) -> dict:
    inputs = batch(task, **options)
    if task == "question_answering":
        inputs["decoder_input_ids"] = inputs["labels"].clamp(min=0)
    inputs.pop("labels")
    return inputs


def tensors(output) -> dict[str, torch.Tensor]:
    return {name: value for name, value in output.items() if isinstance(value, torch.Tensor) and name != "loss"}


def assert_same(found, expected, atol: float = 0.0):
    found, expected = tensors(found), tensors(expected)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            found[name].float(), expected[name].float(), rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )
