"""FiftyOne takes the cells as labels, and the detector as a model. What needs its database, MongoDB, is not run here."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import box_iou

import unihema
from unihema.results.smear_result import Cell


fiftyone = pytest.importorskip("fiftyone")
transformers_models = pytest.importorskip("fiftyone.utils.transformers")


def corners(detection, width, height):
    left, top, across, down = detection.bounding_box
    return [left * width, top * height, (left + across) * width, (top + down) * height]


def test_cells_are_labels_of_a_sample():
    mask = np.tri(4, 5, dtype=bool)
    shape = {"nuclear shape.$": {"value": "round", "score": 0.5}, "tags": {"value": "x", "score": 0.5}}
    cells = [Cell(1, (10.5, 20, 30, 40), "RBC", 0.9, shape), Cell(2, (50.5, 60.5, 55, 64), "WBC", 0.8, {}, mask)]
    from unihema.plugs.fiftyone import detections

    sample = fiftyone.Sample(filepath="a.png")
    sample["cells"] = detections(unihema.SmearResult(100, 80, cells, ["RBC", "WBC"]))
    first, second = sample["cells"].detections
    assert (first.label, first.confidence, first.cell_id, first.mask) == ("RBC", 0.9, 1, None)
    assert first["morphology_nuclear_shape__"] == "round" and first["morphology_tags"] == "x" and first.tags == []
    assert corners(first, 100, 80) == pytest.approx([10.5, 20, 30, 40])
    assert corners(second, 100, 80) == pytest.approx([50, 60, 55, 64]) and (second.mask == mask).all()


def test_its_check_takes_the_class_by_its_name(demo):
    with pytest.raises(ValueError, match="Unknown model type"):
        transformers_models.get_model_type(unihema.UniHemaForDetection.from_pretrained(demo / "unihema"))


def test_the_code_of_the_page_runs(page):
    names = page("FiftyOne")
    result, found = names["result"], names["found"].detections
    field = names["sample"]["cells"].detections
    assert len(field) == len(result.cells) > 20 and [each.label for each in field] == [
        cell.label for cell in result.cells
    ]
    assert min(each.confidence for each in found) >= 0.35
    boxes = torch.tensor([corners(each, *Image.open(names["sample"].filepath).size) for each in found])
    sure = [cell for cell in result.cells if cell.score > 0.4]
    overlap = box_iou(torch.tensor([cell.box for cell in sure]), boxes)
    assert len(sure) > 10 and (overlap.amax(1) > 0.99).all()
    # A white cell has its coarse name there.
    names = [found[place].label for place in overlap.argmax(1).tolist()]
    coarse = [cell.label if cell.label in ("RBC", "Platelets") else "WBC" for cell in sure]
    assert names == coarse and "WBC" in coarse
