"""Linear layers in another order of work: the same results, and only where it may be."""

import copy
import io

import pytest
import torch
from tiny_models import very_tiny_config
from torch import nn
from torch._inductor.compile_fx import compile_fx

from unihema.modeling_unihema import inference_linear
from unihema.modeling_unihema.inference_linear import InferenceLinear, with_inference_linears, with_plain_linears
from unihema.modeling_unihema.layers import ClassLinear
from unihema.modeling_unihema.modeling_unihema import UniHemaForQA


SHAPES = [(512, 768), (768, 512), (600, 600)]


@pytest.fixture
def counted(monkeypatch):
    """How often the plain layer ran."""
    calls = []
    plain = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, states: calls.append(1) or plain(self, states))
    return calls


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [(1,), (1, 1), (2,), (3,), (2, 2), (5,), (1, 9), (3, 40), ()])
@torch.no_grad()
def test_results_are_those_of_a_plain_layer(counted, rows, shape, bias):
    torch.manual_seed(0)
    layer = InferenceLinear(*shape, bias=bias)
    states = torch.randn(*rows, shape[0])
    found = layer(states)
    assert not counted
    expected = nn.functional.linear(states.double(), layer.weight.double(), layer.bias.double() if bias else None)
    assert found.shape == expected.shape and found.is_contiguous()
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


def test_states_that_are_not_contiguous_in_memory():
    layer = InferenceLinear(768, 512)
    for states in (torch.randn(768, 3).t(), torch.randn(9, 1536)[:, ::2], torch.randn(1, 768).expand(4, -1)):
        with torch.no_grad():
            torch.testing.assert_close(
                layer(states), nn.functional.linear(states, layer.weight, layer.bias), rtol=0, atol=1e-5
            )


def test_gradients_small_weights_other_dtypes_and_autocast_take_the_plain_layer(counted):
    layer = InferenceLinear(768, 512)
    states = torch.randn(2, 768)
    layer(states).sum().backward()
    assert layer.weight.grad is not None
    with torch.no_grad():
        InferenceLinear(16, 16)(torch.randn(2, 16))
        copy.deepcopy(layer).double()(states.double())
        layer(states[:0])
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(states).dtype == torch.bfloat16
    assert len(counted) == 5
    with pytest.raises(RuntimeError):
        layer(torch.randn(2, 767))


@torch.no_grad()
def test_graphs_hold_the_plain_layer():
    layer, states = InferenceLinear(768, 512).eval(), torch.randn(2, 768)
    expected = layer(states)
    exported = torch.export.export(layer, (states,))
    assert not any("mkldnn" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(states), expected, rtol=0, atol=1e-5)
    traced = torch.jit.trace(layer, states)
    traced = torch.jit.load(io.BytesIO(traced.save_to_buffer()))
    torch.testing.assert_close(traced(states), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_compiled_without_gradients_and_with_them(bias):
    layer = InferenceLinear(512, 768, bias=bias).eval()
    operators = []

    def note(graph: torch.fx.GraphModule, inputs):
        operators.extend(str(node.target) for node in graph.graph.nodes)
        return compile_fx(graph, inputs)

    compiled = torch.compile(layer, backend=note)
    for rows in ((1,), (3,), (2, 2), (2, 7), (40,), (41,)):
        states = torch.randn(*rows, 512)
        expected = nn.functional.linear(states, layer.weight, layer.bias)
        torch.testing.assert_close(compiled(states), expected, rtol=0, atol=1e-5)
    assert any("::product" in name or ".product" in name for name in operators)
    operators.clear()
    with torch.enable_grad():
        compiled(states).sum().backward()
    torch.testing.assert_close(layer.weight.grad, states.sum(0).expand(768, -1), rtol=0, atol=1e-4)
    assert operators and not any("product" in name for name in operators)


@pytest.mark.parametrize("rows", [1, 3, 9])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_the_operator_for_graphs_keeps_its_promises(rows, bias):
    layer = InferenceLinear(512, 768, bias=bias)
    torch.library.opcheck(
        inference_linear._opaque_product,
        (torch.randn(rows, 512), layer.weight.detach(), layer.bias.detach() if bias else None),
        test_utils=("test_schema", "test_faketensor"),
    )


@torch.no_grad()
def test_forward_derivatives():
    layer, states = InferenceLinear(768, 512), torch.randn(9, 768)
    _, tangent = torch.func.jvp(layer, (states,), (torch.ones_like(states),))
    torch.testing.assert_close(tangent, layer.weight.sum(1).expand(9, -1), rtol=0, atol=1e-4)


def test_models_have_them_once_their_weights_are_there(tmp_path):
    def kinds(model) -> set[type]:
        return {type(part) for part in model.modules() if isinstance(part, nn.Linear)} - {ClassLinear}

    model = UniHemaForQA(very_tiny_config())
    assert kinds(model) == {InferenceLinear}
    model.save_pretrained(tmp_path)
    assert kinds(UniHemaForQA.from_pretrained(tmp_path)) == {InferenceLinear}
    # Quantisers replace `nn.Linear`, by its exact type, while weights are on their way.
    with torch.device("meta"):
        assert kinds(UniHemaForQA(very_tiny_config())) == {nn.Linear}


@torch.no_grad()
def test_many_rows_of_a_small_weight(counted):
    layer, states = InferenceLinear(64, 96), torch.randn(2, 400, 64)
    layer(states[:, :9])
    assert len(counted) == 1
    expected = nn.functional.linear(states, layer.weight, layer.bias)
    torch.testing.assert_close(layer(states), expected, rtol=0, atol=1e-5)
    assert len(counted) == 1


def test_layers_change_in_place_and_back():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    names = list(model.state_dict())
    assert with_inference_linears(model) is model
    assert [type(part) for part in model.modules() if isinstance(part, nn.Linear)] == [InferenceLinear] * 2
    assert list(model.state_dict()) == names
    assert [type(part) for part in with_plain_linears(model).modules() if isinstance(part, nn.Linear)] == [
        nn.Linear
    ] * 2


@torch.no_grad()
def test_without_onednn_the_plain_layer_runs(counted, monkeypatch):
    monkeypatch.setattr(inference_linear, "_HAS_ONEDNN", False)
    InferenceLinear(768, 512)(torch.randn(9, 768))
    assert counted
