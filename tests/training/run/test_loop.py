"""Training: it learns, resumes exactly, stops cleanly, and says what is wrong."""

import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import TASKS, run_config

import unihema
from unihema.errors import DatasetError, OutputError, RunConfigError, TrainingError, TrainingInterrupted
from unihema.training.evaluation import evaluate_model
from unihema.training.run.build import validation_rows
from unihema.training.run.checkpoint import last_checkpoint
from unihema.training.run.config import DataConfig, RunConfig
from unihema.training.run.loop import train


# Most runs are about the steps; measuring every task at the end would only cost time.
UNMEASURED = {"data.val_split": ""}


def step_losses(folder) -> list[float]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["event"] == "step"]


def test_a_run_leaves_a_checkpoint_that_every_class_loads(smears, tmp_path):
    report = train(run_config(smears, tmp_path / "run"))
    assert set(report) == set(TASKS)
    written = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"run_config.json", "log.jsonl", "metrics.json", "metrics.md", "README.md", "config.json"} <= written
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()).keys() == report.keys()
    model = unihema.UniHemaForMultiTask.from_pretrained(tmp_path / "run")
    assert model.config.trained.tasks == list(TASKS)
    assert "neutrophil" in model.config.label2id
    processor = unihema.UniHemaProcessor.from_pretrained(tmp_path / "run")
    assert processor.image_processor.task_sizes["detection"] == {"longest_edge": 64}
    assert RunConfig.load(tmp_path / "run").differences(run_config(smears, tmp_path / "run")) == {}


def test_a_resumed_run_equals_one_that_was_never_stopped(smears, tmp_path):
    train(run_config(smears, tmp_path / "whole", **UNMEASURED))

    def stop(line: dict) -> None:
        if line.get("step") == 3:
            signal.raise_signal(signal.SIGTERM)

    # The clock does not enter: the schedule of a run without a time limit hangs on its steps alone.
    with pytest.raises(TrainingInterrupted, match=r"Stopped at step 3.*same command goes on"):
        train(run_config(smears, tmp_path / "stopped", **UNMEASURED), callbacks=[stop])
    assert not (tmp_path / "stopped" / "model.safetensors").exists()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    train(run_config(smears, tmp_path / "stopped", **UNMEASURED), resume=True)
    assert step_losses(tmp_path / "stopped") == step_losses(tmp_path / "whole")
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    resumed = load_file(tmp_path / "stopped" / "model.safetensors")
    assert whole.keys() == resumed.keys()
    for name in whole:
        torch.testing.assert_close(resumed[name], whole[name], rtol=0, atol=0)


def test_a_damaged_checkpoint_is_passed_over(smears, tmp_path):
    train(run_config(smears, tmp_path / "run", **UNMEASURED, **{"logging.checkpoint_steps": 3}))
    newest, progress = last_checkpoint(tmp_path / "run")
    assert progress.step == 6
    (newest / "progress.json").write_text("{")
    with pytest.warns(UserWarning, match="not a whole checkpoint"):
        _, progress = last_checkpoint(tmp_path / "run")
    assert progress.step == 3


def test_other_settings_do_not_resume(smears, tmp_path):
    train(run_config(smears, tmp_path / "run", **UNMEASURED))
    with pytest.raises(RunConfigError, match=r"optimisation.learning_rate=0.001, now it is 0.5"):
        train(run_config(smears, tmp_path / "run", **UNMEASURED, **{"optimisation.learning_rate": 0.5}), resume=True)


