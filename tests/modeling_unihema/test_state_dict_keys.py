"""Names in a state dict never change: what was saved is loaded."""

import json
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny_models import very_tiny_config

from unihema.modeling_unihema import modeling_unihema
from unihema.modeling_unihema.configuration_unihema import UniHemaConfig


# For each key of the very tiny model the classes that have it ("T", the trunk, without the `model.` before it), and the keys
# of the checkpoint that comes with the package; as they were before the network was restructured.
RECORDED = json.loads((Path(__file__).parent / "state_dict_keys.json").read_text())
SHIPPED = Path(str(files("unihema"))) / "shipped_files"


@pytest.mark.parametrize("letter", RECORDED["classes"])
def test_keys_of_every_class_are_the_recorded_ones(letter):
    name = RECORDED["classes"][letter]
    expected = [key for key, classes in RECORDED["very_tiny_config"].items() if letter in classes]
    if name == "UniHemaModel":
        expected = [key.removeprefix("model.") for key in expected]
    assert len(expected) > 100
    with torch.device("meta"):
        model = getattr(modeling_unihema, name)(very_tiny_config())
    assert sorted(model.state_dict()) == sorted(expected)


@pytest.mark.parametrize("name", ["checkpoint", "checkpoint-open"])
def test_keys_of_the_shipped_checkpoints_are_the_recorded_ones(name):
    with safe_open(SHIPPED / name / "model.safetensors", "pt") as file:
        assert sorted(file.keys()) == sorted(RECORDED["shipped_checkpoint"])
    with torch.device("meta"):
        model = modeling_unihema.UniHemaForMultiTask(UniHemaConfig.from_pretrained(SHIPPED / name))
    assert sorted(model.state_dict()) == sorted(RECORDED["shipped_checkpoint"])
