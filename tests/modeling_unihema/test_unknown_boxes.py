"""Cells whose box is not known: the label says that a cell is there, of which class and kind, not where its edges are."""

import pytest
import torch
from tiny_models import batch, very_tiny_config

from unihema import UniHemaForDetection
from unihema.modeling_unihema.denoising import ContrastiveDenoising
from unihema.modeling_unihema.matching import match_queries


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_they_are_matched_by_class_alone():
    logits = torch.full((1, 3, 2), -4.0)
    logits[0, 2, 1] = 1.0
    boxes = torch.tensor([[[0.5, 0.5, 1.0, 1.0], [0.5, 0.5, 0.9, 0.9], [0.1, 0.1, 0.05, 0.05]]])
    image = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 1.0, 1.0]])}
    assert match_queries(logits, boxes, [image])[0][0].tolist() == [0]
    image["boxes_known"] = torch.tensor([False])
    assert match_queries(logits, boxes, [image])[0][0].tolist() == [2]


def test_they_teach_classes_and_attributes_but_no_box():
    model = UniHemaForDetection(very_tiny_config()).train()
    inputs = batch("detection")
    for image in inputs["labels"]:
        image["boxes_known"] = torch.zeros(len(image["class_labels"]), dtype=torch.bool)
    output = model(**inputs)
    assert output.loss_dict["loss_bbox"] == output.loss_dict["loss_giou"] == 0
    assert output.loss_dict["loss_ce"] > 0 and output.loss_dict["loss_morphology"] > 0
    output.loss.backward()
    boxes = [p.grad for name, p in model.named_parameters() if "bbox" in name or "box_head" in name]
    assert boxes and all(grad is None or not grad.any() for grad in boxes)
    inputs["labels"][0]["boxes_known"][0] = True
    assert model(**inputs).loss_dict["loss_bbox"] > 0


def test_they_are_not_denoised():
    denoising = ContrastiveDenoising(very_tiny_config())
    labels = batch("detection")["labels"]
    cells = len(labels[0]["class_labels"])
    labels[0]["boxes_known"] = torch.arange(cells) > 0
    assert set(denoising(labels, 10).target_indices[0].tolist()) - {-1} == set(range(1, cells))
    for image in labels:
        image["boxes_known"] = torch.zeros(len(image["class_labels"]), dtype=torch.bool)
    assert denoising(labels, 10) is None


def test_what_is_known_must_be_said_of_every_cell():
    labels = batch("detection")["labels"]
    labels[0]["boxes_known"] = torch.ones(99, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"boxes_known of image 0 must be bool \[\d+\], got torch.bool \[99\]"):
        UniHemaForDetection(very_tiny_config())(**batch("detection") | {"labels": labels})
