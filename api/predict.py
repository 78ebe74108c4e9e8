"""One image analysed: detection, attributes, mask, single-cell class and answers in one result."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .checkpoint import available_tasks, require_tasks
from .int8 import is_int8
from .results.smear_result import Cell, SmearResult
from .version import __version__


if TYPE_CHECKING:
    import numpy
    from PIL import Image

    from .modeling_unihema.modeling_unihema import UniHemaPreTrainedModel
    from .processing_unihema.processing_unihema import UniHemaProcessor


IMAGE_TASKS = ("detection", "segmentation", "single_cell")
# From this share of the queries on, cells were probably left without one.
_CROWDED = 0.95


class QueryCapWarning(UserWarning):
    """The field holds about as many cells as the model has queries, so some are probably not counted."""


class OpenedImage(NamedTuple):
    """An image that was read.

    Args:
        pixels (`PIL.Image.Image`): RGB, perhaps reduced.
        width (`int`): Of the file.
        height (`int`): Of the file.
        name (`str`, *optional*): Its path, where it came from one.
    """

    pixels: "Image.Image"
    width: int
    height: int
    name: str | None


def default_tasks(model: "UniHemaPreTrainedModel") -> tuple[str, ...]:
    """What is done with an image when nothing is asked: detection and segmentation, else the single-cell class."""
    available = available_tasks(model)
    fields = tuple(task for task in ("detection", "segmentation") if task in available)
    return fields or tuple(task for task in ("single_cell",) if task in available)


def analyze(
    model: "UniHemaPreTrainedModel",
    processor: "UniHemaProcessor",
    image: "str | Path | Image.Image | numpy.ndarray",
    tasks: Sequence[str] | None = None,
    prompt: str | Sequence[str] | None = None,
    questions: Sequence[str] = (),
    threshold: float | None = None,
) -> SmearResult:
    """Analyses one image.

    Args:
        model ([`UniHemaForMultiTask`]): The model, or a model with the heads asked for; see [`load_checkpoint`].
        processor ([`UniHemaProcessor`]): Its processor.
        image (`str`, `Path`, `PIL.Image.Image` or `np.ndarray`): A smear, or a crop of one cell.
        tasks (`Sequence[str]`, *optional*): Among `detection`, `segmentation` and `single_cell`; those of a field that
            the checkpoint was trained on when missing. An empty list asks the questions only.
        prompt (`str` or `Sequence[str]`, *optional*): Class names, or a disease, to look for; all classes when missing.
            Where it names detection classes and nothing else, only these are answered and counted.
        questions (`Sequence[str]`): Questions about the image, or sentences with blanks (`___`) to fill in.
        threshold (`float`, *optional*): Smallest detection score for all classes, instead of the checkpoint's
            calibrated one for each class.

    Returns:
        [`SmearResult`]: Coordinates in pixels of the image as it stands in its file.

    Raises:
        UnreadableImageError: The image cannot be read.
        CheckpointError: The checkpoint lacks a head.
        ValueError: Unknown task, a threshold outside 0..1, or a question longer than the limit.
    """
    tasks = check_request(model, processor, tasks, prompt, questions, threshold)
    return analyze_opened(model, processor, [open_image(image)], tasks, prompt, questions, threshold)[0]


def open_image(image: "str | Path | Image.Image | numpy.ndarray") -> "OpenedImage":
    """Reads an image, as [`analyze`] does.

    Raises:
        UnreadableImageError: The image cannot be read.
    """
    from .processing_unihema.image_io import image_size, load_image

    opened = load_image(image)
    height, width = image_size(image if isinstance(image, (str, Path)) else opened)
    return OpenedImage(opened, width, height, str(image) if isinstance(image, (str, Path)) else None)


def analyze_opened(
    model: "UniHemaPreTrainedModel",
    processor: "UniHemaProcessor",
    images: "Sequence[OpenedImage]",
    tasks: Sequence[str],
    prompt: str | Sequence[str] | None = None,
    questions: Sequence[str] = (),
    threshold: float | None = None,
) -> list[SmearResult]:
    """Analyses several images at once; each has the result it has alone, up to float rounding.

    Args:
        model, processor, prompt, questions, threshold: As for [`analyze`].
        images (`Sequence[OpenedImage]`): Of [`open_image`], best of one size: they are padded to the largest.
        tasks (`Sequence[str]`): What [`check_request`] gave.

    Returns:
        `list[SmearResult]`: One for each image.
    """
    import torch

    pictures = [image.pixels for image in images]
    results = [SmearResult(image.width, image.height, image=image.name) for image in images]
    for result in results:
        result.provenance = _provenance(model, processor, tasks, prompt, threshold)
    calls = {
        "detection": lambda: _detect(model, processor, pictures, prompt, threshold, results),
        "segmentation": lambda: _segment(model, processor, pictures, prompt, results),
        "single_cell": lambda: _classify(model, processor, pictures, results),
    }
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            _compared([task for task in calls if task in tasks], calls, model, processor, results)
            for question in questions:
                for result, answer in zip(results, _answers(model, processor, pictures, question), strict=True):
                    result.answers.append({"question": question, "answer": answer})
    finally:
        model.train(was_training)
    return results


def check_threshold(threshold: float | None) -> None:
    """Checks a detection threshold.

    Raises:
        ValueError: Outside 0..1.
    """
    if threshold is not None and not 0 <= threshold <= 1:
        raise ValueError(f"The threshold must lie in 0..1, got {threshold}.")


def check_request(
    model: "UniHemaPreTrainedModel",
    processor: "UniHemaProcessor",
    tasks: Sequence[str] | None = None,
    prompt: str | Sequence[str] | None = None,
    questions: Sequence[str] = (),
    threshold: float | None = None,
) -> tuple[str, ...]:
    """Checks, before any image is opened, that the checkpoint can do what is asked.

    Args:
        model, processor, tasks, prompt, questions, threshold: As for [`analyze`].

    Returns:
        `tuple[str, ...]`: The tasks, with the default ones for `None`.

    Raises:
        CheckpointError: The checkpoint lacks a head.
        ValueError: Unknown task, nothing to do, a threshold outside 0..1, or a text that is too long.
    """
    tasks = default_tasks(model) if tasks is None else tuple(dict.fromkeys(tasks))
    for task in tasks:
        if task not in IMAGE_TASKS:
            raise ValueError(
                f"Unknown task '{task}'; choose among {', '.join(IMAGE_TASKS)}. Questions are asked apart."
            )
    if not tasks and not questions:
        raise ValueError("Nothing to do: this checkpoint only answers questions, and no question was given.")
    check_threshold(threshold)
    require_tasks(model, [*tasks, *dict.fromkeys(map(_language_task, questions))])
    texts = [(task, prompt) for task in tasks if task != "single_cell" and prompt is not None]
    for task, text in [*texts, *((_language_task(question), question) for question in questions)]:
        processor(text=text, task=task)
    return tasks


def _language_task(text: str) -> str:
    return "cloze" if "___" in text or "<extra_id_" in text else "question_answering"


def _compared(tasks: Sequence[str], calls, model, processor, results: list[SmearResult]) -> None:
    """Does the tasks; the first that the checkpoint has reference images of also scores how far each image is from them."""
    from .results.out_of_distribution import looks_of, reference_of, set_out_of_distribution

    reference = reference_of(model)
    compared = next((task for task in tasks if reference is not None and task in reference.tasks), None)
    for task in tasks:
        if task != compared:
            calls[task]()
            continue
        with looks_of(model, processor) as looks:
            calls[task]()
        (look,) = looks
        for result, features, quality in zip(results, look.features.cpu().numpy(), look.quality.tolist(), strict=True):
            scale = processor.image_processor.scale((result.height, result.width), task)
            set_out_of_distribution(reference.tasks[task], features, quality, result, scale)


def _inputs(model, processor, images, text=None, **options):
    if text is not None:
        text = [text] * len(images)
    batch = processor(images=images, text=text, return_tensors="pt", **options).to(model.device)
    return batch.to(model.dtype) if model.dtype.is_floating_point else batch


def _detect(model, processor, images, prompt, threshold, results: list[SmearResult]) -> None:
    from .processing_unihema.post_processing import asked_classes, find_cells

    config, asked = model.config, asked_classes(model.config, prompt)
    outputs = model(**_inputs(model, processor, images, task="detection", text=prompt), task="detection")
    sizes = [(result.height, result.width) for result in results]
    found = find_cells(outputs, config, sizes, prompt, threshold)
    for result, cells, logits in zip(results, found, outputs.logits, strict=True):
        result.classes = [name for index, name in enumerate(config.class_names) if asked is None or asked[index]]
        result.class_parents = dict(config.label_parents or {})
        result.cells += [
            Cell(number, cell["box"], cell["label"], cell["score"], cell["attributes"])
            for number, cell in enumerate(cells, 1)
        ]
        _warn_if_crowded(logits, config.class_thresholds(threshold), result)


def _warn_if_crowded(logits, thresholds: Sequence[float], result: SmearResult) -> None:
    # Counted before overlapping boxes are merged: a query that repeats a cell is not free for another one.
    best = logits.float().sigmoid().max(-1)
    used = int((best.values > best.values.new_tensor(thresholds)[best.indices]).sum())
    queries = len(logits)
    if used >= _CROWDED * queries:
        message = (
            f"{used} of {queries} queries found a cell: there are probably more cells than queries, and the counts are "
            "too low. Cut the image into smaller fields."
        )
        result.warnings.append(message)
        warnings.warn(f"{result.image or 'image'}: {message}", QueryCapWarning, stacklevel=5)


def _segment(model, processor, images, prompt, results: list[SmearResult]) -> None:
    inputs = _inputs(model, processor, images, task="segmentation", text=prompt)
    outputs = model(**inputs, task="segmentation")
    masks = processor.image_processor.post_process_semantic_segmentation(
        outputs,
        target_sizes=[image.size[::-1] for image in images],
        pixel_mask=inputs["pixel_mask"],
        threshold=model.config.segmentation_threshold,
    )
    asked = prompt or processor.default_prompts.get("segmentation")
    for result, mask in zip(results, masks, strict=True):
        result.mask = mask.to("cpu").numpy().astype("uint8")
        result.mask_label = ", ".join([asked] if isinstance(asked, str) else asked or ["cell"])


def _classify(model, processor, images, results: list[SmearResult]) -> None:
    outputs = model(**_inputs(model, processor, images, task="single_cell"), task="single_cell")
    best = outputs.logits.float().softmax(-1).max(-1)
    for result, label, score in zip(results, best.indices.tolist(), best.values.tolist(), strict=True):
        result.single_cell = {"label": model.config.single_cell_labels[label], "score": score}


def _answers(model, processor, images, question: str) -> list[str]:
    inputs = _inputs(model, processor, images, task=_language_task(question), text=question)
    tokens = model.generate(**inputs, max_new_tokens=model.config.max_text_length)
    return processor.decode_answers(tokens)


def _provenance(model, processor, tasks, prompt, threshold) -> dict[str, Any]:
    import torch
    import transformers

    from .processing_unihema.post_processing import NMS_IOU, NMS_WITHIN

    return {
        "unihema": __version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "model": model.config.name_or_path or None,
        "adapters": list(getattr(model, "adapters_in_use", ())),
        "device": str(model.device),
        "dtype": "int8" if is_int8(model) else str(model.dtype).removeprefix("torch."),
        "tasks": list(tasks),
        "image_sizes": {task: dict(processor.image_processor.task_sizes[task]) for task in tasks},
        "prompt": prompt if isinstance(prompt, str) or prompt is None else list(prompt),
        "detection_thresholds": (
            dict(zip(model.config.class_names, model.config.class_thresholds(threshold), strict=True))
            if "detection" in tasks
            else None
        ),
        "segmentation_threshold": model.config.segmentation_threshold if "segmentation" in tasks else None,
        "nms_iou": NMS_IOU,
        "nms_within": NMS_WITHIN,
    }


__all__ = [
    "OpenedImage",
    "QueryCapWarning",
    "analyze",
    "analyze_opened",
    "check_request",
    "check_threshold",
    "open_image",
]
