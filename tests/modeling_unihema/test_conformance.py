"""What any Transformers model does, for every head: same in, same out; attention; initialisation; precision; tracing."""

import pytest
import torch
from heads import CONFIG, assert_same, inputs_for, make, tensors
from tiny_models import HEADS, batch, lively, very_tiny_config

from unihema.modeling_unihema.modeling_unihema import (
    TASKS,
    UniHemaForMultiTask,
    UniHemaForQA,
    UniHemaModel,
)


every_head = pytest.mark.parametrize("task", HEADS)


@every_head
@torch.no_grad()
def test_same_input_gives_the_same_output(task):
    model = make(task)
    assert_same(model(**inputs_for(task)), model(**inputs_for(task)))
    assert_same(make(task)(**inputs_for(task)), model(**inputs_for(task)))


@every_head
@torch.no_grad()
def test_an_image_does_not_see_the_others_of_its_batch(task):
    model = make(task)
    inputs = inputs_for(task, images=3)
    together = tensors(model(**inputs))
    for row in range(3):
        alone = tensors(model(**{name: value[row : row + 1] for name, value in inputs.items()}))
        for name, value in alone.items():
            torch.testing.assert_close(value[0], together[name][row], rtol=0, atol=2e-5)


@every_head
@torch.no_grad()
def test_eager_and_sdpa_attention_agree(task):
    assert make(task, "eager").config._attn_implementation == "eager"
    assert_same(make(task, "eager")(**inputs_for(task)), make(task, "sdpa")(**inputs_for(task)), atol=2e-5)


@every_head
@torch.no_grad()
def test_attention_is_changed_without_loading_again(task):
    model = make(task, "sdpa")
    expected = model(**inputs_for(task))
    model.set_attn_implementation("eager")
    assert {part.config._attn_implementation for part in model.modules() if hasattr(part, "config")} == {"eager"}
    assert_same(model(**inputs_for(task)), expected, atol=2e-5)


@every_head
def test_tuple_on_request(task):
    model = make(task)
    with torch.no_grad():
        expected = model(**inputs_for(task))
        found = model(**inputs_for(task), return_dict=False)
    assert isinstance(found, tuple)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0)


