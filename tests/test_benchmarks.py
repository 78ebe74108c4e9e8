"""The benchmarks' own arithmetic, and that what they compare computes the same."""

import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from tiny_models import HEADS, VERY_TINY, very_tiny_config

from benchmarks.measuring import interleaved
from benchmarks.speed import attention, data, detection, gpu, models, tasks, throughput, training_step
from benchmarks.speed.__main__ import bench
from benchmarks.speed.report import growth_plot, page
from unihema.training.studies.study import save_plot


ROOT = Path(__file__).parents[1]
MACHINE = {"processor": "none", "threads": 1, "torch": "2", "transformers": "5", "gflops": 1.0}


def test_rounds_take_turns_and_the_first_is_not_counted():
    order = []
    timings = interleaved({name: lambda name=name: order.append(name) for name in "ab"}, 3, "")
    assert order == list("abababab")
    assert timings["a"].rounds == 3 and timings["a"].processor >= 0


def test_exponent_is_the_slope_of_a_power_law():
    rows = [{"by": "pixels", "value": n, "model": "it", "s": 3 * n**1.3} for n in (100, 200, 500)]
    rows += [{"by": "queries", "value": 5, "model": "it", "s": 1.0}]
    assert detection.exponents(rows)["it"] == pytest.approx(1.3, abs=1e-9)


def test_page_has_a_table_for_what_was_measured_and_nothing_else(tmp_path):
    rows = [{"size": (4, 6), "model": "it", "s": 0.123456, "to GEMM floor": math.nan}]
    growth = [{"by": kind, "value": n, "model": "it", "s": float(n)} for kind in ("pixels", "queries") for n in (1, 2)]
    text = page({"machine": MACHINE, "detection": rows, "growth": growth}, {"it": 1.0})
    assert "| 4 x 6 | it | 0.123 |  |" in text and "A training step" not in text
    assert "- it: 1.00" in text and "| queries | 2 | it | 2 |" in text
    pytest.importorskip("matplotlib")
    save_plot(tmp_path / "growth.png", growth_plot(growth))
    assert (tmp_path / "growth.png").stat().st_size > 1000


def test_attention_forms_compute_the_same():
    rows = attention.measure([(96, 128)], rounds=1)
    assert {(row["place"], row["kind"]) for row in rows} == {
        (place, kind) for place in ("encoder", "decoder") for kind in ("forward", "forward + backward")
    }
    assert all(row["largest difference"] < 1e-5 for row in rows)


def test_throughput_is_measured_on_every_field():
    rows = throughput.measure(1, rounds=1)
    assert [row["case"] for row in rows] == [
        "files, one at a time",
        "files, 4 of a size together",
        "a field with detection and segmentation by Analyzer, no files written",
    ]
    assert rows[0]["times faster"] == 1 and all(row["fields"] == 1 and row["fields a second"] > 0 for row in rows)


def test_what_a_gpu_is_measured_on_runs_anywhere(monkeypatch):
    """The same code, at the smallest size, on the CPU; compiling is what `torch.compile` is tested for elsewhere. A CPU records
    no graphs."""
    text = {**VERY_TINY["text_config"], "vocab_size": 1536}
    small = HEADS["detection"](very_tiny_config(text_config=text, fusion_queries=64))
    monkeypatch.setattr(models, "LABELS", small.config.num_labels)
    monkeypatch.setattr(models, "unihema", lambda *_, **__: copy.deepcopy(small))
    monkeypatch.setattr(models, "deformable_detr", lambda: copy.deepcopy(small))
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: None)
    scale = gpu.Scale(
        "tiny", (64, 96), images=2, cells=3, rounds=1, warm=0, fields=4, field_size=(64, 96), steps=2, batch=2
    )
    rows = list(gpu.measure("cpu", scale))
    assert [row["asked"] for row in rows if row["asked"]] == [
        "60",
        "30",
        "5",
        "300",
        "300",
        "20",
        "150",
        "45",
        "220",
    ]
    assert all(row["ours"] > 0 for row in rows if row["unit"] != "%") and sum(bool(row["peer"]) for row in rows) == 4
    text = page({"machine": MACHINE, "gpu": rows, "gpu machine": gpu.machine(torch.device("cpu"))}, {})
    assert "## On a GPU" in text and "| its first 2 steps" in text and "Not measured" not in text
    scale.seconds = -1.0
    assert {row["unit"] for row in gpu.measure("cpu", scale)} == {"not measured: out of time"}