def test_a_finished_run_is_not_run_again_and_can_be_trained_on(smears, tmp_path):
    folder, lines = tmp_path / "run", []

    def run(steps: int) -> dict:
        limit = {"optimisation.max_steps": steps, "data.tasks": ["single_cell"]}
        return train(run_config(smears, folder, **limit), resume=True, callbacks=[lines.append])

    report = run(2)
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    lines.clear()
    assert run(2) == report and lines == []
    assert times == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    run(3)
    assert step_losses(folder) and last_checkpoint(folder)[1].step == 3
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(RunConfigError, match="no checkpoint is left to go on from"):
        run(4)
    # What is gone is made again.
    (folder / "model.safetensors").unlink()
    run(3)
    assert (folder / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("task", "message"), [("single_cell", "single_cell loss is nan"), ("detection", "detection loss is nan")]
)
def test_a_loss_that_is_no_number_stops_the_run(smears, tmp_path, monkeypatch, task, message):
    """The weights are spoilt after step 2, as a broken file or a division by zero would."""
    from unihema.training.run import loop

    class Spoils(loop.ExponentialMovingAverage):
        def update(self, model):
            super().update(model)
            if self.updates == 2:
                spoil(model)

    def spoil(model):
        with torch.no_grad():
            next(model.model.visual_backbone.parameters()).fill_(float("nan"))

    monkeypatch.setattr(loop, "ExponentialMovingAverage", Spoils)
    config = run_config(smears, tmp_path / "run", **{"data.tasks": [task], "logging.checkpoint_steps": 1})
    with pytest.raises(TrainingError, match=rf"at step 2: the {message}.*with .*\.png.*lower the learning rate"):
        train(config)
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_a_gradient_that_is_no_number_does_not_reach_the_weights(smears, tmp_path, monkeypatch):
    from accelerate import Accelerator

    backward = Accelerator.backward

    def broken(self, loss, **options):
        backward(self, loss * float("inf") if (tmp_path / "run" / "checkpoints" / "step-00000002").is_dir() else loss)

    monkeypatch.setattr(Accelerator, "backward", broken)
    changes = {"data.tasks": ["single_cell"], "logging.checkpoint_steps": 1, "optimisation.gradient_clipping": 0.0}
    with pytest.raises(
        TrainingError, match=r"at step 2: the gradient of the single_cell loss is (nan|inf), with .*\.png"
    ):
        train(run_config(smears, tmp_path / "run", **changes))
    path, progress = last_checkpoint(tmp_path / "run")
    assert progress.step == 2
    assert all(value.isfinite().all() for value in load_file(path / "model.safetensors").values())


def test_a_used_folder_is_not_trained_into(smears, tmp_path):
    train(run_config(smears, tmp_path / "run", **UNMEASURED, **{"optimisation.max_steps": 1}))
    with pytest.raises(RunConfigError, match=r"holds .* of an earlier run.*--overwrite"):
        train(run_config(smears, tmp_path / "run", **UNMEASURED))


def test_the_best_weights_are_kept(smears, tmp_path, monkeypatch):
    """The second of three evaluations is the best, so its weights are saved at the end."""
    from unihema.training.run import loop

    scores = iter([0.2, 0.9, 0.4, 0.9])
    monkeypatch.setattr(loop, "headline", lambda report: (next(scores), "score"))
    weights = {}

    def keep(line: dict) -> None:
        if line["event"] == "evaluation" and line["epoch"] == 2:
            weights.update(load_file(tmp_path / "run" / "best" / "model.safetensors"))

    changes = {
        "data.tasks": ["single_cell"],
        "data.steps_per_epoch": 3,
        # The odd epochs end between two steps, and are evaluated after the next.
        "optimisation.accumulation": 2,
        "optimisation.max_steps": 5,
        "logging.evaluate_every": 1,
        "logging.keep_best": True,
    }
    train(run_config(smears, tmp_path / "run", **changes), callbacks=[keep])
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    evaluated = [(line["epoch"], line["step"]) for line in lines if line["event"] == "evaluation"]
    assert evaluated == [(1, 2), (2, 3), (3, 5)]
    saved = load_file(tmp_path / "run" / "model.safetensors")
    assert saved.keys() == weights.keys()
    for name, value in weights.items():
        torch.testing.assert_close(saved[name], value, rtol=0, atol=0)


def test_mixed_precision_trains_and_what_is_saved_is_measured_in_full(smears, tmp_path):
    report = train(
        run_config(smears, tmp_path / "run", **{"optimisation.mixed_precision": "bf16", "optimisation.device": "cpu"})
    )
    config = RunConfig.load(tmp_path / "run")
    model = unihema.UniHemaForMultiTask.from_pretrained(tmp_path / "run")
    processor = unihema.UniHemaProcessor.from_pretrained(tmp_path / "run")
    again = evaluate_model(model, processor, validation_rows(config, TASKS), progress=False)
    assert again == report


def test_the_log_has_every_task_of_the_mix(smears, tmp_path):
    changes = {"logging.log_every": 6, "data.steps_per_epoch": 6, "data.temperature": 0.0}
    train(run_config(smears, tmp_path / "run", **UNMEASURED, **changes))
    first, second, end = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert first["step"] == 1 and end["event"] == "end"
    assert sum(entry["batches"] for entry in second["means"].values()) == 5
    assert {first["task"], *second["means"]} == set(TASKS)


def test_training_goes_on_from_a_checkpoint(smears, tmp_path):
    train(run_config(smears, tmp_path / "first", **UNMEASURED, **{"data.tasks": ["detection"]}))
    again = run_config(
        smears,
        tmp_path / "second",
        **{"data.tasks": ["segmentation"], "model.initial_checkpoint": str(tmp_path / "first")},
    ).with_overrides({"model.overrides": {}})
    train(again)
    model = unihema.UniHemaForMultiTask.from_pretrained(tmp_path / "second")
    assert model.config.trained.tasks == ["detection", "segmentation"]


