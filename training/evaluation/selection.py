"""Which rows are measured, and which of them show the same image."""

from collections.abc import Hashable, Sequence

import numpy as np

from unihema.errors import InputError
from unihema.training.data.rows import Row, image_key


def image_numbers(rows: Sequence[Row]) -> np.ndarray:
    """The number of each row's image, counted from 0: `[n]`."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(image_key(row), len(numbers)) for row in rows], dtype=int)


def draw_rows(rows: Sequence[Row], count: int | None, seed: int) -> list[Row]:
    """About `count` rows, whole images at a time, drawn by `seed`; all of them for `None`."""
    if count is None or len(rows) <= count:
        return list(rows)
    groups = list(_by_image(rows).values())
    drawn: list[Row] = []
    for position in np.random.default_rng(seed).permutation(len(groups)):
        if len(drawn) >= count:
            break
        drawn += groups[position]
    return drawn


def exchange_images(rows: Sequence[Row], seed: int) -> list[Row]:
    """The same rows, each image's questions asked of another image.

    Raises:
        ValueError: Fewer than two images.
    """
    groups = list(_by_image(rows).values())
    if len(groups) < 2:
        raise InputError("The image-blind control needs at least two images.")
    order = np.random.default_rng(seed).permutation(len(groups))
    exchanged = []
    # Each takes the image that follows in a random circle, so none keeps its own.
    for position, group in enumerate(order):
        other = groups[order[(position + 1) % len(order)]][0]
        exchanged += [{**row, "image": other["image"]} for row in groups[group]]
    return exchanged


def _by_image(rows: Sequence[Row]) -> dict[Hashable, list[Row]]:
    images: dict[Hashable, list[Row]] = {}
    for row in rows:
        images.setdefault(image_key(row), []).append(row)
    return images
