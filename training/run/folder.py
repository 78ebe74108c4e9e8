"""Whether a run may use its output folder: a new one must not meet an old one, and a resumed one goes on as it began."""

import json
from pathlib import Path
from typing import Any

from unihema.errors import RunConfigError
from unihema.hub_cards.data_sources import RECORD_FILE
from unihema.training.run.checkpoint import Progress, last_checkpoint
from unihema.training.run.config import RunConfig


# How long a run goes on, and what it writes, may change on resuming.
LIMITS = ("optimisation.epochs", "optimisation.max_steps", "optimisation.time_limit_minutes")
FREE_SETTINGS = ("output_dir", "logging.", *LIMITS, "optimisation.device", "data.workers", "data.cache_images")


def check_unused_folder(folder: Path) -> None:
    """A new run beside an old one's checkpoints would be mixed up with it on resuming.

    Raises:
        RunConfigError: The folder holds checkpoints or a model.
    """
    taken = [*(folder / "checkpoints").glob("step-*"), *folder.glob("*model*.safetensors")]
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
    if not (folder / RECORD_FILE).is_file() or not (folder / "run_config.json").is_file():
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
    return json.loads(metrics.read_text(encoding="utf-8")) if metrics.is_file() else {}


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


__all__ = ["check_same_run", "check_unused_folder", "finished_report"]
