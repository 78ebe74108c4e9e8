"""A run in a process of its own: `python run_process.py run_config.json [--resume]`."""

import sys

from unihema.training.loop import train
from unihema.training.run_config import RunConfig


if __name__ == "__main__":
    train(RunConfig.load(sys.argv[1]), resume="--resume" in sys.argv)
