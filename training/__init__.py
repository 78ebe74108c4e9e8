"""Training: data, run configuration, loop, metrics and evaluation."""
