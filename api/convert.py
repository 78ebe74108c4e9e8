"""The authors' checkpoint file to a checkpoint folder of ours, and back."""

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from .files import write_text


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .modeling_unihema.convert_official import ConversionReport


# SentencePiece file of T5, which the official model was trained with.
T5_SENTENCEPIECE = "d60acb128cf7b7f2536e8f38a5b18a05535c9e14c7a355904270e15b0945ea86"
T5_TOKENIZER = "google/flan-t5-base"
# What the authors' evaluation resizes images to.
OFFICIAL_SIZES = {
    "detection": {"shortest_edge": 800, "longest_edge": 1333},
    "segmentation": {"height": 512, "width": 512},
    "single_cell": {"height": 512, "width": 512},
    "question_answering": {"height": 256, "width": 256},
    "cloze": {"height": 256, "width": 256},
}
# A disease or cell names; the official names together are longer than a prompt may be.
DEFAULT_PROMPTS = {"detection": "leukemia", "segmentation": "WBC"}
# So much of the weights is in memory at once.
SHARD_SIZE = "500MB"
REPORT_FILE = "conversion.tsv"


class TokenizerWarning(UserWarning):
    """The tokenizer is not the one that the official weights were trained with."""


def convert_from_official(
    source: str | Path,
    folder: str | Path,
    tokenizer: str | Path | None = None,
    report: bool = False,
    progress: bool = True,
) -> "ConversionReport":
    """Writes an official `.pth` as a checkpoint folder: safetensors, configuration, processor, card.

    The configuration takes the values that reproduce the official maths. Tensors stay in the source file until they are
    written, a few hundred megabytes at a time.

    Args:
        source (`str` or `Path`): The authors' checkpoint.
        folder (`str` or `Path`): New folder. It appears when it is complete.
        tokenizer (`str` or `Path`, *optional*): T5's `spiece.model`, a tokenizer folder, or a name on the Hub;
            flan-T5's from the Hub when missing.
        report (`bool`): Also write `conversion.tsv`: what became of every tensor.
        progress (`bool`): Show a bar.

    Returns:
        [`ConversionReport`]

    Raises:
        OSError: A file cannot be read, or the tokenizer not be found.
        ValueError: The folder is there already, or the source is no official checkpoint; see [`OfficialKeyError`].
    """
    import torch
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file
    from tqdm.auto import tqdm
    from transformers import GenerationConfig

    from .hub_cards import checkpoint_card
    from .modeling_unihema.convert_official import from_official, official_config, read_official
    from .modeling_unihema.modeling_unihema import UniHemaForMultiTask
    from .processing_unihema.image_processing_unihema import UniHemaImageProcessor
    from .processing_unihema.processing_unihema import UniHemaProcessor

    folder = Path(folder)
    _check_new(folder)
    state, arguments = read_official(source)
    config = official_config(state, arguments)
    loaded = _load_tokenizer(tokenizer)
    if len(loaded) > config.text_config.vocab_size:
        raise ValueError(
            f"The tokenizer {tokenizer or T5_TOKENIZER} has {len(loaded)} pieces, the checkpoint's embedding "
            f"{config.text_config.vocab_size} rows: it is not the one this checkpoint was trained with."
        )
    processor = UniHemaProcessor(
        UniHemaImageProcessor(task_sizes=OFFICIAL_SIZES),
        loaded,
        default_prompts=DEFAULT_PROMPTS,
        max_text_length=config.max_text_length,
    )
    config.segmentation_label = DEFAULT_PROMPTS["segmentation"]
    config.default_prompt_ids = processor.default_prompt_ids()
    config.architectures = ["UniHemaForMultiTask"]
    config.dtype = torch.float32
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in UniHemaForMultiTask(config).state_dict().items()}
    ours, became = from_official(state, shapes)

    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
    try:
        shards = split_torch_state_dict_into_shards(
            ours, filename_pattern="model{suffix}.safetensors", max_shard_size=SHARD_SIZE
        )
        del state, ours
        for name, keys in tqdm(shards.filename_to_tensors.items(), desc="weights", unit="file", disable=not progress):
            # Mapped anew for each file: what has been read is forgotten with the mapping.
            ours, _ = from_official(read_official(source)[0], shapes)
            save_file({key: ours[key].contiguous() for key in keys}, partial / name, {"format": "pt"})
            (partial / name).chmod(0o644)
            del ours
        if shards.is_sharded:
            index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
            write_text(partial / "model.safetensors.index.json", [json.dumps(index, indent=2, sort_keys=True), "\n"])
        config.save_pretrained(partial)
        GenerationConfig.from_model_config(config).save_pretrained(partial)
        processor.save_pretrained(partial)
        write_text(partial / "README.md", [checkpoint_card(config)])
        if report:
            write_text(partial / REPORT_FILE, [became.table()])
        # mkdtemp makes a folder for its owner's eyes only.
        partial.chmod(0o755)
        if folder.is_dir():
            folder.rmdir()
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return became


def convert_to_official(source: str | Path, path: str | Path) -> int:
    """Writes a checkpoint folder of ours as a `.pth` that the authors' code loads.

    Args:
        source (`str` or `Path`): Checkpoint folder with every head.
        path (`str` or `Path`): New file.

    Returns:
        `int`: Number of tensors written.

    Raises:
        OSError: No such folder.
        ValueError: The file is there already, or the model is not of the official kind; see [`OfficialKeyError`].
    """
    import torch

    from .checkpoint import load_checkpoint
    from .modeling_unihema.convert_official import to_official
    from .modeling_unihema.modeling_unihema import UniHemaForMultiTask

    path = Path(path)
    if path.exists():
        raise ValueError(f"{path} is there already: choose a new file or delete it.")
    model, _ = load_checkpoint(source, device="cpu")
    if not isinstance(model, UniHemaForMultiTask):
        raise ValueError(f"{source} is a {type(model).__name__}: the official model has every head, this one has not.")
    official = to_official(model.state_dict(), model.config)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        torch.save({"model": official}, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return len(official)


def _check_new(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already: choose a new folder or delete it.")


def _load_tokenizer(tokenizer: str | Path | None) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer, T5Tokenizer

    path = Path(tokenizer) if tokenizer is not None else None
    if path is not None and path.is_file():
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != T5_SENTENCEPIECE:
            warnings.warn(
                f"{path} (sha256 {digest[:12]}...) is not the SentencePiece file of T5 ({T5_SENTENCEPIECE[:12]}...): the "
                "official weights know other pieces, and questions and answers will make no sense.",
                TokenizerWarning,
                stacklevel=3,
            )
        with tempfile.TemporaryDirectory() as folder:
            shutil.copyfile(path, Path(folder) / "spiece.model")
            try:
                return T5Tokenizer.from_pretrained(folder)
            except (ImportError, ValueError, OSError) as error:
                raise ValueError(
                    f"{path}: cannot be read as a SentencePiece model. It must be T5's spiece.model, and reading it needs "
                    f"`pip install unihema[convert]`. Reported: {str(error).strip().splitlines()[0]}"
                ) from error
    try:
        return AutoTokenizer.from_pretrained(str(tokenizer or T5_TOKENIZER))
    except (OSError, ValueError) as error:
        raise OSError(
            f"No tokenizer at {tokenizer or T5_TOKENIZER}, neither as a file or folder nor on the Hub. Give T5's "
            "spiece.model, or a folder with a T5 tokenizer.json, as --tokenizer."
        ) from error


__all__ = ["TokenizerWarning", "convert_from_official", "convert_to_official"]
