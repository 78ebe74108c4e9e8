"""UniHema models: one class a task on a shared trunk, and one class with every head."""

import inspect
from functools import partial

import torch
from transformers.utils.generic import can_return_tuple

from .configuration_unihema import UniHemaConfig
from .denoising import ContrastiveDenoising
from .losses import detection_loss, segmentation_loss, single_cell_loss
from .outputs import (
    UniHemaClassificationOutput,
    UniHemaDetectionOutput,
    UniHemaModelOutput,
    UniHemaSegmentationOutput,
)
from .padding import strides
from .question_answering import UniHemaForQA
from .task_heads import DetectionHead, MaskHead, SingleCellHead
from .trunk import TASKS, UniHemaModel, UniHemaPreTrainedModel, layer_options, skippable_keys


# Logit of a query that has no token of its image to stand on; small enough for half precision.
NO_CELL = -1e4


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
                cxcywh in 0..1 relative to the image itself, optionally `morphology` `[n, attributes]` (-100 missing),
                `annotated_classes` `[num_labels]` (`False`: neither target nor background) and `boxes_known` `[n]`
                (`False`: the cell lies somewhere in its box).

        Returns:
            [`UniHemaDetectionOutput`]
        """
        self.follow_adapter()
        make_denoising = partial(self.denoising, labels) if self.training and labels is not None else None
        trunk = self.model(
            pixel_values,
            pixel_mask,
            input_ids,
            attention_mask,
            task="detection",
            make_denoising=make_denoising,
            return_dict=True,
            **layer_options(kwargs),
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
        self.follow_adapter()
        trunk = self.model(
            pixel_values,
            pixel_mask,
            input_ids,
            attention_mask,
            task="segmentation",
            return_dict=True,
            **layer_options(kwargs),
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
        self.follow_adapter()
        trunk = self.model(pixel_values, pixel_mask, task="single_cell", return_dict=True, **layer_options(kwargs))
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
