"""The configuration of a training run: one file, from which the run can be repeated. Every name and type in it is checked."""

import dataclasses
import difflib
import importlib.metadata
import platform
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from unihema.errors import RunConfigError
from unihema.files import read_json_object, real_path, shortened, write_json
from unihema.modeling_unihema.tasks import TASKS
from unihema.training.data.augmentation import AugmentationConfig


PACKAGES = (
    "unihema",
    "torch",
    "torchvision",
    "transformers",
    "accelerate",
    "peft",
    "numpy",
    "tokenizers",
    "safetensors",
)
# Settings of how things are computed: no figure depends on them, but by rounding.
MEANS = (
    *(f"optimisation.{name}" for name in ("device", "compile", "gradient_checkpointing", "tf32")),
    *(f"data.{name}" for name in ("workers", "cache_images", "cache_gigabytes")),
)
# A run in stages leaves its mix under this name, so that it can be resumed and repeated; JSON is YAML too.
MIX_FILE = "mix.json"
MOST_MIX_BYTES = 1 << 20


# Settings that say something of single data sets, by the names of their folders.
LISTS_OF_DATA_SETS = ("boxes_as_crops", "questions_from_labels")
OF_DATA_SETS = ("exact_classes", "absent_classes", "mask_levels", "dataset_weights")


