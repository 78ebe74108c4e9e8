"""The trunk: image and text in, the states that a task's head reads out (Uni-Hema, arXiv 2511.13889, figure 2)."""

from collections.abc import Callable

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .adapters import WithAdapters
from .attention import MultiHeadAttention
from .configuration_unihema import UniHemaConfig
from .deformable_attention import MultiScaleDeformableAttention
from .hema_former import CrossModalFusion, HemaFormer, SingleCellFeatureExtraction
from .image_decoder import ImageDecoder, ImageDecoderLayer, QuerySelection
from .image_encoder import ImageEncoder, ImageEncoderLayer
from .image_memory import ImageMemory
from .inference_linear import with_inference_linears
from .outputs import UniHemaModelOutput
from .text_branch import TextBranch
from .visual_backbone import FeatureLevels, VisualBackbone


_QUERIES = {"image_encoder", "query_selection", "text_guided_visual_refinement", "image_decoder", "text_encoder"}
_LANGUAGE = {"text_encoder", "text_decoder", "cross_modal_fusion"}

# What each task runs, beside the visual backbone. Nothing else is built or computed.
TASK_PARTS = {
    "detection": _QUERIES,
    "segmentation": _QUERIES | {"query_guided_mask_finder"},
    "single_cell": {"image_encoder", "single_cell_feature_extraction"},
    "question_answering": _LANGUAGE,
    "cloze": _LANGUAGE,
}
TASKS = tuple(TASK_PARTS)
LANGUAGE_TASKS = ("question_answering", "cloze")

# Where each part, and each task's head, lives in a state dict: what a class does not build it may skip in a checkpoint.
_PART_KEYS = {
    "image_encoder": r"^model\.image_encoder\.",
    "query_selection": r"^model\.query_selection\.",
    "image_decoder": r"^model\.image_decoder\.",
    "text_encoder": r"^model\.text_branch\.(shared|encoder)\.",
    "text_decoder": r"^model\.text_branch\.decoder\.",
    "cross_modal_fusion": r"^model\.hema_former\.cross_modal_fusion\.",
    "text_guided_visual_refinement": r"^model\.hema_former\.text_guided_visual_refinement\.",
    "single_cell_feature_extraction": r"^model\.hema_former\.single_cell_feature_extraction\.",
    "query_guided_mask_finder": r"^model\.hema_former\.query_guided_mask_finder\.",
}
_HEAD_KEYS = {
    "detection": r"^(detection_head|denoising)\.",
    "segmentation": r"^mask_head\.",
    "single_cell": r"^single_cell_head\.",
    "question_answering": r"^lm_head\.",
}


LAYER_OPTIONS = ("output_hidden_states", "output_attentions")


def layer_options(options: dict) -> dict[str, bool]:
    """Those of a head's further arguments that ask for states or weights of every layer."""
    return {name: options[name] for name in LAYER_OPTIONS if options.get(name) is not None}


def parts_of(tasks: tuple[str, ...], config: UniHemaConfig | None = None) -> set[str]:
    """Names of the parts that any of `tasks` runs, without those that `config` turns off."""
    parts = set().union(*(TASK_PARTS[task] for task in tasks))
    if config is not None and not config.cross_modal_fusion:
        parts -= {"cross_modal_fusion"}
    if config is not None and not config.text_guided_refinement:
        # Nothing else of a visual task reads the prompt.
        parts -= {"text_guided_visual_refinement"} | (set() if set(tasks) & set(LANGUAGE_TASKS) else {"text_encoder"})
    return parts


def skippable_keys(tasks: tuple[str, ...]) -> list[str]:
    """Patterns of the checkpoint keys that a class for `tasks` does not build."""
    parts = parts_of(tasks)
    if not set(tasks) & set(LANGUAGE_TASKS):
        # Without refinement by the prompt a visual task has no text encoder.
        parts -= {"text_encoder"}
    missing_parts = [pattern for part, pattern in _PART_KEYS.items() if part not in parts]
    return missing_parts + [pattern for task, pattern in _HEAD_KEYS.items() if task not in tasks]


