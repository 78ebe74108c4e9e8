"""Device, precision and processes of a run, through Accelerate."""

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers

from unihema.errors import RunConfigError
from unihema.training.run.config import OptimisationConfig


# The other processes wait this long for the one that evaluates.
EVALUATION_LIMIT = timedelta(hours=6)


def make_accelerator(
    settings: OptimisationConfig, trackers: Sequence[str] = (), folder: str | Path | None = None
) -> Accelerator:
    """The Accelerator of a run, also of a second run in one process with other settings.

    Args:
        settings ([`OptimisationConfig`]): Device, precision and accumulation.
        trackers (`Sequence[str]`): Names of Accelerate's trackers.
        folder (`str` or `Path`, *optional*): Where they write.

    Raises:
        RunConfigError: A tracker that Accelerate does not know or that is not installed.
    """

    def make() -> Accelerator:
        return Accelerator(
            cpu=settings.device == "cpu",
            mixed_precision=settings.mixed_precision,
            gradient_accumulation_steps=settings.accumulation,
            log_with=list(trackers) or None,
            project_dir=folder,
            kwargs_handlers=[
                # A task uses its own parts only, so every batch leaves some parameters without a gradient.
                DistributedDataParallelKwargs(find_unused_parameters=True),
                InitProcessGroupKwargs(timeout=EVALUATION_LIMIT),
            ],
        )

    found = [tracker.value for tracker in get_available_trackers()]
    if missing := [name for name in trackers if name not in found]:
        raise RunConfigError(
            f"logging.trackers: {missing[0]!r} is not there; Accelerate finds {', '.join(found) or 'none'}. "
            f"Install it (pip install {missing[0]}), or take it out."
        )
    try:
        return make()
    except ValueError:
        # Accelerate keeps the precision and device of the first run in a process, as in a notebook, for good.
        state = AcceleratorState()
        if state.num_processes > 1:
            raise
        # Private: Accelerate has no public way to forget it.
        state._reset_state(reset_partial_state=True)  # noqa: SLF001
        return make()
