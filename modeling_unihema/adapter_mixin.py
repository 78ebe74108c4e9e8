"""PEFT adapters in a model: several side by side, each with its own heads and classes, switched by name."""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from unihema.errors import InputError, PackageMissingError

from .configuration_unihema import TrainingResults, take_old_fields
from .tasks import TASKS


# Fields of the configuration that an adapter may override in its `adapter_config.json`.
ADAPTER_FIELDS = (
    "id2label",
    "label_parents",
    "single_cell_labels",
    "single_cell_parents",
    "default_prompt_ids",
    "trained",
)
# Their key in `auto_mapping`, which PEFT reads and writes unchanged.
FIELDS_KEY = "unihema"
# Beside it the checksum of the backbone that the adapter was trained on.
BACKBONE_KEY = "unihema_backbone"
_PATTERN_FIELDS = (
    "target_modules",
    "exclude_modules",
    "layers_pattern",
    "modules_to_save",
    "feedforward_modules",
    "rank_pattern",
    "alpha_pattern",
    "target_parameters",
)
_MOST_PATTERNS, _LONGEST_PATTERN = 1000, 4000
_HUB_OPTIONS = ("revision", "token", "cache_dir", "subfolder", "force_download", "proxies", "local_files_only")


class WithAdapters:
    """Adapter methods of every UniHema model; unlike those of Transformers they support adapters with heads of their own.

    [`PeftModel`] works on these models as well. Either way the configuration (`id2label`, `single_cell_labels`, thresholds,
    ...) is that of the adapter in use, and the model's own again where none is.
    """

    # The base's values of ADAPTER_FIELDS, once there are adapters; and the adapters whose values are in use now.
    _base_fields: dict[str, Any] | None = None
    _followed: tuple[str, ...] | None = ()

    def load_adapter(self, peft_model_id=None, adapter_name: str | None = None, *args, **kwargs):
        """Loads an adapter beside those already loaded, and switches to it.

        Args:
            peft_model_id (`str`, *optional*): Folder, or repository on the Hub.
            adapter_name (`str`, *optional*): Its name in this model; `"default"` when missing.
            *args, **kwargs: See [`~PreTrainedModel.load_adapter`].

        Returns:
            `LoadStateDictInfo`: Keys that were missing or not expected.

        Raises:
            ImportError: PEFT is not installed.
            ValueError: The name is taken, or the adapter does not fit this model.
        """
        special = {"peft_config", "adapter_state_dict"} & {name for name, value in kwargs.items() if value is not None}
        if args or special or kwargs.get("hotswap") is True or peft_model_id is None:
            return super().load_adapter(peft_model_id, adapter_name, *args, **kwargs)
        return _load_beside(self, str(peft_model_id), adapter_name or "default", kwargs)

    def set_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Switches to an adapter, or to several together.

        The changes of several adapters add up. Heads and classes are those of the first adapter that has any.

        Args:
            adapter_name (`str` or `Sequence[str]`): Names of loaded adapters.

        Raises:
            ValueError: No such adapter.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        loaded = getattr(self, "peft_config", None) or {}
        missing = [name for name in names if name not in loaded]
        if missing or not names:
            raise InputError(f"No adapter {', '.join(missing) or 'named'}; loaded are {', '.join(loaded) or 'none'}.")
        inference = all(loaded[name].inference_mode for name in names)
        for module in _adapted_modules(self):
            if hasattr(module, "modules_to_save"):
                own = [name for name in names if name in module.modules_to_save]
                module.set_adapter(own[:1], inference_mode=inference)
            else:
                if module.merged:
                    module.unmerge()
                module.set_adapter(names, inference_mode=inference)
            module.enable_adapters(True)
            if inference:
                module.requires_grad_(False)
        self.follow_adapter()

    def enable_adapters(self) -> None:
        """Switches the adapters on again after `disable_adapters`."""
        for module in _adapted_modules(self):
            module.enable_adapters(True)
        self.follow_adapter()

    def delete_adapter(self, adapter_names: str | Sequence[str]) -> None:
        """Forgets adapters.

        Args:
            adapter_names (`str` or `Sequence[str]`): Names of loaded adapters.
        """
        super().delete_adapter(adapter_names)
        self.follow_adapter()

    def disable_adapters(self) -> None:
        """Switches all adapters off: the model is the base again."""
        super().disable_adapters()
        self.follow_adapter()

    @property
    def adapters_in_use(self) -> tuple[str, ...]:
        """Names of the adapters that are switched on."""
        return _active_names(self) if getattr(self, "peft_config", None) else ()

    def merge_adapter(self) -> None:
        """Adds the changes of the adapters in use to the weights, so that they take no time; see `unmerge_adapter`."""
        for module in _adapted_modules(self):
            if not hasattr(module, "modules_to_save"):
                module.merge()

    def unmerge_adapter(self) -> None:
        """Subtracts the merged changes from the weights again, up to rounding."""
        for module in _adapted_modules(self):
            if not hasattr(module, "modules_to_save") and module.merged:
                module.unmerge()

    def merge_and_unload(self):
        """Merges the adapters in use into the weights for good, and removes all adapters.

        Returns:
            The model itself, without adapters, to be saved as a checkpoint.
        """
        self.follow_adapter()
        for name, module in list(self.named_modules()):
            if not _is_adapted(module):
                continue
            if hasattr(module, "modules_to_save"):
                plain = module.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
            else:
                if not module.disable_adapters:
                    module.merge()
                plain = module.get_base_layer()
            parent, _, child = name.rpartition(".")
            setattr(self.get_submodule(parent), child, plain)
        del self.peft_config
        # Private: Transformers' adapter methods check this flag, and nothing public resets it.
        self._hf_peft_config_loaded = False
        self._base_fields, self._followed = None, ()
        return self

    def train(self, mode: bool = True):
        """Sets the training mode. While an adapter is trained the base stays as it is, so its BatchNorms keep the
        statistics they have."""
        super().train(mode)
        if mode and getattr(self, "peft_config", None):
            for module in self.modules():
                frozen = not any(parameter.requires_grad for parameter in module.parameters(recurse=False))
                if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)) and frozen:
                    module.eval()
        self.follow_adapter()
        return self

    def follow_adapter(self) -> None:
        """Gives the configuration the classes, thresholds and prompts of the adapter in use; called in every forward."""
        adapters = getattr(self, "peft_config", None) or {}
        if not adapters and self._base_fields is None:
            return
        if self._base_fields is None:
            self._base_fields = {name: getattr(self.config, name, None) for name in ADAPTER_FIELDS}
            self._base_fields["trained"] = dataclasses.asdict(self.config.trained)
            self._followed = ()
        names = _active_names(self) if adapters else None
        if names == self._followed:
            return
        self._followed = names
        if names is None and _fits(self, self.config.num_labels):
            # The adapter was merged, so its classes stay.
            return
        fields, tasks = dict(self._base_fields), set()
        # The first adapter is applied last, so it wins.
        for name in reversed(names or ()):
            own = adapter_fields(adapters[name]) if name in adapters else {}
            trained = own.get("trained", {})
            tasks |= set(trained.get("tasks") or ())
            fields |= {**own, "trained": {**fields["trained"], **trained}}
        if tasks:
            # What any of them does.
            fields["trained"]["tasks"] = [task for task in TASKS if task in tasks]
        set_fields(self, fields)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Writes the adapter in use, with the classes and thresholds that the model has now, or the model where there is none.

        Args:
            save_directory (`str` or `Path`): Where.
            *args, **kwargs: See [`~PreTrainedModel.save_pretrained`].
        """
        for name in self.adapters_in_use[:1]:
            self.refresh_adapter_fields(name)
        return super().save_pretrained(save_directory, *args, **kwargs)

    def refresh_adapter_fields(self, adapter_name: str) -> None:
        """Copies the current values of an adapter's fields into its configuration, before it is saved."""
        own = adapter_fields(self.peft_config[adapter_name])
        now = {name: getattr(self.config, name, None) for name in own}
        if "trained" in own:
            now["trained"] = {name: getattr(self.config.trained, name) for name in own["trained"]}
        self.peft_config[adapter_name].auto_mapping[FIELDS_KEY] = now


