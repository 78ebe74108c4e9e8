"""Adapters made for training: which layers they change, which heads they bring, and what these start from."""

import os
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from unihema.errors import InputError
from unihema.files import scratch_folder, whole_folder, write_json
from unihema.modeling_unihema.adapter_mixin import BACKBONE_KEY, FIELDS_KEY
from unihema.modeling_unihema.layers import ClassEmbedding, ClassLinear
from unihema.modeling_unihema.tasks import TASK_TABLE, TASKS
from unihema.processing_unihema.class_names import usual_name
from unihema.results.out_of_distribution import backbone_checksum
from unihema.training.data.class_tree import class_parents, known_parents
from unihema.training.data.rows import Row, class_names, red_cell_diameter, single_cell_names


if TYPE_CHECKING:
    # The run's own modules use this one.
    from unihema.training.run.config import AdapterConfig

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
NAME = "default"
_QUERY_ATTENTION = r"attention\.(?:[qkvo]_proj|sampling_offsets|attention_weights|value_proj|output_proj)"
_IMAGE_LAYER = rf"layers\.\d+\.(?:(?:self|cross)_{_QUERY_ATTENTION}|feed_forward\.linear[12])"
_IMAGE_ENCODER = rf"image_encoder\.{_IMAGE_LAYER}"
_IMAGE_DECODER = rf"image_decoder\.{_IMAGE_LAYER}"
_REFINEMENT = r"hema_former\.text_guided_visual_refinement\.(?:attention\.[qkvo]_proj|text_projection)"
_BOXES = r"(?:query_selection|image_decoder)\.box_head\.layers\.\d|query_selection\.token_projection"
_MASKS = r"hema_former\.query_guided_mask_finder\.(?:encoder_projection|query_head\.layers\.\d)"
_FUSION = (
    r"hema_former\.cross_modal_fusion\.(?:blocks\.\d+\.(?:(?:text|image)_attention\.[qkvo]_proj|feed_forward\.[02])"
    r"|(?:text|image|output)_projection)"
)
_T5 = (
    r"text_branch\.(?:encoder|decoder)\.block\.\d+\.layer\.\d+\."
    r"(?:(?:Self|EncDec)Attention\.[qkvo]|DenseReluDense\.w[io](?:_[01])?)"
)

# The layers that an adapter of each task changes. All are plain linears. Not the convolutions: they are made to pass over
# padding, which a change beside them would not be.
TARGETS = {
    "detection": (_IMAGE_ENCODER, _IMAGE_DECODER, _REFINEMENT, _BOXES),
    "segmentation": (_IMAGE_ENCODER, _IMAGE_DECODER, _REFINEMENT, _MASKS),
    "single_cell": (_IMAGE_ENCODER,),
    "question_answering": (_FUSION, _T5),
    "cloze": (_FUSION, _T5),
}
# Where IA3 scales the input of a layer rather than its output.
_IA3_INPUTS = r".*(?:linear2|feed_forward\.2|DenseReluDense\.wo|layers\.\d)"
# What has a row for each class, or is small and stands behind all that is adapted.
HEADS = {
    "detection": ("class_head", "label_embedding"),
    "single_cell": ("single_cell_head", "single_cell_feature_extraction"),
}


def _matches_a_layer(targets: str | Collection[str], model: nn.Module) -> bool:
    """Whether PEFT would find a layer: by a pattern of its whole name, or by the end of its name."""
    names = [name for name, _ in model.named_modules()]
    if isinstance(targets, str):
        return any(re.fullmatch(targets, name) for name in names)
    return any(name == target or name.endswith(f".{target}") for name in names for target in targets)


def target_pattern(tasks: Sequence[str]) -> str:
    """The pattern of the layers that an adapter for `tasks` changes, matched against whole module names."""
    parts = dict.fromkeys(part for task in tasks for part in TARGETS[task])
    return rf"(?:model\.)?(?:{'|'.join(parts)})"


