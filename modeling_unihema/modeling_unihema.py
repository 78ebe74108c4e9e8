"""UniHema models: one class a task on a shared trunk, and one class with every head."""

import inspect
from functools import partial

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.generic import can_return_tuple

from .configuration_unihema import UniHemaConfig
from .denoising import ContrastiveDenoising
from .losses import detection_loss, segmentation_loss, single_cell_loss, text_loss
from .outputs import (
    UniHemaClassificationOutput,
    UniHemaDetectionOutput,
    UniHemaLanguageOutput,
    UniHemaModelOutput,
    UniHemaSegmentationOutput,
)
from .padding import strides
from .task_heads import DetectionHead, MaskHead, SingleCellHead
from .text_branch import CACHE_NAME
from .trunk import LANGUAGE_TASKS, TASKS, UniHemaModel, UniHemaPreTrainedModel, skippable_keys


# Logit of a query that has no token of its image to stand on; small enough for half precision.
NO_CELL = -1e4


LAYER_OPTIONS = ("output_hidden_states", "output_attentions")


def _wanted(options: dict) -> dict[str, bool]:
    """Those of a head's further arguments that the trunk understands."""
    return {name: options[name] for name in LAYER_OPTIONS if options.get(name) is not None}


def _layers(trunk: UniHemaModelOutput) -> dict[str, tuple[torch.Tensor, ...] | None]:
    """States and weights of each layer, where asked for."""
    return {name: trunk[name] for name in UniHemaModel._can_record_outputs if name in trunk}


class UniHemaForDetection(UniHemaPreTrainedModel):
    """Boxes, classes and six morphology attributes of every cell in a field of view."""

    tasks = ("detection",)
    _keys_to_ignore_on_load_unexpected = skippable_keys(tasks)

    def __init__(self, config: UniHemaConfig):
        super().__init__(config)
        self.model = UniHemaModel(config, self.tasks)
        UniHemaForDetection._build_head(self, config)
        self.post_init()

    def _build_head(self, config: UniHemaConfig) -> None:
        self.detection_head = DetectionHead(config)
        self.denoising = ContrastiveDenoising(config)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor,
        pixel_mask: torch.LongTensor | None = None,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        labels: list[dict[str, torch.Tensor]] | None = None,
        **kwargs,
    ) -> UniHemaDetectionOutput:
        """
        Args:
            pixel_values (`torch.FloatTensor`): Normalised images `[B, 3, H, W]`.
            pixel_mask (`torch.LongTensor`, *optional*): `[B, H, W]`, 1 on the image, 0 on padding.
            input_ids (`torch.LongTensor`, *optional*): Prompt that names the cells asked for, `[B, L]`.
            attention_mask (`torch.LongTensor`, *optional*): `[B, L]`.
            labels (`list[dict[str, torch.Tensor]]`, *optional*): For each image `class_labels` `[n]`, `boxes` `[n, 4]`
                cxcywh in 0..1 relative to the image itself, optionally `morphology` `[n, attributes]` (-100 missing) and
                `annotated_classes` `[num_labels]` (`False`: neither target nor background).

        Returns:
            [`UniHemaDetectionOutput`]
        """
        make_denoising = partial(self.denoising, labels) if self.training and labels is not None else None
        trunk = self.model(
            pixel_values,
            pixel_mask,
            input_ids,
            attention_mask,
            task="detection",
            make_denoising=make_denoising,
            return_dict=True,
            **_wanted(kwargs),
        )
        needed = trunk.decoder_states if labels is not None else trunk.decoder_states[-1:]
        logits, morphology = self.detection_head(needed)
        if trunk.query_padding is not None:
            logits = logits.masked_fill(trunk.query_padding[None, ..., None], NO_CELL)
        loss = loss_dict = None
        if labels is not None:
            noisy_logits = None
            if trunk.denoising_states is not None:
                noisy_logits, _ = self.detection_head(trunk.denoising_states)
            loss, loss_dict = detection_loss(
                logits,
                trunk.decoder_boxes,
                morphology,
                trunk.proposal_logits,
                trunk.proposal_boxes,
                labels,
                self.config,
                denoising=trunk.denoising_queries,
                denoising_logits=noisy_logits,
                denoising_boxes=trunk.denoising_boxes,
            )
        return UniHemaDetectionOutput(
            loss=loss,
            loss_dict=loss_dict,
            logits=logits[-1],
            pred_boxes=trunk.decoder_boxes[-1],
            pred_morphology=morphology[-1],
            last_hidden_state=trunk.last_hidden_state,
            encoder_last_hidden_state=trunk.encoder_last_hidden_state,
            **_layers(trunk),
        )