def adapter_fields(peft_config: Any) -> dict[str, Any]:
    """The fields of `UniHemaConfig` that an adapter overrides; of `trained` possibly some keys only.

    Args:
        peft_config (`PeftConfig`): The adapter's configuration.
    """
    stored = dict((getattr(peft_config, "auto_mapping", None) or {}).get(FIELDS_KEY) or {})
    if trained := take_old_fields("trained", stored):
        stored["trained"] = trained
    fields = {name: stored[name] for name in ADAPTER_FIELDS if name in stored}
    # What the base's scores mean, those of changed layers do not.
    fields["trained"] = {"calibration": {}, **fields.get("trained", {})}
    if "single_cell_labels" in fields:
        # Groups of the base are none of an older adapter's classes.
        fields.setdefault("single_cell_parents", None)
        # Nor does the base's frame tell how its crops were cut.
        fields["trained"] = {"crop_frame": None, "second_look": None, "parasites": None, **fields["trained"]}
    if fields.get("id2label"):
        fields["id2label"] = {int(index): name for index, name in fields["id2label"].items()}
        # Older adapters do not say how large the cells were that they learned; they need not be as large as the base's.
        fields["trained"] = {"red_cell_diameter": None, "unfound_classes": [], **fields["trained"]}
    return fields


def set_fields(model: nn.Module, fields: dict[str, Any]) -> None:
    """Sets fields of a model's configuration, and `label2id` to match.

    Args:
        model (`UniHemaPreTrainedModel`): The model.
        fields (`dict[str, Any]`): Of [`ADAPTER_FIELDS`].
    """
    config = model.config
    for name, value in fields.items():
        setattr(config, name, TrainingResults(**value) if name == "trained" else value)
    if not _fits(model, config.num_labels):
        # The adapter was saved without its classes, or its heads are not loaded yet.
        config.id2label = {index: f"LABEL_{index}" for index in range(len(model.detection_head.class_head.weight))}
        model._followed = None
    config.label2id = {name: index for index, name in config.id2label.items()}


