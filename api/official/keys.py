"""The names of the official state dict: where each tensor lives in ours, and what has no effect there.

One table serves both directions. `{n}` stands for a number, `{w}` for `weight`, `bias` and the like, `{*}` for the rest
of a name, and `{q}` on our side for the three layers that the official model stacks into one projection.
"""

import re
from dataclasses import dataclass

from unihema.errors import InputError
from unihema.modeling_unihema.configuration_unihema import UniHemaConfig


_RESNET, _OURS_RESNET = "backbone.0.body", "model.visual_backbone.backbone"
_ENCODER, _OURS_ENCODER = "transformer.encoder.layers.{n}", "model.image_encoder.layers.{n}"
_DECODER, _OURS_DECODER = "transformer.decoder.layers.{n}", "model.image_decoder.layers.{n}"
_SELECTION = "model.query_selection"
_FUSION, _OURS_FUSION = "xformer.layers.{n}", "model.hema_former.cross_modal_fusion"
_REFINEMENT = "model.hema_former.text_guided_visual_refinement"
_CELL = "model.hema_former.single_cell_feature_extraction"
_MASK = "model.hema_former.query_guided_mask_finder"

_NAMES = {
    f"{_RESNET}.conv1.{{w}}": f"{_OURS_RESNET}.embedder.embedder.convolution.{{w}}",
    f"{_RESNET}.bn1.{{w}}": f"{_OURS_RESNET}.embedder.embedder.normalization.{{w}}",
    "input_proj.{n}.{*}": "model.visual_backbone.input_projection.{n}.{*}",
    "T5_model.shared.weight": "model.text_branch.shared.weight",
    "T5_model.lm_head.weight": "lm_head.weight",
    "T5_model.encoder.block.{*}": "model.text_branch.encoder.block.{*}",
    "T5_model.decoder.block.{*}": "model.text_branch.decoder.block.{*}",
    "T5_model.encoder.final_layer_norm.weight": "model.text_branch.encoder.final_layer_norm.weight",
    "T5_model.decoder.final_layer_norm.weight": "model.text_branch.decoder.final_layer_norm.weight",
    "transformer.level_embed": "model.image_encoder.level_embedding",
    f"{_ENCODER}.self_attn.{{*}}": f"{_OURS_ENCODER}.self_attention.{{*}}",
    f"{_ENCODER}.norm1.{{w}}": f"{_OURS_ENCODER}.self_attention_norm.{{w}}",
    f"{_ENCODER}.linear1.{{w}}": f"{_OURS_ENCODER}.feed_forward.linear1.{{w}}",
    f"{_ENCODER}.linear2.{{w}}": f"{_OURS_ENCODER}.feed_forward.linear2.{{w}}",
    f"{_ENCODER}.norm2.{{w}}": f"{_OURS_ENCODER}.feed_forward_norm.{{w}}",
    "transformer.enc_output.{w}": f"{_SELECTION}.token_projection.{{w}}",
    "transformer.enc_output_norm.{w}": f"{_SELECTION}.token_norm.{{w}}",
    "transformer.enc_out_class_embed.{w}": f"{_SELECTION}.class_head.{{w}}",
    "transformer.enc_out_bbox_embed.{*}": f"{_SELECTION}.box_head.{{*}}",
    "transformer.tgt_embed.weight": f"{_SELECTION}.content_queries.weight",
    f"{_DECODER}.self_attn.in_proj_{{w}}": f"{_OURS_DECODER}.self_attention.{{q}}.{{w}}",
    f"{_DECODER}.self_attn.out_proj.{{w}}": f"{_OURS_DECODER}.self_attention.o_proj.{{w}}",
    f"{_DECODER}.norm2.{{w}}": f"{_OURS_DECODER}.self_attention_norm.{{w}}",
    f"{_DECODER}.cross_attn.{{*}}": f"{_OURS_DECODER}.cross_attention.{{*}}",
    f"{_DECODER}.norm1.{{w}}": f"{_OURS_DECODER}.cross_attention_norm.{{w}}",
    f"{_DECODER}.linear1.{{w}}": f"{_OURS_DECODER}.feed_forward.linear1.{{w}}",
    f"{_DECODER}.linear2.{{w}}": f"{_OURS_DECODER}.feed_forward.linear2.{{w}}",
    f"{_DECODER}.norm3.{{w}}": f"{_OURS_DECODER}.feed_forward_norm.{{w}}",
    "transformer.decoder.norm.{w}": "model.image_decoder.norm.{w}",
    "transformer.decoder.ref_point_head.{*}": "model.image_decoder.position_head.{*}",
    "bbox_embed.0.{*}": "model.image_decoder.box_head.{*}",
    "class_embed.0.{w}": "detection_head.class_head.{w}",
    "morphology_embed.0.{w}": "detection_head.morphology_head.{w}",
    "label_enc.weight": "denoising.label_embedding.weight",
    "xformer.queries": f"{_OURS_FUSION}.queries",
    "xformer.txt_proj.{w}": f"{_OURS_FUSION}.text_projection.{{w}}",
    "xformer.img_proj.{w}": f"{_OURS_FUSION}.image_projection.{{w}}",
    "xformer.out_proj.{w}": f"{_OURS_FUSION}.output_projection.{{w}}",
    f"{_FUSION}.cross_attn_img.in_proj_{{w}}": f"{_OURS_FUSION}.blocks.{{n}}.image_attention.{{q}}.{{w}}",
    f"{_FUSION}.cross_attn_img.out_proj.{{w}}": f"{_OURS_FUSION}.blocks.{{n}}.image_attention.o_proj.{{w}}",
    f"{_FUSION}.norm1.{{w}}": f"{_OURS_FUSION}.blocks.{{n}}.image_norm.{{w}}",
    f"{_FUSION}.cross_attn_txt.in_proj_{{w}}": f"{_OURS_FUSION}.blocks.{{n}}.text_attention.{{q}}.{{w}}",
    f"{_FUSION}.cross_attn_txt.out_proj.{{w}}": f"{_OURS_FUSION}.blocks.{{n}}.text_attention.o_proj.{{w}}",
    f"{_FUSION}.norm2.{{w}}": f"{_OURS_FUSION}.blocks.{{n}}.text_norm.{{w}}",
    f"{_FUSION}.ffn.{{*}}": f"{_OURS_FUSION}.blocks.{{n}}.feed_forward.{{*}}",
    f"{_FUSION}.norm3.{{w}}": f"{_OURS_FUSION}.blocks.{{n}}.feed_forward_norm.{{w}}",
    "transformer.text_proj.{w}": f"{_REFINEMENT}.text_projection.{{w}}",
    "transformer.cross_attnn.in_proj_{w}": f"{_REFINEMENT}.attention.{{q}}.{{w}}",
    "transformer.cross_attnn.out_proj.{w}": f"{_REFINEMENT}.attention.o_proj.{{w}}",
    "transformer.gate_mlp.0.{w}": f"{_REFINEMENT}.gate.layers.0.{{w}}",
    "transformer.gate_mlp.2.{w}": f"{_REFINEMENT}.gate.layers.1.{{w}}",
    "transformer.encoder.cls_token": f"{_CELL}.query",
    "transformer.encoder.fuse_proj.{w}": f"{_CELL}.projection.{{w}}",
    "transformer.encoder.mask_feature_proj.0.{w}": f"{_MASK}.encoder_projection.{{w}}",
    "transformer.encoder.mask_features.{w}": f"{_MASK}.backbone_projection.{{w}}",
    "decoder_norm.{w}": f"{_MASK}.query_norm.{{w}}",
    "mask_embed.{*}": f"{_MASK}.query_head.{{*}}",
    "classifier_image.classifier2.{*}": "single_cell_head.layers.{*}",
    "upsampler.fusion_conv.0.{w}": "mask_head.features.0.0.{w}",
    "upsampler.fusion_conv.1.{w}": "mask_head.features.0.1.{w}",
    "upsampler.fusion_conv.3.{w}": "mask_head.features.1.0.{w}",
    "upsampler.fusion_conv.4.{w}": "mask_head.features.1.1.{w}",
    "upsampler.upsample.1.{w}": "mask_head.upsample.0.0.{w}",
    "upsampler.upsample.2.{w}": "mask_head.upsample.0.1.{w}",
    "upsampler.upsample.5.{w}": "mask_head.upsample.1.0.{w}",
    "upsampler.upsample.6.{w}": "mask_head.upsample.1.1.{w}",
    "upsampler.upsample.8.{w}": "mask_head.output.{w}",
}
for _stage in range(4):
    _there, _here = f"{_RESNET}.layer{_stage + 1}.{{n}}", f"{_OURS_RESNET}.encoder.stages.{_stage}.layers.{{n}}"
    for _index, _part in ((0, "convolution"), (1, "normalization")):
        _NAMES[f"{_there}.downsample.{_index}.{{w}}"] = f"{_here}.shortcut.{_part}.{{w}}"
    for _layer in range(3):
        _NAMES[f"{_there}.conv{_layer + 1}.{{w}}"] = f"{_here}.layer.{_layer}.convolution.{{w}}"
        _NAMES[f"{_there}.bn{_layer + 1}.{{w}}"] = f"{_here}.layer.{_layer}.normalization.{{w}}"

