"""Parity with the official model: its recorded outputs reproduced, array by array.

`python -m tools.parity FOLDER -o table.md` reads `golden.npz` and `state_dict_manifest.json` of the folder, shows the
differences, and ends with exit code 1 where one is above its tolerance.
"""

import argparse
import json
import sys
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from unihema.errors import FileMissingError
from unihema.files import write_text
from unihema.modeling_unihema.layers import inverse_sigmoid
from unihema.modeling_unihema.losses import detection_loss, segmentation_loss
from unihema.modeling_unihema.matching import match_queries
from unihema.modeling_unihema.modeling_unihema import UniHemaForMultiTask
from unihema.modeling_unihema.outputs import UniHemaDetectionOutput
from unihema.official.convert import from_official, official_config
from unihema.processing_unihema.post_processing import post_process_morphology, post_process_object_detection


GOLDEN_FILE, MANIFEST_FILE = "golden.npz", "state_dict_manifest.json"
RELATIVE, ABSOLUTE = 1e-4, 1e-4
# Large values, in logits and in pixels.
WIDER = {"mask_query_logits": 5e-4, "post0_boxes": 5e-4, "post1_boxes": 5e-4}
TOP = 300
# Of two scores: nearer ones are ranked by rounding, which differs between processors.
TIE = 2e-6


@dataclass
class ParityRow:
    """One recorded array against ours.

    Args:
        name (`str`): Name in `golden.npz`.
        shape (`tuple[int, ...]`): Its shape.
        difference (`float`): Largest absolute difference.
        tolerance (`float`): Absolute tolerance, beside 1e-4 of the value.
        passed (`bool`): Whether every entry is within tolerance; integers have to be equal.
    """

    name: str
    shape: tuple[int, ...]
    difference: float
    tolerance: float
    passed: bool


def official_value(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """The value that the recorded model has for a tensor: a function of its official name and shape."""
    one, tenth = np.float32(1), np.float32(0.1)
    if key.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    noise = np.random.Generator(np.random.Philox(key=zlib.crc32(key.encode())))
    noise = np.asarray(noise.standard_normal(shape, dtype=np.float32))
    if key.endswith("running_var"):
        return one + np.abs(tenth * noise)
    if len(shape) == 1:
        return one + tenth * noise if key.endswith("weight") else tenth * noise
    noise = noise * np.float32(np.prod(shape[1:]) ** -0.5)
    return noise * np.float32(0.125) if key.startswith("T5_model.") and key.endswith(".q.weight") else noise


def official_state(manifest: Mapping[str, dict]) -> dict[str, torch.Tensor]:
    """A whole official state dict filled by the rule.

    Args:
        manifest (`Mapping[str, dict]`): `shape`, and `tied_to` for a copy, of every official key.
    """
    own = {
        key: torch.from_numpy(np.asarray(official_value(key, tuple(entry["shape"]))))
        for key, entry in manifest.items()
        if not entry.get("tied_to")
    }
    return own | {key: own[entry["tied_to"]] for key, entry in manifest.items() if entry.get("tied_to")}


def parity(folder: str | Path) -> list[ParityRow]:
    """Runs our model with the recorded weights and inputs and compares everything that was recorded.

    Args:
        folder (`str` or `Path`): Holds `golden.npz` and `state_dict_manifest.json`.

    Returns:
        `list[ParityRow]`: One row an array.

    Raises:
        OSError: A file is missing.
        KeyError: Nothing of ours answers to a recorded array.
    """
    folder = Path(folder)
    for name in (GOLDEN_FILE, MANIFEST_FILE):
        if not (folder / name).is_file():
            raise FileMissingError(
                f"{folder / name}: no such file. Give the folder with the recorded official outputs."
            )
    manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))["configs"]["small"]
    with np.load(folder / GOLDEN_FILE, allow_pickle=False) as stored:
        golden = {name: torch.from_numpy(stored[name]) for name in stored}
    with torch.no_grad():
        ours = _our_arrays(_recorded_model(manifest), golden)
    return [compare_arrays(name, ours[name], recorded) for name, recorded in golden.items()]


