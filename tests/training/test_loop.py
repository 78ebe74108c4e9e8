"""Training: it learns, resumes exactly, stops cleanly, and says what is wrong."""

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import VERY_TINY

import unihema
from unihema.training.checkpoint import last_checkpoint
from unihema.training.data.rows import DatasetError
from unihema.training.data.synthetic_folder import write_synthetic
from unihema.training.loop import TrainingError, TrainingInterrupted, train
from unihema.training.run_config import (
    DataConfig,
    LoggingConfig,
    ModelConfig,
    OptimisationConfig,
    RunConfig,
    RunConfigError,
)


# Most runs are about the steps; measuring every task at the end would only cost time.
UNMEASURED = {"data.val_split": ""}
TASKS = ("detection", "segmentation", "single_cell", "question_answering", "cloze")


@pytest.fixture(scope="module")
def smears(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smears")
    return write_synthetic(folder, 4, 2, seed=0, crops_per_field=2, width=224, height=168, crop_size=96, progress=False)


def run_config(smears, output, **changes) -> RunConfig:
    """A run of a few steps on all five tasks."""
    text = {**VERY_TINY["text_config"], "dropout_rate": 0.1}
    config = RunConfig(
        output_dir=str(output),
        data=DataConfig(
            folders=[str(smears)],
            image_sizes={task: {"longest_edge": 64} for task in TASKS},
            batch_size=dict.fromkeys(TASKS, 2),
            questions_per_image=2,
            workers=0,
        ),
        model=ModelConfig(overrides={**VERY_TINY, "text_config": text, "fusion_queries": 64}),
        optimisation=OptimisationConfig(max_steps=6, ema_decay=0.9, warmup_steps=2, learning_rate=1e-3),
        logging=LoggingConfig(progress=False, log_every=1, checkpoint_minutes=None),
    )
    return config.with_overrides(changes)


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
    assert model.config.trained_tasks == list(TASKS)
    assert "neutrophil" in model.config.label2id
    processor = unihema.UniHemaProcessor.from_pretrained(tmp_path / "run")
    assert processor.image_processor.task_sizes["detection"] == {"longest_edge": 64}
    assert RunConfig.load(tmp_path / "run").differences(run_config(smears, tmp_path / "run")) == {}


def test_a_resumed_run_equals_one_that_was_never_stopped(smears, tmp_path):
    train(run_config(smears, tmp_path / "whole", **UNMEASURED))

    def stop(line: dict) -> None:
        if line.get("step") == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    # The clock does not enter: the schedule of a run without a time limit hangs on its steps alone.
    with pytest.raises(TrainingInterrupted, match=r"Stopped at step 3.*--resume"):
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


def test_a_loss_that_is_no_number_stops_the_run(smears, tmp_path):
    config = run_config(
        smears,
        tmp_path / "run",
        **{
            "optimisation.learning_rate": 1e30,
            "optimisation.gradient_clipping": 0.0,
            "optimisation.warmup_steps": 1,
            "data.tasks": ["single_cell"],
            "data.cache_images": False,
        },
    )
    with pytest.raises((TrainingError, RuntimeError), match="is (nan|inf)|finite"):
        train(config)
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_training_goes_on_from_a_checkpoint(smears, tmp_path):
    train(run_config(smears, tmp_path / "first", **UNMEASURED, **{"data.tasks": ["detection"]}))
    again = run_config(
        smears,
        tmp_path / "second",
        **{"data.tasks": ["segmentation"], "model.initial_checkpoint": str(tmp_path / "first")},
    ).with_overrides({"model.overrides": {}})
    train(again)
    model = unihema.UniHemaForMultiTask.from_pretrained(tmp_path / "second")
    assert model.config.trained_tasks == ["detection", "segmentation"]


def test_a_class_the_checkpoint_does_not_know_is_named(smears, tmp_path):
    train(run_config(smears, tmp_path / "first", **UNMEASURED, **{"data.tasks": ["detection"]}))
    again = run_config(
        smears,
        tmp_path / "second",
        **{
            "data.tasks": ["detection"],
            "data.rename": {"red blood cell": "RBC"},
            "model.initial_checkpoint": str(tmp_path / "first"),
        },
    ).with_overrides({"model.overrides": {}})
    with pytest.raises(DatasetError, match="unknown class 'RBC'"):
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
    assert lines[-1]["learning_rate"] < 0.5 * max(line["learning_rate"] for line in lines)


def test_missing_data_is_named(tmp_path):
    config = RunConfig(output_dir=str(tmp_path / "run"), data=DataConfig(folders=[str(tmp_path / "nowhere")]))
    with pytest.raises(DatasetError, match="nowhere: no such folder"):
        train(config)
    assert not (tmp_path / "run").exists()
