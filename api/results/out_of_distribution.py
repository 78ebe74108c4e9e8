"""The out-of-distribution score of an image: how far it is from the images a model was trained on.

What is compared are the backbone's features, averaged over the image, and how sharp and bright the image is. Both are taken
while the model computes its answer anyway, so they cost an average and no forward pass.

The score is a Mahalanobis distance with data sets as the groups, see [`TiedGaussians`]. Beside it the file has what cells are
like, see [`CellReference`].
"""

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unihema.checkpoint_files import REFERENCE_FILE
from unihema.errors import CheckpointError, InputError
from unihema.files import shortened, write_atomically
from unihema.modeling_unihema.outputs import UniHemaImageFeatures
from unihema.modeling_unihema.tasks import TASK_TABLE
from unihema.results.odd_cells import CellReference
from unihema.results.smear_result import OTHER_SIZE, POOR_QUALITY, SmearResult
from unihema.results.tied_gaussians import TiedGaussians


# Variance of the Laplacian as part of the variance of the grey values; mean grey value, 0..255; share of burnt-out pixels.
QUALITIES = ("sharpness", "brightness", "white")
# From this grey value on (of 255) a pixel counts as burnt out.
_WHITE = 250
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
_STORED = (*_ARRAYS, "rest", "limits")


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
        cells (`dict[str, CellReference]`): What cells are like, for each head that names them.
    """

    tasks: dict[str, TaskReference]
    backbone: str
    cells: dict[str, CellReference] = field(default_factory=dict)

    def save(self, folder: str | Path) -> Path:
        """Writes `reference_features.safetensors` into a checkpoint folder, whole or not at all."""
        from safetensors.numpy import save

        arrays: dict[str, np.ndarray] = {}
        told = {}
        for task, of_task in self.tasks.items():
            arrays |= _arrays(task, of_task) | {f"{task}.quality": np.ascontiguousarray(of_task.quality, np.float32)}
            told[task] = {"groups": of_task.groups, "cell_sizes": of_task.cell_sizes}
        about: dict[str, Any] = {"format": _FORMAT, "backbone": self.backbone, "tasks": told}
        for head, of_head in self.cells.items():
            arrays |= _arrays(f"cells.{head}", of_head)
            about.setdefault("cells", {})[head] = {"classes": of_head.classes, "head": of_head.head}
        # One entry, as the library writes several in any order: a file that is the same each time can be compared.
        content = save(arrays, {_ABOUT: json.dumps(about, ensure_ascii=False)})
        path = Path(folder) / REFERENCE_FILE
        write_atomically(path, lambda file: file.write(content))
        return path

    def save_with(self, model: Any, folder: str | Path) -> None:
        """Writes it beside a model's weights, if they are still those it was made with."""
        if self.backbone == backbone_checksum(model):
            self.with_heads_of(model).save(folder)

    def with_heads_of(self, model: Any, unsure: bool = False) -> "ModelReference":
        """The same without the cells of heads that a model has not, or has with other weights.

        Args:
            model (`UniHemaPreTrainedModel`): The model.
            unsure (`bool`): Its weights have lost what the checksum is made of.
        """
        fitting = {
            head: of
            for head, of in self.cells.items()
            if hasattr(model, TASK_TABLE[head].head[0])
            and (unsure or of.head == head_checksum(model, head))
            and of.gaussians.means.shape[1] == model.config.d_model
        }
        return replace(self, cells=fitting)

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
        unsure = str(model.dtype) not in ("torch.float32", "torch.float16")
        if not unsure and reference.backbone != backbone_checksum(model):
            warnings.warn(
                f"{path} was made with other weights, so images are not compared with it. Write it anew with "
                "`unihema reference`.",
                ReferenceWarning,
                stacklevel=3,
            )
            return None
        return reference.with_heads_of(model, unsure)

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
                    task: _task_reference(
                        told, {name: file.get_tensor(f"{task}.{name}") for name in (*_STORED, "quality")}
                    )
                    for task, told in about["tasks"].items()
                }
                # Older ones have none.
                cells = {
                    head: _cell_reference(told, {name: file.get_tensor(f"cells.{head}.{name}") for name in _STORED})
                    for head, told in about.get("cells", {}).items()
                }
            return cls(tasks, about["backbone"], cells)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}: cannot be read ({shortened(error)}). Delete it, or write it anew with `unihema reference`."
            ) from error


def _arrays(name: str, part: TaskReference | CellReference) -> dict[str, np.ndarray]:
    arrays = {key: getattr(part.gaussians, key) for key in _ARRAYS}
    arrays |= {"rest": np.array([part.gaussians.rest]), "limits": part.limits}
    return {f"{name}.{key}": np.ascontiguousarray(array, np.float32) for key, array in arrays.items()}


def _gaussians(stored: dict[str, np.ndarray]) -> TiedGaussians:
    return TiedGaussians(**{name: stored[name].astype(float) for name in _ARRAYS}, rest=float(stored["rest"][0]))


def _cell_reference(told: dict[str, Any], stored: dict[str, np.ndarray]) -> CellReference:
    gaussians, limits, classes = _gaussians(stored), stored["limits"].astype(float), tuple(told["classes"])
    rank, width = len(gaussians.variances), len(gaussians.scale)
    shapes = [part.shape for part in (gaussians.means, gaussians.scale, gaussians.vectors, gaussians.variances, limits)]
    if shapes != [(len(classes), width), (width,), (width, rank), (rank,), (len(classes),)]:
        raise InputError(f"what cells of {len(classes)} classes are like has the shapes {shapes}")
    if not all(isinstance(name, str) for name in classes) or not (limits > 0).all():
        raise InputError("what cells are like has limits, or names of classes, that are none")
    return CellReference(classes, gaussians, limits, told["head"])


def _task_reference(told: dict[str, Any], stored: dict[str, np.ndarray]) -> TaskReference:
    gaussians = _gaussians(stored)
    sizes = {name: (float(low), float(high)) for name, (low, high) in told["cell_sizes"].items()}
    limits, quality = stored["limits"].astype(float), stored["quality"].astype(float)
    if quality.shape != (len(told["groups"]), len(QUALITIES), 2):
        raise InputError(f"quality of shape {quality.shape} for {len(told['groups'])} data sets")
    return TaskReference(tuple(told["groups"]), gaussians, limits, quality, sizes)


def backbone_checksum(model: Any) -> str:
    """SHA-256 of the backbone's weights as float16, so that storing a checkpoint in half precision does not change it."""
    return _checksum(model.model.visual_backbone.backbone)


def head_checksum(model: Any, task: str) -> str:
    """The same of the head of a task."""
    return _checksum(getattr(model, TASK_TABLE[task].head[0]))


def _checksum(part: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in part.state_dict().items():
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
    "head_checksum",
    "image_scores",
    "set_out_of_distribution",
]