def compare_arrays(name: str, ours: torch.Tensor, recorded: torch.Tensor) -> ParityRow:
    """One recorded array against ours.

    Args:
        name (`str`): Its name, which decides on the tolerance.
        ours (`torch.Tensor`): As many entries as recorded.
        recorded (`torch.Tensor`): Integers have to be equal.
    """
    ours = ours.detach().reshape(recorded.shape)
    difference = float((ours.double() - recorded.double()).abs().max())
    tolerance = WIDER.get(name, ABSOLUTE) if recorded.is_floating_point() else 0.0
    if recorded.is_floating_point():
        passed = torch.allclose(ours.float(), recorded, rtol=RELATIVE, atol=tolerance)
    else:
        passed = torch.equal(ours.to(recorded.dtype), recorded)
    return ParityRow(name, tuple(recorded.shape), difference, tolerance, passed)


def _recorded_model(manifest: Mapping[str, dict]):
    state = official_state(manifest)
    model = UniHemaForMultiTask(official_config(state)).eval()
    converted, _ = from_official(state, {key: value.shape for key, value in model.state_dict().items()})
    model.load_state_dict(converted)
    return model


def _noise(key: int, shape: tuple[int, ...]) -> torch.Tensor:
    generator = np.random.Generator(np.random.Philox(key=key))
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))


def _our_arrays(model, golden: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    pixels = _noise(7, (2, 3, 224, 256))
    pixels[1, :, :, -32:] = 0
    mask = torch.ones(2, 224, 256, dtype=torch.long)
    mask[1, :, -32:] = 0
    text = {"input_ids": golden["in_input_ids"], "attention_mask": (golden["in_input_ids"] != 0).long()}
    ours = {
        "in_image_stride": pixels[:, :, ::16, ::16],
        "in_mask_valid_width": mask[:, 0].sum(-1),
        "in_input_ids": golden["in_input_ids"],
        "in_attention_mask": text["attention_mask"],
        "in_labels": golden["in_labels"],
        **{name: value for name, value in golden.items() if name.startswith("tgt")},
    }
    levels = model.model.visual_backbone(pixels, mask)
    ours |= dict(_backbone_arrays(model, pixels, levels))
    seen = {}
    trunk = model.model
    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: seen.update({name: output}))
        for name, module in {
            "normed": trunk.query_selection.token_norm,
            "moved": trunk.query_selection.box_head,
            "attended": trunk.hema_former.text_guided_visual_refinement.attention,
        }.items()
    ]
    states = trunk(pixels, mask, **text, task="segmentation", output_hidden_states=True, return_dict=True)
    for hook in hooks:
        hook.remove()
    ours |= dict(_query_arrays(model, levels, states, seen))
    ours |= dict(_detection_losses(model, states, golden))
    ours |= dict(_post_processed(model, states, golden))
    ours |= dict(_mask_arrays(model, states))

    cell = trunk(pixels, mask, task="single_cell", return_dict=True).last_hidden_state[:, 0]
    ours["encoder_class_feat"], ours["pred_image_class"] = cell, model.single_cell_head(cell)
    ours["losscls_image_classification_loss"] = torch.nn.functional.cross_entropy(
        ours["pred_image_class"], torch.tensor([3, 17])
    )
    fused = trunk(pixels, mask, **text, task="cloze", return_dict=True)
    ours["text_embeddings"], ours["cmf_output"] = fused.text_hidden_state, fused.last_hidden_state
    answer = model(task="cloze", pixel_values=pixels, pixel_mask=mask, **text, labels=golden["in_labels"])
    ours["t5_decoder_logits"], ours["loss_text"] = answer.logits, answer.loss
    return ours


def _backbone_arrays(model, pixels, levels) -> Iterator[tuple[str, torch.Tensor]]:
    for number, feature_map in enumerate(model.model.visual_backbone.backbone(pixels).feature_maps):
        yield f"backbone_c{number + 3}_stride16", feature_map[:, ::16]
        tokens = levels.positions.split([h * w for h, w in levels.shapes], 1)[number]
        yield f"pos_{number}_b_stride16", tokens.transpose(1, 2).unflatten(2, levels.shapes[number])[:, ::16]
    for number, level in enumerate(levels.maps):
        yield f"input_proj_{number}", level


