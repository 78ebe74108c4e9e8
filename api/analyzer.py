"""One object that analyses: images in; cells, attributes, masks, single-cell classes and answers out."""

import copy
import hashlib
import math
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unihema.cell_crops import CellCrops
from unihema.checkpoint_files import (
    fingerprint,
    is_adapter,
    is_onnx,
    local_folder,
    reference_files,
)
from unihema.device_memory import WithinMemory
from unihema.errors import RequestError
from unihema.files import OpenedImage
from unihema.loading import available_tasks, load_model, require_tasks, set_image_sizes
from unihema.modeling_unihema.tasks import IMAGE_TASKS, TASK_TABLE
from unihema.processing_unihema.class_names import NUCLEUS, WHITE_CELL, cell_kind
from unihema.progress import OnProgress, Progress
from unihema.request import Request, SeenImages, head_of, language_task
from unihema.results.calibration import set_probabilities
from unihema.results.cell_size import KnownSize
from unihema.results.shapes import nucleus_of
from unihema.results.smear_result import CROWDED, Cell, SmearResult
from unihema.results.tiles import TileDetector, TileStore, judge_whole, see_in_tiles, state_pixel_size
from unihema.slides import RegionSource, open_regions
from unihema.version import __version__


if TYPE_CHECKING:
    import numpy
    import torch
    from PIL import Image

    from unihema.inference.graphs import Recorder
    from unihema.inference.onnx import OnnxModel
    from unihema.modeling_unihema.modeling_unihema import UniHemaPreTrainedModel
    from unihema.processing_unihema.processing_unihema import UniHemaProcessor
    from unihema.processing_unihema.questions import Answer
    from unihema.report.smear_report import SmearReport
    from unihema.result_folder import BatchReport
    from unihema.result_shards import Shard
    from unihema.results.odd_cells import CellReference
    from unihema.results.out_of_distribution import ModelReference


# From this share of the queries on, cells were probably left without one.
FULL = 0.95
_making = threading.Lock()


class QueryCapWarning(UserWarning):
    """The field holds about as many cells as the model has queries, so some are probably not counted."""


