"""Speed and memory of UniHema beside its peers, measured in one process: `python -m benchmarks.speed`."""
