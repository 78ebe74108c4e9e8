"""What of a folder goes to the Hub: what loading it needs and its card, and nothing that merely lies there."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from unihema.checkpoint_files import REFERENCE_FILE, checkpoint_files
from unihema.errors import CardError, CheckpointError, InputError

from .fields import check_card, is_repo_id
from .folder_card import ADAPTER_CONFIG, CARD_FILE, read_json
from .results import stale_result
from .usage import for_repo


ADAPTER_WEIGHTS = "adapter_model.safetensors"
# Loaded by unpickling, which runs whatever code whoever wrote the file put there.
PICKLED = {".bin", ".pth", ".pt", ".ckpt", ".pkl", ".pickle"}
_TOKENIZER = ("special_tokens_map.json", "added_tokens.json", "spiece.model", "chat_template.jinja")
_CHECKPOINT = ("generation_config.json", "preprocessor_config.json", REFERENCE_FILE, *_TOKENIZER)
_PROCESSOR = (
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "preprocessor_config.json",
    *_TOKENIZER,
)
_TOLD = (
    "metrics.json",
    "metrics.md",
    "before_after.json",
    "before_after.md",
    "run_config.json",
    "data.json",
    "conversion.tsv",
    "LICENSE",
    "LICENSE.md",
    "NOTICE",
)
_TOKEN = re.compile(rb"hf_[A-Za-z0-9]{30,}")
_LEFT_OUT = {
    "checkpoints": "training checkpoints with optimizer state",
    "best": "weights of an evaluation during training",
    "log.jsonl": "log of the training",
}


@dataclass(frozen=True)
class Upload:
    """A file that goes to the Hub.

    Args:
        name (`str`): Its path in the repository.
        content (`Path` or `bytes`): Where it is, or what is uploaded instead of the file on this disk.
    """

    name: str
    content: Path | bytes

    @property
    def size(self) -> int:
        """In bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


@dataclass(frozen=True)
class Plan:
    """What a push uploads.

    Args:
        kind (`"checkpoint"` or `"adapter"`): What the folder is.
        uploads (`tuple[Upload, ...]`): The files.
        left_out (`dict[str, str]`): What stays here, and why.
        base_model (`str`, *optional*): Id of an adapter's base.
    """

    kind: str
    uploads: tuple[Upload, ...]
    left_out: dict[str, str]
    base_model: str | None = None

    @property
    def size(self) -> int:
        """Of all files, in bytes."""
        return sum(upload.size for upload in self.uploads)


def plan_push(folder: str | Path, repo_id: str, base_model: str | None = None) -> Plan:
    """Chooses and checks the files of a push; touches no network.

    Args:
        folder (`str` or `Path`): A checkpoint, or a PEFT adapter.
        repo_id (`str`): Where it goes; the code in the card names it.
        base_model (`str`, *optional*): Id of an adapter's base, where `adapter_config.json` names a folder.

    Returns:
        [`Plan`]

    Raises:
        CheckpointError: The folder is neither, a file is missing or damaged, weights are pickled, or a file holds a token.
        CardError: No card, or one that may not be published.
        ValueError: `repo_id` is none.
    """
    folder = Path(folder)
    if not is_repo_id(repo_id):
        raise InputError(f"{repo_id!r} is no repository id; it looks like lab/blood-smears.")
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder. Name a checkpoint or an adapter.")
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in PICKLED:
            raise CheckpointError(
                f"{path}: pickled files are not pushed, for loading them runs code. Save the model with save_pretrained, "
                "which writes safetensors, and move this file elsewhere."
            )
    base, changed = None, {}
    if (folder / ADAPTER_CONFIG).is_file():
        base, changed = _adapter_base(folder, base_model)
    names = _checkpoint_names(folder) if base is None else _adapter_names(folder)
    changed[CARD_FILE] = _card(folder, repo_id, base).encode("utf-8")
    kept = dict.fromkeys([*names, *(name for name in _TOLD if (folder / name).is_file()), CARD_FILE])
    uploads = tuple(Upload(name, changed.get(name, folder / name)) for name in kept)
    for upload in uploads:
        _check_no_token(folder, upload)
    left_out = {
        path.name: _LEFT_OUT.get(path.name, f"not part of {'a checkpoint' if base is None else 'an adapter'}")
        for path in sorted(folder.iterdir())
        if path.name not in kept and not path.name.startswith(".") and path.name != "__pycache__"
    }
    return Plan("checkpoint" if base is None else "adapter", uploads, left_out, base)


def _checkpoint_names(folder: Path) -> list[str]:
    from unihema.modeling_unihema.remote_code import code_files

    files = [*checkpoint_files(folder), *code_files(folder).values()]
    _check_whole([path for path in files if path.suffix == ".safetensors"])
    return [path.name for path in files] + [name for name in _CHECKPOINT if (folder / name).is_file()]


def _adapter_names(folder: Path) -> list[str]:
    weights = folder / ADAPTER_WEIGHTS
    if not weights.is_file():
        raise CheckpointError(
            f"{folder}: adapter without {ADAPTER_WEIGHTS}. Save it with save_pretrained, or copy the whole folder again."
        )
    _check_whole([weights])
    own = (*_PROCESSOR, REFERENCE_FILE)
    return [ADAPTER_CONFIG, ADAPTER_WEIGHTS, *(name for name in own if (folder / name).is_file())]


def _check_whole(files: Sequence[Path]) -> None:
    from safetensors import SafetensorError, safe_open

    for path in files:
        try:
            with safe_open(path, "np"):
                pass
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: damaged weights ({error}). Copy or save them again.") from error


def _adapter_base(folder: Path, base_model: str | None) -> tuple[str, dict[str, bytes]]:
    """The id of an adapter's base, and the configuration that names it where the file on this disk does not."""
    values = read_json(folder / ADAPTER_CONFIG)
    base = base_model or values.get("base_model_name_or_path")
    if not is_repo_id(base) or (base_model is None and Path(base).is_dir()):
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG}: the adapter's base is {base!r}, a folder that nobody else has. Push the base "
            "first and give its repository: --base lab/base."
        )
    if base == values.get("base_model_name_or_path"):
        return base, {}
    return base, {ADAPTER_CONFIG: json.dumps({**values, "base_model_name_or_path": base}, indent=2).encode() + b"\n"}


def _card(folder: Path, repo_id: str, base_model: str | None) -> str:
    path = folder / CARD_FILE
    if not path.is_file():
        raise CardError(f"{folder}: no {CARD_FILE}. Write the card with `unihema card {folder} --license LICENCE`.")
    text = path.read_text(encoding="utf-8")
    data = check_card(text, source=str(path)).data
    if base_model not in (None, data.base_model):
        raise CardError(f"{path}: `base_model` is {data.base_model!r}, but the adapter belongs to {base_model!r}.")
    stale = stale_result(data.eval_results, read_json(folder / "metrics.json"))
    if stale:
        raise CardError(f"{path}: {stale}. Write the card anew with `unihema card`.")
    return for_repo(text, repo_id)


def _check_no_token(folder: Path, upload: Upload) -> None:
    if upload.name.endswith(".safetensors"):
        return
    content = upload.content if isinstance(upload.content, bytes) else upload.content.read_bytes()
    if _TOKEN.search(content):
        raise CheckpointError(f"{folder / upload.name}: holds what looks like a token of the Hub. Take it out.")


__all__ = ["Plan", "Upload", "plan_push"]
