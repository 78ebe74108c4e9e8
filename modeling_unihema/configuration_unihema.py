"""UniHema model configuration."""

import copy
import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.backbone_utils import consolidate_backbone_kwargs_to_config
from transformers.configuration_utils import PreTrainedConfig

from unihema.errors import InputError

from .remote_code import SavedWithCode


# Detection threshold of classes without a calibrated one.
DEFAULT_THRESHOLD = 0.3

FLAN_T5_BASE = {
    "d_model": 768,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 12,
    "num_heads": 12,
    "feed_forward_proj": "gated-gelu",
}

PAPER_MORPHOLOGY = {
    "nuclear_chromatin": ["open", "coarse"],
    "nuclear_shape": ["regular", "irregular"],
    "nucleolus": ["inconspicuous", "prominent"],
    "cytoplasm": ["scanty", "abundant"],
    "basophilia": ["slight", "moderate"],
    "vacuoles": ["absent", "prominent"],
}

TEXT_MODELS = ("t5", "mt5")

SMEAR_CLASSES = [
    "red blood cell",
    "platelet",
    "neutrophil",
    "lymphocyte",
    "monocyte",
    "eosinophil",
    "basophil",
]

LOSS_WEIGHTS = {
    "class": 1,
    "bbox": 5,
    "giou": 2,
    "morphology": 2,
    "mask_bce": 2,
    "mask_dice": 2,
    "dice": 2,
    "focal": 1,
}
MATCHING_WEIGHTS = {"class": 2, "bbox": 5, "giou": 2}

# What a field may be: the least, the most, and why not more. Limits are far beyond any published model of the kind.
_WIDTH = "attention and feed-forward of wider layers fit no machine"
_DEPTH = "published transformers have at most a few dozen layers"
_PROBABILITY = "it is a probability"
_WEIGHT = "larger weights overflow half precision"
BOUNDS: dict[str, tuple[float, float, str]] = {
    "d_model": (4, 8192, _WIDTH),
    "num_feature_levels": (1, 12, "every level halves the image, and 2^12 pixels are one pixel then"),
    "encoder_layers": (1, 128, _DEPTH),
    "decoder_layers": (1, 128, _DEPTH),
    "num_attention_heads": (1, 256, _WIDTH),
    "encoder_ffn_dim": (1, 65536, _WIDTH),
    "decoder_ffn_dim": (1, 65536, _WIDTH),
    "num_sampling_points": (1, 64, "each is sampled for every token, head and level"),
    "dropout": (0, 0.99, _PROBABILITY),
    "single_cell_dropout": (0, 0.99, _PROBABILITY),
    "num_queries": (1, 10_000, "attention between queries takes memory by their square"),
    "position_temperature": (1e-3, 1e9, "it is the base of wavelengths"),
    "fusion_queries": (1, 8192, "it is the longest text in tokens"),
    "fusion_layers": (1, 128, _DEPTH),
    "fusion_ffn_dim": (1, 65536, _WIDTH),
    "focal_alpha": (0, 1, "it is the share of positives"),
    "denoising_queries": (0, 10_000, "attention between queries takes memory by their square"),
    "label_noise_ratio": (0, 2, "it is twice a probability"),
    "box_noise_scale": (0, 10, "it is relative to half a box"),
}
TEXT_BOUNDS: dict[str, tuple[float, float, str]] = {
    "vocab_size": (2, 1 << 20, "published vocabularies have at most some 262 000 tokens"),
    "d_model": (1, 8192, _WIDTH),
    "d_kv": (1, 1024, _WIDTH),
    "d_ff": (1, 131_072, _WIDTH),
    "num_layers": (1, 128, _DEPTH),
    "num_decoder_layers": (1, 128, _DEPTH),
    "num_heads": (1, 256, _WIDTH),
    "relative_attention_num_buckets": (4, 4096, "there are no more distances in a text"),
    "relative_attention_max_distance": (4, 1 << 20, "there are no longer texts"),
    "dropout_rate": (0, 0.99, _PROBABILITY),
    "classifier_dropout": (0, 0.99, _PROBABILITY),
    "layer_norm_epsilon": (0, 1, "it only keeps from division by zero"),
    "initializer_factor": (0, 1e3, _WEIGHT),
}
# Fields of backbones of many families; a list holds such numbers. All whole numbers are held to the last row.
BACKBONE_BOUNDS: dict[str, tuple[float, float, str]] = {
    "num_channels": (3, 3, "images have three channels"),
    **dict.fromkeys(("embedding_size", "hidden_size", "hidden_sizes", "embed_dim", "width"), (1, 32768, _WIDTH)),
    **dict.fromkeys(("depths", "depth", "num_hidden_layers", "num_layers"), (1, 512, _DEPTH)),
    **dict.fromkeys(("num_attention_heads", "num_heads", "patch_size"), (1, 1024, _WIDTH)),
    "": (-(1 << 24), 1 << 24, "no width, depth or size of a backbone is that large"),
}
# Lists and names of a configuration.
MOST_CLASSES = 4096
MOST_ATTRIBUTES = 256
LONGEST_NAME = 1000
MOST_ENTRIES = 1024

