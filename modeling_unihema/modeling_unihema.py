"""The model and its heads, in the order of the paper's figure 2 (Uni-Hema, arXiv 2511.13889).

An image becomes feature levels and encoded tokens, a prompt text states; both together become the states that a head reads.
`forward` is a function of its arguments and the weights: what is worth keeping between calls (`image_features`,
`prompt_features`) is returned and given back by name.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple

from unihema.errors import InputError

from .adapter_mixin import WithAdapters
from .cell_masks import MASKS
from .configuration_unihema import UniHemaConfig
from .denoising import ContrastiveDenoising
from .hema_former import CrossModalFusion, HemaFormer, SingleCellFeatureExtraction
from .image_decoder import ImageDecoder, QuerySelection
from .image_encoder import ImageEncoder
from .losses import detection_loss, segmentation_loss, single_cell_loss, text_loss
from .outputs import (
    UniHemaClassificationOutput,
    UniHemaDetectionOutput,
    UniHemaImageFeatures,
    UniHemaLanguageOutput,
    UniHemaModelOutput,
    UniHemaPromptFeatures,
    UniHemaSegmentationOutput,
)
from .padding import strides
from .task_heads import DetectionHead, MaskHead, SingleCellHead
from .tasks import LANGUAGE_TASKS, TASKS, check_task, head_keys, parts_of, skippable_keys
from .text_branch import CACHE_NAME, TextBranch
from .visual_backbone import FeatureLevels, VisualBackbone


# Class logit of a query that was made from padding; float16 can hold it.
NO_CELL = -1e4
# Parts of the trunk that `compile_parts` compiles.
COMPILED_PARTS = ("visual_backbone", "image_encoder", "query_selection", "image_decoder")
# What masks of cells are made of, in detection.
CELL_MASK_OUTPUTS = ("cell_mask_queries", "cell_mask_pixels", "cell_mask_ratios")
# Optional outputs of every layer, and the fields that return them.
LAYER_OPTIONS = ("output_hidden_states", "output_attentions")
LAYER_OUTPUTS = (
    "encoder_hidden_states",
    "encoder_attentions",
    "decoder_hidden_states",
    "decoder_attentions",
    "cross_attentions",
)


def layer_options(options: Mapping[str, Any]) -> dict[str, bool]:
    """The keyword arguments of a call that request states or attention weights of every layer."""
    return {name: options[name] for name in LAYER_OPTIONS if options.get(name) is not None}


class UniHemaPreTrainedModel(WithAdapters, PreTrainedModel):
    """Initialisation and loading, common to all UniHema models."""

    config: UniHemaConfig
    # Tasks the class has heads for. The model without heads has none.
    tasks: tuple[str, ...]
    config_class = UniHemaConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["VisualBackbone", "ImageEncoderLayer", "ImageDecoderLayer", "CrossModalFusionBlock"]
    _supports_sdpa = True
    # Parts that get no gradient from the loss of the class.
    _frozen_parts: tuple[str, ...] = ()

    def __init__(self, config: UniHemaConfig, *args: Any):
        # Before anything is built: fields may have changed since the configuration was made.
        config.validate()
        super().__init__(config, *args)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """Loads a model as [`~PreTrainedModel.from_pretrained`] does, and freezes the parts that get no gradient from the
        loss of this class."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model._freeze_parts()
        return loaded

    def _freeze_parts(self) -> None:
        for part in self._frozen_parts:
            self.get_submodule(part).requires_grad_(False)
        for module in self.modules():
            if isinstance(module, VisualBackbone):
                module.freeze_norms()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Xavier-uniform linears and convolutions, zero biases, standard normal queries and embeddings; layers marked by
        `initialised` get their own values."""
        super()._init_weights(module)
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            init.xavier_uniform_(module.weight, gain=getattr(module, "initial_gain", 1.0))
            if module.bias is not None:
                initial_bias = getattr(module, "initial_bias", None)
                if initial_bias is None:
                    init.zeros_(module.bias)
                else:
                    init.copy_(module.bias, initial_bias())
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight)
        elif isinstance(module, ImageEncoder):
            init.normal_(module.level_embedding)
        elif isinstance(module, CrossModalFusion):
            init.normal_(module.queries)
        elif isinstance(module, SingleCellFeatureExtraction):
            init.normal_(module.query)

    def compile_parts(self, **options: Any) -> None:
        """Compiles in place the parts whose work depends on the size of image and batch alone: backbone, image encoder, query
        selection and image decoder. Matching and the text branch stay as they are, and so do weights and their names. Every
        new size is compiled anew, so give few.

        Args:
            options: Of `torch.compile`.
        """
        for name in COMPILED_PARTS:
            part = getattr(self.base_model, name, None)
            if part is not None:
                part.compile(**options)

    def get_image_features(
        self, pixel_values: torch.FloatTensor, pixel_mask: torch.LongTensor | None = None, task: str | None = None
    ) -> UniHemaImageFeatures:
        """Image features that all tasks share; every head accepts them as `image_features=`.

        Args:
            pixel_values (`torch.FloatTensor`): Normalised images `[B, 3, H, W]`.
            pixel_mask (`torch.LongTensor`, *optional*): `[B, H, W]`, 1 on the image, 0 on padding.
            task (`str`, *optional*): Encode only what this task needs; what any task of the model needs when missing. A head
                computes whatever it needs and is not given.

        Returns:
            [`UniHemaImageFeatures`]

        Raises:
            ValueError: Unknown task.
        """
        return self.base_model.get_image_features(pixel_values, pixel_mask, task)

    def get_prompt_features(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        task: str = "detection",
        batch_size: int = 1,
    ) -> UniHemaPromptFeatures:
        """Prompt features for detection and segmentation, whose heads accept them as `prompt_features=`.

        Args:
            input_ids (`torch.LongTensor`, *optional*): Prompt `[B, L]`; the configuration's default prompt of the task, for
                `batch_size` images, when missing.
            attention_mask (`torch.LongTensor`, *optional*): `[B, L]`, 0 on padding.
            task (`str`): Whose default prompt.
            batch_size (`int`): Images that the default prompt is for.

        Returns:
            [`UniHemaPromptFeatures`]
        """
        return self.base_model.get_prompt_features(input_ids, attention_mask, task, batch_size)


class UniHemaModel(UniHemaPreTrainedModel):
    """The trunk: everything but the heads.

    Args:
        config ([`UniHemaConfig`]): The configuration.
        tasks (`tuple[str, ...]`): Tasks whose parts to build; all of them by default.
    """

    def __init__(self, config: UniHemaConfig, tasks: tuple[str, ...] = TASKS):
        super().__init__(config)
        parts = parts_of(tasks, config)
        self.visual_backbone = VisualBackbone(config)
        if "text_encoder" in parts:
            self.text_branch = TextBranch(config, with_decoder="text_decoder" in parts)
        if "image_encoder" in parts:
            self.image_encoder = ImageEncoder(config)
        if "query_selection" in parts:
            self.query_selection = QuerySelection(config)
            self.image_decoder = ImageDecoder(config)
        self.hema_former = HemaFormer(config, parts)
        self._keys_to_ignore_on_load_unexpected = head_keys()
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The text branch's token embedding.

        Raises:
            NotImplementedError: The model was built for a task that reads no text.
        """
        if not hasattr(self, "text_branch"):
            raise NotImplementedError("This model reads no text, so it has no token embedding.")
        return self.text_branch.shared

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the text branch's token embedding."""
        self.text_branch.shared = value

    def get_image_features(self, pixel_values, pixel_mask=None, task=None) -> UniHemaImageFeatures:
        """See [`UniHemaPreTrainedModel.get_image_features`]."""
        levels = self.visual_backbone(pixel_values, pixel_mask)
        encodes = hasattr(self, "image_encoder") if task is None else "image_encoder" in check_task(task).parts
        return UniHemaImageFeatures(
            levels=levels,
            last_hidden_state=self.image_encoder(levels).last_hidden_state if encodes else None,
            pooler_output=levels.backbone_means,
            image_size=tuple(pixel_values.shape[-2:]),
        )

    def get_prompt_features(
        self, input_ids=None, attention_mask=None, task="detection", batch_size=1
    ) -> UniHemaPromptFeatures:
        """See [`UniHemaPreTrainedModel.get_prompt_features`]."""
        if input_ids is None:
            ids = self.config.default_prompt_ids.get(task, [self.config.text_config.eos_token_id])
            input_ids = torch.tensor([ids]).to(self.device, non_blocking=True).expand(batch_size, -1)
        if attention_mask is None:
            attention_mask = (input_ids != self.config.pad_token_id).long()
        input_ids, attention_mask = self._official_length(input_ids, attention_mask)
        states = self.text_branch.encode(input_ids, attention_mask).last_hidden_state
        return UniHemaPromptFeatures(states, attention_mask)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor | None = None,
        pixel_mask: torch.LongTensor | None = None,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        task: str = "detection",
        image_features: UniHemaImageFeatures | None = None,
        prompt_features: UniHemaPromptFeatures | None = None,
        text_only: bool = False,
        make_denoising: Callable | None = None,
        cell_masks: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> UniHemaModelOutput:
        """
        Args:
            pixel_values (`torch.FloatTensor`): Normalised images `[B, 3, H, W]`.
            pixel_mask (`torch.LongTensor`, *optional*): `[B, H, W]`, 1 on the image, 0 on padding.
            input_ids (`torch.LongTensor`, *optional*): Prompt or question `[B, L]`. For language tasks `[K * B, L]` asks
                K questions of each image, image by image. The configuration's default prompt when missing.
            attention_mask (`torch.LongTensor`, *optional*): `[B, L]`, 0 on padding.
            task (`str`): One of `TASKS`; decides which parts run.
            image_features ([`UniHemaImageFeatures`], *optional*): Of `get_image_features`, instead of `pixel_values`.
            prompt_features ([`UniHemaPromptFeatures`], *optional*): Of `get_prompt_features`, instead of `input_ids`.
            text_only (`bool`): Language tasks: the text alone is read, E_W = E_T, as in the second stage of training.
            make_denoising (`Callable`, *optional*): From the number of queries to `DenoisingQueries`; training only.
            cell_masks (`bool`): Detection: also return what masks of single cells are made of. Needs the mask finder.
            output_hidden_states (`bool`, *optional*): Also return the states of every layer.
            output_attentions (`bool`, *optional*): Also return the attention weights of every layer. Those between
                queries and of the text branch need `attn_implementation="eager"`.

        Returns:
            [`UniHemaModelOutput`]

        Raises:
            ValueError: Unknown task, no image, an image or a prompt given twice, no text where a question is needed, or a
                text batch that is no multiple of the images.
        """
        check_task(task)
        states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        weights = self.config.output_attentions if output_attentions is None else output_attentions
        if task in LANGUAGE_TASKS:
            if not text_only:
                image_features = self._features(pixel_values, pixel_mask, image_features)
            return self._fuse_with_text(input_ids, attention_mask, image_features, text_only, states, weights)
        features = self._features(pixel_values, pixel_mask, image_features)
        encoded = self._encode(features, states, weights)
        tokens, levels = encoded.last_hidden_state, features.levels
        if task == "single_cell":
            feature = self.hema_former.single_cell_feature_extraction(tokens, levels)
            output = UniHemaModelOutput(last_hidden_state=feature[:, None], encoder_last_hidden_state=tokens)
        else:
            if input_ids is not None and prompt_features is not None:
                raise InputError("Give input_ids or prompt_features, not both.")
            if self.config.text_guided_refinement and prompt_features is None:
                prompt_features = self.get_prompt_features(input_ids, attention_mask, task, tokens.shape[0])
            output = self._find_cells(tokens, levels, prompt_features, make_denoising, states, weights)
            if task == "segmentation":
                output["mask_logits"], output["mask_features"] = self.hema_former.query_guided_mask_finder(
                    output.last_hidden_state[:, :1], tokens, levels
                )
                if levels.padded and not self.config.attend_to_padding:
                    output["mask_valid"] = levels.valid[0]
            elif cell_masks:
                output["cell_mask_queries"], output["cell_mask_pixels"] = (
                    self.hema_former.query_guided_mask_finder.embed(output.last_hidden_state, tokens, levels)
                )
                output["cell_mask_ratios"] = levels.valid_ratios[:, 0]
        if states:
            output["encoder_hidden_states"] = encoded.hidden_states
        if weights:
            output["encoder_attentions"] = encoded.attentions
        return output

    @staticmethod
    def _one_source(pixel_values, image_features) -> None:
        if pixel_values is None and image_features is None:
            raise InputError("pixel_values is missing: every task of UniHema looks at an image.")
        if pixel_values is not None and image_features is not None:
            raise InputError("Give pixel_values or image_features, not both.")

    @staticmethod
    def _check_pixels(pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None) -> None:
        shape = tuple(pixel_values.shape)
        if len(shape) != 4 or shape[1] != 3 or not pixel_values.is_floating_point():
            raise InputError(
                f"pixel_values must be floats [B, 3, H, W], as the processor makes them, got {pixel_values.dtype} {shape}."
            )
        # A compiled or exported model would take the sizes for conditions.
        if torch.compiler.is_compiling() or pixel_mask is None:
            return
        if tuple(pixel_mask.shape) != (shape[0], *shape[2:]):
            raise InputError(
                f"pixel_mask has shape {tuple(pixel_mask.shape)}, pixel_values {shape}: they are of other images."
            )

    def _features(self, pixel_values, pixel_mask, image_features) -> UniHemaImageFeatures:
        """The given features, or the feature levels of the given images."""
        self._one_source(pixel_values, image_features)
        if image_features is not None:
            return image_features
        self._check_pixels(pixel_values, pixel_mask)
        levels = self.visual_backbone(pixel_values, pixel_mask)
        return UniHemaImageFeatures(levels=levels, image_size=tuple(pixel_values.shape[-2:]))

    def _encode(self, features: UniHemaImageFeatures, states: bool, weights: bool) -> BaseModelOutput:
        """Encoded tokens: the given ones, or computed, also when states or weights of every layer are requested."""
        if features.last_hidden_state is not None and not states and not weights:
            return BaseModelOutput(features.last_hidden_state)
        return self.image_encoder(features.levels, output_hidden_states=states, output_attentions=weights)

    def _find_cells(
        self,
        tokens: torch.Tensor,
        levels: FeatureLevels,
        prompt: UniHemaPromptFeatures | None,
        make_denoising: Callable | None,
        states: bool,
        weights: bool,
    ) -> UniHemaModelOutput:
        """Encoded tokens to decoded queries: the best tokens become queries, read the prompt, then look at the image."""
        proposals = self.query_selection(tokens, levels)
        content, reference = proposals.content, proposals.reference_logits
        denoising = make_denoising(content.shape[1]) if make_denoising is not None else None
        noisy = 0
        if denoising is not None:
            noisy = denoising.content.shape[1]
            content = torch.cat((denoising.content.to(content.dtype), content), 1)
            reference = torch.cat((denoising.reference_logits.to(reference.dtype), reference), 1)
        if self.config.text_guided_refinement:
            refine = self.hema_former.text_guided_visual_refinement
            content = refine(content, prompt.last_hidden_state, prompt.attention_mask)
        decoded = self.image_decoder(content, reference, tokens, levels, denoising, proposals.padding)
        # Denoising queries come first.
        refined = content[:, noisy:]
        return UniHemaModelOutput(
            last_hidden_state=decoded.states[-1, :, noisy:],
            encoder_last_hidden_state=tokens,
            text_hidden_state=None if prompt is None else prompt.last_hidden_state,
            decoder_states=decoded.states[:, :, noisy:],
            decoder_boxes=decoded.boxes[:, :, noisy:],
            denoising_states=decoded.states[:, :, :noisy] if noisy else None,
            denoising_boxes=decoded.boxes[:, :, :noisy] if noisy else None,
            denoising_queries=denoising,
            proposal_logits=proposals.logits,
            proposal_boxes=proposals.boxes,
            proposal_indices=proposals.token_indices,
            query_padding=proposals.padding,
            refined_queries=refined,
            decoder_hidden_states=(refined, *(layer[:, noisy:] for layer in decoded.hidden_states)) if states else None,
            decoder_attentions=tuple(decoded.attentions) if weights else None,
            cross_attentions=tuple(decoded.cross_attentions) if weights else None,
        )

    def _fuse_with_text(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        image_features: UniHemaImageFeatures | None,
        text_only: bool,
        states: bool,
        weights: bool,
    ) -> UniHemaModelOutput:
        """Fuses question or sentence with the image to E_W (equation 1), which the text decoder attends to."""
        if input_ids is None:
            raise InputError("input_ids is missing: a question or a masked sentence is needed to generate text.")
        if attention_mask is None:
            attention_mask = (input_ids != self.config.pad_token_id).long()
        length = input_ids.shape[1]
        input_ids, attention_mask = self._official_length(input_ids, attention_mask)
        text = self.text_branch.encode(
            input_ids, attention_mask, output_hidden_states=states, output_attentions=weights
        )
        fused = text.last_hidden_state
        if self.config.cross_modal_fusion and not text_only:
            levels, texts = image_features.levels, len(input_ids)
            images = len(levels.maps[0])
            if texts % images:
                raise InputError(f"{texts} texts for {images} images: give every image the same number of texts.")
            levels = levels.repeat_images(texts // images) if texts > images else levels
            fused = self.hema_former.cross_modal_fusion(fused, attention_mask, levels)
        return UniHemaModelOutput(
            last_hidden_state=fused[:, :length],
            text_hidden_state=text.last_hidden_state[:, :length],
            encoder_hidden_states=text.hidden_states,
            encoder_attentions=text.attentions,
        )

    def _official_length(self, input_ids, attention_mask) -> tuple[torch.Tensor, torch.Tensor]:
        """Pads texts to the longest length where padding takes part, as the official model does."""
        missing = self.config.fusion_queries - input_ids.shape[1]
        if not self.config.attend_to_padding or missing <= 0:
            return input_ids, attention_mask
        pad = torch.nn.functional.pad
        return pad(input_ids, (0, missing), value=self.config.pad_token_id), pad(attention_mask, (0, missing))


def detect(
    model: UniHemaPreTrainedModel,
    labels: list[dict[str, torch.Tensor]] | None,
    num_items: Mapping[str, torch.Tensor] | None = None,
    **inputs: Any,
) -> UniHemaDetectionOutput:
    """Boxes, classes and attributes by a model's trunk, `detection_head` and `denoising`; see [`UniHemaForDetection`]."""
    make_denoising = partial(model.denoising, labels) if model.training and labels is not None else None
    has_finder = hasattr(model.model.hema_former, "query_guided_mask_finder")
    taught = labels is not None and any(MASKS in image for image in labels)
    cell_masks = has_finder and (model.config.trained.cell_masks or taught)
    trunk = model.model(
        task="detection", make_denoising=make_denoising, cell_masks=cell_masks, return_dict=True, **inputs
    )
    masks = {name: trunk[name] for name in CELL_MASK_OUTPUTS if name in trunk}
    needed = trunk.decoder_states if labels is not None else trunk.decoder_states[-1:]
    logits, morphology = model.detection_head(needed)
    if trunk.query_padding is not None:
        logits = logits.masked_fill(trunk.query_padding[None, ..., None], NO_CELL)
    loss = loss_dict = None
    if labels is not None:
        noisy_logits = None
        if trunk.denoising_states is not None:
            noisy_logits, _ = model.detection_head(trunk.denoising_states)
        loss, loss_dict = detection_loss(
            logits,
            trunk.decoder_boxes,
            morphology,
            trunk.proposal_logits,
            trunk.proposal_boxes,
            labels,
            model.config,
            denoising=trunk.denoising_queries,
            denoising_logits=noisy_logits,
            denoising_boxes=trunk.denoising_boxes,
            num_items=num_items,
            masks=tuple(masks.values()) if masks else None,
        )
    return UniHemaDetectionOutput(
        loss=loss,
        loss_dict=loss_dict,
        logits=logits[-1],
        pred_boxes=trunk.decoder_boxes[-1],
        pred_morphology=morphology[-1],
        last_hidden_state=trunk.last_hidden_state,
        encoder_last_hidden_state=trunk.encoder_last_hidden_state,
        **masks,
        **_of_layers(trunk, LAYER_OUTPUTS),
    )


def segment(
    model: UniHemaPreTrainedModel,
    labels: torch.LongTensor | None,
    num_items: Mapping[str, torch.Tensor] | None = None,
    **inputs: Any,
) -> UniHemaSegmentationOutput:
    """The mask of what the prompt names by a model's trunk and `mask_head`; see [`UniHemaForSegmentation`]."""
    pixel_values, features = inputs["pixel_values"], inputs["image_features"]
    trunk = model.model(task="segmentation", return_dict=True, **inputs)
    size = features.image_size if pixel_values is None else tuple(pixel_values.shape[-2:])
    level = trunk.mask_logits.shape[-2:]
    # Upsampled by whole strides and then cut, so that padding at the end does not stretch the mask.
    whole = size
    if not model.config.attend_to_padding:
        whole = [cells * stride for cells, stride in zip(level, strides(size, level))]
    mask_logits = model.mask_head(trunk.mask_logits, trunk.mask_features, whole, trunk.mask_valid)
    mask_logits = mask_logits[:, : size[0], : size[1]]
    loss = loss_dict = None
    if labels is not None:
        loss, loss_dict = segmentation_loss(
            mask_logits,
            labels,
            dice_weight=model.config.loss_weights["dice"],
            focal_weight=model.config.loss_weights["focal"],
            dice_over_batch=model.config.official_losses,
            num_items=num_items,
        )
    return UniHemaSegmentationOutput(
        loss=loss,
        loss_dict=loss_dict,
        mask_logits=mask_logits,
        encoder_last_hidden_state=trunk.encoder_last_hidden_state,
        **_of_layers(trunk, LAYER_OUTPUTS),
    )


def classify(
    model: UniHemaPreTrainedModel,
    labels: torch.LongTensor | None,
    num_items: torch.Tensor | int | None = None,
    **inputs: Any,
) -> UniHemaClassificationOutput:
    """The class of a crop by a model's trunk and `single_cell_head`; see [`UniHemaForImageClassification`]."""
    trunk = model.model(task="single_cell", return_dict=True, **inputs)
    features = trunk.last_hidden_state[:, 0]
    logits = model.single_cell_head(features)
    loss = None
    if labels is not None:
        members = model.config.single_cell_members if model.config.single_cell_parents else None
        loss = single_cell_loss(logits, labels, num_items=num_items, members=members)
    return UniHemaClassificationOutput(
        loss=loss,
        logits=logits,
        features=features,
        **_of_layers(trunk, LAYER_OUTPUTS[:2]),
    )


def _of_layers(trunk: UniHemaModelOutput, names: tuple[str, ...]) -> dict[str, Any]:
    """States and weights of each layer, where requested."""
    return {name: trunk[name] for name in names if name in trunk}


class UniHemaForDetection(UniHemaPreTrainedModel):
    """Boxes, classes and six morphology attributes of every cell in a field of view."""

    tasks = ("detection",)
    # Transformers' Trainer counts labelled tokens, which is not what this loss is an average over.
    accepts_loss_kwargs = False
    _keys_to_ignore_on_load_unexpected = skippable_keys(tasks)

    def __init__(self, config: UniHemaConfig):
        super().__init__(config)
        self.model = UniHemaModel(config, self.tasks)
        self.detection_head = DetectionHead(config)
        self.denoising = ContrastiveDenoising(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor | None = None,
        pixel_mask: torch.LongTensor | None = None,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        labels: list[dict[str, torch.Tensor]] | None = None,
        image_features: UniHemaImageFeatures | None = None,
        prompt_features: UniHemaPromptFeatures | None = None,
        num_items_in_batch: Mapping[str, torch.Tensor] | None = None,
        **kwargs,
    ) -> UniHemaDetectionOutput:
        """
        Args:
            pixel_values (`torch.FloatTensor`): Normalised images `[B, 3, H, W]`.
            pixel_mask (`torch.LongTensor`, *optional*): `[B, H, W]`, 1 on the image, 0 on padding.
            input_ids (`torch.LongTensor`, *optional*): Prompt that names the cells asked for, `[B, L]`.
            attention_mask (`torch.LongTensor`, *optional*): `[B, L]`.
            labels (`list[dict[str, torch.Tensor]]`, *optional*): For each image `class_labels` `[n]`, `boxes` `[n, 4]`
                cxcywh in 0..1 relative to the image itself, optionally `morphology` `[n, attributes]` (-100 missing),
                `annotated_classes` `[num_labels]` (`False`: neither target nor background), `boxes_known` `[n]`
                (`False`: the cell lies somewhere in its box) and `masks` (see `check_detection_labels`; learned by a model that
                has the mask finder).
            image_features ([`UniHemaImageFeatures`], *optional*): Instead of `pixel_values`, see `get_image_features`.
            prompt_features ([`UniHemaPromptFeatures`], *optional*): Instead of `input_ids`, see `get_prompt_features`.
            num_items_in_batch (`Mapping[str, torch.Tensor]`, *optional*): What the loss divides by when batches are
                accumulated: the sums of `count_loss_items`.

        Returns:
            [`UniHemaDetectionOutput`]
        """
        self.follow_adapter()
        return detect(
            self,
            labels,
            num_items_in_batch,
            pixel_values=pixel_values,
            pixel_mask=pixel_mask,
            input_ids=input_ids,
            attention_mask=attention_mask,
            image_features=image_features,
            prompt_features=prompt_features,
            **layer_options(kwargs),
        )


class UniHemaForObjectDetection(UniHemaForDetection):
    """[`UniHemaForDetection`] by the name that Transformers gives such classes, for programs that go by it, such as FiftyOne."""


class UniHemaForSegmentation(UniHemaPreTrainedModel):
    """Semantic mask, at the image's own size, of what the prompt names."""

    tasks = ("segmentation",)
    # Transformers' Trainer counts labelled tokens, which is not what this loss is an average over.
    accepts_loss_kwargs = False
    # Tokens are selected without gradient, so only the loss of detection trains these.
    _frozen_parts = (
        "model.query_selection.token_projection",
        "model.query_selection.token_norm",
        "model.query_selection.class_head",
        "model.query_selection.box_head",
        "model.image_decoder.box_head",
    )
    _keys_to_ignore_on_load_unexpected = skippable_keys(tasks)

    def __init__(self, config: UniHemaConfig):
        super().__init__(config)
        self.model = UniHemaModel(config, self.tasks)
        self.mask_head = MaskHead(config)
        self.post_init()
        self._freeze_parts()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor | None = None,
        pixel_mask: torch.LongTensor | None = None,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        image_features: UniHemaImageFeatures | None = None,
        prompt_features: UniHemaPromptFeatures | None = None,
        num_items_in_batch: Mapping[str, torch.Tensor] | None = None,
        **kwargs,
    ) -> UniHemaSegmentationOutput:
        """
        Args:
            pixel_values (`torch.FloatTensor`): Normalised images `[B, 3, H, W]`.
            pixel_mask (`torch.LongTensor`, *optional*): `[B, H, W]`, 1 on the image, 0 on padding.
            input_ids (`torch.LongTensor`, *optional*): Prompt that names what to segment, `[B, L]`.
            attention_mask (`torch.LongTensor`, *optional*): `[B, L]`.
            labels (`torch.LongTensor`, *optional*): `[B, H, W]`: 1 cell, 0 background, -100 ignored.
            image_features ([`UniHemaImageFeatures`], *optional*): Instead of `pixel_values`, see `get_image_features`.
            prompt_features ([`UniHemaPromptFeatures`], *optional*): Instead of `input_ids`, see `get_prompt_features`.
            num_items_in_batch (`Mapping[str, torch.Tensor]`, *optional*): What the loss divides by when batches are
                accumulated: the sums of `count_loss_items`.

        Returns:
            [`UniHemaSegmentationOutput`]
        """
        self.follow_adapter()
        return segment(
            self,
            labels,
            num_items_in_batch,
            pixel_values=pixel_values,
            pixel_mask=pixel_mask,
            input_ids=input_ids,
            attention_mask=attention_mask,
            image_features=image_features,
            prompt_features=prompt_features,
            **layer_options(kwargs),
        )


