"""Transformers pipelines for UniHema checkpoints.

`visual-question-answering`, which Transformers dropped, is brought back. Object detection, image segmentation and image
classification need pipelines of their own: the originals would mistake the tokenizer in a UniHema checkpoint for that of a
document model, and would look up single-cell classes among the detection classes. Transformers knows one pipeline a task,
so ours stand in its registry, and a model of others gets the original: see [`_ForUniHema`].
"""

import base64
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import ImageClassificationPipeline, ImageSegmentationPipeline, ObjectDetectionPipeline, Pipeline
from transformers.image_utils import load_image as fetch_image

from unihema.errors import InputError, InputTypeError, UnreadableImageError

from .image_io import image_size, load_image
from .post_processing import (
    asked_classes,
    find_cells,
    most_probable_labels,
    post_process_semantic_segmentation,
    single_cell_names_of,
    single_cell_probabilities,
)
from .prompts import task_prompt
from .questions import CELLS, answer_from_cells


class _ForUniHema:
    """Mixin that creates the pipeline class for a UniHema model, and its `stock` pipeline for any other model."""

    stock: type[Pipeline]

    def __new__(cls, model=None, *args, **kwargs):
        # Copying and unpickling pass no model.
        if model is None or model.config.model_type == "unihema":
            return super().__new__(cls)
        return cls.stock(model, *args, **kwargs)

    def __call__(self, *args, **kwargs):
        """See the stock pipeline; an empty list, which Transformers asks for its first entry, gives an empty one."""
        if args and isinstance(args[0], (list, tuple)) and not args[0]:
            return []
        return super().__call__(*args, **kwargs)

    def check_model_type(self, supported_models: list[str] | dict) -> None:
        """Does nothing: Transformers' list lacks models whose code came with their checkpoint."""


def _image_source(image: Any, timeout: float | None = None) -> Any:
    """An image as [`load_image`] opens it: a URL is fetched as Transformers does, text that is no file is read as base64."""
    if not isinstance(image, str) or os.path.isfile(image):
        return image
    if image.startswith(("http://", "https://")):
        return fetch_image(image, timeout=timeout)
    try:
        content = base64.b64decode(image.partition(",")[2] if image.startswith("data:") else image)
        image_size(content)
    except (UnreadableImageError, ValueError) as error:
        shown = image if len(image) <= 100 else f"{image[:60]}..."
        raise UnreadableImageError(f"{shown}: no such image file, and no image as base64 text. Check it.") from error
    return content


def _image_inputs(pipeline: Pipeline, image: Any, task: str, prompt: str | Sequence[str] | None, timeout) -> dict:
    """Model inputs for one image; without a prompt the model uses its configuration's default."""
    source = _image_source(image, timeout)
    opened = load_image(source)
    inputs = dict(pipeline.image_processor(opened, task=task))
    inputs["pixel_values"] = inputs["pixel_values"].to(pipeline.dtype)
    if prompt is not None:
        if pipeline.tokenizer is None:
            raise InputError("A prompt needs the checkpoint's tokenizer: pass tokenizer= to the pipeline.")
        tokens = pipeline.tokenizer([task_prompt(task, prompt)], return_tensors="pt")
        length, limit = tokens["input_ids"].shape[1], pipeline.tokenizer.model_max_length
        if length > limit:
            raise InputError(f"The prompt has {length} tokens; the limit is {limit}. Name fewer classes.")
        inputs.update(tokens)
    # Boxes are in pixels of the file, however large; masks have the size of the opened image.
    from_file = task == "detection" and isinstance(source, (str, Path, bytes))
    inputs["target_size"] = torch.tensor([image_size(source if from_file else opened)])
    return {"sample": inputs}


def _batch(pipeline: Pipeline, samples: list[dict]) -> dict:
    """Stacks samples of one image shape; shorter texts are padded."""
    batch = {}
    for name in samples[0]:
        values = [sample[name] for sample in samples]
        if name in ("input_ids", "attention_mask"):
            filler = pipeline.model.config.pad_token_id if name == "input_ids" else 0
            longest = max(value.shape[1] for value in values)
            values = [torch.nn.functional.pad(v, (0, longest - v.shape[1]), value=filler) for v in values]
        batch[name] = torch.cat(values)
    return batch