def attach_adapter(
    model: nn.Module,
    processor: Any,
    settings: "AdapterConfig",
    rows: Mapping[str, Sequence[Row]],
    label_parents: Mapping[str, str] | None = None,
) -> None:
    """Puts a new adapter with heads for the classes of the data into a model, whose own weights are frozen.

    Args:
        model (`UniHemaForMultiTask`): The base; changed in place. Its configuration is from now on that of the adapter.
        processor (`UniHemaProcessor`): Its default prompts become those of the adapter.
        settings ([`AdapterConfig`]): Kind and size.
        rows (`Mapping[str, Sequence[Row]]`): Task -> training rows.
        label_parents (`Mapping[str, str]`, *optional*): See `class_parents`.

    Raises:
        ValueError: A class to start from that the base does not have, more classes in the data than in `labels`, or a
            pattern that matches no layer.
    """
    tasks = [task for task in TASKS if task in rows]
    fields, sources = _classes(model.config, processor, settings, rows, label_parents)
    heads = settings.heads
    if heads is None:
        heads = [name for task in tasks for name in HEADS.get(task, ())]
    if "detection" in rows and settings.heads is None and _has_morphology(rows["detection"], model.config.morphology):
        heads.append("morphology_head")
    config = _peft_config(settings, tasks, heads, model)
    if not _matches_a_layer(config.target_modules, model):
        raise InputError(f"adapter.target_modules {config.target_modules!r} matches no layer of the model.")
    backbone = backbone_checksum(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unexpectedly found already")
        model.add_adapter(config, NAME)
    for name, module in model.named_modules():
        if isinstance(module, (ClassEmbedding, ClassLinear)) and f"modules_to_save.{NAME}" in name:
            _set_classes(module, sources["single_cell" if "single_cell_head" in name else "detection"])
    config.base_model_name_or_path = settings.base_name or model.config.name_or_path
    config.auto_mapping = {
        "base_model_class": TASK_TABLE[tasks[0]].model_class,
        "parent_library": "unihema",
        BACKBONE_KEY: backbone,
        FIELDS_KEY: fields,
    }
    model._followed = None
    model.follow_adapter()


def save_adapter(model: nn.Module, folder: str | Path, name: str = NAME) -> None:
    """Writes an adapter, as [`PeftModel.save_pretrained`] does, with the classes and thresholds that the model has now.

    Args:
        model (`UniHemaPreTrainedModel`): A model with this adapter in use.
        folder (`str` or `Path`): Where; made when missing.
        name (`str`): The adapter.
    """
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model.refresh_adapter_fields(name)
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    state = {f"base_model.model.{key}": value.detach().cpu().contiguous().clone() for key, value in state.items()}
    with scratch_folder(folder) as scratch:
        save_file(state, scratch / WEIGHTS, metadata={"format": "pt"})
        os.replace(scratch / WEIGHTS, folder / WEIGHTS)
    values = {**model.peft_config[name].to_dict(), "inference_mode": True}
    write_json(folder / CONFIG, {key: sorted(v) if isinstance(v, set) else v for key, v in values.items()})


def load_adapter_weights(model: nn.Module, folder: str | Path, name: str = NAME) -> None:
    """Puts the weights of a saved adapter into one that is in the model already.

    Args:
        model (`UniHemaPreTrainedModel`): The model.
        folder (`str` or `Path`): Written by [`save_adapter`] from the same adapter.
        name (`str`): The adapter.
    """
    from peft.utils import set_peft_model_state_dict
    from safetensors.torch import load_file

    state = load_file(Path(folder) / WEIGHTS)
    state = {key.removeprefix("base_model.model."): value for key, value in state.items()}
    set_peft_model_state_dict(model, state, adapter_name=name)


def save_merged(model: nn.Module, processor: Any, folder: str | Path) -> None:
    """Makes the adapter in use part of the model and writes a checkpoint that needs neither adapter nor PEFT.

    Args:
        model (`UniHemaPreTrainedModel`): The model; without adapters afterwards.
        processor (`UniHemaProcessor`): Its processor.
        folder (`str` or `Path`): A new folder.

    Raises:
        ValueError: The folder holds something already.
    """
    folder = Path(folder)
    with whole_folder(folder) as whole:
        if folder.exists() and any(folder.iterdir()):
            raise InputError(f"{folder} is not empty; merge into a new folder.")
        model.merge_and_unload().save_pretrained(whole)
        # Of several adapters the one that was in use, as the model.
        had = processor.default_prompts
        processor.default_prompts = {task: processor.default_prompt_of(task, model.config) for task in had}
        try:
            processor.save_pretrained(whole)
        finally:
            processor.default_prompts = had


def start_classes(
    new: Sequence[str], old: Sequence[str], start_from: Mapping[str, str] | None = None
) -> list[int | None]:
    """The base's class that each new class starts from.

    Args:
        new (`Sequence[str]`): The adapter's classes.
        old (`Sequence[str]`): The base's.
        start_from (`Mapping[str, str]`, *optional*): New class -> class of the base; comes first.

    Returns:
        `list[int | None]`: Index in `old`: of the class in `start_from`, else of the one spelled alike, else of the
        closest one that the new class is a kind of; `None` where there is none.

    Raises:
        ValueError: `start_from` names a class that is in neither list.
    """
    start_from = dict(start_from or {})
    for name, source in start_from.items():
        if name not in new or source not in old:
            where, known = ("adapter", new) if name not in new else ("base", old)
            wrong = name if name not in new else source
            raise InputError(f"adapter.start_from: the {where} has no class {wrong!r}; it has {', '.join(known)}.")
    by_key = {usual_name(name): index for index, name in reversed(list(enumerate(old)))}
    found: list[int | None] = []
    for name in new:
        index = old.index(start_from[name]) if name in start_from else by_key.get(usual_name(name))
        if index is None:
            parent = known_parents([name, *old]).get(name)
            index = None if parent is None else old.index(parent)
        found.append(index)
    return found


def _classes(
    config: Any,
    processor: Any,
    settings: "AdapterConfig",
    rows: Mapping[str, Sequence[Row]],
    label_parents: Mapping[str, str] | None,
):
    """The adapter's fields of the configuration, and for each head what its classes start from."""
    fields: dict[str, Any] = {}
    found: dict[str, Any] = {}
    sources: dict[str, list[int | None]] = {}
    prompts = {}
    if "detection" in rows:
        names = _labels(settings, class_names(rows["detection"]))
        old = [config.id2label[index] for index in range(config.num_labels)]
        sources["detection"] = start_classes(names, old, _named(settings.start_from, names))
        fields |= {"id2label": dict(enumerate(names)), "label_parents": class_parents(names, label_parents)}
        thresholds = config.trained.detection_thresholds
        found["detection_thresholds"] = {name: thresholds[name] for name in names if name in thresholds}
        # It is about to learn them.
        found["unfound_classes"] = []
        # Of the lab's microscope, not of the base's.
        edge = processor.image_processor.task_sizes["detection"].get("longest_edge")
        found["red_cell_diameter"] = red_cell_diameter(rows["detection"], edge)
        prompts["detection"] = ", ".join(names)
    if "single_cell" in rows:
        names = _labels(settings, single_cell_names(rows["single_cell"]))
        sources["single_cell"] = start_classes(names, config.single_cell_labels, _named(settings.start_from, names))
        fields["single_cell_labels"] = names
        # It learns crops as the lab cuts them.
        found["crop_frame"] = None
    if prompt := next((row["prompt"] for row in rows.get("segmentation", ()) if row.get("prompt")), None):
        prompts["segmentation"] = found["segmentation_label"] = prompt
    processor.default_prompts |= prompts
    if prompts:
        fields["default_prompt_ids"] = processor.default_prompt_ids()
    if {"detection", "single_cell"} & rows.keys():
        # Fitted on other opinions than those that change now.
        found |= {"second_look": None, "parasites": None}
    trained = {*(config.trained.tasks or ()), *rows}
    # Fitted to the scores of the base.
    fields["trained"] = {"tasks": [task for task in TASKS if task in trained], "calibration": {}, **found}
    return fields, sources


def _labels(settings: "AdapterConfig", found: Sequence[str]) -> list[str]:
    if settings.labels is None:
        return list(found)
    missing = [name for name in found if name not in settings.labels]
    if missing:
        raise InputError(
            f"The data have the class {missing[0]!r}, which is not among the labels {', '.join(settings.labels)}. Add it, "
            "or rename it with data.rename."
        )
    return list(settings.labels)


def _named(start_from: Mapping[str, str], names: Sequence[str]) -> dict[str, str]:
    unknown = [name for name in start_from if name not in names]
    if unknown:
        raise InputError(f"adapter.start_from: the adapter has no class {unknown[0]!r}; it has {', '.join(names)}.")
    return dict(start_from)


def _set_classes(layer: ClassLinear | ClassEmbedding, sources: list[int | None]) -> None:
    if isinstance(layer, ClassEmbedding):
        # The last row stands for "no cell".
        layer.set_rows([*sources, layer.num_embeddings - 1])
    elif getattr(layer, "initial_bias", None) is None:
        # Classes that exclude each other: a start that all have in common would tell nothing apart.
        layer.set_rows(sources, nn.init.xavier_uniform_(torch.empty(len(sources), layer.in_features)))
    else:
        layer.set_rows(sources)


def _peft_config(settings: "AdapterConfig", tasks: Sequence[str], heads: list[str], model: nn.Module) -> Any:
    import peft

    pattern = settings.target_modules or target_pattern(tasks)
    try:
        re.compile(pattern)
    except re.error as error:
        raise InputError(f"adapter.target_modules {pattern!r} is not a pattern: {error}.") from error
    common = {"target_modules": pattern, "modules_to_save": heads or None}
    if settings.method == "ia3":
        return peft.IA3Config(feedforward_modules=rf"(?={pattern}$){_IA3_INPUTS}", **common)
    if settings.method == "dora":
        # It divides by the length of each row of a weight.
        layers = ((name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear))
        empty = [name for name, layer in layers if re.fullmatch(pattern, name) and not layer.weight.any(1).all()]
        common["exclude_modules"] = empty or None
    return peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        use_dora=settings.method == "dora",
        **common,
    )


def _has_morphology(rows: Sequence[Row], known: Mapping[str, Any]) -> bool:
    return any(name in known for row in rows for cell in row["objects"].get("morphology", ()) for name in cell)


__all__ = [
    "HEADS",
    "TARGETS",
    "attach_adapter",
    "load_adapter_weights",
    "save_adapter",
    "save_merged",
    "start_classes",
    "target_pattern",
]