class UniHemaForImageClassification(UniHemaPreTrainedModel):
    """Class of a single-cell crop."""

    tasks = ("single_cell",)
    _keys_to_ignore_on_load_unexpected = skippable_keys(tasks)

    def __init__(self, config: UniHemaConfig):
        super().__init__(config)
        self.model = UniHemaModel(config, self.tasks)
        # The loaded configuration cannot know which head it is for, so it brings new class names here.
        config.single_cell_labels = vars(config).pop("labels_when_loading", config.single_cell_labels)
        self.single_cell_head = SingleCellHead(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor | None = None,
        pixel_mask: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        image_features: UniHemaImageFeatures | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> UniHemaClassificationOutput:
        """
        Args:
            pixel_values (`torch.FloatTensor`): Normalised crops `[B, 3, H, W]`.
            pixel_mask (`torch.LongTensor`, *optional*): `[B, H, W]`, 1 on the image, 0 on padding.
            labels (`torch.LongTensor`, *optional*): `[B]`, indices into `config.single_cell_names`, the classes
                (`config.single_cell_labels`) and then their groups; -100 ignored.
            image_features ([`UniHemaImageFeatures`], *optional*): Instead of `pixel_values`, see `get_image_features`.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*): Labelled images of all accumulated batches, which the
                loss divides by. Transformers' Trainer gives it.

        Returns:
            [`UniHemaClassificationOutput`]
        """
        self.follow_adapter()
        return classify(
            self,
            labels,
            num_items_in_batch,
            pixel_values=pixel_values,
            pixel_mask=pixel_mask,
            image_features=image_features,
            **layer_options(kwargs),
        )


class _QuestionEncoder:
    """The encoder that `generate` calls: it fuses the question with its image."""

    main_input_name = "input_ids"

    def __init__(self, trunk: UniHemaModel):
        self.trunk = trunk

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        pixel_values=None,
        pixel_mask=None,
        image_features=None,
        text_only=False,
        **kwargs,
    ):
        fused = self.trunk(
            pixel_values,
            pixel_mask,
            input_ids,
            attention_mask,
            task="question_answering",
            image_features=image_features,
            text_only=text_only,
            return_dict=True,
            **layer_options(kwargs),
        )
        return BaseModelOutput(fused.last_hidden_state, fused.encoder_hidden_states, fused.encoder_attentions)

    __call__ = forward


