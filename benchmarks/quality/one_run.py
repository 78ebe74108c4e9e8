"""Models of a comparison, each once, in a process of its own.

`python -m benchmarks.quality.one_run FOLDER CHECKPOINT ITEM...`
"""

import sys
from pathlib import Path

import torch

from benchmarks.measuring import say_peak
from benchmarks.quality.peers import PEERS
from benchmarks.quality.speed import runners
from unihema.loading import load_model


if __name__ == "__main__":
    folder, checkpoint, *items = sys.argv[1:]
    unihema = None if all(item in PEERS for item in items) else load_model(checkpoint, "cpu")[0].eval()
    with torch.inference_mode():
        for run in runners(Path(folder), items, unihema).values():
            run()
    say_peak()