def _fits(model: nn.Module, classes: int) -> bool:
    head = getattr(model, "detection_head", None)
    return head is None or len(head.class_head.weight) == classes


def _adapted_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Layers that PEFT has put in."""
    return (module for module in list(model.modules()) if _is_adapted(module))


def _is_adapted(module: nn.Module) -> bool:
    # By attribute, not by class: without adapters the model must work without PEFT.
    return hasattr(module, "base_layer") or hasattr(module, "modules_to_save")


def _active_names(model: nn.Module) -> tuple[str, ...]:
    module = next((m for m in model.modules() if hasattr(m, "base_layer")), None)
    return () if module is None or module.disable_adapters else tuple(module.active_adapters)


def _check_ranks(source: str, config: Any, weights: dict[str, Any]) -> None:
    """Refuses ranks that no weight of the file has: matrices of that size would be made before the file is read."""
    largest = max((max(weight.shape, default=0) for weight in weights.values()), default=0)
    ranks = [getattr(config, "r", None), *(getattr(config, "rank_pattern", None) or {}).values()]
    for rank in ranks:
        if isinstance(rank, (int, float)) and not 0 <= rank <= largest:
            raise InputError(
                f"{source}: adapter_config.json says rank {rank:g}, but no weight of the adapter is that large."
            )


def _check_patterns(source: str, config: Any) -> None:
    """Refuses patterns of layers that could be tried on their names for hours: PEFT takes them as regular expressions."""
    for field in _PATTERN_FIELDS:
        value = getattr(config, field, None)
        # A text alone is the whole pattern; PEFT puts a part that repeats before and after each of several.
        repeats, found = (3, [value]) if isinstance(value, str) else (1, list(value or ()))
        if len(found) > _MOST_PATTERNS:
            raise InputError(f"{source}: adapter_config.json has {len(found)} {field}; {_MOST_PATTERNS} are allowed.")
        for pattern in found:
            try:
                slow = len(pattern) > _LONGEST_PATTERN or _repeats(pattern) > repeats
                re.compile("" if slow else pattern)
            except (re.error, TypeError, ValueError, OverflowError, RecursionError) as error:
                raise InputError(
                    f"{source}: {field} has {repr(pattern)[:80]}, which is no pattern ({str(error)[:200]})."
                ) from error
            if slow:
                raise InputError(
                    f"{source}: {field} has {repr(pattern)[:80]}, a pattern too long or with too many repeats. Name the layers."
                )


# What the parts of a pattern look like to `_repeats`: a character or class, a group without one within, a repeat.
_ONE = re.compile(r"\\.|\[\^?\]?[^\]]*\]", re.DOTALL)
_GROUP = re.compile(r"\((?:\?(?:P<\w+>|<?[=!]|[aiLmsux-]*:|>))?([^()]*)\)(\*|\+|\{\d*,\d*\}|\?)?[?+]?")
_REPEAT = re.compile(r"[*+]|\{\d*,\d*\}")


def _repeats(pattern: str) -> float:
    """How often a pattern repeats something without limit, along the way through it with most; infinite where it refers back to
    a group, or repeats what can itself match in several ways, which may take more time than there is."""
    if re.search(r"\\[1-9]|\(\?(?:P=|\()", pattern):
        return float("inf")
    text = _ONE.sub("x", pattern)

    def count(part: str) -> int:
        # A group that was counted stands there as so many stars, and as ? where it matches in several ways.
        return max(len(_REPEAT.findall(way)) for way in part.split("|"))

    while group := _GROUP.search(text):
        body, repeat = group[1], group[2] or ""
        if repeat not in ("", "?") and (_REPEAT.search(body) or "|" in body or "?" in body):
            return float("inf")
        several = "?" if repeat == "?" or "|" in body or "?" in body else ""
        stars = "*" * (count(body) + (repeat not in ("", "?")))
        text = text[: group.start()] + stars + several + text[group.end() :]
    return count(text)


def _load_beside(model: nn.Module, source: str, name: str, options: dict[str, Any]):
    try:
        import peft
        from peft.utils import load_peft_weights, set_peft_model_state_dict
    except ImportError as error:
        raise PackageMissingError("Adapters need PEFT: pip install peft.") from error
    import warnings

    from transformers.utils.loading_report import LoadStateDictInfo

    if name in (getattr(model, "peft_config", None) or {}):
        raise InputError(
            f"An adapter named {name!r} is loaded already; give another adapter_name, or delete that first."
        )
    given = {
        **getattr(options.get("load_config"), "download_kwargs", {}),
        **options,
        **(options.get("adapter_kwargs") or {}),
    }
    hub = {option: given[option] for option in _HUB_OPTIONS if given.get(option) is not None}
    # Transformers passes the commit of the base, which does not exist in the adapter's repository.
    hub = {option: getattr(value, "initial", value) for option, value in hub.items()}
    hub = {option: value for option, value in hub.items() if value is not None}
    config = peft.PeftConfig.from_pretrained(source, **hub)
    others = {other.peft_type for other in (getattr(model, "peft_config", None) or {}).values()}
    if others - {config.peft_type}:
        # PEFT would wrap one layer in the other, and switching would reach the outer one only.
        raise InputError(
            f"{source}: an adapter of kind {config.peft_type.value} cannot lie beside one of {others.pop().value}. Load it "
            "into another copy of the base."
        )
    for field in ("megatron_config", "alora_invocation_tokens"):
        if getattr(config, field, None):
            raise InputError(f"{source}: adapter_config.json sets {field}, which is of language models alone.")
    config.inference_mode = not options.get("is_trainable", False)
    # The first parameter of an 8-bit model tells where it is as well.
    weights = load_peft_weights(source, device=str(next(model.parameters()).device), **hub)
    # PEFT's keys begin with the names of its wrapper around the model.
    weights = {key.removeprefix("base_model.model."): value for key, value in weights.items()}
    _check_ranks(source, config, weights)
    _check_patterns(source, config)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        peft.inject_adapter_in_model(config, model, name)
    # Private: Transformers' adapter methods check this flag; its own loading has no adapters with heads of their own.
    model._hf_peft_config_loaded = True  # noqa: SLF001
    try:
        result = set_peft_model_state_dict(model, weights, adapter_name=name)
    except (KeyError, RuntimeError) as error:
        raise InputError(
            f"{source}: the adapter does not fit this {type(model).__name__} ({str(error)[:1000]}). Load its own base."
        ) from error
    absent = {key for key in result.missing_keys if f".{name}." in f"{key}." and name in key.split(".")}
    if result.unexpected_keys:
        raise InputError(
            f"{source}: the adapter does not fit this {type(model).__name__}, which has no "
            f"{result.unexpected_keys[0]!r} ({len(result.unexpected_keys)} such weights). Load its own base."
        )
    if config.inference_mode:
        model.eval()
    model.set_adapter(name)
    model.config.validate()
    # Releases of Transformers differ in the fields of this report.
    told = {"missing_keys": absent, "error_msgs": [], "conversion_errors": {}}
    return LoadStateDictInfo(
        **{field.name: told.get(field.name, set()) for field in dataclasses.fields(LoadStateDictInfo)}
    )


__all__ = ["ADAPTER_FIELDS", "BACKBONE_KEY", "FIELDS_KEY", "WithAdapters", "adapter_fields", "set_fields"]