class _Answers:
    """Text generation for models whose trunk has a text decoder."""

    main_input_name = "input_ids"

    def _build_lm_head(self, config: UniHemaConfig) -> None:
        self.lm_head = nn.Linear(config.text_config.d_model, config.text_config.vocab_size, bias=False)
        self._tied_weights_keys = (
            {"lm_head.weight": "model.text_branch.shared.weight"} if config.tie_word_embeddings else {}
        )

    def get_input_embeddings(self) -> nn.Module:
        """The text branch's token embedding."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the text branch's token embedding."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The output layer of the text decoder."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replaces the output layer of the text decoder."""
        self.lm_head = value

    def get_encoder(self, modality: str | None = None) -> _QuestionEncoder:
        """The encoder of questions and their images that `generate` calls."""
        return _QuestionEncoder(self.model)

    def get_decoder(self) -> nn.Module:
        """The T5 decoder."""
        return self.model.text_branch.decoder

    @torch.no_grad()
    def generate(self, *args, **kwargs):
        """Generates answers as [`~GenerationMixin.generate`] does. A model in training mode is put into evaluation mode
        meanwhile, part by part.

        Args:
            *args, **kwargs: Those of `forward` that describe image and question, and settings of generation.

        Raises:
            ValueError: There is no question.
        """
        if not args and all(kwargs.get(name) is None for name in ("inputs", "input_ids", "encoder_outputs")):
            raise InputError("input_ids is missing: a question or a masked sentence is needed to generate text.")
        training = [module for module in self.modules() if module.training]
        for module in training:
            module.training = False
        try:
            return super().generate(*args, **kwargs)
        finally:
            for module in training:
                module.training = True

    def prepare_decoder_input_ids_from_labels(self, labels: torch.LongTensor) -> torch.LongTensor:
        """Labels `[B, T]` shifted right behind the start token, -100 turned into padding."""
        start = labels.new_full((len(labels), 1), self.config.decoder_start_token_id)
        return torch.cat((start, labels[:, :-1].masked_fill(labels[:, :-1] == -100, self.config.pad_token_id)), 1)

    def _answer(
        self,
        labels: torch.LongTensor | None,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.LongTensor | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        layers: Mapping[str, bool] | None = None,
        num_items: torch.Tensor | int | None = None,
        **inputs: Any,
    ) -> UniHemaLanguageOutput:
        wanted = {name: getattr(self.config, name) for name in LAYER_OPTIONS} | dict(layers or {})
        if encoder_outputs is None:
            encoder_outputs = self.get_encoder()(input_ids, attention_mask, **inputs, **wanted)
        elif not isinstance(encoder_outputs, BaseModelOutput):
            encoder_outputs = BaseModelOutput(*encoder_outputs)
        fused = encoder_outputs[0]
        if attention_mask is None:
            if input_ids is None:
                attention_mask = fused.new_ones(fused.shape[:2], dtype=torch.long)
            else:
                attention_mask = (input_ids != self.config.pad_token_id).long()
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            if labels is None:
                raise InputError("Give labels or decoder_input_ids, or call generate() for an answer.")
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
            decoder_input_ids = decoder_input_ids.to(fused.device, non_blocking=True)
        decoded = self.model.text_branch.decode(
            decoder_input_ids,
            fused,
            attention_mask,
            decoder_inputs_embeds=decoder_inputs_embeds,
            decoder_attention_mask=decoder_attention_mask,
            cache=cache,
            use_cache=use_cache,
            **wanted,
        )
        states = decoded.last_hidden_state
        if self.config.output_head_is_scaled:
            states = states * self.config.text_config.d_model**-0.5
        logits = self.lm_head(states)
        loss = None if labels is None else text_loss(logits, labels, num_items=num_items)
        return UniHemaLanguageOutput(
            loss=loss,
            loss_dict=None if loss is None else {"loss_text": loss.detach()},
            logits=logits,
            encoder_last_hidden_state=fused,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
            decoder_hidden_states=decoded.hidden_states,
            decoder_attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
            **{CACHE_NAME: decoded.get(CACHE_NAME)},
        )


