"""Every model class: losses, what runs for which task, padding, saving and loading."""

import pytest
import torch
from tiny_models import HEADS, batch, very_tiny_config

from unihema.modeling_unihema.modeling_unihema import (
    TASKS,
    UniHemaForDetection,
    UniHemaForImageClassification,
    UniHemaForMultiTask,
    UniHemaModel,
)


OPTIONS = {
    "paper": {"fusion_order": "text_image", "refinement": "concat"},
    "official": {"fusion_order": "image_text", "refinement": "gated", "attend_to_padding": True},
    "bilinear upsampler": {"upsampler": "bilinear"},
    "backbone features in SCFE": {"scfe_backbone_features": True},
    "tied output layer": {"tie_word_embeddings": True},
    "frozen backbone norm": {"freeze_backbone_norm": True},
    "five feature levels": {"num_feature_levels": 5},
    "no denoising, no auxiliary loss": {"denoising_queries": 0, "auxiliary_loss": False},
    "no morphology": {"morphology": {}},
}

PARTS = {
    "image encoder": "model.image_encoder",
    "text encoder": "model.text_branch.encoder",
    "text decoder": "model.text_branch.decoder",
    "CMF": "model.hema_former.cross_modal_fusion",
    "selection": "model.query_selection",
    "TGVR": "model.hema_former.text_guided_visual_refinement",
    "image decoder": "model.image_decoder",
    "QGMF": "model.hema_former.query_guided_mask_finder",
    "SCFE": "model.hema_former.single_cell_feature_extraction",
    "detection head": "detection_head",
    "mask head": "mask_head",
    "single-cell head": "single_cell_head",
    "output layer": "lm_head",
}
QUERY_PARTS = {"image encoder", "text encoder", "selection", "TGVR", "image decoder"}
RUNS = {
    "detection": QUERY_PARTS | {"detection head"},
    "segmentation": QUERY_PARTS | {"QGMF", "mask head"},
    "single_cell": {"image encoder", "SCFE", "single-cell head"},
    "question_answering": {"text encoder", "text decoder", "CMF", "output layer"},
    "cloze": {"text encoder", "text decoder", "CMF", "output layer"},
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return UniHemaForMultiTask(very_tiny_config()).eval()


def primary(output) -> torch.Tensor:
    return output.mask_logits if "mask_logits" in output else output.logits


@pytest.mark.parametrize("task", TASKS)
def test_a_task_runs_only_its_own_parts(model, task):
    calls = dict.fromkeys(PARTS, 0)
    hooks = []
    for name, path in PARTS.items():

        def count(*_, name=name):
            calls[name] += 1

        hooks.append(model.get_submodule(path).register_forward_hook(count))
    with torch.no_grad():
        model.model.text_branch._prompt_states.clear()
        model.model.image_memory.forget()
        model(task=task, **batch(task))
        ran = {name for name, number in calls.items() if number}
        for name in calls:
            calls[name] = 0
        model(task=task, **batch(task))
    for hook in hooks:
        hook.remove()
    assert ran == RUNS[task]
    cached = task in ("detection", "segmentation")
    assert calls["text encoder"] == (0 if cached or task == "single_cell" else 1)
    assert not calls["image encoder"]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_every_option_trains(task, options):
    torch.manual_seed(0)
    model = UniHemaForMultiTask(very_tiny_config(**options)).train()
    inputs = batch(task)
    if not model.config.morphology and task == "detection":
        for label in inputs["labels"]:
            del label["morphology"]
    output = model(task=task, **inputs)
    output.loss.backward()
    assert torch.isfinite(output.loss)
    assert all(value.dim() == 0 for value in output.loss_dict.values())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_gradients_reach_every_trainable_parameter():
    torch.manual_seed(0)
    model = UniHemaForMultiTask(very_tiny_config()).train()
    # Box heads and sampling offsets start at zero weight, which stops the gradient of what lies behind them.
    for name, parameter in model.named_parameters():
        if "box_head" in name or "sampling_offsets.weight" in name or "attention_weights" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    for task in TASKS:
        model(task=task, **batch(task, size=(96, 128))).loss.backward()
    untouched = [
        name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    assert untouched == []


@pytest.mark.parametrize("task", HEADS)
def test_full_checkpoint_loads_into_each_head_and_predicts_the_same(model, task, tmp_path):
    model.save_pretrained(tmp_path)
    head, info = HEADS[task].from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert sum(p.numel() for p in head.parameters()) < sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        expected, found = model(task=task, **batch(task)), head.eval()(**batch(task))
    torch.testing.assert_close(primary(found), primary(expected), rtol=0, atol=0)
    torch.testing.assert_close(found.loss, expected.loss, rtol=0, atol=0)


def test_trunk_loads_from_a_full_checkpoint(model, tmp_path):
    model.save_pretrained(tmp_path)
    trunk, info = UniHemaModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    inputs = batch("detection")
    inputs.pop("labels")
    with torch.no_grad():
        found = trunk(**inputs)
        expected = model.model(**inputs)
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state, rtol=0, atol=0)


def test_head_asked_of_a_checkpoint_that_lacks_it_is_reported(tmp_path):
    UniHemaForImageClassification(very_tiny_config()).save_pretrained(tmp_path)
    _, info = UniHemaForDetection.from_pretrained(tmp_path, output_loading_info=True)
    missing = {key.split(".")[0] for key in info["missing_keys"]}
    assert "detection_head" in missing


@pytest.mark.parametrize("task", ["question_answering", "cloze"])
def test_padded_text_tokens_change_nothing(model, task):
    inputs = batch(task)
    changed = dict(inputs)
    changed["input_ids"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 9)
    with torch.no_grad():
        torch.testing.assert_close(
            model(task=task, **inputs).logits, model(task=task, **changed).logits, rtol=0, atol=1e-6
        )


def test_several_questions_about_one_image_equal_one_at_a_time(model):
    one = batch("question_answering", images=1)
    three = dict(one)
    three["input_ids"] = torch.stack([one["input_ids"][0].roll(i) for i in range(3)])
    three["attention_mask"] = one["attention_mask"].repeat(3, 1) * 0 + 1
    three["labels"] = one["labels"].repeat(3, 1)
    with torch.no_grad():
        together = model(task="question_answering", **three).logits
        for i in range(3):
            single = dict(one, input_ids=three["input_ids"][i : i + 1], attention_mask=three["attention_mask"][:1])
            torch.testing.assert_close(
                model(task="question_answering", **single).logits[0], together[i], rtol=0, atol=1e-5
            )


@pytest.mark.parametrize("task", TASKS)
@torch.no_grad()
def test_states_and_attentions_of_every_layer_on_request(task):
    model = UniHemaForMultiTask(very_tiny_config(num_queries=12)).eval()
    model.set_attn_implementation("eager")
    inputs = batch(task)
    plain = model(task=task, **inputs)
    output = model(task=task, **inputs, output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(primary(output), primary(plain), rtol=0, atol=1e-6)
    assert "encoder_hidden_states" not in plain and "encoder_attentions" not in plain
    heads, levels, points, queries = 4, 4, 2, 12
    if task in ("question_answering", "cloze"):
        assert [tuple(states.shape) for states in output.encoder_hidden_states] == [(2, 7, 24)] * 2
        assert [tuple(states.shape) for states in output.decoder_hidden_states] == [(2, 5, 24)] * 2
        assert output.encoder_attentions[0].shape == (2, 2, 7, 7)
        assert output.decoder_attentions[0].shape == (2, 2, 5, 5)
        assert output.cross_attentions[0].shape == (2, 2, 5, 7)
        return
    tokens = 8 * 12 + 4 * 6 + 2 * 3 + 1 * 2
    assert [tuple(states.shape) for states in output.encoder_hidden_states] == [(2, tokens, 32)] * 2
    assert output.encoder_attentions[0].shape == (2, tokens, heads, levels, points)
    if task == "single_cell":
        return
    torch.testing.assert_close(output.encoder_hidden_states[-1], output.encoder_last_hidden_state, rtol=0, atol=0)
    assert [tuple(states.shape) for states in output.decoder_hidden_states] == [(2, queries, 32)] * 3
    assert [tuple(weights.shape) for weights in output.decoder_attentions] == [(2, heads, queries, queries)] * 2
    assert [tuple(w.shape) for w in output.cross_attentions] == [(2, queries, heads, levels, points)] * 2
    for weights in (*output.encoder_attentions, *output.cross_attentions):
        torch.testing.assert_close(weights.sum((-1, -2)), torch.ones(weights.shape[:3]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("task", ["detection", "question_answering"])
@torch.no_grad()
def test_official_maths_pads_text_to_its_limit(task):
    torch.manual_seed(0)
    model = UniHemaForMultiTask(very_tiny_config(attend_to_padding=True)).eval()
    inputs = batch(task)
    longer = dict(inputs)
    for name in ("input_ids", "attention_mask"):
        longer[name] = torch.nn.functional.pad(inputs[name], (0, 16 - inputs[name].shape[1]))
    torch.testing.assert_close(
        primary(model(task=task, **inputs)), primary(model(task=task, **longer)), rtol=0, atol=1e-5
    )


def test_prompt_cache_forgets_when_the_weights_change():
    torch.manual_seed(0)
    model = UniHemaForDetection(very_tiny_config()).eval()
    inputs = batch("detection")
    inputs.pop("labels")
    with torch.no_grad():
        before = model(**inputs).logits
        assert torch.equal(before, model(**inputs).logits)
        model.model.text_branch.encoder.final_layer_norm.weight.mul_(3)
        after = model(**inputs).logits
    assert (before - after).abs().max() > 1e-5


def test_prompt_changes_the_detections(model):
    inputs = batch("detection")
    inputs.pop("labels")
    with torch.no_grad():
        a = model(task="detection", **inputs).logits
        inputs["input_ids"] = (inputs["input_ids"] + 1) * inputs["attention_mask"]
        b = model(task="detection", **inputs).logits
    assert (a - b).abs().max() > 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "counting"}, "Unknown task 'counting'"),
        ({"task": "cloze", "input_ids": None, "labels": torch.ones(2, 3, dtype=torch.long)}, "input_ids is missing"),
        ({"task": "cloze", "input_ids": torch.ones(2, 17, dtype=torch.long), "attention_mask": None}, "at most 16"),
        ({"task": "cloze", "input_ids": torch.ones(3, 5, dtype=torch.long), "attention_mask": None}, "3 texts for 2"),
        ({"pixel_values": None}, "pixel_values is missing"),
    ],
)
def test_bad_input_is_named(model, change, message):
    inputs = {"labels": torch.ones(2, 3, dtype=torch.long), **batch("single_cell"), **change}
    with pytest.raises(ValueError, match=message):
        model(**{"task": "cloze", **inputs, "labels": torch.ones(2, 3, dtype=torch.long)})


