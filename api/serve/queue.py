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
    from unihema.request import Request


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


class _NobodyWaitsError(Exception):
    """Everyone who asked has gone."""


@dataclass(eq=False)
class Job:
    """An image that waits.

    It is opened when its turn comes: what waits lies on the disk, not in memory.

    Args:
        opened (`Callable[[], RegionSource]`): Opens the image.
        size (`tuple[int, int]`): Its width and height in pixels.
        asked (`tuple`): What is asked of it, to be compared with that of others.
        request ([`Request`]): The same, as [`Analyzer.request`] has read it.
        written (`Callable[[SmearResult, RegionSource], Any]`): Makes the answer, while the image is open.
        answer (`Future`): Gets what `written` gives, or the error.
        wanted (`bool`): Whether somebody still waits for it.
    """

    opened: Callable[[], RegionSource]
    size: tuple[int, int]
    asked: tuple
    request: "Request"
    written: Callable[[SmearResult, RegionSource], Any]
    answer: "Future[Any]" = field(default_factory=Future)
    wanted: bool = True

    @property
    def kind(self) -> tuple:
        """Jobs of one kind can be analysed together."""
        return self.size, self.asked


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

    def check_room(self, number: int = 1) -> None:
        """Checks that so many images would be taken now.

        Raises:
            QueueFullError: There is no room for them.
            StoppingError: Nothing is taken any more.
        """
        if self._stopping:
            raise StoppingError("The server is being stopped.")
        if len(self._waiting) + number > self.most:
            raise QueueFullError(max(1.0, self.seconds_an_image * len(self._waiting) / 2))

    def add(self, jobs: Sequence[Job]) -> None:
        """Takes images, all or none.

        Raises:
            QueueFullError: There is no room for them.
            StoppingError: Nothing is taken any more.
        """
        with self._changed:
            self.check_room(len(jobs))
            self._waiting.extend(jobs)
            self._changed.notify()

    def leave(self, jobs: Sequence[Job]) -> None:
        """Says that nobody waits for these any more: what waits makes room, what is analysed stops at its next tile."""
        with self._changed:
            for job in jobs:
                job.wanted = False
                if job in self._waiting:
                    self._waiting.remove(job)

    def stop(self) -> None:
        """Takes nothing more, and returns when all that was taken is done."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while batch := self._next():
            begun = time.monotonic()
            done = self._analyse(batch)
            if done:
                seconds = time.monotonic() - begun
                self.seconds_an_image += NEWEST * (seconds / done - self.seconds_an_image)
                self.on_batch(done, seconds)
            # An answer may be large: it is not to stay until the next image comes.
            del batch

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

    def _analyse(self, jobs: Sequence[Job]) -> int:
        """Analyses and answers; returns how many images were analysed."""
        jobs = [job for job in jobs if job.answer.set_running_or_notify_cancel() and job.wanted]
        sources: dict[int, RegionSource] = {}
        try:
            for number, job in enumerate(jobs):
                try:
                    sources[number] = job.opened()
                    # What cannot be read at all is known from here.
                    sources[number].pixels.load()
                except Exception as error:
                    _fail(job, error)
            readable = [number for number in sources if not jobs[number].answer.done()]
            self._run([jobs[number] for number in readable], [sources[number] for number in readable])
            return len(readable)
        finally:
            for source in sources.values():
                source.close()

    def _run(self, jobs: Sequence[Job], sources: Sequence[RegionSource]) -> None:
        if not jobs:
            return

        def on_progress(*_: object) -> None:
            if not any(job.wanted for job in jobs):
                raise _NobodyWaitsError

        try:
            results = self.analyzer.run(jobs[0].request, sources, on_progress=on_progress)
        except Exception as error:
            if len(jobs) > 1 and not isinstance(error, _NobodyWaitsError):
                # One of them may be at fault, or too much memory be needed at once: the others are not to suffer.
                for job, source in zip(jobs, sources, strict=True):
                    self._run([job], [source])
                return
            for job in jobs:
                _fail(job, error)
            return
        for job, source, result in zip(jobs, sources, results, strict=True):
            try:
                job.answer.set_result(job.written(result, source))
            except Exception as error:
                _fail(job, error)


def _fail(job: Job, error: Exception) -> None:
    if job.wanted and not isinstance(error, UniHemaError):
        logger.error("An image could not be analysed.", exc_info=error)
    job.answer.set_exception(error)


__all__ = ["AnalysisQueue", "Job", "QueueFullError", "StoppingError"]
