"""`log.jsonl`: what happened in a run, a line an event; and the same figures in the trackers that Accelerate knows."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from unihema.errors import OutputError
from unihema.files import plain, write_text
from unihema.training.run.config import RunConfig, flat


class RunLog:
    """Appends lines to a run's log, and gathers the losses in between.

    Args:
        path (`Path`): The file.
        callbacks (`Sequence[Callable[[dict], None]]`): Called with every line.
        active (`bool`): Whether this process writes.
    """

    def __init__(self, path: Path, callbacks: Sequence[Callable[[dict], None]] = (), active: bool = True):
        self.path = path
        self.callbacks = callbacks
        self.active = active
        self._losses: dict[str, list[float]] = {}
        self._images = 0
        self._since = time.monotonic()

    def add(self, task: str, loss: float) -> None:
        """Takes in the loss of a batch."""
        self._losses.setdefault(task, []).append(loss)

    def count_images(self, images: int) -> None:
        """Takes in how many images a step had."""
        self._images += images

    def images_per_second(self) -> float:
        """Images since the last call, a second."""
        now = time.monotonic()
        rate = self._images / max(now - self._since, 1e-9)
        self._images, self._since = 0, now
        return rate

    def take_means(self) -> dict[str, dict[str, Any]]:
        """Mean loss and batches of each task since the last call."""
        means = {
            task: {"loss": sum(losses) / len(losses), "batches": len(losses)} for task, losses in self._losses.items()
        }
        self._losses.clear()
        return means

    def write(self, line: dict[str, Any]) -> None:
        """Appends a line."""
        if not self.active:
            return
        line = plain(line)
        self._check_place()
        try:
            with open(self.path, "a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written ({error.strerror or error}).") from error
        for callback in self.callbacks:
            callback(line)

    def forget_after(self, step: int) -> None:
        """Takes out what a run did after the checkpoint it resumes from: it is about to do that again. Lines that cannot be read
        go too: the last one of a run that was killed may be half written."""
        self._check_place()
        if not self.active or not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
        write_text(self.path, "".join(line + "\n" for line in lines if _is_of(line, step)))

    def _check_place(self) -> None:
        # A pipe would be waited for.
        if self.path.exists() and not self.path.is_file():
            raise OutputError(f"{self.path}: cannot be written, since something else than a file is there. Delete it.")


def _is_of(line: str, step: int) -> bool:
    """Whether a line of the log is of that step or an earlier one."""
    try:
        return json.loads(line).get("step", 0) <= step
    except (ValueError, TypeError, AttributeError, RecursionError):
        return False


class Waiting:
    """What the steps of a run spend their time on: waiting for data, computing on the processor, waiting for the card.

    On a CPU the model computes on the processor; beside a GPU the processor only tells it what to do.
    """

    NAMES = ("data", "processor", "card")

    def __init__(self):
        self.seconds = dict.fromkeys(self.NAMES, 0.0)
        self._last = dict(self.seconds)
        self._inner = 0.0

    @contextmanager
    def on(self, name: str) -> Iterator[None]:
        """Counts the time within; where it is in another's, it counts as this alone."""
        outer, self._inner = self._inner, 0.0
        start = time.perf_counter()
        try:
            yield
        finally:
            passed = time.perf_counter() - start
            self.seconds[name] += passed - self._inner
            self._inner = outer + passed

    def since_last(self) -> dict[str, float]:
        """Seconds of each since the last call."""
        passed = {name: self.seconds[name] - self._last[name] for name in self.NAMES}
        self._last = dict(self.seconds)
        return passed

    def shares(self) -> dict[str, dict[str, float]]:
        """Seconds and per cent of each."""
        total = sum(self.seconds.values()) or 1.0
        return {
            name: {"seconds": round(value, 3), "percent": round(100 * value / total, 1)}
            for name, value in self.seconds.items()
        }


def peak_gigabytes(device: torch.device) -> float | None:
    """The most memory of a GPU that tensors of this process took since it began; `None` of a CPU."""
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None


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