# Fields that older checkpoints and adapters saved one by one: where they are now -> old name -> key there.
OLD_FIELDS = {
    "trained": {
        "trained_tasks": "tasks",
        "detection_thresholds": "detection_thresholds",
        "segmentation_threshold": "segmentation_threshold",
        "segmentation_label": "segmentation_label",
    },
    "loss_weights": {
        "class_loss_coefficient": "class",
        "bbox_loss_coefficient": "bbox",
        "giou_loss_coefficient": "giou",
        "morphology_loss_coefficient": "morphology",
        "dice_loss_coefficient": "dice",
        "focal_loss_coefficient": "focal",
    },
    "matching_weights": {"class_cost": "class", "bbox_cost": "bbox", "giou_cost": "giou"},
}


def take_old_fields(part: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Takes out of `fields` what older checkpoints and adapters saved one by one.

    Args:
        part (`str`): The field that holds them now: a key of [`OLD_FIELDS`].
        fields (`dict[str, Any]`): What was saved; changed in place.

    Returns:
        `dict[str, Any]`: Their values, by the keys of `part`.
    """
    return {key: fields.pop(name) for name, key in OLD_FIELDS[part].items() if name in fields}


def ancestors(name: str, parents: Mapping[str, str]) -> list[str]:
    """The coarser classes of a class, the closest first.

    Args:
        name (`str`): The class.
        parents (`Mapping[str, str]`): Class -> coarser class.
    """
    found: list[str] = []
    while (parent := parents.get(name)) is not None and parent not in found:
        found.append(parent)
        name = parent
    return found


def _check_bounds(part: str, fields: Mapping[str, Any], bounds: Mapping[str, tuple[float, float, str]]) -> None:
    for name, (least, most, why) in bounds.items():
        if fields.get(name) is not None:
            _in_bounds(f"{part}.{name}" if part else name, fields[name], least, most, why)


def _no_foreign_kernels(fields: Mapping[str, Any]) -> None:
    """A saved configuration must not name attention of a repository: loading it would run code from there."""
    parts = [fields, *(fields.get(name) for name in ("backbone_config", "text_config"))]
    for part in parts:
        for name, value in part.items() if isinstance(part, Mapping) else ():
            if "_implementation" in str(name) and "/" in str(value):
                raise InputError(
                    f"config.json: {str(name)[:40]} is {str(value)[:40]!r}; only built-in ones may be saved."
                )


def _check_backbone(fields: Mapping[str, Any]) -> None:
    for name, value in fields.items():
        if name in ("id2label", "label2id", "out_features", "stage_names"):
            if isinstance(value, (dict, list)) and len(value) > 1 << 16:
                raise InputError(f"backbone_config.{name[:40]} has {len(value)} entries.")
            continue
        _in_bounds(f"backbone_config.{str(name)[:40]}", value, *BACKBONE_BOUNDS.get(name, BACKBONE_BOUNDS[""]))
    # timm would fetch these from elsewhere.
    source = fields.get("backbone")
    if isinstance(source, str) and not re.fullmatch(r"[\w.-]+", source):
        raise InputError(f"backbone_config.backbone is {source[:40]!r} and must be the name of an architecture.")


@strict
@dataclasses.dataclass
class TrainingResults:
    """Results of training and calibration, which [`UniHemaConfig`] stores in `trained`.

    Args:
        tasks (`list[str]`, *optional*): Tasks the checkpoint was trained on; all of them when not given.
        detection_thresholds (`dict[str, float]`): Calibrated operating threshold of each detection class.
        unfound_classes (`list[str]`): Detection classes that were not found once on validation data that has them. They are
            answered only where a prompt names them: without one "none" would be taken for an answer.
        segmentation_threshold (`float`): Probability above which a pixel belongs to the mask.
        segmentation_label (`str`): What the default segmentation prompt names.
        mask_prompts (`list[str]`, *optional*): All that masks were learned of; the nuclei of white cells are asked for where
            `"nucleus"` is among them.
        red_cell_diameter (`list[float]`, *optional*): Diameter of red cells in pixels of the model's input for detection: 5 %,
            50 % and 95 % of the training fields have a median below. By it an image is seen at the scale of the training.
        cell_masks (`bool`): Whether the mask finder was trained on masks of single cells, so that detection gives each cell one.
        cell_mask_sides (`list[float]`, *optional*): Longer side of the cells whose masks were learned, as a share of the image's:
            1 % and 99 %. Much larger and much smaller cells get no mask; all get one when not given.
        calibration (`dict[str, dict]`): Head (`detection`, `single_cell`) -> what its scores mean, fitted on validation data:
            `slope`, `shift` and the `shifts` of classes of a logistic curve; `ece`, its calibration error, and `cells`, how many;
            `typed_from`, the probability from which a share `precision` of the types of white cells is right, the share
            `reached`, and the `coverage` that is kept.
        crop_frame (`dict[str, list[float]]`, *optional*): Crops of nucleated cells in the training: `nucleus` (side of a
            nucleus's box, as a part of the crop's), `mean` and `deviation` of red, green and blue, 0..255. By it a crop of
            another microscope is framed and coloured before it is classified.
        second_look (`dict[str, float]`, *optional*): How the type that detection gives a cell and that of its crop are put
            together: `weight` of the crop (0 to 1), `detection_temperature` and `crop_temperature`.
        parasites (`dict[str, float]`, *optional*): How infected red cells are told from their crops: `threshold`, the
            probability from which one is called infected; `recall` and `precision`, the shares of infected cells that are
            found and of cells called infected that are, on the data that it was fitted on; `false_positives`, the upper end
            of the 95 % interval of the share of the red cells of healthy people that are called infected.
    """

    tasks: list[str] | None = None
    detection_thresholds: dict[str, float | int] = dataclasses.field(default_factory=dict)
    unfound_classes: list[str] = dataclasses.field(default_factory=list)
    segmentation_threshold: float | int = 0.5
    segmentation_label: str = "white blood cell"
    mask_prompts: list[str] | None = None
    red_cell_diameter: list[float | int] | None = None
    cell_masks: bool = False
    cell_mask_sides: list[float | int] | None = None
    calibration: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    crop_frame: dict[str, list[float | int]] | None = None
    second_look: dict[str, float | int] | None = None
    parasites: dict[str, float | int] | None = None


# Of a crop's frame: how many numbers each part has, and between what they lie.
_CROP_FRAME = {"nucleus": (1, 0.01, 1), "mean": (3, 0, 255), "deviation": (3, 0, 255)}
_PARASITES = ("threshold", "recall", "precision", "false_positives")
_SECOND_LOOK = {"weight": (0, 1), "detection_temperature": (0.01, 100), "crop_temperature": (0.01, 100)}


def _in_bounds(part: str, value: Any, least: float, most: float, why: str) -> None:
    """Checks a number, or each number of a list.

    Raises:
        InputError: It is none, or outside; the message names the field.
    """
    if isinstance(value, (list, tuple)):
        if len(value) > MOST_ENTRIES:
            raise InputError(f"{part} has {len(value)} entries; at most {MOST_ENTRIES} are allowed.")
        for each in value:
            _in_bounds(part, each, least, most, why)
    elif isinstance(value, (int, float)) and not isinstance(value, bool) and not least <= value <= most:
        shown = f"{value:g}" if abs(value) < 1e300 else "too large a number"
        allowed = f"be {least:g}" if least == most else f"lie in {least:g}..{most:g}"
        raise InputError(f"{part} is {shown} and must {allowed}: {why}.")


def _number(key: Any) -> Any:
    """A class's number that is written as text."""
    return int(key) if isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) < 10 else key


