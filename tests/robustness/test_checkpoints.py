"""Mutated checkpoint, adapter and reference files: they load and answer, or a `UniHemaError` says why not."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from robustness.confined import attack, command, confined
from robustness.good_folders import files_of
from robustness.strategies import Change, changed_folder, lay_down
from tiny_checkpoint import save_tiny_checkpoint

from unihema import Analyzer
from unihema.checkpoint_files import REFERENCE_FILE
from unihema.errors import InputError
from unihema.loading import load_model
from unihema.results.out_of_distribution import ModelReference, TaskReference, TiedGaussians, backbone_checksum


pytestmark = pytest.mark.filterwarnings("ignore::unihema.analyzer.QueryCapWarning")

IMAGE = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
# How often each file is changed.
FILES = {
    "config.json": 8,
    "processor_config.json": 4,
    "tokenizer.json": 2,
    "tokenizer_config.json": 2,
    "generation_config.json": 3,
    "metrics.json": 2,
    "run_config.json": 1,
    REFERENCE_FILE: 2,
    "model.safetensors": 3,
}
ADAPTER_FILES = {"adapter_config.json": 5, "adapter_model.safetensors": 2, "processor_config.json": 1}
KINDS = ("gone", "folder", "pipe", "broken link", "link to itself", "device", "no permission")


class Originals:
    """The files of a checkpoint and of an adapter of it."""

    def __init__(self, checkpoint: Path, adapter: Path):
        self.checkpoint, self.adapter, self.base = files_of(checkpoint), files_of(adapter), checkpoint
        self.weights = {name: number for name, number in FILES.items() if name in self.checkpoint}
        self.adapter_weights = {name: number for name, number in ADAPTER_FILES.items() if name in self.adapter}


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
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
    lora = LoraConfig(r=2, target_modules=["class_head"], base_model_name_or_path=str(folder))
    adapter = get_peft_model(analyzer.model, lora)
    adapter.save_pretrained(folder.parent / "adapter")
    analyzer.processor.save_pretrained(folder.parent / "adapter")
    return Originals(folder, folder.parent / "adapter")


def use(folder: Path) -> list[str]:
    """Everything that a checkpoint can do."""
    analyzer = Analyzer.from_pretrained(folder, device="cpu")
    for task in ("detection", "segmentation", "single_cell"):
        if task in analyzer.tasks:
            analyzer(IMAGE, task)
    if "question_answering" in analyzer.tasks:
        analyzer.ask(IMAGE, "What type of cell is this?")
    if "cloze" in analyzer.tasks:
        analyzer.ask(IMAGE, "The cell is a ___.")
    command("info", folder)
    return list(analyzer.tasks)


def write(folder: Path, files: dict[str, bytes], changes: tuple[Change, ...]) -> None:
    lay_down(folder / "unihema", files, changes)


def tried(name: str, files: dict[str, bytes], weights: dict[str, int], data: st.DataObject) -> None:
    changes = data.draw(changed_folder(files, weights, KINDS))
    confined(name, lambda given, out: use(given / "unihema"), lay_down=lambda given: write(given, files, changes))


@attack(inputs=20, share=0.05)
@given(st.data())
def test_checkpoints(originals, data):
    tried("checkpoints", originals.checkpoint, originals.weights, data)


@attack(inputs=15, share=0.03)
@given(st.data())
def test_adapters(originals, data):
    tried("adapters", originals.adapter, originals.adapter_weights, data)


def test_undamaged_ones_load_and_answer(originals):
    for files in (originals.checkpoint, originals.adapter):
        done = confined(
            "undamaged",
            lambda given, out: use(given / "unihema"),
            lay_down=lambda given, files=files: write(given, files, ()),
        )
        assert "detection" in done and "cloze" in done
    assert set(originals.weights) == set(FILES) and set(originals.adapter_weights) == set(ADAPTER_FILES)


PATTERNS = ["(a+)+$", "(.*)*x", "((a|aa))+x", ".*.*.*.*x", r"(.)\1*", "(?:a?)*x", "(", "x" * 5000, "a{1,99}.*.*.*"]


def adapter_with(originals: Originals, folder: Path, field: str, value: object) -> Path:
    """The adapter with a field of its configuration changed."""
    lay_down(folder, originals.adapter)
    config = json.loads(originals.adapter["adapter_config.json"])
    (folder / "adapter_config.json").write_text(json.dumps(config | {field: value}))
    return folder


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern", "modules_to_save"])
def test_patterns_that_could_be_tried_for_hours_are_refused(originals, tmp_path, field):
    model, _ = load_model(originals.base, "cpu")
    for number, pattern in enumerate(PATTERNS):
        value = {"rank_pattern": {pattern: 2}, "modules_to_save": [pattern]}.get(field, pattern)
        with pytest.raises(InputError, match=field):
            model.load_adapter(adapter_with(originals, tmp_path / str(number), field, value))


def test_patterns_of_layers_load(originals, tmp_path):
    model, _ = load_model(originals.base, "cpu")
    patterns = (r"(?:model\.)?(?:.*\.)?class_head", r".*(?:class_head|layers\.\d+\.nothing)", ["class_head"])
    for number, pattern in enumerate(patterns):
        folder = adapter_with(originals, tmp_path / str(number), "target_modules", pattern)
        assert not model.load_adapter(folder, f"adapter{number}").missing_keys