class UniHemaPreTrainedModel(WithAdapters, PreTrainedModel):
    """Initialisation and loading, common to all UniHema models."""

    config: UniHemaConfig
    config_class = UniHemaConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["VisualBackbone", "ImageEncoderLayer", "ImageDecoderLayer", "CrossModalFusionBlock"]
    _supports_sdpa = True
    # Parts that the loss of a class does not reach.
    _frozen_parts: tuple[str, ...] = ()

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """Loads a model, as [`~PreTrainedModel.from_pretrained`] does, which makes every parameter trainable; those of
        the parts that the loss of this class does not reach are frozen again."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model._freeze_parts()
        with_inference_linears(model)
        return loaded

    def post_init(self) -> None:
        """Initialises weights, and readies the linear layers for inference; those of weights still to be loaded later."""
        super().post_init()
        if self.device.type != "meta":
            with_inference_linears(self)

    def save_pretrained(self, save_directory, is_main_process: bool = True, **kwargs):
        """Saves the model, as [`~PreTrainedModel.save_pretrained`] does, with what came beside its weights and still belongs
        to them (see `unihema reference`)."""
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        reference, _ = self.__dict__.get("_image_reference", (None, None))
        if reference is not None and is_main_process:
            reference.save_with(self, save_directory)

    def _freeze_parts(self) -> None:
        for part in self._frozen_parts:
            self.get_submodule(part).requires_grad_(False)
        for module in self.modules():
            if isinstance(module, VisualBackbone):
                module.freeze_norms()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Xavier-uniform linears and convolutions, zero biases, standard normal queries and embeddings; and whatever a
        layer was marked with: see `initialised`."""
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


