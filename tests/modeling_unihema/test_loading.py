"""Saving and loading, as of any Transformers model: whole, in shards, in parts, in other precision, with other classes."""

import json
import logging

import pytest
import torch
from heads import CONFIG, assert_same, inputs_for, make, tensors
from safetensors.torch import load_file, save_file
from tiny_models import HEADS, VERY_TINY, lively, very_tiny_config
from transformers import AutoModelForImageClassification, AutoModelForObjectDetection
from transformers.utils.logging import get_logger

from unihema.modeling_unihema.configuration_unihema import UniHemaConfig
from unihema.modeling_unihema.modeling_unihema import (
    UniHemaForDetection,
    UniHemaForImageClassification,
    UniHemaForMultiTask,
    UniHemaForSegmentation,
)


every_head = pytest.mark.parametrize("task", HEADS)


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
