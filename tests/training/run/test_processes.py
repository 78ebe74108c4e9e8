"""Runs in processes of their own: two together learn what one does, and a killed one loses nothing."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import VERY_TINY
from tiny_runs import TASKS, run_config


PROGRAM = str(Path(__file__).with_name("run_process.py"))
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONUNBUFFERED": "1"}
KILLS = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system sends processes no signals")
# What differs between processes by design: dropout and the noise of denoising queries.
WITHOUT_CHANCE = {
    **VERY_TINY,
    "text_config": {**VERY_TINY["text_config"], "dropout_rate": 0.0},
    "fusion_queries": 64,
    "dropout": 0.0,
    "single_cell_dropout": 0.0,
    "denoising_queries": 0,
    "freeze_backbone_norm": True,
}


def losses(folder: Path) -> list[tuple[str, float]]:
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [(line["task"], line["loss"]) for line in lines if line["event"] == "step"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_two_processes_learn_what_one_does(smears, tmp_path):
    """The same loss at every step of every task (within 1e-4) for the same batches of four, shared out or not; cells,
    tokens and labelled attributes are counted over both. With dropout and denoising off: their noise is each process's
    own."""
    changes = {
        "data.val_split": "",
        "model.overrides": WITHOUT_CHANCE,
        "optimisation.max_steps": 8,
        # What a run has that says nothing; two processes on one GPU are not to be had.
        "optimisation.device": "cpu" if torch.cuda.is_available() else "auto",
        "data.temperature": 0.0,
    }
    one = run_config(smears, tmp_path / "one", **changes, **{"data.batch_size": dict.fromkeys(TASKS, 4)})
    two = run_config(smears, tmp_path / "two", **changes, **{"data.batch_size": dict.fromkeys(TASKS, 2)})
    files = [config.save(tmp_path / name) for name, config in (("a", one), ("b", two))]
    subprocess.run([sys.executable, PROGRAM, files[0]], env=ENVIRONMENT, check=True, capture_output=True, timeout=600)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    subprocess.run([*launch, PROGRAM, files[1]], env=ENVIRONMENT, check=True, capture_output=True, timeout=600)
    alone, shared = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert [task for task, _ in alone] == [task for task, _ in shared] and {task for task, _ in alone} == set(TASKS)
    assert [loss for _, loss in shared] == pytest.approx([loss for _, loss in alone], abs=1e-4, rel=1e-4)
    assert (
        max(
            float((a - b).abs().max())
            for a, b in zip(weights(tmp_path / "one").values(), weights(tmp_path / "two").values())
        )
        < 1e-3
    )


def steps_done(folder: Path) -> int:
    log = folder / "log.jsonl"
    return log.read_text().count('"event": "step"') if log.is_file() else 0


def killed_run(config, folder: Path, chance: random.Random, while_saving: bool) -> int:
    """Runs until it is killed, twice: by SIGKILL at some moment of some step or in the midst of a save. How often it was, before
    it came to its end."""
    file = config.save(folder.parent / f"{folder.name}-config")
    # A run that was killed does some steps again, so the second moment is late enough to be beyond the first.
    moments = [chance.randint(1, 10), chance.randint(13, 20)]
    kills = 0
    while not (folder / "config.json").is_file():
        process = subprocess.Popen(
            [sys.executable, PROGRAM, file, "--resume"],
            env=ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        if kills < len(moments):
            while process.poll() is None and steps_done(folder) < moments[kills]:
                time.sleep(0.0005)
            time.sleep(chance.uniform(0, 0.03))
            while (
                while_saving
                and process.poll() is None
                and not any((folder / "checkpoints").glob(".unihema-step-*.partial/*"))
            ):
                time.sleep(0.0005)
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                kills += 1
        _, errors = process.communicate(timeout=600)
        assert process.returncode in (0, -signal.SIGKILL), errors.decode()[-2000:]
    return kills


def resumable(smears, output):
    changes = {"data.val_split": "", "optimisation.max_steps": 25, "logging.checkpoint_steps": 2}
    return run_config(smears, output, **changes, **{"optimisation.device": "cpu"})


@pytest.fixture(scope="module")
def uninterrupted(smears, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "uninterrupted"
    file = resumable(smears, folder).save(folder.parent / "config")
    subprocess.run([sys.executable, PROGRAM, file], env=ENVIRONMENT, check=True, capture_output=True, timeout=600)
    return folder


@KILLS
def test_a_run_that_is_killed_while_it_saves_ends_as_if_it_had_not_been(smears, uninterrupted, tmp_path):
    check_killed(smears, uninterrupted, tmp_path, 0, while_saving=True)


@KILLS
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(11))
def test_eleven_killed_runs_end_as_if_they_had_not_been(smears, uninterrupted, tmp_path, seed):
    check_killed(smears, uninterrupted, tmp_path, seed, while_saving=seed % 2 == 1)


def check_killed(smears, uninterrupted, tmp_path, seed, while_saving):
    """The same weights to the bit, and the same log, after two kills."""
    folder = tmp_path / "killed"
    assert killed_run(resumable(smears, folder), folder, random.Random(seed), while_saving) == 2
    expected = weights(uninterrupted)
    found = weights(folder)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert losses(folder) == losses(uninterrupted)
