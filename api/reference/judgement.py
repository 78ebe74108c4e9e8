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


def judge(
    reference: TaskReference, features: np.ndarray, quality: Sequence[float], result: SmearResult, scale: float = 1.0
) -> None:
    """Sets a result's `familiarity`, and adds to its `warnings`.

    Args:
        reference ([`TaskReference`]): Of the task that was done.
        features (`np.ndarray`): `[D]`, of the image.
        quality (`Sequence[float]`): `QUALITIES` of the image.
        result ([`SmearResult`]): Of the image, its cells in it.
        scale (`float`): Pixels that the model saw for each pixel of the image, see `UniHemaImageProcessor.scale`.
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
    result.warnings += _size_warnings(result, reference.cell_sizes, scale)


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


def _size_warnings(result: SmearResult, known: dict[str, tuple[float, float]], scale: float) -> list[str]:
    edge, found = max(result.width, result.height) * scale, []
    for label, (low, high) in known.items():
        boxes = np.array([cell.box for cell in result.cells if cell.label == label])
        if len(boxes) < _FEWEST_CELLS:
            continue
        size = scale * float(np.median(np.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))))
        kind = "smaller" if size * _SIZE_FACTOR < low else "larger" if size > high * _SIZE_FACTOR else None
        if kind:
            usual = 32 * max(1, round(edge * (low * high) ** 0.5 / size / 32))
            found.append(
                f"{label} cells are {kind} for the model than those it was trained on (median {size:.0f} pixels, trained on "
                f"{low:.0f} to {high:.0f}): check the magnification. The image's longer side is {edge:.0f} pixels for the "
                f"model; at {usual} its cells would be of the usual size (--image-size detection={usual})."
            )
    return found


__all__ = ["judge"]
