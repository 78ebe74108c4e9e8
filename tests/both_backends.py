"""Image processors of both backends, images for them, and a comparison of what they give."""

import numpy as np
import torch

from unihema import UniHemaImageProcessor
from unihema.processing_unihema.image_processing_pil_unihema import UniHemaImageProcessorPil


BACKENDS = {"torchvision": UniHemaImageProcessor, "pil": UniHemaImageProcessorPil}
SIZES = {
    task: {"shortest_edge": 48, "longest_edge": 64}
    for task in ("detection", "segmentation", "question_answering", "cloze")
} | {"single_cell": {"longest_edge": 40}}


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, channels), np.uint8)


def assert_same(found, expected, atol: float = 0) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, list):
            for one, other in zip(found[name], value, strict=True):
                assert_same(one, other, atol)
        else:
            torch.testing.assert_close(found[name], value, rtol=0, atol=atol)
