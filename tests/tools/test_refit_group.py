"""The tool that fits the last layer of the single-cell head for the classes of a group."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file
from tiny_checkpoint import save_lively

from tools.refit_group import fitted_rows, main
from unihema import Analyzer


def test_classes_of_a_group_are_told_and_nothing_else_becomes_them():
    generator = torch.Generator().manual_seed(0)
    true = torch.arange(400) % 4
    # The classes 0 and 1 are fitted and differ little beside what all have in common; 2 stays. Of 3 is known that it is 0 or 1.
    features = 5 + torch.randn(400, 6, generator=generator) * 0.05
    features[:, 0] += 0.4 * (true == 1)
    features[:, 1] += 3.0 * (true == 2)
    members = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]], dtype=torch.bool)
    logits = torch.tensor([9.0, 9.0, 0.0]).repeat(400, 1)
    weight, bias = fitted_rows(features, logits, members[true], torch.tensor([0, 1]), torch.ones(400), 1e-5)
    told = torch.cat((features @ weight.T + bias, logits[:, 2:]), 1).argmax(1)
    assert (told == true)[true < 3].float().mean() > 0.97 and (told[true == 3] < 2).all()


@pytest.fixture
def made(tmp_path):
    parents = {"early": "field", "late": "field", "ring": "RBC"}
    checkpoint = save_lively(
        tmp_path / "model", 1, single_cell_labels=["ring", "early", "late"], single_cell_parents=parents
    )
    generator = np.random.default_rng(0)
    # One in another spelling.
    for name, colour in (("early", (200, 120, 160)), ("Late", (120, 120, 220)), ("ring", (90, 200, 90))):
        folder = tmp_path / "data" / "train" / name
        folder.mkdir(parents=True)
        for number in range(8):
            pixels = np.clip(np.array(colour) + generator.normal(0, 6, (48, 48, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{name}{number}.png")
    return checkpoint, tmp_path / "data"


def test_only_the_rows_of_the_group_change(made, tmp_path):
    checkpoint, data = made
    done = CliRunner().invoke(main, [str(checkpoint), str(tmp_path / "out"), str(data), "--group", "field"])
    assert done.exit_code == 0, done.output
    assert "field, 16 training rows" in done.output and "of 8 others 0.000 are called so" in done.output
    before, after = (load_file(folder / "model.safetensors") for folder in (checkpoint, tmp_path / "out"))
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert sorted(changed) == ["single_cell_head.layers.6.bias", "single_cell_head.layers.6.weight"]
    assert torch.equal(before[changed[-1]][:1], after[changed[-1]][:1])
    analyzer = Analyzer.from_pretrained(tmp_path / "out", device="cpu")
    for name in ("early", "Late", "ring"):
        assert analyzer(data / "train" / name / f"{name}0.png", "single_cell").single_cell["label"] == name.lower()


def test_what_cannot_be_fitted_is_said_and_nothing_is_written(made, tmp_path):
    checkpoint, data = made
    for arguments, message in (
        (("--group", "nowhere"), "no single-cell group 'nowhere'; there are ring, early, late"),
        (("--group", "RBC"), "needs rows of two classes or more"),
    ):
        done = CliRunner().invoke(main, [str(checkpoint), str(tmp_path / "out"), str(data), *arguments])
        assert done.exit_code != 0 and message in str(done.exception), done.output
    (data / "train" / "ring").rename(data / "train" / "platelet clump")
    done = CliRunner().invoke(main, [str(checkpoint), str(tmp_path / "out"), str(data), "--group", "field"])
    assert done.exit_code != 0 and "does not know platelet clump" in str(done.exception), done.output
    for path in (data / "train" / "platelet clump").iterdir():
        path.unlink()
    done = CliRunner().invoke(main, [str(checkpoint), str(tmp_path / "out"), str(data), "--group", "field"])
    assert done.exit_code != 0 and "other crops" in str(done.exception), done.output
    assert not (tmp_path / "out").exists()
    done = CliRunner().invoke(main, [str(checkpoint), str(checkpoint), str(data), "--group", "field"])
    assert done.exit_code == 2 and "is not empty" in done.output
    assert json.loads((checkpoint / "config.json").read_text())["single_cell_labels"] == ["ring", "early", "late"]