@dataclass
class DataConfig:
    """What to train on.

    Args:
        folders (`list[str]`): Data folders, see `unihema.training.data.readers.load_folder`.
        train_split (`str`): Split to train on.
        val_split (`str`): Split to evaluate and calibrate on; empty: none.
        tasks (`list[str]`, *optional*): Tasks to train; all that the folders have when not given.
        evaluation_tasks (`list[str]`, *optional*): Tasks to evaluate; those that are trained when not given.
        task_weights (`dict[str, float]`): Share of the batches of a task; others share what `temperature` gives them.
        temperature (`float`): Exponent of the tasks' sizes in the mix: 1 by size, 0 all alike.
        dataset_weights (`dict[str, float]`): Share of a task's samples that a data set (the name of its folder) has; others
            have the fraction that `dataset_temperature` gives them, all together at most 1, so weights above 1 leave them little.
            A run says the shares when it begins.
        dataset_temperature (`float`): Exponent of the sizes of a task's data sets: 1 by size, 0 all alike.
        class_temperature (`float`): Exponent of the sizes of the single-cell classes of a data set: 1 by size, 0 all alike. Rows
            in shards are drawn by size.
        steps_per_epoch (`int`, *optional*): Batches of an epoch; one pass over everything when not given.
        batch_size (`dict[str, int]`): Images of a batch, for each task (on each process).
        questions_per_image (`int`): Questions asked of an image in a batch of a language task.
        text_only (`bool`): Language tasks without their images: the model reads and writes text alone.
        image_sizes (`dict[str, dict[str, int]]`): Task -> `shortest_edge` and/or `longest_edge` in pixels.
        segmentation_prompt (`str`): What the masks show.
        mask_levels (`dict[str, dict[str, list[int]]]`): Data set (the name of its folder) whose masks show several things by
            their levels -> what is shown, the prompt -> the levels that show it. With `{"white blood cell": [1, 2], "nucleus":
            [2]}` each image is asked for both.
        rename (`dict[str, str]`): New names of detection classes and single-cell labels.
        hold_out (`dict[str, list[str]]`): `patient`, `slide`, `source_image` or `origin` -> those whose images take no part,
            neither in training nor in validation.
        canonical_names (`bool`): Give a class that the folders spell in several ways (`Platelets`, `thrombocyte`) one name.
        label_parents (`dict[str, str]`, *optional*): Detection class -> the coarser class that its cells belong to as well;
            what `unihema.training.data.class_tree` knows (the types of white cells -> WBC) when not given.
        single_cell_parents (`dict[str, str]`, *optional*): Single-cell label or group -> the group that it belongs to; what
            `unihema.training.data.class_tree` knows when not given. An initial checkpoint keeps its own unless it grows.
        attributes_as_detection (`bool` or `list[str]`): Train morphology on labelled single-cell images, as one
            cell somewhere in an image of `single_cell`'s size and batch size; with the attributes named, or WBCAtt's.
        boxes_as_crops (`bool` or `list[str]`): Train single cells also on the boxes of fields, cut out at random framing; of all
            data sets, or of those named. At most 3 000 boxes of a class and a data set take part, and 100 in validation.
        questions_from_labels (`bool` or `list[str]`): Train questions and sentences also on such as are templated from boxes
            and labels; of all data sets, or of those named. See `unihema.training.data.templates`.
        exact_classes (`dict[str, list[str]]`): Data set -> coarser classes whose cells are of no finer class that it boxes, such
            as RBC where infected red cells have the name of their stage alone. Elsewhere a coarser name leaves finer ones open.
        absent_classes (`dict[str, list[str]]`): Data set -> classes of which it has no cell, so that its fields are their
            background, such as stages of malaria in smears of healthy people.
        on_invalid (`"error"` or `"skip"`): Whether bad rows stop the reading, or are left out with a warning each.
        max_samples (`int`, *optional*): Train on at most this many rows of a task (a seeded draw).
        folds (`int`, *optional*): Divide the training rows into this many parts, and validate on one of them instead of
            on `val_split`.
        fold (`int`): Which one, from 0.
        cache_images (`bool`): Keep decoded images in files, in `image_cache` of the output folder until the run is finished.
        cache_gigabytes (`float`): The most that these may take; at most half of what is free on the disk.
        workers (`int`): Processes that load images; 0 loads them in between steps.
    """

    folders: list[str] = field(default_factory=list)
    train_split: str = "train"
    val_split: str = "val"
    tasks: list[str] | None = None
    evaluation_tasks: list[str] | None = None
    task_weights: dict[str, float] = field(default_factory=dict)
    temperature: float = 1.0
    dataset_weights: dict[str, float] = field(default_factory=dict)
    dataset_temperature: float = 1.0
    class_temperature: float = 1.0
    steps_per_epoch: int | None = None
    batch_size: dict[str, int] = field(
        default_factory=lambda: {
            "detection": 4,
            "segmentation": 4,
            "single_cell": 16,
            "question_answering": 8,
            "cloze": 8,
        }
    )
    questions_per_image: int = 4
    text_only: bool = False
    image_sizes: dict[str, dict[str, int]] = field(default_factory=dict)
    segmentation_prompt: str = "white blood cell"
    mask_levels: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    rename: dict[str, str] = field(default_factory=dict)
    hold_out: dict[str, list[str]] = field(default_factory=dict)
    canonical_names: bool = True
    label_parents: dict[str, str] | None = None
    single_cell_parents: dict[str, str] | None = None
    attributes_as_detection: bool | list[str] = False
    boxes_as_crops: bool | list[str] = False
    questions_from_labels: bool | list[str] = False
    exact_classes: dict[str, list[str]] = field(default_factory=dict)
    absent_classes: dict[str, list[str]] = field(default_factory=dict)
    on_invalid: Literal["error", "skip"] = "error"
    max_samples: int | None = None
    folds: int | None = None
    fold: int = 0
    cache_images: bool = True
    cache_gigabytes: float = 8.0
    workers: int = 1


