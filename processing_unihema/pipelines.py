"""Transformers pipelines for UniHema checkpoints.

`visual-question-answering`, which Transformers dropped, is brought back. Object detection, image segmentation and image
classification are subclasses that treat UniHema models themselves and leave every other model to Transformers. For a
UniHema checkpoint the originals would mistake the tokenizer in its folder for that of a document model, and would look up
single-cell classes among the detection classes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoModelForVisualQuestionAnswering,
    ImageClassificationPipeline,
    ImageSegmentationPipeline,
    ObjectDetectionPipeline,
    Pipeline,
    pipelines,
)
from transformers.image_utils import load_image as fetch_image
from transformers.pipelines import PIPELINE_REGISTRY

from .image_io import load_image
from .post_processing import (
    post_process_morphology,
    post_process_object_detection,
    post_process_semantic_segmentation,
    thresholds_of,
)
from .prompts import question_prompt, task_prompt


VQA = "visual-question-answering"


def _is_unihema(pipeline: Pipeline) -> bool:
    return pipeline.model.config.model_type == "unihema"


def _open_image(image: Any, timeout: float | None = None) -> Image.Image:
    """An image from a file, by our own rules; from an address or base64 text, by those of Transformers."""
    if isinstance(image, str) and image.startswith(("http://", "https://", "data:")):
        return fetch_image(image, timeout=timeout)
    return load_image(image)


def _image_inputs(pipeline: Pipeline, image: Any, task: str, prompt: str | Sequence[str] | None, timeout) -> dict:
    """Model inputs for one image; without a prompt the model uses its configuration's default."""
    image = _open_image(image, timeout)
    inputs = dict(pipeline.image_processor(image, task=task))
    inputs["pixel_values"] = inputs["pixel_values"].to(pipeline.dtype)
    if prompt is not None:
        inputs.update(pipeline.tokenizer([task_prompt(task, prompt)], return_tensors="pt"))
    inputs["target_size"] = torch.tensor([[image.height, image.width]])
    return inputs


def _run(pipeline: Pipeline, inputs: dict) -> dict:
    inputs = dict(inputs)
    target_size = inputs.pop("target_size")
    return {"outputs": pipeline.model(**inputs), "target_size": target_size, "pixel_mask": inputs["pixel_mask"]}


class UniHemaObjectDetectionPipeline(ObjectDetectionPipeline):
    """Object detection: `[{"score", "label", "box": {"xmin", "ymin", "xmax", "ymax"}, "morphology"}]`, pixels.

    For UniHema models `prompt` (class names or a disease) says what to look for, and the threshold is the calibrated one
    of each class unless given. `morphology` maps each attribute to its value.
    """

    def _sanitize_parameters(self, prompt=None, **kwargs):
        preprocess, forward, postprocess = super()._sanitize_parameters(**kwargs)
        if prompt is not None:
            preprocess["prompt"] = prompt
        return preprocess, forward, postprocess

    def preprocess(self, image, timeout=None, prompt=None):
        if not _is_unihema(self):
            return super().preprocess(image, timeout=timeout)
        return _image_inputs(self, image, "detection", prompt, timeout)

    def _forward(self, model_inputs):
        return _run(self, model_inputs) if _is_unihema(self) else super()._forward(model_inputs)

    def postprocess(self, model_outputs, threshold=None):
        if not _is_unihema(self):
            return super().postprocess(model_outputs, **({} if threshold is None else {"threshold": threshold}))
        config, outputs = self.model.config, model_outputs["outputs"]
        if threshold is None:
            threshold = thresholds_of(config)
        found = post_process_object_detection(outputs, threshold, model_outputs["target_size"])
        morphology = post_process_morphology(outputs, found, config.morphology)[0]
        return [
            {
                "score": score,
                "label": config.id2label[label],
                "box": self._get_bounding_box(box),
                "morphology": {name: read["value"] for name, read in attributes.items()},
            }
            for score, label, box, attributes in zip(
                found[0]["scores"].tolist(), found[0]["labels"].tolist(), found[0]["boxes"], morphology, strict=True
            )
        ]


