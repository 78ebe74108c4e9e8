"""What a model was trained on, as far as a new image is compared with it: saved beside the weights."""

import hashlib
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unihema.checkpoint import REFERENCE_FILE
from unihema.files import write_atomically
from unihema.reference.features import QUALITIES
from unihema.reference.gaussian import TiedGaussians


# Share of the images of a data set that are below its limit, and inside its ranges.
QUANTILE = 0.99
_FORMAT = "unihema-reference-1"
_ABOUT = "about"
# Where a model keeps it, with the adapters that were in use then.
_ATTACHED = "_image_reference"
_ARRAYS = ("means", "scale", "vectors", "variances")


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

        arrays, told = {}, {}
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
                    raise ValueError(f"format {about.get('format')!r}, not {_FORMAT!r}")
                tasks = {
                    task: _task_reference(told, lambda name, task=task: file.get_tensor(f"{task}.{name}"))
                    for task, told in about["tasks"].items()
                }
            return cls(tasks, about["backbone"])
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: cannot be read ({error}). Delete it, or write it anew with `unihema reference`."
            ) from error


def _task_reference(told: dict[str, Any], tensor) -> TaskReference:
    gaussians = TiedGaussians(*(tensor(name).astype(float) for name in _ARRAYS), float(tensor("rest")[0]))
    sizes = {name: (float(low), float(high)) for name, (low, high) in told["cell_sizes"].items()}
    limits, quality = tensor("limits").astype(float), tensor("quality").astype(float)
    if quality.shape != (len(told["groups"]), len(QUALITIES), 2):
        raise ValueError(f"quality of shape {quality.shape} for {len(told['groups'])} data sets")
    return TaskReference(tuple(told["groups"]), gaussians, limits, quality, sizes)


def backbone_checksum(model: Any) -> str:
    """SHA-256 of the backbone's weights as float16, so that storing a checkpoint in half precision does not change it."""
    digest = hashlib.sha256()
    for name, tensor in model.model.visual_backbone.backbone.state_dict().items():
        digest.update(name.encode())
        if tensor.is_floating_point():
            digest.update(tensor.detach().half().cpu().numpy().tobytes())
    return digest.hexdigest()


def attach_reference(model: Any, folder: str | Path) -> None:
    """Makes a model compare images with the reference of a folder, if that has one; with none otherwise.

    Raises:
        ValueError: The file there cannot be read.
    """
    reference = None
    if (Path(folder) / REFERENCE_FILE).is_file() and hasattr(model, "model"):
        reference = ModelReference.load(folder)
        # In bfloat16 the weights have lost what the checksum is made of.
        if str(model.dtype) in ("torch.float32", "torch.float16") and reference.backbone != backbone_checksum(model):
            warnings.warn(
                f"{Path(folder) / REFERENCE_FILE} was made with other weights, so images are not compared with it. Write "
                "it anew with `unihema reference`.",
                ReferenceWarning,
                stacklevel=3,
            )
            reference = None
    setattr(model, _ATTACHED, (reference, _adapters(model)))


def reference_of(model: Any) -> ModelReference | None:
    """The reference of a loaded model, if its checkpoint folder has one.

    With another adapter in use than when it was attached there is none: that was trained on other images.

    Raises:
        ValueError: The file there cannot be read.
    """
    if not hasattr(model, _ATTACHED):
        folder = model.config.name_or_path
        if not folder or _adapters(model):
            return None
        attach_reference(model, folder)
    reference, adapters = getattr(model, _ATTACHED)
    return reference if adapters == _adapters(model) else None


def _adapters(model: Any) -> tuple[str, ...]:
    return tuple(getattr(model, "adapters_in_use", ()))


__all__ = [
    "QUANTILE",
    "REFERENCE_FILE",
    "ModelReference",
    "ReferenceWarning",
    "TaskReference",
    "attach_reference",
    "backbone_checksum",
    "reference_of",
]
