"""Boxes of fields as crops of single cells, and how often each class is drawn."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from unihema.errors import DatasetError
from unihema.processing_unihema.processing_unihema import UniHemaProcessor
from unihema.training.data.augmentation import AugmentationConfig
from unihema.training.data.cell_crops import crops_of_boxes, with_declared_classes
from unihema.training.data.class_tree import single_cell_tree
from unihema.training.data.dataset import SmearDataset
from unihema.training.data.framing import box_window, seen_through, whole_window
from unihema.training.data.mixing import TaskMixer


def field_row(boxes, names, annotated=None, pixels=None, **more):
    image = Image.fromarray(np.full((60, 80, 3), 200, np.uint8) if pixels is None else pixels)
    objects = {"bbox": [list(box) for box in boxes], "category": list(names), **more}
    row = {"image": image, "file_name": "a.png", "dataset": "lab", "task": "detection", "objects": objects}
    return row | {"size": (80, 60), "annotated_classes": annotated, "slide": "7"}


def test_each_box_is_a_crop_of_its_class():
    boxes = [(0, 0, 20, 20), (40, 10, 20, 30), (70, 50, 9, 9), (5, 40, 4, 4)]
    row = field_row(boxes, ["WBC", "neutrophil", "RBC", "Platelets"], iscrowd=[0, 0, 1, 0])
    crops = crops_of_boxes([row, field_row([(0, 0, 9, 9)], ["WBC"]) | {"from_attributes": True}])
    # The crowd, what is too small to see and the crop without a box are left out.
    assert [(crop["label"], crop["box"]) for crop in crops] == [
        ("WBC", [0, 0, 20, 20]),
        ("neutrophil", [40, 10, 20, 30]),
    ]
    assert crops[0]["task"] == "single_cell" and crops[0]["slide"] == "7" and crops[0]["size"] == (80, 60)


def test_of_many_some_are_drawn_always_the_same():
    rows = [field_row([(0, 0, 9 + n, 9)] * 3, ["RBC", "RBC", "WBC"]) for n in range(20)]
    crops = crops_of_boxes(rows, 10)
    assert Counter(crop["label"] for crop in crops) == {"RBC": 10, "WBC": 10}
    assert [crop["box"] for crop in crops] == [crop["box"] for crop in crops_of_boxes(rows, 10)]
    assert len(crops_of_boxes(rows, None)) == 60


def test_a_red_cell_is_uninfected_where_infected_ones_have_a_name_of_their_own():
    row = field_row([(0, 0, 9, 9)] * 2, ["RBC", "ring"], annotated=["RBC", "ring"])
    assert [crop["label"] for crop in crops_of_boxes([row])] == ["RBC", "ring"]
    exact = with_declared_classes([row], ["red blood cell"])
    assert [crop["label"] for crop in crops_of_boxes(exact)] == ["uninfected red cell", "ring"]
    white = with_declared_classes([field_row([(0, 0, 9, 9)], ["RBC"], annotated=["RBC", "WBC"])], ["RBC"])
    assert crops_of_boxes(white)[0]["label"] == "RBC"
    with pytest.raises(DatasetError, match="lab has no class 'WBC'; it has RBC, ring"):
        with_declared_classes([row], ["WBC"])


def test_absent_classes_are_annotated_and_have_no_cell():
    row = field_row([(0, 0, 9, 9)], ["RBC"], annotated=["RBC"])
    assert with_declared_classes([row], absent=["ring"])[0]["annotated_classes"] == ["RBC", "ring"]
    assert row["annotated_classes"] == ["RBC"]
    with pytest.raises(DatasetError, match="lab has boxes of red cell"):
        with_declared_classes([row], absent=["red cell"])


def test_labels_of_many_sets_make_one_tree():
    names = [
        "neutrophil",
        "myeloblast",
        "WBC",
        "RBC",
        "burr_cell",
        "stomatocyte",
        "normal",
        "parasitized",
        "uninfected",
    ]
    names += ["ring", "schizont", "sickle_cell", "erythroblast", "all_early", "Platelets"]
    classes, parents = single_cell_tree(names)
    assert {name for name in names if name not in classes} == {"WBC", "RBC", "parasitized", "uninfected"}
    assert parents["myeloblast"] == "blast" and parents["blast"] == parents["neutrophil"] == "WBC"
    assert parents["ring"] == parents["schizont"] == "infected red cell"
    assert parents["normal"] == parents["sickle_cell"] == parents["burr_cell"] == "uninfected red cell"
    assert parents["infected red cell"] == parents["uninfected red cell"] == "RBC"
    assert parents["all_early"] == "field" and not {"erythroblast", "Platelets", "RBC", "WBC"} & parents.keys()
    # Nothing finer is known of these, so they are classes; and normal is a red cell only among shapes of red cells.
    assert single_cell_tree(["parasitized", "uninfected"])[0] == ["parasitized", "uninfected"]
    assert single_cell_tree(["normal", "AML"]) == (["normal", "AML"], {})
    assert single_cell_tree(["neutrophil", "lymphocyte", "WBC"], keep=["WBC"])[0][-1] == "WBC"
    assert single_cell_tree(["a", "b"], {"a": "both", "b": "both"}) == (["a", "b"], {"a": "both", "b": "both"})


def test_windows_hold_what_they_promise():
    box = (100.0, 50.0, 40.0, 30.0)
    for fill, shift in ((0.25, (0.1, -0.1)), (1.0, (1, 1)), (0.5, (0, 0))):
        top, left, height, width = box_window(box, fill, shift, 1.0)
        assert height == width == pytest.approx(40 / fill)
        # At least nine tenths of the box are inside, each way.
        assert left <= 104 + 1e-9 and left + width >= 136 - 1e-9 and top <= 53 + 1e-9 and top + height >= 77 - 1e-9
    assert box_window(box, 0.5, (0, 0), 1.0).tolist() == [25, 80, 80, 80]
    assert whole_window((100, 80), 0.5, (0.1, 0), 1.0).tolist() == pytest.approx([35, 20, 50, 40])
    top, left, height, width = whole_window((100, 100), 1.0, (0, 0), 1.21)
    assert height / width == pytest.approx(1.21) and height * width == pytest.approx(1e4)


def test_beyond_the_edge_an_image_goes_on():
    image = torch.arange(5, dtype=torch.uint8).expand(3, 5, 5)
    window = np.array([0.0, -3.0, 5.0, 11.0])
    mirrored = seen_through(image, window, 5 / 11, None, True)
    assert mirrored[0, 0].tolist() == [3, 2, 1, 0, 1, 2, 3, 4, 3, 2, 1]
    assert seen_through(image, window, 5 / 11, None, False)[0, 0].tolist() == [0, 0, 0, 0, 1, 2, 3, 4, 4, 4, 4]
    assert seen_through(image, np.array([1.0, 2, 3, 3]), 1, None, True)[0, 0].tolist() == [2, 3, 4]
    assert seen_through(image.repeat(1, 9, 9), np.array([0.0, 0, 40, 30]), 1.0, 16, True).shape == (3, 16, 16)


@pytest.fixture(scope="module")
def processor():
    return UniHemaProcessor.from_default(single_cell={"longest_edge": 32})


def test_a_crop_shows_the_cell_also_at_the_border(processor):
    pixels = np.full((60, 80, 3), 200, np.uint8)
    pixels[:20, :20] = (250, 10, 10)
    row = field_row([(0, 0, 20, 20)], ["WBC"], pixels=pixels)
    names = {"single_cell_labels": ["WBC", "RBC"], "task": "single_cell"}
    plain = SmearDataset(crops_of_boxes([row]), processor, **names)[0]
    # Twice the box; the last pixels are repeated beyond the image.
    assert plain["image"].shape == (3, 40, 40) and plain["label"] == 0
    assert (plain["image"][0] == 250).float().mean() == pytest.approx(9 / 16)
    views = AugmentationConfig.for_task("single_cell")
    data = SmearDataset(
        crops_of_boxes([row]),
        processor,
        augmentation=AugmentationConfig(
            colour=0, optics=0, blur=0, stain=0, hue=0, saturation=0, brightness=0, contrast=0, zoom=0, framing=1
        ),
        **names,
    )
    # Mirrored or repeated, the cell is there again beyond the border.
    assert all(float((data[0, epoch]["image"][0] > 225).float().mean()) > 0.2 for epoch in range(20))
    assert data[0, 3]["image"].shape[-2:] == (32, 32) and torch.equal(data[0, 3]["image"], data[0, 3]["image"])
    coloured = SmearDataset(crops_of_boxes([row]), processor, augmentation=views, **names)
    assert not torch.equal(coloured[0, 1]["image"], coloured[0, 2]["image"])
    measured = SmearDataset(crops_of_boxes([row]), processor, evaluation=True, **names)
    assert torch.equal(measured[0]["image"], plain["image"])


def test_a_cell_fills_a_quarter_to_all_of_its_crop(processor):
    pixels = np.full((60, 80, 3), 200, np.uint8)
    pixels[25:35, 35:45] = (250, 10, 10)
    config = AugmentationConfig.none()
    config.framing, config.fill_min, config.shift = 1.0, 0.25, 0.17
    rows = crops_of_boxes([field_row([(35, 25, 10, 10)], ["WBC"], pixels=pixels)])
    data = SmearDataset(rows, processor, "single_cell", config, single_cell_labels=["WBC"])
    views = [data[0, epoch]["image"][0] > 225 for epoch in range(60)]
    shares = [float(view.float().mean()) for view in views]
    assert 0.05 < min(shares) < 0.09 and max(shares) > 0.7
    # Off the middle as often as not, and hardly ever cut.
    middles = torch.stack([(view.nonzero().float().mean(0) + 0.5) / view.shape[0] - 0.5 for view in views])
    assert 0.08 < middles.abs().max() < 0.25 and middles.mean(0).abs().max() < 0.03


def test_classes_of_a_data_set_are_drawn_as_the_temperature_says():
    classes = np.array([0] * 900 + [1] * 100 + [2] * 25)
    sources = {"single_cell": [("lab", [np.arange(1000)]), ("other", [np.arange(1000, 1025)])]}

    def drawn(temperature):
        mixer = TaskMixer(
            {"single_cell": 1025},
            25,
            sources=sources,
            steps_per_epoch=400,
            dataset_weights={"lab": 0.5, "other": 0.5},
            classes={"single_cell": classes},
            class_temperature=temperature,
        )
        return [index for batch in mixer for _, index, _ in batch], [list(mixer) for _ in range(2)]

    indices, twice = drawn(0.5)
    counts = Counter(classes[indices].tolist())
    assert counts[2] / len(indices) == pytest.approx(0.5, abs=0.02)
    assert counts[0] / counts[1] == pytest.approx(3, rel=0.15)
    assert twice[0] == twice[1]
    # Each sample of a class once before any a second time.
    assert len({index for index in indices if classes[index] == 1}) == 100
    flat = Counter(classes[drawn(0.0)[0]].tolist())
    assert flat[0] / flat[1] == pytest.approx(1, rel=0.1)
