"""Which peers there are."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from benchmarks.quality.answerers import BlipLike, TextOnlyT5
from benchmarks.quality.compared import ATTRIBUTES
from benchmarks.quality.detectors import DeformableDetr, RTDetrV2
from benchmarks.quality.image_heads import AttributeHeads, LinearHead, UNet
from benchmarks.quality.peer import Peer
from unihema.errors import RunConfigError
from unihema.modeling_unihema.configuration_unihema import UniHemaConfig


@dataclass(frozen=True)
class Kind:
    """A peer that can be trained.

    Args:
        compared (`str`): The one thing that it does, of `COMPARED`.
        title (`str`): What the table calls it.
        build (`Callable[[UniHemaConfig], Peer]`): Makes it, with random weights.
        learning_rate (`float`): That of AdamW when none is given.
    """

    compared: str
    title: str
    build: Callable[[UniHemaConfig], Peer]
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