class Analyzer:
    """Analyses images with a checkpoint, in PyTorch or from an ONNX file.

    It holds model and processor and changes neither while it analyses, so any number of threads may share one. Results depend
    on the image, the request and the weights, on nothing that was analysed before.

    Args:
        model (`UniHemaPreTrainedModel` or `OnnxModel`): The model; put into evaluation mode.
        processor ([`UniHemaProcessor`]): Its processor.
        reference ([`ModelReference`], *optional*): What the images it was trained on are like, for out-of-distribution scores.
        cuda_graphs (`bool`): On an NVIDIA GPU the model runs as recorded graphs, see [`Recorder`]: faster where batches of one
            size come again, in more memory. Threads then analyse one after the other.

    Example:

    ```python
    >>> from unihema import Analyzer

    >>> analyzer = Analyzer.from_pretrained("unihema")
    >>> result = analyzer("smear.png")
    >>> result.counts
    >>> answer = analyzer.ask("cell.png", "What type of white blood cell is this?")
    >>> answer.answer, answer.cells, answer.disagreement
    ```
    """

    def __init__(
        self,
        model: "UniHemaPreTrainedModel | OnnxModel",
        processor: "UniHemaProcessor",
        reference: "ModelReference | None" = None,
        cuda_graphs: bool = True,
    ):
        self.model: Any = model.eval()
        self.cuda_graphs = cuda_graphs
        self.recorder: Recorder | None = None
        self.processor = processor
        self.reference = reference
        self.source: str | None = None
        self.files: dict[str, str] = {}
        # What the weights were when they were read from these files.
        self._loaded_weights: tuple[float, ...] = ()
        # The reference is of the images that these were trained on.
        self._reference_adapters = self._adapters()

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        device: "str | torch.device" = "auto",
        dtype: "str | torch.dtype | None" = None,
        adapters: "Mapping[str, str | Path] | Sequence[str | Path]" = (),
        image_sizes: Mapping[str, int] | None = None,
        int8: bool = False,
        load_in_8bit: bool = False,
        prepare: bool = True,
        cuda_graphs: bool = True,
        **hub: Any,
    ) -> "Analyzer":
        """Loads a checkpoint, an adapter or an exported file, ready to analyse.

        Args:
            source (`str` or `Path`): Folder of a checkpoint or of an adapter, ONNX file of `unihema export`, or repository of
                the Hub. What is on this machine is read without the network.
            device (`str` or `torch.device`): Such as `"cpu"`, `"cuda:0"` or `"mps"`; `"auto"` is an NVIDIA GPU, else Apple's,
                else the processor.
            dtype (`str` or `torch.dtype`, *optional*): `"float32"`, `"bfloat16"` or `"float16"`; the checkpoint's own when
                missing.
            adapters (`Mapping` or `Sequence`, *optional*): Adapters to load beside each other; the first is in use.
            image_sizes (`Mapping[str, int]`, *optional*): Task -> longest edge in pixels at which the model sees images,
                instead of the checkpoint's: for another magnification.
            int8 (`bool`): Quantise the linear layers on the CPU, see [`to_int8`]: faster, less exact.
            load_in_8bit (`bool`): Keep the linears of the base in 8 bit; needs an NVIDIA GPU and bitsandbytes.
            prepare (`bool`): Make the model faster for inference, see [`prepare_for_inference`]. `False` for a model that will
                be saved or trained.
            cuda_graphs (`bool`): As of the class.
            **hub: `revision`, `token`, `cache_dir`, `local_files_only` of a repository.

        Raises:
            CheckpointError: It cannot be used.
            DeviceError: An unknown device or dtype.
            RequestError: An image size that cannot be.
            ValueError: The model cannot be quantised.
        """
        folder = local_folder(source, **hub)
        files = fingerprint(folder, adapters)
        device = "cpu" if int8 and device == "auto" else device
        model: Any
        dtype = "float32" if int8 and dtype is None else dtype
        model, processor = load_model(folder, device, dtype, adapters, load_in_8bit)
        set_image_sizes(processor, image_sizes or {})
        reference = None
        if reference_files(folder) and not is_onnx(folder):
            from unihema.results.out_of_distribution import ModelReference

            reference = ModelReference.of_model(model, folder)
        if prepare and not load_in_8bit and not is_onnx(folder):
            from unihema.inference.prepare import prepare_for_inference

            prepare_for_inference(model)
        if int8:
            from unihema.inference.int8 import to_int8

            model = to_int8(model)
        analyzer = cls(model, processor, reference, cuda_graphs)
        analyzer.source, analyzer.files = str(source), files
        analyzer._loaded_weights = _weight_sums(model)
        if not is_adapter(folder):
            # Of its base, which is in use where no adapter is.
            analyzer._reference_adapters = ()
        return analyzer

    def weights_sha256(self) -> dict[str, str]:
        """SHA-256 of each file that decides what is answered; of the weights themselves where they came from no file, or
        were changed since."""
        if self.files and self._loaded_weights == _weight_sums(self.model):
            return self.files
        if not hasattr(self.model, "parameters"):
            return fingerprint(self.model.config.name_or_path)
        import torch

        digest = hashlib.sha256()
        for name, tensor in _weights(self.model):
            digest.update(name.encode())
            # As bytes: numpy knows no bfloat16.
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return {"weights": digest.hexdigest()}

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks that the model has a head for and was trained on (all of its heads where the checkpoint does not say)."""
        return available_tasks(self.model)

    @property
    def crops(self) -> CellCrops:
        """What the single-cell head says of crops, and of those of cells in fields."""
        return CellCrops(self.model, self.processor)

    def __call__(
        self,
        image: "str | Path | Image.Image | numpy.ndarray | RegionSource",
        tasks: str | Sequence[str] | None = None,
        prompt: str | Sequence[str] | None = None,
        questions: str | Sequence[str] = (),
        threshold: float | None = None,
        tiles: str | int = "auto",
        um_per_pixel: float | None = None,
        white_cells: int | None = None,
        labels: Sequence[str] | None = None,
        framing: str = "auto",
        second_look: bool | None = None,
        parasites: bool = False,
    ) -> SmearResult:
        """Analyses one image.

        Args:
            image (`str`, `Path`, `PIL.Image.Image`, `np.ndarray` or [`RegionSource`]): A smear of any size, or a crop of one
                cell.
            tasks (`Sequence[str]`, *optional*): Among `detection`, `segmentation` and `single_cell`; those of a field that the
                checkpoint was trained on when missing. An empty list asks the questions only.
            prompt (`str` or `Sequence[str]`, *optional*): Class names, or a disease, to look for; all classes when missing.
                Where it names detection classes and nothing else, only these are answered and counted.
            questions (`Sequence[str]`): Questions about the image, or sentences with blanks (`___`) to fill in.
            threshold (`float`, *optional*): Smallest detection score for all classes, instead of the checkpoint's calibrated
                one for each class.
            tiles (`str` or `int`): A wide field, and one whose cells are larger or smaller than those that the checkpoint
                knows, is seen in overlapping tiles at the scale of its training with `"auto"`; no image is with `"off"`. A
                number is the longer edge of a tile in pixels of the image.
            um_per_pixel (`float`, *optional*): Size of a pixel in micrometres, where it is known; the scale follows from it
                instead of from what the file says, or from the red cells that are found.
            white_cells (`int`, *optional*): In an image that is seen in tiles, white cells are looked for at low power, by their
                nuclei, and seen at full power until so many are found: for a differential of a whole slide. Other cells are not
                counted.
            labels (`Sequence[str]`, *optional*): Of a crop of one cell, the single-cell classes, or groups of them, that it may
                be; all classes when missing.
            framing (`str`): A crop of a nucleated cell is also seen in the frame and colours of the training with `"auto"`, where
                the checkpoint says what these are; only as it is with `"off"`.
            second_look (`bool`, *optional*): Type each nucleated cell of a field from its crop, too; as the checkpoint says when
                missing.
            parasites (`bool`): Look at the crop of each red cell of a field for parasites, and call those infected that have one.

        Returns:
            [`SmearResult`]: Coordinates in pixels of the image as it stands in its file.

        Raises:
            UnreadableImageError: The image cannot be read.
            CheckpointError: The checkpoint lacks a head.
            RequestError: Unknown task, a threshold outside 0..1, or a question longer than the limit.
        """
        asked = prompt, questions, threshold, tiles, um_per_pixel, white_cells, labels, framing, second_look, parasites
        return self.analyze_images([image], tasks, *asked)[0]

    def ask(
        self, image: "str | Path | Image.Image | numpy.ndarray", questions: str | Sequence[str]
    ) -> "Answer | list[Answer]":
        """Answers questions about an image, or fills in sentences with blanks.

        Questions of counts ("How many ...", "Is there any ...", "What per cent ...") are answered from the cells that were found,
        others by the text decoder. Either way an answer names the cells that support it, and says where text and heads disagree.

        Args:
            image (`str`, `Path`, `PIL.Image.Image` or `np.ndarray`): The image.
            questions (`str` or `Sequence[str]`): One question, or several.

        Returns:
            [`Answer`] or `list[Answer]`: One answer for one question, else one for each. `str` of it is the answer.

        Raises:
            UnreadableImageError: The image cannot be read.
            CheckpointError: The checkpoint answers no questions.
            RequestError: A question longer than the limit.
        """
        asked = [questions] if isinstance(questions, str) else list(questions)
        answers = self.answers(self(image, **self.asked_of(asked)), asked)
        return answers[0] if isinstance(questions, str) else answers

    def asked_of(self, questions: Sequence[str]) -> dict[str, Any]:
        """What has to be asked of an image, arguments of [`Analyzer.request`], so that [`Analyzer.answers`] can answer.

        Args:
            questions (`Sequence[str]`): The questions.
        """
        from unihema.processing_unihema.questions import counts_infected_cells, is_count

        heads = tuple(task for task in ("detection", "single_cell") if task in self.tasks)
        # Where there is no text decoder, cells still answer how many there are.
        written = tuple(
            question
            for question in questions
            if not ("detection" in heads and is_count(question) and language_task(question) not in self.tasks)
        )
        can_tell = len(heads) == 2 and self.model.config.trained.parasites is not None
        parasites = can_tell and any(map(counts_infected_cells, questions))
        return {"tasks": heads, "questions": written, "parasites": parasites}

    def answers(self, result: SmearResult, questions: Sequence[str]) -> "list[Answer]":
        """The answers to questions, with the cells that support them.

        Args:
            result ([`SmearResult`]): Of what [`Analyzer.asked_of`] says of these questions.
            questions (`Sequence[str]`): The questions.
        """
        texts = {entry["question"]: entry.get("text", entry["answer"]) for entry in result.answers}
        return self._checked_answers(result, [(question, texts.get(question)) for question in questions])

    def _checked_answers(self, result: SmearResult, texts: "Sequence[tuple[str, str | None]]") -> "list[Answer]":
        """Answers with the cells of a result that support them.

        Args:
            result ([`SmearResult`]): Its cells are all that its image shows.
            texts (`Sequence[tuple[str, str | None]]`): Questions, and what the text decoder says to each.
        """
        from unihema.processing_unihema.questions import answer_from_cells

        # No answer says anything of a mask, and writing it down takes long.
        cells = [replace(cell, mask=None).to_dict() for cell in result.cells]
        of_image = result.classes, result.class_parents, result.single_cell, (result.width, result.height)
        morphology = self.model.config.morphology
        return [answer_from_cells(question, text, cells, *of_image, morphology) for question, text in texts]

    def analyze_images(
        self,
        images: "Sequence[str | Path | Image.Image | numpy.ndarray | OpenedImage | RegionSource]",
        tasks: str | Sequence[str] | None = None,
        prompt: str | Sequence[str] | None = None,
        questions: str | Sequence[str] = (),
        threshold: float | None = None,
        tiles: str | int = "auto",
        um_per_pixel: float | None = None,
        white_cells: int | None = None,
        labels: Sequence[str] | None = None,
        framing: str = "auto",
        second_look: bool | None = None,
        parasites: bool = False,
    ) -> list[SmearResult]:
        """Analyses several images at once; each has the result it has alone, up to float rounding.

        Args:
            images (`Sequence`): Images, best of one size: they are padded to the largest.
            tasks, prompt, questions, threshold, tiles, um_per_pixel, white_cells, labels, framing, second_look, parasites: As for
                a single image.

        Returns:
            `list[SmearResult]`: One for each image.
        """
        asked = prompt, questions, threshold, tiles, um_per_pixel, white_cells, labels, framing, second_look, parasites
        return self.run(self.request(tasks, *asked), images)

    def analyze_files(
        self,
        inputs: Sequence[str | Path],
        output: str | Path,
        tasks: str | Sequence[str] | None = None,
        prompt: str | Sequence[str] | None = None,
        questions: str | Sequence[str] = (),
        threshold: float | None = None,
        formats: Sequence[str] = (),
        overwrite: bool = False,
        batch_size: int = 1,
        on_image: Callable[[int, int, Path, SmearResult | str | None], None] | None = None,
        tiles: str | int = "auto",
        um_per_pixel: float | None = None,
        white_cells: int | None = None,
        on_progress: OnProgress | None = None,
        shard: "Shard | None" = None,
        labels: Sequence[str] | None = None,
        framing: str = "auto",
        second_look: bool | None = None,
        parasites: bool = False,
    ) -> "BatchReport":
        """Analyses files, folders and glob patterns into a results folder.

        Images that are in the folder already, and have not changed since, are skipped. A file that cannot be read is reported
        and the rest goes on.

        Args:
            inputs (`Sequence[str | Path]`): Image files, folders (with subfolders) and glob patterns.
            output (`str` or `Path`): Folder for the results; made when missing.
            tasks, prompt, questions, threshold, tiles, um_per_pixel, white_cells, labels, framing, second_look, parasites: As for
                a single image.
            formats (`Sequence[str]`): Files of other programs to write for each image beside the tables: `geojson` (QuPath),
                `coco`, `labels` (an image of instances), `imagej` (a zip file of ROIs), `label_studio` (predictions; the
                labelling configuration is in `label_studio.xml`).
            overwrite (`bool`): Analyse every image again, whatever the folder was written with.
            batch_size (`int`): Images of one size that are analysed together: faster on a GPU, with the same results up to
                float rounding.
            on_image (`Callable`, *optional*): Called after each image with its number from 1, the number of images, its path,
                and its result, an error message, or `None` when it was skipped.
            on_progress (`Callable`, *optional*): Called with a [`Progress`] as tiles of an image and crops of its cells are seen.
            shard ([`Shard`], *optional*): Analyse only the images of this one, into a folder of its own in `output`, of which
                [`merge_results`] makes one results folder in the end.

        Returns:
            [`BatchReport`]

        Raises:
            CheckpointError: The checkpoint lacks a head that is asked for.
            RequestError: Unknown task, a threshold outside 0..1, a text that is too long, a batch of no images, or an output
                folder that holds an image to analyse.
            OutputError: The output folder cannot be written, or was written with another checkpoint or other settings.
        """
        from unihema.result_folder import analyze_into

        asked = prompt, questions, threshold, tiles, um_per_pixel, white_cells, labels, framing, second_look, parasites
        request = self.request(tasks, *asked)
        return analyze_into(output, self, inputs, request, formats, overwrite, batch_size, on_image, on_progress, shard)

    def report(
        self, images: "Sequence[str | Path | Image.Image | numpy.ndarray | RegionSource]", **details: Any
    ) -> "SmearReport":
        """Analyses the images of one sample, and reports it.

        Args:
            images (`Sequence`): Fields, a slide, or crops of single cells. Of crops the task `single_cell` has to be asked for.
            **details: `tasks`, `tiles`, `um_per_pixel`, `white_cells`, `second_look` and `parasites` as for a single image;
                everything else as of [`SmearReport.of`].

        Returns:
            [`SmearReport`]
        """
        from unihema.report.classifier_errors import classifier_errors
        from unihema.report.smear_report import SmearReport

        of_images = ("tasks", "tiles", "um_per_pixel", "white_cells", "second_look", "parasites")
        asked = {name: details.pop(name) for name in of_images if name in details}
        results = [self(image, **asked) for image in images]
        if self.source is not None and "classifier" not in details:
            details["classifier"] = classifier_errors(
                local_folder(self.source, local_files_only=True), self.weights_sha256()
            )
        return SmearReport.of(results, **details)

    def request(
        self,
        tasks: str | Sequence[str] | None = None,
        prompt: str | Sequence[str] | None = None,
        questions: str | Sequence[str] = (),
        threshold: float | None = None,
        tiles: str | int = "auto",
        um_per_pixel: float | None = None,
        white_cells: int | None = None,
        labels: Sequence[str] | None = None,
        framing: str = "auto",
        second_look: bool | None = None,
        parasites: bool = False,
    ) -> Request:
        """Checks, before any image is opened, that the checkpoint can do what is asked, and reads the texts.

        Args:
            tasks, prompt, questions, threshold, tiles, um_per_pixel, white_cells, labels, framing, second_look, parasites: As for
                a single image.

        Returns:
            [`Request`]: To be given to [`Analyzer.run`], as long as the weights stay what they are.

        Raises:
            CheckpointError: The checkpoint lacks a head.
            RequestError: Unknown task, nothing to do, a threshold outside 0..1, or a text that is too long.
        """
        import torch

        tasks = [tasks] if isinstance(tasks, str) else tasks
        tasks = self._default_tasks() if tasks is None else tuple(dict.fromkeys(tasks))
        questions = (questions,) if isinstance(questions, str) else tuple(questions)
        kept = prompt if prompt is None or isinstance(prompt, str) else tuple(prompt)
        request = Request(tasks, kept, questions, threshold, tiles, um_per_pixel, white_cells, framing=framing)
        request.check(knows_size=self.model.config.trained.red_cell_diameter is not None)
        labels = self._checked_labels(labels, tasks)
        looks_again = self.crops.looks_again(second_look, tasks)
        if parasites:
            self.crops.check_tells_parasites(tasks)
        require_tasks(self.model, [*tasks, *dict.fromkeys(map(language_task, questions))])
        tasks = tuple(task for task in IMAGE_TASKS if task in tasks)
        asked = {
            task: self.processor.default_prompt_of(task, self.model.config) if prompt is None else prompt
            for task in tasks
            if TASK_TABLE[task].reads_text
        }
        if prompt is None and {"detection", "segmentation"} <= set(tasks) and self._tells_nuclei():
            asked[NUCLEUS] = NUCLEUS
        try:
            texts = {task: self._tokens(text, head_of(task)) for task, text in asked.items()}
            question_texts = tuple(self._tokens(question, language_task(question)) for question in questions)
        except ValueError as error:
            raise RequestError(str(error)) from error
        prompts = {}
        if hasattr(self.model, "get_prompt_features") and self.model.config.text_guided_refinement:
            with torch.inference_mode():
                prompts = {task: self.model.get_prompt_features(**texts[task], task=head_of(task)) for task in asked}
        return replace(
            request,
            tasks=tasks,
            labels=labels,
            second_look=looks_again,
            parasites=parasites,
            texts=texts,
            question_texts=question_texts,
            prompts=prompts,
        )

    def _checked_labels(self, labels: Sequence[str] | None, tasks: Sequence[str]) -> tuple[str, ...] | None:
        if labels is None:
            return None
        from unihema.processing_unihema.post_processing import single_cell_names_of

        if "single_cell" not in tasks:
            raise RequestError("labels are of single cells: ask for the task single_cell.")
        try:
            return tuple(single_cell_names_of(self.model.config, [labels] if isinstance(labels, str) else labels))
        except ValueError as error:
            raise RequestError(str(error)) from error

    def _tells_nuclei(self) -> bool:
        return NUCLEUS in (self.model.config.trained.mask_prompts or ())

    def _tokens(self, text: str | Sequence[str] | None, task: str) -> "dict[str, torch.Tensor]":
        return dict(self.processor(text=text, task=task).to(self.model.device))

    def run(
        self,
        request: Request,
        images: "Sequence[str | Path | Image.Image | numpy.ndarray | OpenedImage | RegionSource]",
        stores: Sequence[TileStore | None] = (),
        on_progress: OnProgress | None = None,
    ) -> list[SmearResult]:
        """Does what a request says with images.

        Args:
            request ([`Request`]): Of [`Analyzer.request`].
            images (`Sequence`): Images, or what [`open_regions`] gave, which stays open.
            stores (`Sequence`): Of each image, what keeps the tiles that are done; none where missing.
            on_progress (`Callable`, *optional*): Called with a [`Progress`] as tiles of an image and crops of its cells are seen.

        Returns:
            `list[SmearResult]`: One for each image.

        Raises:
            UnreadableImageError: An image cannot be read.
            RequestError: The model was put into training mode.
        """
        if self.model.training:
            raise RequestError("The model is in training mode: call model.eval() before analysing.")
        with ExitStack() as opened:
            sources = [
                image if isinstance(image, RegionSource) else opened.enter_context(open_regions(image))
                for image in images
            ]
            within = WithinMemory(request, self.look, self._on_cpu)
            pixels = [OpenedImage(each.pixels, each.width, each.height, each.name, each.notes) for each in sources]
            results = within.look(pixels)
            for result in results:
                result.warnings += within.warnings
            for number, (source, result) in enumerate(zip(sources, results, strict=True)):
                state_pixel_size(result, source, request.um_per_pixel)
                self._look_closer(request, source, result, stores[number] if stores else None, on_progress)
                if request.second_look:
                    self.crops.type_cells(request, source, result, on_progress)
                # By the head that gave each type.
                set_probabilities(result, self._calibration(request))
                if request.parasites:
                    self.crops.look_for_parasites(request, source, result, on_progress)
                finds_all = "detection" in request.tasks and request.prompt is None and request.white_cells is None
                if result.answers and finds_all:
                    self._support_answers(result)
                for text in result.warnings:
                    if CROWDED in text:
                        warnings.warn(f"{result.image or 'image'}: {text}", QueryCapWarning, stacklevel=4)
        return results

    def _support_answers(self, result: SmearResult) -> None:
        """Adds to the answers of a result what supports them; of its cells their numbers."""
        texts = [(entry["question"], entry["answer"]) for entry in result.answers]
        result.answers = [
            {"question": told.question, "answer": told.answer, **told.support()}
            | ({"cells": [cell["id"] for cell in told.cells]} if told.cells else {})
            for told in self._checked_answers(result, texts)
        ]

    def _calibration(self, request: Request) -> Mapping[str, Mapping[str, Any]]:
        """What scores mean. Of a single cell it was fitted to answers among all classes, framed as the checkpoint frames."""
        fitted = self.model.config.trained.calibration
        as_fitted = request.labels is None and request.framing == "auto"
        return fitted if as_fitted else {head: of for head, of in fitted.items() if head != "single_cell"}

    def look(self, request: Request, opened: Sequence[OpenedImage]) -> list[SmearResult]:
        """What is seen of whole images.

        Args:
            request ([`Request`]): Of [`Analyzer.request`].
            opened (`Sequence[OpenedImage]`): The images.
        """
        import torch

        results = [
            SmearResult(image.width, image.height, image=image.name, warnings=list(image.notes)) for image in opened
        ]
        config, of_crops = self.model.config, "single_cell" in request.tasks or request.looks_at_crops
        parents = config.class_parents if of_crops else config.label_parents
        for result in results:
            result.provenance = self._provenance(request)
            result.class_parents = dict(parents or {})
        recorder = self._recorder_on_gpu()
        seen = SeenImages(self.model, self.processor, [image.pixels for image in opened], request, recorder)
        with torch.inference_mode(), nullcontext() if recorder is None else recorder.held():
            for task in request.tasks:
                {"detection": self._detect, "segmentation": self._segment, "single_cell": self._classify}[task](
                    request, seen, results
                )
            if NUCLEUS in request.texts:
                self._measure_nuclei(seen, results)
            self._compare(request, seen, results)
            for question, tokens in zip(request.questions, request.question_texts, strict=True):
                for result, answer in zip(results, self._answers(question, tokens, seen), strict=True):
                    result.answers.append({"question": question, "answer": answer})
        return results

    def _recorder_on_gpu(self) -> "Recorder | None":
        if self.recorder is None and self.cuda_graphs and self.model.device.type == "cuda":
            from unihema.inference.graphs import Recorder

            # Whichever thread is first.
            with _making:
                self.recorder = self.recorder or Recorder(self.model)
        return self.recorder

    def _look_closer(
        self,
        request: Request,
        source: RegionSource,
        result: SmearResult,
        store: TileStore | None,
        on_progress: OnProgress | None,
    ) -> None:
        """Sees an image in tiles where the request, or the size of its cells, says so, and judges the monolayer."""
        tasks = tuple(task for task in request.tasks if task in ("detection", "segmentation"))
        edge = self.processor.image_processor.task_sizes["detection"].get("longest_edge")
        if "detection" not in tasks or not edge:
            return
        if request.tiles == "off":
            judge_whole(result, source)
            return
        alone = replace(request, tasks=tasks, questions=(), question_texts=())
        within, search = WithinMemory(alone, self.look, self._on_cpu), None
        if request.prompt is not None or request.threshold is not None:
            # Whatever is asked for, red cells tell the scale.
            search = WithinMemory(self.request(["detection"]), self.look, self._on_cpu).look_at_parts
        diameters = self.model.config.trained.red_cell_diameter
        known = None if diameters is None else KnownSize(*diameters)
        see_in_tiles(
            source,
            result,
            TileDetector(within.look_at_parts, edge, known, search, calibrated=request.threshold is None),
            request.tiles,
            request.um_per_pixel,
            white_cells=request.white_cells,
            store=store,
            on_tile=on_progress and (lambda *said: on_progress(Progress(source.name, "tile", *said))),
        )
        if result.tiling is None:
            judge_whole(result, source)
        result.warnings += [text for text in within.warnings if text not in result.warnings]

    def _on_cpu(self) -> "Analyzer | None":
        """The same on the processor, `None` where it is there. The model is copied: others may be using it where it is."""
        import torch

        if self.model.device.type == "cpu":
            return None
        if self.recorder is not None:
            self.recorder.forget()
        there = {}
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            here = tensor.detach().cpu()
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            there[id(tensor)] = torch.nn.Parameter(here, tensor.requires_grad) if is_parameter else here
        # What is in the memo is taken instead of a copy, which the device would have no room for.
        copied = Analyzer(copy.deepcopy(self.model, there), self.processor, self.reference, cuda_graphs=False)
        copied._reference_adapters = self._reference_adapters
        return copied

    def save_pretrained(self, folder: str | Path) -> None:
        """Saves model and processor, with the reference of the images they were trained on.

        Args:
            folder (`str` or `Path`): The folder.

        Raises:
            PreparedModelError: The model was prepared for inference; load it with `prepare=False`.
        """
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        if self.reference is not None:
            self.reference.save_with(self.model, folder)

    def _default_tasks(self) -> tuple[str, ...]:
        fields = tuple(task for task in IMAGE_TASKS if TASK_TABLE[task].reads_text and task in self.tasks)
        return fields or tuple(task for task in IMAGE_TASKS if task in self.tasks)

    def _adapters(self) -> tuple[str, ...]:
        return tuple(getattr(self.model, "adapters_in_use", ()))

    def _detect(self, request: Request, seen: SeenImages, results: list[SmearResult]) -> None:
        from unihema.processing_unihema.post_processing import asked_classes, find_cells, misspelled_classes

        config = self.model.config
        for name, meant in misspelled_classes(config, request.prompt).items():
            hint = f" Did you mean {meant}?" if meant else ""
            for result in results:
                result.warnings.append(
                    f"The prompt names {name!r}, which is no class of this checkpoint, so all classes are answered.{hint}"
                )
        outputs, odd = seen.outputs("detection"), self._cells_known("detection", request)
        sizes = [(result.height, result.width) for result in results]
        found = find_cells(outputs, config, sizes, prompt=request.prompt, threshold=request.threshold)
        asked = asked_classes(config, request.prompt)
        thresholds = config.class_thresholds(request.threshold)
        for number, (result, cells, logits) in enumerate(zip(results, found, outputs.logits, strict=True)):
            result.classes = [name for i, name in enumerate(config.class_names) if asked is None or asked[i]]
            result.cells = [
                Cell(place, cell["box"], cell["label"], cell["score"], cell["attributes"], cell["mask"])
                for place, cell in enumerate(cells, 1)
            ]
            if odd is not None:
                states = outputs.last_hidden_state[number, [cell["query"] for cell in cells]].float().cpu().numpy()
                scores = odd.scores(states, [cell.label for cell in result.cells])
                for cell, score in zip(result.cells, scores, strict=True):
                    cell.odd = score
            _note_if_crowded(logits, thresholds, result)

    def _cells_known(self, head: str, request: Request) -> "CellReference | None":
        """What the cells are like that a head was trained on. A prompt of one's own changes what the decoder makes of them."""
        if self.reference is None or request.prompt is not None or self._adapters() != self._reference_adapters:
            return None
        return self.reference.cells.get(head)

    def _segment(self, request: Request, seen: SeenImages, results: list[SmearResult]) -> None:
        masks = self._masks("segmentation", seen)
        asked = request.prompt or self.processor.default_prompt_of("segmentation", self.model.config)
        for result, mask in zip(results, masks, strict=True):
            result.mask = mask
            result.mask_label = ", ".join([asked] if isinstance(asked, str) else asked or ["cell"])

    def _masks(self, asked: str, seen: SeenImages) -> "list[numpy.ndarray]":
        """What is asked of the mask head, uint8 at the size of each image."""
        masks = self.processor.image_processor.post_process_semantic_segmentation(
            seen.outputs(asked),
            target_sizes=[image.size[::-1] for image in seen.images],
            pixel_mask=seen.batch("segmentation")["pixel_mask"],
            threshold=self.model.config.trained.segmentation_threshold,
        )
        return [mask.to("cpu").numpy().astype("uint8") for mask in masks]

    def _measure_nuclei(self, seen: SeenImages, results: list[SmearResult]) -> None:
        """The areas of nucleus and cytoplasm of each white cell; of one without a mask of its own, the mask within its box."""
        for result, nuclei in zip(results, self._masks(NUCLEUS, seen), strict=True):
            to_x, to_y = nuclei.shape[1] / result.width, nuclei.shape[0] / result.height
            for cell in result.cells:
                if cell_kind(cell.label, result.class_parents) != WHITE_CELL:
                    continue
                left, top = int(cell.box[0] * to_x), int(cell.box[1] * to_y)
                place = slice(top, math.ceil(cell.box[3] * to_y)), slice(left, math.ceil(cell.box[2] * to_x))
                region = result.mask[place] > 0
                if cell.mask is not None and cell.mask.shape == region.shape:
                    region = cell.mask
                areas = nucleus_of(region, nuclei[place])
                cell.nucleus = areas and {name: area / (to_x * to_y) for name, area in areas.items()}

    def _classify(self, request: Request, seen: SeenImages, results: list[SmearResult]) -> None:
        from unihema.processing_unihema.post_processing import most_probable_labels, single_cell_probabilities

        config, labels = self.model.config, request.labels
        outputs, odd = seen.outputs("single_cell"), self._cells_known("single_cell", request)
        logits, frames = self.crops.framed(request, seen.images, outputs.logits.float())
        for result, image, told in zip(results, seen.images, frames, strict=True):
            if told is not None:
                # A large file is reduced on opening.
                scale = result.width / image.width
                result.framing = told | {"box": [side * scale for side in told["box"]]}
        probabilities = single_cell_probabilities(logits, config, labels)
        best = most_probable_labels(probabilities, config, labels)
        names = config.single_cell_labels if labels is None else labels
        for result, row, label in zip(results, probabilities, best.tolist(), strict=True):
            result.single_cell = {"label": names[label], "score": float(row[label])}
        if odd is not None:
            # Of the crop as it was cut: so were those of the training.
            called = [result.single_cell["label"] for result in results]
            for result, score in zip(results, odd.scores(outputs.features.float().cpu().numpy(), called), strict=True):
                if score is not None:
                    result.single_cell["odd"] = score

    def _answers(self, question: str, tokens: "dict[str, torch.Tensor]", seen: SeenImages) -> list[str]:
        answers = self.model.generate(
            **{name: value.expand(len(seen.images), -1) for name, value in tokens.items()},
            image_features=seen.features(language_task(question)),
            max_new_tokens=self.model.config.max_text_length,
        )
        return self.processor.decode_answers(answers)

    def _compare(self, request: Request, seen: SeenImages, results: list[SmearResult]) -> None:
        """The first task that there is a reference for says how far each image is from those the model was trained on."""
        if self.reference is None or self._adapters() != self._reference_adapters:
            return
        task = next((task for task in request.tasks if task in self.reference.tasks), None)
        if task is None:
            return
        from unihema.results.out_of_distribution import compare_images

        compare_images(
            self.reference.tasks[task],
            seen.features(task),
            seen.batch(task)["pixel_values"],
            self.processor,
            task,
            results,
        )

    def _provenance(self, request: Request) -> dict[str, Any]:
        import torch
        import transformers

        from unihema.inference.int8 import is_int8
        from unihema.processing_unihema.post_processing import NMS_IOU, NMS_WITHIN

        config, tasks = self.model.config, request.tasks
        thresholds = dict(zip(config.class_names, config.class_thresholds(request.threshold)))
        return {
            "unihema": __version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "model": config.name_or_path or None,
            "adapters": list(self._adapters()),
            "device": str(self.model.device),
            "dtype": "int8" if is_int8(self.model) else str(self.model.dtype).removeprefix("torch."),
            "tasks": list(tasks),
            "image_sizes": {task: dict(self.processor.image_processor.task_sizes[task]) for task in request.heads},
            "prompt": request.prompt if isinstance(request.prompt, str | None) else list(request.prompt),
            "detection_thresholds": thresholds if "detection" in tasks else None,
            "segmentation_threshold": config.trained.segmentation_threshold if "segmentation" in tasks else None,
            "labels": None if request.labels is None else list(request.labels),
            "framing": request.framing if "single_cell" in tasks or request.looks_at_crops else None,
            "second_look": request.second_look,
            "parasites": dict(config.trained.parasites or {}) if request.parasites else None,
            "nms_iou": NMS_IOU,
            "nms_within": NMS_WITHIN,
        }


