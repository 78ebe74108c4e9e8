"""Whether a run may use its output folder: a new one must not meet an old one, and a resumed one goes on as it began."""

from pathlib import Path

from unihema.errors import RunConfigError
from unihema.training.run.checkpoint import Progress
from unihema.training.run.config import RunConfig


# How long a run goes on, and what it writes, may change on resuming.
FREE_SETTINGS = (
    "output_dir",
    "logging.",
    "optimisation.epochs",
    "optimisation.max_steps",
    "optimisation.time_limit_minutes",
    "optimisation.device",
    "data.workers",
    "data.cache_images",
)


def check_unused_folder(folder: Path) -> None:
    """A new run beside an old one's checkpoints would be mixed up with it on resuming.

    Raises:
        RunConfigError: The folder holds checkpoints or a model.
    """
    taken = [*(folder / "checkpoints").glob("step-*"), *folder.glob("*model*.safetensors")]
    if taken:
        raise RunConfigError(
            f"output_dir {folder} holds {taken[0].relative_to(folder)} of an earlier run. Go on with it "
            "(--resume, or resume=True), delete the folder, or train into another."
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
    changed = {
        name: pair
        for name, pair in config.differences(RunConfig.load(folder)).items()
        if not name.startswith(FREE_SETTINGS)
    }
    if changed:
        name, (now, before) = next(iter(changed.items()))
        raise RunConfigError(
            f"{folder} was begun with {name}={before!r}, now it is {now!r}. Resume with the same settings, or "
            "train into another folder."
        )


__all__ = ["check_same_run", "check_unused_folder"]
