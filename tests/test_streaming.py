"""Memory of data in shards, at a small size of `python -m benchmarks.speed.streaming`."""

from pathlib import Path

import pytest

from benchmarks.speed import streaming


pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from Linux' /proc")

# What ten times the data may add to the memory of a run, MiB; the data itself grows by some 60.
BOUND = 12


def test_ten_times_the_data_take_no_more_memory(capsys):
    small, large = streaming.main(["--sizes", "300", "3000", "--batches", "18"])
    assert (small["samples"], large["samples"]) == (300, 3000)
    assert large["shards_mib"] - small["shards_mib"] > 4 * BOUND
    assert large["mib"] - small["mib"] < BOUND
    assert "| 3000 |" in capsys.readouterr().out
