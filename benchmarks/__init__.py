"""Measured beside others: `speed` (time and memory, `make bench`) and `peers` (quality of single-task models)."""
