"""Tries hostile inputs in a child process of bounded time and memory, in which only one folder may be written.

`make test` tries few inputs, always the same; `make attack` as many as `UNIHEMA_ATTACK` says, from a seed that is printed. What
failed is made smaller by Hypothesis, printed, kept in `.attacks/`, and tried first the next time.
"""

import contextlib
import faulthandler
import functools
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from command import run_command
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.database import DirectoryBasedExampleDatabase

from unihema.errors import UniHemaError


resource = pytest.importorskip("resource", reason="Limits of memory are of Unix.")

# Of the processor, and of the clock for what waits: a busy machine is slow, but it does not compute for longer.
MOST_SECONDS, LONGEST_WAIT, MOST_MEMORY = 30, 60, 2 << 30
LONGEST_MESSAGE = 4000
CORPUS = Path(__file__).parents[2] / ".attacks"


@dataclass
class Tally:
    """What became of the inputs of one attack, with the most memory (bytes) and time (seconds of the processor) of a child."""

    accepted: int = 0
    refused: int = 0
    failed: int = 0
    memory: int = 0
    seconds: float = 0.0


tallies: dict[str, Tally] = {}


def attack(inputs: int, share: float, each: int = 1) -> Callable[[Callable], Callable]:
    """Settings of an attack, as a decorator of its test.

    Args:
        inputs (`int`): Number of inputs in `make test`.
        share (`float`): Of the inputs of `make attack`.
        each (`int`): Inputs that one child tries: what is quicker than a child would otherwise wait for it.
    """
    asked = os.environ.get("UNIHEMA_ATTACK")
    # A slow input is what is looked for.
    common: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True}
    if asked is None:
        phases = (Phase.explicit, Phase.generate)
        return settings(max_examples=inputs // each, derandomize=True, database=None, phases=phases, **common)
    phases = (Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink)
    corpus = DirectoryBasedExampleDatabase(CORPUS)
    number = round(max(inputs, int(asked) * share) / each)
    chosen = settings(max_examples=number, database=corpus, phases=phases, **common)
    # Not by the option --hypothesis-seed, nor after the settings: with these Hypothesis keeps nothing.
    begin = seed(int(os.environ.get("UNIHEMA_ATTACK_SEED", "0")))
    return lambda test: chosen(begin(test))


class NotAcceptedError(UniHemaError):
    """The command ended with an error of its own."""


def command(*arguments: object) -> str:
    """What `unihema ARGUMENTS` writes.

    Raises:
        NotAcceptedError: It ended with one line of an error.
        AssertionError: It ended otherwise.
    """
    done = run_command(*arguments)
    shown = done.stdout + done.stderr
    assert "Traceback" not in shown, shown[-6000:]
    assert "\x1b" not in shown, shown[-2000:]
    if done.returncode == 2:
        # Without the bar before it.
        raise NotAcceptedError(done.stderr.rpartition("\r")[2])
    assert done.returncode in (0, 1), shown[-2000:]
    return shown


def confined(
    name: str, *attempts: Callable[[Path, Path], Any], lay_down: Callable[[Path], Any] = lambda given: None
) -> Any:
    """Tries inputs.

    Args:
        name (`str`): Of the attack.
        *attempts (`Callable`): Each tries an input. It gets the folder of inputs, and one that it may write to, and may raise a
            `UniHemaError`.
        lay_down (`Callable`): Writes the inputs into their folder.

    Returns:
        What the last attempt returned, or its `UniHemaError` as a string.

    Raises:
        AssertionError: The child raised anything else, died, took too long or too much, or wrote anywhere else. The kind of the
            error is of the place, so that Hypothesis tells faults apart.
    """
    tally = tallies.setdefault(name, Tally())
    with tempfile.TemporaryDirectory() as root:
        given, out, home, temporary, said = (Path(root, part) for part in ("given", "out", "home", "tmp", "said"))
        for folder in (given, out, home, temporary):
            folder.mkdir()
        (home / "canary").write_text("canary")
        lay_down(given)
        watched = (given, home, temporary)
        before = [_listing(folder) for folder in watched]
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_run, args=(theirs, attempts, given, out, home, temporary, said))
        child.start()
        theirs.close()
        event, value, memory, seconds, accepted, refused = _outcome(child, ours, said)
        tally.memory, tally.seconds = max(tally.memory, memory), max(tally.seconds, seconds)
        changed = [name for old, folder in zip(before, watched) for name in old.items() ^ _listing(folder).items()]
        changed += [path for path in os.listdir(root) if Path(root, path) not in (*watched, out, said)]
        if event == "done" and changed:
            event, value = "failed", ("Wrote", f"changed what it may only read: {changed[:5]}")
        for path in given.rglob("*"):
            with contextlib.suppress(OSError):
                path.chmod(0o700)
    tally.accepted, tally.refused = tally.accepted + accepted, tally.refused + refused
    if event == "failed":
        tally.failed += 1
        # What is no character in it cannot be sent between the processes of the tests.
        raise _kind(value[0])(value[1].encode("utf-8", "backslashreplace").decode())
    return value


