"""Synthetic smears, for tests and for trying things out."""
