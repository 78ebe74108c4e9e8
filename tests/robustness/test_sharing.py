"""Eight threads on one analyzer beside four processes on one checkpoint and one results folder: the results of one after another,
and no more memory in the end than in the middle.

`UNIHEMA_SHARING` is how many seconds the slow test works, ten minutes by default.
"""

import csv
import json
import os
import statistics
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from command import run_command
from data_folders import write_photograph
from tiny_checkpoint import save_tiny_checkpoint

from unihema import Analyzer
from unihema.shipped import copy_examples, lay_down_checkpoint


pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read as on Linux")
THREADS, PROCESSES = 8, 4
# Of the memory in the middle third of the time; below so many seconds nothing is warm.
GROWTH, WARM = 1.05, 60
TASKS = (("detection", "segmentation"), ("detection",), ("single_cell",), ())
QUESTIONS = ("Which cell is this?", "The nucleus is ___.")


def test_a_few_seconds(tmp_path):
    images = [
        write_photograph(tmp_path / f"{number}.png", number, (60 + 50 * number, 120 - 20 * number))
        for number in range(2)
    ]
    check(save_tiny_checkpoint(tmp_path / "checkpoint"), images, tmp_path, 1.0)


@pytest.mark.slow
def test_ten_minutes(tmp_path):
    images = copy_examples(tmp_path / "examples")
    check(
        lay_down_checkpoint(tmp_path / "checkpoint"), images, tmp_path, float(os.environ.get("UNIHEMA_SHARING", "600"))
    )


def check(checkpoint: Path, images: list[Path], folder: Path, seconds: float) -> None:
    torch.set_num_threads(1)
    assert predict(checkpoint, images, folder / "alone").returncode == 0
    analyzer = Analyzer.from_pretrained(checkpoint, device="cpu")
    requests = [(image, tasks, QUESTIONS) for image in images for tasks in TASKS]
    expected = [comparable(analyzer(image, tasks, questions=asked)) for image, tasks, asked in requests]
    memory, wrong, done = [], [], []
    end = time.monotonic() + seconds
    # Before there are threads, which a copied process would not have.
    children = [child_of(checkpoint, images, folder, number, end) for number in range(PROCESSES)]

    def work(thread: int) -> None:
        number, first = thread, True
        # Once at least, on a machine that is busy with other things.
        while first or time.monotonic() < end:
            first = False
            image, tasks, asked = requests[number % len(requests)]
            if comparable(analyzer(image, tasks, questions=asked)) != expected[number % len(requests)]:
                wrong.append(number % len(requests))
            done.append(thread)
            number += 3

    stop = threading.Event()
    sampler = threading.Thread(target=sample, args=(memory, stop))
    sampler.start()
    with ThreadPoolExecutor(THREADS) as pool:
        for thread in [pool.submit(work, number) for number in range(THREADS)]:
            thread.result()
    stop.set()
    sampler.join()
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * PROCESSES, "failed; its traceback is above"
    told = [json.loads((folder / f"process-{number}.json").read_text()) for number in range(PROCESSES)]
    runs, refused = sum(each["runs"] for each in told), sum(each["refused"] for each in told)
    growth = [grown(memory), *(grown(each["memory"]) for each in told)]
    print(
        f"{seconds:.0f} s: {len(done)} analyses in threads, {runs} runs in processes, {refused} refused, memory {growth}"
    )
    assert wrong == [] and set(done) == set(range(THREADS)) and runs >= 1
    assert written(folder / "together") == written(folder / "alone")
    if seconds >= WARM:
        assert max(growth) <= GROWTH


def predict(checkpoint: Path, images: list[Path], output: Path):
    return run_command("predict", checkpoint, *images, "-o", output, "--overwrite")


def child_of(checkpoint: Path, images: list[Path], folder: Path, number: int, end: float) -> int:
    """A process that analyses into a folder of several until the end; it writes down how often, and how much memory it had."""
    child = os.fork()
    if child:
        return child
    try:
        runs, refused, memory = 0, 0, []
        # Once at least, however long one takes.
        while time.monotonic() < end or not runs:
            ended = predict(checkpoint, images, folder / "together")
            said = ended.stderr.replace("\n", " ")
            assert ended.returncode == 0 or "is writing there. Wait for it or stop it" in said, said
            runs, refused = runs + (ended.returncode == 0), refused + (ended.returncode != 0)
            memory.append(resident())
            if ended.returncode == 0:
                assert rows(folder / "together") == rows(folder / "alone")
        (folder / f"process-{number}.json").write_text(json.dumps({"runs": runs, "refused": refused, "memory": memory}))
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def rows(results: Path) -> list[list[str]]:
    """The table of cells, which another process may be writing anew."""
    with (results / "cells.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def written(results: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(results)): path.read_bytes()
        for path in sorted(results.rglob("*"))
        if path.is_file() and not path.name.startswith(".unihema")
    }


def comparable(result) -> str:
    return json.dumps(result.to_dict(), sort_keys=True)


def sample(memory: list[int], stop: threading.Event) -> None:
    memory.append(resident())
    while not stop.wait(0.2):
        memory.append(resident())


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def grown(memory: list[int]) -> float:
    """The memory of the last third of the time, over that of the middle third."""
    third = max(1, len(memory) // 3)
    return round(statistics.median(memory[-third:]) / statistics.median(memory[-2 * third : -third] or memory), 3)
