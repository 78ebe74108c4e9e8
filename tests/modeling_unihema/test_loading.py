"""Loading with other classes and settings, and the configuration's own file; what every head does is in `test_heads.py`."""

import json

import pytest
import torch
from tiny_models import VERY_TINY, batch, lively, very_tiny_config
from transformers import AutoModelForImageClassification, AutoModelForObjectDetection

from unihema.modeling_unihema.configuration_unihema import UniHemaConfig
from unihema.modeling_unihema.modeling_unihema import (
    UniHemaForDetection,
    UniHemaForImageClassification,
    UniHemaForMultiTask,
)


@pytest.mark.parametrize("auto", [False, True])
@pytest.mark.parametrize("labels", [{"id2label": {0: "blast", 1: "mature"}}, {"num_labels": 5}])
def test_new_classes_for_detection_keep_everything_else(labels, auto, tmp_path):
    torch.manual_seed(0)
    full = lively(UniHemaForMultiTask(very_tiny_config()))
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
        assert model(pixel_values=batch("detection")["pixel_values"]).logits.shape[-1] == len(names)
    torch.testing.assert_close(
        model.model.image_decoder.norm.weight, full.model.image_decoder.norm.weight, rtol=0, atol=0
    )


@pytest.mark.parametrize("auto", [False, True])
@pytest.mark.parametrize("labels", [{"id2label": {0: "a", 1: "b", 2: "c"}}, {"num_labels": 3}])
def test_new_classes_for_the_single_cell(labels, auto, tmp_path):
    torch.manual_seed(0)
    UniHemaForMultiTask(very_tiny_config()).save_pretrained(tmp_path / "full")
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
        assert again(pixel_values=batch("single_cell")["pixel_values"]).logits.shape == (2, 3)


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
    UniHemaForDetection(very_tiny_config()).save_pretrained(tmp_path)
    model = UniHemaForDetection.from_pretrained(tmp_path, denoising_queries=0, detection_thresholds={"platelet": 0.7})
    assert model.config.denoising_queries == 0 and model.config.detection_thresholds == {"platelet": 0.7}