def test_more_queries_than_tokens(model):
    output = UniHemaForDetection(very_tiny_config(num_queries=500)).train()(**batch("detection", size=(32, 32)))
    assert torch.isfinite(output.loss)
    assert output.logits.shape[1] == 4 * 4 + 2 * 2 + 1 + 1


def test_boxes_are_relative_to_the_image_not_its_padding(model):
    inputs = batch("detection")
    inputs.pop("labels")
    with torch.no_grad():
        boxes = model(task="detection", **inputs).pred_boxes
    assert ((boxes >= 0) & (boxes <= 1)).all()
    centre_spread = boxes[-1, :, 0].max() - boxes[-1, :, 0].min()
    assert centre_spread > 0.5


def test_timm_backbone():
    pytest.importorskip("timm")
    config = very_tiny_config(
        backbone_config={
            "model_type": "timm_backbone",
            "backbone": "resnet10t",
            "use_pretrained_backbone": False,
            "out_indices": [2, 3, 4],
        }
    )
    output = UniHemaForDetection(config).train()(**batch("detection"))
    output.loss.backward()
    assert torch.isfinite(output.loss)


def test_presets_have_the_size_they_promise():
    from unihema.modeling_unihema.configuration_unihema import UniHemaConfig

    with torch.device("meta"):
        tiny = UniHemaForMultiTask(UniHemaConfig.tiny())
        base = UniHemaForMultiTask(UniHemaConfig.base(num_labels=30))
    assert 9e6 < tiny.num_parameters() < 12e6
    # The official model has 302 M, some of them in parts that reach no output.
    assert 299e6 < base.num_parameters() < 303e6
    assert base.config.num_queries == 900 and base.config.encoder_layers == base.config.decoder_layers == 6


def test_layers_start_where_their_method_says():
    torch.manual_seed(0)
    model = UniHemaForMultiTask(very_tiny_config())
    start = torch.full((3,), -4.59512)
    torch.testing.assert_close(model.detection_head.class_head.bias.data, start, rtol=0, atol=1e-4)
    torch.testing.assert_close(model.model.query_selection.class_head.bias.data, start, rtol=0, atol=1e-4)
    for head in (model.model.query_selection.box_head, model.model.image_decoder.box_head):
        assert not head.layers[-1].weight.any() and not head.layers[-1].bias.any()
    attention = model.model.image_encoder.layers[0].self_attention
    assert not attention.sampling_offsets.weight.any()
    # Each of the four heads looks in its own direction, two points at distances 1 and 2 in each of four levels.
    offsets = attention.sampling_offsets.bias.data.view(4, 4, 2, 2)
    torch.testing.assert_close(offsets[0, :, 0], torch.tensor([[1.0, 0.0]]).expand(4, -1), rtol=0, atol=1e-6)
    torch.testing.assert_close(offsets[1, 0, 1], torch.tensor([0.0, 2.0]), rtol=0, atol=1e-6)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
