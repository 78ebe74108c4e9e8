"""Checkpoints of a run: whole or absent, the last ones kept, resumed exactly."""

import json
import os
import shutil
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

from unihema.training.files import write_json


PROGRESS_FILE = "progress.json"


@dataclass
class Progress:
    """Where a run stands.

    Args:
        step (`int`): Optimizer steps done.
        batch (`int`): Batches done, over all epochs.
        seconds (`float`): Time spent training.
        best (`float`, *optional*): Best score of the evaluations so far.
    """

    step: int = 0
    batch: int = 0
    seconds: float = 0.0
    best: float | None = None


def save_checkpoint(folder: str | Path, accelerator, progress: Progress, keep: int) -> Path:
    """Saves weights, optimizer, random states and progress, and deletes all but the last `keep` checkpoints.

    Args:
        folder (`str` or `Path`): The run's folder.
        accelerator (`accelerate.Accelerator`): Holds what is saved.
        progress ([`Progress`]): Where the run stands.
        keep (`int`): Checkpoints to keep.
    """
    checkpoints = Path(folder) / "checkpoints"
    path = checkpoints / f"step-{progress.step:08d}"
    partial = checkpoints / f".{path.name}.partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    # Every process writes its own random state.
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_json(partial / PROGRESS_FILE, asdict(progress))
        shutil.rmtree(path, ignore_errors=True)
        os.replace(partial, path)
        for old in sorted(checkpoints.glob("step-*"))[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    return path


def last_checkpoint(folder: str | Path) -> tuple[Path, Progress] | None:
    """The newest whole checkpoint of a run and its progress; damaged ones are passed over with a warning."""
    for path in sorted((Path(folder) / "checkpoints").glob("step-*"), reverse=True):
        try:
            return path, Progress(**json.loads((path / PROGRESS_FILE).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            warnings.warn(f"{path} is not a whole checkpoint and is passed over.", stacklevel=2)
    return None