class UniHemaForSegmentation(UniHemaPreTrainedModel):
    """Semantic mask, at the image's own size, of what the prompt names."""

    tasks = ("segmentation",)
    # Where the queries look is chosen, not differentiated: only detection can teach it.
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
        UniHemaForSegmentation._build_head(self, config)
        self.post_init()
        self._freeze_parts()

    def _build_head(self, config: UniHemaConfig) -> None:
        self.mask_head = MaskHead(config)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor,
        pixel_mask: torch.LongTensor | None = None,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs,
    ) -> UniHemaSegmentationOutput:
        """
        Args:
            pixel_values (`torch.FloatTensor`): Normalised images `[B, 3, H, W]`.
            pixel_mask (`torch.LongTensor`, *optional*): `[B, H, W]`, 1 on the image, 0 on padding.
            input_ids (`torch.LongTensor`, *optional*): Prompt that names what to segment, `[B, L]`.
            attention_mask (`torch.LongTensor`, *optional*): `[B, L]`.
            labels (`torch.LongTensor`, *optional*): `[B, H, W]`: 1 cell, 0 background, -100 ignored.

        Returns:
            [`UniHemaSegmentationOutput`]
        """
        trunk = self.model(
            pixel_values,
            pixel_mask,
            input_ids,
            attention_mask,
            task="segmentation",
            return_dict=True,
            **_wanted(kwargs),
        )
        size, level = pixel_values.shape[-2:], trunk.mask_logits.shape[-2:]
        # A whole number of pixels to a cell of the level, then cut: padding at the end does not stretch the mask.
        whole = size
        if not self.config.attend_to_padding:
            whole = [cells * stride for cells, stride in zip(level, strides(size, level))]
        mask_logits = self.mask_head(trunk.mask_logits, trunk.mask_features, whole, trunk.mask_valid)
        mask_logits = mask_logits[:, : size[0], : size[1]]
        loss = loss_dict = None
        if labels is not None:
            loss, loss_dict = segmentation_loss(
                mask_logits,
                labels,
                dice_loss_coefficient=self.config.dice_loss_coefficient,
                focal_loss_coefficient=self.config.focal_loss_coefficient,
                dice_over=self.config.dice_over,
            )
        return UniHemaSegmentationOutput(
            loss=loss,
            loss_dict=loss_dict,
            mask_logits=mask_logits,
            encoder_last_hidden_state=trunk.encoder_last_hidden_state,
            **_layers(trunk),
        )


class UniHemaForImageClassification(UniHemaPreTrainedModel):
    """Class of a single-cell crop."""

    tasks = ("single_cell",)
    _keys_to_ignore_on_load_unexpected = skippable_keys(tasks)

    def __init__(self, config: UniHemaConfig):
        super().__init__(config)
        self.model = UniHemaModel(config, self.tasks)
        config.single_cell_labels = config.given_labels or config.single_cell_labels
        UniHemaForImageClassification._build_head(self, config)
        self.post_init()

    def _build_head(self, config: UniHemaConfig) -> None:
        self.single_cell_head = SingleCellHead(config)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor,
        pixel_mask: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs,
    ) -> UniHemaClassificationOutput:
        """
        Args:
            pixel_values (`torch.FloatTensor`): Normalised crops `[B, 3, H, W]`.
            pixel_mask (`torch.LongTensor`, *optional*): `[B, H, W]`, 1 on the image, 0 on padding.
            labels (`torch.LongTensor`, *optional*): `[B]`, indices into `config.single_cell_labels`; -100 ignored.

        Returns:
            [`UniHemaClassificationOutput`]
        """
        trunk = self.model(pixel_values, pixel_mask, task="single_cell", return_dict=True, **_wanted(kwargs))
        features = trunk.last_hidden_state[:, 0]
        logits = self.single_cell_head(features)
        loss = None if labels is None else single_cell_loss(logits, labels)
        return UniHemaClassificationOutput(
            loss=loss,
            loss_dict=None if loss is None else {"loss_single_cell": loss.detach()},
            logits=logits,
            features=features,
            encoder_hidden_states=trunk.encoder_hidden_states,
            encoder_attentions=trunk.encoder_attentions,
        )


class _QuestionEncoder:
    """What `generate` calls to encode: the question and its image, fused."""

    main_input_name = "input_ids"

    def __init__(self, trunk: UniHemaModel):
        self.trunk = trunk

    def forward(self, input_ids=None, attention_mask=None, pixel_values=None, pixel_mask=None, **kwargs):
        fused = self.trunk(
            pixel_values,
            pixel_mask,
            input_ids,
            attention_mask,
            task="question_answering",
            return_dict=True,
            **_wanted(kwargs),
        )
        return BaseModelOutput(fused.last_hidden_state, fused.encoder_hidden_states, fused.encoder_attentions)

    __call__ = forward


