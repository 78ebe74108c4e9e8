"""What the models return."""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import Seq2SeqLMOutput
from transformers.utils import ModelOutput

from .visual_backbone import FeatureLevels


@dataclass
class UniHemaImageFeatures(ModelOutput):
    """Image features that all tasks share. Passed on as `image_features=`, the images are encoded once.

    Args:
        levels (`FeatureLevels`): The projected feature levels.
        last_hidden_state (`torch.FloatTensor`): Encoded image tokens `[B, S, d]`; `None` where no task at hand reads them.
        pooler_output (`torch.FloatTensor`): Mean of each channel of the backbone's maps over the image, float32 `[B, D]`.
        image_size (`tuple[int, int]`): Height and width of `pixel_values`, padding included.
    """

    levels: FeatureLevels | None = None
    last_hidden_state: torch.FloatTensor | None = None
    pooler_output: torch.FloatTensor | None = None
    image_size: tuple[int, int] | None = None


@dataclass
class UniHemaPromptFeatures(ModelOutput):
    """Prompt features for the content queries. Passed on as `prompt_features=`, the prompt is encoded once.

    Args:
        last_hidden_state (`torch.FloatTensor`): Text encoder states `[B, L, text width]`.
        attention_mask (`torch.LongTensor`): `[B, L]`, 0 on padding.
    """

    last_hidden_state: torch.FloatTensor | None = None
    attention_mask: torch.LongTensor | None = None


