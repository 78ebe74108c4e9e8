"""How a run computes: devices, compiling, memory, what it waits for. What it learns hangs on none of these."""

import json

import pytest
import torch
from tiny_models import very_tiny_config
from tiny_runs import run_config
from torch.utils._python_dispatch import TorchDispatchMode

from unihema import UniHemaForMultiTask
from unihema.errors import RunConfigError
from unihema.training.run import loop
from unihema.training.run.checkpoint import last_checkpoint
from unihema.training.run.config import OptimisationConfig
from unihema.training.run.distributed import matrix_products
from unihema.training.run.log import Waiting
from unihema.training.run.loop import train
from unihema.training.run.optimizer import make_optimizer


UNMEASURED = {"data.val_split": ""}


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def step_losses(folder) -> list[float]:
    return [line["loss"] for line in lines(folder) if line["event"] == "step"]


def test_a_run_says_what_it_waited_for(smears, tmp_path, capsys):
    changes = {**UNMEASURED, "data.tasks": ["detection"], "optimisation.max_steps": 2, "optimisation.device": "cpu"}
    train(run_config(smears, tmp_path / "run", **changes))
    *steps, end = lines(tmp_path / "run")
    waited = end["waited"]
    assert list(waited) == ["data", "processor", "card"] and end["images"] == 4 and end["peak_gigabytes"] is None
    assert sum(one["percent"] for one in waited.values()) == pytest.approx(100, abs=0.3)
    assert sum(one["seconds"] for one in waited.values()) == pytest.approx(end["seconds"], abs=0.01)
    # On a CPU there is no card to wait for.
    assert waited["processor"]["percent"] > waited["card"]["percent"] and waited["data"]["seconds"] > 0
    assert end["images_per_second"] == pytest.approx(4 / end["seconds"])
    for name, whole in waited.items():
        assert sum(step["waited"][name] for step in steps) == pytest.approx(whole["seconds"], abs=0.01)
    assert "images a second. Waited for: data" in capsys.readouterr().out


def test_time_within_another_counts_once(monkeypatch):
    clock = iter([0.0, 1.0, 4.0, 9.0])
    monkeypatch.setattr("unihema.training.run.log.time.perf_counter", lambda: next(clock))
    waiting = Waiting()
    with waiting.on("processor"), waiting.on("card"):
        pass
    assert waiting.seconds == {"data": 0.0, "processor": 6.0, "card": 3.0}
    assert waiting.since_last()["card"] == 3.0 and waiting.since_last()["card"] == 0.0