class UniHemaForQA(_Answers, UniHemaPreTrainedModel, GenerationMixin):
    """Answers a question about an image, and fills in a masked sentence. Both are generated, looking at the image."""

    tasks = LANGUAGE_TASKS
    _keys_to_ignore_on_load_unexpected = skippable_keys(tasks)

    def __init__(self, config: UniHemaConfig):
        super().__init__(config)
        self.model = UniHemaModel(config, self.tasks)
        self._build_lm_head(config)
        self.post_init()
        if not config.cross_modal_fusion:
            self._frozen_parts = ("model.visual_backbone",)
            self._freeze_parts()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        pixel_mask: torch.LongTensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.LongTensor | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        past_key_values: Cache | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        image_features: UniHemaImageFeatures | None = None,
        text_only: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> UniHemaLanguageOutput:
        """
        Args:
            input_ids (`torch.LongTensor`): Questions or masked sentences `[B, L]`, or `[K * B, L]`: K for each image.
            attention_mask (`torch.LongTensor`, *optional*): As `input_ids`, 0 on padding.
            pixel_values (`torch.FloatTensor`): Normalised images `[B, 3, H, W]`.
            pixel_mask (`torch.LongTensor`, *optional*): `[B, H, W]`, 1 on the image, 0 on padding.
            decoder_input_ids (`torch.LongTensor`, *optional*): `[B, T]`; made from `labels` when missing.
            decoder_attention_mask (`torch.LongTensor`, *optional*): `[B, T]`.
            decoder_inputs_embeds (`torch.FloatTensor`, *optional*): Embedded decoder tokens.
            encoder_outputs (`BaseModelOutput` or `tuple`, *optional*): Fused question and image, computed before.
            past_key_values (`Cache`, *optional*): Keys and values of earlier decoding steps.
            labels (`torch.LongTensor`, *optional*): Answers `[B, T]`, -100 ignored.
            use_cache (`bool`, *optional*): Return the keys and values of this step too.
            cache (`Cache`, *optional*): The name of `past_key_values` from Transformers 5.24 on.
            image_features ([`UniHemaImageFeatures`], *optional*): Instead of `pixel_values`, see `get_image_features`.
            text_only (`bool`): Read the text alone, as in the second stage of training.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*): Labelled tokens of all accumulated batches, which the
                loss divides by. Transformers' Trainer gives it.

        Returns:
            [`UniHemaLanguageOutput`]
        """
        return self._answer(
            labels,
            input_ids,
            attention_mask,
            decoder_input_ids,
            decoder_attention_mask,
            decoder_inputs_embeds,
            encoder_outputs,
            past_key_values if cache is None else cache,
            use_cache,
            layer_options(kwargs),
            num_items_in_batch,
            pixel_values=pixel_values,
            pixel_mask=pixel_mask,
            image_features=image_features,
            text_only=text_only,
        )