@dataclass
class UniHemaModelOutput(ModelOutput):
    """States of the trunk for one task. Fields of parts that the task does not run are `None`.

    Args:
        last_hidden_state (`torch.FloatTensor`): What the task's head reads: decoder queries `[B, Q, d]` for detection
            and segmentation, the single-cell feature `[B, 1, d]`, or the fused text and image `[B, L, text width]`.
        encoder_last_hidden_state (`torch.FloatTensor`): Encoded image tokens `[B, S, d]`.
        text_hidden_state (`torch.FloatTensor`): Text encoder states `[B, L, text width]`.
        decoder_states (`torch.FloatTensor`): Normalised queries of each decoder layer `[layers, B, Q, d]`.
        decoder_boxes (`torch.FloatTensor`): Boxes cxcywh of each decoder layer `[layers, B, Q, 4]`, relative to the
            image itself.
        denoising_states (`torch.FloatTensor`): As `decoder_states`, of the denoising queries (training only).
        denoising_boxes (`torch.FloatTensor`): As `decoder_boxes`, of the denoising queries.
        denoising_queries (`DenoisingQueries`): How the denoising queries were made.
        proposal_logits (`torch.FloatTensor`): Class logits of the selected tokens `[B, Q, num_labels]`.
        proposal_boxes (`torch.FloatTensor`): Boxes cxcywh of the selected tokens `[B, Q, 4]`.
        proposal_indices (`torch.LongTensor`): Which token each query came from `[B, Q]`.
        refined_queries (`torch.FloatTensor`): Content queries after TextGuidedVisualRefinement `[B, Q, d]`.
        query_padding (`torch.BoolTensor`): `[B, Q]`, `True` for queries made from padding because the image had too few
            tokens; padded batches only.
        mask_logits (`torch.FloatTensor`): Mask of query 0 at the finest level `[B, 1, h, w]`.
        mask_features (`torch.FloatTensor`): The maps it was made from `[B, 2d, h, w]`.
        mask_valid (`torch.BoolTensor`): Which of their pixels are image `[B, h, w]`; padded batches only.
        cell_mask_queries (`torch.FloatTensor`): Queries as the mask finder takes them `[B, Q, d]`; detection with masks of cells.
        cell_mask_pixels (`torch.FloatTensor`): Pixels of the finest level as it takes them `[B, d, h, w]`.
        cell_mask_ratios (`torch.FloatTensor`): Share of that level's (width, height) that is image, `[B or 1, 2]`.
        encoder_hidden_states (`tuple[torch.FloatTensor, ...]`): Input and output of the image encoder's layers
            `[B, S, d]`; for language tasks of the text encoder's `[B, L, text width]`. On request, as all below.
        encoder_attentions (`tuple[torch.FloatTensor, ...]`): Sampling weights of each encoder layer
            `[B, S, heads, levels, points]`; for language tasks `[B, heads, L, L]`.
        decoder_hidden_states (`tuple[torch.FloatTensor, ...]`): Queries before the decoder and after each of its layers,
            without the norm, `[B, Q, d]`.
        decoder_attentions (`tuple[torch.FloatTensor, ...]`): Between queries `[B, heads, Q, Q]`.
        cross_attentions (`tuple[torch.FloatTensor, ...]`): Sampling weights of the queries
            `[B, Q, heads, levels, points]`.
    """

    last_hidden_state: torch.FloatTensor | None = None
    encoder_last_hidden_state: torch.FloatTensor | None = None
    text_hidden_state: torch.FloatTensor | None = None
    decoder_states: torch.FloatTensor | None = None
    decoder_boxes: torch.FloatTensor | None = None
    denoising_states: torch.FloatTensor | None = None
    denoising_boxes: torch.FloatTensor | None = None
    denoising_queries: object | None = None
    proposal_logits: torch.FloatTensor | None = None
    proposal_boxes: torch.FloatTensor | None = None
    proposal_indices: torch.LongTensor | None = None
    refined_queries: torch.FloatTensor | None = None
    query_padding: torch.BoolTensor | None = None
    mask_logits: torch.FloatTensor | None = None
    mask_features: torch.FloatTensor | None = None
    mask_valid: torch.BoolTensor | None = None
    cell_mask_queries: torch.FloatTensor | None = None
    cell_mask_pixels: torch.FloatTensor | None = None
    cell_mask_ratios: torch.FloatTensor | None = None
    encoder_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    encoder_attentions: tuple[torch.FloatTensor, ...] | None = None
    decoder_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    decoder_attentions: tuple[torch.FloatTensor, ...] | None = None
    cross_attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class UniHemaDetectionOutput(ModelOutput):
    """Cells of a field of view.

    Args:
        loss (`torch.FloatTensor`): Weighted sum of `loss_dict`, when labels are given.
        loss_dict (`dict[str, torch.Tensor]`): Unweighted losses by name.
        logits (`torch.FloatTensor`): Class logits `[B, Q, num_labels]`; their sigmoid is the score.
        pred_boxes (`torch.FloatTensor`): Boxes cxcywh `[B, Q, 4]` in 0..1, relative to the image itself.
        pred_morphology (`torch.FloatTensor`): Logits `[B, Q, all values]`, attributes concatenated in the order of
            `config.morphology`; a softmax over each attribute's own values gives its probabilities.
        cell_mask_queries, cell_mask_pixels, cell_mask_ratios:
            Of a checkpoint trained on masks of cells (`config.trained.cell_masks`), see [`UniHemaModelOutput`]; `find_cells`
            and `cell_mask_logits` make masks of them.
        last_hidden_state (`torch.FloatTensor`): Decoder queries `[B, Q, d]`.
        encoder_last_hidden_state (`torch.FloatTensor`): Encoded image tokens `[B, S, d]`.
        encoder_hidden_states, encoder_attentions, decoder_hidden_states, decoder_attentions, cross_attentions:
            Of each layer, on request: see [`UniHemaModelOutput`].
    """

    loss: torch.FloatTensor | None = None
    loss_dict: dict[str, torch.Tensor] | None = None
    logits: torch.FloatTensor | None = None
    pred_boxes: torch.FloatTensor | None = None
    pred_morphology: torch.FloatTensor | None = None
    cell_mask_queries: torch.FloatTensor | None = None
    cell_mask_pixels: torch.FloatTensor | None = None
    cell_mask_ratios: torch.FloatTensor | None = None
    last_hidden_state: torch.FloatTensor | None = None
    encoder_last_hidden_state: torch.FloatTensor | None = None
    encoder_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    encoder_attentions: tuple[torch.FloatTensor, ...] | None = None
    decoder_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    decoder_attentions: tuple[torch.FloatTensor, ...] | None = None
    cross_attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class UniHemaSegmentationOutput(ModelOutput):
    """Semantic mask of what the prompt names.

    Args:
        loss (`torch.FloatTensor`): Weighted sum of `loss_dict`, when labels are given.
        loss_dict (`dict[str, torch.Tensor]`): Unweighted losses by name.
        mask_logits (`torch.FloatTensor`): `[B, H, W]` at the size of `pixel_values`, padding included.
        encoder_last_hidden_state (`torch.FloatTensor`): Encoded image tokens `[B, S, d]`.
        encoder_hidden_states, encoder_attentions, decoder_hidden_states, decoder_attentions, cross_attentions:
            Of each layer, on request: see [`UniHemaModelOutput`].
    """

    loss: torch.FloatTensor | None = None
    loss_dict: dict[str, torch.Tensor] | None = None
    mask_logits: torch.FloatTensor | None = None
    encoder_last_hidden_state: torch.FloatTensor | None = None
    encoder_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    encoder_attentions: tuple[torch.FloatTensor, ...] | None = None
    decoder_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    decoder_attentions: tuple[torch.FloatTensor, ...] | None = None
    cross_attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class UniHemaClassificationOutput(ModelOutput):
    """Class of a single-cell image.

    Args:
        loss (`torch.FloatTensor`): Cross-entropy, when labels are given.
        logits (`torch.FloatTensor`): `[B, classes]` in the order of `config.single_cell_labels`.
        features (`torch.FloatTensor`): Single-cell feature `[B, d]`.
        encoder_hidden_states, encoder_attentions:
            Of each layer, on request: see [`UniHemaModelOutput`].
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    features: torch.FloatTensor | None = None
    encoder_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    encoder_attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class UniHemaLanguageOutput(Seq2SeqLMOutput):
    """Token logits `[B, T, vocabulary]` of an answer or a completed sentence.

    `encoder_last_hidden_state` is the fused text and image. The other fields are those of T5.

    Args:
        loss_dict (`dict[str, torch.Tensor]`): The loss by name, when labels are given.
    """

    loss_dict: dict[str, torch.Tensor] | None = None
