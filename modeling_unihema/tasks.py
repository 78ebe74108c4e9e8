"""The table of tasks: what each one runs, reads and answers, and its names in Transformers and on the Hub.

A further task is a row here and a head in `modeling_unihema.py`. Everything that depends on the task follows from its row:
the parts that are built and computed, the keys of the state dict, Auto classes, pipelines, prompts, and the headline figure.
This file imports nothing heavy, so the command and the cards read it too.
"""

import re
from dataclasses import dataclass
from typing import Any

from unihema.errors import InputError


# The parts of the model beside the visual backbone, and where each lives in a state dict (below `model.`).
PARTS = {
    "image_encoder": ("image_encoder",),
    "query_selection": ("query_selection",),
    "image_decoder": ("image_decoder",),
    "text_encoder": ("text_branch.shared", "text_branch.encoder"),
    "text_decoder": ("text_branch.decoder",),
    "cross_modal_fusion": ("hema_former.cross_modal_fusion",),
    "text_guided_visual_refinement": ("hema_former.text_guided_visual_refinement",),
    "single_cell_feature_extraction": ("hema_former.single_cell_feature_extraction",),
    "query_guided_mask_finder": ("hema_former.query_guided_mask_finder",),
}


@dataclass(frozen=True)
class Task:
    """One task.

    Args:
        name (`str`): As users write it.
        parts (`tuple[str, ...]`): Of [`PARTS`], those that run beside the visual backbone. Nothing else is built or computed.
        head (`tuple[str, ...]`): Attributes of the model that hold the head, and so its keys in a state dict.
        model_class (`str`): The class with this head alone.
        auto_classes (`tuple[str, ...]`): The Auto classes of Transformers that give `model_class`.
        pipeline (`str`): Name of the Transformers pipeline, which is also what the Hub calls the task.
        pipeline_class (`str`): Our class of it.
        headline (`str`): The metric shown in messages, and by which the best evaluation of a run is chosen.
        reads_text (`bool`): Whether the model reads a prompt, a question or a sentence.
        generates_text (`bool`): Whether the answer is text.
        default_prompt (`str`, *optional*): The prompt when no text is given; `None` where text is required.
    """

    name: str
    parts: tuple[str, ...]
    head: tuple[str, ...]
    model_class: str
    auto_classes: tuple[str, ...]
    pipeline: str
    pipeline_class: str
    headline: str
    reads_text: bool = True
    generates_text: bool = False
    default_prompt: str | None = None


_QUERIES = ("text_encoder", "image_encoder", "query_selection", "text_guided_visual_refinement", "image_decoder")
_LANGUAGE: dict[str, Any] = {
    "parts": ("text_encoder", "text_decoder", "cross_modal_fusion"),
    "head": ("lm_head",),
    "model_class": "UniHemaForQA",
    "auto_classes": ("AutoModelForVisualQuestionAnswering", "AutoModelForImageTextToText"),
    "pipeline": "visual-question-answering",
    "pipeline_class": "UniHemaVisualQuestionAnsweringPipeline",
    "headline": "exact_match",
    "generates_text": True,
}

TASK_TABLE = {
    task.name: task
    for task in (
        Task(
            "detection",
            parts=_QUERIES,
            head=("detection_head", "denoising"),
            model_class="UniHemaForDetection",
            auto_classes=("AutoModelForObjectDetection",),
            pipeline="object-detection",
            pipeline_class="UniHemaObjectDetectionPipeline",
            headline="mAP50",
            default_prompt="blood",
        ),
        Task(
            "segmentation",
            parts=(*_QUERIES, "query_guided_mask_finder"),
            head=("mask_head",),
            model_class="UniHemaForSegmentation",
            auto_classes=("AutoModelForImageSegmentation", "AutoModelForSemanticSegmentation"),
            pipeline="image-segmentation",
            pipeline_class="UniHemaImageSegmentationPipeline",
            headline="dice",
            default_prompt="white blood cell",
        ),
        Task(
            "single_cell",
            parts=("image_encoder", "single_cell_feature_extraction"),
            head=("single_cell_head",),
            model_class="UniHemaForImageClassification",
            auto_classes=("AutoModelForImageClassification",),
            pipeline="image-classification",
            pipeline_class="UniHemaImageClassificationPipeline",
            headline="macro_f1",
            reads_text=False,
        ),
        Task("question_answering", **_LANGUAGE),
        Task("cloze", **_LANGUAGE),
    )
}
TASKS = tuple(TASK_TABLE)
LANGUAGE_TASKS = tuple(task.name for task in TASK_TABLE.values() if task.generates_text)
IMAGE_TASKS = tuple(task for task in TASKS if task not in LANGUAGE_TASKS)


def check_task(name: str) -> Task:
    """The row of a task.

    Raises:
        ValueError: There is no such task.
    """
    if name not in TASK_TABLE:
        raise InputError(f"Unknown task '{name}'; choose one of {', '.join(TASKS)}.")
    return TASK_TABLE[name]


def parts_of(tasks: tuple[str, ...], config: Any = None) -> set[str]:
    """Names of the parts that any of `tasks` runs.

    Args:
        tasks (`tuple[str, ...]`): Of [`TASKS`].
        config ([`UniHemaConfig`], *optional*): Leaves out the parts that it turns off.
    """
    parts = {part for task in tasks for part in TASK_TABLE[task].parts}
    if config is not None and config.trained.cell_masks and "detection" in tasks:
        parts.add("query_guided_mask_finder")
    if config is not None and not config.cross_modal_fusion:
        parts -= {"cross_modal_fusion"}
    if config is not None and not config.text_guided_refinement:
        parts -= {"text_guided_visual_refinement"}
        if not set(tasks) & set(LANGUAGE_TASKS):
            # No other part of a visual task reads the prompt.
            parts -= {"text_encoder"}
    return parts


def head_keys() -> list[str]:
    """Patterns of the state-dict keys of all heads."""
    heads = dict.fromkeys(name for task in TASK_TABLE.values() for name in task.head)
    return [rf"^(model\.)?{name}\." for name in heads]


def skippable_keys(tasks: tuple[str, ...]) -> list[str]:
    """Patterns of the state-dict keys that a class for `tasks` does not build."""
    parts = parts_of(tasks)
    if not set(tasks) & set(LANGUAGE_TASKS):
        # Without refinement by the prompt a visual task has no text encoder.
        parts -= {"text_encoder"}
    own_heads = {name for task in tasks for name in TASK_TABLE[task].head}
    other_heads = {name for task in TASK_TABLE.values() for name in task.head} - own_heads
    absent = [place for part, places in PARTS.items() if part not in parts for place in places]
    return [rf"^model\.{re.escape(place)}\." for place in absent] + [rf"^{name}\." for name in sorted(other_heads)]


def auto_classes() -> dict[str, str]:
    """Auto class of Transformers -> the model class that it gives, base model first."""
    found = {"AutoModel": "UniHemaModel"}
    for task in TASK_TABLE.values():
        found |= dict.fromkeys(task.auto_classes, task.model_class)
    return found


__all__ = [
    "IMAGE_TASKS",
    "LANGUAGE_TASKS",
    "PARTS",
    "TASKS",
    "TASK_TABLE",
    "Task",
    "auto_classes",
    "check_task",
    "head_keys",
    "parts_of",
    "skippable_keys",
]