def _weights(model: Any) -> "Iterator[tuple[str, torch.Tensor]]":
    """Everything that a model computes with, by name. The state dict of a model in 8 bit has more than tensors."""
    yield from model.named_parameters()
    yield from model.named_buffers()
    for name, part in model.named_modules():
        # The packed weights of a linear layer in 8 bit are no parameters.
        if callable(getattr(part, "weight", None)):
            yield f"{name}.weight", part.weight().dequantize()


def _weight_sums(model: Any) -> tuple[float, ...]:
    """Tells weights that were changed since, without the time that a hash takes."""
    if not hasattr(model, "parameters"):
        return ()
    return tuple(float(tensor.detach().float().sum()) for _, tensor in _weights(model))


def _note_if_crowded(logits: "torch.Tensor", thresholds: Sequence[float], result: SmearResult) -> None:
    # Counted before overlapping boxes are merged: a query that repeats a cell is not free for another one.
    best = logits.float().sigmoid().max(-1)
    used = int((best.values > best.values.new_tensor(thresholds)[best.indices]).sum())
    queries = len(logits)
    if used >= FULL * queries:
        result.warnings.append(
            f"{used} of {queries} {CROWDED}: there are probably more cells than queries, and the counts are too low. Give "
            "smaller tiles."
        )


__all__ = [
    "Analyzer",
    "QueryCapWarning",
]