def test_a_class_the_checkpoint_does_not_know_is_named(smears, tmp_path):
    train(run_config(smears, tmp_path / "first", **UNMEASURED, **{"data.tasks": ["detection"]}))
    again = run_config(
        smears,
        tmp_path / "second",
        **{
            "data.tasks": ["detection"],
            "data.rename": {"red blood cell": "sickle cell"},
            "model.initial_checkpoint": str(tmp_path / "first"),
        },
    ).with_overrides({"model.overrides": {}})
    with pytest.raises(DatasetError, match="unknown class 'sickle cell'"):
        train(again)


def test_accumulation_counts_optimizer_steps(smears, tmp_path):
    train(
        run_config(
            smears, tmp_path / "run", **UNMEASURED, **{"optimisation.accumulation": 2, "optimisation.max_steps": 2}
        )
    )
    assert len(step_losses(tmp_path / "run")) == 2


def test_a_time_limit_ends_the_run_with_an_annealed_rate(smears, tmp_path):
    config = run_config(
        smears,
        tmp_path / "run",
        **UNMEASURED,
        **{"optimisation.time_limit_minutes": 0.1, "optimisation.max_steps": None, "data.tasks": ["single_cell"]},
    )
    train(config)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["event"] == "step"]
    assert lines[-1]["learning_rate"] < 0.5 * max(line["learning_rate"] for line in lines)


@pytest.mark.parametrize("remove", ["", "config.json", "model.safetensors", "tokenizer.json"])
def test_an_initial_checkpoint_must_be_whole(smears, tmp_path, remove):
    first = tmp_path / "first"
    if remove:
        train(run_config(smears, first, **UNMEASURED, **{"optimisation.max_steps": 1, "data.tasks": ["single_cell"]}))
        (first / remove).unlink()
    again = run_config(smears, tmp_path / "second", **{"model.initial_checkpoint": str(first), "model.overrides": {}})
    with pytest.raises(
        RunConfigError, match="no such folder" if not remove else "lacks .*(json|weights).*copy the whole"
    ):
        train(again.with_overrides({"model.overrides": {}}))


@pytest.mark.parametrize("name", ["\ud800", "no_such_folder", "a/b/c", "folder"])
def test_a_tokenizer_that_is_none_is_named(smears, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "tokenizer.json").write_text('{"model": 1}')
    config = run_config(smears, tmp_path / "run", **{"data.tasks": ["single_cell"], "model.tokenizer": name})
    with pytest.raises(RunConfigError, match=r"model\.tokenizer .*no T5 tokenizer can be read there .*leave it out"):
        train(config)


def test_a_task_without_data_is_named(smears, tmp_path):
    shutil.copytree(smears, tmp_path / "data")
    (tmp_path / "data" / "train" / "cloze.jsonl").unlink()
    config = run_config(tmp_path / "data", tmp_path / "run", **{"data.tasks": ["cloze", "single_cell"]})
    with pytest.raises(DatasetError, match="No data for cloze in split 'train'.*they have single_cell"):
        train(config)


def test_missing_data_is_named(tmp_path):
    config = RunConfig(output_dir=str(tmp_path / "run"), data=DataConfig(folders=[str(tmp_path / "nowhere")]))
    with pytest.raises(DatasetError, match="nowhere: no such folder"):
        train(config)
    assert not (tmp_path / "run").exists()


def test_another_run_in_the_folder_is_named_and_leftovers_of_killed_ones_go(smears, tmp_path):
    folder = tmp_path / "run"
    program = (
        f"from unihema.files import exclusive\nfrom pathlib import Path\nwith exclusive(Path({str(folder)!r})):\n    "
    )
    program += "print('held', flush=True); input()"
    holder = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    config = run_config(smears, folder, **UNMEASURED, **{"optimisation.max_steps": 1})
    with pytest.raises(OutputError, match=rf"run: another run \(process {holder.pid} on .*\) is writing there"):
        train(config)
    holder.kill()
    holder.wait(timeout=600)
    for place in (
        "checkpoints/.unihema-step-00000007.partial",
        ".unihema-other.host-7-abc.partial",
        "best/.unihema-x.partial",
    ):
        (folder / place).mkdir(parents=True)
    train(config)
    assert not list(folder.rglob("*.partial"))


def test_views_of_a_data_set_that_is_not_there_are_refused_and_nothing_is_written(smears, tmp_path):
    config = run_config(smears, tmp_path / "run", **{"augmentation.data_sets": {"elsewhere": {"colour": 0.0}}})
    with pytest.raises(
        RunConfigError, match=r"augmentation.data_sets names elsewhere: no such data set. There are \w+"
    ):
        train(config)
    assert not (tmp_path / "run").exists()
