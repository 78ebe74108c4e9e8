"""The out-of-distribution score of an image: how far it is from the images a model was trained on.

What is compared are the backbone's features, averaged over the image, and how sharp and bright the image is. Both are taken
while the model computes its answer anyway, so they cost an average and no forward pass.

The score is a Mahalanobis distance (Lee et al., A Simple Unified Framework for Detecting Out-of-Distribution Samples and
Adversarial Attacks, arXiv 1807.03888, section 2.1), with data sets as the groups. The covariance is shrunk as Ledoit and Wolf
do (A well-conditioned estimator for large-dimensional covariance matrices, 2004), for there may be fewer images than features.
It is stored by its largest directions and one variance for all others.
"""

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unihema.checkpoint_files import REFERENCE_FILE
from unihema.errors import CheckpointError, InputError
from unihema.files import shortened, write_atomically
from unihema.modeling_unihema.outputs import UniHemaImageFeatures
from unihema.results.smear_result import OTHER_SIZE, POOR_QUALITY, SmearResult


# Variance of the Laplacian as part of the variance of the grey values; mean grey value, 0..255; share of burnt-out pixels.
QUALITIES = ("sharpness", "brightness", "white")
# From this grey value on (of 255) a pixel counts as burnt out.
_WHITE = 250
# Directions of the covariance that are kept.
_RANK = 64
# Of a channel, as part of the root mean square of all channels' spreads.
_LEAST_SPREAD = 0.1
# Share of the images of a data set that are below its limit, and inside its ranges.
QUANTILE = 0.99
# How far outside its range a value must be: the range is that of the images at hand, and others vary a little more.
_SHARPNESS_FACTOR = 1.5
_BRIGHTNESS_STEP = 15
_WHITE_STEP = 0.1
_SIZE_FACTOR = 1.25
# A median of fewer cells says little.
_FEWEST_CELLS = 3
_FORMAT = "unihema-reference-1"
_ABOUT = "about"
_ARRAYS = ("means", "scale", "vectors", "variances")
_STORED = (*_ARRAYS, "rest", "limits", "quality")


