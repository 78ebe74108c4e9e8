"""Metrics: plain functions, a module for each kind, and the same as `evaluate` modules in modules.py."""
