"""SmearResult: nothing is lost in any of its forms."""

import json

import numpy as np
import pytest
from PIL import Image

from unihema.errors import InputError
from unihema.results.smear_result import Cell, SmearResult, differential


@pytest.fixture
def result():
    mask = np.zeros((60, 80), np.uint8)
    mask[10:30, 20:45] = 1
    cell_mask = np.ones((20, 25), bool)
    cell_mask[:3] = False
    return SmearResult(
        80,
        60,
        cells=[
            Cell(1, (20, 10, 45, 30), "neutrophil", 0.9, {"vacuoles": {"value": "absent", "score": 0.8}}, cell_mask),
            Cell(2, (50.5, 20.25, 70, 40), "red blood cell", 0.7),
        ],
        classes=["red blood cell", "neutrophil", "lymphocyte"],
        class_parents={"neutrophil": "white blood cell"},
        image="smear.png",
        mask=mask,
        mask_label="white blood cell",
        answers=[{"question": "How many?", "answer": "1"}],
        warnings=["few cells"],
        provenance={"unihema": "0.1.0"},
    )


def test_counts_have_every_class_and_the_differential_only_white_cells(result):
    assert result.counts == {"red blood cell": 1, "neutrophil": 1, "lymphocyte": 0}
    assert result.differential == {"neutrophil": 100.0, "lymphocyte": 0.0}
    assert differential({"RBC": 40, "neutrophil": 0}) == {}
    assert differential({"Neutrophils": 3, "lymphocyte": 1, "platelet": 9}) == {"Neutrophils": 75.0, "lymphocyte": 25.0}


def test_a_differential_counts_what_the_class_tree_calls_white_cells():
    assert differential({"neutrophil": 5, "ig": 5, "RBC": 300, "erythroblast": 4}) == {"neutrophil": 50.0, "ig": 50.0}
    assert differential({"band": 1, "segmented": 3}) == {"band": 25.0, "segmented": 75.0}
    # A lab's own subtype counts by the lab's tree, and only by that.
    own = {"neutrophil": 3, "Lab 7 lymphocyte": 1}
    assert differential(own, {"Lab 7 lymphocyte": "WBC"}) == {"neutrophil": 75.0, "Lab 7 lymphocyte": 25.0}
    assert differential(own) == {"neutrophil": 100.0}
    beside = {"neutrophil": 2, "NRBC": 9, "smudge cell": 9, "megakaryocyte": 9}
    assert differential(beside) == {"neutrophil": 100.0}


def test_white_cells_without_a_type_are_unidentified_and_empty_nothing():
    counts = {"RBC": 40, "WBC": 1, "leukocyte": 1, "neutrophil": 6}
    assert differential(counts) == {"unidentified": 25.0, "neutrophil": 75.0}
    assert differential({"WBC": 3, "RBC": 40}) == {"unidentified": 100.0}
    cells = [
        Cell(number, (0, 0, 1, 1), label, 0.5) for number, label in enumerate(["WBC", "leukocyte", "nRBC", "My type"])
    ]
    result = SmearResult(9, 9, cells, classes=["RBC"], class_parents={"My type": "WBC"})
    told = {
        label: (result.place_in_differential(label), result.percent_of_white_cells(label)) for label in result.counts
    }
    third = pytest.approx(100 / 3)
    assert told == {
        "RBC": (None, None),
        "WBC": ("unidentified", third),
        "leukocyte": ("unidentified", third),
        "nRBC": ("beside", None),
        "My type": ("counted", third),
    }


def test_round_trip_through_json(result):
    again = SmearResult.from_dict(json.loads(json.dumps(result.to_dict())))
    assert again.to_dict() == result.to_dict()
    assert (again.mask == result.mask).all()
    assert (again.cells[0].mask == result.cells[0].mask).all()
    with pytest.raises(ValueError, match="Not a UniHema result"):
        SmearResult.from_dict({"format": "something else"})
    twice = result.to_dict()
    twice["cells"].append(twice["cells"][0])
    with pytest.raises(ValueError, match="has cell 1 more than once"):
        SmearResult.from_dict(twice)


def test_results_written_before_are_read(result):
    old = result.to_dict()
    del old["class_parents"]
    del old["out_of_distribution"]
    score = {"distance": 2.0, "limit": 1.0, "nearest": "cbc"}
    read = SmearResult.from_dict(old | {"familiarity": score})
    assert read.class_parents == {} and read.out_of_distribution == score and read.cells[1] == result.cells[1]


