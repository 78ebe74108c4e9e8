"""UniHema model configuration."""

import copy
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.backbone_utils import consolidate_backbone_kwargs_to_config
from transformers.configuration_utils import PreTrainedConfig

from unihema.errors import InputError

from .remote_code import SavedWithCode


# Smallest detection score of a class whose threshold was never calibrated.
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

SMEAR_CLASSES = [
    "red blood cell",
    "platelet",
    "neutrophil",
    "lymphocyte",
    "monocyte",
    "eosinophil",
    "basophil",
]


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
        tie_word_embeddings (`bool`): Share the output layer of the text decoder with its embedding, and rescale the
            decoder's states as T5 v1.0 does. `False` is flan-T5.
        label_parents (`dict[str, str]`, *optional*): Detection class -> the coarser class that its cells belong to as
            well, such as neutrophil -> WBC. Classes that are not in `id2label` may stand in between.
        single_cell_labels (`list[str]`): Classes of the single-cell head.
        morphology (`dict[str, list[str]]`): Attributes read off each cell, each with its values.
        morphology_order (`list[str]`, *optional*): Order of the attributes in labels and logits; that of `morphology`
            when not given.
        default_prompt_ids (`dict[str, list[int]]`): Token ids of the prompt a task uses when called without text.
        trained_tasks (`list[str]`, *optional*): Tasks the checkpoint was trained on; all of them when not given.
        detection_thresholds (`dict[str, float]`): Calibrated operating threshold of each detection class.
        segmentation_threshold (`float`): Probability above which a pixel belongs to the mask.
        segmentation_label (`str`): What the default segmentation prompt names.
        morphology_loss (`"cross_entropy"` or `"asymmetric"`): Softmax over each attribute's values, or the official
            code's asymmetric loss.
        dice_over (`"image"` or `"batch"`): Pixels that one Dice loss looks at; the official code takes the batch.
        auxiliary_loss (`bool`): Losses on every decoder layer, not only the last.
        denoising_queries (`int`): Denoising queries aimed at in training; 0 switches denoising off.
        label_noise_ratio (`float`): Twice the probability that a denoising query's class is replaced.
        box_noise_scale (`float`): Size of the box noise, relative to half the box.
        init_std (`float`): Standard deviation of the normal initialisation.

    Example:

    ```python
    >>> from unihema import UniHemaConfig, UniHemaForDetection

    >>> config = UniHemaConfig.tiny(id2label={0: "red blood cell", 1: "platelet"})
    >>> model = UniHemaForDetection(config)
    ```
    """

    model_type = "unihema"
    # Classes given while loading.
    given_labels = None
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
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
    morphology: dict[str, list[str]] | None = None
    morphology_order: list[str] | None = None
    default_prompt_ids: dict[str, list[int]] | None = None
    trained_tasks: list[str] | None = None
    detection_thresholds: dict[str, float] | None = None
    segmentation_threshold: float = 0.5
    segmentation_label: str = "white blood cell"

    morphology_loss: Literal["cross_entropy", "asymmetric"] = "cross_entropy"
    dice_over: Literal["image", "batch"] = "image"
    auxiliary_loss: bool = True
    class_cost: float | int = 2
    bbox_cost: float | int = 5
    giou_cost: float | int = 2
    focal_alpha: float = 0.25
    class_loss_coefficient: float | int = 1
    bbox_loss_coefficient: float | int = 5
    giou_loss_coefficient: float | int = 2
    morphology_loss_coefficient: float | int = 2
    dice_loss_coefficient: float | int = 2
    focal_loss_coefficient: float | int = 1
    denoising_queries: int = 100
    label_noise_ratio: float = 0.5
    box_noise_scale: float = 0.4

    init_std: float = 0.02
    pad_token_id: int | None = 0
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    decoder_start_token_id: int | None = 0
    use_cache: bool = True

    def __post_init__(self, **kwargs: Any):
        self.backbone_config, kwargs = consolidate_backbone_kwargs_to_config(
            backbone_config=self.backbone_config,
            default_config_type="resnet",
            default_config_kwargs={"out_features": ["stage2", "stage3", "stage4"]},
            **kwargs,
        )
        if not isinstance(self.text_config, PreTrainedConfig):
            given = dict(self.text_config or FLAN_T5_BASE)
            self.text_config = CONFIG_MAPPING[given.pop("model_type", "t5")](**given)
        if not {"id2label", "label2id", "num_labels"} & kwargs.keys() and getattr(self, "id2label", None) is None:
            kwargs["id2label"] = dict(enumerate(SMEAR_CLASSES))
        if self.single_cell_labels is None:
            self.single_cell_labels = list(SMEAR_CLASSES)
        if self.morphology is None:
            self.morphology = {name: list(values) for name, values in PAPER_MORPHOLOGY.items()}
        # config.json is written with sorted keys, so the order of the attributes is kept beside them.
        if self.morphology_order is None or set(self.morphology_order) != set(self.morphology):
            self.morphology_order = list(self.morphology)
        self.morphology = {name: self.morphology[name] for name in self.morphology_order}
        self.default_prompt_ids = self.default_prompt_ids or {}
        self.detection_thresholds = self.detection_thresholds or {}
        super().__post_init__(**kwargs)
        if self.id2label is not None and set((self.label2id or {}).values()) != set(self.id2label):
            self.label2id = {name: index for index, name in self.id2label.items()}

    def validate_architecture(self) -> None:
        """Checks that the numbers fit together; called by `@strict` after construction.

        Raises:
            ValueError: The width does not divide into heads or sine halves, a morphology attribute has fewer than
                two values, a class is its own ancestor, or there are fewer feature levels than the backbone gives.
        """
        if self.d_model % self.num_attention_heads or self.d_model % 4:
            raise InputError(
                f"d_model={self.d_model} must be a multiple of 4 and of num_attention_heads={self.num_attention_heads}."
            )
        for name, values in (self.morphology or {}).items():
            if len(values) < 2:
                raise InputError(f"Morphology attribute '{name}' needs at least two values, got {values}.")
        for name in self.label_parents or {}:
            if name in self._ancestor_names(name):
                raise InputError(f"label_parents makes '{name}' its own ancestor: {self.label_parents}.")
        backbone_levels = len(getattr(self.backbone_config, "out_indices", None) or [None])
        if self.num_feature_levels < backbone_levels:
            raise InputError(
                f"num_feature_levels={self.num_feature_levels} is less than the {backbone_levels} maps of the backbone; "
                "name fewer in backbone_config.out_features."
            )

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
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> "UniHemaConfig":
        """Reads a saved configuration, as [`~PreTrainedConfig.from_dict`] does.

        `id2label` and `num_labels` given here, which is where `from_pretrained` of a model brings them, name the classes
        of the model that is loaded: the detection classes, and those of a `UniHemaForImageClassification`.

        Args:
            config_dict (`dict[str, Any]`): What was saved.
            **kwargs: Fields to change.
        """
        names, count = kwargs.get("id2label"), kwargs.get("num_labels")
        made = super().from_dict(config_dict, **kwargs)
        config = made[0] if isinstance(made, tuple) else made
        if names is not None:
            config.given_labels = [config.id2label[index] for index in sorted(config.id2label)]
            config.label2id = {name: index for index, name in config.id2label.items()}
        elif count is not None:
            config.given_labels = [f"LABEL_{index}" for index in range(count)]
        return made

    def to_dict(self) -> dict[str, Any]:
        """What is saved."""
        fields = super().to_dict()
        fields.pop("given_labels", None)
        return fields

    def _ancestor_names(self, name: str) -> list[str]:
        found: list[str] = []
        while (parent := (self.label_parents or {}).get(name)) is not None and parent not in found:
            found.append(parent)
            name = parent
        return found

    @property
    def class_names(self) -> list[str]:
        """The detection classes, in the order of their ids."""
        return [name for _, name in sorted(self.id2label.items())]

    @property
    def ancestor_matrix(self) -> list[list[bool]] | None:
        """For each pair of detection classes whether the second is coarser than the first, by `label_parents`; `None` where
        no class is coarser than another."""
        names = self.class_names
        coarser = [set(self._ancestor_names(name)) for name in names]
        matrix = [[other in own for other in names] for own in coarser]
        return matrix if any(map(any, matrix)) else None

    def class_thresholds(self, threshold: float | None = None) -> list[float]:
        """The smallest detection score that counts, for each class.

        Args:
            threshold (`float`, *optional*): For all classes, instead of the calibrated one of each.
        """
        if threshold is not None:
            return [threshold] * self.num_labels
        return [self.detection_thresholds.get(name, DEFAULT_THRESHOLD) for name in self.class_names]

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


__all__ = ["UniHemaConfig"]
