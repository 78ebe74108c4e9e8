"""A configuration that no machine could build, or that would fail later, is refused by the name of its field."""

import copy
import json
import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from tiny_models import VERY_TINY, very_tiny_config

from unihema.modeling_unihema.configuration_unihema import (
    BACKBONE_BOUNDS,
    BOUNDS,
    LONGEST_NAME,
    MOST_CLASSES,
    TEXT_BOUNDS,
    UniHemaConfig,
)
from unihema.modeling_unihema.modeling_unihema import UniHemaForDetection


REFUSED = (StrictDataclassError, ValueError)


def outside(least, most):
    return [least - 1, most + 1, -1, 10**30, -(10**400), math.nan, math.inf, "many", [1], {"a": 1}]


def refused(field, match=None, **fields):
    with pytest.raises(REFUSED, match=match or field):
        very_tiny_config(**fields)


@pytest.mark.parametrize("field", BOUNDS)
def test_numbers_of_the_network(field):
    least, most, _ = BOUNDS[field]
    for value in outside(least, most):
        refused(field, **{field: value})


@pytest.mark.parametrize("field", TEXT_BOUNDS)
def test_numbers_of_the_text_branch(field):
    least, most, _ = TEXT_BOUNDS[field]
    for value in outside(least, most):
        refused(field, text_config={**VERY_TINY["text_config"], field: value})
        # One that was changed since it was made.
        config = very_tiny_config()
        vars(config.text_config)[field] = value
        if isinstance(value, (int, float)):
            with pytest.raises(REFUSED, match=field):
                config.validate()


@pytest.mark.parametrize("field", ["num_channels", "embedding_size", "hidden_sizes", "depths"])
def test_numbers_of_the_backbone(field):
    least, most, _ = BACKBONE_BOUNDS[field]
    for value in (least - 1, most + 1, -1, 10**30, math.nan):
        whole = [value] * 4 if field in ("hidden_sizes", "depths") else value
        refused(field, backbone_config={**VERY_TINY["backbone_config"], field: whole})


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"id2label": {i: f"cell {i}" for i in range(MOST_CLASSES + 1)}}, "id2label has 4097 names"),
        ({"id2label": {}}, "id2label has 0 names"),
        ({"id2label": {0: "a", 2: "b"}}, "id2label numbers its 2 classes from 0 without gaps"),
        ({"id2label": {0: "a" * (LONGEST_NAME + 1)}}, "id2label: a name is a text of 1 to 1000"),
        ({"id2label": {0: ""}}, "id2label: a name is a text"),
        ({"id2label": {0: "a", 1: "b", 2: "a"}}, "id2label has 'a' twice"),
        ({"single_cell_labels": ["a", "a"]}, "single_cell_labels has 'a' twice"),
        ({"id2label": {0: "cell\x1b[2J"}}, "id2label: the name .* has control characters"),
        ({"id2label": None, "num_labels": 10**12}, "num_labels"),
        ({"id2label": None, "num_labels": 0}, "num_labels"),
        ({"single_cell_labels": ["cell"] * (MOST_CLASSES + 1)}, "single_cell_labels has 4097"),
        ({"single_cell_labels": []}, "single_cell_labels has 0"),
        ({"morphology": {f"a{i}": ["x", "y"] for i in range(300)}}, "morphology has 300"),
        ({"morphology": {"shape": [str(i) for i in range(300)]}}, "'shape' has 300"),
        ({"morphology": [{"name": "shape"}]}, "morphology: each attribute has a name and values"),
        ({"morphology": [{"name": "a", "values": ["x", "y"]}] * 2}, "morphology names an attribute twice"),
        ({"trained": {"segmentation_threshold": math.nan}}, "segmentation_threshold"),
        ({"trained": {"detection_thresholds": {"platelet": 2}}}, "platelet"),
        ({"trained": [1]}, "trained"),
        ({"loss_weights": {"giou": math.inf}}, "loss_weights.giou"),
        ({"default_prompt_ids": {"detection": [64]}}, "default_prompt_ids of detection is 64 and must lie in 0..63"),
        ({"pad_token_id": -1}, "pad_token_id"),
        ({"text_config": {"model_type": "bert"}}, "text_config.model_type is 'bert' and must be t5 or mt5"),
        ({"text_config": {"model_type": ["t5"]}}, "text_config.model_type"),
        (
            {"text_config": VERY_TINY["text_config"] | {"relative_attention_max_distance": 16}},
            "relative_attention_max_distance=16 must be more than half",
        ),
        (
            {"backbone_config": {"model_type": "timm_backbone", "backbone": "hf-hub:someone/net"}},
            "name of an architecture",
        ),
    ],
)
def test_lists_and_names(fields, match):
    refused("", match, **fields)


def test_limits_themselves_are_allowed():
    many = {i: f"cell {i}" for i in range(MOST_CLASSES)}
    config = very_tiny_config(id2label=many, num_queries=10_000, decoder_layers=128, fusion_queries=8192)
    assert config.num_labels == MOST_CLASSES and config.ancestor_matrix is None
    assert UniHemaConfig.base().d_model == 256


def test_saved_attention_of_a_repository_is_refused(tmp_path):
    very_tiny_config().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    for part in (None, "text_config", "backbone_config"):
        changed = copy.deepcopy(saved)
        (changed if part is None else changed[part])["attn_implementation"] = "someone/attention"
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match="attn_implementation is 'someone/attention'"):
            UniHemaConfig.from_pretrained(tmp_path)


def test_fields_changed_later_are_refused_before_anything_is_built(monkeypatch):
    config = very_tiny_config()
    config.decoder_layers = 100_000
    monkeypatch.setattr(torch.nn.Linear, "__init__", lambda *_, **__: pytest.fail("something was built"))
    with pytest.raises(REFUSED, match="decoder_layers is 100000 and must lie in 1..128"):
        UniHemaForDetection(config)