class UniHemaModel(UniHemaPreTrainedModel):
    """The trunk: everything but the heads.

    Args:
        config ([`UniHemaConfig`]): The configuration.
        tasks (`tuple[str, ...]`): Tasks whose parts to build; all of them by default.

    Attributes:
        image_memory ([`ImageMemory`]): What inference keeps of the images last looked at; `image_memory.forget()` frees it.
    """

    _can_record_outputs = {
        "encoder_hidden_states": OutputRecorder(ImageEncoderLayer),
        "encoder_attentions": OutputRecorder(MultiScaleDeformableAttention, index=1, layer_name="self_attention"),
        "decoder_hidden_states": OutputRecorder(ImageDecoderLayer),
        "decoder_attentions": OutputRecorder(MultiHeadAttention, index=1, layer_name="self_attention"),
        "cross_attentions": OutputRecorder(MultiScaleDeformableAttention, index=1, layer_name="cross_attention"),
    }

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
        self.image_memory = ImageMemory()
        # The second stage of training teaches the text branch alone: E_W is E_T then. Never saved.
        self.reads_text_alone = False
        self._keys_to_ignore_on_load_unexpected = [
            pattern for head in _HEAD_KEYS.values() for pattern in (head, head.replace("^", "^model."))
        ]
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The text branch's token embedding.

        Raises:
            NotImplementedError: The model was built for a task that reads no text.
        """
        if "text_branch" not in self._modules:
            raise NotImplementedError("This model reads no text, so it has no token embedding.")
        return self.text_branch.shared

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the text branch's token embedding."""
        self.text_branch.shared = value

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor,
        pixel_mask: torch.LongTensor | None = None,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        task: str = "detection",
        make_denoising: Callable | None = None,
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
            make_denoising (`Callable`, *optional*): From the number of queries to `DenoisingQueries`; training only.
            output_hidden_states (`bool`, *optional*): Also return the states of every layer.
            output_attentions (`bool`, *optional*): Also return the attention weights of every layer. Those between
                queries and of the text branch need `attn_implementation="eager"`.

        Returns:
            [`UniHemaModelOutput`]

        Raises:
            ValueError: Unknown task, no text where a question is needed, or a text batch that is no multiple of the
                images.
        """
        if task not in TASK_PARTS:
            raise ValueError(f"Unknown task '{task}'; choose one of {', '.join(TASKS)}.")
        if pixel_values is None and not (self.reads_text_alone and task in LANGUAGE_TASKS):
            raise ValueError("pixel_values is missing: every task of UniHema looks at an image.")
        states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        weights = self.config.output_attentions if output_attentions is None else output_attentions
        if task in LANGUAGE_TASKS:
            return self._fuse_with_text(pixel_values, pixel_mask, input_ids, attention_mask, states, weights)
        levels = self.image_memory.levels(self.visual_backbone, pixel_values, pixel_mask)
        recorded = {f"output_{name}": states if "hidden" in name else weights for name in self._can_record_outputs}
        # Cross-attentions are recorded under the name of the attentions, whatever their own says.
        recorded["output_attentions"] = weights
        output = self._look(levels, input_ids, attention_mask, task, make_denoising, return_dict=True, **recorded)
        if states:
            output["encoder_hidden_states"] = (levels.tokens, *output.encoder_hidden_states)
            if output.refined_queries is not None:
                queries = output.refined_queries.shape[1]
                layers = [
                    layer if layer.shape[1] == queries else layer[:, -queries:]
                    for layer in output.decoder_hidden_states
                ]
                output["decoder_hidden_states"] = (output.refined_queries, *layers)
        return output

    @capture_outputs
    def _look(
        self,
        levels: FeatureLevels,
        input_ids,
        attention_mask,
        task: str,
        make_denoising: Callable | None,
        **recorded,
    ) -> UniHemaModelOutput:
        if any(recorded.values()):
            # What is recorded is recorded while the layers run.
            tokens = self.image_encoder(levels.tokens, levels)
        else:
            tokens = self.image_memory.tokens(self.image_encoder, levels)
        if task == "single_cell":
            feature = self.hema_former.single_cell_feature_extraction(tokens, levels)
            return UniHemaModelOutput(last_hidden_state=feature[:, None], encoder_last_hidden_state=tokens)

        text = None
        if self.config.text_guided_refinement:
            input_ids, attention_mask = self._prompt(task, input_ids, attention_mask, tokens.shape[0])
            input_ids, attention_mask = self._official_length(input_ids, attention_mask)
            text = self.text_branch.encode_prompt(input_ids, attention_mask)
        proposals = self.query_selection(tokens, levels)
        content, reference = proposals.content, proposals.reference_logits
        denoising = make_denoising(content.shape[1]) if make_denoising is not None else None
        if denoising is not None:
            content = torch.cat((denoising.content.to(content.dtype), content), 1)
            reference = torch.cat((denoising.reference_logits.to(reference.dtype), reference), 1)
        if text is not None:
            content = self.hema_former.text_guided_visual_refinement(content, text, attention_mask)
        states, boxes = self.image_decoder(content, reference, tokens, levels, denoising, proposals.padding)
        noisy = 0 if denoising is None else denoising.content.shape[1]
        output = UniHemaModelOutput(
            last_hidden_state=states[-1, :, noisy:],
            encoder_last_hidden_state=tokens,
            text_hidden_state=text,
            decoder_states=states[:, :, noisy:],
            decoder_boxes=boxes[:, :, noisy:],
            denoising_states=states[:, :, :noisy] if noisy else None,
            denoising_boxes=boxes[:, :, :noisy] if noisy else None,
            denoising_queries=denoising,
            proposal_logits=proposals.logits,
            proposal_boxes=proposals.boxes,
            proposal_indices=proposals.token_indices,
            query_padding=proposals.padding,
            refined_queries=content[:, noisy:] if noisy else content,
        )
        if task == "segmentation":
            output["mask_logits"], output["mask_features"] = self.hema_former.query_guided_mask_finder(
                states[-1, :, :1], tokens, levels
            )
            if levels.padded and not self.config.attend_to_padding:
                output["mask_valid"] = levels.valid[0]
        return output

    def _fuse_with_text(
        self, pixel_values, pixel_mask, input_ids, attention_mask, output_hidden_states, output_attentions
    ) -> UniHemaModelOutput:
        if input_ids is None:
            raise ValueError("input_ids is missing: a question or a masked sentence is needed to generate text.")
        if attention_mask is None:
            attention_mask = (input_ids != self.config.pad_token_id).long()
        length = input_ids.shape[1]
        input_ids, attention_mask = self._official_length(input_ids, attention_mask)
        text = self.text_branch.encode(
            input_ids, attention_mask, output_hidden_states=output_hidden_states, output_attentions=output_attentions
        )
        fused = text.last_hidden_state
        if self.config.cross_modal_fusion and not self.reads_text_alone:
            levels = self._levels_for(len(input_ids), pixel_values, pixel_mask)
            fused = self.hema_former.cross_modal_fusion(fused, attention_mask, levels)
        return UniHemaModelOutput(
            last_hidden_state=fused[:, :length],
            text_hidden_state=text.last_hidden_state[:, :length],
            encoder_hidden_states=text.hidden_states,
            encoder_attentions=text.attentions,
        )

    def _levels_for(self, texts: int, pixel_values, pixel_mask) -> FeatureLevels:
        """The image's feature levels, once for each text."""
        images = pixel_values.shape[0]
        if texts % images:
            raise ValueError(f"{texts} texts for {images} images: give every image the same number of texts.")
        levels = self.image_memory.levels(self.visual_backbone, pixel_values, pixel_mask)
        return levels.repeat_images(texts // images) if texts > images else levels

    def _official_length(self, input_ids, attention_mask) -> tuple[torch.Tensor, torch.Tensor]:
        """The official model pads every text to its limit, and its padding takes part."""
        missing = self.config.fusion_queries - input_ids.shape[1]
        if not self.config.attend_to_padding or missing <= 0:
            return input_ids, attention_mask
        pad = torch.nn.functional.pad
        return pad(input_ids, (0, missing), value=self.config.pad_token_id), pad(attention_mask, (0, missing))

    def _prompt(self, task: str, input_ids, attention_mask, images: int) -> tuple[torch.Tensor, torch.Tensor]:
        if input_ids is None:
            ids = self.config.default_prompt_ids.get(task, [self.config.text_config.eos_token_id])
            input_ids = torch.tensor([ids], device=self.device).expand(images, -1)
        if attention_mask is None:
            attention_mask = (input_ids != self.config.pad_token_id).long()
        return input_ids, attention_mask