def image_quality(
    pixel_values: torch.Tensor, valid: torch.Tensor, mean: Sequence[float], std: Sequence[float]
) -> torch.Tensor:
    """Sharpness, brightness and burnt-out share at the size at which the model sees the image; as [`QUALITIES`].

    Args:
        pixel_values (`torch.Tensor`): `[B, 3, H, W]`, normalised.
        valid (`torch.Tensor`): Boolean `[B, h, w]` of the finest level, `False` on padding.
        mean, std (`Sequence[float]`): With which they were normalised.

    Returns:
        `torch.Tensor`: `[B, 3]` float32.
    """
    shift, scale = (torch.tensor(list(values), device=pixel_values.device)[:, None, None] for values in (mean, std))
    found = []
    for pixels, inside in zip(pixel_values.float(), valid):
        # Padding lies at the right and bottom; a border cell of the level may still hold some of it, so that is left out.
        size = [
            side if bool(line.all()) else (int(line.sum()) - 1) * (side // len(line))
            for line, side in ((inside[:, 0], pixels.shape[1]), (inside[0], pixels.shape[2]))
        ]
        grey = 255 * (pixels[:, : max(size[0], 3), : max(size[1], 3)] * scale + shift).mean(0)
        centre = grey[1:-1, 1:-1]
        laplacian = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * centre
        sharpness = laplacian.var() / centre.var().clamp(min=1)
        found.append(torch.stack((sharpness, grey.mean(), (grey >= _WHITE).float().mean())))
    return torch.stack(found)


@dataclass(frozen=True)
class TiedGaussians:
    """Gaussians of groups (data sets), with one mean a group and one covariance for all.

    Args:
        means (`np.ndarray`): `[groups, D]`.
        scale (`np.ndarray`): `[D]`, by which a difference to a mean is divided first.
        vectors (`np.ndarray`): `[D, rank]`, directions of the largest variances of such differences.
        variances (`np.ndarray`): `[rank]`.
        rest (`float`): Variance in every other direction.
    """

    means: np.ndarray
    scale: np.ndarray
    vectors: np.ndarray
    variances: np.ndarray
    rest: float

    @classmethod
    def fit(cls, features: np.ndarray, groups: np.ndarray, rank: int = _RANK) -> "TiedGaussians":
        """
        Args:
            features (`np.ndarray`): `[n, D]`.
            groups (`np.ndarray`): `[n]`, the number of each one's group, from 0 without gaps.
            rank (`int`): Directions to keep.

        Raises:
            ValueError: Fewer than two features in every group: no spread to learn.
        """
        features, groups = np.asarray(features, float), np.asarray(groups, int)
        count = int(groups.max(initial=-1)) + 1
        if len(features) <= count:
            raise InputError(f"{len(features)} images in {count} groups say nothing about spread; give more images.")
        means = np.stack([features[groups == group].mean(0) for group in range(count)])
        differences = features - means[groups]
        spread = differences.std(0)
        # A channel that was silent on every image would make the least sound of another one infinitely far.
        scale = np.maximum(spread, _LEAST_SPREAD * np.sqrt((spread**2).mean())) + 1e-6
        differences /= scale
        values, vectors = np.linalg.eigh(_shrunk_covariance(differences))
        values, vectors = values[::-1], vectors[:, ::-1]
        kept = min(rank, len(values) - 1)
        return cls(means, scale, vectors[:, :kept], values[:kept], float(values[kept:].mean()))

    def distances(self, features: np.ndarray) -> np.ndarray:
        """Mahalanobis distance to each group, over the root of D so that it is near 1 inside a group: `[n, groups]`."""
        differences = (np.asarray(features, float)[:, None] - self.means) / self.scale
        along = differences @ self.vectors
        beside = np.maximum((differences**2).sum(-1) - (along**2).sum(-1), 0)
        return np.sqrt(((along**2 / self.variances).sum(-1) + beside / self.rest) / len(self.scale))


def _shrunk_covariance(centred: np.ndarray) -> np.ndarray:
    """Covariance of centred rows `[n, D]`, drawn towards a multiple of the identity (Ledoit and Wolf 2004, section 3.3)."""
    number, size = centred.shape
    sample = centred.T @ centred / number
    level = np.trace(sample) / size
    spread = ((sample - level * np.eye(size)) ** 2).sum()
    error = ((centred**2).sum(1) ** 2).sum() / number**2 - (sample**2).sum() / number
    weight = min(max(error, 0.0) / spread, 1.0) if spread > 0 else 1.0
    return (1 - weight) * sample + (weight * level + 1e-6) * np.eye(size)


class ReferenceWarning(UserWarning):
    """The reference beside a checkpoint belongs to other weights, so images are not compared with it."""


@dataclass(frozen=True)
class TaskReference:
    """The images of one task that a model was trained on.

    Args:
        groups (`tuple[str, ...]`): Names of the data sets.
        gaussians ([`TiedGaussians`]): Of their images' features, fitted on training images.
        limits (`np.ndarray`): `[groups]`, the distance below which `QUANTILE` of a data set's validation images are.
        quality (`np.ndarray`): `[groups, qualities, 2]`, the range that `QUANTILE` of its images are in.
        cell_sizes (`dict[str, tuple[float, float]]`): Class -> smallest and largest median size (root of the box's area) of
            the cells of an image, in pixels of the image as the model sees it.
    """

    groups: tuple[str, ...]
    gaussians: TiedGaussians
    limits: np.ndarray
    quality: np.ndarray
    cell_sizes: dict[str, tuple[float, float]]


@dataclass(frozen=True)
class ModelReference:
    """What a model was trained on.

    Args:
        tasks (`dict[str, TaskReference]`): For each task of images.
        backbone (`str`): Of the weights it belongs to, see `backbone_checksum`.
    """

    tasks: dict[str, TaskReference]
    backbone: str

    def save(self, folder: str | Path) -> Path:
        """Writes `reference_features.safetensors` into a checkpoint folder, whole or not at all."""
        from safetensors.numpy import save

        arrays: dict[str, np.ndarray] = {}
        told = {}
        for task, of_task in self.tasks.items():
            parts = {name: getattr(of_task.gaussians, name) for name in _ARRAYS}
            parts |= {"rest": np.array([of_task.gaussians.rest]), "limits": of_task.limits, "quality": of_task.quality}
            arrays |= {f"{task}.{name}": np.ascontiguousarray(part, np.float32) for name, part in parts.items()}
            told[task] = {"groups": of_task.groups, "cell_sizes": of_task.cell_sizes}
        about = {"format": _FORMAT, "backbone": self.backbone, "tasks": told}
        # One entry, as the library writes several in any order: a file that is the same each time can be compared.
        content = save(arrays, {_ABOUT: json.dumps(about, ensure_ascii=False)})
        path = Path(folder) / REFERENCE_FILE
        write_atomically(path, lambda file: file.write(content))
        return path

    def save_with(self, model: Any, folder: str | Path) -> None:
        """Writes it beside a model's weights, if they are still those it was made with."""
        if self.backbone == backbone_checksum(model):
            self.save(folder)

    @classmethod
    def of_model(cls, model: Any, folder: str | Path) -> "ModelReference | None":
        """The reference beside a model's weights; `None` where there is none, or it was made with other weights.

        Args:
            model (`UniHemaPreTrainedModel`): As it was loaded from the folder.
            folder (`str` or `Path`): Its checkpoint.

        Raises:
            CheckpointError: The file cannot be read.
        """
        path = Path(folder) / REFERENCE_FILE
        if not path.is_file():
            return None
        try:
            reference = cls.load(folder)
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        # In bfloat16 the weights have lost what the checksum is made of.
        if str(model.dtype) in ("torch.float32", "torch.float16") and reference.backbone != backbone_checksum(model):
            warnings.warn(
                f"{path} was made with other weights, so images are not compared with it. Write it anew with "
                "`unihema reference`.",
                ReferenceWarning,
                stacklevel=3,
            )
            return None
        return reference

    @classmethod
    def load(cls, folder: str | Path) -> "ModelReference":
        """The reference in a checkpoint folder.

        Raises:
            ValueError: The file is missing, damaged or of another format.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(folder) / REFERENCE_FILE
        try:
            with safe_open(path, "np") as file:
                about = json.loads((file.metadata() or {}).get(_ABOUT, "{}"))
                if about.get("format") != _FORMAT:
                    raise InputError(f"format {about.get('format')!r}, not {_FORMAT!r}")
                tasks = {
                    task: _task_reference(told, {name: file.get_tensor(f"{task}.{name}") for name in _STORED})
                    for task, told in about["tasks"].items()
                }
            return cls(tasks, about["backbone"])
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}: cannot be read ({shortened(error)}). Delete it, or write it anew with `unihema reference`."
            ) from error


def _task_reference(told: dict[str, Any], stored: dict[str, np.ndarray]) -> TaskReference:
    arrays = {name: stored[name].astype(float) for name in _ARRAYS}
    gaussians = TiedGaussians(**arrays, rest=float(stored["rest"][0]))
    sizes = {name: (float(low), float(high)) for name, (low, high) in told["cell_sizes"].items()}
    limits, quality = stored["limits"].astype(float), stored["quality"].astype(float)
    if quality.shape != (len(told["groups"]), len(QUALITIES), 2):
        raise InputError(f"quality of shape {quality.shape} for {len(told['groups'])} data sets")
    return TaskReference(tuple(told["groups"]), gaussians, limits, quality, sizes)


def backbone_checksum(model: Any) -> str:
    """SHA-256 of the backbone's weights as float16, so that storing a checkpoint in half precision does not change it."""
    digest = hashlib.sha256()
    for name, tensor in model.model.visual_backbone.backbone.state_dict().items():
        digest.update(name.encode())
        if tensor.is_floating_point():
            digest.update(tensor.detach().half().cpu().numpy().tobytes())
    return digest.hexdigest()


def image_scores(
    features: UniHemaImageFeatures, pixel_values: torch.Tensor, processor: Any
) -> tuple[np.ndarray, np.ndarray]:
    """What images are compared by.

    Args:
        features ([`UniHemaImageFeatures`]): Of a batch of images.
        pixel_values (`torch.Tensor`): `[B, 3, H, W]`, the same images.
        processor ([`UniHemaProcessor`]): For what normalised pixels mean.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: Backbone features `[B, D]`, and [`QUALITIES`] `[B, 3]`.
    """
    images = processor.image_processor
    quality = image_quality(pixel_values, features.levels.valid[0], images.image_mean, images.image_std)
    return features.pooler_output.float().cpu().numpy(), quality.cpu().numpy()


def compare_images(
    reference: TaskReference,
    features: UniHemaImageFeatures,
    pixel_values: torch.Tensor,
    processor: Any,
    task: str,
    results: Sequence[SmearResult],
) -> None:
    """Sets the `out_of_distribution` of each result of a batch, and adds to its `warnings`.

    Args:
        reference ([`TaskReference`]): Of the task that was done.
        features, pixel_values, processor: As for [`image_scores`].
        task (`str`): The task.
        results (`Sequence[SmearResult]`): Of the images, their cells in them.
    """
    for result, pooled, quality in zip(results, *image_scores(features, pixel_values, processor), strict=True):
        scale = processor.image_processor.scale((result.height, result.width), task)
        set_out_of_distribution(reference, pooled, quality.tolist(), result, scale)


def set_out_of_distribution(
    reference: TaskReference, features: np.ndarray, quality: Sequence[float], result: SmearResult, scale: float = 1.0
) -> None:
    """Sets a result's `out_of_distribution`, and adds to its `warnings`.

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
    result.out_of_distribution = {"distance": distance, "limit": limit, "nearest": name}
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
        told(f"{POOR_QUALITY}blurred", "sharpness", ".2g")
    elif value["sharpness"] > high["sharpness"] * _SHARPNESS_FACTOR:
        told(f"{POOR_QUALITY}noisy or over-sharpened", "sharpness", ".2g")
    if value["brightness"] + _BRIGHTNESS_STEP < low["brightness"]:
        told(f"{POOR_QUALITY}underexposed", "brightness", ".0f")
    elif value["brightness"] > high["brightness"] + _BRIGHTNESS_STEP:
        told(f"{POOR_QUALITY}overexposed", "brightness", ".0f")
    elif value["white"] > high["white"] + _WHITE_STEP:
        found.append(
            f"{POOR_QUALITY}overexposed: {100 * value['white']:.0f} % of its pixels are burnt out, of images of {name} at most "
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
                f"{label} cells are {kind} {OTHER_SIZE} (median {size:.0f} pixels, trained on "
                f"{low:.0f} to {high:.0f}): check the magnification. The image's longer side is {edge:.0f} pixels for the "
                f"model; at {usual} its cells would be of the usual size (--image-size detection={usual})."
            )
    return found


__all__ = [
    "QUANTILE",
    "REFERENCE_FILE",
    "ModelReference",
    "ReferenceWarning",
    "TaskReference",
    "TiedGaussians",
    "backbone_checksum",
    "compare_images",
    "image_scores",
    "set_out_of_distribution",
]
