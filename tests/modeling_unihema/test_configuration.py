"""The configuration: its documentation, its nested parts, its file, and the files of older checkpoints."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from tiny_models import VERY_TINY, very_tiny_config

from unihema.errors import InputError
from unihema.modeling_unihema.adapter_mixin import FIELDS_KEY, adapter_fields
from unihema.modeling_unihema.configuration_unihema import (
    LOSS_WEIGHTS,
    MATCHING_WEIGHTS,
    OLD_FIELDS,
    TrainingResults,
    UniHemaConfig,
)
from unihema.modeling_unihema.modeling_unihema import UniHemaForDetection, UniHemaForSegmentation


OLD = Path(__file__).parent / "old_configs"
DROPPED = {name for part in OLD_FIELDS.values() for name in part}
DROPPED |= {"morphology_order", "morphology_loss", "dice_over", "init_std"}


@pytest.mark.parametrize("cls", [UniHemaConfig, TrainingResults])
def test_every_field_is_documented(cls):
    documented = re.findall(r"^ {8}(\w+) \(", cls.__doc__, re.MULTILINE)
    assert documented == list(vars(cls)["__annotations__"])


@pytest.mark.parametrize("name", ["shipped", "tiny"])
def test_an_older_file_says_the_same_and_is_saved_in_the_new_form(name, tmp_path):
    old = json.loads((OLD / f"{name}.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(old))
    config = UniHemaConfig.from_pretrained(tmp_path)
    for part, names in OLD_FIELDS.items():
        read = dataclasses.asdict(config.trained) if part == "trained" else getattr(config, part)
        # What older files do not say is not known.
        unknown = {
            "trained": dict.fromkeys(
                ("red_cell_diameter", "mask_prompts", "crop_frame", "second_look", "cell_mask_sides", "parasites")
            )
            | {"cell_masks": False, "calibration": {}, "unfound_classes": []},
            "loss_weights": {"mask_bce": 2, "mask_dice": 2},
        }.get(part, {})
        assert read == {key: old[field] for field, key in names.items()} | unknown
    assert list(config.morphology) == old["morphology_order"]
    assert config.morphology == old["morphology"]
    assert config.official_losses == (name == "tiny")
    assert not DROPPED & vars(config).keys()
    config.save_pretrained(tmp_path / "new")
    written = json.loads((tmp_path / "new" / "config.json").read_text())
    assert not DROPPED & written.keys()
    # Nothing else is lost or different.
    changed = {"trained", "morphology", "official_losses", "loss_weights", "matching_weights"}
    others = {"auto_map", "custom_pipelines", "transformers_version", "backbone_config", "text_config"}
    same = old.keys() - DROPPED - changed - others
    assert {field: written[field] for field in same} == {field: old[field] for field in same}
    assert written.keys() - old.keys() <= changed | others | {"single_cell_parents"}
    assert written.get("single_cell_parents") is None
    for network in ("backbone_config", "text_config"):
        # Which defaults Transformers writes differs from release to release.
        kept = written[network].keys() & old[network].keys()
        assert "model_type" in kept and len(kept) > 5
        assert {field: written[network][field] for field in kept} == {field: old[network][field] for field in kept}
    again = UniHemaConfig.from_pretrained(tmp_path / "new")
    assert again.to_dict() == config.to_dict()
    assert list(again.morphology) == old["morphology_order"]


def test_the_shipped_checkpoint_has_the_new_form():
    shipped = Path(__file__).parents[2] / "api" / "shipped_files" / "checkpoint-open"
    assert not DROPPED & json.loads((shipped / "config.json").read_text()).keys()
    new = UniHemaConfig.from_pretrained(shipped).to_dict()
    old = UniHemaConfig(**json.loads((OLD / "shipped.json").read_text())).to_dict()
    # Measured since, in the fields of its training.
    for name in ("red_cell_diameter", "crop_frame"):
        assert new["trained"].pop(name) and old["trained"].pop(name) is None
    assert {**new, "_name_or_path": ""} == old


def test_results_of_training_are_apart_from_settings():
    config = very_tiny_config()
    assert config.trained == TrainingResults() and config.trained.tasks is None
    config = very_tiny_config(trained={"detection_thresholds": {"platelet": 0.7}})
    assert config.trained.segmentation_threshold == 0.5
    assert config.class_thresholds() == [0.3, 0.7, 0.3]
    assert json.loads(config.to_json_string())["trained"]["detection_thresholds"] == {"platelet": 0.7}
    with pytest.raises(ValueError, match="trained: unknown key 'threshold'.*segmentation_threshold"):
        very_tiny_config(trained={"threshold": 0.5})
    with pytest.raises(InputError, match="segmentation_threshold.*high"):
        very_tiny_config(trained={"segmentation_threshold": "high"})


@pytest.mark.parametrize(
    ("field", "defaults"), [("loss_weights", LOSS_WEIGHTS), ("matching_weights", MATCHING_WEIGHTS)]
)
def test_weights_left_out_have_their_defaults(field, defaults):
    assert getattr(very_tiny_config(), field) == defaults
    assert getattr(very_tiny_config(**{field: {"giou": 0.5}}), field) == {**defaults, "giou": 0.5}
    with pytest.raises(ValueError, match=f"{field}: unknown key 'box'; there are class, bbox, giou"):
        very_tiny_config(**{field: {"box": 1}})
    with pytest.raises(InputError, match=field):
        very_tiny_config(**{field: {"giou": "much"}})
    # Nothing is shared with other configurations.
    getattr(very_tiny_config(), field)["giou"] = 9
    assert getattr(very_tiny_config(), field) == defaults


def test_keys_given_when_loading_change_alone(tmp_path):
    config = very_tiny_config(trained={"tasks": ["detection"]}, loss_weights={"bbox": 7})
    UniHemaForDetection(config).save_pretrained(tmp_path)
    changes = {"trained": {"detection_thresholds": {"platelet": 0.7}}, "loss_weights": {"giou": 3}}
    loaded = UniHemaForDetection.from_pretrained(tmp_path, denoising_queries=0, **changes).config
    assert loaded.denoising_queries == 0
    assert loaded.trained == TrainingResults(tasks=["detection"], detection_thresholds={"platelet": 0.7})
    assert loaded.loss_weights == {**LOSS_WEIGHTS, "bbox": 7, "giou": 3}


def test_the_weights_of_the_configuration_reach_the_loss():
    torch.manual_seed(0)
    labels = torch.zeros(1, 64, 64, dtype=torch.int64)
    labels[:, :20] = 1
    image = torch.randn(1, 3, 64, 64)
    model = UniHemaForSegmentation(very_tiny_config(loss_weights={"dice": 3, "focal": 10})).eval()
    with torch.no_grad():
        output = model(pixel_values=image, labels=labels)
    terms = output.loss_dict
    assert output.loss.item() == pytest.approx(
        3 * terms["loss_dice"].item() + 10 * terms["loss_focal"].item(), rel=1e-5
    )


def test_the_order_of_attributes_is_kept(tmp_path):
    morphology = {"vacuoles": ["absent", "prominent"], "basophilia": ["slight", "moderate"]}
    very_tiny_config(morphology=morphology).save_pretrained(tmp_path)
    assert list(UniHemaConfig.from_pretrained(tmp_path).morphology) == ["vacuoles", "basophilia"]


def test_configuration_round_trip_and_nested_changes(tmp_path):
    config = very_tiny_config(num_queries=7, fusion_order="image_text", attend_to_padding=True)
    config.save_pretrained(tmp_path)
    assert UniHemaConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert UniHemaConfig.from_json_file(tmp_path / "config.json").trained == config.trained
    changed = UniHemaConfig.from_pretrained(
        tmp_path, text_config={"num_layers": 3}, backbone_config={"depths": [2, 1, 1, 1]}, num_queries=9
    )
    assert changed.text_config.num_layers == 3 and changed.text_config.d_model == VERY_TINY["text_config"]["d_model"]
    assert changed.backbone_config.depths == [2, 1, 1, 1] and changed.num_queries == 9
    assert changed.hidden_size == changed.d_model == 32 and changed.num_hidden_layers == changed.encoder_layers
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "unihema"


def test_an_older_adapter_has_its_own_results_key_by_key():
    torch.manual_seed(0)
    trained = {
        "tasks": ["detection", "cloze"],
        "detection_thresholds": {"platelet": 0.4},
        "segmentation_threshold": 0.6,
        "calibration": {"detection": {"slope": 2.0, "shift": 0.5, "shifts": {}}},
    }
    model = UniHemaForDetection(very_tiny_config(trained=trained))
    lora = LoraConfig(r=2, target_modules=["linear1"])
    lora.auto_mapping = {FIELDS_KEY: {"detection_thresholds": {"platelet": 0.8}, "trained_tasks": ["detection"]}}
    model.add_adapter(lora, "old")
    model.follow_adapter()
    assert dataclasses.asdict(model.config.trained) == {
        **dataclasses.asdict(TrainingResults(**trained)),
        "tasks": ["detection"],
        "detection_thresholds": {"platelet": 0.8},
        # Other weights give other scores.
        "calibration": {},
    }
    model.config.trained.detection_thresholds = {"platelet": 0.9}
    model.refresh_adapter_fields("old")
    new = {"trained": {"calibration": {}, "tasks": ["detection"], "detection_thresholds": {"platelet": 0.9}}}
    assert adapter_fields(model.peft_config["old"]) == model.peft_config["old"].auto_mapping[FIELDS_KEY] == new
    model.disable_adapters()
    assert model.config.trained == TrainingResults(**trained)
