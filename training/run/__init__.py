"""A training run: its configuration, the loop and what it leaves behind."""
