"""Bootstrap confidence intervals: how far figures would move with other images of the same kind."""

import numpy as np

from unihema.training.evaluation.measured import Measured
from unihema.training.evaluation.selection import image_numbers


DRAWS = 1000
LEVEL = 0.95
# A class with so few cells that many resamples have none of them has no interval worth printing.
LEAST_SHARE_OF_DRAWS = 0.9


def bootstrap_intervals(
    measured: Measured, draws: int = DRAWS, seed: int = 0, level: float = LEVEL
) -> dict[str, list[float]]:
    """Percentile intervals of a task's main figures.

    Images are drawn with replacement, as many as there are, with all their cells or questions. The model, and thresholds
    that were chosen on these images, stay as they are: what training or choosing them anew would change is not in it.

    Args:
        measured ([`Measured`]): What the model said.
        draws (`int`): Resamples.
        seed (`int`): Of the draws.
        level (`float`): Share of the resamples that lie inside.

    Returns:
        `dict[str, list[float]]`: Figure -> lower and upper limit; figures of a class or of the attributes are named
        such as `per_class platelet AP50` and `morphology macro_f1`. Empty with fewer than two images.
    """
    images = image_numbers(measured.rows)
    count = int(images.max(initial=-1)) + 1
    if count < 2 or not draws:
        return {}
    rng = np.random.default_rng(seed)
    score = measured.resampler()
    found: dict[str, list[float]] = {}
    for _ in range(draws):
        weights = np.bincount(rng.integers(count, size=count), minlength=count)[images]
        for name, value in score(weights).items():
            if value is not None:
                found.setdefault(name, []).append(value)
    tail = 50 * (1 - level)
    return {
        name: [float(limit) for limit in np.percentile(values, [tail, 100 - tail])]
        for name, values in found.items()
        if len(values) >= LEAST_SHARE_OF_DRAWS * draws
    }
