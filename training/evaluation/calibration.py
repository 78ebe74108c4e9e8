"""What scores mean: probabilities fitted on validation data, and the level from which types of white cells are mostly right."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

from unihema.results.calibration import is_typed_white_cell
from unihema.training.evaluation.measured import Measured


# Share of the typed white cells kept that are to be right.
PRECISION = 0.95
BINS, FOLDS = 15, 5
# Fewer answers tell nothing of what a score means.
FEWEST = 30
# How strongly a class's own shift is drawn towards that of all: as much as an answer of its own tells against it.
PRIOR = 1.0


def fit_calibration(
    labels: Sequence[str],
    scores: Sequence[float],
    right: Sequence[bool],
    parents: Mapping[str, str] | None = None,
    precision: float = PRECISION,
    seed: int = 0,
) -> dict[str, Any] | None:
    """Fits what scores mean: one logistic curve of their logits for a head, with a shift of its own for each class.

    Figures are of cross-validation: each answer's probability is that of a curve fitted without its fold.

    Args:
        labels (`Sequence[str]`): Class of each answer.
        scores (`Sequence[float]`): Its score, 0..1.
        right (`Sequence[bool]`): Whether it was right.
        parents (`Mapping[str, str]`, *optional*): Class -> coarser class.
        precision (`float`): Share of typed white cells that are to be right.
        seed (`int`): Of the folds.

    Returns:
        `dict` or `None`: `slope`, `shift`, `shifts` (class -> shift), as `calibrated_probability` takes them; `ece` (expected
        calibration error, 15 bins) and `cells`; `typed_from`, the least probability from which typed white cells are right in
        `precision` of cases, and their `coverage`, the share that is kept; both are left out where there is no such level.
        `None` with fewer than thirty answers, or where all are right or all are wrong.
    """
    names, numbers = np.unique(np.asarray(labels, dtype=str), return_inverse=True)
    truth = np.asarray(right, dtype=float)
    if len(truth) < FEWEST or truth.min() == truth.max():
        return None
    clipped = np.clip(np.asarray(scores, dtype=float), 1e-6, 1 - 1e-6)
    logits = np.log(clipped / (1 - clipped))
    slope, shift, own = _fitted(logits, numbers, truth, len(names))
    folds = np.random.default_rng(seed).permutation(len(truth)) % FOLDS
    held_out = np.zeros(len(truth))
    for fold in range(FOLDS):
        inside, outside = folds == fold, folds != fold
        a, b, c = _fitted(logits[outside], numbers[outside], truth[outside], len(names))
        held_out[inside] = expit(a * logits[inside] + b + c[numbers[inside]])
    found = {
        "slope": round(float(slope), 4),
        "shift": round(float(shift), 4),
        "shifts": {name: round(float(shift + each), 4) for name, each in zip(names.tolist(), own, strict=True)},
        "ece": round(expected_calibration_error(held_out, truth), 4),
        "cells": len(truth),
    }
    typed = np.array([is_typed_white_cell(name, parents) for name in names.tolist()])[numbers]
    level = typing_level(held_out[typed], truth[typed], precision)
    return found if level is None else found | level


def expected_calibration_error(probabilities: np.ndarray, right: np.ndarray, bins: int = BINS) -> float:
    """Mean difference of probability and share of right answers, over bins of equal width (Naeini et al. 2015).

    Args:
        probabilities (`np.ndarray`): `[n]`, 0..1.
        right (`np.ndarray`): `[n]`, whether each answer was right.
        bins (`int`): Number of bins.
    """
    place = np.minimum((np.asarray(probabilities) * bins).astype(int), bins - 1)
    told, seen = (np.bincount(place, values, bins) for values in (probabilities, right))
    return float(np.abs(told - seen).sum() / max(1, len(place)))


def typing_level(probabilities: np.ndarray, right: np.ndarray, precision: float) -> dict[str, float] | None:
    """The level that keeps most answers while `precision` of those kept are right.

    Returns:
        `dict` or `None`: `typed_from`, `precision` (asked for), `reached`, and `coverage`, the share kept.
    """
    order = np.argsort(-probabilities, kind="stable")
    ranked = probabilities[order]
    share = np.cumsum(right[order]) / np.arange(1, len(order) + 1)
    # Answers of one probability are kept together.
    last = np.append(ranked[1:] != ranked[:-1], True)[: len(ranked)]
    enough = np.flatnonzero((share >= precision) & last)
    if not len(enough):
        return None
    kept = int(enough[-1]) + 1
    level = float(np.floor(ranked[kept - 1] * 1e4) / 1e4)
    return {
        "typed_from": level,
        "precision": precision,
        "reached": round(float(share[kept - 1]), 4),
        "coverage": round(kept / len(ranked), 4),
    }


def calibration_of(measured: Measured) -> dict[str, Any] | None:
    """What was fitted to the answers of one head, see [`fit_calibration`]."""
    answers = measured.answers()
    parents = measured.model.config.class_parents
    return fit_calibration(*zip(*answers, strict=True), parents) if answers else None


def _fitted(
    logits: np.ndarray, numbers: np.ndarray, right: np.ndarray, classes: int
) -> tuple[float, float, np.ndarray]:
    """Slope, shift, and how much that of each class differs, by penalised likelihood."""

    def loss(values: np.ndarray) -> tuple[float, np.ndarray]:
        slope, shift, own = values[0], values[1], values[2:]
        told = slope * logits + shift + own[numbers]
        difference = expit(told) - right
        likelihood = np.logaddexp(0, told).sum() - (told * right).sum()
        by_class = np.bincount(numbers, difference, classes) + PRIOR * own
        gradient = np.concatenate([[difference @ logits + PRIOR * (slope - 1), difference.sum()], by_class])
        return likelihood + PRIOR * (own @ own + (slope - 1) ** 2) / 2, gradient

    # A higher score never means less.
    bounds = [(0.05, 20.0), (-20.0, 20.0), *[(-20.0, 20.0)] * classes]
    found = minimize(loss, np.r_[1.0, 0.0, np.zeros(classes)], jac=True, method="L-BFGS-B", bounds=bounds).x
    return found[0], found[1], found[2:]


__all__ = [
    "PRECISION",
    "calibration_of",
    "expected_calibration_error",
    "fit_calibration",
    "typing_level",
]