def _checked_calibration(calibration: Mapping[str, Any]) -> None:
    share = (0, 1, "it is a share")
    bounds = dict.fromkeys(("ece", "typed_from", "precision", "reached", "coverage"), share)
    bounds |= {"cells": (0, 1e12, "it is a number of cells"), "slope": (0, 100, "a higher score never means less")}
    bounds |= {"shift": (-100, 100, "probabilities beyond are 0 or 1")}
    for head, fitted in calibration.items():
        part = f"trained.calibration of '{str(head)[:40]}'"
        shifts = fitted.get("shifts") if isinstance(fitted, dict) else None
        if (
            head not in ("detection", "single_cell")
            or not isinstance(shifts, dict)
            or not {"slope", "shift"} <= set(fitted)
        ):
            raise InputError(f"{part}: detection and single_cell have one, each with slope, shift and shifts.")
        _checked_names(part, list(shifts), least=0)
        told = {name: value for name, value in fitted.items() if name != "shifts"}
        for name, value in [*told.items(), *(("shift", value) for value in shifts.values())]:
            if name not in bounds or isinstance(value, bool) or not isinstance(value, (int, float)):
                raise InputError(f"{part}: {str(name)[:40]!r} is unknown, or no number.")
            _in_bounds(part, value, *bounds[name])


def _checked_names(part: str, names: Any, most: int = MOST_CLASSES, least: int = 1) -> None:
    if not least <= len(names) <= most:
        raise InputError(f"{part} has {len(names)} names; {least} to {most} are allowed.")
    for name in names:
        if not isinstance(name, str) or not 0 < len(name) <= LONGEST_NAME:
            raise InputError(f"{part}: a name is a text of 1 to {LONGEST_NAME} characters, not {str(name)[:40]!r}.")
        # Names are written to terminals, tables and JSON.
        if re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", name):
            raise InputError(f"{part}: the name {name[:40]!r} has control characters.")


