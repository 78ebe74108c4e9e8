"""What a checkpoint, an adapter or an exported file consists of on disk, with errors that say what is wrong with it."""

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from unihema.errors import CheckpointError
from unihema.files import json_sha256, printable, read_json_object, sha256, shortened


WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What the images it was trained on are like; a checkpoint may have it.
REFERENCE_FILE = "reference_features.safetensors"
# Of a repository: what loading does not read, and would not unpickle.
NEVER_FETCHED = [
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.pkl",
    "*.pickle",
    "*.h5",
    "*.msgpack",
    "*.gguf",
    "*.zip",
    "*.tar*",
]
# Of loading: two or three for each file, of which a checkpoint has some fifty.
MOST_REQUESTS = 3000
_PARTS = {
    "config.json": "the model's configuration",
    "processor_config.json": "the image processor and prompts",
    "tokenizer.json": "the tokenizer",
    "tokenizer_config.json": "the tokenizer's settings",
}


def local_folder(source: str | Path, **hub: Any) -> Path:
    """The folder or file that a source names on this machine; a repository of the Hub is fetched.

    Args:
        source (`str` or `Path`): A folder, a file, or a repository of the Hub. What exists here is never looked up there.
        **hub: `revision`, `token`, `cache_dir` and `local_files_only` of a repository.

    Raises:
        CheckpointError: It is neither here nor on the Hub, or the Hub cannot be reached.
    """
    path = Path(source)
    looks_local = path.exists() or isinstance(source, Path) or path.is_absolute() or str(source).count("/") > 1
    if looks_local or str(source).startswith(".") or path.suffix == ".onnx":
        return path
    from huggingface_hub import get_token, snapshot_download

    from unihema.hub import bounded_hub, hidden

    try:
        with bounded_hub(MOST_REQUESTS):
            return Path(snapshot_download(str(source), **{"ignore_patterns": NEVER_FETCHED} | hub))
    except Exception as error:
        # Whatever a server answers: huggingface_hub does not check the form of it.
        token = hub.get("token") if isinstance(hub.get("token"), str) else get_token()
        reason = hidden(str(error).strip() or type(error).__name__, token)
        raise CheckpointError(
            f"{shortened(source)}: no such checkpoint folder here, and it cannot be had from the Hub ({reason}). Check the "
            "path, or train one with `unihema train`."
        ) from None


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
        shards = _shards(folder / WEIGHTS_INDEX)
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
    read = {name: read_json(folder / name) for name in _PARTS}
    model_type = read["config.json"].get("model_type")
    if model_type != "unihema":
        raise CheckpointError(f"{folder}: config.json is of model type {str(model_type)[:40]!r}, not 'unihema'.")
    return [folder / name for name in needed]


def _shards(index: Path) -> list[str]:
    """The files that a list of weight files names."""
    listed = read_json(index).get("weight_map")
    names = set(map(str, listed.values())) if isinstance(listed, dict) else set()
    other = next((name for name in names if not re.fullmatch(r"[\w][\w.-]*\.safetensors", name)), None)
    if not names or other is not None:
        found = "no files" if other is None else f"the file {printable(other[:60])!r}"
        raise CheckpointError(
            f"{index}: names {found}; it lists safetensors files of its own folder. Save the model anew."
        )
    return sorted(names)


