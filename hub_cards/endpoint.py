"""What answers on an Inference Endpoint of Hugging Face.

It stands beside a pushed checkpoint as `handler.py`, and needs the package `unihema` as little as the checkpoint does.
"""

import base64
import binascii
import io
import threading
from typing import Any

from PIL import Image
from transformers import pipeline


TASKS = ("object-detection", "image-segmentation", "image-classification", "visual-question-answering")
# Bytes of an image, and pixels.
MOST_BYTES, MOST_PIXELS = 64 << 20, 64_000_000


class EndpointHandler:
    """Calls the checkpoint's pipelines.

    Args:
        path (`str`): Folder of the checkpoint, which brings its code.
    """

    def __init__(self, path: str = ""):
        self.path = path or "."
        self._pipelines: dict[str, Any] = {}
        self._loading = threading.Lock()
        self._pipeline(TASKS[0])

    def __call__(self, data: dict[str, Any]) -> Any:
        """Answers a request.

        Args:
            data (`dict`): `inputs`: an image (base64, bytes or a PIL image), or `{"image": ..., "question": ...}`. Optionally
                `parameters`: `task`, one of `TASKS` (by default that of questions where there is one, else detection), and what
                the pipeline of the task takes.

        Returns:
            What the pipeline gives; a mask as base64 PNG; `{"error": ...}` for what cannot be answered.
        """
        try:
            inputs = data.get("inputs")
            given = dict(inputs) if isinstance(inputs, dict) else {"image": inputs}
            parameters = dict(data.get("parameters") or {})
            question = given.get("question") or parameters.pop("question", None)
            task = parameters.pop("task", TASKS[3] if question else TASKS[0])
            if task not in TASKS:
                raise ValueError(f"there is no task {str(task)[:40]!r}; tasks are {', '.join(TASKS)}")
            if task == TASKS[3]:
                if not isinstance(question, str):
                    raise ValueError("a question is a text")
                parameters["question"] = question
            return _plain(self._pipeline(task)(_image(given.get("image")), **parameters))
        except (ValueError, TypeError, OSError) as error:
            return {"error": str(error)[:500]}

    def _pipeline(self, task: str) -> Any:
        with self._loading:
            if task not in self._pipelines:
                self._pipelines[task] = pipeline(task, model=self.path, trust_remote_code=True)
            return self._pipelines[task]


def _image(given: Any) -> Image.Image:
    if isinstance(given, Image.Image):
        return _checked(given)
    if isinstance(given, str):
        # An address would be fetched by the pipeline: a request only brings its own image.
        try:
            given = base64.b64decode(given.rpartition("base64,")[2], validate=True)
        except binascii.Error:
            raise ValueError("an image is sent as base64") from None
    if not isinstance(given, (bytes, bytearray)) or not 0 < len(given) <= MOST_BYTES:
        raise ValueError(f"an image is needed, as base64, of {MOST_BYTES >> 20} MB at most")
    try:
        return _checked(Image.open(io.BytesIO(given)))
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from error


def _checked(image: Image.Image) -> Image.Image:
    # Not decoded yet.
    if image.width * image.height > MOST_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels, and {MOST_PIXELS} are the most")
    return image


def _plain(value: Any) -> Any:
    """What JSON knows of an answer."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, Image.Image):
        written = io.BytesIO()
        value.save(written, "PNG")
        return base64.b64encode(written.getvalue()).decode("ascii")
    return value if isinstance(value, (str, int, float, bool, type(None))) else float(value)
