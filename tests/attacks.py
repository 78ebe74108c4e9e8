"""Attacks share this: how many inputs, from which seed, in a child process of bounded time and memory.

`UNIHEMA_ATTACK` is the number of inputs of each attack, `UNIHEMA_ATTACK_SEED` the seed. A failure prints seed and number of
the input; with that seed and `UNIHEMA_ATTACK_ONLY` this one input runs alone.
"""

import multiprocessing
import os
import random
import time
import traceback
from collections.abc import Callable
from typing import Any

import pytest

from unihema.errors import UniHemaError


resource = pytest.importorskip("resource", reason="Limits of memory are of Unix.")

LONGEST_SECONDS, MOST_MEMORY = 30.0, 2 << 30


def budget(default: int) -> tuple[int, str, int | None]:
    """Number of inputs, seed, and the one input to run where one is named."""
    asked, only = os.environ.get("UNIHEMA_ATTACK"), os.environ.get("UNIHEMA_ATTACK_ONLY")
    seed = os.environ.get("UNIHEMA_ATTACK_SEED") or (str(time.time_ns()) if asked else "0")
    return int(asked or default), seed, None if only is None else int(only)


def attack(
    name: str, inputs: int, attempt: Callable[[random.Random], Any], describe: Callable[[], str] = str
) -> dict[str, int]:
    """Runs an attack in a child process, and in another one after an input that ended or stopped it.

    Args:
        name (`str`): Of the attack.
        inputs (`int`): How many inputs by default.
        attempt (`Callable`): Makes an input from random numbers and tries it. It may return anything or raise a `UniHemaError`.
        describe (`Callable`): What the input was.

    Returns:
        `dict[str, int]`: How many were accepted and refused.

    Raises:
        AssertionError: Another error, or an input that took too long or too much memory; seed and input are named.
    """
    count, seed, only = budget(inputs)
    waiting = list(range(count)) if only is None else [only]
    counts, failures = {"accepted": 0, "refused": 0}, []
    while waiting:
        waiting = _in_a_child(seed, waiting, attempt, describe, counts, failures)
    print(f"{name}: seed {seed}, {counts}, {len(failures)} failed")
    again = f"UNIHEMA_ATTACK_SEED={seed} UNIHEMA_ATTACK_ONLY=NUMBER runs one alone."
    assert not failures, f"{name}: {len(failures)} of {count} inputs failed. {again}\n" + "\n".join(failures[:20])
    return counts