class UniHemaForMultiTask(_Answers, UniHemaPreTrainedModel, GenerationMixin):
    """All heads on one trunk: the class that is trained, and that a full checkpoint holds.

    A batch is of one task. `generate` answers questions, as with [`UniHemaForQA`].
    """

    tasks = TASKS
    # Transformers' Trainer counts labelled tokens, which is not what this loss is an average over.
    accepts_loss_kwargs = False

    def __init__(self, config: UniHemaConfig):
        super().__init__(config)
        self.model = UniHemaModel(config)
        self.detection_head = DetectionHead(config)
        self.denoising = ContrastiveDenoising(config)
        self.mask_head = MaskHead(config)
        self.single_cell_head = SingleCellHead(config)
        self._build_lm_head(config)
        self.post_init()

    def prepare_inputs_for_generation(self, *args, **kwargs) -> dict[str, Any]:
        """The inputs of a step of `generate`, which answers a question."""
        return super().prepare_inputs_for_generation(*args, **kwargs) | {"task": "question_answering"}

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        pixel_mask: torch.LongTensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.LongTensor | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        past_key_values: Cache | None = None,
        labels: Any = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        image_features: UniHemaImageFeatures | None = None,
        prompt_features: UniHemaPromptFeatures | None = None,
        text_only: bool = False,
        *,
        task: str | None = None,
        num_items_in_batch: Mapping[str, torch.Tensor] | None = None,
        **kwargs,
    ) -> UniHemaDetectionOutput | UniHemaSegmentationOutput | UniHemaClassificationOutput | UniHemaLanguageOutput:
        """
        Args:
            task (`str`): One of `TASKS`. The other arguments are those of the task's own class.
            num_items_in_batch (`Mapping[str, torch.Tensor]`, *optional*): What the loss divides by when batches are
                accumulated: the sums of `count_loss_items`.

        Returns:
            The output of the task's own class.

        Raises:
            ValueError: No task, or an unknown one.
        """
        if task is None:
            raise InputError(f"task is missing: this model has all heads, so name one of {', '.join(TASKS)}.")
        check_task(task)
        self.follow_adapter()
        image = {"pixel_values": pixel_values, "pixel_mask": pixel_mask, "image_features": image_features}
        layers, items = layer_options(kwargs), num_items_in_batch or {}
        if task in LANGUAGE_TASKS:
            return self._answer(
                labels,
                input_ids,
                attention_mask,
                decoder_input_ids,
                decoder_attention_mask,
                decoder_inputs_embeds,
                encoder_outputs,
                past_key_values if cache is None else cache,
                use_cache,
                layers,
                items.get("tokens"),
                text_only=text_only,
                **image,
            )
        if task == "single_cell":
            return classify(self, labels, items.get("images"), **image, **layers)
        prompt = {"input_ids": input_ids, "attention_mask": attention_mask, "prompt_features": prompt_features}
        run = {"detection": detect, "segmentation": segment}[task]
        return run(self, labels, num_items_in_batch, **image, **prompt, **layers)


__all__ = [
    "UniHemaForDetection",
    "UniHemaForImageClassification",
    "UniHemaForMultiTask",
    "UniHemaForObjectDetection",
    "UniHemaForQA",
    "UniHemaForSegmentation",
    "UniHemaModel",
    "UniHemaPreTrainedModel",
]