def _run(pipeline: Pipeline, model_inputs: dict, call: Callable[[dict], dict]) -> dict[str, list[torch.Tensor]]:
    """Outputs of the model for each image of a batch.

    Transformers puts only images of one size together, but leaves what is not a tensor as a list, so the samples come here
    whole. Those of one padded shape run together: padding changes what the normalisations of the model see, and an image's
    result should not depend on the images beside it.

    Args:
        pipeline (`Pipeline`): The pipeline.
        model_inputs (`dict`): `sample`: the inputs of one image, or a list of them.
        call (`Callable`): Runs the model; inputs of a batch to named tensors with one row an image.
    """
    samples = model_inputs["sample"]
    samples = samples if isinstance(samples, list) else [samples]
    shapes: dict[tuple, list[int]] = {}
    for index, sample in enumerate(samples):
        shapes.setdefault(tuple(sample["pixel_values"].shape), []).append(index)
    results: list[dict] = [{} for _ in samples]
    for indices in shapes.values():
        for name, rows in call(_batch(pipeline, [samples[index] for index in indices])).items():
            for index, row in zip(indices, rows, strict=True):
                results[index][name] = row
    return {name: [result[name] for result in results] for name in results[0]}


def _run_head(
    pipeline: Pipeline, task: str, model_inputs: dict, outputs: Sequence[str]
) -> dict[str, list[torch.Tensor]]:
    """The named outputs of a task's head, and the inputs that post-processing needs."""

    def call(inputs: dict) -> dict:
        target_size = inputs.pop("target_size")
        found = pipeline.model(task=task, **inputs)
        return {name: found[name] for name in outputs} | {
            "target_size": target_size,
            "pixel_mask": inputs["pixel_mask"],
        }

    return _run(pipeline, model_inputs, call)


def _one(model_outputs: dict) -> dict:
    """Outputs of one image as a batch of one, whether or not the pipeline took them out of a larger batch."""
    return {name: value[0][None] if isinstance(value, list) else value for name, value in model_outputs.items()}


def _check_known(given: Iterable[str], known: Sequence[str]) -> None:
    """Refuses what the stock pipeline would pass over, such as a misspelled `threshold`."""
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise InputTypeError(f"Unknown argument {unknown[0]!r}; there are prompt, {', '.join(known)}.")


class UniHemaObjectDetectionPipeline(_ForUniHema, ObjectDetectionPipeline):
    """Object detection: `[{"score", "label", "box": {"xmin", "ymin", "xmax", "ymax"}, "morphology"}]`, pixels.

    `prompt` or `candidate_labels` (class names or a disease) says what to look for, and the threshold is the calibrated one
    of each class unless given. Where the prompt names classes, only these are answered. `morphology` maps each attribute to
    its value, and is empty for cells without a nucleus.
    """

    stock = ObjectDetectionPipeline

    def _sanitize_parameters(self, prompt=None, candidate_labels=None, **kwargs):
        _check_known(kwargs, ("threshold", "timeout"))
        preprocess, forward, postprocess = super()._sanitize_parameters(**kwargs)
        if prompt is not None and candidate_labels is not None:
            raise InputError("Give prompt or candidate_labels, not both: they are the same.")
        prompt = candidate_labels if prompt is None else prompt
        if prompt is not None:
            preprocess["prompt"] = postprocess["prompt"] = prompt
        return preprocess, forward, postprocess

    def preprocess(self, image, timeout=None, prompt=None):
        return _image_inputs(self, image, "detection", prompt, timeout)

    def _forward(self, model_inputs):
        return _run_head(self, "detection", model_inputs, ("logits", "pred_boxes", "pred_morphology"))

    def postprocess(self, model_outputs, threshold=None, prompt=None):
        model_outputs = _one(model_outputs)
        outputs = SimpleNamespace(**model_outputs)
        (cells,) = find_cells(outputs, self.model.config, model_outputs["target_size"], prompt, threshold)
        return [
            {
                "score": cell["score"],
                "label": cell["label"],
                "box": self._get_bounding_box(torch.tensor(cell["box"])),
                "morphology": {name: read["value"] for name, read in cell["attributes"].items()},
            }
            for cell in cells
        ]


