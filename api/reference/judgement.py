"""An image compared with those a model was trained on: how familiar it is, and what a reader of the result must know."""

from collections.abc import Sequence

import numpy as np

from unihema.processing_unihema.results import SmearResult
from unihema.reference.features import QUALITIES
from unihema.reference.model_reference import QUANTILE, TaskReference


# How far outside its range a value must be: the range is that of the images at hand, and others vary a little more.
_SHARPNESS_FACTOR = 1.5
_BRIGHTNESS_STEP = 15
_WHITE_STEP = 0.1
_SIZE_FACTOR = 1.25
# A median of fewer cells says little.
_FEWEST_CELLS = 3


def judge(reference: TaskReference, features: np.ndarray, quality: Sequence[float], result: SmearResult) -> None:
    """Sets a result's `familiarity`, and adds to its `warnings`.

    Args:
        reference ([`TaskReference`]): Of the task that was done.
        features (`np.ndarray`): `[D]`, of the image.
        quality (`Sequence[float]`): `QUALITIES` of the image.
        result ([`SmearResult`]): Of the image, its cells in it.
    """
    distances = reference.gaussians.distances(features[None])[0]
    inside = distances <= reference.limits
    nearest = int(np.argmin(np.where(inside, distances, np.inf) if inside.any() else distances / reference.limits))
    name, distance, limit = reference.groups[nearest], float(distances[nearest]), float(reference.limits[nearest])
    result.familiarity = {"distance": distance, "limit": limit, "nearest": name}
    if distance > limit:
        result.warnings.append(
            f"This image looks unlike the images the model was trained on (distance {distance:.1f} to the most similar data "
            f"set, {name}; {100 * QUANTILE:.0f} % of its validation images are below {limit:.1f}): check the result."
        )
    result.warnings += _quality_warnings(quality, reference.quality[nearest], name)
    result.warnings += _size_warnings(result, reference.cell_sizes)


def _quality_warnings(quality: Sequence[float], ranges: np.ndarray, name: str) -> list[str]:
    value = dict(zip(QUALITIES, map(float, quality)))
    low, high = (dict(zip(QUALITIES, ranges[:, side].tolist())) for side in (0, 1))
    found = []

    def told(what: str, quality: str, digits: str) -> None:
        found.append(
            f"{what}: {quality} {value[quality]:{digits}}, images of {name} have {low[quality]:{digits}} to "
            f"{high[quality]:{digits}}."
        )

    if value["sharpness"] * _SHARPNESS_FACTOR < low["sharpness"]:
        told("The image is blurred", "sharpness", ".2g")
    elif value["sharpness"] > high["sharpness"] * _SHARPNESS_FACTOR:
        told("The image is noisy or over-sharpened", "sharpness", ".2g")
    if value["brightness"] + _BRIGHTNESS_STEP < low["brightness"]:
        told("The image is underexposed", "brightness", ".0f")
    elif value["brightness"] > high["brightness"] + _BRIGHTNESS_STEP:
        told("The image is overexposed", "brightness", ".0f")
    elif value["white"] > high["white"] + _WHITE_STEP:
        found.append(
            f"The image is overexposed: {100 * value['white']:.0f} % of its pixels are burnt out, of images of {name} at most "
            f"{100 * high['white']:.0f} %."
        )
    return found


def _size_warnings(result: SmearResult, known: dict[str, tuple[float, float]]) -> list[str]:
    longer, found = max(result.width, result.height), []
    for label, (low, high) in known.items():
        boxes = np.array([cell.box for cell in result.cells if cell.label == label])
        if len(boxes) < _FEWEST_CELLS:
            continue
        size = float(np.median(np.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])))) / longer
        kind = "smaller" if size * _SIZE_FACTOR < low else "larger" if size > high * _SIZE_FACTOR else None
        if kind:
            found.append(
                f"{label} cells are {kind} in this image than in those the model was trained on (median {100 * size:.1f} % "
                f"of the image's longer side, trained on {100 * low:.1f} to {100 * high:.1f} %): check the magnification."
            )
    return found


__all__ = ["judge"]