def stored_parameters(folder: str | Path) -> int:
    """Number of values in a checkpoint's files of weights, by their headers.

    Args:
        folder (`str` or `Path`): A checkpoint that [`checkpoint_files`] accepts.

    Raises:
        CheckpointError: A file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    count, config = 0, read_json(Path(folder) / "config.json")
    for path in checkpoint_files(folder):
        if path.suffix != ".safetensors":
            continue
        try:
            with safe_open(path, "np") as file:
                stored = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                count += sum(math.prod(each.get_shape()) for each in stored.values())
                whole = [name for name, each in stored.items() if each.get_shape() and each.get_dtype()[0] not in "FB"]
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path}: damaged weights ({shortened(error)}). Copy or save them again.") from error
        # Loading would turn them into numbers of any size; only quantised weights are whole numbers.
        if whole and "quantization_config" not in config:
            raise CheckpointError(
                f"{path}: damaged weights ({printable(whole[0][:80])!r} are no fractions). Save them again."
            )
    return count


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
    name = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not name or not isinstance(name, str):
        raise CheckpointError(f"{folder / ADAPTER_CONFIG}: no base_model_name_or_path; write its base's folder there.")
    beside = folder.resolve().parent / Path(name).name
    for place in (Path(name), beside):
        with suppress(OSError, ValueError):
            if (place / "config.json").is_file():
                return place
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError, OSError, ValueError):
        raise CheckpointError(
            f"{folder}: an adapter of {shortened(repr(name), 200)}, which is neither a folder here, nor lies beside the adapter "
            f"as {shortened(beside, 400)}, nor was downloaded. Copy the base there, or download it (hf download), or write "
            f"its folder as base_model_name_or_path into {ADAPTER_CONFIG}."
        ) from None


def adapter_files(folder: str | Path) -> list[Path]:
    """The files of an adapter folder itself.

    Raises:
        CheckpointError: No adapter, no weights, or pickled ones.
    """
    folder = Path(folder)
    if not (folder / ADAPTER_CONFIG).is_file():
        raise CheckpointError(f"{folder}: no adapter folder ({ADAPTER_CONFIG} is missing).")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        pickled = (
            " Pickled weights (adapter_model.bin) are not read." if (folder / "adapter_model.bin").is_file() else ""
        )
        raise CheckpointError(
            f"{folder}: adapter without {ADAPTER_WEIGHTS}. Copy the whole folder again, or save it again.{pickled}"
        )
    own = [folder / name for name in ("processor_config.json", "tokenizer.json")]
    return [folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS, *(path for path in own if path.is_file())]


def reference_files(folder: str | Path) -> list[Path]:
    """The file that says what images a checkpoint was trained on, where it has one."""
    return [path for path in [Path(folder) / REFERENCE_FILE] if path.is_file()]


def fingerprint(source: str | Path, adapters: Mapping[str, str | Path] | Sequence[str | Path] = ()) -> dict[str, str]:
    """SHA-256 of each file that decides what a checkpoint answers.

    Args:
        source (`str` or `Path`): Checkpoint folder, adapter folder or exported file.
        adapters (`Mapping` or `Sequence`): Further adapters that are loaded with it, see [`load_model`].

    Returns:
        `dict[str, str]`: By file name; those of an adapter's base as `base/...`, of a further adapter by its name.
    """
    files = [Path(source)] if is_onnx(source) else []
    if is_adapter(source):
        files += adapter_files(source)
    elif not files:
        files += checkpoint_files(source)
    found = {path.name: path for path in [*files, *reference_files(source)]}
    if is_adapter(source):
        found |= {f"base/{path.name}": path for path in checkpoint_files(adapter_base(source))}
    for name, folder in named_adapters(adapters).items():
        found |= {f"{name}/{path.name}": path for path in adapter_files(folder)}
    return {name: sha256(path) for name, path in found.items()}


def decisive_files(source: str | Path) -> dict[str, str]:
    """The [`fingerprint`] of what decides a checkpoint's figures: what its scores mean, which is told beside them, does not.

    Args:
        source (`str` or `Path`): Checkpoint folder, adapter folder or exported file.
    """
    found = fingerprint(source)
    for name in found.keys() & {"config.json", "base/config.json"}:
        config = read_json((adapter_base(source) if is_adapter(source) else Path(source)) / "config.json")
        if isinstance(trained := config.get("trained"), dict):
            config["trained"] = {key: value for key, value in trained.items() if key != "calibration"}
        found[name] = json_sha256(config)
    return found


def named_adapters(adapters: Mapping[str, str | Path] | Sequence[str | Path]) -> dict[str, Path]:
    """Adapter folders by the names they have in a model: those given, or their folders'.

    Raises:
        CheckpointError: Two of one name.
    """
    if isinstance(adapters, Mapping):
        pairs = list(adapters.items())
    else:
        pairs = [(Path(folder).resolve().name, folder) for folder in adapters]
    # Names become parts of the names of weights.
    named = {name.replace(".", "_"): Path(folder) for name, folder in pairs}
    if len(named) != len(pairs):
        raise CheckpointError(f"{len(pairs)} adapters and the names {', '.join(named)}: give each its own.")
    return named


def is_onnx(path: str | Path) -> bool:
    """Whether this names a file made by `unihema export` rather than a checkpoint folder."""
    return Path(path).suffix == ".onnx" and Path(path).is_file()


def is_adapter(folder: str | Path) -> bool:
    """Whether this is the folder of an adapter, which belongs to a checkpoint in another place."""
    return (Path(folder) / ADAPTER_CONFIG).is_file() and not (Path(folder) / "config.json").is_file()


def read_json(path: Path) -> dict[str, Any]:
    """A file of a checkpoint as JSON: a dictionary.

    Raises:
        CheckpointError: It cannot be read.
    """
    return read_json_object(path, CheckpointError, "Copy the checkpoint again.")


__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_WEIGHTS",
    "REFERENCE_FILE",
    "adapter_base",
    "adapter_files",
    "checkpoint_files",
    "decisive_files",
    "fingerprint",
    "is_adapter",
    "is_onnx",
    "local_folder",
    "named_adapters",
    "read_json",
    "reference_files",
    "stored_parameters",
]
