"""Memory of training data in shards, as the data grows: `python -m benchmarks.speed.streaming`.

Each size is measured in a process of its own, from the same small photographs written again and again under other names:
resident memory after the same number of batches, as the loader of a run makes them. It prints a Markdown table.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


PIXELS = 96
BATCH = 16


def write(folder: Path, samples: int) -> None:
    """Shards of `samples` single cells with noise that JPEG cannot make small."""
    from PIL import Image

    from unihema.training.data.shards import write_shards

    rng = np.random.default_rng(0)
    crops = folder / "crops"
    crops.mkdir(parents=True)
    files = []
    for number in range(64):
        files.append(crops / f"{number}.png")
        Image.fromarray(rng.integers(0, 255, (PIXELS, PIXELS, 3), dtype=np.uint8)).save(files[-1])
    rows = [
        {
            "image": str(files[number % len(files)]),
            "file_name": f"crops/{number % 4}/{number}.png",
            "dataset": "many",
            "task": "single_cell",
            "label": str(number % 4),
        }
        for number in range(samples)
    ]
    write_shards({"single_cell": rows}, folder / "shards" / "train", "many")


def resident() -> float:
    """Resident memory of this process in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure(folder: Path, batches: int) -> dict[str, float]:
    """Memory that opening the rows and drawing `batches` batches adds, and the time of a batch."""
    import torch

    from unihema.processing_unihema.processing_unihema import UniHemaProcessor
    from unihema.training.data.dataset import SmearDataset
    from unihema.training.data.readers import load_folder
    from unihema.training.run.batches import RunBatches
    from unihema.training.run.config import DataConfig

    torch.set_num_threads(1)
    processor = UniHemaProcessor.from_default(single_cell={"longest_edge": PIXELS})
    # What the libraries take on first use is no part of it.
    import pyarrow.parquet  # noqa: F401

    before = resident()
    rows = load_folder(folder / "shards", "train")["single_cell"]
    data = SmearDataset(rows, processor, "single_cell", single_cell_labels=["0", "1", "2", "3"])
    stream = RunBatches(
        {"single_cell": data}, DataConfig(batch_size={"single_cell": BATCH}, workers=0), seed=0
    ).stream()
    start, peak = time.perf_counter(), 0.0
    for _ in range(batches):
        next(stream)
        peak = max(peak, resident() - before)
    return {"samples": len(data), "mib": round(peak, 1), "ms": round(1000 * (time.perf_counter() - start) / batches, 1)}


def main(arguments: list[str] | None = None) -> list[dict[str, float]]:
    """Measures every size and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[2000, 20000])
    parser.add_argument("--batches", type=int, default=120)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one is not None:
        print(json.dumps(measure(options.one, options.batches)))
        return []
    found = []
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), size)
            mib = sum(file.stat().st_size for file in Path(folder, "shards").rglob("*.parquet")) / 2**20
            command = [
                sys.executable,
                "-m",
                "benchmarks.speed.streaming",
                "--one",
                folder,
                "--batches",
                str(options.batches),
            ]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found.append(json.loads(output.splitlines()[-1]) | {"shards_mib": round(mib, 1)})
    print("| samples | shards, MiB | memory added, MiB | ms a batch |\n|---|---|---|---|")
    for line in found:
        print(f"| {line['samples']} | {line['shards_mib']} | {line['mib']} | {line['ms']} |")
    return found


if __name__ == "__main__":
    main()