@functools.cache
def _kind(place: str) -> type[AssertionError]:
    return type(place, (AssertionError,), {})


def _listing(folder: Path) -> dict[str, tuple]:
    """Name -> kind, size and time of change of everything in a folder."""
    found = {}
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(place, name)
            state = os.lstat(path)
            found[path] = (state.st_mode, state.st_size, state.st_mtime_ns) if name in files else (state.st_mode,)
    return found


def _outcome(child: Any, pipe: Any, said: Path) -> tuple[str, Any, int, float, int, int]:
    """What the child says: how it ended, with what, the memory and time it took, and inputs accepted and refused."""
    try:
        answered = pipe.poll(LONGEST_WAIT)
        if answered:
            return pickle.loads(pipe.recv_bytes())
        # Python says where it was.
        os.kill(child.pid, signal.SIGABRT)
        child.join(5)
        why = f"not done after {LONGEST_WAIT} s"
    except EOFError:
        child.join()
        why = f"the process ended with {child.exitcode}"
    finally:
        # And what it started.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.kill()
        child.join()
        pipe.close()
    lines = said.read_text(errors="replace").splitlines() if said.exists() else []
    told = "\n".join([line for line in lines if "pytest" not in line and "hypothesis" not in line][-60:])
    return "failed", (why, f"{why}\n{told[-6000:]}"), 0, 0.0, 0, 0


def _run(
    pipe: Any, attempts: Sequence[Callable], given: Path, out: Path, home: Path, temporary: Path, said: Path
) -> None:
    os.setpgid(0, 0)
    with said.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", errors="backslashreplace", closefd=False) for stream in (1, 2))
    faulthandler.enable(2)
    faulthandler.register(signal.SIGXCPU, 2, chain=True)
    os.environ.update(HOME=str(home), TMPDIR=str(temporary))
    tempfile.tempdir, sys.dont_write_bytecode = str(temporary), True
    os.chdir(home)
    before, start = _memory(), _seconds()
    _limit(resource.RLIMIT_CPU, int(start) + MOST_SECONDS + 1)
    _limit(resource.RLIMIT_DATA, _in_use() + MOST_MEMORY)
    event, value, accepted, refused = "done", None, 0, 0
    for attempt in attempts:
        try:
            value = attempt(given, out)
            accepted += 1
        except UniHemaError as error:
            value = str(error)
            refused += 1
            if any(isinstance(cause, MemoryError) for cause in _causes(error)):
                event, value = "failed", ("MemoryError", f"refused for want of memory: {error}\n{_trace(error)}")
            elif len(value) > LONGEST_MESSAGE or any(ord(each) < 32 and each not in "\n\t" for each in value):
                event, value = "failed", (_place(error), f"a message of {len(value)} characters: {value[:300]!r}")
        except BaseException as error:
            event, value = "failed", (_place(error), f"{type(error).__name__}: {str(error)[:2000]}\n{_trace(error)}")
        if event == "failed":
            break
    memory, seconds = _memory() - before, _seconds() - start
    if event == "done" and memory > MOST_MEMORY:
        event, value = "failed", ("Memory", f"took {memory >> 20} MB")
    pipe.send_bytes(pickle.dumps((event, value, memory, seconds, accepted, refused)))
    # Without the cleaning up of the tests that started it.
    os._exit(0)


def _limit(of: int, most: int) -> None:
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(of, (most, resource.getrlimit(of)[1]))


def _in_use() -> int:
    """Bytes of data in use; where the system does not say, there is no limit either."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmData:"):
                return int(line.split()[1]) << 10
    return 1 << 62


def _memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    # Contexts may lead in a circle, where an error is raised again while another is handled.
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _place(error: BaseException) -> str:
    """Kind of an error, and the last line of the package that it went through."""
    lines = traceback.extract_tb(error.__traceback__)
    ours = [line for line in lines if "unihema" in line.filename and "tests" not in line.filename] or lines
    return f"{type(error).__name__} in {Path(ours[-1].filename).name}:{ours[-1].name}"


def _trace(error: BaseException) -> str:
    """Where the first cause of an error was raised."""
    lines = traceback.extract_tb(list(_causes(error))[-1].__traceback__)[-8:]
    return "\n".join(f"    {line.filename.split('site-packages/')[-1]}:{line.lineno} {line.name}" for line in lines)


__all__ = ["NotAcceptedError", "attack", "command", "confined", "tallies"]
