"""What the training loop is made of: average of weights, learning rates, batches, checkpoints."""

import json
import types

import pytest
import torch
from torch import nn

from unihema.errors import RunConfigError
from unihema.files import write_json, write_text
from unihema.training.data.mixing import TaskMixer
from unihema.training.run.batches import ProcessShare
from unihema.training.run.checkpoint import Progress, last_checkpoint, save_checkpoint
from unihema.training.run.config import OptimisationConfig
from unihema.training.run.log import RunLog
from unihema.training.run.optimizer import ExponentialMovingAverage, ProgressSchedule, make_optimizer


def test_average_by_hand():
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    ema = ExponentialMovingAverage(model, decay=0.5, warmup=10)
    nn.init.constant_(model.weight, 2.0)
    ema.update(model)  # decay (1 + 0) / (10 + 0) = 0.1
    assert float(ema.average["weight"]) == pytest.approx(0.1 * 1 + 0.9 * 2)
    ema.updates = 1000
    ema.update(model)  # decay 0.5
    assert float(ema.average["weight"]) == pytest.approx(0.5 * 1.9 + 0.5 * 2)
    with ema.applied(model):
        assert model.weight.item() == pytest.approx(1.95)
    assert model.weight.item() == 2.0


def test_average_of_buffers_and_shared_weights_survives_saving():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    model[2].weight = model[0].weight
    ema = ExponentialMovingAverage(model, decay=0.9)
    assert "2.weight" not in ema.average
    model(torch.randn(4, 2))
    ema.update(model)
    assert int(ema.average["1.num_batches_tracked"]) == 1
    other = ExponentialMovingAverage(model, decay=0.9)
    other.load_state_dict(ema.state_dict())
    assert other.updates == 1
    torch.testing.assert_close(other.average, ema.average, rtol=0, atol=0)
    with pytest.raises(ValueError, match="another model"):
        other.load_state_dict({"updates": torch.tensor(1)})


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.visual_backbone = nn.Linear(2, 2)
        self.sampling_offsets = nn.Linear(2, 2)
        self.norm = nn.LayerNorm(2)


def test_parameter_groups():
    settings = OptimisationConfig(
        learning_rate=1e-3, backbone_multiplier=0.1, learning_rate_multipliers={"sampling_offsets": 0.5}
    )
    model = Toy()
    model.sampling_offsets.bias.requires_grad_(False)
    optimizer = make_optimizer(model, settings)
    groups = {
        (round(g["lr"], 9), g["weight_decay"]): sum(p.numel() for p in g["params"]) for g in optimizer.param_groups
    }
    assert groups == {(1e-4, 0.01): 4, (1e-4, 0.0): 2, (5e-4, 0.01): 4, (1e-3, 0.0): 4}
    make_optimizer(model, OptimisationConfig(learning_rate_multipliers={"norm": 0}))
    assert [name for name, p in model.named_parameters() if not p.requires_grad and "norm" in name] == [
        "norm.weight",
        "norm.bias",
    ]
    with pytest.raises(RunConfigError, match="no parameter has 'decoderr'"):
        make_optimizer(model, OptimisationConfig(learning_rate_multipliers={"decoderr": 0.5}))
    with pytest.raises(RunConfigError, match="Nothing to train"):
        make_optimizer(model.requires_grad_(False), settings)


def test_schedules_by_hand():
    model = nn.Linear(2, 2)

    def factors(progress, step=10_000, **settings):
        config = OptimisationConfig(learning_rate=1.0, warmup_steps=100, **settings)
        return [ProgressSchedule(make_optimizer(model, config), config).factor(step, p) for p in progress]

    assert factors([0, 0.5, 1, 2], final_fraction=0.1) == pytest.approx([1, 0.55, 0.1, 0.1])
    assert factors([0, 0.5, 0.9], schedule="step", step_fractions=[0.4, 0.8]) == pytest.approx([1, 0.1, 0.01])
    assert factors([0.5], schedule="constant") == [1]
    assert factors([0], step=49, schedule="constant") == pytest.approx([0.5])


def test_processes_share_each_batch():
    mixer = TaskMixer({"detection": 10, "cloze": 6}, batch_size=4, seed=3)
    shares = [list(ProcessShare(mixer, process, 2)) for process in range(2)]
    whole = list(mixer)
    assert len(shares[0]) == len(shares[1]) == len(whole)
    for batch, first, second in zip(whole, *shares, strict=True):
        assert {key[0] for key in first} == {key[0] for key in second}
        assert sorted(set(first + second)) == sorted(batch)
    single = TaskMixer({"detection": 5}, batch_size=4, shuffle=False)
    assert [len(share) for share in ProcessShare(single, 1, 2)] == [2, 1]


class OneProcess(types.SimpleNamespace):
    """What of an Accelerator saving needs."""

    is_main_process = True

    def wait_for_everyone(self):
        pass

    def save_state(self, folder):
        torch.save({"w": torch.ones(3)}, f"{folder}/model.bin")


def test_checkpoints_are_whole_and_the_last_ones_kept(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, OneProcess(), Progress(step=step, seconds=1.5), keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000002", "step-00000003"]
    assert last_checkpoint(tmp_path)[1] == Progress(step=3, seconds=1.5)

    weights = tmp_path / "checkpoints" / "step-00000003" / "model.bin"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.warns(UserWarning, match=r"step-00000003 is not a whole checkpoint \(model.bin has \d+ of \d+ bytes\)"):
        assert last_checkpoint(tmp_path)[1].step == 2
    weights.unlink()
    with pytest.warns(UserWarning, match="model.bin is missing"):
        assert last_checkpoint(tmp_path)[1].step == 2
    assert last_checkpoint(tmp_path / "nowhere") is None


def test_a_save_that_fails_leaves_no_checkpoint(tmp_path):
    class FullDisk(OneProcess):
        def save_state(self, folder):
            super().save_state(folder)
            raise OSError("no space left")

    save_checkpoint(tmp_path, OneProcess(), Progress(step=1), keep=2)
    with pytest.raises(OSError, match="no space"):
        save_checkpoint(tmp_path, FullDisk(), Progress(step=2), keep=2)
    assert last_checkpoint(tmp_path)[1].step == 1


def test_scores_of_evaluations_are_counted_and_nan_is_never_the_best():
    progress = Progress()
    taken = []
    for step, score in enumerate((0.1, float("nan"), 0.3, 0.3), 1):
        progress.step = step
        taken.append(progress.take_score(score))
    assert taken == [True, False, True, False]
    assert (progress.best, progress.best_step, progress.waited) == (0.3, 3, 1)


def test_the_log_forgets_what_is_done_again(tmp_path):
    lines = []
    log = RunLog(tmp_path / "log.jsonl", [lines.append])
    log.add("cloze", 1.0)
    log.add("cloze", 3.0)
    log.write({"step": 1, "means": log.take_means()})
    log.write({"step": 2, "loss": float("nan")})
    assert lines == [{"step": 1, "means": {"cloze": {"loss": 2.0, "batches": 2}}}, {"step": 2, "loss": None}]
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    log.forget_after(1)
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [1]


def test_files_are_whole(tmp_path):
    write_json(tmp_path / "new" / "a.json", {"x": float("inf"), "y": torch.tensor(2), "z": (1, tmp_path)})
    assert json.loads((tmp_path / "new" / "a.json").read_text()) == {"x": None, "y": 2, "z": [1, str(tmp_path)]}
    write_text(tmp_path / "b.txt", "old")
    with pytest.raises(TypeError):
        write_text(tmp_path / "b.txt", 5)
    assert (tmp_path / "b.txt").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.txt", "new"]