def test_coco(result):
    coco = result.to_coco(image_id=3, first_annotation_id=10)
    assert coco["images"][0]["id"] == 3 and coco["images"][0]["width"] == 80
    names = {category["id"]: category["name"] for category in coco["categories"]}
    second = coco["annotations"][1]
    assert second["id"] == 11 and names[second["category_id"]] == "red blood cell"
    assert second["bbox"] == pytest.approx([50.5, 20.25, 19.5, 19.75])


def test_geojson_is_what_qupath_reads(result):
    collection = result.to_geojson()
    assert collection["type"] == "FeatureCollection"
    detections = [f for f in collection["features"] if f["properties"]["objectType"] == "detection"]
    assert len(detections) == 2
    ring = detections[1]["geometry"]["coordinates"][0]
    assert ring[0] == ring[-1]
    assert {tuple(point) for point in ring} == {(50.5, 20.25), (70, 20.25), (70, 40), (50.5, 40)}
    assert detections[0]["properties"]["classification"]["name"] == "neutrophil"


def test_dataframe(result):
    table = result.to_dataframe()
    assert list(table["label"]) == ["neutrophil", "red blood cell"]
    assert table["vacuoles"][0] == "absent" and table["centroid_x"][1] == pytest.approx(60.25)
    assert table["width"][1] == pytest.approx(19.5)


@pytest.mark.parametrize("size", [(80, 60), (4000, 3000)])
def test_overlay_draws_on_a_copy(result, size):
    image = Image.new("RGB", size, "white")
    drawn = result.overlay(image)
    assert image.getcolors() == [(size[0] * size[1], (255, 255, 255))]
    assert drawn.mode == "RGB" and max(drawn.size) <= 2048 + 600
    assert len(drawn.getcolors(1 << 24)) > 5


def test_the_overlay_colours_the_mask_of_a_cell_and_not_what_else_is_in_its_box():
    mask = np.zeros((400, 400), bool)
    mask[100:300, 100:300] = True
    cell = Cell(1, (500, 500, 900, 900), "platelet", 0.5, mask=mask)
    drawn = SmearResult(1600, 1600, cells=[cell]).overlay(Image.new("RGB", (1600, 1600), "white"))
    red, green, blue = drawn.getpixel((700, 700))
    assert red > green > 200 and drawn.getpixel((600, 700))[1] < 100, "core and edge"
    assert drawn.getpixel((560, 700)) == drawn.getpixel((840, 700)) == (255, 255, 255)


def test_an_impossible_box_is_refused():
    with pytest.raises(ValueError, match="box|Box"):
        Cell(1, (10, 10, 5, 20), "platelet", 0.5)


def test_a_result_without_a_field_that_older_ones_lack_is_read():
    written = SmearResult(20, 10, cells=[Cell(1, (1, 2, 5, 6), "platelet", 0.5)]).to_dict()
    for name in (
        "mask",
        "tiling",
        "class_parents",
        "out_of_distribution",
        "um_per_pixel",
        "um_source",
        "changes",
        "monolayer",
    ):
        less = {key: value for key, value in written.items() if key != name}
        assert SmearResult.from_dict(less).to_dict() == written


def test_a_name_that_is_no_text_stands_escaped_in_the_table():
    result = SmearResult(20, 10, [Cell(1, (1, 2, 5, 6), "platelet \udcff", 0.5)], image="\ud800.png")
    table = SmearResult.from_dict(result.to_dict()).to_dataframe()
    assert table["image"][0] == "\\ud800.png" and table["label"][0] == "platelet \\udcff"


def test_odd_cell_scores_are_stored_and_checked(result):
    result.cells[0].odd = 1.25
    stored = result.to_dict()
    assert SmearResult.from_dict(stored).cells[0].odd == 1.25 and "odd" not in stored["cells"][1]
    assert result.to_dataframe()["odd"].tolist()[0] == 1.25
    # What another program leaves as it was keeps it; another class has no such score.
    as_it_was = result.with_geojson(result.to_geojson())
    assert as_it_was.cells[0].odd == 1.25
    moved = result.to_geojson()
    moved["features"][0]["properties"]["classification"]["name"] = "lymphocyte"
    assert result.with_geojson(moved).cells[0].odd is None
    for wrong in (-0.1, "1", float("nan")):
        stored["cells"][0]["odd"] = wrong
        with pytest.raises(InputError, match="odd"):
            SmearResult.from_dict(stored)
