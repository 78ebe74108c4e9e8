"""Mutated checkpoint, adapter and reference files: they load and answer, or a `UniHemaError` says why not."""

import json
import os
import random
import struct
from pathlib import Path

import numpy as np
import pytest
from attacks import attack, mutate_bytes, mutate_json
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model
from tiny_checkpoint import save_tiny_checkpoint

import unihema
import unihema_cli
from unihema import Analyzer
from unihema.checkpoint_files import REFERENCE_FILE
from unihema.errors import UniHemaError
from unihema.results.out_of_distribution import ModelReference, TaskReference, TiedGaussians, backbone_checksum


IMAGE = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
FILES = {
    "config.json": 8,
    "processor_config.json": 4,
    "tokenizer.json": 2,
    "tokenizer_config.json": 2,
    "generation_config.json": 1,
    "metrics.json": 2,
    "run_config.json": 1,
    REFERENCE_FILE: 2,
    "model.safetensors": 3,
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A checkpoint with all its files, and an adapter of it."""
    folder = save_tiny_checkpoint(tmp_path_factory.mktemp("attacked") / "checkpoint")
    figures = {"mAP": 0.5, "mAP50": 0.7, "intervals": {"mAP": [0.4, 0.6]}, "morphology": {"macro_f1": 0.5}}
    (folder / "metrics.json").write_text(json.dumps({"detection": figures, "segmentation": {"dice": 0.8}}))
    (folder / "run_config.json").write_text(json.dumps({"data": {"folders": ["smears"]}}))
    analyzer = Analyzer.from_pretrained(folder, prepare=False)
    pixels = analyzer.processor(images=IMAGE, task="detection")["pixel_values"]
    width = analyzer.model.get_image_features(pixels).pooler_output.shape[-1]
    generator = np.random.default_rng(0)
    gaussians = TiedGaussians.fit(generator.normal(size=(60, width)), np.arange(60) % 2)
    quality = np.stack([np.full((2, 3), -1e3), np.full((2, 3), 1e3)], -1)
    task = TaskReference(("one", "two"), gaussians, np.ones(2), quality, {"platelet": (3.0, 4.0)})
    ModelReference({"detection": task}, backbone_checksum(analyzer.model)).save(folder)
    adapter = get_peft_model(
        analyzer.model, LoraConfig(r=2, target_modules=["class_head"], base_model_name_or_path=str(folder))
    )
    adapter.save_pretrained(tmp_path_factory.getbasetemp() / "adapter")
    return folder, tmp_path_factory.getbasetemp() / "adapter"


def linked(original: Path, folder: Path) -> Path:
    """A folder with links to another's files."""
    folder.mkdir(parents=True)
    for path in original.iterdir():
        os.symlink(path, folder / path.name)
    return folder


def mutated(path: Path, rng: random.Random) -> bytes:
    content = path.read_bytes()
    if path.suffix == ".safetensors" and rng.random() < 0.7:
        (length,) = struct.unpack("<Q", content[:8])
        entries = json.loads(content[8 : 8 + length])
        text = json.dumps(mutate_json(entries, rng)).encode()
        return struct.pack("<Q", len(text)) + text + content[8 + length :]
    if path.suffix == ".json" and rng.random() < 0.85:
        value = json.loads(content)
        for _ in range(rng.choice([1, 1, 1, 2, 4])):
            value = mutate_json(value, rng)
        return json.dumps(value).encode()
    return mutate_bytes(content, rng)


def test_checkpoints(originals, tmp_path):
    checkpoint, _ = originals
    told: list = []
    present = [name for name in FILES if (checkpoint / name).is_file()]

    def attempt(rng):
        told.clear()
        folder = linked(checkpoint, tmp_path / str(rng.random()))
        for name in rng.choices(present, [FILES[name] for name in present], k=rng.choice([1, 1, 1, 2])):
            content = mutated(checkpoint / name, rng)
            (folder / name).unlink(missing_ok=True)
            (folder / name).write_bytes(content)
            told.append(name)
        analyzer = Analyzer.from_pretrained(folder)
        told.append("analysis")
        for task in ("detection", "single_cell"):
            if task in analyzer.tasks:
                analyzer(IMAGE, task)
        analyzer.ask(IMAGE, "What type of cell is this?")
        told.append("info")
        done = CliRunner().invoke(unihema_cli.app, ["info", str(folder)], catch_exceptions=False)
        told.append(done.output[-300:])
        assert done.exit_code == 0

    attack("checkpoints", 20, attempt, lambda: str(told))


def test_adapters(originals, tmp_path):
    _, adapter = originals
    told = []

    def attempt(rng):
        told.clear()
        folder = linked(adapter, tmp_path / str(rng.random()))
        name = rng.choice(["adapter_config.json", "adapter_config.json", "adapter_model.safetensors"])
        content = mutated(adapter / name, rng)
        (folder / name).unlink()
        (folder / name).write_bytes(content)
        told.append(content[:3000])
        analyzer = Analyzer.from_pretrained(folder)
        analyzer(IMAGE, "detection")

    attack("adapters", 15, attempt, lambda: str(told))


def test_the_files_themselves_are_good(originals):
    """What is mutated loads and answers, so that refusals are of the mutations."""
    checkpoint, adapter = originals
    for folder in originals:
        assert Analyzer.from_pretrained(folder)(IMAGE, "detection").width == 64
    assert issubclass(unihema.CheckpointError, UniHemaError)
    assert {"config.json", "metrics.json", "model.safetensors"} <= {path.name for path in checkpoint.iterdir()}
