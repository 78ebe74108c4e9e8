"""The authors' checkpoint to a checkpoint folder of ours and back, tensor by tensor."""

import argparse
import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from unihema.errors import FileMissingError, InputError, OutputError
from unihema.files import scratch_folder, whole_folder, write_atomically, write_text
from unihema.loading import load_model
from unihema.modeling_unihema.configuration_unihema import UniHemaConfig
from unihema.official.keys import OfficialKeyError, copies, dead_shapes, official_name, translate
from unihema.official.labels import OFFICIAL_CELLS, OFFICIAL_CLASSES


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# What the official maths takes, where ours does better by default.
OFFICIAL_MATHS = {
    "fusion_order": "image_text",
    "attend_to_padding": True,
    "refinement": "gated",
    "upsampler": "learnable",
    "official_losses": True,
    "tie_word_embeddings": False,
    "scfe_backbone_features": False,
}
# Not in any tensor's shape; the authors' configuration file, unless the checkpoint's own arguments say otherwise.
HEADS = 8
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


@dataclass
class ConversionReport:
    """What became of every tensor.

    Args:
        converted (`dict[str, list[str]]`): Official key -> our keys.
        dropped (`dict[str, str]`): Official key -> why it is not read.
    """

    converted: dict[str, list[str]] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)

    def table(self) -> str:
        """One line a tensor, as `unihema convert --report` writes it."""
        lines = [f"{key}\t{', '.join(ours)}" for key, ours in self.converted.items()]
        lines += [f"{key}\tdropped: {reason}" for key, reason in self.dropped.items()]
        return "\n".join(sorted(lines)) + "\n"


