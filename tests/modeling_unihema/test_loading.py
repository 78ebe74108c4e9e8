"""Loading with other classes; what every head does is in `test_heads.py`."""

import json

import pytest
import torch
from tiny_models import batch, lively, very_tiny_config
from transformers import AutoConfig, AutoModelForImageClassification, AutoModelForObjectDetection

from unihema import UniHemaProcessor
from unihema.errors import InputError
from unihema.modeling_unihema.configuration_unihema import UniHemaConfig
from unihema.modeling_unihema.modeling_unihema import (
    UniHemaForDetection,
    UniHemaForImageClassification,
    UniHemaForMultiTask,
    UniHemaForObjectDetection,
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
    assert "labels_when_loading" not in model.config.to_dict()
    model.save_pretrained(tmp_path / "new")
    again = loader.from_pretrained(tmp_path / "new")
    assert again.config.single_cell_labels == names
    with torch.no_grad():
        assert again(pixel_values=batch("single_cell")["pixel_values"]).logits.shape == (2, 3)


@pytest.mark.parametrize("loader", [AutoModelForObjectDetection, AutoModelForImageClassification])
def test_classes_as_the_examples_of_transformers_name_them(loader, tmp_path):
    """Numbers as text; the configuration apart, or with the weights."""
    UniHemaForMultiTask(very_tiny_config()).save_pretrained(tmp_path / "full")
    names = ["blast", "None", "7"]
    labels = {"id2label": {str(i): name for i, name in enumerate(names)}, "num_labels": 3}
    labels["label2id"] = {name: str(i) for i, name in enumerate(names)}
    config = AutoConfig.from_pretrained(tmp_path / "full", finetuning_task="image-classification", **labels)
    for given in (labels, {"config": config}):
        model = loader.from_pretrained(tmp_path / "full", ignore_mismatched_sizes=True, **given)
        assert model.config.id2label == dict(enumerate(names))
        assert model.config.label2id == {name: i for i, name in enumerate(names)}
        model.save_pretrained(tmp_path / "new")
        assert loader.from_pretrained(tmp_path / "new").config.id2label == dict(enumerate(names))
    with pytest.raises(InputError, match="num_labels=4, but id2label has 3 names"):
        loader.from_pretrained(tmp_path / "full", **labels | {"num_labels": 4})
    with pytest.raises(InputError, match="label2id .* is not the reverse of id2label"):
        loader.from_pretrained(tmp_path / "full", **labels | {"label2id": {"blast": 1, "None": 0, "7": 2}})


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("auto", [AutoModelForObjectDetection, AutoModelForImageClassification])
def test_any_number_of_labels_loads_again(auto, count, tmp_path):
    # Transformers does not write two labels called LABEL_0 and LABEL_1: they are its default.
    UniHemaForMultiTask(very_tiny_config()).save_pretrained(tmp_path / "full")
    model = auto.from_pretrained(tmp_path / "full", num_labels=count, ignore_mismatched_sizes=True)
    model.save_pretrained(tmp_path / "saved")
    again = auto.from_pretrained(tmp_path / "saved")
    assert again.config.num_labels == count
    assert again.config.to_dict() == model.config.to_dict() | {"_name_or_path": again.config.name_or_path}
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], weight, rtol=0, atol=0)


def test_two_labels_of_an_older_checkpoint_load(tmp_path):
    UniHemaForDetection(very_tiny_config(id2label=None, num_labels=2)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    older = {
        name: value for name, value in json.loads(path.read_text()).items() if name not in ("id2label", "label2id")
    }
    path.write_text(json.dumps(older))
    assert UniHemaForDetection.from_pretrained(tmp_path).config.id2label == {0: "LABEL_0", 1: "LABEL_1"}
    # A configuration that was never saved has the classes of a smear.
    assert UniHemaConfig.tiny().num_labels == 7


def test_the_detection_class_by_its_other_name_is_saved_and_loaded_by_either(tmp_path):
    from unihema.hub_cards.card import checkpoint_card
    from unihema.loading import load_model

    model = UniHemaForObjectDetection(very_tiny_config())
    model.save_pretrained(tmp_path)
    UniHemaProcessor.from_default().save_pretrained(tmp_path)
    loaded, _ = load_model(tmp_path, "cpu")
    for again in (loaded, UniHemaForDetection.from_pretrained(tmp_path)):
        assert isinstance(again, UniHemaForDetection)
        for name, tensor in again.state_dict().items():
            assert torch.equal(tensor, model.state_dict()[name])
    card = checkpoint_card(loaded.config)
    assert "- `detection`" in card and "- `cloze`" not in card
