"""Measured figures as one line of text."""

from collections.abc import Mapping, Sequence
from typing import Any


def figures_text(figures: Mapping[str, Any]) -> str:
    """The main figures of a task of an evaluation report and their intervals, such as `mAP50 0.824 (0.790 to 0.851), mAP
    0.512 (0.480 to 0.538), morphology macro_f1 0.781 (0.722 to 0.823)`."""
    shown = {name: value for name, value in figures.items() if isinstance(value, float)}
    morphology = figures.get("morphology", {}).get("macro_f1")
    if morphology is not None:
        shown["morphology macro_f1"] = morphology
    intervals = figures.get("intervals") or {}
    return ", ".join(_text(name, value, intervals.get(name)) for name, value in shown.items()) or "nothing to measure"


def _text(name: str, value: float, interval: Sequence[float] | None) -> str:
    return f"{name} {value:.3f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")
