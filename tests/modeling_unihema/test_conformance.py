"""What any Transformers model does, for every head: same in, same out; saving and loading; precision; tracing."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import VERY_TINY, batch, lively, very_tiny_config
from transformers import AutoModelForImageClassification, AutoModelForObjectDetection
from transformers.utils.logging import get_logger

from unihema.modeling_unihema.configuration_unihema import UniHemaConfig
from unihema.modeling_unihema.modeling_unihema import (
    TASKS,
    UniHemaForDetection,
    UniHemaForImageClassification,
    UniHemaForMultiTask,
    UniHemaForQA,
    UniHemaForSegmentation,
    UniHemaModel,
)


HEADS = {
    "detection": UniHemaForDetection,
    "segmentation": UniHemaForSegmentation,
    "single_cell": UniHemaForImageClassification,
    "question_answering": UniHemaForQA,
}
every_head = pytest.mark.parametrize("task", HEADS)
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


@pytest.fixture
def loading_log(caplog):
    """What loading says, which is where Transformers tells of missing and mismatched weights."""
    logger = get_logger("transformers")
    logger.propagate = True
    with caplog.at_level(logging.INFO, logger="transformers"):
        yield caplog
    logger.propagate = False


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


@every_head
@torch.no_grad()
def test_save_and_load_whole_and_in_shards(task, tmp_path):
    model = make(task)
    expected = model(**inputs_for(task))
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="40kB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert not list(tmp_path.rglob("*.bin"))
    for folder in ("whole", "shards"):
        loaded, report = HEADS[task].from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert not loaded.training
        assert_same(loaded(**inputs_for(task)), expected)


@every_head
@torch.no_grad()
def test_full_checkpoint_into_a_head_and_back_without_a_word(task, tmp_path, loading_log):
    torch.manual_seed(0)
    full = lively(UniHemaForMultiTask(very_tiny_config(**CONFIG))).eval()
    full.save_pretrained(tmp_path / "full")
    head = HEADS[task].from_pretrained(tmp_path / "full")
    head.save_pretrained(tmp_path / "head")
    again = HEADS[task].from_pretrained(tmp_path / "head")
    assert_same(again(**inputs_for(task)), full(task=task, **inputs_for(task)))
    assert [record.message for record in loading_log.records if record.levelno >= logging.WARNING] == []
    # Back into the full model, only what the head does not have is missing, and is said to be.
    _, report = UniHemaForMultiTask.from_pretrained(tmp_path / "head", output_loading_info=True)
    assert set(report["missing_keys"]) == set(full.state_dict()) - set(head.state_dict())
    assert "LOAD REPORT" in loading_log.text and "MISSING" in loading_log.text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_head
@torch.no_grad()
def test_loads_and_runs_in_half_precision(task, dtype, tmp_path):
    model = make(task)
    model.save_pretrained(tmp_path)
    half = HEADS[task].from_pretrained(tmp_path, dtype=dtype)
    assert {p.dtype for p in half.parameters()} == {dtype}
    inputs = inputs_for(task)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    output = half(**inputs)
    assert all(torch.isfinite(value).all() for value in tensors(output).values())
    half.save_pretrained(tmp_path / "half")
    assert HEADS[task].from_pretrained(tmp_path / "half", dtype="auto").dtype == dtype
    assert HEADS[task].from_pretrained(tmp_path / "half", dtype=torch.float32).dtype == torch.float32


@every_head
@torch.no_grad()
def test_device_map_spreads_the_model_and_what_does_not_fit_goes_to_disk(task, tmp_path):
    model = make(task)
    expected = model(**inputs_for(task))
    model.save_pretrained(tmp_path)
    placed = HEADS[task].from_pretrained(tmp_path, device_map="auto")
    assert_same(placed(**inputs_for(task)), expected)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    places = set()
    for share in (0.6, 0.9):
        spread = HEADS[task].from_pretrained(
            tmp_path, device_map="auto", max_memory={"cpu": int(size * share)}, offload_folder=tmp_path / "offload"
        )
        places |= {str(place) for place in spread.hf_device_map.values()}
        assert_same(spread(**inputs_for(task)), expected, atol=2e-5)
    assert places == {"cpu", "disk"}


@every_head
def test_loading_draws_no_weight_that_is_in_the_file(task, tmp_path, monkeypatch):
    """Low memory and time: the model is made without storage and filled from the file."""
    from torch import nn

    make(task).save_pretrained(tmp_path)
    drawn = []
    for name in ("xavier_uniform_", "normal_", "trunc_normal_", "kaiming_uniform_"):
        draw = getattr(nn.init, name)

        def watched(tensor, *arguments, _draw=draw, **options):
            if not getattr(tensor, "_is_hf_initialized", False) and tensor.device.type != "meta":
                drawn.append(tuple(tensor.shape))
            return _draw(tensor, *arguments, **options)

        monkeypatch.setattr(nn.init, name, watched)
    HEADS[task].from_pretrained(tmp_path)
    assert drawn == []


@every_head
def test_missing_weights_are_named_and_drawn_anew(task, tmp_path, loading_log):
    model = make(task)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    lost = [name for name in state if name.startswith("model.visual_backbone.input_projection.0.0.")]
    save_file({name: value for name, value in state.items() if name not in lost}, tmp_path / "model.safetensors")
    loaded, report = HEADS[task].from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == set(lost)
    assert all(name in loading_log.text for name in lost)
    assert torch.isfinite(loaded.get_parameter(lost[0])).all()
    assert not torch.equal(loaded.get_parameter(lost[0]), model.get_parameter(lost[0]))


@every_head
def test_weights_of_another_shape_stop_loading_unless_allowed(task, tmp_path, loading_log):
    make(task).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        HEADS[task].from_pretrained(tmp_path, d_model=48)
    loaded = HEADS[task].from_pretrained(tmp_path, d_model=48, ignore_mismatched_sizes=True)
    assert "Reinit due to size mismatch" in loading_log.text
    assert all(torch.isfinite(parameter).all() for parameter in loaded.parameters())
    with torch.no_grad():
        loaded(**inputs_for(task))


@pytest.mark.parametrize("auto", [False, True])
@pytest.mark.parametrize("labels", [{"id2label": {0: "blast", 1: "mature"}}, {"num_labels": 5}])
def test_new_classes_for_detection_keep_everything_else(labels, auto, tmp_path):
    torch.manual_seed(0)
    full = lively(UniHemaForMultiTask(very_tiny_config(**CONFIG)))
    full.save_pretrained(tmp_path)
    loader = AutoModelForObjectDetection if auto else UniHemaForDetection
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        loader.from_pretrained(tmp_path, **labels)
    model = loader.from_pretrained(tmp_path, ignore_mismatched_sizes=True, **labels)
    names = list(
        labels.get("id2label", {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2", 3: "LABEL_3", 4: "LABEL_4"}).values()
    )
    assert [model.config.id2label[i] for i in range(len(names))] == names
    assert model.config.label2id == {name: i for i, name in enumerate(names)}
    assert model.config.single_cell_labels == full.config.single_cell_labels
    with torch.no_grad():
        assert model(**inputs_for("detection")).logits.shape[-1] == len(names)
    torch.testing.assert_close(
        model.model.image_decoder.norm.weight, full.model.image_decoder.norm.weight, rtol=0, atol=0
    )


@pytest.mark.parametrize("auto", [False, True])
@pytest.mark.parametrize("labels", [{"id2label": {0: "a", 1: "b", 2: "c"}}, {"num_labels": 3}])
def test_new_classes_for_the_single_cell(labels, auto, tmp_path):
    torch.manual_seed(0)
    UniHemaForMultiTask(very_tiny_config(**CONFIG)).save_pretrained(tmp_path / "full")
    loader = AutoModelForImageClassification if auto else UniHemaForImageClassification
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        loader.from_pretrained(tmp_path / "full", **labels)
    model = loader.from_pretrained(tmp_path / "full", ignore_mismatched_sizes=True, **labels)
    names = list(labels.get("id2label", {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}).values())
    assert model.config.single_cell_labels == names
    model.save_pretrained(tmp_path / "new")
    again = loader.from_pretrained(tmp_path / "new")
    assert again.config.single_cell_labels == names
    with torch.no_grad():
        assert again(**inputs_for("single_cell")).logits.shape == (2, 3)


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


def test_what_a_mask_cannot_teach_is_frozen_also_after_loading(tmp_path):
    model = make("segmentation")
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert any("query_selection.class_head" in name for name in frozen)
    model.save_pretrained(tmp_path)
    loaded = UniHemaForSegmentation.from_pretrained(tmp_path)
    assert {name for name, p in loaded.named_parameters() if not p.requires_grad} == frozen
    full = UniHemaForMultiTask(very_tiny_config())
    full.save_pretrained(tmp_path / "full")
    assert all(p.requires_grad for p in UniHemaForMultiTask.from_pretrained(tmp_path / "full").parameters())


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
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    assert model.is_activation_checkpointing
    loss_again, gradients_again, twice = run()
    assert (once, twice) == (1, 2)
    torch.testing.assert_close(loss_again, loss, rtol=0, atol=1e-6)
    assert gradients_again.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_again[name], gradient, rtol=1e-4, atol=1e-5)
    model.activation_checkpointing_disable()
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


def test_configuration_round_trip_and_nested_changes(tmp_path):
    config = very_tiny_config(num_queries=7, fusion_order="image_text", attend_to_padding=True)
    config.save_pretrained(tmp_path)
    assert UniHemaConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    changed = UniHemaConfig.from_pretrained(
        tmp_path, text_config={"num_layers": 3}, backbone_config={"depths": [2, 1, 1, 1]}, num_queries=9
    )
    assert changed.text_config.num_layers == 3 and changed.text_config.d_model == VERY_TINY["text_config"]["d_model"]
    assert changed.backbone_config.depths == [2, 1, 1, 1] and changed.num_queries == 9
    assert changed.hidden_size == changed.d_model == 32 and changed.num_hidden_layers == changed.encoder_layers
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "unihema" and "given_labels" not in written


def test_configuration_reaches_the_model_when_loading(tmp_path):
    make("detection").save_pretrained(tmp_path)
    model = UniHemaForDetection.from_pretrained(tmp_path, denoising_queries=0, detection_thresholds={"platelet": 0.7})
    assert model.config.denoising_queries == 0 and model.config.detection_thresholds == {"platelet": 0.7}


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
