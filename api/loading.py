"""Model and processor of a checkpoint, with its adapters."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unihema.checkpoint_files import (
    ADAPTER_CONFIG,
    adapter_base,
    adapter_files,
    checkpoint_files,
    is_adapter,
    is_onnx,
    named_adapters,
    read_json,
    stored_parameters,
)
from unihema.errors import CheckpointError, DeviceError, RequestError
from unihema.files import shortened
from unihema.modeling_unihema.tasks import TASKS, check_task


if TYPE_CHECKING:
    import torch

    from unihema.inference.onnx import OnnxModel
    from unihema.modeling_unihema.modeling_unihema import UniHemaPreTrainedModel
    from unihema.processing_unihema.processing_unihema import UniHemaProcessor


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


def load_model(
    folder: str | Path,
    device: "str | torch.device" = "auto",
    dtype: "str | torch.dtype | None" = None,
    adapters: "Mapping[str, str | Path] | Sequence[str | Path]" = (),
    load_in_8bit: bool = False,
) -> "tuple[UniHemaPreTrainedModel | OnnxModel, UniHemaProcessor]":
    """Model and processor of a folder on this machine; never touches the network.

    Args:
        folder (`str` or `Path`): A checkpoint: a full one loads with all its heads, one saved by a single head's class with that
            head. Or an adapter, whose base must be on this machine (see `adapter_base`). Or an ONNX file made by
            `unihema export`, which is called like the model.
        device (`str` or `torch.device`): See [`choose_device`].
        dtype (`str` or `torch.dtype`, *optional*): Of the weights, such as `"bfloat16"`; the checkpoint's own when missing.
        adapters (`Mapping` or `Sequence`, *optional*): Adapters to load beside each other, by name, or called as their folders.
            The first one is in use; `model.set_adapter(name)` switches.
        load_in_8bit (`bool`): Keep the linears of the base in 8 bit; needs an NVIDIA GPU and bitsandbytes.

    Returns:
        `tuple`: The model in evaluation mode, and the processor: that of the first adapter where it has its own.

    Raises:
        CheckpointError: Files are missing or damaged, weights of the model are missing from them, an adapter does not fit, two
            adapters have one name, or 8 bit cannot be had.
        DeviceError: An unknown device or dtype.
    """
    if is_onnx(folder):
        from unihema.inference.onnx import load_onnx

        return load_onnx(folder)
    places = named_adapters(adapters)
    if is_adapter(folder):
        ((own, place),) = named_adapters([folder]).items()
        if own in places:
            raise CheckpointError(
                f"{folder} and {places[own]} are both adapters called {own!r}: give each its own name."
            )
        places = {own: place} | places
        folder = adapter_base(folder)
    for place in places.values():
        adapter_files(place)
    model, processor = _load_plain(folder, device, dtype, load_in_8bit)
    for place in places.values():
        _check_base(place, folder, model)
    for name, place in places.items():
        try:
            model.load_adapter(place, name)
        except Exception as error:
            # PEFT and safetensors raise anything on damaged files.
            raise CheckpointError(f"{place}: adapter cannot be loaded ({shortened(error)})") from error
    if places:
        from unihema.processing_unihema.processing_unihema import UniHemaProcessor

        first, place = next(iter(places.items()))
        model.set_adapter(first)
        if (place / "processor_config.json").is_file():
            try:
                processor = UniHemaProcessor.from_pretrained(place, local_files_only=True, trust_remote_code=False)
            except Exception as error:
                raise CheckpointError(
                    f"{place}: the adapter's processor cannot be read ({shortened(error)})"
                ) from error
            _check_settings(place, model, processor)
    return model.eval(), processor


def choose_device(device: "str | torch.device" = "auto") -> "torch.device":
    """The device asked for; of `"auto"` an NVIDIA GPU, else Apple's, else the processor.

    Raises:
        DeviceError: There is no such device.
    """
    import torch

    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise DeviceError(f"device {device!r}: no such device; use auto, cpu, cuda, cuda:0 or mps.") from error
    there = {
        "cpu": True,
        "cuda": torch.cuda.device_count() > (chosen.index or 0),
        "mps": torch.backends.mps.is_available(),
    }
    if not there.get(chosen.type, _computes(chosen)):
        raise DeviceError(f"device {device!r}: not there on this machine; use cpu, or auto to take what there is.")
    return chosen


def _computes(device: "torch.device") -> bool:
    """Whether a device of another kind is there and holds numbers (the `meta` device does not)."""
    import torch

    try:
        return float(torch.ones(1, device=device).sum()) == 1.0
    except (RuntimeError, AssertionError, NotImplementedError):
        return False


def choose_dtype(dtype: "str | torch.dtype") -> "torch.dtype":
    """The dtype asked for.

    Raises:
        DeviceError: It is none that weights may have.
    """
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    chosen = known.get(dtype) if isinstance(dtype, str) else dtype
    if chosen is None or chosen not in known.values():
        raise DeviceError(f"dtype {dtype!r}: choose one of {', '.join(known)}.")
    return chosen


def _load_plain(
    folder: str | Path, device: "str | torch.device", dtype: "str | torch.dtype | None", load_in_8bit: bool
) -> "tuple[UniHemaPreTrainedModel, UniHemaProcessor]":
    files = checkpoint_files(folder)
    from unihema.modeling_unihema import modeling_unihema
    from unihema.processing_unihema.processing_unihema import UniHemaProcessor

    folder, device = Path(folder), choose_device(device)
    named = read_json(folder / "config.json").get("architectures") or ["UniHemaForMultiTask"]
    architecture = named[0] if isinstance(named, list) and isinstance(named[0], str) else repr(named)
    model_class: Any = getattr(modeling_unihema, architecture, None)
    if architecture not in modeling_unihema.__all__ or not getattr(model_class, "tasks", None):
        raise CheckpointError(
            f"{folder}: config.json names the architecture {architecture[:60]!r}, which has no task head; save one of "
            "UniHemaForMultiTask, ForDetection, ForSegmentation, ForImageClassification or ForQA."
        )
    options: dict[str, Any] = _in_8_bit(device) if load_in_8bit else {}
    if dtype is not None:
        options["dtype"] = choose_dtype(dtype)
    try:
        # Never the code of the folder: that of the package is here.
        local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        _check_size(model_class, folder, local)
        model, report = model_class.from_pretrained(folder, output_loading_info=True, **local, **options)
        processor = UniHemaProcessor.from_pretrained(folder, **local)
    except Exception as error:
        names = ", ".join(path.name for path in files)
        raise CheckpointError(f"{folder}: checkpoint cannot be read ({names}): {shortened(error)}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} weights of {architecture} are missing from the checkpoint, first {missing[0]!r}."
        )
    _check_settings(folder, model, processor)
    # A model that was quantized while loading is where it should be, and cannot be moved.
    return (model if load_in_8bit else model.to(device)), processor


def _check_size(model_class: Any, folder: Path, options: Mapping[str, Any]) -> None:
    """Refuses a model that is far larger than its files of weights, before its memory is taken.

    Raises:
        CheckpointError: It is.
    """
    import torch

    config = model_class.config_class.from_pretrained(folder, **options)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in model_class(config).parameters())
    # Heads of other classes, and weights that are missing, have errors of their own.
    if count > 2 * stored_parameters(folder) + 10_000_000:
        raise CheckpointError(
            f"config.json asks for a model of {count:,} parameters, many more than its files of weights hold."
        )


def _check_base(adapter: Path, base: str | Path, model: Any) -> None:
    """Checks that a base has the weights that an adapter was trained on, as far as the adapter says it.

    Raises:
        CheckpointError: It has others, such as where it was trained anew in its folder.
    """
    import torch

    from unihema.modeling_unihema.adapter_mixin import BACKBONE_KEY
    from unihema.results.out_of_distribution import backbone_checksum

    mapping = read_json(adapter / ADAPTER_CONFIG).get("auto_mapping")
    expected = mapping.get(BACKBONE_KEY) if isinstance(mapping, dict) else None
    # In bfloat16 the weights have lost what the checksum is made of.
    if expected is None or model.dtype == torch.bfloat16 or expected == backbone_checksum(model):
        return
    raise CheckpointError(
        f"{adapter}: was trained on other weights than those in {base}, and would give anything there. Put its own base back, or "
        "adapt this one anew."
    )


def _check_settings(folder: Path, model: Any, processor: Any) -> None:
    """Checks what the analysis will read, so that it does not fail, or ask for gigabytes, later.

    Raises:
        CheckpointError: A file's setting is none; the file is named.
    """
    length, limit = processor.max_text_length, processor.tokenizer.model_max_length
    sizes = [size for of_task in processor.image_processor.task_sizes.values() for size in of_task.values()]
    for file, name, value, most in (
        ("processor_config.json", "max_text_length", length, 8192),
        ("tokenizer_config.json", "model_max_length", limit, 1e31),
        *(("processor_config.json", "an image size", size, 8192) for size in sizes),
    ):
        if not isinstance(value, (int, float)) or not 1 <= value <= most:
            raise CheckpointError(
                f"{folder / file}: {name} is {shortened(repr(value), 40)} and must lie in 1..{most:g}."
            )
    for task, prompt in processor.default_prompts.items():
        names = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise CheckpointError(
                f"{folder / 'processor_config.json'}: the default prompt of {shortened(task, 40)} is no text."
            )
    generation = getattr(model, "generation_config", None)
    if generation is None:
        return
    last = model.config.text_config.vocab_size - 1
    tokens = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
    for name, most in {
        **dict.fromkeys(tokens, last),
        "max_length": 1 << 20,
        "max_new_tokens": 1 << 20,
        "num_beams": 64,
    }.items():
        value = getattr(generation, name, None)
        for each in value if isinstance(value, list) else [value]:
            if each is not None and (isinstance(each, bool) or not isinstance(each, int) or not 0 <= each <= most):
                raise CheckpointError(
                    f"{folder / 'generation_config.json'}: {name} is {shortened(repr(each), 40)} and must lie in 0..{most}."
                )
    for name in ("output_attentions", "output_hidden_states", "output_scores", "use_cache", "do_sample"):
        value = getattr(generation, name, None)
        if value is not None and not isinstance(value, bool):
            raise CheckpointError(
                f"{folder / 'generation_config.json'}: {name} is {shortened(repr(value), 40)} and must be true or false."
            )
    start = generation.decoder_start_token_id
    if isinstance(start, list) or (start is None and generation.bos_token_id is None):
        raise CheckpointError(
            f"{folder / 'generation_config.json'}: no decoder_start_token_id, from which answers start."
        )


def _in_8_bit(device: "torch.device") -> dict[str, Any]:
    if device.type != "cuda":
        raise CheckpointError("Loading in 8 bit needs an NVIDIA GPU; without one, load the model as it is.")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise CheckpointError("Loading in 8 bit needs bitsandbytes: pip install bitsandbytes.") from None
    from transformers import BitsAndBytesConfig

    kept = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(_KEPT_WHOLE))
    return {"quantization_config": kept, "device_map": {"": device}}


def available_tasks(model: "UniHemaPreTrainedModel | OnnxModel") -> tuple[str, ...]:
    """Tasks the model has a head for and was trained on (all of its heads where the checkpoint does not say)."""
    trained = model.config.trained.tasks  # type: ignore[union-attr]
    return tuple(task for task in model.tasks if trained is None or task in trained)


def require_tasks(model: "UniHemaPreTrainedModel | OnnxModel", tasks: Sequence[str]) -> None:
    """Checks that a checkpoint can do what is asked.

    Raises:
        CheckpointError: It lacks the head, or the head was never trained.
        ValueError: There is no such task.
    """
    available = available_tasks(model)
    for task in tasks:
        check_task(task)
        if task not in available:
            raise CheckpointError(
                f"This checkpoint has no trained head for '{task}'; it does {', '.join(available) or 'nothing'}. Use "
                f"another checkpoint, or train one with `unihema train ... --task {task}`."
            )


def set_image_sizes(processor: "UniHemaProcessor", sizes: Mapping[str, int]) -> None:
    """Changes the size at which a processor gives images to the model, for another magnification than it was trained on.

    Args:
        processor ([`UniHemaProcessor`]): The processor.
        sizes (`Mapping[str, int]`): Task -> longest edge in pixels.

    Raises:
        RequestError: Unknown task, or an edge that is no image's.
    """
    images = processor.image_processor
    for task, edge in sizes.items():
        if task not in images.task_sizes:
            raise RequestError(f"Unknown task '{task}' for an image size; tasks are {', '.join(TASKS)}.")
        if not 32 <= edge <= 8192:
            raise RequestError(f"An image size is the longest edge in pixels, 32 to 8192; got {edge} for {task}.")
    images.task_sizes = images.task_sizes | {task: {"longest_edge": int(edge)} for task, edge in sizes.items()}


__all__ = ["available_tasks", "choose_device", "choose_dtype", "load_model", "require_tasks", "set_image_sizes"]
