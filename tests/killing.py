"""Killing work as a machine does: at any moment, without a word, and then starting it again."""

import os
import random
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from unihema.training.run.log import RunLog


@contextmanager
def moments(tick: Callable[[], None]) -> Iterator[None]:
    """Calls `tick` before and after every file or folder that is put in place, before every one that is deleted, and after
    every training step."""
    replace, remove, add = os.replace, shutil.rmtree, RunLog.add

    def ticking_replace(*arguments: Any) -> None:
        tick()
        replace(*arguments)
        tick()

    def ticking_remove(*arguments: Any, **options: Any) -> None:
        tick()
        remove(*arguments, **options)

    def ticking_add(*arguments: Any) -> None:
        add(*arguments)
        tick()

    os.replace, shutil.rmtree, RunLog.add = ticking_replace, ticking_remove, ticking_add
    try:
        yield
    finally:
        os.replace, shutil.rmtree, RunLog.add = replace, remove, add


def counted(work: Callable[[], Any]) -> tuple[Any, int]:
    """What uninterrupted work gives, and how many moments it has."""
    found = []
    with moments(lambda: found.append(1)):
        result = work()
    return result, len(found)


def is_killed(work: Callable[[], Any], moment: int) -> bool:
    """Does the work in a process that gets SIGKILL at this moment; whether it came to that.

    Raises:
        AssertionError: The work failed by itself.
    """
    child = os.fork()
    if child == 0:
        left = moment

        def tick() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            with moments(tick):
                work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "failed by itself; its traceback is above"
    return os.WIFSIGNALED(status)


def killed_and_resumed(work: Callable[[], Any], kills: int, whole: int, seed: int = 0) -> Any:
    """What the work gives after so many kills, each at a random moment of what is left.

    Args:
        work (`Callable`): Goes on with what it left.
        kills (`int`): How often it is killed.
        whole (`int`): Moments of uninterrupted work.
        seed (`int`): Of the moments.
    """
    chance = random.Random(seed)
    for _ in range(kills):
        # Work that is started again has some moments more than what is left, so it does not end before the last kill.
        assert is_killed(work, chance.randint(1, 3 * whole // (2 * kills)))
    return work()


def weights(folder: Path) -> dict[str, bytes]:
    """The bytes of every weight file that is no checkpoint of a run, by its path."""
    files = [path for path in sorted(folder.rglob("*.safetensors")) if "checkpoints" not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


__all__ = ["counted", "killed_and_resumed", "weights"]
