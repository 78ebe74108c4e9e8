"""Measured figures as one line of text."""

from collections.abc import Mapping
from typing import Any


def figures_text(figures: Mapping[str, Any]) -> str:
    """The main figures of a task of an evaluation report, such as `mAP50 0.824, mAP 0.512, morphology macro_f1 0.781`."""
    shown = {name: value for name, value in figures.items() if isinstance(value, float)}
    morphology = figures.get("morphology", {}).get("macro_f1")
    if morphology is not None:
        shown["morphology macro_f1"] = morphology
    return ", ".join(f"{name} {value:.3f}" for name, value in shown.items()) or "nothing to measure"
