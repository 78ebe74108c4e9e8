"""What is compared, and the peers that do it: the project's tasks, and the attributes of white cells as one of their own.

UniHema reads attributes with its detection head. No single-task detector does, so they have a peer that does nothing else:
on crops of one cell, as attribute tables describe them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.peers.answerers import BlipLike, TextOnlyT5
from benchmarks.peers.detectors import DeformableDetr, RTDetrV2
from benchmarks.peers.image_heads import AttributeHeads, LinearHead, UNet
from benchmarks.peers.peer import Peer
from unihema.errors import RunConfigError
from unihema.training.data.rows import Row


ATTRIBUTES = "attributes"
# Fields first, then crops: what is asked of one image comes together.
COMPARED = ("detection", "segmentation", ATTRIBUTES, "single_cell", "question_answering", "cloze")
# The figures of each; the first decides.
FIGURES = {
    "detection": ("mAP50", "mAP"),
    "segmentation": ("dice", "iou"),
    ATTRIBUTES: ("macro_f1", "accuracy"),
    "single_cell": ("macro_f1", "accuracy"),
    "question_answering": ("exact_match", "bleu4"),
    "cloze": ("exact_match", "bleu4"),
}


def task_of(compared: str) -> str:
    """The task that a model is asked to do: attributes are read off the cells of detection."""
    return "detection" if compared == ATTRIBUTES else compared


def size_of(compared: str) -> str:
    """The task whose image size a model gets: a crop with attributes is as large as a single cell."""
    return "single_cell" if compared == ATTRIBUTES else compared


def compared_rows(rows: Mapping[str, Sequence[Row]]) -> dict[str, Sequence[Row]]:
    """Rows of the project's tasks, those of detection parted into fields and crops with attributes.

    Args:
        rows (`Mapping[str, Sequence[Row]]`): Task -> rows.
    """
    found = dict(rows)
    crops = [row for row in found.get("detection", ()) if row.get("from_attributes")]
    if crops:
        found["detection"] = [row for row in found["detection"] if not row.get("from_attributes")]
        found[ATTRIBUTES] = crops
    return {compared: found[compared] for compared in COMPARED if len(found.get(compared, ()))}


def compared_figures(compared: str, report: Mapping[str, Any]) -> dict[str, Any]:
    """What of `evaluate_model`'s report on the rows of one thing compared is shown; of crops the attributes alone.

    Args:
        compared (`str`): What is compared.
        report (`Mapping[str, Any]`): Task -> figures.
    """
    figures = report[task_of(compared)]
    if compared != ATTRIBUTES:
        return figures
    prefix = "morphology "
    limits = {
        name.removeprefix(prefix): value for name, value in figures["intervals"].items() if name.startswith(prefix)
    }
    return {**figures["morphology"], "rows": figures["rows"], "images": figures["images"], "intervals": limits}


@dataclass(frozen=True)
class Kind:
    """A peer that can be trained.

    Args:
        compared (`str`): The one thing that it does, of `COMPARED`.
        title (`str`): What the table calls it.
        build (`type[Peer]`): Its class; made of a configuration it has random weights.
        learning_rate (`float`): That of AdamW when none is given.
    """

    compared: str
    title: str
    build: type[Peer]
    learning_rate: float


PEERS = {
    "rt_detr_v2": Kind("detection", "RT-DETRv2", RTDetrV2, 5e-4),
    "deformable_detr": Kind("detection", "DeformableDetr, two-stage", DeformableDetr, 5e-4),
    "attribute_heads": Kind(ATTRIBUTES, "backbone and linear heads", AttributeHeads, 5e-4),
    "unet": Kind("segmentation", "U-Net", UNet, 5e-4),
    "linear_head": Kind("single_cell", "backbone and linear head", LinearHead, 5e-4),
    "t5": Kind("question_answering", "text-only T5", TextOnlyT5, 1e-3),
    "blip_like": Kind("question_answering", "BLIP-like", BlipLike, 1e-3),
    "t5_cloze": Kind("cloze", "text-only T5", TextOnlyT5, 1e-3),
    "blip_like_cloze": Kind("cloze", "BLIP-like", BlipLike, 1e-3),
}


def chosen_peers(names: Iterable[str], compared: Iterable[str]) -> list[str]:
    """The peers to train.

    Args:
        names (`Iterable[str]`): Those asked for; none for all that the data have something for.
        compared (`Iterable[str]`): What the data have, of `COMPARED`.

    Raises:
        RunConfigError: A peer that there is not, or one that the data have nothing for.
    """
    names, compared = list(dict.fromkeys(names)), list(compared)
    for name in names:
        if name not in PEERS:
            raise RunConfigError(f"--peer {name}: no such peer; there are {', '.join(PEERS)}.")
        if PEERS[name].compared not in compared:
            raise RunConfigError(
                f"--peer {name} needs data for {PEERS[name].compared}; the folders have {', '.join(compared)}."
            )
    found = names or [name for name, kind in PEERS.items() if kind.compared in compared]
    if not found:
        raise RunConfigError(f"No peer for {', '.join(compared)}.")
    return found
