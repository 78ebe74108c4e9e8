"""The `unihema` command as a user meets it: what is written, what is said, and the exit code."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command import run_command
from PIL import Image
from tiny_checkpoint import save_tiny_checkpoint

import unihema
from unihema.training.data.synthetic.folder import write_synthetic


def run(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "unihema", *map(str, arguments)], capture_output=True, text=True, cwd=cwd, timeout=600
    )


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "Ausstrich 1 µ"
    (folder / "night").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    Image.fromarray(noise).save(folder / "a.png")
    Image.fromarray(noise[::-1].copy()).save(folder / "night" / "a.png")
    (folder / "broken.jpg").write_bytes(b"this is no image")
    return folder


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["predict", "--help"], ["push", "--help"]])
def test_help_and_version_wait_for_nothing_heavy(arguments):
    code = (
        "import sys\n"
        f"sys.argv = ['unihema', *{arguments!r}]\n"
        "from unihema_cli import main\n"
        "try: main()\n"
        "finally: print('heavy:', *{'unihema', 'torch', 'transformers', 'numpy', 'PIL'} & sys.modules.keys())\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert shown.returncode == 0, shown.stderr
    told, heavy = shown.stdout.rstrip("\n").split("heavy:")
    assert heavy == "" and (told.strip() == unihema.__version__ or "Usage: unihema" in told)


def test_a_broken_file_is_reported_and_the_rest_goes_on(checkpoint, images, tmp_path):
    results = tmp_path / "results"
    first = run("predict", checkpoint, images, "-o", results)
    assert first.returncode == 1
    assert "2 analysed, 0 already done, 1 failed" in first.stdout
    assert "broken.jpg" in first.stderr and "not an image" in first.stderr and "Traceback" not in first.stderr
    with open(results / "cells.csv", newline="") as file:
        cells = list(csv.DictReader(file))
    # Two images with the same name in different folders, each with a cell for nearly every one of 20 queries.
    assert len({cell["image"] for cell in cells}) == 2 and 30 < len(cells) <= 40
    assert {"label", "score", "x_min", "y_max", "vacuoles", "shape"} <= set(cells[0])
    assert all(0 <= float(cell["x_min"]) <= float(cell["x_max"]) <= 60 for cell in cells)
    with open(results / "counts.csv", newline="") as file:
        counts = list(csv.DictReader(file))
    assert sum(int(row["count"]) for row in counts) == len(cells)
    report = json.loads((results / "results.json").read_text())
    assert len(report["images"]) == 2 and list(report["failed"])[0].endswith("broken.jpg")
    overlays = sorted(results.glob("*_overlay.png"))
    assert len(overlays) == 2 and Image.open(overlays[0]).width >= 60
    assert not list(results.rglob("*.partial"))

    again = run("predict", checkpoint, images, "-o", results)
    assert "0 analysed, 2 already done, 1 failed" in again.stdout
    (images / "broken.jpg").unlink()
    other = run("predict", checkpoint, images / "*.png", "-o", results, "--threshold", 0.5)
    assert other.returncode == 2 and "other settings: threshold was None, now it is 0.5" in other.stderr
    mended = run("predict", checkpoint, images / "*.png", images / "night", "-o", results, "--overwrite")
    assert mended.returncode == 0 and "2 analysed" in mended.stdout


def test_ask_and_info(checkpoint, images):
    answer = run("ask", checkpoint, images / "a.png", "What is it?")
    assert answer.returncode == 0, answer.stderr
    shown = run("info", checkpoint)
    assert shown.returncode == 0
    for text in (
        "unihema 0.",
        "torch ",
        "red blood cell (0.00)",
        "vacuoles: absent, prominent",
        "licence: code Apache-2.0; weights as their training data (not recorded)",
        "nothing was measured",
    ):
        assert text in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("predict", "nowhere", "x.png"), "nowhere: no such checkpoint folder"),
        (("ask", "{checkpoint}", "missing.png", "What?"), "missing.png: no such image file"),
        (("ask", "{checkpoint}", "{image}", "why " * 200), "the limit is 32"),
        (("predict", "{checkpoint}", "{image}", "--threshold", "7"), "must lie in 0..1"),
        (("predict", "{checkpoint}", "{image}", "-t", "counting"), "'counting' is not one of 'detection'"),
        (("predict", "{checkpoint}", "{image}", "--image-size", "counting=9"), "unknown task 'counting'"),
        (("predict", "{checkpoint}", "{image}", "--batch-size", "detection=9"), "Write --batch-size N"),
        (("train", "nowhere", "-o", "out"), "nowhere: no such folder"),
        (("train", "nowhere", "-o", "out", "--set", "optimisation.learning_rat=1"), "learning_rate"),
        (("train", "nowhere", "-o", "out", "--only", "2"), "add --recipe"),
        (("evaluate", "{checkpoint}", "nowhere"), "nowhere: no such folder"),
        (("evaluate", "{checkpoint}", "x", "--set", "optimisation.epochs=1"), "only settings of data.*"),
        (("evaluate", "{checkpoint}", "x", "--severity", "1"), "add --corruption"),
        (("adapt", "{checkpoint}", "x", "-o", "out", "-t", "detection", "-t", "cloze"), "an adapter is of one task"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(checkpoint, images, tmp_path, arguments, message):
    empty = tmp_path / "empty"
    empty.mkdir()
    filled = [a.format(checkpoint=checkpoint, image=images / "a.png") for a in arguments]
    if filled[0] == "predict":
        filled += ["-o", "results"]
    result = run_command(*filled, cwd=empty)
    assert result.returncode == 2
    assert message in result.stderr and "Traceback" not in result.stderr
    assert [path.name for path in empty.rglob("*.csv")] == [] and not (empty / "out").exists()


def test_a_checkpoint_with_a_file_missing_is_named(checkpoint, images, tmp_path):
    import shutil

    damaged = tmp_path / "damaged"
    shutil.copytree(checkpoint, damaged)
    (damaged / "tokenizer.json").unlink()
    result = run_command("ask", damaged, images / "a.png", "What?")
    assert result.returncode == 2 and "tokenizer.json" in result.stderr


def test_a_head_that_the_checkpoint_lacks_is_named(images, tmp_path):
    save_tiny_checkpoint(tmp_path / "single", unihema.UniHemaForImageClassification, trained={"tasks": ["single_cell"]})
    result = run_command(
        "predict", tmp_path / "single", images / "a.png", "-t", "detection", "-o", tmp_path / "results"
    )
    assert result.returncode == 2 and "no trained head for 'detection'" in result.stderr
    named = run_command("predict", tmp_path / "single", images / "a.png", "-o", tmp_path / "results")
    assert named.returncode == 0


def test_train_then_evaluate(tmp_path):
    data = write_synthetic(
        tmp_path / "data", 2, 2, seed=0, crops_per_field=2, width=224, height=168, crop_size=96, progress=False
    )
    trained = run(
        "train", data, "-o", tmp_path / "run", "-t", "single_cell", "--max-steps", 2, "--image-size", 32,
        "--batch-size", "single_cell=2", "--set", "data.workers=0",
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    assert "single_cell: accuracy" in trained.stdout
    measured = run("evaluate", tmp_path / "run", data, "-o", tmp_path / "report")
    assert measured.returncode == 0, measured.stderr
    assert "single_cell (4 rows): accuracy" in measured.stdout
    assert json.loads((tmp_path / "report" / "metrics.json").read_text())["single_cell"]["rows"] == 4


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full is Linux'")
def test_output_that_finds_no_space_is_one_line(checkpoint):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "unihema", "info", checkpoint],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=600,
        )
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["unihema: no space is left to write to. Make room, and repeat the command."]


@pytest.mark.parametrize("arguments", [("predict", "nowhere", "a.png", "-o", "out"), ("data", "check", "nowhere")])
def test_ctrl_c_is_one_line_and_an_exit_code_of_its_own(monkeypatch, tmp_path, arguments):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("unihema.analyzer.Analyzer.from_pretrained", stop)
    monkeypatch.setattr("unihema.training.data.curation.check.check_data", stop)
    result = run_command(*arguments, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (130, "")
    assert result.stderr.strip() == "unihema: stopped. The same command goes on where it was."
    assert os.listdir(tmp_path) == []
