"""The figures of a run in the trackers that Accelerate knows (TensorBoard and others), beside its own log."""

from collections.abc import Callable
from typing import Any

from unihema.training.run.config import RunConfig
from unihema.training.run.typed_settings import flat


def tracker_callback(accelerator: Any, config: RunConfig) -> Callable[[dict], None]:
    """Starts the trackers of a run; what it returns takes the lines of the run's log.

    Args:
        accelerator (`accelerate.Accelerator`): Was made with `log_with` these trackers.
        config ([`RunConfig`]): Recorded as the run's settings.
    """
    settings = {
        name: value if isinstance(value, (int, float, str, bool)) else str(value)
        for name, value in flat(config.to_dict()).items()
    }
    accelerator.init_trackers("unihema", config=settings)

    def track(line: dict) -> None:
        figures = {
            name: value
            for name, value in flat(line).items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        accelerator.log(figures, step=line.get("step"))

    return track


__all__ = ["tracker_callback"]