@dataclass
class ModelConfig:
    """What to train.

    Args:
        preset (`"tiny"` or `"base"`): Size of a new model.
        overrides (`dict[str, Any]`): Fields of `UniHemaConfig` to set otherwise; they win over what the data says.
        initial_checkpoint (`str`, *optional*): Folder of a trained model to go on from, instead of a preset. Its class
            lists stay; data with other classes are an error.
        grow_classes (`bool`): Add classes that the data have and the initial checkpoint has not to the end of its lists. Those
            that it has keep their weights.
        tokenizer (`str`, *optional*): Name or folder of a T5 tokenizer for a new model; our own when not given.
        backbone_weights (`str`, *optional*): ImageNet weights that the backbone of a new model starts from, see
            `load_pretrained_backbone`. `"efficientnet-lite0"` makes the backbone one of that kind.
        trained_parts (`list[str]`, *optional*): Parts to train (of `PARTS` in training/run/build.py), the others stay as they
            are; all when not given.
    """

    preset: Literal["tiny", "base"] = "tiny"
    overrides: dict[str, Any] = field(default_factory=dict)
    initial_checkpoint: str | None = None
    grow_classes: bool = False
    tokenizer: str | None = None
    backbone_weights: str | None = None
    trained_parts: list[str] | None = None


@dataclass
class OptimisationConfig:
    """How to train. The run stops at the first of `epochs`, `max_steps` and `time_limit_minutes` that is reached.

    Args:
        epochs (`float`, *optional*): Passes over the data; 24 when no limit at all is given.
        max_steps (`int`, *optional*): Optimizer steps.
        time_limit_minutes (`float`, *optional*): Wall-clock time of training, evaluation between epochs included, that
            at the end not. The learning rate follows the time spent, so it is annealed when the limit comes.
        learning_rate (`float`): Peak learning rate of AdamW. 2e-4 suits the tiny preset, 1e-4 the base one.
        backbone_multiplier (`float`): Learning rate of the backbone relative to that; 0.1 for a pretrained one.
        learning_rate_multipliers (`dict[str, float]`): The same for parameters whose name has this in it. 0 freezes them:
            the first layers of a pretrained backbone cost much of a step and need not change.
        warmup_steps (`int`): Steps over which the learning rate rises linearly.
        schedule (`"cosine"`, `"step"` or `"constant"`): Of the learning rate over the run's progress from 0 to 1.
        step_fractions (`list[float]`): Progress at which the step schedule lowers the rate.
        step_factor (`float`): Factor by which it does.
        final_fraction (`float`): Learning rate at the end of the cosine, relative to its start.
        weight_decay (`float`): Of matrices; norms and biases have none.
        betas (`list[float]`): Of AdamW.
        patience (`int`, *optional*): Stop after this many evaluations without a better one; needs
            `logging.evaluate_every` and a validation split.
        gradient_clipping (`float`): Largest norm of the gradient; 0 for none.
        accumulation (`int`): Batches of an optimizer step.
        loss_weights (`dict[str, float]`): Factor of a task's loss.
        mixed_precision (`"no"` or `"bf16"`): Number format of training; evaluation is always in float32.
        ema_decay (`float`, *optional*): Keep an exponential moving average of the weights, evaluate and save that.
        ema_warmup (`float`): The decay at step t is at most (1 + t) / (`ema_warmup` + t).
        seed (`int`): Of everything random.
        device (`str`): auto, cpu, cuda, cuda:0 or mps; auto is an NVIDIA GPU, else Apple's, else the processor.
        compile (`bool`): Compile the model with `torch.compile`, for training only: minutes at the start, faster steps on a GPU.
        gradient_checkpointing (`bool`): Compute layers again in the backward pass instead of keeping what they gave: less
            memory, more time.
        tf32 (`bool`, *optional*): Whether float32 matrix products of training may use TF32 on a GPU; as PyTorch is set when
            not given.
    """

    epochs: float | None = None
    max_steps: int | None = None
    time_limit_minutes: float | None = None
    learning_rate: float = 2e-4
    backbone_multiplier: float = 1.0
    learning_rate_multipliers: dict[str, float] = field(default_factory=dict)
    warmup_steps: int = 100
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    step_fractions: list[float] = field(default_factory=lambda: [10 / 24, 20 / 24])
    step_factor: float = 0.1
    final_fraction: float = 0.01
    weight_decay: float = 0.01
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    patience: int | None = None
    gradient_clipping: float = 0.1
    accumulation: int = 1
    loss_weights: dict[str, float] = field(default_factory=dict)
    mixed_precision: Literal["no", "bf16"] = "no"
    ema_decay: float | None = None
    ema_warmup: float = 10.0
    seed: int = 0
    device: str = "auto"
    compile: bool = False
    gradient_checkpointing: bool = False
    tf32: bool | None = None