def test_data_are_made_ready_without_and_with_kept_images(monkeypatch):
    monkeypatch.setattr(data, "FIELDS", (((48, 64), 2),))
    rows = data.measure(rounds=1)
    assert [row["images"] for row in rows] == ["decoded each time", "kept"] and all(row["ms"] > 0 for row in rows)
    # Two images of 480 x 640 or, turned, 640 x 480 in a batch, a byte for each channel.
    assert 0.9 < rows[0]["MB an image"] < 1.3


def test_without_a_gpu_the_page_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "speed.json").write_text(json.dumps({"machine": MACHINE}))
    result = CliRunner().invoke(bench, ["--output", str(tmp_path), "--section", "gpu"])
    assert result.exit_code == 0 and "No CUDA device" in result.output
    assert "Not measured: no CUDA device was at hand" in (tmp_path / "speed.md").read_text()


def test_every_task_is_timed_and_second_ones_beside_the_first(monkeypatch):
    small = {task: models.unihema(task, "tiny") for task in ("multitask", "detection", "question_answering")}
    monkeypatch.setattr(models, "unihema", lambda task, *_: small[task])
    monkeypatch.setattr(models, "blip_vqa", lambda: small["question_answering"])
    monkeypatch.setattr(tasks, "NEW_TOKENS", 2)
    looks, backbone = [], small["multitask"].model.visual_backbone
    backbone.register_forward_hook(lambda *_: looks.append(1))
    rows = {row["task"]: row for row in tasks.measure((64, 96), rounds=1)}
    assert rows[tasks.EVERYTHING]["share"] == 1 and all(row["processor s"] > 0 for row in rows.values())
    for second, first in tasks.SECOND.items():
        expected = rows[second]["processor s"] / rows[first]["processor s"]
        assert rows[second]["share of the first"] == expected
    assert math.isnan(rows["question"]["share of the first"])
    # Once for the features given to the second ones, then once in each of two rounds of all others on this model.
    assert len(looks) == 1 + 2 * 6


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux' /proc")
def test_peak_memory_is_that_of_the_process_itself():
    ballast = torch.ones(2**27)  # half a gigabyte here must not show there
    command = [sys.executable, "-c", "from benchmarks.measuring import say_peak; say_peak()"]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert 10 < float(output) < 10 + ballast.numel() * 4 / 2**20 + 400
    small = float(output)
    big = [
        sys.executable,
        "-c",
        "import torch; x = torch.ones(2**28)\nfrom benchmarks.measuring import say_peak; say_peak()",
    ]
    assert float(subprocess.run(big, capture_output=True, text=True, check=True, cwd=ROOT).stdout) > small + 900


def test_cells_lie_in_the_image():
    labels = models.cells(50, 3)
    assert len(labels) == 3 and all(image["boxes"].shape == (50, 4) for image in labels)
    assert all((image["boxes"] >= 0).all() and (image["boxes"] <= 1).all() for image in labels)


def test_recorded_page_is_what_the_recorded_figures_say():
    record = ROOT / "docs" / "results" / "speed.json"
    results = json.loads(record.read_text(encoding="utf-8"))
    text = page(results, detection.exponents(results.get("growth", [])))
    assert (ROOT / "docs" / "results" / "speed.md").read_text(encoding="utf-8") == text


def test_loss_of_the_two_libraries_is_measured_on_the_same_problem(monkeypatch):
    monkeypatch.setattr(models, "QUERIES", 30)
    monkeypatch.setattr(training_step, "LOSS_CASES", ((2, 5),))
    rows = training_step.loss(rounds=1)
    assert [row["loss"] for row in rows] == ["Transformers", "ours"] and rows[0]["to Transformers"] == 1