def _in_a_child(
    seed: str, numbers: list[int], attempt: Callable, describe: Callable, counts: dict[str, int], failures: list[str]
) -> list[int]:
    """Adds to counts and failures; returns the numbers that are left."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=_run, args=(theirs, seed, numbers, attempt, describe))
    child.start()
    theirs.close()
    number, done = numbers[0], set()
    try:
        while len(done) < len(numbers):
            if not ours.poll(2 * LONGEST_SECONDS):
                failures.append(f"input {number}: not done after {2 * LONGEST_SECONDS:.0f} s")
                done.add(number)
                break
            try:
                event, number, said = ours.recv()
            except EOFError:
                child.join()
                failures.append(f"input {number}: the process ended with {child.exitcode}")
                done.add(number)
                break
            if event == "failed":
                failures.append(f"input {number}: {said}")
            elif event in counts:
                counts[event] += 1
            if event != "begins":
                done.add(number)
    finally:
        child.kill()
        child.join()
    return [each for each in numbers if each not in done]


def _run(pipe: Any, seed: str, numbers: Any, attempt: Callable, describe: Callable) -> None:
    for number in numbers:
        pipe.send(("begins", number, ""))
        rng = random.Random(f"{seed} {number}")
        before, start = _memory(), time.monotonic()
        try:
            attempt(rng)
            event, said = "accepted", ""
        except UniHemaError as error:
            text = str(error)
            event, said = "refused", ""
            if len(text) > 4000 or any(ord(each) < 32 and each != "\n" for each in text):
                event, said = "failed", f"{describe()}: message of {len(text)} characters: {text[:200]!r}"
        except BaseException as error:
            event, said = "failed", f"{describe()}: {type(error).__name__}: {str(error)[:300]}\n{_place(error)}"
        if _memory() - before > MOST_MEMORY:
            event, said = "failed", f"{describe()}: took {(_memory() - before) >> 20} MB"
        if time.monotonic() - start > LONGEST_SECONDS:
            event, said = "failed", f"{describe()}: took {time.monotonic() - start:.0f} s"
        pipe.send((event, number, said))
    pipe.close()
    # Without the cleaning up of the tests that started it.
    os._exit(0)


def _memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _place(error: BaseException) -> str:
    lines = traceback.extract_tb(error.__traceback__)[-6:]
    return "\n".join(f"    {line.filename.split('site-packages/')[-1]}:{line.lineno} {line.name}" for line in lines)


HOSTILE_VALUES = [
    None, True, 0, -1, 1, 2, 3, 100_000, 10**9, -(10**9), 10**30, 10**400, 0.5, -0.5, 1e308, float("nan"), float("inf"),
    "", "a", "1", "../x", "/etc/passwd", "\x1b[2J", "\ud800", "\n", "hf-hub:x/y", "someone/thing", "a" * 10_000,
    [], [0], [1, 2, 3], ["a"], [[[]]], [None], {}, {"0": "a"}, {"a": {"b": {}}}, {"model_type": "bert"}, {"__class__": "x"},
]  # fmt: skip


def mutate_json(value: Any, rng: random.Random) -> Any:
    """The value with one part somewhere in it replaced, removed, doubled, renamed or nested."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        changed = dict(value)
        kind = rng.random()
        if kind < 0.6:
            changed[key] = mutate_json(value[key], rng)
        elif kind < 0.72:
            del changed[key]
        elif kind < 0.8:
            changed[rng.choice(["a", "", "model_type", "auto_map", "dtype", "\x00", key.upper()])] = changed.pop(key)
        elif kind < 0.9:
            changed[key] = value[rng.choice(list(value))]
        else:
            changed[rng.choice(["extra", "num_labels", "id2label", "quantization_config", "torch_dtype"])] = hostile(
                rng
            )
        return changed
    if isinstance(value, list) and value and rng.random() < 0.8:
        place = rng.randrange(len(value))
        kind = rng.random()
        if kind < 0.6:
            return [*value[:place], mutate_json(value[place], rng), *value[place + 1 :]]
        if kind < 0.8:
            return value[:place] + value[place + 1 :]
        return value * rng.choice([2, 50])
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300 and rng.random() < 0.5:
        return rng.choice(
            [value + 1, value - 1, value * 2, -value, value * 1000, value / 3, int(value) ^ 1, str(value)]
        )
    return hostile(rng)


def hostile(rng: random.Random) -> Any:
    """A value that does not belong where it stands."""
    value = rng.choice(HOSTILE_VALUES)
    if rng.random() < 0.05:
        for _ in range(rng.choice([50, 500])):
            value = [value] if rng.random() < 0.5 else {"a": value}
    if rng.random() < 0.03:
        value = {str(i): f"name {i}" for i in range(20_000)}
    return value


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    """The bytes with some of them changed, cut, doubled or put in."""
    if not content:
        return rng.randbytes(20)
    place = rng.randrange(len(content)) if rng.random() < 0.5 else rng.randrange(min(len(content), 400))
    kind = rng.random()
    if kind < 0.35:
        return content[:place] + bytes([rng.randrange(256)]) + content[place + 1 :]
    if kind < 0.55:
        return content[:place]
    if kind < 0.7:
        return content[:place] + rng.randbytes(rng.choice([1, 8, 1000])) + content[place:]
    if kind < 0.85:
        return content[:place] + content[place + rng.choice([1, 8, 1000]) :]
    return content + content[place:]
