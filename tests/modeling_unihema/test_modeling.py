"""The model of all heads and its trunk: losses, what runs for which task, options, first weights."""

import pytest
import torch
from tiny_models import batch, very_tiny_config

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
    "visual backbone": "model.visual_backbone",
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


def unlabelled(task: str, **options) -> dict:
    """Inputs of a task, with what its answer needs."""
    inputs = batch(task, **options)
    labels = inputs.pop("labels")
    if task in ("question_answering", "cloze"):
        inputs["decoder_input_ids"] = labels.clamp(min=0)
    return inputs


def primary(output) -> torch.Tensor:
    return output.mask_logits if "mask_logits" in output else output.logits


@pytest.mark.parametrize("task", TASKS)
def test_a_task_runs_only_its_own_parts(model, task):
    inputs, ran = unlabelled(task), set()
    hooks = [
        model.get_submodule(path).register_forward_hook(lambda *_, name=name: ran.add(name))
        for name, path in PARTS.items()
    ]

    def run(**given) -> set[str]:
        ran.clear()
        model(task=task, **given)
        return set(ran)

    with torch.no_grad():
        image = {name: inputs.pop(name) for name in ("pixel_values", "pixel_mask")}
        features = model.get_image_features(**image, task=task)
        assert run(**inputs, **image) == RUNS[task] | {"visual backbone"}
        assert run(**inputs, image_features=features) == RUNS[task] - {"image encoder"}
        if task in ("detection", "segmentation"):
            prompt = model.get_prompt_features(inputs["input_ids"], inputs["attention_mask"])
            assert run(image_features=features, prompt_features=prompt) == RUNS[task] - {
                "image encoder",
                "text encoder",
            }
    for hook in hooks:
        hook.remove()


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
    assert all(value.dim() == 0 for value in getattr(output, "loss_dict", {}).values())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_trunk_loads_from_a_full_checkpoint(model, tmp_path):
    model.save_pretrained(tmp_path)
    trunk, info = UniHemaModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    inputs = unlabelled("detection")
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


def test_prompt_changes_the_detections(model):
    inputs = unlabelled("detection")
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
        (
            {"pixel_values": torch.zeros(3, 64, 64)},
            r"pixel_values must be floats \[B, 3, H, W\].* got torch.float32 \(3, 64, 64\)",
        ),
        ({"pixel_values": torch.zeros(2, 1, 64, 64)}, "pixel_values must be floats"),
        ({"pixel_values": torch.zeros(2, 3, 64, 64, dtype=torch.uint8)}, "got torch.uint8"),
        ({"pixel_mask": torch.ones(2, 32, 32)}, r"pixel_mask has shape \(2, 32, 32\), pixel_values \(2, 3, "),
        ({"pixel_mask": torch.ones(1, 64, 96)}, "they are of other images"),
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
    inputs = unlabelled("detection")
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


def test_trunk_has_no_loss_and_gives_states():
    torch.manual_seed(0)
    trunk = UniHemaModel(very_tiny_config(num_queries=12)).eval()
    with torch.no_grad():
        output = trunk(**unlabelled("detection"))
    assert "loss" not in output and output.last_hidden_state.shape == (2, 12, 32)
