"""Evaluation of all tasks: what a model says of rows, its scores with intervals, and the report of them."""

from unihema.training.evaluation.evaluate import calibrate_thresholds, evaluate_model
from unihema.training.evaluation.intervals import bootstrap_intervals
from unihema.training.evaluation.report import HEADLINES, headline, write_report
from unihema.training.evaluation.selection import draw_rows, exchange_images


__all__ = [
    "HEADLINES",
    "bootstrap_intervals",
    "calibrate_thresholds",
    "draw_rows",
    "evaluate_model",
    "exchange_images",
    "headline",
    "write_report",
]