def read_official(path: str | Path) -> tuple[dict[str, torch.Tensor], argparse.Namespace | None]:
    """The state dict and the arguments in an official `.pth`, read without running anything it holds.

    Tensors stay in the file until they are used.

    Args:
        path (`str` or `Path`): The file.

    Returns:
        `tuple`: State dict with plain keys, and the training arguments where the file has them.

    Raises:
        OSError: No such file, or it cannot be read.
        ValueError: It is no PyTorch checkpoint, holds what must not be unpickled, or has no model in it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileMissingError(f"{path}: no such file.")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            try:
                content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            except RuntimeError:
                # A file of PyTorch before 1.6 cannot be mapped.
                content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{path}: not a PyTorch checkpoint that can be read safely ({reason}). It must be the authors' .pth: tensors, "
            "and training arguments as argparse.Namespace; nothing else is unpickled."
        ) from error
    arguments = content.get("args") if isinstance(content, dict) else None
    state = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise InputError(f"{path}: holds no state dict, neither at its top level nor under 'model'.")
    return {key.removeprefix("module."): value for key, value in state.items()}, arguments


def official_config(
    state: Mapping[str, torch.Tensor], arguments: argparse.Namespace | None = None, **overrides: Any
) -> UniHemaConfig:
    """The configuration whose model has the shapes, and does the maths, of an official state dict.

    Args:
        state (`Mapping[str, torch.Tensor]`): Official keys; only shapes are looked at.
        arguments (`argparse.Namespace`, *optional*): The authors' training arguments.
        **overrides: Fields of the configuration.

    Raises:
        OfficialKeyError: A tensor that tells the size of the model is missing.
    """

    def shape(key: str) -> tuple[int, ...]:
        if key not in state:
            raise OfficialKeyError(f"{key} is missing: this is not a checkpoint of the official Uni-Hema model.")
        return tuple(state[key].shape)

    def layers(pattern: str) -> int:
        return 1 + max((int(match[1]) for key in state if (match := re.match(pattern, key))), default=-1)

    levels, width = shape("transformer.level_embed")
    heads = getattr(arguments, "nheads", HEADS)
    samples = shape("transformer.encoder.layers.0.self_attn.attention_weights.weight")[0]
    vocabulary, text_width = shape("T5_model.shared.weight")
    text_heads = shape("T5_model.encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight")[1]
    values = shape("morphology_embed.0.weight")[0]
    classes, cells = shape("class_embed.0.weight")[0], shape("classifier_image.classifier2.6.weight")[0]
    if values != 12:
        raise OfficialKeyError(
            f"morphology_embed has {values} outputs; the official model has 12, six attributes of two."
        )
    fields = {
        "d_model": width,
        "num_feature_levels": levels,
        "num_attention_heads": heads,
        "num_sampling_points": samples // (heads * levels),
        "encoder_layers": layers(r"transformer\.encoder\.layers\.(\d+)\."),
        "decoder_layers": layers(r"transformer\.decoder\.layers\.(\d+)\."),
        "encoder_ffn_dim": shape("transformer.encoder.layers.0.linear1.weight")[0],
        "decoder_ffn_dim": shape("transformer.decoder.layers.0.linear1.weight")[0],
        "num_queries": shape("transformer.tgt_embed.weight")[0],
        "fusion_queries": shape("xformer.queries")[0],
        "fusion_layers": layers(r"xformer\.layers\.(\d+)\."),
        "fusion_ffn_dim": shape("xformer.layers.0.ffn.0.weight")[0],
        "id2label": _names(OFFICIAL_CLASSES, classes),
        "single_cell_labels": list(_names(OFFICIAL_CELLS, cells).values()),
        "text_config": {
            "model_type": "t5",
            "vocab_size": vocabulary,
            "d_model": text_width,
            "d_kv": shape("T5_model.encoder.block.0.layer.0.SelfAttention.q.weight")[0] // text_heads,
            "d_ff": shape("T5_model.encoder.block.0.layer.1.DenseReluDense.wi_0.weight")[0],
            "num_layers": layers(r"T5_model\.encoder\.block\.(\d+)\."),
            "num_decoder_layers": layers(r"T5_model\.decoder\.block\.(\d+)\."),
            "num_heads": text_heads,
            "feed_forward_proj": "gated-gelu",
        },
        **OFFICIAL_MATHS,
    }
    return UniHemaConfig(**{**fields, **overrides})


def _names(known: list[str], count: int) -> dict[int, str]:
    names = known if len(known) == count else [f"class {index}" for index in range(count)]
    return dict(enumerate(names))


def from_official(
    state: Mapping[str, torch.Tensor], shapes: Mapping[str, torch.Size]
) -> tuple[dict[str, torch.Tensor], ConversionReport]:
    """An official state dict under our names. Tensors are views of the given ones, not copies.

    Args:
        state (`Mapping[str, torch.Tensor]`): Official keys.
        shapes (`Mapping[str, torch.Size]`): Of every tensor of our model.

    Returns:
        `tuple[dict[str, torch.Tensor], ConversionReport]`

    Raises:
        OfficialKeyError: A key that is not known or is missing, a shape that does not fit, or copies of one tensor that
            differ. All of them are named.
    """
    found, report, problems = {}, ConversionReport(), []
    for key, value in state.items():
        try:
            target = translate(key)
        except OfficialKeyError as error:
            problems.append(str(error))
            continue
        if target.reason:
            report.dropped[key] = target.reason
            if target.copy_of:
                original = state.get(target.copy_of)
                if original is None:
                    problems.append(f"{target.copy_of} is missing, but its copy {key} is there.")
                elif not _same(value, original):
                    problems.append(f"{key} differs from {target.copy_of}, of which it should be a copy.")
            continue
        parts = value.chunk(len(target.ours)) if len(target.ours) > 1 else (value,)
        for ours, part in zip(target.ours, parts, strict=True):
            wanted = shapes.get(ours)
            if wanted is None or _plain(part.shape) != _plain(wanted):
                there = "no such tensor in a model of this size" if wanted is None else f"{list(wanted)} here"
                problems.append(f"{key} has shape {list(value.shape)}: {there} ({ours}).")
            else:
                found[ours] = part.reshape(wanted)
        report.converted[key] = list(target.ours)
    missing = shapes.keys() - found.keys()
    # Frozen BatchNorms of the official backbone do not count batches.
    uncounted = {key for key in missing if key.endswith("num_batches_tracked")}
    problems += [f"nothing in the checkpoint becomes {key}." for key in sorted(missing - uncounted)]
    if problems:
        raise OfficialKeyError("Cannot convert this checkpoint:\n" + "\n".join(f"- {line}" for line in problems))
    return found | {key: torch.zeros((), dtype=torch.long) for key in uncounted}, report


def _plain(shape: torch.Size) -> list[int]:
    """A shape without leading ones, which some learned tokens have there and not here."""
    sizes = list(shape)
    while len(sizes) > 1 and sizes[0] == 1:
        sizes.pop(0)
    return sizes


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() or (a.shape == b.shape and torch.equal(a, b))


def to_official(state: Mapping[str, torch.Tensor], config: UniHemaConfig) -> dict[str, torch.Tensor]:
    """Our state dict under the official names, complete enough for the authors' strict loading.

    Args:
        state (`Mapping[str, torch.Tensor]`): Our keys, of a model with every head.
        config ([`UniHemaConfig`]): Of the same model.

    Returns:
        `dict[str, torch.Tensor]`: Copies share their storage. Tensors that have no effect there are zeros.

    Raises:
        OfficialKeyError: The model has a part that the official one does not.
    """
    official: dict[str, torch.Tensor] = {}
    for key in state:
        if key.endswith("num_batches_tracked") and key.startswith("model.visual_backbone."):
            continue
        name = official_name(key)
        if name in official:
            continue
        parts = [state[ours] for ours in translate(name).ours]
        official[name] = torch.cat(parts) if len(parts) > 1 else parts[0]
    token = official["transformer.encoder.cls_token"]
    official["transformer.encoder.cls_token"] = token.reshape(1, 1, -1)
    official |= {copy: official[original] for copy, original in copies(config).items()}
    return official | {name: torch.zeros(shape) for name, shape in dead_shapes(config).items()}


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
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file
    from tqdm.auto import tqdm
    from transformers import GenerationConfig

    from unihema.hub_cards import checkpoint_card
    from unihema.modeling_unihema.modeling_unihema import UniHemaForMultiTask
    from unihema.processing_unihema.image_processing_unihema import UniHemaImageProcessor
    from unihema.processing_unihema.processing_unihema import UniHemaProcessor

    folder = Path(folder)
    with whole_folder(folder) as whole:
        _check_new(folder)
        state, arguments = read_official(source)
        config = official_config(state, arguments)
        loaded = _load_tokenizer(tokenizer)
        if len(loaded) > config.text_config.vocab_size:
            raise InputError(
                f"The tokenizer {tokenizer or T5_TOKENIZER} has {len(loaded)} pieces, the checkpoint's embedding "
                f"{config.text_config.vocab_size} rows: it is not the one this checkpoint was trained with."
            )
        processor = UniHemaProcessor(
            UniHemaImageProcessor(task_sizes=OFFICIAL_SIZES),
            loaded,
            default_prompts=DEFAULT_PROMPTS,
            max_text_length=config.max_text_length,
        )
        config.trained.segmentation_label = DEFAULT_PROMPTS["segmentation"]
        config.default_prompt_ids = processor.default_prompt_ids()
        config.architectures = ["UniHemaForMultiTask"]
        config.dtype = torch.float32
        with torch.device("meta"):
            shapes = {key: value.shape for key, value in UniHemaForMultiTask(config).state_dict().items()}
        ours, became = from_official(state, shapes)

        shards = split_torch_state_dict_into_shards(
            ours, filename_pattern="model{suffix}.safetensors", max_shard_size=SHARD_SIZE
        )
        del state, ours
        for name, keys in tqdm(shards.filename_to_tensors.items(), desc="weights", unit="file", disable=not progress):
            # Mapped anew for each file: what has been read is forgotten with the mapping.
            ours, _ = from_official(read_official(source)[0], shapes)
            save_file({key: ours[key].contiguous() for key in keys}, whole / name, {"format": "pt"})
            (whole / name).chmod(0o644)
            del ours
        if shards.is_sharded:
            index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
            write_text(whole / "model.safetensors.index.json", [json.dumps(index, indent=2, sort_keys=True), "\n"])
        config.save_pretrained(whole)
        GenerationConfig.from_model_config(config).save_pretrained(whole)
        processor.save_pretrained(whole)
        write_text(whole / "README.md", [checkpoint_card(config)])
        if report:
            write_text(whole / REPORT_FILE, [became.table()])
    return became


def convert_to_official(source: str | Path, path: str | Path, overwrite: bool = False) -> int:
    """Writes a checkpoint folder of ours as a `.pth` that the authors' code loads.

    Args:
        source (`str` or `Path`): Checkpoint folder with every head.
        path (`str` or `Path`): New file.
        overwrite (`bool`): Replace a file that is there already.

    Returns:
        `int`: Number of tensors written.

    Raises:
        OSError: No such folder.
        ValueError: The file is there already, or the model is not of the official kind; see [`OfficialKeyError`].
    """
    from unihema.modeling_unihema.modeling_unihema import UniHemaForMultiTask

    path = Path(path)
    if path.exists() and not overwrite:
        raise InputError(f"{path} is there already: choose a new file, or replace it (--overwrite, or overwrite=True).")
    model, _ = load_model(source, device="cpu")
    if not isinstance(model, UniHemaForMultiTask):
        raise InputError(f"{source} is a {type(model).__name__}: the official model has every head, this one has not.")
    official = to_official(model.state_dict(), model.config)
    write_atomically(path, lambda file: torch.save({"model": official}, file))
    return len(official)


def _check_new(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is there already: choose a new folder or delete it.")


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
        with scratch_folder() as folder:
            shutil.copyfile(path, folder / "spiece.model")
            try:
                return T5Tokenizer.from_pretrained(folder)
            except (ImportError, ValueError, OSError) as error:
                raise InputError(
                    f"{path}: cannot be read as a SentencePiece model. It must be T5's spiece.model, and reading it needs "
                    f"`pip install unihema[convert]`. Reported: {str(error).strip().splitlines()[0]}"
                ) from error
    try:
        return AutoTokenizer.from_pretrained(str(tokenizer or T5_TOKENIZER))
    except (OSError, ValueError) as error:
        raise OutputError(
            f"No tokenizer at {tokenizer or T5_TOKENIZER}, neither as a file or folder nor on the Hub. Give T5's "
            "spiece.model, or a folder with a T5 tokenizer.json, as --tokenizer."
        ) from error


__all__ = [
    "OFFICIAL_MATHS",
    "ConversionReport",
    "TokenizerWarning",
    "convert_from_official",
    "convert_to_official",
    "from_official",
    "official_config",
    "read_official",
    "to_official",
]
