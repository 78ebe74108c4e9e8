"""QuBaLab opens an image and takes the cells as its own objects."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from unihema import SmearResult
from unihema.results.smear_result import Cell


tifffile = pytest.importorskip("tifffile")
pytest.importorskip("qubalab")
ImageFeature = pytest.importorskip("qubalab.objects.image_feature").ImageFeature
gateway = pytest.importorskip("qubalab.qupath.qupath_gateway")


class QuPath:
    """QuPath's side of the gateway: what it is sent."""

    def __init__(self):
        self.text = ""

    # Java's name.
    def toPathObjects(self, text):
        self.text = text
        return json.loads(text)


def test_the_code_of_the_page_runs(page, demo):
    tifffile.imwrite(demo / "field_1.ome.tif", np.array(Image.open(demo / "smears/field_1.jpg")), photometric="rgb")
    names = page("QuBaLab")
    result, objects = names["result"], names["objects"]
    *objects, mask = objects
    assert mask.is_annotation and len(objects) == len(result.cells) > 20
    assert [each.classification.names for each in objects] == [(cell.label,) for cell in result.cells]
    assert all(each.is_detection and "score" in each.measurements for each in objects)
    own = names["analyzer"](np.array(Image.open(demo / "smears/field_1.jpg")))
    assert [cell.box for cell in result.cells] == [cell.box for cell in own.cells]


def test_what_qupath_is_sent_comes_back_as_it_was():
    mask = np.ones((12, 12), dtype=bool)
    mask[4:6, 4:6] = False
    cells = [
        Cell(1, (10.25, 20, 30, 40.5), "neutrophil", 0.9, {"shape": {"value": "round", "score": 0.5}}),
        Cell(2, (50, 50, 62, 62), "RBC, young", 0.8, {}, mask),
    ]
    result = SmearResult(200, 100, cells, ["neutrophil", "RBC, young"], image="a.tif")
    objects = [ImageFeature.create_from_feature(feature) for feature in result.to_geojson()["features"]]
    qupath, added = QuPath(), []
    image_data = SimpleNamespace(getHierarchy=lambda: SimpleNamespace(addObjects=added.extend))
    gateway.add_objects(objects, image_data, SimpleNamespace(entry_point=qupath))
    assert len(added) == 2
    assert result.with_geojson(json.loads(qupath.text)).to_dict() == result.to_dict()