class UniHemaForQA(UniHemaPreTrainedModel, GenerationMixin):
    """Answers a question about an image, and fills in a masked sentence. Both are generated, looking at the image."""

    tasks = LANGUAGE_TASKS
    main_input_name = "input_ids"
    _keys_to_ignore_on_load_unexpected = skippable_keys(tasks)

    def __init__(self, config: UniHemaConfig):
        super().__init__(config)
        self.model = UniHemaModel(config, self.tasks)
        UniHemaForQA._build_head(self, config)
        self.post_init()

    def _build_head(self, config: UniHemaConfig) -> None:
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
        """What `generate` encodes a question and its image with."""
        return _QuestionEncoder(self.model)

    def get_decoder(self) -> nn.Module:
        """The T5 decoder."""
        return self.model.text_branch.decoder

    def prepare_decoder_input_ids_from_labels(self, labels: torch.LongTensor) -> torch.LongTensor:
        """Labels `[B, T]` shifted right behind the start token, -100 turned into padding."""
        start = labels.new_full((len(labels), 1), self.config.decoder_start_token_id)
        return torch.cat((start, labels[:, :-1].masked_fill(labels[:, :-1] == -100, self.config.pad_token_id)), 1)

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

        Returns:
            [`UniHemaLanguageOutput`]
        """
        wanted = {name: getattr(self.config, name) for name in LAYER_OPTIONS} | _wanted(kwargs)
        if encoder_outputs is None:
            encoder_outputs = self.get_encoder()(input_ids, attention_mask, pixel_values, pixel_mask, **wanted)
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
                raise ValueError("Give labels or decoder_input_ids, or call generate() for an answer.")
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        decoded = self.model.text_branch.decode(
            decoder_input_ids,
            fused,
            attention_mask,
            decoder_inputs_embeds=decoder_inputs_embeds,
            decoder_attention_mask=decoder_attention_mask,
            cache=past_key_values if cache is None else cache,
            use_cache=use_cache,
            **wanted,
        )
        states = decoded.last_hidden_state
        if self.config.output_head_is_scaled:
            states = states * self.config.text_config.d_model**-0.5
        logits = self.lm_head(states)
        loss = None if labels is None else text_loss(logits, labels)
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


class UniHemaForMultiTask(UniHemaForDetection, UniHemaForSegmentation, UniHemaForImageClassification, UniHemaForQA):
    """All heads on one trunk: what training trains and a full checkpoint holds.

    A batch holds one task. `generate` answers questions, as with [`UniHemaForQA`].
    """

    tasks = TASKS
    main_input_name = "input_ids"
    _frozen_parts = ()
    _keys_to_ignore_on_load_unexpected = None

    def __init__(self, config: UniHemaConfig):
        UniHemaPreTrainedModel.__init__(self, config)
        self.model = UniHemaModel(config)
        for head in UniHemaForMultiTask.__bases__:
            head._build_head(self, config)
        self.post_init()

    def forward(self, task: str | None = None, **inputs):
        """
        Args:
            task (`str`, *optional*): One of `TASKS`. When missing it is a language task if a decoder or encoder state is
                given, as `generate` does, and detection otherwise.
            **inputs: Those of the task's own class.

        Returns:
            The output of the task's own class.

        Raises:
            ValueError: Unknown task.
        """
        if task is None:
            generating = {"encoder_outputs", "decoder_input_ids", "past_key_values", "cache"} & inputs.keys()
            task = "question_answering" if generating else "detection"
        for head in UniHemaForMultiTask.__bases__:
            if task in head.tasks:
                return head.forward(self, **inputs)
        raise ValueError(f"Unknown task '{task}'; choose one of {', '.join(TASKS)}.")


# generate() checks a model's keyword arguments against the signature of its forward.
UniHemaForMultiTask.forward.__signature__ = inspect.signature(UniHemaForQA.forward).replace(
    parameters=[
        *list(inspect.signature(UniHemaForQA.forward).parameters.values())[:-1],
        inspect.Parameter("task", inspect.Parameter.KEYWORD_ONLY, default=None),
        list(inspect.signature(UniHemaForQA.forward).parameters.values())[-1],
    ]
)

__all__ = [
    "TASKS",
    "UniHemaForDetection",
    "UniHemaForImageClassification",
    "UniHemaForMultiTask",
    "UniHemaForQA",
    "UniHemaForSegmentation",
    "UniHemaModel",
    "UniHemaPreTrainedModel",
]