@dataclass
class AugmentationSettings:
    """Random views of training images.

    Args:
        enabled (`bool`): Whether images are changed at all.
        overrides (`dict[str, dict[str, float]]`): Task -> fields of `AugmentationConfig` that differ from the task's
            defaults.
        data_sets (`dict[str, dict[str, float]]`): Data set (the name of its folder) -> fields that differ for its images, in
            every task; for one whose classes go with its colours, say.
    """

    enabled: bool = True
    overrides: dict[str, dict[str, float]] = field(default_factory=dict)
    data_sets: dict[str, dict[str, float]] = field(default_factory=dict)

    def for_task(self, task: str, data_set: str | None = None) -> AugmentationConfig | None:
        """The views of a task's images, or of those of one data set; `None` for none."""
        if not self.enabled:
            return None
        differing = self.overrides.get(task, {}) | self.data_sets.get(data_set or "", {})
        return dataclasses.replace(AugmentationConfig.for_task(task), **differing)


@dataclass
class LoggingConfig:
    """What to write while training.

    Args:
        log_every (`int`): Steps between lines of `log.jsonl`.
        checkpoint_minutes (`float`, *optional*): Minutes between checkpoints.
        checkpoint_steps (`int`, *optional*): Steps between checkpoints.
        keep_checkpoints (`int`): How many to keep.
        evaluate_every (`int`): Epochs between evaluations on the validation split; 0: at the end only.
        evaluation_samples (`int`, *optional*): Rows of each task in evaluations between epochs (a seeded draw).
        final_samples (`int`, *optional*): The same for the evaluation at the end; all when not given.
        keep_best (`bool`): Save the weights of the best evaluation rather than the last.
        progress (`bool`): Show a progress bar.
        trackers (`list[str]`): Accelerate's trackers to log to as well, such as `"tensorboard"`.
    """

    log_every: int = 20
    checkpoint_minutes: float | None = 10.0
    checkpoint_steps: int | None = None
    keep_checkpoints: int = 2
    evaluate_every: int = 0
    evaluation_samples: int | None = 200
    final_samples: int | None = None
    keep_best: bool = False
    progress: bool = True
    trackers: list[str] = field(default_factory=list)


@dataclass
class AdapterConfig:
    """An adapter for `model.initial_checkpoint`, whose own weights stay as they are.

    Args:
        method (`"none"`, `"lora"`, `"dora"` or `"ia3"`): Kind of adapter; `"none"` trains the model itself.
        rank (`int`): Width of the change of each layer, for LoRA (arXiv 2106.09685) and DoRA (arXiv 2402.09353).
        alpha (`float`): The change is scaled by `alpha / rank`.
        dropout (`float`): Dropout before the change.
        target_modules (`str`, *optional*): Pattern of the names of the layers to change, see
            `unihema.training.adapters.TARGETS`; the attention and feed-forward layers that the tasks run when not given.
        heads (`list[str]`, *optional*): Names of modules that are trained and saved whole; those with the classes of the
            tasks when not given.
        labels (`list[str]`, *optional*): Classes, in their order; those of the training data when not given.
        start_from (`dict[str, str]`): New class -> the base's class that it starts from. Other classes start from the
            base's class of the same name, else from the coarser one that they are a kind of.
        base_name (`str`, *optional*): What the adapter calls its base; the checkpoint's folder when not given.
    """

    method: Literal["none", "lora", "dora", "ia3"] = "none"
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: str | None = None
    heads: list[str] | None = None
    labels: list[str] | None = None
    start_from: dict[str, str] = field(default_factory=dict)
    base_name: str | None = None


