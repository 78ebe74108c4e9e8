"""Loading a checkpoint folder, with errors that say what is wrong with it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .files import sha256


if TYPE_CHECKING:
    from .modeling_unihema.modeling_unihema import UniHemaPreTrainedModel
    from .processing_unihema.processing_unihema import UniHemaProcessor


WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
# What the images it was trained on are like; a checkpoint may have it.
REFERENCE_FILE = "reference_features.safetensors"
_PARTS = {
    "config.json": "the model's configuration",
    "processor_config.json": "the image processor and prompts",
    "tokenizer.json": "the tokenizer",
    "tokenizer_config.json": "the tokenizer's settings",
}


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file or task and the remedy."""


def checkpoint_files(folder: str | Path) -> list[Path]:
    """The files that a checkpoint folder needs.

    Args:
        folder (`str` or `Path`): A folder written by `unihema train` or by `save_pretrained`.

    Returns:
        `list[Path]`: Configuration, processor, tokenizer and weights, all of them there.

    Raises:
        CheckpointError: The folder or one of its files is missing, or it holds another model.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: no such checkpoint folder. Train one with `unihema train`, or check the path."
        )
    if (folder / WEIGHTS_INDEX).is_file():
        shards = sorted(set(_read_json(folder / WEIGHTS_INDEX).get("weight_map", {}).values()))
        weights = {WEIGHTS_INDEX: "the list of weight files"} | dict.fromkeys(shards, "part of the weights")
    else:
        weights = {WEIGHTS: "the weights"}
    needed = _PARTS | weights
    missing = [f"{name} ({what})" for name, what in needed.items() if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder}: checkpoint without {', '.join(missing)}. Copy the whole folder again, or save model and "
            "processor with save_pretrained."
        )
    model_type = _read_json(folder / "config.json").get("model_type")
    if model_type != "unihema":
        raise CheckpointError(f"{folder}: config.json is of model type {model_type!r}, not 'unihema'.")
    return [folder / name for name in needed]


def fingerprint(folder: str | Path) -> dict[str, str]:
    """SHA-256 of each file that decides what a checkpoint answers, by file name."""
    if is_adapter(folder):
        from .adapters import adapter_fingerprint

        return adapter_fingerprint(folder)
    files = [Path(folder)] if is_onnx(folder) else [*checkpoint_files(folder), *reference_files(folder)]
    return {path.name: sha256(path) for path in files}


def reference_files(folder: str | Path) -> list[Path]:
    """The file that says what images a checkpoint was trained on, where it has one."""
    return [path for path in [Path(folder) / REFERENCE_FILE] if path.is_file()]


def is_onnx(path: str | Path) -> bool:
    """Whether this names a file made by `unihema export` rather than a checkpoint folder."""
    return Path(path).suffix == ".onnx" and Path(path).is_file()


def is_adapter(folder: str | Path) -> bool:
    """Whether this is the folder of an adapter, which belongs to a checkpoint in another place."""
    return (Path(folder) / "adapter_config.json").is_file() and not (Path(folder) / "config.json").is_file()


def load_checkpoint(folder: str | Path, device: str | None = None) -> "tuple[UniHemaPreTrainedModel, UniHemaProcessor]":
    """Model and processor of a local checkpoint folder, ready to analyse images; never touches the network.

    Args:
        folder (`str` or `Path`): The checkpoint. A full one loads with all its heads, one saved by a single head's
            class with that head. Or the folder of an adapter, whose base must be on this machine (see [`load_adapted`]);
            or an ONNX file made by `unihema export`, which is called like the model.
        device (`str`, *optional*): Such as `"cpu"` or `"cuda:0"`; the first GPU where there is one when missing.

    Returns:
        `tuple`: The model in eval mode, and the processor.

    Raises:
        CheckpointError: Files are missing or damaged, or weights of the model are missing from them.
    """
    if is_onnx(folder):
        from .onnx_model import load_onnx

        return load_onnx(folder)
    if is_adapter(folder):
        from .adapters import load_adapted

        return _with_reference(load_adapted(folder, device=device), folder)
    return _with_reference(_load_plain(folder, device), folder)


def set_image_sizes(processor: "UniHemaProcessor", sizes: Mapping[str, int]) -> None:
    """Changes the size at which a processor gives images to the model, for another magnification than it was trained on.

    Args:
        processor ([`UniHemaProcessor`]): The processor.
        sizes (`Mapping[str, int]`): Task -> longest edge in pixels.

    Raises:
        ValueError: Unknown task, or an edge that is no image's.
    """
    images = processor.image_processor
    for task, edge in sizes.items():
        if task not in images.task_sizes:
            raise ValueError(f"Unknown task '{task}' for an image size; tasks are {', '.join(images.task_sizes)}.")
        if not 32 <= edge <= 8192:
            raise ValueError(f"An image size is the longest edge in pixels, 32 to 8192; got {edge} for {task}.")
    images.task_sizes = images.task_sizes | {task: {"longest_edge": int(edge)} for task, edge in sizes.items()}


def _with_reference(loaded, folder: str | Path):
    """Model and processor, the model with the reference that lies beside its weights."""
    if reference_files(folder):
        from .results.out_of_distribution import attach_reference

        try:
            attach_reference(loaded[0], folder)
        except ValueError as error:
            raise CheckpointError(str(error)) from error
    return loaded


def _load_plain(folder: str | Path, device: str | None, **options):
    """Model and processor of a checkpoint folder; `options` go to `from_pretrained`."""
    files = checkpoint_files(folder)
    import torch

    from .modeling_unihema import modeling_unihema
    from .processing_unihema.processing_unihema import UniHemaProcessor

    folder = Path(folder)
    architecture = (_read_json(folder / "config.json").get("architectures") or ["UniHemaForMultiTask"])[0]
    model_class = getattr(modeling_unihema, architecture, None)
    if model_class is None or not getattr(model_class, "tasks", None):
        raise CheckpointError(
            f"{folder}: config.json names the architecture {architecture!r}, which has no task head; save one of "
            "UniHemaForMultiTask, ForDetection, ForSegmentation, ForImageClassification or ForQA."
        )
    try:
        model, report = model_class.from_pretrained(folder, local_files_only=True, output_loading_info=True, **options)
        processor = UniHemaProcessor.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        names = ", ".join(path.name for path in files)
        raise CheckpointError(f"{folder}: checkpoint cannot be read ({names}): {error}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} weights of {architecture} are missing from the checkpoint, first {missing[0]!r}."
        )
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    # A model that was quantized while loading is where it should be, and cannot be moved.
    return (model if options else model.to(device)).eval(), processor


def available_tasks(model: "UniHemaPreTrainedModel") -> tuple[str, ...]:
    """Tasks the model has a head for and was trained on (all of its heads where the checkpoint does not say)."""
    trained = getattr(model.config, "trained_tasks", None)
    return tuple(task for task in model.tasks if trained is None or task in trained)


def require_tasks(model: "UniHemaPreTrainedModel", tasks: "tuple[str, ...] | list[str]") -> None:
    """Checks that a checkpoint can do what is asked.

    Raises:
        CheckpointError: It lacks the head, or the head was never trained.
        ValueError: There is no such task.
    """
    from .modeling_unihema.modeling_unihema import TASKS

    available = available_tasks(model)
    for task in tasks:
        if task not in TASKS:
            raise ValueError(f"Unknown task '{task}'; choose among {', '.join(TASKS)}.")
        if task not in available:
            raise CheckpointError(
                f"This checkpoint has no trained head for '{task}'; it does {', '.join(available) or 'nothing'}. Use "
                f"another checkpoint, or train one with `unihema train ... --task {task}`."
            )


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}). Copy the checkpoint again.") from error


__all__ = [
    "CheckpointError",
    "available_tasks",
    "checkpoint_files",
    "fingerprint",
    "is_adapter",
    "is_onnx",
    "load_checkpoint",
    "reference_files",
    "require_tasks",
    "set_image_sizes",
]
