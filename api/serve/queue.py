"""A bounded queue of images before one analyzer: images of one size, of which the same is asked, are analysed together."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from unihema.errors import UniHemaError
from unihema.results.smear_result import SmearResult
from unihema.slides import RegionSource


if TYPE_CHECKING:
    from unihema.analyzer import Analyzer


logger = logging.getLogger(__name__)

# Of the time that an image takes: how much the newest counts.
NEWEST = 0.1


class QueueFullError(UniHemaError):
    """More images wait than may.

    Args:
        seconds (`float`): When there may be room again.
    """

    def __init__(self, seconds: float):
        super().__init__(f"The queue is full. Ask again in {seconds:.0f} seconds.")
        self.seconds = seconds


class StoppingError(UniHemaError):
    """The queue takes nothing more: it is being stopped."""


@dataclass
class Job:
    """An image that waits.

    Args:
        source ([`RegionSource`]): The image, open; closed when the job is done.
        asked (`tuple`): What is asked of it: arguments of [`Analyzer.request`].
        result (`Future`): Gets the [`SmearResult`], or the error.
        since (`float`): When it came.
    """

    source: RegionSource
    asked: tuple
    result: "Future[SmearResult]" = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)

    @property
    def kind(self) -> tuple:
        """Jobs of one kind can be analysed together."""
        return self.source.pixels.size, self.asked


class AnalysisQueue:
    """Analyses images in the order in which they came, in a thread of its own.

    Args:
        analyzer ([`Analyzer`]): Analyses.
        most (`int`): Images that may wait.
        batch_size (`int`): Images of one kind that are analysed together at most.
        on_batch (`Callable`, *optional*): Called with the number of images of a batch and the seconds that it took.
    """

    def __init__(
        self,
        analyzer: "Analyzer",
        most: int = 64,
        batch_size: int = 4,
        on_batch: Callable[[int, float], None] = lambda number, seconds: None,
    ):
        self.analyzer, self.most, self.batch_size, self.on_batch = analyzer, most, batch_size, on_batch
        self.seconds_an_image = 1.0
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="unihema-analysis", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def is_alive(self) -> bool:
        """Whether images are taken."""
        return self._thread.is_alive() and not self._stopping

    def add(self, jobs: Sequence[Job]) -> None:
        """Takes images, all or none.

        Raises:
            QueueFullError: There is no room for them.
            StoppingError: Nothing is taken any more.
        """
        with self._changed:
            if self._stopping:
                raise StoppingError("The server is being stopped.")
            if len(self._waiting) + len(jobs) > self.most:
                raise QueueFullError(max(1.0, self.seconds_an_image * len(self._waiting) / 2))
            self._waiting.extend(jobs)
            self._changed.notify()

    def stop(self) -> None:
        """Takes nothing more, and returns when all that was taken is done."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while batch := self._next():
            begun = time.monotonic()
            # One who no longer waits is not analysed for.
            wanted = [job for job in batch if job.result.set_running_or_notify_cancel()]
            if wanted:
                self._analyse(wanted)
                seconds = time.monotonic() - begun
                self.seconds_an_image += NEWEST * (seconds / len(wanted) - self.seconds_an_image)
                self.on_batch(len(wanted), seconds)
            for job in batch:
                job.source.close()

    def _next(self) -> list[Job]:
        """The oldest job, and those of its kind that wait as well; none when there will be no more."""
        with self._changed:
            while not self._waiting and not self._stopping:
                self._changed.wait()
            if not self._waiting:
                return []
            kind = self._waiting[0].kind
            batch = [job for job in self._waiting if job.kind == kind][: self.batch_size]
            for job in batch:
                self._waiting.remove(job)
            return batch

    def _analyse(self, jobs: Sequence[Job]) -> None:
        try:
            request = self.analyzer.request(*jobs[0].asked)
            results = self.analyzer.run(request, [job.source for job in jobs])
        except Exception as error:
            if len(jobs) > 1 and not isinstance(error, MemoryError):
                # One of them may be at fault: the others are not to suffer.
                for job in jobs:
                    self._analyse([job])
                return
            if not isinstance(error, UniHemaError):
                logger.exception("An image could not be analysed.")
            jobs[0].result.set_exception(error)
            for job in jobs[1:]:
                job.result.set_exception(error)
            return
        for job, result in zip(jobs, results, strict=True):
            job.result.set_result(result)


def asked_of(**options: Any) -> tuple:
    """What is asked, in the order of [`Analyzer.request`], so that it can be compared."""
    names = ("tasks", "prompt", "questions", "threshold", "tiles", "um_per_pixel", "white_cells")
    usual = {"questions": (), "tiles": "auto"}
    return tuple(options.get(name, usual.get(name)) for name in names)


__all__ = ["AnalysisQueue", "Job", "QueueFullError", "StoppingError", "asked_of"]
