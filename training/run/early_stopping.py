"""Stopping a run that no longer gets better."""

import math
from pathlib import Path

from unihema.errors import FileMissingError
from unihema.training.run.checkpoint import Progress, last_checkpoint


class EarlyStopping:
    """Stops after a number of evaluations without a better one. Where it stands is kept in the run's progress, so that a
    resumed run stops where the other would have.

    Args:
        patience (`int`, *optional*): Evaluations to wait for a better one; `None` never stops.
    """

    def __init__(self, patience: int | None):
        self.patience = patience

    def take(self, score: float, progress: Progress) -> bool:
        """Notes an evaluation.

        Args:
            score (`float`): The higher the better; NaN never is.
            progress ([`Progress`]): `best`, `best_step` and `waited` are updated.

        Returns:
            `bool`: Whether it is the best so far.
        """
        better = not math.isnan(score) and (progress.best is None or score > progress.best)
        if better:
            progress.best, progress.best_step, progress.waited = score, progress.step, 0
        else:
            progress.waited += 1
        return better

    def is_over(self, progress: Progress) -> bool:
        """Whether the run should stop."""
        return self.patience is not None and progress.waited >= self.patience


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


__all__ = ["EarlyStopping", "best_step"]
