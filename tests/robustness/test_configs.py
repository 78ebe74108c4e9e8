"""Hostile values of configurations: of training runs, mixes, models and processors."""

import json
from functools import partial

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from robustness.confined import attack, command, confined
from robustness.good_folders import good_folders
from robustness.strategies import changed_bytes, changed_json, changed_words, is_json
from tiny_models import very_tiny_config
from tiny_runs import run_config

import unihema
from unihema import UniHemaConfig, UniHemaForMultiTask, UniHemaProcessor
from unihema.training.run.config import RunConfig, read_mix


RUN = run_config("data", "run").to_dict()
RUN["model"]["overrides"]["text_config"] = {**RUN["model"]["overrides"]["text_config"], "vocab_size": 1536}
RUN["data"] |= {"val_split": "", "image_sizes": {task: {"longest_edge": 64} for task in RUN["data"]["image_sizes"]}}
# Values of settings that have none by default.
RUN["data"] |= {
    "task_weights": {"detection": 0.5},
    "rename": {"a": "b"},
    "hold_out": {"patient": ["9"]},
    "max_samples": 2,
}
RUN["data"] |= {
    "label_parents": {"RBC": "cell"},
    "folds": 2,
    "steps_per_epoch": 3,
    "attributes_as_detection": False,
}
RUN["optimisation"] |= {
    "loss_weights": {"detection": 2.0},
    "learning_rate_multipliers": {"backbone": 0.1},
    "patience": 3,
}
RUN["augmentation"] = {"enabled": True, "overrides": {"detection": {"brightness": 0.1}}}
MIX = {
    "data": {"folders": ["cbc"], "image_sizes": {"detection": {"longest_edge": 320}}, "tasks": ["detection"]},
    "optimisation": {"learning_rate": 4e-4, "betas": [0.9, 0.99]},
    "stages": {"joint_visual": {"optimisation.time_limit_minutes": 45}},
}
MODEL = very_tiny_config().to_dict()
PROCESSOR = UniHemaProcessor.from_default().image_processor.to_dict()
IMAGE = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    place = tmp_path_factory.mktemp("data")
    good_folders(place)
    return place / "by_split"


def train(config: bytes, data, given, out) -> None:
    (out / "run_config.json").write_bytes(config)
    # What would only take long, is.
    limits = ("--max-steps", 2, "--set", "optimisation.epochs=null", "--set", "data.workers=0")
    command("train", data, "--config", out / "run_config.json", "-o", out / "run", "--set", "data.folds=null", *limits)
    assert (out / "run" / "model.safetensors").is_file()


@attack(inputs=4, share=0.02)
@given(changed=changed_json(json.dumps(RUN).encode()))
def test_training(data, changed):
    confined("runs of hostile settings", lambda given, out: train(changed[1], data, given, out))


def read_run(folder) -> None:
    config = RunConfig.load(folder)
    config.check()
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))).differences(config) == {}


RUNS = st.one_of(changed_json(json.dumps(RUN).encode()), changed_bytes(json.dumps(RUN).encode()))


@attack(inputs=24, share=0.05, each=8)
@given(st.lists(RUNS, min_size=8, max_size=8))
def test_run_configs(changed):
    def attempt(given, out, content):
        (out / "run_config.json").write_bytes(content)
        read_run(out)

    confined("run configurations", *[partial(attempt, content=content) for _, content in changed])


def check_mix(path) -> None:
    mix = read_mix(path)
    mix.run.check()
    for changes in mix.stages.values():
        mix.run.with_overrides(changes).check()


MIXES = st.one_of(
    changed_words(yaml.safe_dump(MIX).encode()),
    changed_json(json.dumps(MIX).encode()),
    changed_bytes(yaml.safe_dump(MIX).encode()),
)


@attack(inputs=24, share=0.05, each=8)
@given(st.lists(MIXES, min_size=8, max_size=8))
def test_mixes(changed):
    def attempt(given, out, content):
        (out / "mix.yaml").write_bytes(content)
        check_mix(out / "mix.yaml")

    confined("mixes", *[partial(attempt, content=content) for _, content in changed])


def build(values: dict) -> None:
    config = UniHemaConfig.from_dict(values)
    with torch.device("meta"):
        UniHemaForMultiTask(config)
    assert UniHemaConfig.from_dict(json.loads(config.to_json_string())).class_names == config.class_names
    UniHemaConfig(
        **{name: value for name, value in values.items() if name not in ("model_type", "transformers_version")}
    )


@attack(inputs=25, share=0.04, each=5)
@given(st.lists(changed_json(json.dumps(MODEL).encode()).filter(is_json), min_size=5, max_size=5))
def test_model_configs(changed):
    attempts = [lambda given, out, content=content: build(json.loads(content)) for _, content in changed]
    confined("model configurations", *attempts)


def process(values: dict) -> None:
    processor = unihema.UniHemaImageProcessor.from_dict(values)
    for task in ("detection", "single_cell"):
        batch = processor([IMAGE], task=task)
        assert batch["pixel_values"].isfinite().all()
    json.loads(processor.to_json_string())


@attack(inputs=25, share=0.04, each=5)
@given(st.lists(changed_json(json.dumps(PROCESSOR).encode()).filter(is_json), min_size=5, max_size=5))
def test_processor_configs(changed):
    attempts = [lambda given, out, content=content: process(json.loads(content)) for _, content in changed]
    confined("processor configurations", *attempts)


def test_undamaged_ones_are_taken(data, tmp_path):
    train(json.dumps(RUN).encode(), data, tmp_path, tmp_path)
    read_run(tmp_path)
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump(MIX))
    check_mix(tmp_path / "mix.yaml")
    build(json.loads(json.dumps(MODEL)))
    process(json.loads(json.dumps(PROCESSOR)))
