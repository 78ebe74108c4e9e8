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


def killed_and_resumed(
    work: Callable[[Path], Any], root: Path, kills: int, whole: int, seed: int = 0
) -> list[tuple[Path, Any]]:
    """Folders of work that was killed so often in all, each at a random moment, and what the work gave in the end.

    Args:
        work (`Callable`): Gets a folder, and goes on with what it left there.
        root (`Path`): Where the folders are. Work that ends before its moment has come is begun anew in the next one.
        kills (`int`): How often it is killed.
        whole (`int`): Moments of uninterrupted work.
        seed (`int`): Of the moments.
    """
    chance = random.Random(seed)
    folders = [root / "killed-0"]
    killed = 0
    while killed < kills:
        if is_killed(lambda: work(folders[-1]), chance.randint(1, whole)):
            killed += 1
        else:
            folders.append(root / f"killed-{len(folders)}")
    return [(folder, work(folder)) for folder in folders]


def weights(folder: Path) -> dict[str, bytes]:
    """The bytes of every weight file that is no checkpoint of a run, by its path."""
    files = [path for path in sorted(folder.rglob("*.safetensors")) if "checkpoints" not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


__all__ = ["counted", "killed_and_resumed", "weights"]