class UniHemaImageSegmentationPipeline(_ForUniHema, ImageSegmentationPipeline):
    """Image segmentation: `[{"score", "label", "mask"}]`, the mask a PIL image of the input's size, 255 on cells.

    The mask of a file too large to be opened whole (`image_io.MAX_PIXELS`) has the size it was reduced to.

    `prompt` says what to segment; it becomes the label. The score is the mean probability inside the mask. An image without
    any gives an empty list.
    """

    stock = ImageSegmentationPipeline

    def _sanitize_parameters(self, prompt=None, **kwargs):
        _check_known(kwargs, ("mask_threshold", "overlap_mask_area_threshold", "subtask", "threshold", "timeout"))
        preprocess, forward, postprocess = super()._sanitize_parameters(**kwargs)
        if prompt is not None:
            preprocess["prompt"] = postprocess["prompt"] = prompt
        return preprocess, forward, postprocess

    def preprocess(self, image, subtask=None, timeout=None, prompt=None):
        if subtask not in (None, "semantic"):
            raise InputError(f"UniHema segments semantically; subtask '{subtask}' is not possible.")
        return _image_inputs(self, image, "segmentation", prompt, timeout)

    def _forward(self, model_inputs):
        return _run_head(self, "segmentation", model_inputs, ("mask_logits",))

    def postprocess(self, model_outputs, prompt=None, mask_threshold=None, **kwargs):
        config, model_outputs = self.model.config, _one(model_outputs)
        probability = post_process_semantic_segmentation(
            SimpleNamespace(**model_outputs),
            model_outputs["target_size"],
            pixel_mask=model_outputs["pixel_mask"],
            threshold=None,
        )[0]
        mask = probability > (config.trained.segmentation_threshold if mask_threshold is None else mask_threshold)
        if not mask.any():
            return []
        names = prompt if prompt is not None else config.trained.segmentation_label
        return [
            {
                "score": float(probability[mask].mean()),
                "label": names if isinstance(names, str) else ", ".join(names),
                "mask": Image.fromarray((mask.cpu().numpy() * 255).astype("uint8")),
            }
        ]


class UniHemaImageClassificationPipeline(_ForUniHema, ImageClassificationPipeline):
    """Image classification: `[{"label", "score"}]`, best first, over the single-cell classes, or the `labels` asked for: classes
    and groups of them."""

    stock = ImageClassificationPipeline

    def _sanitize_parameters(self, labels=None, **kwargs):
        preprocess, forward, postprocess = super()._sanitize_parameters(**kwargs)
        if labels is not None:
            postprocess["labels"] = [labels] if isinstance(labels, str) else list(labels)
        return preprocess, forward, postprocess

    def preprocess(self, image, timeout=None):
        return _image_inputs(self, image, "single_cell", None, timeout)

    def _forward(self, model_inputs):
        return _run_head(self, "single_cell", model_inputs, ("logits",))

    def postprocess(self, model_outputs, function_to_apply=None, top_k=5, labels=None):
        names = self.model.config.single_cell_labels
        logits = _one(model_outputs)["logits"][0].float()
        function = getattr(function_to_apply, "value", function_to_apply) or "softmax"
        if labels is not None:
            if function != "softmax":
                raise InputError(
                    f"labels are told apart by softmax; function_to_apply={function!r} is for all classes."
                )
            names = single_cell_names_of(self.model.config, labels)
            logits = single_cell_probabilities(logits[None], self.model.config, labels)[0].log()
        scores = {"softmax": logits.softmax(-1), "sigmoid": logits.sigmoid(), "none": logits}[function]
        order = scores.argsort(descending=True).tolist()
        if function == "softmax":
            # The answer is chosen from coarse to fine; a class that is as probable alone may be of another kind.
            answer = int(most_probable_labels(scores[None], self.model.config, labels)[0])
            order = [answer, *(label for label in order if label != answer)]
        return [{"label": names[label], "score": float(scores[label])} for label in order[:top_k]]


