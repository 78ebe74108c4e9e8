"""How things are measured: interleaved rounds, medians, ratios; processor seconds, which other work disturbs least."""

import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm


@dataclass
class Timing:
    """Medians over the rounds.

    Args:
        processor (`float`): Seconds of all threads together.
        wall (`float`): Seconds that passed.
        spread (`float`): Half the distance between the quartiles of `processor`, relative to the median.
        rounds (`int`): How many.
    """

    processor: float
    wall: float
    spread: float
    rounds: int


def interleaved(cases: dict[str, Callable[[], object]], rounds: int, description: str) -> dict[str, Timing]:
    """Runs all cases once to warm up, then round after round in turn, so that a change of the machine meets all.

    Args:
        cases (`dict[str, Callable]`): What to time, by name.
        rounds (`int`): Timed rounds.
        description (`str`): For the progress bar.
    """
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    with tqdm(total=(rounds + 1) * len(cases), desc=description, unit="run") as bar:
        for number in range(rounds + 1):
            for name, run in cases.items():
                wall, processor = time.perf_counter(), time.process_time()
                run()
                if number:
                    seconds[name].append((time.process_time() - processor, time.perf_counter() - wall))
                bar.update()
    return {name: _timing(values) for name, values in seconds.items()}


def _timing(values: list[tuple[float, float]]) -> Timing:
    processor = sorted(value for value, _ in values)
    median = statistics.median(processor)
    quartiles = statistics.quantiles(processor, n=4) if len(processor) > 1 else [median] * 3
    return Timing(
        median, statistics.median(wall for _, wall in values), (quartiles[2] - quartiles[0]) / 2 / median, len(values)
    )


def gemm_rate(size: int = 2048, rounds: int = 5) -> float:
    """Floating-point operations of a float32 matrix product in one processor second."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    timing = interleaved({"product": lambda: a @ b}, rounds, "matrix product")["product"]
    return 2 * size**3 / timing.processor


def peak_memory(module: str, *arguments: str) -> float:
    """Megabytes that a fresh process of this package needed at most.

    Args:
        module (`str`): Run as `python -m`; its last line says its own peak, see [`say_peak`].
        *arguments (`str`): Its arguments.
    """
    result = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=True)
    return float(result.stdout.splitlines()[-1])


def say_peak() -> None:
    """Prints this process's largest resident memory in megabytes (Linux)."""
    # The figure of getrusage starts at that of the process which started this one.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    print(int(re.search(r"^VmHWM:\s+(\d+) kB", status, re.M)[1]) / 1024)


def processor_name() -> str:
    """What the machine calls its processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
