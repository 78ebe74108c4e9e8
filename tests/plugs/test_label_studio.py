"""Label Studio's own checks and converter take what is written for it."""

import json

import numpy as np
import pytest

from unihema import SmearResult
from unihema.results.export import label_studio_config
from unihema.results.smear_result import Cell


label_interface = pytest.importorskip("label_studio_sdk.label_interface")
objects = pytest.importorskip("label_studio_sdk.label_interface.objects")
converter = pytest.importorskip("label_studio_sdk.converter")

CLASSES = ["RBC", "neutrophil, band", '<b>"&amp;']


@pytest.fixture
def result() -> SmearResult:
    ring = np.ones((20, 20), dtype=bool)
    ring[5:9, 5:9] = False
    cells = [
        Cell(1, (10.25, 20.5, 40.75, 60.125), CLASSES[0], 0.9),
        Cell(2, (0, 0, 300, 200), CLASSES[1], 0.8),
        Cell(3, (100.5, 50, 119.5, 69.5), CLASSES[2], 0.7, {}, np.ones((20, 20), dtype=bool)),
        Cell(4, (150, 50, 170, 70), CLASSES[0], 0.6, {}, ring),
    ]
    return SmearResult(300, 200, cells, CLASSES, image="smears/a b.png")


def test_its_checks_take_configuration_task_and_predictions(result):
    interface = label_interface.LabelInterface(label_studio_config(result.classes))
    interface.validate()
    assert [list(interface.get_control(name).labels) for name in ("box", "outline")] == [CLASSES, CLASSES]
    (task,) = result.to_label_studio()
    assert interface.validate_prediction(task["predictions"][0], return_errors=True) == []
    assert interface.validate_task({"data": task["data"]})
    objects.TaskValue.model_validate(task)
    spoiled = json.loads(json.dumps(task["predictions"][0]))
    spoiled["result"][0]["value"]["x"] = 101
    assert interface.validate_prediction(spoiled, return_errors=True)


def test_its_converter_makes_the_same_boxes(result, tmp_path):
    (task,) = result.to_label_studio("https://lab.example/a.png")
    regions = task.pop("predictions")[0]["result"]
    task |= {"id": 1, "annotations": [{"id": 1, "result": regions, "was_cancelled": False}]}
    (tmp_path / "export.json").write_text(json.dumps([task]))
    made = converter.Converter(label_studio_config(result.classes), project_dir=None, download_resources=False)
    made.convert_to_coco(str(tmp_path / "export.json"), str(tmp_path / "coco"), is_dir=False)
    coco = json.loads((tmp_path / "coco" / "result.json").read_text())
    names = {category["id"]: category["name"] for category in coco["categories"]}
    found = {tuple(np.round(each["bbox"], 3)): names[each["category_id"]] for each in coco["annotations"]}
    assert found == {
        (10.25, 20.5, 30.5, 39.625): CLASSES[0],
        (0, 0, 300, 200): CLASSES[1],
        # The outline goes around the pixels of the mask.
        (100, 50, 20, 20): CLASSES[2],
        (150, 50, 20, 20): CLASSES[0],
    }