class VisualQuestionAnsweringPipeline(Pipeline):
    """Answers questions about images: `[{"answer", "score"}]`.

    The answer is generated by the model from question and image; the score is the mean probability of its tokens. Models
    that choose among fixed answers instead give the `top_k` most probable.

    Example:

    ```python
    >>> import unihema
    >>> from transformers import pipeline

    >>> ask = pipeline("visual-question-answering", model="unihema")
    >>> ask(image="smear.png", question="What type of white blood cell is this?")
    ```
    """

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False
    _pipeline_calls_generate = True
    _processor_options = {"return_tensors": "pt"}

    def _sanitize_parameters(self, generate_kwargs=None, max_new_tokens=None, timeout=None, top_k=None, **kwargs):
        if kwargs:
            raise InputTypeError(
                f"Unknown argument {sorted(kwargs)[0]!r}; options for generate() go into generate_kwargs."
            )
        options = dict(generate_kwargs or {}) | ({} if max_new_tokens is None else {"max_new_tokens": max_new_tokens})
        forward = {"generate_kwargs": options} if options else {}
        return ({} if timeout is None else {"timeout": timeout}), forward, ({} if top_k is None else {"top_k": top_k})

    def __call__(self, image=None, question: str | list[str] | None = None, **kwargs):
        """
        Args:
            image: An image (path, address or PIL image), a list of them, or dictionaries with `image` and `question`: one,
                a list, a generator or a dataset of them.
            question (`str` or `list[str]`, *optional*): One question for all images, or one for each. Several questions
                may be asked of a single image.
            **kwargs: `batch_size`, `generate_kwargs`, `max_new_tokens`, `timeout`, `top_k`.

        Returns:
            `list[dict]` for one image and question; a list of such lists for several.

        Raises:
            ValueError: No question, or as many questions as images are needed.
        """
        image = list(image) if isinstance(image, tuple) else image
        if image == []:
            return []
        if question is None and (
            _is_stream(image) or (isinstance(image, list) and all(isinstance(i, dict) for i in image))
        ):
            return super().__call__(image, **kwargs)
        if image is None or question is None:
            raise InputError("Visual question answering needs an image and a question.")
        if not isinstance(image, list) and isinstance(question, str):
            return super().__call__({"image": image, "question": question}, **kwargs)
        images = image if isinstance(image, list) else [image] * len(question)
        questions = [question] * len(images) if isinstance(question, str) else question
        if len(images) != len(questions):
            raise InputError(f"{len(questions)} questions for {len(images)} images: give one for all, or one for each.")
        return super().__call__([{"image": i, "question": q} for i, q in zip(images, questions, strict=True)], **kwargs)

    def preprocess(self, inputs, timeout=None):
        missing = {"image", "question"} - inputs.keys()
        if missing:
            raise InputError(f"The input has no {' and no '.join(sorted(missing))}.")
        image = load_image(_image_source(inputs["image"], timeout))
        found = dict(self.processor(images=image, text=inputs["question"], **self._processor_options))
        found["pixel_values"] = found["pixel_values"].to(self.dtype)
        return found

    def _forward(self, model_inputs, generate_kwargs=None):
        if not self.model.can_generate():
            return {"logits": self.model(**model_inputs).logits}
        return self._generate(model_inputs, generate_kwargs)

    def _generate(self, inputs: dict, generate_kwargs: dict | None) -> dict:
        """`sequences` and `scores` of their tokens, `[images, sequences of each, tokens]`."""
        options = {"return_dict_in_generate": True, "output_scores": True, **(generate_kwargs or {})}
        if options.get("generation_config") is None and "max_new_tokens" not in options:
            options["max_new_tokens"] = getattr(self.processor, "max_text_length", 64)
        generated = self.model.generate(**inputs, **options)
        scores = self.model.compute_transition_scores(
            generated.sequences, generated.scores, getattr(generated, "beam_indices", None), normalize_logits=True
        )
        images = len(inputs["pixel_values"])
        return {
            "scores": scores.reshape(images, -1, scores.shape[-1]),
            "sequences": generated.sequences.reshape(images, -1, generated.sequences.shape[-1]),
        }

    def postprocess(self, model_outputs, top_k=5):
        config, model_outputs = self.model.config, _one(model_outputs)
        if "logits" in model_outputs:
            probabilities = model_outputs["logits"][0].float().sigmoid()
            best = probabilities.topk(min(top_k, len(probabilities)))
            return [
                {"score": score, "answer": config.id2label[answer]}
                for score, answer in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            ]
        answers = []
        pad = config.get_text_config(decoder=True).pad_token_id
        for sequence, scores in zip(model_outputs["sequences"][0], model_outputs["scores"][0], strict=True):
            tokens = sequence[len(sequence) - len(scores) :]
            kept = scores[(tokens != (-1 if pad is None else pad)) & scores.isfinite()]
            text = self.processor.decode(sequence, skip_special_tokens=True).strip()
            answers.append({"answer": text, "score": float(kept.exp().mean()) if len(kept) else 0.0})
        return answers


