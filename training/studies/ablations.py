"""The questions that the paper asks of its own parts, as data (Uni-Hema, arXiv 2511.13889, section 4, ablations)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Ablation:
    """One question, and the run that answers it beside the whole model's.

    Args:
        name (`str`): What it is called in folders and tables.
        asks (`str`): The question.
        figures (`tuple[tuple[str, str], ...]`): Tasks and their figures that answer it, such as `("detection", "mAP50")`.
        overrides (`Mapping[str, Any]`): Fields of `UniHemaConfig` that differ from the whole model's.
        kind (`str`): `"model"`: another model, trained alike; `"stages"`: the same model, trained in the six stages;
            `"unseen"`: the same model, trained without one data set and measured on that.
    """

    name: str
    asks: str
    figures: tuple[tuple[str, str], ...]
    overrides: Mapping[str, Any] = field(default_factory=dict)
    kind: str = "model"


# The run that all others are compared with.
WHOLE = "whole"

_EVERY_TASK = (
    ("detection", "mAP50"),
    ("segmentation", "dice"),
    ("single_cell", "macro_f1"),
    ("question_answering", "exact_match"),
    ("cloze", "exact_match"),
)

ABLATIONS = (
    Ablation(
        "no_fusion",
        "Do answers need the image? CrossModalFusion off: E_W = E_T.",
        (("question_answering", "exact_match"), ("question_answering", "bleu4"), ("cloze", "exact_match")),
        {"cross_modal_fusion": False},
    ),
    Ablation(
        "bilinear_upsampler",
        "Does learning to upsample masks help? Bilinear instead.",
        (("segmentation", "dice"), ("segmentation", "iou")),
        {"upsampler": "bilinear"},
    ),
    Ablation(
        "backbone_features",
        "Is SingleCellFeatureExtraction enough alone? Pooled backbone features beside it.",
        (("single_cell", "macro_f1"), ("single_cell", "accuracy")),
        {"scfe_backbone_features": True},
    ),
    Ablation(
        "no_refinement",
        "Do queries need the prompt? TextGuidedVisualRefinement off.",
        (("detection", "mAP50"), ("segmentation", "dice")),
        {"text_guided_refinement": False},
    ),
    Ablation(
        "six_stages",
        "Do tasks destroy each other when trained at once? The six stages instead, with as many steps in all.",
        _EVERY_TASK,
        kind="stages",
    ),
    Ablation(
        "unseen",
        "How much is lost on a data set that was never trained on? Both are measured on that one.",
        _EVERY_TASK,
        kind="unseen",
    ),
)

__all__ = ["ABLATIONS", "WHOLE", "Ablation"]
