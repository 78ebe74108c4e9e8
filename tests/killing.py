"""Killing work as a machine does: at any moment, without a word, and then starting it again."""

import os
import random
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import auto, std


# What changes a file system, by the names of Python's audit events.
_CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate", "os.link", "os.symlink"}
# Seconds after such a change, in which what has been opened is being written.
_WRITING = 0.02
_on_moment: Callable[[], None] | None = None


class Course(NamedTuple):
    """How work goes that nobody disturbs.

    Args:
        result (`Any`): What it gives.
        seconds (`float`): How long it takes.
        moments (`int`): Changes of the file system in it, and other moments that it names.
    """

    result: Any
    seconds: float
    moments: int


def moment() -> None:
    """A moment at which work may be killed, beside every change of the file system."""
    if _on_moment is not None:
        _on_moment()


def _audited(event: str, arguments: tuple[Any, ...]) -> None:
    if _on_moment is not None and (event in _CHANGES or (event == "open" and _writes(arguments[2]))):
        _on_moment()


def _writes(flags: int) -> bool:
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


# Once, as nothing takes it out again.
sys.addaudithook(_audited)


@contextmanager
def _moments(tick: Callable[[], None]) -> Iterator[None]:
    global _on_moment
    _on_moment = tick
    try:
        yield
    finally:
        _on_moment = None


def undisturbed(work: Callable[[], Any]) -> Course:
    """Does the work in this process."""
    found: list[int] = []
    start = time.monotonic()
    with _moments(lambda: found.append(1)):
        result = work()
    return Course(result, time.monotonic() - start, len(found))


def is_killed(work: Callable[[], Any], number: int | None, seconds: float) -> bool:
    """Does the work in a process that gets SIGKILL; whether it came to that before the work was done.

    Args:
        work (`Callable`): The work.
        number (`int`, *optional*): Of the moment at which it is killed.
        seconds (`float`): After that moment, or after the beginning without one.

    Raises:
        AssertionError: The work failed by itself.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        left = number or 0

        def tick() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                if not seconds:
                    os.kill(os.getpid(), signal.SIGKILL)
                os.write(writer, b".")

        for bars in (std.tqdm, auto.tqdm):
            # Theirs is shared with the process that was copied, where one that is killed with it would stop all others.
            bars.set_lock(threading.RLock())
        try:
            with _moments(tick):
                work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(writer)
    try:
        # Also ready when the process has ended.
        select.select([reader], [], [], seconds if number is None else None)
        if number is not None and os.read(reader, 1):
            time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    finally:
        os.close(reader)
        _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "failed by itself; its traceback is above"
    return os.WIFSIGNALED(status)


def killed_and_resumed(
    work: Callable[[Path], Any], root: Path, kills: int, whole: Course, seed: int = 0
) -> list[tuple[Path, Any]]:
    """Folders of work that was killed so often in all, and what the work gave in the end.

    In turns it is killed at a moment, shortly after one, and at any time.

    Args:
        work (`Callable`): Gets a folder, and goes on with what it left there.
        root (`Path`): Where the folders are. Work that ends before it is killed is begun anew in the next one.
        kills (`int`): How often it is killed.
        whole ([`Course`]): Of undisturbed work.
        seed (`int`): Of when it is killed.
    """
    chance = random.Random(seed)
    folders = [root / "killed-0"]
    killed, tries, longest = 0, 0, whole.seconds
    while killed < kills:
        tries += 1
        number = chance.randint(1, whole.moments) if tries % 2 and whole.moments else None
        seconds = chance.uniform(0, longest) if number is None else chance.choice((0.0, chance.uniform(0, _WRITING)))
        start = time.monotonic()
        if is_killed(lambda: work(folders[-1]), number, seconds):
            killed += 1
        else:
            # The first time took longer: everything was new to the process.
            longest = min(longest, time.monotonic() - start)
            folders.append(root / f"killed-{len(folders)}")
    return [(folder, work(folder)) for folder in folders]


def weights(folder: Path) -> dict[str, bytes]:
    """The bytes of every weight file that is no checkpoint of a run, by its path."""
    files = [path for path in sorted(folder.rglob("*.safetensors")) if "checkpoints" not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


__all__ = ["Course", "is_killed", "killed_and_resumed", "moment", "undisturbed", "weights"]