def test_every_parameter_is_initialised():
    """Parameters filled with NaN beforehand are all drawn; what is not drawn would stay NaN."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = UniHemaForMultiTask(very_tiny_config())
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
            parameter._is_hf_initialized = False
    for module in model.modules():
        module._is_hf_initialized = False
    model.init_weights()
    assert [name for name, parameter in model.named_parameters() if not torch.isfinite(parameter).all()] == []


def test_initial_spread_is_the_documented_one():
    torch.manual_seed(0)
    model = UniHemaForMultiTask(very_tiny_config(d_model=64, fusion_queries=64))
    projection = model.model.hema_former.cross_modal_fusion.image_projection
    bound = (6 / (64 + 64)) ** 0.5
    assert 0.95 * bound < projection.weight.abs().max() <= bound and not projection.bias.any()
    for drawn in (
        model.model.hema_former.cross_modal_fusion.queries,
        model.model.query_selection.content_queries.weight,
        model.model.image_encoder.level_embedding,
    ):
        assert drawn.std().item() == pytest.approx(1, abs=0.15)
    norm = model.model.image_decoder.norm
    assert (norm.weight == 1).all() and not norm.bias.any()


@every_head
def test_gradients_reach_every_trainable_parameter_of_a_head(task):
    model = make(task).train()
    model(**batch(task, size=(96, 128))).loss.backward()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) > 50
    assert [name for name, p in trainable.items() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("reentrant", [False, True])
@every_head
def test_gradient_checkpointing_computes_again_and_changes_nothing(task, reentrant):
    model = make(task, encoder_layers=2).train()

    def run() -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
        calls = [0]
        layer = model.model.text_branch.encoder.block[0].layer[0] if task == "question_answering" else None
        counted = (layer or model.model.image_encoder.layers[1].self_attention).register_forward_pre_hook(
            lambda *_: calls.__setitem__(0, calls[0] + 1)
        )
        model.zero_grad(set_to_none=True)
        torch.manual_seed(1)
        loss = model(**batch(task)).loss
        loss.backward()
        counted.remove()
        return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, calls[0]

    loss, gradients, once = run()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    assert model.is_gradient_checkpointing
    loss_again, gradients_again, twice = run()
    assert (once, twice) == (1, 2)
    torch.testing.assert_close(loss_again, loss, rtol=0, atol=1e-6)
    assert gradients_again.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_again[name], gradient, rtol=1e-4, atol=1e-5)
    model.gradient_checkpointing_disable()
    assert run()[2] == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_head
def test_autocast_trains(task, dtype):
    model = make(task).train()
    torch.manual_seed(1)
    expected = model(**batch(task)).loss
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=dtype):
        loss = model(**batch(task)).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=0.1)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_resized_vocabulary(tmp_path):
    model = make("question_answering")
    inputs = inputs_for("question_answering")
    with torch.no_grad():
        before = model(**inputs).logits
        old = model.get_input_embeddings().weight.clone()
        model.resize_token_embeddings(70)
        after = model(**inputs).logits
    assert model.config.text_config.vocab_size == 70 and model.lm_head.out_features == 70
    assert after.shape[-1] == 70
    torch.testing.assert_close(after[..., :64], before, rtol=0, atol=0)
    torch.testing.assert_close(model.get_input_embeddings().weight[:64], old, rtol=0, atol=0)
    model.save_pretrained(tmp_path)
    assert UniHemaForQA.from_pretrained(tmp_path).get_input_embeddings().num_embeddings == 70
    model.resize_token_embeddings(62)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, before[..., :62], rtol=0, atol=1e-6)


def test_resized_vocabulary_of_a_tied_output_layer_stays_tied():
    model = make("question_answering", tie_word_embeddings=True)
    model.resize_token_embeddings(80)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.lm_head.weight.shape[0] == 80


def test_a_model_that_reads_no_text_says_so():
    with pytest.raises(NotImplementedError, match="reads no text"):
        make("single_cell").get_input_embeddings()


@torch.no_grad()
def test_detection_compiles_in_one_graph():
    model = make("detection")
    inputs = inputs_for("detection")
    expected = model(**inputs)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(compiled(**inputs), expected, atol=2e-5)


@pytest.mark.slow
@torch.no_grad()
def test_detection_compiles_to_machine_code():
    model = make("detection")
    inputs = inputs_for("detection")
    expected = model(**inputs)
    torch.compiler.reset()
    assert_same(torch.compile(model, fullgraph=True)(**inputs), expected, atol=1e-4)


@torch.no_grad()
def test_detection_exports_with_any_batch_and_size():
    model = make("detection")
    any_size = torch.export.Dim.DYNAMIC
    inputs = inputs_for("detection", size=(192, 256))
    del inputs["pixel_mask"]
    text = {0: any_size, 1: any_size}
    shapes = {"pixel_values": {0: any_size, 2: any_size, 3: any_size}, "input_ids": text, "attention_mask": text}
    program = torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=False).module()
    for images, size in ((2, (192, 256)), (3, (70, 131))):
        inputs = inputs_for("detection", images=images, size=size)
        del inputs["pixel_mask"]
        assert_same(program(**inputs), model(**inputs), atol=2e-5)


@pytest.mark.parametrize("task", TASKS)
def test_evaluation_mode_leaves_no_trace_of_training(task):
    """BatchNorm statistics and dropout are those of training only while training."""
    torch.manual_seed(0)
    model = lively(UniHemaForMultiTask(very_tiny_config(dropout=0.3, **CONFIG))).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        model(task=task, **batch(task))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_trunk_has_no_loss_and_gives_states():
    torch.manual_seed(0)
    trunk = UniHemaModel(very_tiny_config(**CONFIG)).eval()
    with torch.no_grad():
        output = trunk(**inputs_for("detection"))
    assert "loss" not in output and output.last_hidden_state.shape == (2, 12, 32)
