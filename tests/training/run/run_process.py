"""A run in a process of its own: `python run_process.py run_config.json [--resume]`."""

import sys

from unihema.training.run.config import RunConfig
from unihema.training.run.loop import train


if __name__ == "__main__":
    train(RunConfig.load(sys.argv[1]), resume="--resume" in sys.argv)