def _with_defaults(field: str, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    unknown = [key for key in given if key not in defaults]
    if unknown:
        raise InputError(f"{field}: unknown key {str(unknown[0])[:40]!r}; there are {', '.join(defaults)}.")
    return {**defaults, **given}


def _naming_errors(function: Callable) -> Callable:
    """What Transformers and huggingface_hub raise at values of other types, which is anything, as an `InputError`."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except InputError:
            raise
        except Exception as error:
            said = " ".join(str(error).split())[:400]
            raise InputError(f"no configuration of UniHema: {said or type(error).__name__}") from error

    return call


def _with_named_errors(cls: type) -> type:
    cls.__init__ = _naming_errors(cls.__init__)
    # Models are checked by it when they are built.
    cls.validate = _naming_errors(cls.validate)
    return cls


@_with_named_errors
@strict
class UniHemaConfig(SavedWithCode, PreTrainedConfig):
    r"""Configuration of every UniHema model (Uni-Hema, arXiv 2511.13889).

    The defaults are the paper's model; [`UniHemaConfig.tiny`] is the preset for machines without a GPU. `id2label`,
    `label2id` and `num_labels` name the *detection* classes; single-cell classes are `single_cell_labels`.

    Args:
        backbone_config (`PreTrainedConfig` or `dict`, *optional*):
            Any `AutoBackbone` configuration (timm included) that returns at least one feature map. ResNet-50 with
            C3, C4 and C5 when not given.
        text_config (`PreTrainedConfig` or `dict`, *optional*):
            T5 of any size. flan-T5-base when not given.
        is_encoder_decoder (`bool`): Always `True`: answers are generated by a text decoder.
        tie_word_embeddings (`bool`): Share the output layer of the text decoder with its embedding, and rescale the
            decoder's states as T5 v1.0 does. `False` is flan-T5.
        d_model (`int`): Width of the visual transformer.
        num_feature_levels (`int`): Feature levels of the encoder; levels beyond the backbone's come from
            stride-2 convolutions on its last map.
        encoder_layers (`int`): Deformable encoder layers.
        decoder_layers (`int`): Deformable decoder layers.
        num_attention_heads (`int`): Heads of every visual attention.
        encoder_ffn_dim (`int`): Feed-forward width of the encoder.
        decoder_ffn_dim (`int`): Feed-forward width of the decoder.
        num_sampling_points (`int`): Deformable sampling points per head and level.
        dropout (`float`): Dropout of the visual transformer.
        single_cell_dropout (`float`): Dropout of the single-cell classifier.
        num_queries (`int`): Proposals selected for the decoder, so at most this many cells a field.
        position_temperature (`float`): Temperature of the sine position maps.
        freeze_backbone_norm (`bool`): Keep the backbone's BatchNorm statistics and affine parameters fixed, which a
            pretrained backbone with small batches wants. A backbone trained from scratch needs `False`.
        cross_modal_fusion (`bool`): Whether what the text decoder attends to has seen the image. `False` is the paper's
            ablation E_W = E_T: answers are of the text alone.
        fusion_order (`"text_image"` or `"image_text"`): What the CrossModalFusion queries attend to first: the paper's
            order, or that of the official weights.
        fusion_queries (`int`): Learned queries of CrossModalFusion, and so the longest text.
        fusion_layers (`int`): CrossModalFusion blocks.
        fusion_ffn_dim (`int`): Feed-forward width of CrossModalFusion.
        attend_to_padding (`bool`): Let padded text and pixels take part (in convolutions, norms, CrossModalFusion,
            TextGuidedVisualRefinement and SingleCellFeatureExtraction), and stretch masks to the input, as the official
            weights do. An image then gives other results in a padded batch than alone.
        text_guided_refinement (`bool`): Whether the prompt refines the content queries. Without it detection and
            segmentation read no text, and find whatever they were trained to find.
        refinement (`"gated"` or `"concat"`): TextGuidedVisualRefinement of the official weights, or the paper's formula.
        scfe_backbone_features (`bool`): Add the pooled backbone level to the single-cell feature (the paper's ablation).
        upsampler (`"bilinear"` or `"learnable"`): How mask logits get from stride 8 to the image's size.
        label_parents (`dict[str, str]`, *optional*): Detection class -> the coarser class that its cells belong to as
            well, such as neutrophil -> WBC. Classes that are not in `id2label` may stand in between.
        single_cell_labels (`list[str]`): Classes of the single-cell head.
        single_cell_parents (`dict[str, str]`, *optional*): Single-cell class or group -> the group that it belongs to, such as
            neutrophil -> WBC. A group is a name that is no class: it is as probable as its classes together, and a crop may be
            labelled with it. Without groups each class stands for itself.
        morphology (`dict[str, list[str]]`): Attributes read off each cell, each with its values, in the order of labels
            and logits. `config.json` sorts the keys of dictionaries, so there it is a list of `name` and `values`.
        default_prompt_ids (`dict[str, list[int]]`): Token ids of the prompt a task uses when called without text.
        trained ([`TrainingResults`] or `dict`, *optional*): Results of training and calibration: trained tasks, thresholds
            and the mask's label. Keys left out of a dictionary have their defaults.
        official_losses (`bool`): Train with the losses of the official code: an asymmetric loss instead of softmax over
            each attribute's values, and one Dice loss over all pixels of a batch instead of one an image.
        auxiliary_loss (`bool`): Losses on every decoder layer, not only the last.
        loss_weights (`dict[str, float]`, *optional*): Weight of each loss: `class`, `bbox`, `giou`, `morphology`, `mask_bce`
            and `mask_dice` of detection, `dice` and `focal` of segmentation. Weights left out have their defaults.
        matching_weights (`dict[str, float]`, *optional*): Weights of the cost by which queries are matched to cells:
            `class`, `bbox` and `giou`. Weights left out have their defaults.
        focal_alpha (`float`): Weight of positives in the focal loss of detection classes and in the matching cost;
            negatives weigh `1 - focal_alpha`.
        denoising_queries (`int`): Denoising queries aimed at in training; 0 switches denoising off.
        label_noise_ratio (`float`): Twice the probability that a denoising query's class is replaced.
        box_noise_scale (`float`): Size of the box noise, relative to half the box.
        pad_token_id (`int`): Token that fills up texts.
        bos_token_id (`int`): Token that starts a text; T5 starts with padding.
        eos_token_id (`int`): Token that ends a text.
        decoder_start_token_id (`int`): Token that an answer is generated from.
        use_cache (`bool`): Keep keys and values of earlier tokens while an answer is generated.

    Example:

    ```python
    >>> from unihema import UniHemaConfig, UniHemaForDetection

    >>> config = UniHemaConfig.tiny(id2label={0: "red blood cell", 1: "platelet"})
    >>> model = UniHemaForDetection(config)
    ```
    """

    model_type = "unihema"
    # What the predictions of Transformers' Trainer leave out: those of single cells are then the logits alone.
    keys_to_ignore_at_inference = ["past_key_values", "cache", "features"]
    attribute_map = {
        "hidden_size": "d_model",
        "num_hidden_layers": "encoder_layers",
        "max_text_length": "fusion_queries",
    }
    sub_configs = {"backbone_config": AutoConfig, "text_config": AutoConfig}

    backbone_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    is_encoder_decoder: bool = True
    tie_word_embeddings: bool = False

    d_model: int = 256
    num_feature_levels: int = 4
    encoder_layers: int = 6
    decoder_layers: int = 6
    num_attention_heads: int = 8
    encoder_ffn_dim: int = 2048
    decoder_ffn_dim: int = 2048
    num_sampling_points: int = 4
    dropout: float | int = 0.0
    single_cell_dropout: float | int = 0.1
    num_queries: int = 900
    position_temperature: float | int = 20
    freeze_backbone_norm: bool = True

    cross_modal_fusion: bool = True
    fusion_order: Literal["text_image", "image_text"] = "text_image"
    fusion_queries: int = 64
    fusion_layers: int = 2
    fusion_ffn_dim: int = 1024
    attend_to_padding: bool = False
    text_guided_refinement: bool = True
    refinement: Literal["gated", "concat"] = "gated"
    scfe_backbone_features: bool = False
    upsampler: Literal["bilinear", "learnable"] = "learnable"

    label_parents: dict[str, str] | None = None
    single_cell_labels: list[str] | None = None
    single_cell_parents: dict[str, str] | None = None
    morphology: dict[str, list[str]] | list[dict[str, Any]] | None = None
    default_prompt_ids: dict[str, list[int]] | None = None
    trained: TrainingResults | dict[str, Any] | None = None

    official_losses: bool = False
    auxiliary_loss: bool = True
    loss_weights: dict[str, float | int] | None = None
    matching_weights: dict[str, float | int] | None = None
    focal_alpha: float = 0.25
    denoising_queries: int = 100
    label_noise_ratio: float = 0.5
    box_noise_scale: float = 0.4

    pad_token_id: int | None = 0
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    decoder_start_token_id: int | None = 0
    use_cache: bool = True

    def __post_init__(self, **kwargs: Any):
        if isinstance(self.backbone_config, Mapping):
            _check_backbone(dict(self.backbone_config))
        self.backbone_config, kwargs = consolidate_backbone_kwargs_to_config(
            backbone_config=self.backbone_config,
            default_config_type="resnet",
            default_config_kwargs={"out_features": ["stage2", "stage3", "stage4"]},
            **kwargs,
        )
        if not isinstance(self.text_config, PreTrainedConfig):
            given = dict(self.text_config or FLAN_T5_BASE)
            kind = given.pop("model_type", "t5")
            if kind not in TEXT_MODELS:
                raise InputError(
                    f"text_config.model_type is {str(kind)[:40]!r} and must be {' or '.join(TEXT_MODELS)}."
                )
            _check_bounds("text_config", given, TEXT_BOUNDS)
            self.text_config = CONFIG_MAPPING[kind](**given)
        if isinstance(kwargs.get("num_labels"), int):
            _in_bounds("num_labels", kwargs["num_labels"], 1, MOST_CLASSES, "every class is an output of the head")
        if not {"id2label", "label2id", "num_labels"} & kwargs.keys() and getattr(self, "id2label", None) is None:
            kwargs["id2label"] = dict(enumerate(SMEAR_CLASSES))
        if self.single_cell_labels is None:
            self.single_cell_labels = list(SMEAR_CLASSES)
        self.morphology = self._ordered_morphology(kwargs.pop("morphology_order", None))
        self.default_prompt_ids = self.default_prompt_ids or {}
        self._read_nested_fields(kwargs)
        super().__post_init__(**kwargs)
        if self.id2label is not None and set((self.label2id or {}).values()) != set(self.id2label):
            self.label2id = {name: index for index, name in self.id2label.items()}

    def _ordered_morphology(self, order: list[str] | None) -> dict[str, list[str]]:
        """Attributes as a dictionary; `order` is what older checkpoints saved beside a sorted one."""
        given = self.morphology
        if given is None:
            return {name: list(values) for name, values in PAPER_MORPHOLOGY.items()}
        if isinstance(given, list):
            for attribute in given:
                if not isinstance(attribute, dict) or not {"name", "values"} <= attribute.keys():
                    raise InputError(f"morphology: each attribute has a name and values, not {str(attribute)[:40]!r}.")
            if len({str(attribute["name"]) for attribute in given}) < len(given):
                raise InputError("morphology names an attribute twice.")
            return {attribute["name"]: attribute["values"] for attribute in given}
        if order is not None and set(order) == set(given):
            return {name: given[name] for name in order}
        return given

    def _read_nested_fields(self, others: dict[str, Any]) -> None:
        """Fills up `trained` and the weights; older checkpoints have their values among `others`."""
        old = {part: take_old_fields(part, others) for part in OLD_FIELDS}
        if not isinstance(self.trained, TrainingResults):
            given = {**old["trained"], **(self.trained or {})}
            self.trained = TrainingResults(**_with_defaults("trained", given, dataclasses.asdict(TrainingResults())))
        for field, defaults in (("loss_weights", LOSS_WEIGHTS), ("matching_weights", MATCHING_WEIGHTS)):
            given = {**old[field], **(getattr(self, field) or {})}
            setattr(self, field, _with_defaults(field, given, defaults))
        old_losses = {others.pop("morphology_loss", None), others.pop("dice_over", None)}
        self.official_losses = self.official_losses or not old_losses.isdisjoint(("asymmetric", "batch"))
        others.pop("init_std", None)

    def validate_architecture(self) -> None:
        """Checks that every number is possible and that they fit together; called by `@strict` after construction, and
        by every model before it is built.

        Raises:
            ValueError: A field is out of its bounds ([`BOUNDS`]), the width does not divide into heads or sine halves, a
                morphology attribute has fewer than two values, a class is its own ancestor, a token is not in the
                vocabulary, or there are fewer feature levels than the backbone gives.
        """
        _check_bounds("", vars(self), BOUNDS)
        _check_bounds("text_config", self.text_config.to_dict(), TEXT_BOUNDS)
        _check_backbone(self.backbone_config.to_dict())
        self._check_names()
        self._check_tokens()
        if self.d_model % self.num_attention_heads or self.d_model % 4:
            raise InputError(
                f"d_model={self.d_model} must be a multiple of 4 and of num_attention_heads={self.num_attention_heads}."
            )
        for name, values in (self.morphology or {}).items():
            if len(values) < 2:
                raise InputError(f"Morphology attribute '{name}' needs at least two values, got {values}.")
        for part in ("label_parents", "single_cell_parents"):
            parents = getattr(self, part) or {}
            for name in parents:
                if name in ancestors(name, parents):
                    raise InputError(f"{part} makes '{name}' its own ancestor: {parents}.")
        backbone_levels = len(getattr(self.backbone_config, "out_indices", None) or [None])
        if self.num_feature_levels < backbone_levels:
            raise InputError(
                f"num_feature_levels={self.num_feature_levels} is less than the {backbone_levels} maps of the backbone; "
                "name fewer in backbone_config.out_features."
            )

    def _check_names(self) -> None:
        names = self.id2label or {}
        if sorted(names) != list(range(len(names))):
            raise InputError(
                f"id2label numbers its {len(names)} classes from 0 without gaps, not as {str(names)[:80]}."
            )
        for part, listed in (("id2label", list(names.values())), ("single_cell_labels", self.single_cell_labels)):
            _checked_names(part, listed)
            twice = (
                next((name for name in listed if listed.count(name) > 1), None)
                if len(set(listed)) < len(listed)
                else None
            )
            if twice is not None:
                raise InputError(f"{part} has '{twice[:40]}' twice: results could not tell the two classes apart.")
        _checked_names("morphology", list(self.morphology), MOST_ATTRIBUTES, least=0)
        for attribute, values in self.morphology.items():
            if isinstance(values, str):
                raise InputError(f"morphology: '{attribute}' needs a list of values, not {values[:40]!r}.")
            _checked_names(f"morphology: '{attribute}'", values, MOST_ATTRIBUTES, least=0)
        for part in ("label_parents", "single_cell_parents"):
            if parents := getattr(self, part):
                _checked_names(part, [*parents, *parents.values()], 2 * MOST_CLASSES)
        thresholds = {
            "segmentation_threshold": self.trained.segmentation_threshold,
            **self.trained.detection_thresholds,
        }
        for name, threshold in thresholds.items():
            _in_bounds(f"trained: the threshold of '{name[:40]}'", threshold, 0, 1, "it is compared with a score")
        _checked_calibration(self.trained.calibration)
        diameters = self.trained.red_cell_diameter
        if diameters is not None:
            _in_bounds("trained.red_cell_diameter", diameters, 1, 1e4, "it is a size in pixels")
            if len(diameters) != 3 or sorted(diameters) != list(diameters):
                raise InputError(f"trained.red_cell_diameter is {diameters} and must be three sizes, ascending.")
        sides = self.trained.cell_mask_sides
        if sides is not None:
            _in_bounds("trained.cell_mask_sides", sides, 0, 1, "it is a share of an image's side")
            if len(sides) != 2 or sides[0] > sides[1]:
                raise InputError(f"trained.cell_mask_sides is {sides} and must be two shares, ascending.")
        for part, known in (("crop_frame", _CROP_FRAME), ("second_look", _SECOND_LOOK), ("parasites", _PARASITES)):
            stored = getattr(self.trained, part)
            if stored is not None and stored.keys() != set(known):
                raise InputError(
                    f"trained.{part} has {', '.join(map(str, stored))[:80]} and must have {', '.join(known)}."
                )
        for name, values in (self.trained.crop_frame or {}).items():
            count, least, most = _CROP_FRAME[name]
            _in_bounds(f"trained.crop_frame.{name}", values, least, most, "it is of a crop")
            if len(values) != count:
                raise InputError(f"trained.crop_frame.{name} has {len(values)} numbers and must have {count}.")
        for name, value in (self.trained.second_look or {}).items():
            _in_bounds(f"trained.second_look.{name}", value, *_SECOND_LOOK[name], "it weighs two opinions")
        for name, value in (self.trained.parasites or {}).items():
            _in_bounds(f"trained.parasites.{name}", value, 0, 1, "it is a share")
        for part in ("loss_weights", "matching_weights"):
            for name, weight in getattr(self, part).items():
                _in_bounds(f"{part}.{name}", weight, 0, 1e4, _WEIGHT)

    def _check_tokens(self) -> None:
        buckets, farthest = (
            getattr(self.text_config, f"relative_attention_{it}") for it in ("num_buckets", "max_distance")
        )
        if farthest <= buckets // 2:
            raise InputError(
                f"text_config.relative_attention_max_distance={farthest} must be more than half of "
                f"relative_attention_num_buckets={buckets}."
            )
        vocabulary = self.text_config.vocab_size
        tokens = [(name, getattr(self, name)) for name in ("pad_token_id", "eos_token_id", "decoder_start_token_id")]
        tokens += [(f"default_prompt_ids of {task[:40]}", ids) for task, ids in self.default_prompt_ids.items()]
        for name, ids in tokens:
            most = vocabulary - 1
            listed = ids if isinstance(ids, list) else [ids]
            for each in listed:
                _in_bounds(name, each, 0, most, f"text_config.vocab_size is {vocabulary}")

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The T5 configuration; for the decoder one that counts the decoder's layers, as caches are sized by it.

        Args:
            decoder (`bool`, *optional*): What the decoder is made of.
            encoder (`bool`, *optional*): What the encoder is made of.
        """
        layers = getattr(self.text_config, "num_decoder_layers", None)
        if not decoder or layers in (None, self.text_config.num_layers):
            return self.text_config
        decoder_config = copy.deepcopy(self.text_config)
        decoder_config.num_layers = layers
        return decoder_config

    @classmethod
    @_naming_errors
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> "UniHemaConfig":
        """Reads a saved configuration, as [`~PreTrainedConfig.from_dict`] does.

        `id2label` and `num_labels` given here, which is where `from_pretrained` of a model brings them, name the classes
        of the model that is loaded: the detection classes, and those of a `UniHemaForImageClassification`. Of `trained`,
        `loss_weights` and `matching_weights` the keys given here change, and the others stay as saved.

        Args:
            config_dict (`dict[str, Any]`): What was saved.
            **kwargs: Fields to change. The numbers of `id2label` and `label2id` may be text, as in Transformers' examples.

        Raises:
            InputError: A field of another type, out of its bounds, or that does not fit the others; `num_labels`, `id2label` and
                `label2id` that contradict each other.
        """
        _no_foreign_kernels(config_dict)
        names, count = kwargs.get("id2label"), kwargs.get("num_labels")
        if isinstance(names, Mapping):
            kwargs["id2label"] = names = {_number(key): name for key, name in names.items()}
            if count not in (None, len(names)):
                raise InputError(f"num_labels={count}, but id2label has {len(names)} names.")
            back = {name: _number(index) for name, index in (kwargs.get("label2id") or {}).items()}
            if back and back != {name: index for index, name in names.items()}:
                raise InputError(f"label2id {str(back)[:80]} is not the reverse of id2label {str(names)[:80]}.")
        if "transformers_version" in config_dict and not {"id2label", "num_labels"} & config_dict.keys():
            # Older checkpoints with LABEL_0 and LABEL_1, Transformers' default, were saved without their classes.
            config_dict = {**config_dict, "num_labels": 2}
        for part in OLD_FIELDS:
            if isinstance(kwargs.get(part), dict):
                config_dict = {**config_dict, part: {**(config_dict.get(part) or {}), **kwargs.pop(part)}}
        made = super().from_dict(config_dict, **kwargs)
        config = made[0] if isinstance(made, tuple) else made
        if names is not None:
            config.label2id = {name: index for index, name in config.id2label.items()}
            config.labels_when_loading = config.class_names
        elif count is not None:
            config.labels_when_loading = [f"LABEL_{index}" for index in range(count)]
        return made

    def to_dict(self) -> dict[str, Any]:
        """What is saved."""
        fields = super().to_dict()
        fields.pop("labels_when_loading", None)
        fields["trained"] = dataclasses.asdict(self.trained)
        # config.json is written with sorted keys, which would lose the order of the attributes.
        fields["morphology"] = [{"name": name, "values": values} for name, values in self.morphology.items()]
        return fields

    def to_diff_dict(self) -> dict[str, Any]:
        """What is written to `config.json`: what differs from the defaults, and the classes always."""
        # Two classes called LABEL_0 and LABEL_1 are Transformers' default, but not ours.
        return {**super().to_diff_dict(), "id2label": self.id2label, "label2id": self.label2id}

    @property
    def class_names(self) -> list[str]:
        """The detection classes, in the order of their ids."""
        return [name for _, name in sorted(self.id2label.items())]

    @property
    def class_parents(self) -> dict[str, str]:
        """The coarser class of each class of fields and of crops; where their two trees differ, that of fields."""
        return {**(self.single_cell_parents or {}), **(self.label_parents or {})}

    @property
    def ancestor_matrix(self) -> list[list[bool]] | None:
        """For each pair of detection classes whether the second is coarser than the first, by `label_parents`; `None` where
        no class is coarser than another."""
        names = self.class_names
        if not self.label_parents:
            return None
        coarser = [set(ancestors(name, self.label_parents)) for name in names]
        matrix = [[other in own for other in names] for own in coarser]
        return matrix if any(map(any, matrix)) else None

    @property
    def single_cell_names(self) -> list[str]:
        """What the crop of a single cell may be labelled: the classes, then the groups of `single_cell_parents` that have any."""
        parents = self.single_cell_parents or {}
        groups = {group for name in self.single_cell_labels for group in ancestors(name, parents)}
        return [*self.single_cell_labels, *sorted(groups.difference(self.single_cell_labels))]

    @property
    def single_cell_members(self) -> list[list[bool]]:
        """For each of `single_cell_names` which classes it is made of: a class of itself and those that are kinds of it."""
        parents = self.single_cell_parents or {}
        lines = [{name, *ancestors(name, parents)} for name in self.single_cell_labels]
        return [[name in line for line in lines] for name in self.single_cell_names]

    def class_thresholds(self, threshold: float | None = None) -> list[float]:
        """The smallest detection score that counts, for each class.

        Args:
            threshold (`float`, *optional*): For all classes, instead of the calibrated one of each.
        """
        if threshold is not None:
            return [threshold] * self.num_labels
        return [self.trained.detection_thresholds.get(name, DEFAULT_THRESHOLD) for name in self.class_names]

    @property
    def morphology_sizes(self) -> list[int]:
        """Number of values of each attribute, in the order of `morphology`."""
        return [len(values) for values in self.morphology.values()]

    @property
    def output_head_is_scaled(self) -> bool:
        """Whether the text decoder's states are divided by sqrt(width) before the output layer, as T5 v1.0 does."""
        return self.tie_word_embeddings

    @classmethod
    def base(cls, **overrides: Any) -> "UniHemaConfig":
        """The paper's model: ResNet-50, width 256, 6+6 layers, 900 queries, flan-T5-base (302 M parameters).

        Args:
            **overrides: Any field of the configuration.
        """
        return cls(**overrides)

    @classmethod
    def tiny(cls, **overrides: Any) -> "UniHemaConfig":
        """About 10 M parameters: trains and runs on two CPU cores.

        Args:
            **overrides: Any field of the configuration.
        """
        preset = {
            "backbone_config": {
                "model_type": "resnet",
                "layer_type": "basic",
                "embedding_size": 48,
                "hidden_sizes": [48, 96, 192, 384],
                "depths": [2, 2, 2, 2],
                "out_features": ["stage2", "stage3", "stage4"],
            },
            "text_config": {
                "model_type": "t5",
                "vocab_size": 1536,
                "d_model": 192,
                "d_kv": 48,
                "d_ff": 384,
                "num_layers": 2,
                "num_heads": 4,
                "feed_forward_proj": "gated-gelu",
                "dropout_rate": 0.0,
            },
            "d_model": 128,
            "num_attention_heads": 4,
            "encoder_layers": 1,
            "decoder_layers": 3,
            "encoder_ffn_dim": 512,
            "decoder_ffn_dim": 512,
            "fusion_ffn_dim": 256,
            "num_queries": 200,
            "freeze_backbone_norm": False,
            "denoising_queries": 60,
        }
        return cls(**{**preset, **overrides})


__all__ = ["TrainingResults", "UniHemaConfig"]