class UniHemaImageSegmentationPipeline(ImageSegmentationPipeline):
    """Image segmentation: `[{"score", "label", "mask"}]`, the mask a PIL image of the input's size, 255 on cells.

    For UniHema models `prompt` says what to segment; it becomes the label. The score is the mean probability inside the
    mask. An image without any gives an empty list.
    """

    def _sanitize_parameters(self, prompt=None, **kwargs):
        preprocess, forward, postprocess = super()._sanitize_parameters(**kwargs)
        if prompt is not None:
            preprocess["prompt"] = postprocess["prompt"] = prompt
        return preprocess, forward, postprocess

    def preprocess(self, image, subtask=None, timeout=None, prompt=None):
        if not _is_unihema(self):
            return super().preprocess(image, subtask=subtask, timeout=timeout)
        if subtask not in (None, "semantic"):
            raise ValueError(f"UniHema segments semantically; subtask '{subtask}' is not possible.")
        return _image_inputs(self, image, "segmentation", prompt, timeout)

    def _forward(self, model_inputs):
        return _run(self, model_inputs) if _is_unihema(self) else super()._forward(model_inputs)

    def postprocess(self, model_outputs, prompt=None, mask_threshold=None, **kwargs):
        if not _is_unihema(self):
            if mask_threshold is not None:
                kwargs["mask_threshold"] = mask_threshold
            return super().postprocess(model_outputs, **kwargs)
        config = self.model.config
        probability = post_process_semantic_segmentation(
            model_outputs["outputs"],
            model_outputs["target_size"],
            pixel_mask=model_outputs["pixel_mask"],
            threshold=None,
        )[0]
        mask = probability > (config.segmentation_threshold if mask_threshold is None else mask_threshold)
        if not mask.any():
            return []
        names = prompt if prompt is not None else config.segmentation_label
        return [
            {
                "score": float(probability[mask].mean()),
                "label": names if isinstance(names, str) else ", ".join(names),
                "mask": Image.fromarray((mask.cpu().numpy() * 255).astype("uint8")),
            }
        ]


class UniHemaImageClassificationPipeline(ImageClassificationPipeline):
    """Image classification: `[{"label", "score"}]`, best first; for UniHema models over the single-cell classes."""

    def preprocess(self, image, timeout=None):
        if not _is_unihema(self):
            return super().preprocess(image, timeout=timeout)
        inputs = _image_inputs(self, image, "single_cell", None, timeout)
        del inputs["target_size"]
        return inputs

    def postprocess(self, model_outputs, function_to_apply=None, top_k=5):
        if not _is_unihema(self):
            return super().postprocess(model_outputs, function_to_apply=function_to_apply, top_k=top_k)
        names = self.model.config.single_cell_labels
        best = model_outputs["logits"][0].float().softmax(-1).sort(descending=True)
        return [
            {"label": names[label], "score": score}
            for score, label in list(zip(best.values.tolist(), best.indices.tolist(), strict=True))[:top_k]
        ]


