"""Adapter folders: finding the base that one belongs to, and loading both."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoint import CheckpointError, _load_plain, _read_json, checkpoint_files, reference_files
from .files import sha256


if TYPE_CHECKING:
    from .modeling_unihema.modeling_unihema import UniHemaPreTrainedModel
    from .processing_unihema.processing_unihema import UniHemaProcessor


ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What 8-bit linears would spoil: heads, whose copies an adapter trains, and layers whose few outputs are coordinates.
_KEPT_WHOLE = (
    "class_head",
    "box_head",
    "morphology_head",
    "single_cell_head",
    "single_cell_feature_extraction",
    "lm_head",
    "sampling_offsets",
    "attention_weights",
)


def adapter_base(folder: str | Path) -> Path:
    """The checkpoint folder that an adapter belongs to; the network is not asked.

    It is where the adapter says (`base_model_name_or_path`): a folder, a folder of that name beside the adapter's, or a
    repository of the Hub that was downloaded before.

    Args:
        folder (`str` or `Path`): The adapter.

    Raises:
        CheckpointError: It is in none of these places.
    """
    folder = Path(folder)
    name = _read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not name:
        raise CheckpointError(f"{folder / ADAPTER_CONFIG}: no base_model_name_or_path; write its base's folder there.")
    beside = folder.resolve().parent / Path(name).name
    for place in (Path(name), beside):
        if (place / "config.json").is_file():
            return place
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        raise CheckpointError(
            f"{folder}: an adapter of {name!r}, which is neither a folder here, nor lies beside the adapter as "
            f"{beside}, nor was downloaded before. Copy the base there, or download it (hf download {name}), or write "
            f"its folder as base_model_name_or_path into {ADAPTER_CONFIG}."
        ) from None


def adapter_files(folder: str | Path) -> list[Path]:
    """The files of an adapter folder itself.

    Raises:
        CheckpointError: No weights, or pickled ones.
    """
    folder = Path(folder)
    if not (folder / ADAPTER_WEIGHTS).is_file():
        pickled = (
            " Pickled weights (adapter_model.bin) are not read." if (folder / "adapter_model.bin").is_file() else ""
        )
        raise CheckpointError(
            f"{folder}: adapter without {ADAPTER_WEIGHTS}. Copy the whole folder again, or save it again.{pickled}"
        )
    own = [folder / name for name in ("processor_config.json", "tokenizer.json")]
    return [folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS, *(path for path in own if path.is_file())]


def adapter_fingerprint(folder: str | Path) -> dict[str, str]:
    """SHA-256 of each file that decides what an adapter answers; those of its base are named `base/...`."""
    base = {f"base/{path.name}": sha256(path) for path in checkpoint_files(adapter_base(folder))}
    files = [*adapter_files(folder), *reference_files(folder)]
    return {path.name: sha256(path) for path in files} | base


def load_adapted(
    *folders: str | Path,
    base: str | Path | None = None,
    names: Sequence[str] | None = None,
    device: str | None = None,
    load_in_8bit: bool = False,
) -> "tuple[UniHemaPreTrainedModel, UniHemaProcessor]":
    """A base with adapters, ready to analyse images; the first adapter is in use, `model.set_adapter(name)` switches.

    Args:
        *folders (`str` or `Path`): Adapters of one base.
        base (`str` or `Path`, *optional*): Folder of the base; where the first adapter says when missing.
        names (`Sequence[str]`, *optional*): What to call the adapters; as their folders when missing.
        device (`str`, *optional*): Such as `"cpu"` or `"cuda:0"`; the first GPU where there is one when missing.
        load_in_8bit (`bool`): Keep the linears of the base in 8 bit; needs an NVIDIA GPU and bitsandbytes.

    Returns:
        `tuple`: The model in eval mode, and the processor of the first adapter, or of the base where it has none.

    Raises:
        CheckpointError: A folder is missing or damaged, the adapter does not fit the base, or 8 bit cannot be had.
        ValueError: Not one name for each adapter, or a name twice.
    """
    from .processing_unihema.processing_unihema import UniHemaProcessor

    places = [Path(folder) for folder in folders]
    names = [place.resolve().name for place in places] if names is None else list(names)
    if not places or len(set(names)) != len(places) or len(names) != len(places):
        raise ValueError(f"{len(places)} adapters and the names {', '.join(names) or 'none'}: give each its own.")
    # Names become parts of the names of weights.
    names = [name.replace(".", "_") for name in names]
    for place in places:
        if not (place / ADAPTER_CONFIG).is_file():
            raise CheckpointError(f"{place}: no adapter folder ({ADAPTER_CONFIG} is missing).")
        adapter_files(place)
    source = adapter_base(places[0]) if base is None else Path(base)
    model, processor = _load_plain(source, device, **(_in_8_bit(device) if load_in_8bit else {}))
    for place, name in zip(places, names):
        try:
            model.load_adapter(place, name)
        except (ValueError, TypeError, OSError) as error:
            raise CheckpointError(f"{place}: adapter cannot be loaded ({error})") from error
    model.set_adapter(names[0])
    if (places[0] / "processor_config.json").is_file():
        processor = UniHemaProcessor.from_pretrained(places[0], local_files_only=True)
    return model.eval(), processor


def _in_8_bit(device: str | None) -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available() or (device or "cuda").startswith("cpu"):
        raise CheckpointError("Loading in 8 bit needs an NVIDIA GPU; without one, load the model as it is.")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise CheckpointError("Loading in 8 bit needs bitsandbytes: pip install bitsandbytes.") from None
    from transformers import BitsAndBytesConfig

    kept = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(_KEPT_WHOLE))
    return {"quantization_config": kept, "device_map": {"": device or "cuda"}}


__all__ = ["adapter_base", "adapter_files", "adapter_fingerprint", "load_adapted"]
