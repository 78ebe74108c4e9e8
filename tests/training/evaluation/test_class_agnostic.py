"""Boxes measured whatever their class."""

import numpy as np
import pytest
import torch

import unihema
from unihema.modeling_unihema.outputs import UniHemaDetectionOutput
from unihema.training.evaluation.class_agnostic import class_agnostic_precision


class _Painter(torch.nn.Module):
    """Finds the cells it is told, calling each by another class."""

    def __init__(self, boxes: torch.Tensor):
        super().__init__()
        self.boxes, self.device, self.dtype = boxes, torch.device("cpu"), torch.float32

    def forward(self, task, pixel_values, pixel_mask):
        logits = torch.full((1, len(self.boxes), 2), -5.0)
        logits[0, torch.arange(len(self.boxes)), torch.arange(len(self.boxes)) % 2] = 3.0
        return UniHemaDetectionOutput(logits=logits, pred_boxes=self.boxes[None])


def test_boxes_count_whatever_their_class():
    image = np.zeros((100, 200, 3), np.uint8)
    boxes = torch.tensor([[0.25, 0.5, 0.2, 0.4], [0.75, 0.5, 0.1, 0.2], [0.1, 0.1, 0.05, 0.05]])
    truth = [[30, 30, 40, 40], [140, 40, 20, 20]]
    row = {
        "task": "detection", "image": image, "file_name": "a", "dataset": "lab", "annotated_classes": ["x"],
        "objects": {"bbox": truth, "category": ["x", "x"]},
    }  # fmt: skip
    processor = unihema.UniHemaProcessor.from_default(detection={"longest_edge": 64})
    found = class_agnostic_precision(_Painter(boxes[:2]), processor, [row], progress=False)
    assert found["mAP50"] == pytest.approx(1.0) and (found["rows"], found["cells"]) == (1, 2)
    half = class_agnostic_precision(_Painter(boxes[1:]), processor, [row], progress=False)
    # One of two cells is found: precision 1 up to half the recall, 51 of 101 points.
    assert half["mAP50"] == pytest.approx(51 / 101, abs=1e-6)
