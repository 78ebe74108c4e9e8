"""What the single-cell head says of crops: of those that were given, and of cells that were found in a field."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from unihema.errors import RequestError
from unihema.loading import available_tasks, require_tasks
from unihema.processing_unihema.class_names import INFECTED, RED_CELL, UNINFECTED, cell_kind, usual_name
from unihema.progress import OnProgress, Progress
from unihema.request import Request, SeenImages
from unihema.results.crop_framing import CropFrame, logits_in_frame
from unihema.results.second_look import Rule, cell_types, look_again, look_for_parasites
from unihema.results.smear_result import SmearResult
from unihema.slides import RegionSource


if TYPE_CHECKING:
    import numpy
    import torch
    from PIL import Image

    from unihema.processing_unihema.processing_unihema import UniHemaProcessor


class CellCrops:
    """Crops of single cells as a model sees them.

    Args:
        model, processor: Of the analyzer.
    """

    def __init__(self, model: Any, processor: "UniHemaProcessor"):
        self.model, self.processor = model, processor

    def logits(self, request: Request, crops: "Sequence[Image.Image]") -> "torch.Tensor":
        """What the single-cell head says of crops, framed where the request says so: `[B, classes]`.

        Args:
            request ([`Request`]): What is asked of them, or of the field that they were cut from.
            crops (`Sequence[PIL.Image.Image]`): The crops.
        """
        import torch

        alone = replace(request, tasks=("single_cell",), questions=(), question_texts=(), texts={}, prompts={})
        seen = SeenImages(self.model, self.processor, crops, alone)
        with torch.inference_mode():
            return self.framed(alone, crops, seen.outputs("single_cell").logits.float())[0]

    def framed(
        self, request: Request, crops: "Sequence[Image.Image]", logits: "torch.Tensor"
    ) -> "tuple[torch.Tensor, list[dict[str, Any] | None]]":
        """Logits `[B, classes]` of crops, of those with a nucleus the mean of two views as the training knows them; and how
        each was framed, where one was.

        Args:
            request ([`Request`]): What is asked of them.
            crops (`Sequence[PIL.Image.Image]`): The crops.
            logits (`torch.Tensor`): What the head says of them as they are, `[B, classes]`.
        """
        frame = self.model.config.trained.crop_frame
        if request.framing != "auto" or frame is None:
            return logits, [None] * len(crops)
        alone = replace(request, tasks=("single_cell",), texts={}, prompts={})

        def classify(views: "list[Image.Image]") -> "torch.Tensor":
            # Not recorded: a recording of the same size would write over what was seen of the crops.
            return SeenImages(self.model, self.processor, views, alone).outputs("single_cell").logits.float()

        return logits_in_frame(crops, logits, CropFrame.of_checkpoint(frame), classify)

    def probabilities(self, request: Request, crops: "Sequence[Image.Image]", labels: Sequence[str]) -> "torch.Tensor":
        """How probable each of some labels is for crops of cells, `[B, labels]`.

        Args:
            request ([`Request`]): What is asked of them, or of the field that they were cut from.
            crops (`Sequence[PIL.Image.Image]`): The crops.
            labels (`Sequence[str]`): Single-cell classes, or groups of them.
        """
        from unihema.processing_unihema.post_processing import single_cell_probabilities

        return single_cell_probabilities(self.logits(request, crops), self.model.config, labels)

    def type_cells(
        self, request: Request, source: RegionSource, result: SmearResult, on_progress: OnProgress | None = None
    ) -> None:
        """Types the nucleated cells of a field from their crops, too."""
        config = self.model.config
        types = cell_types(config.single_cell_labels, config.class_parents)

        def classify(pictures: "list[Image.Image]") -> "numpy.ndarray":
            return self.probabilities(request, pictures, types).clamp(min=1e-9).log().cpu().numpy()

        rule = Rule(**(config.trained.second_look or {}))
        on_crops = _on_crops(result, on_progress)
        result.cells = look_again(
            source, result.cells, result.classes, config.class_parents, types, rule, classify, on_crops
        )

    def look_for_parasites(
        self, request: Request, source: RegionSource, result: SmearResult, on_progress: OnProgress | None = None
    ) -> None:
        """Calls those red cells of a field infected whose crops show it."""
        config = self.model.config

        def classify(pictures: "list[Image.Image]") -> "numpy.ndarray":
            return self.probabilities(request, pictures, (INFECTED, UNINFECTED))[:, 0].cpu().numpy()

        if not any(cell_kind(name, config.class_parents) == RED_CELL for name in result.classes):
            result.warnings.append("No red cells were looked for, so none was looked at for parasites.")
            return
        threshold = float((config.trained.parasites or {})["threshold"])
        on_crops = _on_crops(result, on_progress)
        result.cells = look_for_parasites(source, result.cells, config.class_parents, threshold, classify, on_crops)
        result.classes = list(dict.fromkeys((*result.classes, INFECTED)))

    def looks_again(self, second_look: bool | None, tasks: Sequence[str]) -> bool:
        """Whether cells of fields are typed from their crops, too.

        Args:
            second_look (`bool`, *optional*): What was asked for; as the checkpoint says where nothing was.
            tasks (`Sequence[str]`): What is done with the images.

        Raises:
            CheckpointError, RequestError: It is asked for, and cannot be.
        """
        if second_look is None:
            able = "detection" in tasks and "single_cell" in available_tasks(self.model)
            return able and self.model.config.trained.second_look is not None
        if second_look:
            if "detection" not in tasks:
                raise RequestError("A second look is at the cells of fields: ask for the task detection.")
            require_tasks(self.model, ["single_cell"])
            if len(cell_types(self.model.config.single_cell_labels, self.model.config.class_parents)) < 2:
                raise RequestError(
                    "This checkpoint has no types of white cells among its single-cell classes to tell apart."
                )
        return bool(second_look)

    def check_tells_parasites(self, tasks: Sequence[str]) -> None:
        """Checks that infected red cells can be told.

        Args:
            tasks (`Sequence[str]`): What is done with the images.

        Raises:
            CheckpointError, RequestError: They cannot be.
        """
        if "detection" not in tasks:
            raise RequestError("Parasites are looked for in the red cells of fields: ask for the task detection.")
        require_tasks(self.model, ["single_cell"])
        config, missing = self.model.config, None
        if not {INFECTED, UNINFECTED} <= {usual_name(name) for name in config.single_cell_names}:
            missing = "has no single-cell classes of infected and of uninfected red cells"
        elif config.trained.parasites is None:
            missing = (
                "does not say from what probability on a red cell is infected (trained.parasites of its config.json)"
            )
        if missing is not None:
            raise RequestError(f"This checkpoint {missing}, so it cannot look for parasites.")


def _on_crops(result: SmearResult, on_progress: OnProgress | None) -> Callable[[int, int], None] | None:
    cells = len(result.cells)
    return on_progress and (lambda done, of: on_progress(Progress(result.image, "crop", done, of, cells)))


__all__ = ["CellCrops"]
