"""UniHemaProcessor: images, text and a task in; model inputs out; and generated tokens back to answers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase, T5Tokenizer
from transformers.image_processing_utils import BatchFeature
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin, TextKwargs

from unihema.errors import InputError, InputTypeError
from unihema.modeling_unihema.remote_code import ProcessorWithCode
from unihema.modeling_unihema.tasks import IMAGE_TASKS, LANGUAGE_TASKS, TASK_TABLE, check_task

from .image_processing_unihema import UniHemaImageProcessor, UniHemaImageProcessorKwargs, image_list
from .prompts import task_prompt


DEFAULT_TOKENIZER = Path(__file__).parent / "tokenizer"
DEFAULT_PROMPTS = {name: task.default_prompt for name, task in TASK_TABLE.items() if task.default_prompt is not None}


def load_default_tokenizer() -> PreTrainedTokenizerBase:
    """Our own small T5-style tokenizer, trained on haematology text: about a thousand pieces, sentinels in T5's order.

    Needs neither the network nor sentencepiece; see tools/train_tokenizer.py.
    """
    return T5Tokenizer.from_pretrained(DEFAULT_TOKENIZER)


class UniHemaProcessorKwargs(ProcessingKwargs, total=False):
    """Call arguments of [`UniHemaProcessor`]."""

    images_kwargs: UniHemaImageProcessorKwargs
    _defaults = {"text_kwargs": {"padding": True}, "common_kwargs": {"return_tensors": "pt"}}


class UniHemaProcessor(ProcessorWithCode, ProcessorMixin):
    r"""Prepares images and text for a UniHema model, and decodes its answers.

    Args:
        image_processor ([`UniHemaImageProcessor`]): The image half.
        tokenizer (`PreTrainedTokenizerBase`): A T5 tokenizer: our own small one, or any flan-T5's.
        default_prompts (`dict[str, str]`, *optional*): What detection and segmentation ask for when no text is given.
        max_text_length (`int`, *optional*, defaults to 64): Longest text in tokens (`config.fusion_queries`).

    Example:

    ```python
    >>> from unihema import UniHemaProcessor

    >>> processor = UniHemaProcessor.from_default()
    >>> inputs = processor(images="smear.png", text="What type of white blood cell is this?")
    ```
    """

    valid_processor_kwargs = UniHemaProcessorKwargs

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        default_prompts: dict[str, str] | None = None,
        max_text_length: int = 64,
        **kwargs: Any,
    ):
        self.default_prompts = {**DEFAULT_PROMPTS, **(default_prompts or {})}
        self.max_text_length = max_text_length
        super().__init__(image_processor, tokenizer, **kwargs)

    @classmethod
    def from_default(cls, tokenizer: str | None = None, max_text_length: int = 64, **task_sizes) -> "UniHemaProcessor":
        """A processor that is not loaded from a checkpoint.

        Args:
            tokenizer (`str`, *optional*): Name or folder of a T5 tokenizer; our own small one when missing.
            max_text_length (`int`): Longest text in tokens.
            **task_sizes (`dict[str, int]`): Image size of a task, see [`UniHemaImageProcessor`].
        """
        if tokenizer is None:
            loaded = load_default_tokenizer()
        else:
            from transformers import AutoTokenizer

            loaded = AutoTokenizer.from_pretrained(tokenizer)
        return cls(UniHemaImageProcessor(task_sizes=task_sizes), loaded, max_text_length=max_text_length)

    @property
    def model_input_names(self) -> list[str]:
        """What the models read."""
        return ["pixel_values", "pixel_mask", "input_ids", "attention_mask"]

    def __call__(
        self,
        images=None,
        text=None,
        task: str | None = None,
        annotations=None,
        masks=None,
        answers=None,
        class_names: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """
        Args:
            images (*optional*): One image or a list: paths, PIL images, arrays or tensors.
            text (`str` or `list`, *optional*): Detection and segmentation: class names or a disease, one for all images
                or a list with one entry (a string or a list of names) for each. Language tasks: a question or masked
                sentence for each image, or a list of K of them for each image.
            task (`str`, *optional*): One of `TASKS`; question_answering when text is given, otherwise detection.
            annotations (*optional*): COCO annotations, see [`UniHemaImageProcessor`].
            masks (*optional*): Masks, see [`UniHemaImageProcessor`].
            answers (*optional*): Answers to learn, shaped like `text`; they become `labels`.
            class_names (`Sequence[str]`, *optional*): Class names for the prompt of every image, instead of `text`.
            **kwargs: `size`, `device` and other arguments of the image processor, also as `images_kwargs`;
                `padding="max_length"` with `max_length` (`max_text_length` when missing), also as `text_kwargs`, to pad
                `text` to that many tokens. Tensors are always PyTorch's, and texts always padded and never cut,
                whatever `return_tensors`, `padding` and `truncation` say.

        Returns:
            `BatchFeature`: `pixel_values`, `pixel_mask`, `input_ids`, `attention_mask` and `labels`, as far as the task
            has them.

        Raises:
            ValueError: Nothing to process, an unknown task, text that is too long or does not fit the images, labels
                that do not fit the task, an argument given twice.
            TypeError: An argument the processor does not know.
        """
        if task is None:
            task = "detection" if text is None else "question_answering"
        check_task(task)
        if images is None and text is None:
            raise InputError("Nothing to process: give images, text or both.")
        image_options, text_length = self._options(kwargs)
        _check_arguments(task, images, annotations=annotations, masks=masks, answers=answers, class_names=class_names)
        data = {}
        count = None
        if images is not None:
            images = image_list(images)
            count = len(images)
            data.update(self.image_processor(images, annotations, masks, task=task, **image_options))
        if not TASK_TABLE[task].reads_text:
            return BatchFeature(data)
        if class_names is not None:
            prompts = [task_prompt(task, class_names)] * (count or 1)
        elif task in IMAGE_TASKS:
            prompts = self._names_prompts(task, text, count)
        else:
            prompts = self._language_prompts(task, text, count)
        data.update(self._tokenize(prompts, "text", text_length))
        if answers is not None:
            if len(set(_row_lengths(answers) or [1])) > 1:
                raise InputError("Images have different numbers of answers: give one answer for each text of an image.")
            answers = _flatten(answers)
            if len(answers) != len(prompts):
                raise InputError(f"{len(answers)} answers for {len(prompts)} texts: give one answer for each text.")
            tokens = self._tokenize(answers, "answer")
            data["labels"] = tokens["input_ids"].masked_fill(tokens["attention_mask"] == 0, -100)
        if image_options.get("device") is not None:
            data = {k: v.to(image_options["device"]) if isinstance(v, torch.Tensor) else v for k, v in data.items()}
        return BatchFeature(data)

    def _options(self, kwargs: dict[str, Any]) -> tuple[dict[str, Any], int | None]:
        """The image processor's arguments among those of a call, and the length to pad texts to."""
        known = {
            "images_kwargs": set(self.image_processor.valid_kwargs.__annotations__),
            "text_kwargs": set(TextKwargs.__annotations__),
            "common_kwargs": {"return_tensors"},
        }
        options = {name: value for name, value in kwargs.items() if name not in known}
        unknown = options.keys() - set().union(*known.values())
        for group, names in known.items():
            nested = kwargs.get(group) or {}
            unknown |= nested.keys() - names
            twice = sorted(nested.keys() & options.keys())
            if twice:
                raise InputError(f"{' and '.join(twice)} given twice: as an argument and in {group}.")
        if unknown:
            raise InputTypeError(f"{type(self).__name__} has no argument {' and no '.join(sorted(unknown))}.")
        text = options | (kwargs.get("text_kwargs") or {})
        length = None
        if text.get("padding") == "max_length":
            length = text.get("max_length") or self.max_text_length
            if length > self.max_text_length:
                raise InputError(f"max_length is {length}; the limit is {self.max_text_length} (max_text_length).")
        images = options | (kwargs.get("images_kwargs") or {})
        return {name: value for name, value in images.items() if name in known["images_kwargs"]}, length

    def default_prompt_ids(self) -> dict[str, list[int]]:
        """Token ids of each task's default prompt, for `config.default_prompt_ids`: what a model called without text reads."""
        return {
            task: self.tokenizer(task_prompt(task, names))["input_ids"] for task, names in self.default_prompts.items()
        }

    def default_prompt_of(self, task: str, config: Any) -> str | Sequence[str] | None:
        """The default prompt that a model has now: with several adapters, that of the one in use.

        Args:
            task (`str`): One of `TASKS`.
            config (`UniHemaConfig`): The model's, whose `default_prompt_ids` follow the adapter.
        """
        own, ids = self.default_prompts.get(task), config.default_prompt_ids.get(task)
        named = {"detection": ", ".join(config.class_names), "segmentation": config.trained.segmentation_label}
        prompts = [prompt for prompt in (own, named.get(task), DEFAULT_PROMPTS.get(task)) if prompt]
        same = (prompt for prompt in prompts if self.tokenizer(task_prompt(task, prompt))["input_ids"] == ids)
        return next(same, own)

    def _names_prompts(self, task: str, text, count: int | None) -> list[str]:
        if text is None:
            text = self.default_prompts[task]
        if isinstance(text, str) or count is None or (len(text) != count and all(isinstance(t, str) for t in text)):
            return [task_prompt(task, text)] * (count or 1)
        if len(text) != count:
            raise InputError(f"{len(text)} prompts for {count} images: give one for all, or one for each image.")
        return [task_prompt(task, names) for names in text]

    def _language_prompts(self, task: str, text, count: int | None) -> list[str]:
        if text is None:
            raise InputError(f"text is missing: {task} needs a question or a masked sentence.")
        if isinstance(text, str):
            text = [text] * (count or 1)
        elif (lengths := _row_lengths(text)) is not None:
            if len(set(lengths)) > 1:
                raise InputError(
                    f"Images have {' and '.join(map(str, sorted(set(lengths))))} texts: give every image the same number."
                )
            if count and len(lengths) != count:
                raise InputError(f"{len(lengths)} lists of texts for {count} images: give one list for each image.")
        texts = _flatten(text)
        if not texts:
            raise InputError(f"The list of texts is empty: {task} needs a question or masked sentence for each image.")
        if count and len(texts) % count:
            raise InputError(f"{len(texts)} texts for {count} images: give every image the same number of texts.")
        return [task_prompt(task, entry) for entry in texts]

    def _tokenize(self, texts: list[str], what: str, length: int | None = None) -> dict[str, torch.Tensor]:
        options = {"return_tensors": "pt", "add_special_tokens": True}
        # Half a surrogate pair: bytes of a command line that are no text in its encoding.
        broken = next((text for text in texts if any("\ud800" <= character <= "\udfff" for character in text)), None)
        if broken is not None:
            raise InputError(f"The {what} {broken[:80]!r} is no text: give it in UTF-8.")
        tokens = self.tokenizer(texts, padding=True, **options)
        lengths = tokens["attention_mask"].sum(1)
        limit, name = (self.max_text_length, "max_text_length") if length is None else (length, "max_length")
        if int(lengths.max()) > limit:
            longest = int(lengths.argmax())
            raise InputError(
                f"The {what} {texts[longest][:80]!r}... has {int(lengths[longest])} tokens; the limit is {limit} ({name}). "
                "Shorten it."
            )
        if length is not None:
            tokens = self.tokenizer(texts, padding="max_length", max_length=length, **options)
        return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}

    def decode_answers(self, token_ids: torch.Tensor | np.ndarray | Sequence[Sequence[int]]) -> list[str]:
        """Generated tokens, or labels, `[B, T]` as text, without special tokens and the -100 of padded labels."""
        kept = [[int(token) for token in row if token >= 0] for row in token_ids]
        return [text.strip() for text in self.tokenizer.batch_decode(kept, skip_special_tokens=True)]

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """The tokenizer's `batch_decode`."""
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> str:
        """The tokenizer's `decode`."""
        return self.tokenizer.decode(*args, **kwargs)

    def post_process_image_text_to_text(self, generated_outputs, skip_special_tokens: bool = True, **kwargs: Any):
        """Generated tokens as text, for the image-text-to-text pipeline."""
        kwargs.pop("clean_up_tokenization_spaces", None)
        return self.tokenizer.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens)

    def post_process_object_detection(self, *args: Any, **kwargs: Any):
        """See `UniHemaImageProcessor.post_process_object_detection`."""
        return self.image_processor.post_process_object_detection(*args, **kwargs)

    def post_process_morphology(self, *args: Any, **kwargs: Any):
        """See `UniHemaImageProcessor.post_process_morphology`."""
        return self.image_processor.post_process_morphology(*args, **kwargs)

    def post_process_semantic_segmentation(self, *args: Any, **kwargs: Any):
        """See `UniHemaImageProcessor.post_process_semantic_segmentation`."""
        return self.image_processor.post_process_semantic_segmentation(*args, **kwargs)


# Saving it copies this file, and what it imports, beside its settings.
UniHemaProcessor.register_for_auto_class()


def _flatten(texts) -> list[str]:
    if isinstance(texts, str):
        return [texts]
    return [text for entry in texts for text in ([entry] if isinstance(entry, str) else entry)]


def _row_lengths(texts) -> list[int] | None:
    """Number of texts of each image if they are a list of lists, else `None`."""
    if texts is None or isinstance(texts, str) or all(isinstance(entry, str) for entry in texts):
        return None
    return [1 if isinstance(entry, str) else len(entry) for entry in texts]


_TASKS_OF = {
    "annotations": ("detection",),
    "masks": ("segmentation",),
    "answers": LANGUAGE_TASKS,
    "class_names": tuple(DEFAULT_PROMPTS),
}


def _check_arguments(task: str, images, **given) -> None:
    """Raises an error for arguments that the task would ignore or misread."""
    for name, value in given.items():
        if value is None:
            continue
        if task not in _TASKS_OF[name]:
            raise InputError(f"{name} go with {' and '.join(_TASKS_OF[name])}, not with {task}.")
        if name in ("annotations", "masks") and images is None:
            raise InputError(f"{name} without images: give the images they belong to.")
