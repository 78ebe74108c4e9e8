"""Device, precision and processes of a run, through Accelerate."""

from datetime import timedelta

from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.state import AcceleratorState

from unihema.training.run_config import OptimisationConfig


# The other processes wait this long for the one that evaluates.
EVALUATION_LIMIT = timedelta(hours=6)


def make_accelerator(settings: OptimisationConfig) -> Accelerator:
    """The Accelerator of a run, also of a second run in one process with other settings.

    Args:
        settings ([`OptimisationConfig`]): Device, precision and accumulation.
    """

    def make() -> Accelerator:
        return Accelerator(
            cpu=settings.device == "cpu",
            mixed_precision=settings.mixed_precision,
            gradient_accumulation_steps=settings.accumulation,
            kwargs_handlers=[
                # A task uses its own parts only, so every batch leaves some parameters without a gradient.
                DistributedDataParallelKwargs(find_unused_parameters=True),
                InitProcessGroupKwargs(timeout=EVALUATION_LIMIT),
            ],
        )

    try:
        return make()
    except ValueError:
        # Accelerate keeps the precision and device of the first run in a process, as in a notebook, for good.
        state = AcceleratorState()
        if state.num_processes > 1:
            raise
        state._reset_state(reset_partial_state=True)
        return make()