@dataclass
class RunConfig:
    """A training run.

    Args:
        output_dir (`str`): Folder of the trained model, its log, its metrics and its checkpoints.
        data ([`DataConfig`]): What to train on.
        model ([`ModelConfig`]): What to train.
        optimisation ([`OptimisationConfig`]): How to train.
        augmentation ([`AugmentationSettings`]): Random views of training images.
        logging ([`LoggingConfig`]): What to write while training.
        adapter ([`AdapterConfig`]): An adapter to train instead of the model.
        provenance (`dict[str, Any]`): Versions the run was made with; filled in by `save`.

    Example:

    ```python
    >>> config = RunConfig(output_dir="my_model", data=DataConfig(folders=["smears"]))
    >>> config = config.with_overrides({"optimisation.epochs": 10})
    ```
    """

    output_dir: str = "unihema_run"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimisation: OptimisationConfig = field(default_factory=OptimisationConfig)
    augmentation: AugmentationSettings = field(default_factory=AugmentationSettings)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    provenance: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "run configuration") -> "RunConfig":
        """A run from nested dictionaries.

        Raises:
            RunConfigError: An unknown setting (the message has the closest name) or a value of the wrong type.
        """
        return settings_from(cls, values, "", source)

    @classmethod
    def load(cls, path: str | Path) -> "RunConfig":
        """Reads `run_config.json`, or the folder that holds it.

        Raises:
            RunConfigError: No such file, broken JSON, an unknown setting or a value of the wrong type.
        """
        path = Path(path)
        path = path / "run_config.json" if path.is_dir() else path
        values = read_json_object(path, RunConfigError, "RunConfig().save(folder) writes one.")
        return cls.from_dict(values, str(path))

    def save(self, folder: str | Path) -> Path:
        """Writes `run_config.json` with the versions of the packages it runs with."""
        self.provenance = provenance()
        path = Path(folder) / "run_config.json"
        write_json(path, self.to_dict())
        return path

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionaries, as in the file."""
        return dataclasses.asdict(self)

    def with_overrides(self, overrides: dict[str, Any]) -> "RunConfig":
        """A copy with settings such as `{"optimisation.learning_rate": 1e-4}` replaced.

        Raises:
            RunConfigError: An unknown setting or a value of the wrong type.
        """
        values = self.to_dict()
        for dotted, value in overrides.items():
            *sections, name = dotted.split(".")
            inner = values
            for section in sections:
                if not isinstance(inner.get(section), dict):
                    raise RunConfigError(unknown_message(section, inner, "", f"override '{dotted}'"))
                inner = inner[section]
            inner[name] = value
        return type(self).from_dict(values, "overrides")

    def with_folders(self, folders: Sequence[str | Path]) -> "RunConfig":
        """A copy for other data folders, without what is said of data sets that are not among them."""
        names = {real_path(folder).name for folder in folders}
        kept: dict[str, Any] = {"data.folders": list(map(str, folders))}
        for setting in LISTS_OF_DATA_SETS:
            listed = getattr(self.data, setting)
            kept[f"data.{setting}"] = listed if isinstance(listed, bool) else [name for name in listed if name in names]
        for setting in OF_DATA_SETS:
            kept[f"data.{setting}"] = {name: of for name, of in getattr(self.data, setting).items() if name in names}
        views = {name: of for name, of in self.augmentation.data_sets.items() if name in names}
        return self.with_overrides({**kept, "augmentation.data_sets": views})

    def differences(self, other: "RunConfig") -> dict[str, tuple[Any, Any]]:
        """Dotted names of settings with another value: name -> (ours, theirs); provenance does not count."""
        ours, theirs = flat(self.to_dict()), flat(other.to_dict())
        names = [name for name in ours | theirs if not name.startswith("provenance.") and name != "provenance"]
        missing = object()
        pairs = {name: (ours.get(name, missing), theirs.get(name, missing)) for name in names}
        return {
            name: tuple(None if value is missing else value for value in pair)
            for name, pair in pairs.items()
            if pair[0] != pair[1]
        }

    def check(self) -> None:
        """Checks what can be checked before any data are read.

        Raises:
            RunConfigError: No folder, an unknown task, or a number that makes no sense.
        """
        if not self.data.folders:
            raise RunConfigError("data.folders is empty: name at least one data folder.")
        for name in ("tasks", "evaluation_tasks", "task_weights", "batch_size", "image_sizes"):
            _check_tasks(getattr(self.data, name) or (), f"data.{name}")
        _check_tasks(self.augmentation.overrides, "augmentation.overrides")
        _check_tasks(self.optimisation.loss_weights, "optimisation.loss_weights")
        known = AugmentationConfig.__dataclass_fields__
        for setting in ("overrides", "data_sets"):
            for owner, values in getattr(self.augmentation, setting).items():
                for name in values:
                    if name not in known:
                        raise RunConfigError(
                            unknown_message(name, known, f"augmentation.{setting}.{owner}.", "run config")
                        )
        for task in TASKS:
            for data_set in (None, *self.augmentation.data_sets):
                self.augmentation.for_task(task, data_set)
        positive = ("optimisation.epochs", "optimisation.max_steps", "optimisation.time_limit_minutes")
        positive += ("optimisation.learning_rate", "optimisation.accumulation", "data.questions_per_image")
        positive += ("logging.log_every", "logging.keep_checkpoints", "data.max_samples", "data.steps_per_epoch")
        positive += ("logging.checkpoint_minutes", "logging.checkpoint_steps", "optimisation.patience", "adapter.rank")
        for dotted in positive:
            section, name = dotted.split(".")
            value = getattr(getattr(self, section), name)
            if value is not None and not value > 0:
                raise RunConfigError(f"{dotted}={value} must be above 0.")
        if self.data.cache_gigabytes < 0:
            raise RunConfigError(f"data.cache_gigabytes={self.data.cache_gigabytes} must not be negative.")
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", self.optimisation.device):
            raise RunConfigError(
                f"optimisation.device={self.optimisation.device!r} must be auto, cpu, mps, cuda, or cuda:0 and so on."
            )
        decay = self.optimisation.ema_decay
        if decay is not None and not 0 < decay < 1:
            raise RunConfigError(f"optimisation.ema_decay={decay} must lie between 0 and 1, such as 0.999.")
        folds = self.data.folds
        if folds is not None and not (folds >= 2 and 0 <= self.data.fold < folds):
            raise RunConfigError(f"data.fold={self.data.fold} of data.folds={folds}: at least 2, counted from 0.")
        if self.model.grow_classes and (not self.model.initial_checkpoint or self.adapter.method != "none"):
            raise RunConfigError(
                "model.grow_classes adds classes to model.initial_checkpoint; an adapter brings its own."
            )
        if self.adapter.method != "none":
            if not self.model.initial_checkpoint:
                raise RunConfigError("adapter.method needs a base: set model.initial_checkpoint.")
            if self.model.trained_parts is not None:
                raise RunConfigError("adapter.method trains the adapter only; leave model.trained_parts out.")


def provenance() -> dict[str, Any]:
    """Versions of Python and of the packages that decide what a run gives."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    if versions["unihema"] is None:
        from unihema.version import __version__

        versions["unihema"] = __version__
    return {"python": platform.python_version(), "platform": platform.platform(), "packages": versions}


