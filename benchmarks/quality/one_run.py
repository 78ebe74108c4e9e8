"""Models of a comparison, each once, in a process of its own.

`python -m benchmarks.quality.one_run FOLDER CHECKPOINT ITEM...`
"""

import sys
from pathlib import Path

import torch

from benchmarks.measuring import say_peak
from benchmarks.quality.peers import PEERS
from benchmarks.quality.speed import load_prepared, runners


if __name__ == "__main__":
    folder, checkpoint, *items = sys.argv[1:]
    unihema = None if all(item in PEERS for item in items) else load_prepared(checkpoint)
    with torch.inference_mode():
        features: dict = {}
        for run in runners(Path(folder), items, unihema).values():
            run(features)
    say_peak()
