"""Weights cast once a step: the values and gradients of autocast."""

import pytest
import torch
from tiny_models import HEADS, batch, very_tiny_config

from unihema.training.run.precision import half_weights, warn_of_slow_bf16, with_half_weights


def test_private_copy_of_many_tensors_is_there():
    copies, weights = [torch.zeros(2, dtype=torch.bfloat16)], [torch.tensor([1.0, 2.0])]
    torch._foreach_copy_(copies, weights)
    assert copies[0].tolist() == [1, 2]


@pytest.mark.parametrize("task", sorted(HEADS))
def test_values_and_gradients_are_those_of_autocast(task):
    torch.manual_seed(0)
    model = HEADS[task](very_tiny_config(dropout=0.0)).train()
    inputs = batch(task)
    found = []
    for run in (lambda: model(**inputs), lambda: with_half_weights(model, torch.bfloat16, inputs)):
        torch.manual_seed(1)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = run().loss
        loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append((loss.detach(), gradients))
    (loss, gradients), (same, others) = found
    assert torch.equal(loss, same) and gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=0, atol=0, msg=name)


def test_shared_weights_and_norms_are_left_out():
    model = HEADS["question_answering"](very_tiny_config())
    cast = half_weights(model, torch.bfloat16)
    assert all(weight.dtype == torch.bfloat16 for weight in cast.values())
    assert not any("norm" in name or "shared" in name for name in cast)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize(("capability", "warned"), [("AVX2", True), ("AVX512", False), ("DEFAULT", False)])
def test_a_processor_without_instructions_for_bf16_is_named(monkeypatch, recwarn, capability, warned):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    warn_of_slow_bf16(torch.device("cpu"))
    warn_of_slow_bf16(torch.device("meta"))
    assert ["several times more slowly" in str(warning.message) for warning in recwarn] == [True] * warned