def _check_tasks(names: Any, setting: str) -> None:
    for name in names:
        if name not in TASKS:
            close = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.4)
            hint = f" Did you mean '{close[0]}'?" if close else ""
            raise RunConfigError(f"{setting}: unknown task '{name}'; tasks are {', '.join(TASKS)}.{hint}")


def settings_from(cls: type, values: Any, prefix: str, source: str) -> Any:
    """A dataclass, and those within it, from dictionaries.

    Args:
        cls (`type`): The dataclass.
        values (`Any`): Its settings by name; those left out have their defaults.
        prefix (`str`): Dotted name of these settings in the whole, for messages.
        source (`str`): Where they are from, for messages.

    Raises:
        RunConfigError: An unknown setting (the message has the closest name) or a value of the wrong type.
    """
    if not isinstance(values, dict):
        shown = shortened(repr(values), 80)
        raise RunConfigError(f"{source}: '{prefix.rstrip('.')}' must be a set of settings, got {shown}.")
    hints = typing.get_type_hints(cls)
    arguments = {}
    for name, value in values.items():
        if name not in hints:
            raise RunConfigError(unknown_message(name, hints, prefix, source))
        if dataclasses.is_dataclass(hints[name]):
            arguments[name] = settings_from(hints[name], value, f"{prefix}{name}.", source)
        else:
            if not _fits(value, hints[name]):
                expected = str(hints[name]).replace("typing.", "") if typing.get_origin(hints[name]) else None
                expected = expected or getattr(hints[name], "__name__", str(hints[name]))
                raise RunConfigError(
                    f"{source}: {prefix}{name}={shortened(repr(value), 80)} has the wrong type; expected {expected}."
                )
            arguments[name] = value
    return cls(**arguments)


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in inner)
    if origin is Literal:
        return value in inner
    if origin is list:
        return isinstance(value, list) and all(_fits(item, inner[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            _fits(key, inner[0]) and _fits(item, inner[1]) for key, item in value.items()
        )
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def unknown_message(name: object, known: Any, prefix: str, source: str) -> str:
    """What to say about a setting that does not exist."""
    # A file may have a number or a truth for a name.
    name = str(name)
    close = difflib.get_close_matches(name[:80], list(known), n=1, cutoff=0.4)
    hint = f" Did you mean '{prefix}{close[0]}'?" if close else ""
    return f"{source}: unknown setting '{prefix}{shortened(name, 80)}'.{hint} Known: {', '.join(known)}."


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


@dataclass
class Mix:
    """What the file says.

    Args:
        run ([`RunConfig`]): Settings under the names of `run_config.json`; `data.folders` are relative to the file.
        stages (`dict[str, dict[str, Any]]`): Stage -> settings that differ there, by dotted name.
    """

    run: RunConfig
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)

    def save(self, folder: str | Path) -> None:
        """Writes `mix.json`, which [`read_mix`] reads."""
        self.run.provenance = provenance()
        write_json(Path(folder) / MIX_FILE, {**self.run.to_dict(), "stages": self.stages})


def read_mix(path: str | Path) -> Mix:
    """Reads a mix.

    Example of a file:

    ```yaml
    data:
      folders: [cbc, wbc5, pbc]
      image_sizes: {detection: {longest_edge: 320}}
    optimisation: {learning_rate: 4.0e-4}
    stages:
      joint_visual: {optimisation.time_limit_minutes: 45}
    ```

    Raises:
        RunConfigError: No such file, broken YAML, an unknown setting or a value of the wrong type.
    """
    path = Path(path)
    try:
        if path.exists() and (not path.is_file() or path.stat().st_size > MOST_MIX_BYTES):
            raise RunConfigError(f"{path}: no file, or larger than {MOST_MIX_BYTES >> 20} MB.")
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunConfigError(
            f"{path}: cannot be read ({error.strerror}). It should list data folders, see docs/training.md."
        ) from None
    # Dates that there are not are ValueErrors, and keys that are no text TypeErrors.
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise RunConfigError(f"{path}: broken YAML ({shortened(error)}).") from error
    if not isinstance(values, dict):
        raise RunConfigError(
            f"{path}: a mix is a set of settings (data: ..., stages: ...), got {shortened(repr(values), 100)}."
        )
    stages = values.pop("stages", None) or {}
    if not isinstance(stages, dict) or not all(isinstance(changes, dict) for changes in stages.values()):
        raise RunConfigError(f"{path}: 'stages' must be stage names, each with its settings.")
    run = RunConfig.from_dict(values, str(path))
    run.data.folders = [str(real_path(path.parent / Path(folder).expanduser())) for folder in run.data.folders]
    return Mix(run, {str(name): dict(changes) for name, changes in stages.items()})
