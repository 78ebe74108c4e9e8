"""What is asked of images, and what the model makes of a batch of them in one call."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import TYPE_CHECKING, Any

from unihema.errors import RequestError
from unihema.modeling_unihema.tasks import IMAGE_TASKS
from unihema.processing_unihema.class_names import NUCLEUS
from unihema.results.tiles import SMALLEST_TILE


if TYPE_CHECKING:
    import torch
    from PIL import Image

    from unihema.inference.graphs import Recorder
    from unihema.modeling_unihema.outputs import UniHemaImageFeatures, UniHemaPromptFeatures
    from unihema.processing_unihema.processing_unihema import UniHemaProcessor


# Fields of a request that are read from the others.
_READ = ("texts", "question_texts", "prompts")


@dataclass(frozen=True)
class Request:
    """What is to be done with images, checked and read once for all of them.

    Args:
        tasks (`tuple[str, ...]`): Of the image tasks, in the order of the table.
        prompt (`str` or `tuple[str, ...]`, *optional*): Class names, or a disease.
        questions (`tuple[str, ...]`): Questions and sentences with blanks.
        threshold (`float`, *optional*): Smallest detection score for all classes.
        tiles (`str` or `int`): `"auto"`, `"off"`, or the longer edge of a tile in pixels of the image.
        um_per_pixel (`float`, *optional*): Size of a pixel of the images, in micrometres.
        white_cells (`int`, *optional*): How many white cells are looked for, alone.
        labels (`tuple[str, ...]`, *optional*): What a single cell may be.
        framing (`str`): `"auto"` or `"off"`.
        second_look (`bool`): Whether nucleated cells of fields are typed from their crops, too.
        parasites (`bool`): Whether red cells of fields are looked at in their crops for parasites.
        texts (`dict`): Task -> token ids and mask of its prompt `[1, L]`.
        question_texts (`tuple[dict]`): The same of each question.
        prompts (`dict`): Task -> what its prompt gives the queries, of one image.
    """

    tasks: tuple[str, ...]
    prompt: str | tuple[str, ...] | None = None
    questions: tuple[str, ...] = ()
    threshold: float | None = None
    tiles: str | int = "auto"
    um_per_pixel: float | None = None
    white_cells: int | None = None
    labels: tuple[str, ...] | None = None
    framing: str = "auto"
    second_look: bool = False
    parasites: bool = False
    texts: dict[str, dict[str, "torch.Tensor"]] = field(default_factory=dict)
    question_texts: tuple[dict[str, "torch.Tensor"], ...] = ()
    prompts: dict[str, "UniHemaPromptFeatures"] = field(default_factory=dict)

    @property
    def looks_at_crops(self) -> bool:
        """Whether cells of fields are cut out and seen by the single-cell head."""
        return self.second_look or self.parasites

    @property
    def heads(self) -> tuple[str, ...]:
        """Tasks whose heads see the images or crops of their cells, for what is asked."""
        of_crops = ("single_cell",) if self.looks_at_crops else ()
        return tuple(dict.fromkeys((*self.tasks, *of_crops, *map(language_task, self.questions))))

    @property
    def asked(self) -> tuple[Any, ...]:
        """The arguments of [`Analyzer.request`] that ask the same."""
        return tuple(getattr(self, each.name) for each in fields(self) if each.name not in _READ)

    def check(self, knows_size: bool) -> None:
        """Checks what needs no model.

        Args:
            knows_size (`bool`): Whether the checkpoint says how large its cells are.

        Raises:
            RequestError: Unknown task, nothing to do, or a value that cannot be.
        """
        for task in self.tasks:
            if task not in IMAGE_TASKS:
                raise RequestError(
                    f"Unknown task '{task}'; choose among {', '.join(IMAGE_TASKS)}. Questions are asked apart."
                )
        if not self.tasks and not self.questions:
            raise RequestError("Nothing to do: this checkpoint only answers questions, and no question was given.")
        threshold, tiles, um_per_pixel, white_cells = self.threshold, self.tiles, self.um_per_pixel, self.white_cells
        if threshold is not None and not 0 <= threshold <= 1:
            raise RequestError(f"The threshold must lie in 0..1, got {threshold}.")
        if tiles not in ("auto", "off") and not (type(tiles) is int and tiles >= SMALLEST_TILE):
            raise RequestError(f"tiles must be auto, off, or an edge of {SMALLEST_TILE} pixels or more, got {tiles!r}.")
        if um_per_pixel is not None and not 0.001 <= um_per_pixel <= 100:
            raise RequestError(f"A pixel is 0.001 to 100 micrometres wide, got {um_per_pixel}.")
        if um_per_pixel is not None and not knows_size:
            raise RequestError("This checkpoint does not say how large its cells are, so micrometres tell it nothing.")
        if white_cells is not None and not (type(white_cells) is int and white_cells >= 1):
            raise RequestError(f"white_cells is a number of cells from 1, got {white_cells!r}.")
        if white_cells is not None and (tiles == "off" or not knows_size):
            raise RequestError(
                "White cells are looked for alone in tiles (not with tiles=off), by a checkpoint that says how large cells are."
            )
        if white_cells is not None and "detection" not in self.tasks:
            raise RequestError("White cells are found by the task detection, which was not asked for.")
        of_fields = {
            "A threshold": threshold,
            "A prompt": self.prompt,
            "A size of tiles": None if type(tiles) is str else tiles,
        }
        given = [name for name, value in of_fields.items() if value is not None]
        if given and self.tasks and not {"detection", "segmentation"} & set(self.tasks):
            raise RequestError(f"{given[0]} is for cells in fields, and only {', '.join(self.tasks)} was asked for.")
        if self.framing not in ("auto", "off"):
            raise RequestError(f"framing must be auto or off, got {self.framing!r}.")


class SeenImages:
    """A batch of images as one call sees it: tasks that look at one size share the pixels and what the backbone makes of them.

    Args:
        model, processor: Of the analyzer.
        images (`Sequence[PIL.Image.Image]`): The images.
        request ([`Request`]): What is asked of them.
        recorder ([`Recorder`], *optional*): Runs the model.
    """

    def __init__(
        self,
        model: Any,
        processor: "UniHemaProcessor",
        images: "Sequence[Image.Image]",
        request: Request,
        recorder: "Recorder | None" = None,
    ):
        self.model, self.processor, self.images, self.request = model, processor, images, request
        self.recorder = recorder
        self._batches: dict[tuple, dict[str, torch.Tensor]] = {}
        self._seen: dict[tuple, tuple[UniHemaImageFeatures, dict[str, Any]]] = {}

    def _size(self, task: str) -> tuple:
        return tuple(sorted(self.processor.image_processor.task_sizes[head_of(task)].items()))

    def batch(self, task: str) -> "dict[str, torch.Tensor]":
        """`pixel_values` and `pixel_mask` at the size of a task."""
        size = self._size(task)
        if size not in self._batches:
            batch = self.processor.image_processor(list(self.images), task=head_of(task))
            # On the host, where the model reads whether there is padding without waiting for a device.
            mask = batch["pixel_mask"]
            batch = batch.to(self.model.device)
            batch = dict(batch.to(self.model.dtype) if self.model.dtype.is_floating_point else batch)
            self._batches[size] = batch | {"pixel_mask": mask}
        return self._batches[size]

    def features(self, task: str) -> "UniHemaImageFeatures":
        """What the backbone, and the image encoder where a task at this size reads it, make of the images."""
        return self._at_size_of(task)[0]

    def outputs(self, task: str) -> Any:
        """What the head of a task says."""
        if hasattr(self.model, "get_image_features"):
            return self._at_size_of(task)[1][task]
        texts = {name: self._of_each(value) for name, value in self.request.texts.get(task, {}).items()}
        return self.model(**self.batch(task), **texts, **self._named(task))

    def _at_size_of(self, task: str) -> "tuple[UniHemaImageFeatures, dict[str, Any]]":
        """Features and the outputs of all tasks that look at the size of this one."""
        size = self._size(task)
        if size not in self._seen:
            asked = (*self.request.tasks, *((NUCLEUS,) if NUCLEUS in self.request.texts else ()))
            tasks = tuple(other for other in asked if self._size(other) == size)
            encoding = next(iter(tasks), task)
            prompts = [self.request.prompts[other] for other in tasks if other in self.request.prompts]
            pixels, mask = (self.batch(task)[name] for name in ("pixel_values", "pixel_mask"))
            parts = [part for prompt in prompts for part in (prompt.last_hidden_state, prompt.attention_mask)]
            texts = [self._of_each(part) for part in parts]
            compute = partial(self._compute, encoding, tasks)
            if self.recorder is None:
                self._seen[size] = compute(pixels, mask, *texts)
            else:
                # What is image in each: where there is padding, other operators run.
                inside = (*mask[:, :, 0].sum(1).tolist(), *mask[:, 0].sum(1).tolist())
                mask = mask.to(pixels.device, non_blocking=True) if not bool(mask.all()) else None
                self._seen[size] = self.recorder((encoding, *tasks, *inside), compute, pixels, mask, *texts)
        return self._seen[size]

    def _compute(
        self,
        encoding: str,
        tasks: tuple[str, ...],
        pixels: "torch.Tensor",
        mask: "torch.Tensor | None",
        *texts: Any,
    ) -> "tuple[UniHemaImageFeatures, dict[str, Any]]":
        from unihema.modeling_unihema.outputs import UniHemaPromptFeatures

        features = self.model.get_image_features(pixels, mask, task=encoding)
        rest, outputs = iter(texts), {}
        for task in tasks:
            given = {}
            if task in self.request.prompts:
                given["prompt_features"] = UniHemaPromptFeatures(next(rest), next(rest))
            outputs[task] = self.model(image_features=features, **given, **self._named(task))
        return features, outputs

    def _of_each(self, text: "torch.Tensor") -> "torch.Tensor":
        return text.expand(len(self.images), *text.shape[1:])

    def _named(self, task: str) -> dict[str, str]:
        return {"task": head_of(task)} if len(self.model.tasks) > 1 else {}


def head_of(asked: str) -> str:
    """The task whose head answers: nuclei are a second question to the mask head."""
    return "segmentation" if asked == NUCLEUS else asked


def language_task(text: str) -> str:
    """The task of a text: a sentence with a blank is filled in, anything else is a question."""
    return "cloze" if "___" in text or "<extra_id_" in text else "question_answering"


__all__ = ["Request", "SeenImages", "head_of", "language_task"]
