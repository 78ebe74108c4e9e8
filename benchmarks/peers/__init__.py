"""Single-task peers trained on UniHema's data, in one table with it: `python -m benchmarks.peers`."""