def _query_arrays(model, levels, states, seen) -> Iterator[tuple[str, torch.Tensor]]:
    trunk = model.model
    yield "encoder_memory", states.encoder_last_hidden_state
    yield "encoder_cls_token_out", trunk.hema_former.single_cell_feature_extraction.query.expand(2, -1)
    yield "enc_output_memory_stride4", seen["normed"][..., ::4]
    yield "topk_indices", states.proposal_indices
    anchors = trunk.query_selection._anchors(levels)[0]
    anchors = anchors.gather(1, states.proposal_indices[..., None].expand(-1, -1, 4))
    yield "init_box_proposal", anchors.sigmoid()
    yield "ref_points_unsigmoid", anchors + seen["moved"]
    boxes = states.proposal_boxes
    yield "interm_pred_logits", states.proposal_logits
    yield "interm_pred_boxes", boxes
    yield "tgvr_attended", seen["attended"][0]
    yield "tgvr_queries", states.refined_queries
    yield "decoder_hs", states.decoder_states
    logits, morphology = model.detection_head(states.decoder_states)
    # The boxes that each layer starts from: the proposals, then each layer's own refinement.
    starts = [boxes]
    for layer, queries in enumerate(states.decoder_hidden_states[1:]):
        delta = trunk.image_decoder.box_head(queries)
        starts.append((delta + inverse_sigmoid(starts[layer])).sigmoid())
    yield "decoder_refs", torch.stack(starts)
    for prefix, layer in (("aux0_", 0), ("", -1)):
        yield f"{prefix}pred_logits", logits[layer]
        yield f"{prefix}pred_boxes", states.decoder_boxes[layer]
        yield f"{prefix}pred_morphology", morphology[layer]


def _mask_arrays(model, states) -> Iterator[tuple[str, torch.Tensor]]:
    encoder_map, backbone_map = states.mask_features.chunk(2, 1)
    yield "mask_feature_proj_0_stride4", encoder_map[:, ::4]
    yield "mask_features_stride2", (encoder_map + backbone_map)[:, ::2]
    yield "mask_query_logits", states.mask_logits
    logits = model.mask_head(states.mask_logits, states.mask_features, (512, 512))
    yield "pred_mask", logits
    wanted = (_noise(11, (2, 1, 512, 512)) > 0.5).long()[:, 0]
    _, terms = segmentation_loss(logits, wanted, dice_over_batch=model.config.official_losses)
    yield "lossseg_loss_dice_seg", terms["loss_dice"]
    yield "lossseg_loss_focal_seg", terms["loss_focal"]


def _detection_losses(model, states, golden) -> Iterator[tuple[str, torch.Tensor]]:
    labels = [
        {
            "class_labels": golden[f"tgt{image}_labels"],
            "boxes": golden[f"tgt{image}_boxes"],
            # The official code writes 4 for a missing attribute.
            "morphology": golden[f"tgt{image}_morphology"].masked_fill(golden[f"tgt{image}_morphology"] == 4, -100),
        }
        for image in range(2)
    ]
    logits, morphology = model.detection_head(states.decoder_states)
    layers = {"": (logits[-1], states.decoder_boxes[-1]), "_0": (logits[0], states.decoder_boxes[0])}
    layers["_interm"] = (states.proposal_logits, states.proposal_boxes)
    _, terms = detection_loss(logits, states.decoder_boxes, morphology, *layers["_interm"], labels, model.config)
    for name, value in terms.items():
        yield f"lossdet_{name.replace('_enc', '_interm')}", value
    cells = sum(len(image["boxes"]) for image in labels)
    for suffix, (scores, boxes) in layers.items():
        pairs = match_queries(scores, boxes, labels)
        chosen = torch.cat([boxes[image, queries] for image, (queries, _) in enumerate(pairs)])
        wanted = torch.cat([labels[image]["boxes"][targets] for image, (_, targets) in enumerate(pairs)])
        distance = (chosen - wanted).abs()
        # Logged by the official code, in no loss of ours.
        yield f"lossdet_loss_xy{suffix}", distance[:, :2].sum() / cells
        yield f"lossdet_loss_hw{suffix}", distance[:, 2:].sum() / cells
        counts = (scores.argmax(-1) != scores.shape[-1] - 1).sum(1).float()
        yield f"lossdet_cardinality_error{suffix}", (counts - torch.tensor([3.0, 5.0])).abs().mean()
        if suffix:
            continue
        named = torch.cat([scores[image, queries].argmax(-1) for image, (queries, _) in enumerate(pairs)])
        true = torch.cat([labels[image]["class_labels"][targets] for image, (_, targets) in enumerate(pairs)])
        yield "lossdet_class_error", 100 - 100 * (named == true).float().mean()
        for image, (queries, targets) in enumerate(pairs):
            yield f"match{image}_src", queries
            yield f"match{image}_tgt", targets