# Several names of one tensor: the copies, and the name that is read.
_COPIES = {
    "T5_model.encoder.embed_tokens.weight": "T5_model.shared.weight",
    "T5_model.decoder.embed_tokens.weight": "T5_model.shared.weight",
    "transformer.decoder.class_embed.{n}.{*}": "class_embed.0.{*}",
    "transformer.decoder.bbox_embed.{n}.{*}": "bbox_embed.0.{*}",
    "class_embed.{n}.{*}": "class_embed.0.{*}",
    "bbox_embed.{n}.{*}": "bbox_embed.0.{*}",
    "morphology_embed.{n}.{*}": "morphology_embed.0.{*}",
}

_DEAD = {
    "transformer.encoder.cls_fusion.{*}": "a layer that is built and never called",
    "transformer.encoder.cls_pos": "position of the class token, which never attends",
    "transformer.combined_proj.{*}": "never called",
    "transformer.decoder_norm.{*}": "never called; decoder_norm is the one used",
    "transformer.class_embed.{*}": "never called; class_embed is the one used",
    "transformer.label_enc.{*}": "never called; label_enc is the one used",
    "transformer.mask_embed.{*}": "never called; mask_embed is the one used",
    "class_tokens.{n}": "class-token feature level, computed and dropped",
    "class_pos_tokens.{n}": "class-token feature level, computed and dropped",
    "class_embed_seg.{*}": "its output is dropped",
}

