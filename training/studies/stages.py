"""The six stages of training as data: what each one learns, and what it leaves alone (Uni-Hema, arXiv 2511.13889,
"progressive training"; the paper gives the order, the sets of frozen parts are ours)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Stage:
    """One stage.

    Args:
        number (`int`): From 1.
        name (`str`): What it is called in folders and tables.
        tasks (`tuple[str, ...]`): Tasks whose data it trains on; those that a mix lacks are left out.
        trained_parts (`tuple[str, ...]`): Of `PARTS` in training/run/build.py; all others are frozen.
        why (`str`): What the stage is for.
        settings (`Mapping[str, Any]`): Settings of the run that this stage needs, by dotted name.
    """

    number: int
    name: str
    tasks: tuple[str, ...]
    trained_parts: tuple[str, ...]
    why: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """Name of the folder that the stage is trained in."""
        return f"{self.number}-{self.name}"


SIX_STAGES = (
    Stage(
        1,
        "single_cell",
        ("single_cell",),
        ("backbone", "input_projection", "image_encoder", "single_cell_feature_extraction", "single_cell_head"),
        "What a cell looks like: crops are many and cheap.",
    ),
    Stage(
        2,
        "text",
        ("question_answering", "cloze"),
        ("text_embedding", "text_encoder", "text_decoder", "language_head"),
        "The language of haematology, without images.",
        {"data.text_only": True},
    ),
    Stage(
        3,
        "joint_visual",
        ("detection", "segmentation", "single_cell"),
        (
            "backbone",
            "input_projection",
            "image_encoder",
            "query_selection",
            "image_decoder",
            "text_guided_visual_refinement",
            "single_cell_feature_extraction",
            "query_guided_mask_finder",
            "detection_head",
            "denoising",
            "mask_head",
            "single_cell_head",
        ),
        "All visual tasks at once, so that the image features serve each of them.",
    ),
    Stage(
        4,
        "detection",
        ("detection",),
        ("query_selection", "image_decoder", "text_guided_visual_refinement", "detection_head", "denoising"),
        "Boxes, classes and morphology, on image features that no longer move.",
    ),
    Stage(
        5,
        "segmentation",
        ("segmentation",),
        ("query_guided_mask_finder", "mask_head"),
        "Masks; nothing that the other tasks read is touched.",
    ),
    Stage(
        6,
        "language",
        ("question_answering", "cloze"),
        ("cross_modal_fusion", "text_decoder", "language_head"),
        "Answers that look at the image: the visual side is done, and only the fusion learns to read it.",
    ),
)

RECIPES: dict[str, tuple[Stage, ...]] = {"six-stages": SIX_STAGES}

__all__ = ["RECIPES", "SIX_STAGES", "Stage"]