class VisualQuestionAnsweringPipeline(Pipeline):
    """Answers questions about images: `[{"answer", "score"}]`.

    The answer is generated by the model from question and image; the score is the mean probability of its tokens.

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

    def _sanitize_parameters(self, generate_kwargs=None, max_new_tokens=None, timeout=None, **kwargs):
        if kwargs:
            raise TypeError(f"Unknown argument {sorted(kwargs)[0]!r}; options for generate() go into generate_kwargs.")
        forward = {"generate_kwargs": dict(generate_kwargs or {})} if generate_kwargs or max_new_tokens else {}
        if max_new_tokens is not None:
            forward["generate_kwargs"]["max_new_tokens"] = max_new_tokens
        return ({} if timeout is None else {"timeout": timeout}), forward, {}

    def __call__(self, image=None, question: str | list[str] | None = None, **kwargs):
        """
        Args:
            image: An image (path, address or PIL image), a list of them, or dictionaries with `image` and `question`.
            question (`str` or `list[str]`, *optional*): One question for all images, or one for each. Several questions
                may be asked of a single image.
            **kwargs: `batch_size`, `generate_kwargs`, `max_new_tokens`, `timeout`.

        Returns:
            `list[dict]` for one image and question; a list of such lists for several.

        Raises:
            ValueError: No question, or as many questions as images are needed.
        """
        if isinstance(image, dict) or (isinstance(image, list) and image and isinstance(image[0], dict)):
            return super().__call__(image, **kwargs)
        if image is None or question is None:
            raise ValueError("Visual question answering needs an image and a question.")
        if not isinstance(image, list) and isinstance(question, str):
            return super().__call__({"image": image, "question": question}, **kwargs)
        images = image if isinstance(image, list) else [image] * len(question)
        questions = [question] * len(images) if isinstance(question, str) else question
        if len(images) != len(questions):
            raise ValueError(f"{len(questions)} questions for {len(images)} images: give one for all, or one for each.")
        return super().__call__([{"image": i, "question": q} for i, q in zip(images, questions, strict=True)], **kwargs)

    def preprocess(self, inputs, timeout=None):
        missing = {"image", "question"} - inputs.keys()
        if missing:
            raise ValueError(f"The input has no {' and no '.join(sorted(missing))}.")
        image = _open_image(inputs["image"], timeout)
        if _is_unihema(self):
            found = dict(self.processor(images=image, text=inputs["question"], task="question_answering"))
        else:
            found = dict(self.processor(images=image, text=question_prompt(inputs["question"]), return_tensors="pt"))
        found["pixel_values"] = found["pixel_values"].to(self.dtype)
        return found

    def _forward(self, model_inputs, generate_kwargs=None):
        options = {"return_dict_in_generate": True, "output_scores": True, **(generate_kwargs or {})}
        if options.get("generation_config") is None and "max_new_tokens" not in options:
            options["max_new_tokens"] = getattr(self.processor, "max_text_length", 64)
        generated = self.model.generate(**model_inputs, **options)
        scores = self.model.compute_transition_scores(
            generated.sequences, generated.scores, getattr(generated, "beam_indices", None), normalize_logits=True
        )
        tokens = generated.sequences[:, -scores.shape[1] :] if scores.shape[1] else generated.sequences[:, :0]
        return {"sequences": generated.sequences, "scores": scores, "tokens": tokens}

    def postprocess(self, model_outputs):
        answers = []
        pad = self.model.config.pad_token_id
        for sequence, scores, tokens in zip(
            model_outputs["sequences"], model_outputs["scores"], model_outputs["tokens"], strict=True
        ):
            kept = scores[(tokens != pad) & scores.isfinite()]
            text = self.processor.decode(sequence, skip_special_tokens=True).strip()
            answers.append({"answer": text, "score": float(kept.exp().mean()) if len(kept) else 0.0})
        return answers


def register_pipelines() -> None:
    """Makes `transformers.pipeline` know the pipelines above; calling it again changes nothing."""
    # Transformers refuses the tasks in this (private) table before it looks at the registry.
    getattr(pipelines, "REMOVED_TASKS", {}).pop(VQA, None)
    tasks = PIPELINE_REGISTRY.supported_tasks
    if VQA not in tasks:
        PIPELINE_REGISTRY.register_pipeline(
            VQA,
            pipeline_class=VisualQuestionAnsweringPipeline,
            pt_model=AutoModelForVisualQuestionAnswering,
            type="multimodal",
        )
    tasks["object-detection"]["impl"] = UniHemaObjectDetectionPipeline
    tasks["image-segmentation"]["impl"] = UniHemaImageSegmentationPipeline
    tasks["image-classification"]["impl"] = UniHemaImageClassificationPipeline