_HOLES = {"{n}": r"(?P<n>\d+)", "{w}": r"(?P<w>\w+)", "{*}": r"(?P<rest>.+)", "{q}": r"(?P<q>[qkv])_proj"}
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class OfficialKeyError(InputError):
    """A tensor of an official state dict that is not known, is missing, or has a shape that does not fit."""


@dataclass(frozen=True)
class OfficialKey:
    """What becomes of one tensor of the official state dict.

    Args:
        ours (`tuple[str, ...]`): Our keys: three for a stacked query/key/value projection, none when not read.
        reason (`str`): Why it is not read; empty when it is.
        copy_of (`str`): The official key that holds the same values, where that is the reason.
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
    for pattern, ours in _PATTERNS:
        if match := pattern.fullmatch(key):
            ours = _fill(ours, match)
            stacked = "{q}" in ours
            return OfficialKey(tuple(ours.replace("{q}", part) for part in (_PROJECTIONS if stacked else ("",))))
    for pattern, original in _COPY_PATTERNS:
        if match := pattern.fullmatch(key):
            original = _fill(original, match)
            return OfficialKey((), f"the same tensor as {original}", original)
    for pattern, reason in _DEAD_PATTERNS:
        if pattern.fullmatch(key):
            return OfficialKey((), reason)
    raise OfficialKeyError(f"{key}: no such tensor is known of the official model.")


def official_name(key: str) -> str:
    """The official key that our key comes from, the stacked one for a query, key or value projection.

    Args:
        key (`str`): A key of our state dict.

    Raises:
        OfficialKeyError: The official model has no such tensor.
    """
    for pattern, official in _REVERSE_PATTERNS:
        if match := pattern.fullmatch(key):
            return _fill(official, match)
    raise OfficialKeyError(f"{key}: the official model has no such tensor.")


def copies(config: UniHemaConfig) -> dict[str, str]:
    """Every further name of a tensor in an official state dict, and the name it is a copy of."""
    layers = config.decoder_layers
    linear = ("weight", "bias")
    box = [f"layers.{layer}.{part}" for layer in range(3) for part in linear]
    found = {key: original for key, original in _COPIES.items() if "{" not in key}
    for layer in range(layers):
        for head, rests in (("class_embed", linear), ("bbox_embed", box), ("morphology_embed", linear)):
            names = [head] if layer else []
            names += [f"transformer.decoder.{head}"] if head != "morphology_embed" else []
            found |= {f"{name}.{layer}.{rest}": f"{head}.0.{rest}" for name in names for rest in rests}
    return found


def dead_shapes(config: UniHemaConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that have no effect in the official model, which its loading code asks for all the same."""
    d, hidden, levels, classes = config.d_model, config.encoder_ffn_dim, config.num_feature_levels, config.num_labels
    transformer, fusion = "transformer", "transformer.encoder.cls_fusion"
    shapes: dict[str, tuple[int, ...]] = {
        f"{fusion}.self_attn.in_proj_weight": (3 * d, d),
        f"{fusion}.self_attn.in_proj_bias": (3 * d,),
        "transformer.encoder.cls_pos": (1, 1, d),
        "transformer.label_enc.weight": (2, d),
    }
    linears = {
        f"{fusion}.self_attn.out_proj": (d, d),
        f"{fusion}.linear1": (hidden, d),
        f"{fusion}.linear2": (d, hidden),
        f"{transformer}.combined_proj": (d, 2 * d),
        f"{transformer}.class_embed": (3, d),
        "class_embed_seg": (classes + 1, d),
        **{f"{transformer}.mask_embed.layers.{layer}": (d, d) for layer in range(3)},
    }
    norms = (f"{fusion}.norm1", f"{fusion}.norm2", f"{transformer}.decoder_norm")
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    shapes |= {f"{name}.{part}": (d,) for name in norms for part in ("weight", "bias")}
    shapes |= {
        f"{name}.{level}": (1, d, 1, 1) for name in ("class_tokens", "class_pos_tokens") for level in range(levels)
    }
    return shapes


def _pattern(template: str) -> re.Pattern:
    pattern = re.escape(template)
    for hole, expression in _HOLES.items():
        pattern = pattern.replace(re.escape(hole), expression)
    return re.compile(pattern)


def _fill(template: str, match: re.Match) -> str:
    for name, value in match.groupdict().items():
        template = template.replace({"n": "{n}", "w": "{w}", "rest": "{*}"}.get(name, name), value)
    return template


_PATTERNS = [(_pattern(official), ours) for official, ours in _NAMES.items()]
_REVERSE_PATTERNS = [(_pattern(ours), official) for official, ours in _NAMES.items()]
_COPY_PATTERNS = [(_pattern(copy), original) for copy, original in _COPIES.items()]
_DEAD_PATTERNS = [(_pattern(dead), reason) for dead, reason in _DEAD.items()]

__all__ = ["OfficialKey", "OfficialKeyError", "copies", "dead_shapes", "official_name", "translate"]
