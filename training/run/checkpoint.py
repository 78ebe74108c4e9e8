"""The folder of a run: its checkpoints, whole or absent and resumed exactly, its trained model, and whether a run may use it."""

import math
import os
import shutil
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from unihema.errors import FileMissingError, OutputError, RunConfigError, TrainingError
from unihema.files import json_sha256, plain, read_json_object, remove_whole, scratch_folder, shortened, write_json
from unihema.hub_cards.data_record import RECORD_FILE
from unihema.training.adapters import CONFIG, load_adapter_weights, save_adapter
from unihema.training.evaluation.report import read_figures
from unihema.training.run.config import MEANS, RunConfig


PROGRESS_FILE = "progress.json"
# Of a model, whole or in parts, or of an adapter.
_WEIGHTS = "*model*.safetensors"
# How long a run goes on, and what it writes, may change on resuming.
LIMITS = ("optimisation.epochs", "optimisation.max_steps", "optimisation.time_limit_minutes")
FREE_SETTINGS = ("output_dir", "logging.", *LIMITS, *MEANS)


@dataclass
class Progress:
    """Where a run stands.

    Args:
        step (`int`): Optimizer steps done.
        batch (`int`): Batches done, over all epochs.
        seconds (`float`): Time spent training.
        best (`float`, *optional*): Best score of the evaluations so far.
        best_step (`int`): Optimizer steps done at that one.
        waited (`int`): Evaluations since then.
        evaluated (`int`): Last epoch after which the model was evaluated.
        processes (`int`): How many processes share each batch.
        batches_per_epoch (`int`): Batches of a pass over the data.
    """

    step: int = 0
    batch: int = 0
    seconds: float = 0.0
    best: float | None = None
    best_step: int = 0
    waited: int = 0
    evaluated: int = 0
    processes: int = 1
    batches_per_epoch: int = 0

    def take_score(self, score: float) -> bool:
        """Notes an evaluation; whether it is the best so far. Resumed runs stop early where others do, since it is kept here.

        Args:
            score (`float`): The higher the better; NaN never is.
        """
        better = not math.isnan(score) and (self.best is None or score > self.best)
        if better:
            self.best, self.best_step, self.waited = score, self.step, 0
        else:
            self.waited += 1
        return better


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
    # One name in every process; what a killed run left of it is removed with its other files.
    partial = checkpoints / f".unihema-{path.name}.partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    # Every process writes its own random state.
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        sizes = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
        state = plain({**asdict(progress), "files": sizes})
        write_json(partial / PROGRESS_FILE, {**state, "sha256": json_sha256(state)})
        if path.exists():
            remove_whole(path)
        os.replace(partial, path)
        # Damaged ones do not count, or they would push a whole one out.
        for old in [other for other in _step_folders(folder) if _read(other)[1] is None][:-keep]:
            remove_whole(old)
    accelerator.wait_for_everyone()
    return path


def last_checkpoint(folder: str | Path) -> tuple[Path, Progress] | None:
    """The newest whole checkpoint of a run and its progress; damaged ones are passed over with a warning."""
    for path in reversed(_step_folders(folder)):
        progress, problem = _read(path)
        if problem is None:
            return path, progress
        warnings.warn(f"{path} is not a whole checkpoint ({problem}) and is passed over.", stacklevel=2)
    return None


def best_step(folder: str | Path) -> int:
    """Optimizer steps after which a finished run was best; all of them where it was not evaluated in between.

    Args:
        folder (`str` or `Path`): The run's folder.

    Raises:
        FileNotFoundError: It has no whole checkpoint.
    """
    found = last_checkpoint(folder)
    if found is None:
        raise FileMissingError(f"{folder}: no checkpoint of a run.")
    return found[1].best_step or found[1].step


def save_trained(model, processor, folder: str | Path) -> None:
    """Saves a model and its processor, whole files only; an older model in the folder is replaced.

    Args:
        model (`PreTrainedModel`): The model; of one with an adapter, the adapter is saved.
        processor (`UniHemaProcessor`, *optional*): Its processor.
        folder (`str` or `Path`): Where.

    Raises:
        OutputError: It cannot be written.
    """
    folder = Path(folder)
    with scratch_folder(folder) as partial:
        if getattr(model, "peft_config", None):
            save_adapter(model, partial)
        else:
            model.save_pretrained(partial)
        if processor is not None:
            processor.save_pretrained(partial)
        for file in partial.iterdir():
            # safetensors makes files that only their owner reads; a lab shares its models.
            file.chmod(partial.stat().st_mode & 0o666)
        # The configuration goes last: a folder that has one is a model.
        try:
            for file in sorted(partial.iterdir(), key=lambda file: file.name in ("config.json", CONFIG)):
                os.replace(file, folder / file.name)
        except OSError as error:
            raise OutputError(f"{folder}: the model cannot be written ({shortened(error)}).") from error