def ranked_as_recorded(
    cells: dict[str, torch.Tensor], scores: torch.Tensor, labels: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Detections with neighbours exchanged where the recorded scores tie up to rounding and the labels say so.

    Args:
        cells (`dict[str, torch.Tensor]`): Ours, best first: `labels` and whatever else has an entry a detection.
        scores (`torch.Tensor`): Recorded, best first.
        labels (`torch.Tensor`): Recorded.
    """
    order = list(range(len(scores)))
    for rank in range(len(order) - 1):
        tied = scores[rank] - scores[rank + 1] < TIE
        if tied and cells["labels"][order[rank]] != labels[rank]:
            order[rank], order[rank + 1] = order[rank + 1], order[rank]
    return {name: values[order] for name, values in cells.items()}


def _post_processed(model, states, golden) -> Iterator[tuple[str, torch.Tensor]]:
    logits, morphology = model.detection_head(states.decoder_states[-1])
    output = UniHemaDetectionOutput(logits=logits, pred_boxes=states.decoder_boxes[-1], pred_morphology=morphology)
    found = post_process_object_detection(
        output, 0.0, [(224, 256), (224, 224)], top_k=TOP, one_class_per_query=False, clip=False
    )
    found = [
        ranked_as_recorded(cells, golden[f"post{image}_scores"], golden[f"post{image}_labels"])
        for image, cells in enumerate(found)
    ]
    attributes = model.config.morphology
    described = post_process_morphology(output, found, attributes)
    for image, cells in enumerate(found):
        values = [
            [attributes[name].index(reading["value"]) for name, reading in cell.items()] for cell in described[image]
        ]
        yield f"post{image}_scores", cells["scores"]
        yield f"post{image}_labels", cells["labels"]
        yield f"post{image}_boxes", cells["boxes"]
        yield f"post{image}_morphology_labels", torch.tensor(values)


def parity_table(rows: list[ParityRow]) -> str:
    """A Markdown table of the differences."""
    lines = ["| array | shape | largest difference | tolerance | |", "|---|---|---|---|---|"]
    for row in rows:
        shape = " x ".join(map(str, row.shape))
        verdict = "ok" if row.passed else "**differs**"
        tolerance = f"{row.tolerance:.0e}" if row.tolerance else "equal"
        lines.append(f"| {row.name} | {shape} | {row.difference:.1e} | {tolerance} | {verdict} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Reproduces the recorded outputs and shows the differences."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path, help=f"Folder with {GOLDEN_FILE} and {MANIFEST_FILE}.")
    parser.add_argument("-o", "--output", type=Path, help="Also write the table there, as Markdown.")
    given = parser.parse_args()
    rows = parity(given.folder)
    table = parity_table(rows)
    print(table)
    if given.output is not None:
        write_text(given.output, [table])
    failed = [row.name for row in rows if not row.passed]
    print(f"{len(rows) - len(failed)} of {len(rows)} arrays within tolerance.")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
