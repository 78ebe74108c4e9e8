"""The official state dict: where each of its tensors lives in ours, and what has no effect there.

Facts of the official code are in its README and were read off its state dict; see `docs/official.md`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass


_RESNET = "model.visual_backbone.backbone"
_FUSION = "model.hema_former.cross_modal_fusion"
_REFINEMENT = "model.hema_former.text_guided_visual_refinement"
_CELL = "model.hema_former.single_cell_feature_extraction"
_MASK = "model.hema_former.query_guided_mask_finder"
_ATTENTION = r"\.in_proj_(weight|bias)"

# Official pattern -> our key. `{q}` marks a stacked query/key/value projection that is three layers here.
_RENAMES = {
    r"backbone\.0\.body\.conv1\.(\w+)": rf"{_RESNET}.embedder.embedder.convolution.\1",
    r"backbone\.0\.body\.bn1\.(\w+)": rf"{_RESNET}.embedder.embedder.normalization.\1",
    r"backbone\.0\.body\.layer(\d)\.(\d+)\.conv(\d)\.(\w+)": (
        rf"{_RESNET}.encoder.stages.{{stage}}.layers.\2.layer.{{layer}}.convolution.\4"
    ),
    r"backbone\.0\.body\.layer(\d)\.(\d+)\.bn(\d)\.(\w+)": (
        rf"{_RESNET}.encoder.stages.{{stage}}.layers.\2.layer.{{layer}}.normalization.\4"
    ),
    r"backbone\.0\.body\.layer(\d)\.(\d+)\.downsample\.0\.(\w+)": (
        rf"{_RESNET}.encoder.stages.{{stage}}.layers.\2.shortcut.convolution.\3"
    ),
    r"backbone\.0\.body\.layer(\d)\.(\d+)\.downsample\.1\.(\w+)": (
        rf"{_RESNET}.encoder.stages.{{stage}}.layers.\2.shortcut.normalization.\3"
    ),
    r"input_proj\.(\d+)\.([01])\.(\w+)": r"model.visual_backbone.input_projection.\1.\2.\3",
    r"T5_model\.shared\.weight": "model.text_branch.shared.weight",
    r"T5_model\.lm_head\.weight": "lm_head.weight",
    r"T5_model\.(encoder|decoder)\.((?:block|final_layer_norm)\..+)": r"model.text_branch.\1.\2",
    r"transformer\.level_embed": "model.image_encoder.level_embedding",
    r"transformer\.encoder\.layers\.(\d+)\.self_attn\.(.+)": r"model.image_encoder.layers.\1.self_attention.\2",
    r"transformer\.encoder\.layers\.(\d+)\.norm1\.(\w+)": r"model.image_encoder.layers.\1.self_attention_norm.\2",
    r"transformer\.encoder\.layers\.(\d+)\.(linear[12]\.\w+)": r"model.image_encoder.layers.\1.feed_forward.\2",
    r"transformer\.encoder\.layers\.(\d+)\.norm2\.(\w+)": r"model.image_encoder.layers.\1.feed_forward_norm.\2",
    r"transformer\.enc_output\.(\w+)": r"model.query_selection.token_projection.\1",
    r"transformer\.enc_output_norm\.(\w+)": r"model.query_selection.token_norm.\1",
    r"transformer\.enc_out_class_embed\.(\w+)": r"model.query_selection.class_head.\1",
    r"transformer\.enc_out_bbox_embed\.(layers\..+)": r"model.query_selection.box_head.\1",
    r"transformer\.tgt_embed\.weight": "model.query_selection.content_queries.weight",
    rf"transformer\.decoder\.layers\.(\d+)\.self_attn{_ATTENTION}": (
        r"model.image_decoder.layers.\1.self_attention.{q}.\2"
    ),
    r"transformer\.decoder\.layers\.(\d+)\.self_attn\.out_proj\.(\w+)": (
        r"model.image_decoder.layers.\1.self_attention.o_proj.\2"
    ),
    r"transformer\.decoder\.layers\.(\d+)\.norm2\.(\w+)": r"model.image_decoder.layers.\1.self_attention_norm.\2",
    r"transformer\.decoder\.layers\.(\d+)\.cross_attn\.(.+)": r"model.image_decoder.layers.\1.cross_attention.\2",
    r"transformer\.decoder\.layers\.(\d+)\.norm1\.(\w+)": r"model.image_decoder.layers.\1.cross_attention_norm.\2",
    r"transformer\.decoder\.layers\.(\d+)\.(linear[12]\.\w+)": r"model.image_decoder.layers.\1.feed_forward.\2",
    r"transformer\.decoder\.layers\.(\d+)\.norm3\.(\w+)": r"model.image_decoder.layers.\1.feed_forward_norm.\2",
    r"transformer\.decoder\.norm\.(\w+)": r"model.image_decoder.norm.\1",
    r"transformer\.decoder\.ref_point_head\.(layers\..+)": r"model.image_decoder.position_head.\1",
    r"bbox_embed\.0\.(layers\..+)": r"model.image_decoder.box_head.\1",
    r"class_embed\.0\.(\w+)": r"detection_head.class_head.\1",
    r"morphology_embed\.0\.(\w+)": r"detection_head.morphology_head.\1",
    r"label_enc\.weight": "denoising.label_embedding.weight",
    r"xformer\.queries": f"{_FUSION}.queries",
    r"xformer\.txt_proj\.(\w+)": rf"{_FUSION}.text_projection.\1",
    r"xformer\.img_proj\.(\w+)": rf"{_FUSION}.image_projection.\1",
    r"xformer\.out_proj\.(\w+)": rf"{_FUSION}.output_projection.\1",
    rf"xformer\.layers\.(\d+)\.cross_attn_img{_ATTENTION}": rf"{_FUSION}.blocks.\1.image_attention.{{q}}.\2",
    rf"xformer\.layers\.(\d+)\.cross_attn_txt{_ATTENTION}": rf"{_FUSION}.blocks.\1.text_attention.{{q}}.\2",
    r"xformer\.layers\.(\d+)\.cross_attn_img\.out_proj\.(\w+)": rf"{_FUSION}.blocks.\1.image_attention.o_proj.\2",
    r"xformer\.layers\.(\d+)\.cross_attn_txt\.out_proj\.(\w+)": rf"{_FUSION}.blocks.\1.text_attention.o_proj.\2",
    r"xformer\.layers\.(\d+)\.norm1\.(\w+)": rf"{_FUSION}.blocks.\1.image_norm.\2",
    r"xformer\.layers\.(\d+)\.norm2\.(\w+)": rf"{_FUSION}.blocks.\1.text_norm.\2",
    r"xformer\.layers\.(\d+)\.ffn\.([02]\.\w+)": rf"{_FUSION}.blocks.\1.feed_forward.\2",
    r"xformer\.layers\.(\d+)\.norm3\.(\w+)": rf"{_FUSION}.blocks.\1.feed_forward_norm.\2",
    r"transformer\.text_proj\.(\w+)": rf"{_REFINEMENT}.text_projection.\1",
    rf"transformer\.cross_attnn{_ATTENTION}": rf"{_REFINEMENT}.attention.{{q}}.\1",
    r"transformer\.cross_attnn\.out_proj\.(\w+)": rf"{_REFINEMENT}.attention.o_proj.\1",
    r"transformer\.gate_mlp\.0\.(\w+)": rf"{_REFINEMENT}.gate.layers.0.\1",
    r"transformer\.gate_mlp\.2\.(\w+)": rf"{_REFINEMENT}.gate.layers.1.\1",
    r"transformer\.encoder\.cls_token": f"{_CELL}.query",
    r"transformer\.encoder\.fuse_proj\.(\w+)": rf"{_CELL}.projection.\1",
    r"transformer\.encoder\.mask_feature_proj\.0\.(\w+)": rf"{_MASK}.encoder_projection.\1",
    r"transformer\.encoder\.mask_features\.(\w+)": rf"{_MASK}.backbone_projection.\1",
    r"decoder_norm\.(\w+)": rf"{_MASK}.query_norm.\1",
    r"mask_embed\.(layers\..+)": rf"{_MASK}.query_head.\1",
    r"classifier_image\.classifier2\.([036]\.\w+)": r"single_cell_head.layers.\1",
    r"upsampler\.fusion_conv\.([01])\.(\w+)": r"mask_head.features.0.\1.\2",
    r"upsampler\.fusion_conv\.3\.(\w+)": r"mask_head.features.1.0.\1",
    r"upsampler\.fusion_conv\.4\.(\w+)": r"mask_head.features.1.1.\1",
    r"upsampler\.upsample\.1\.(\w+)": r"mask_head.upsample.0.0.\1",
    r"upsampler\.upsample\.2\.(\w+)": r"mask_head.upsample.0.1.\1",
    r"upsampler\.upsample\.5\.(\w+)": r"mask_head.upsample.1.0.\1",
    r"upsampler\.upsample\.6\.(\w+)": r"mask_head.upsample.1.1.\1",
    r"upsampler\.upsample\.8\.(\w+)": r"mask_head.output.\1",
}
_RENAMES = {re.compile(pattern): ours for pattern, ours in _RENAMES.items()}

# Copies of one tensor under several names: pattern -> the name that is read.
_COPIES = {
    re.compile(r"T5_model\.(?:encoder|decoder)\.embed_tokens\.weight"): "T5_model.shared.weight",
    re.compile(r"(class_embed|morphology_embed|bbox_embed)\.[1-9]\d*\.(.+)"): r"\1.0.\2",
    re.compile(r"transformer\.decoder\.(class_embed|bbox_embed)\.\d+\.(.+)"): r"\1.0.\2",
}

_DEAD = {
    re.compile(r"transformer\.encoder\.cls_fusion\..+"): "layer that is built and never called",
    re.compile(r"transformer\.encoder\.cls_pos"): "position of the class token, which never attends",
    re.compile(r"transformer\.(?:combined_proj|decoder_norm|class_embed|label_enc|mask_embed)\..+"): (
        "built in the transformer and never called; the module of that name outside it is the one used"
    ),
    re.compile(r"class_(?:pos_)?tokens\.\d+"): "class-token feature level, computed and dropped",
    re.compile(r"class_embed_seg\..+"): "its output is dropped",
}


class OfficialKeyError(ValueError):
    """A tensor of an official state dict that is not known, is missing, or has a shape that does not fit."""


@dataclass(frozen=True)
class OfficialKey:
    """What becomes of one tensor of the official state dict.

    Args:
        ours (`tuple[str, ...]`): Our keys: three for a stacked query/key/value projection, none when not read.
        reason (`str`): Why it is not read; empty when it is.
        copy_of (`str`): The official key that holds the same values, when this one is not read for that reason.
    """

    ours: tuple[str, ...]
    reason: str = ""
    copy_of: str = ""


def translate(key: str) -> OfficialKey:
    """What becomes of an official key.

    Args:
        key (`str`): A key of the official state dict, without a `module.` prefix.

    Raises:
        OfficialKeyError: No such tensor is known.
    """
    for pattern, original in _COPIES.items():
        if match := pattern.fullmatch(key):
            original = match.expand(original)
            return OfficialKey((), f"the same tensor as {original}", original)
    for pattern, reason in _DEAD.items():
        if pattern.fullmatch(key):
            return OfficialKey((), reason)
    for pattern, ours in _RENAMES.items():
        if match := pattern.fullmatch(key):
            return OfficialKey(tuple(_expand(match, ours)))
    raise OfficialKeyError(f"{key}: no such tensor is known of the official model.")


def _expand(match: re.Match, ours: str) -> Iterator[str]:
    if "{stage}" in ours:
        layer = int(match[3]) - 1 if "{layer}" in ours else ""
        ours = ours.replace("{stage}", str(int(match[1]) - 1)).replace("{layer}", str(layer))
    projections = ("q_proj", "k_proj", "v_proj") if "{q}" in ours else ("",)
    for projection in projections:
        yield match.expand(ours.replace("{q}", projection))


__all__ = ["OfficialKey", "OfficialKeyError", "translate"]