class Reads(TorchDispatchMode):
    """Counts values that are read from tensors one at a time: on a GPU the host waits for each."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_the_loop_reads_the_device_once_a_step(smears, tmp_path, monkeypatch):
    """The network aside: its loss here is a mean of its weights."""
    reads, read, steps = Reads(), [], []
    step, of_run = loop._Run._step, loop._Run._read

    def counted(self, batches, bar):
        with reads:
            line = step(self, batches, bar)
        steps.append(1)
        return line

    def forward(self, *args, **kwargs):
        loss = sum(weight.mean() for weight in self.parameters())
        return type("Output", (), {"loss": loss, "loss_dict": {"loss_it": loss.detach()}})()

    monkeypatch.setattr(loop._Run, "_step", counted)
    monkeypatch.setattr(loop._Run, "_read", lambda self, values: read.append(len(values)) or of_run(self, values))
    monkeypatch.setattr(UniHemaForMultiTask, "forward", forward)
    # On a CPU it keeps its count of steps in tensors of the host.
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: None)
    changes = {"data.tasks": ["detection", "cloze"], "optimisation.accumulation": 2, "optimisation.max_steps": 3}
    train(run_config(smears, tmp_path / "run", **UNMEASURED, **changes, **{"optimisation.device": "cpu"}))
    assert len(steps) == len(read) == 3 and reads.count == 0
    # Two losses and the norm; and for the log the mean over processes and the terms.
    assert read == [2 + 1 + 1 + 1] * 3


def test_memory_and_cache_change_nothing_that_is_learned(smears, tmp_path):
    changes = {**UNMEASURED, "data.tasks": ["detection", "segmentation"], "optimisation.device": "cpu"}
    changes["optimisation.max_steps"] = 4
    train(run_config(smears, tmp_path / "plain", **changes, **{"data.cache_images": False}))
    whole = step_losses(tmp_path / "plain")
    seen = []

    def stop_and_look(line):
        seen.append(len(list((tmp_path / "other" / "image_cache").iterdir())))
        if line["step"] == 2:
            raise KeyboardInterrupt

    means = {"optimisation.gradient_checkpointing": True, "logging.checkpoint_steps": 2}
    with pytest.raises(KeyboardInterrupt):
        train(run_config(smears, tmp_path / "other", **changes, **means), callbacks=[stop_and_look])
    assert last_checkpoint(tmp_path / "other") is None and seen[-1] > 0
    train(run_config(smears, tmp_path / "other", **changes, **means), resume=True)
    assert step_losses(tmp_path / "other") == pytest.approx(whole, rel=1e-4)
    assert not (tmp_path / "other" / "image_cache").exists()


def test_compiling_is_asked_of_the_model_and_evaluation_runs_as_it_is(smears, tmp_path, monkeypatch):
    asked, stances = [], []
    evaluate, stance = loop.evaluate_model, torch.compiler.set_stance
    monkeypatch.setattr(UniHemaForMultiTask, "compile_parts", lambda self: asked.append("parts"), raising=False)
    monkeypatch.setattr(torch.compiler, "set_stance", lambda name: stances.append(name) or stance(name))
    monkeypatch.setattr(
        loop, "evaluate_model", lambda *args, **kwargs: asked.append("evaluated") or evaluate(*args, **kwargs)
    )
    changes = {"data.tasks": ["single_cell"], "optimisation.max_steps": 1, "optimisation.compile": True}
    train(run_config(smears, tmp_path / "run", **changes))
    assert asked == ["parts", "evaluated"] and stances == ["force_eager"]
    whole = torch.nn.Linear(2, 2)
    monkeypatch.setattr(whole, "compile", lambda **options: asked.append(options))
    loop.compile_for_training(whole)
    assert asked[-1] == {"dynamic": True}


def test_what_cannot_be_is_said(smears, tmp_path):
    there = torch.cuda.device_count()
    with pytest.raises(RunConfigError, match=f"device='cuda:{there}': PyTorch sees {there} GPUs.*train on 'cpu'"):
        train(run_config(smears, tmp_path / "run", **{"optimisation.device": f"cuda:{there}"}))
    with pytest.raises(RunConfigError, match="device='gpu' must be auto, cpu, mps, cuda, or cuda:0"):
        train(run_config(smears, tmp_path / "run", **{"optimisation.device": "gpu"}))
    with pytest.raises(RunConfigError, match="gradient_checkpointing: Linear cannot do that"):
        loop._checkpoint_gradients(torch.nn.Linear(2, 2))
    with pytest.raises(RunConfigError, match="data.cache_gigabytes=-1.0 must not be negative"):
        train(run_config(smears, tmp_path / "run", **{"data.cache_gigabytes": -1.0}))


def test_products_are_set_for_a_gpu_alone_and_as_before_afterwards():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    with matrix_products(True, torch.device("cpu")):
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before
    for tf32, name in ((True, "high"), (False, "highest")):
        with matrix_products(tf32, torch.device("cuda")):
            assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == (name, tf32)
    with matrix_products(None, torch.device("cuda")):
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before


def test_the_optimizer_is_fused_where_the_weights_are_on_a_gpu(monkeypatch):
    model = UniHemaForMultiTask(very_tiny_config())
    assert not make_optimizer(model, OptimisationConfig()).defaults["fused"]
    monkeypatch.setattr(torch.nn.Parameter, "device", torch.device("cuda"), raising=False)
    assert make_optimizer(model, OptimisationConfig()).defaults["fused"] is True