def load_trained(model, folder: str | Path):
    """A model saved by [`save_trained`]; of an adapter, its weights in the model that has it.

    Args:
        model (`PreTrainedModel`): A model like the one that was saved.
        folder (`str` or `Path`): Where it was saved.

    Returns:
        `PreTrainedModel`: A new model on the same device, or for adapters the same one.
    """
    if getattr(model, "peft_config", None):
        load_adapter_weights(model, folder)
        return model
    return type(model).from_pretrained(folder).to(model.device)


def _step_folders(folder: str | Path) -> list[Path]:
    return sorted((Path(folder) / "checkpoints").glob("step-*"))


def _read(path: Path) -> tuple[Progress | None, str | None]:
    """The progress a checkpoint records, or what is wrong with it."""
    try:
        values = read_json_object(path / PROGRESS_FILE, TrainingError, "")
        digest = values.pop("sha256", None)
        if digest != json_sha256(values):
            return None, f"{PROGRESS_FILE} is not what was written"
        sizes = dict(values.pop("files"))
        progress = Progress(**values)
    except (TrainingError, TypeError, KeyError):
        return None, f"{PROGRESS_FILE} is missing or broken"
    for name, size in sizes.items():
        file = path / name
        if not file.is_file():
            return None, f"{name} is missing"
        if file.stat().st_size != size:
            return None, f"{name} has {file.stat().st_size} of {size} bytes"
    return progress, None


def check_unused_folder(folder: Path) -> None:
    """A new run beside an old one's checkpoints would be mixed up with it on resuming.

    Raises:
        RunConfigError: The folder holds checkpoints or a model.
    """
    taken = [*(folder / "checkpoints").glob("step-*"), *folder.glob(_WEIGHTS)]
    if taken:
        raise RunConfigError(
            f"output_dir {folder} holds {taken[0].relative_to(folder)} of an earlier run. Go on with it "
            "(resume=True), start anew (--overwrite), or train into another."
        )


def check_same_run(config: RunConfig, progress: Progress, processes: int) -> None:
    """A run goes on only as it began.

    Args:
        config ([`RunConfig`]): Settings of now; those of then are in its output folder.
        progress ([`Progress`]): Of the checkpoint to resume from.
        processes (`int`): How many there are now.

    Raises:
        RunConfigError: Other settings, or another number of processes.
    """
    folder = config.output_dir
    if progress.processes != processes:
        raise RunConfigError(
            f"{folder} was begun with {progress.processes} process(es), now there are {processes}: batches would differ. "
            "Resume with as many."
        )
    _check_same_settings(config)


def finished_report(config: RunConfig) -> dict[str, Any] | None:
    """The figures of a run that is finished; `None` where it is still to be trained, or trained on to another limit.

    Args:
        config ([`RunConfig`]): The run.

    Raises:
        RunConfigError: It is finished with other settings, or has to go on and has no checkpoint to go on from.
    """
    folder = Path(config.output_dir)
    # The record of the data is written last, and taken away when a run goes on.
    there = (folder / RECORD_FILE).is_file() and (folder / "run_config.json").is_file()
    if not there or not any(folder.glob(_WEIGHTS)):
        return None
    changed = _check_same_settings(config)
    if any(name in changed for name in LIMITS):
        if last_checkpoint(folder) is None:
            raise RunConfigError(
                f"{folder} is finished, and no checkpoint is left to go on from. Start anew (--overwrite), or train into another "
                "folder with model.initial_checkpoint."
            )
        return None
    metrics = folder / "metrics.json"
    return read_figures(metrics) if metrics.exists() else {}


def _check_same_settings(config: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Settings that differ from those in the output folder and may."""
    folder = config.output_dir
    differences = config.differences(RunConfig.load(folder))
    for name, (now, before) in differences.items():
        if not name.startswith(FREE_SETTINGS):
            raise RunConfigError(
                f"{folder} was begun with {name}={before!r}, now it is {now!r}. Go on with the same settings, start anew "
                "(--overwrite), or train into another folder."
            )
    return differences