class UniHemaVisualQuestionAnsweringPipeline(_ForUniHema, VisualQuestionAnsweringPipeline):
    """Visual question answering where an answer does not depend on the images and questions of its batch.

    A model with a detection head as well (`UniHemaForMultiTask`) gives an answer more keys than `answer` and `score`: `source`,
    `cells`, `counts`, `attributes`, `text`, `disagreement` and `note` of [`Answer`], those that say something. Questions of
    counts are then answered from the cells that are found, and `score` is the mean of theirs.
    """

    stock = VisualQuestionAnsweringPipeline
    _processor_options = {"task": "question_answering"}

    def preprocess(self, inputs, timeout=None):
        sample = super().preprocess(inputs, timeout)
        if not self._finds_cells():
            return {"sample": sample}
        image = load_image(_image_source(inputs["image"], timeout))
        cells = dict(self.processor.image_processor(image, task="detection"))
        cells["pixel_values"] = cells["pixel_values"].to(self.dtype)
        cells["target_size"] = torch.tensor([image_size(image)])
        return {"sample": sample, "cells": {"sample": cells}, "question": inputs["question"]}

    def _finds_cells(self) -> bool:
        trained = self.model.config.trained.tasks
        return "detection" in self.model.tasks and (trained is None or "detection" in trained)

    def _forward(self, model_inputs, generate_kwargs=None):
        outputs = _run(self, model_inputs, lambda inputs: self._generate(inputs, generate_kwargs))
        if "cells" in model_inputs:
            outputs["support"] = self._support(model_inputs["cells"], model_inputs["question"])
        return outputs

    def _support(self, cells: dict | list[dict], questions: str | list[str]) -> list[dict[str, Any]]:
        """For each image its question and the cells that are found in it."""
        samples = [each["sample"] for each in (cells if isinstance(cells, list) else [cells])]
        questions = [questions] if isinstance(questions, str) else questions
        found = []
        for sample, question in zip(samples, questions, strict=True):
            target = sample["target_size"]
            outputs = self.model(task="detection", **{key: of for key, of in sample.items() if key != "target_size"})
            height, width = target[0].tolist()
            (of_image,) = find_cells(outputs, self.model.config, target)
            found.append({"question": question, "cells": of_image, "size": (width, height)})
        return found

    def postprocess(self, model_outputs, top_k=5):
        support = model_outputs.pop("support", None)
        answers = super().postprocess(model_outputs, top_k)
        if support is None:
            return answers
        support = support[0] if isinstance(support, list) else support
        config = self.model.config
        asked = asked_classes(config, None)
        # Of a class that is not looked for nothing is known, as of one that the checkpoint does not have.
        classes = (
            [name for name, of in zip(config.class_names, asked) if of] if asked is not None else config.class_names
        )
        for each in answers:
            told = answer_from_cells(
                support["question"],
                each["answer"],
                support["cells"],
                classes,
                config.label_parents,
                size=support["size"],
                morphology=config.morphology,
            )
            each["answer"] = told.answer
            each |= told.support()
            if told.source == CELLS and told.cells:
                each["score"] = float(np.mean([cell["score"] for cell in told.cells]))
        return answers


def _is_stream(inputs: Any) -> bool:
    """A dictionary, generator or dataset, and not an image or a list."""
    if isinstance(inputs, (str, bytes, list, Image.Image, np.ndarray, torch.Tensor)):
        return False
    return isinstance(inputs, Iterable) or hasattr(inputs, "__getitem__")
