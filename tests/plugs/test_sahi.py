"""SAHI predicts in slices with the shipped checkpoint."""

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from unihema import Analyzer, SmearResult
from unihema.results.smear_result import Cell


sahi = pytest.importorskip("sahi")
predict = pytest.importorskip("sahi.predict")


@pytest.fixture(scope="module")
def model(demo):
    from unihema.plugs.sahi import UniHemaDetectionModel

    return UniHemaDetectionModel(demo / "unihema", device="cpu")


def overlaps(cells, predictions) -> torch.Tensor:
    boxes = torch.tensor([prediction.bbox.to_xyxy() for prediction in predictions], dtype=torch.float32)
    labels = [prediction.category.name for prediction in predictions]
    same = torch.tensor([[cell.label == label for label in labels] for cell in cells])
    return box_iou(torch.tensor([cell.box for cell in cells]), boxes) * same


def test_a_whole_field_is_what_the_analyzer_finds(model, demo):
    field = str(demo / "smears/field_1.jpg")
    found = predict.get_prediction(field, model, verbose=0).object_prediction_list
    own = model.model(field, "detection", tiles="off").cells
    assert len(found) == len(own) > 20
    assert (overlaps(own, found).amax(1) > 0.999).all()
    assert sorted(each.score.value for each in found) == sorted(cell.score for cell in own)
    assert {each.category.id: each.category.name for each in found}.items() <= model.category_mapping.items()


def test_slices_find_every_cell_of_the_field(model, demo):
    field = str(demo / "smears/field_1.jpg")
    sliced = predict.get_sliced_prediction(field, model, 400, 400, 0.25, 0.25, verbose=0).object_prediction_list
    own = model.model(field, "detection").cells
    near = overlaps(own, sliced)
    # What is more are parts of cells that an edge of a slice cuts.
    assert (near.amax(1) > 0.5).all() and (near.amax(0) > 0.5).sum() >= 24 and len(sliced) < 1.5 * len(own)


def test_a_threshold_of_sahi_stands_for_the_calibrated_ones(model, demo):
    field = str(demo / "smears/field_1.jpg")
    every = predict.get_prediction(field, model, verbose=0).object_prediction_list
    higher = float(np.median([each.score.value for each in every]))
    few = predict.get_prediction(field, model, verbose=0, confidence_threshold=higher).object_prediction_list
    assert 0 < len(few) < len(every) and min(each.score.value for each in few) >= higher
    assert len(predict.get_prediction(field, model, verbose=0).object_prediction_list) == len(every)


def test_masks_of_cells_come_along(model, monkeypatch):
    mask = np.zeros((20, 30), dtype=bool)
    mask[5:, 10:] = True
    cells = [Cell(1, (10, 20, 40, 40), "RBC", 0.9, {}, mask), Cell(2, (50, 20, 60, 40), "RBC", 0.8)]
    result = SmearResult(100, 80, cells, ["RBC"])
    monkeypatch.setattr(Analyzer, "analyze_images", lambda self, images, *_, **__: [result] * len(images))
    found = predict.get_sliced_prediction(
        np.zeros((80, 200, 3), np.uint8), model, 80, 100, 0, 0, perform_standard_pred=False, verbose=0
    ).object_prediction_list  # fmt: skip
    # Boxes are those of the outlines.
    masks = sorted(each.bbox.to_xyxy() for each in found if each.mask)
    assert masks == [[20, 25, 40, 40], [120, 25, 140, 40]]
    assert len(found) == 4


def test_what_would_misread_the_scores_is_refused(demo):
    """SAHI takes the scores of an unknown Transformers model through a softmax, which finds eight times the cells."""
    with pytest.raises(ValueError, match="not a valid ImageProcessor"):
        sahi.AutoDetectionModel.from_pretrained("huggingface", str(demo / "unihema"), device="cpu")


def test_the_code_of_the_page_runs(page):
    assert len(page("SAHI")["found"].object_prediction_list) > 20
