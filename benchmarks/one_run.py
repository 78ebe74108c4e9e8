"""One model on one image in a process of its own: `python -m benchmarks.one_run NAME HEIGHT WIDTH`."""

import sys

import torch

from benchmarks.measuring import say_peak
from benchmarks.models import detectors


if __name__ == "__main__":
    name, height, width = sys.argv[1:]
    with torch.no_grad():
        detectors()[name]((int(height), int(width)))()
    say_peak()
