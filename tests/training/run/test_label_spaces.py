"""Mixing data sets that annotate different things: names, hierarchy, labels and figures."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from data_folders import write_coco, write_photograph

from unihema.errors import DatasetError, RunConfigError
from unihema.processing_unihema.processing_unihema import UniHemaProcessor
from unihema.training.data.class_tree import as_known, known_parents, unify_names, with_covered_parents
from unihema.training.data.dataset import SmearDataset
from unihema.training.data.rows import class_names, single_cell_names
from unihema.training.metrics.coarse_classes import with_coarser_names, with_coarser_truth
from unihema.training.metrics.detection import mean_average_precision, score_matches
from unihema.training.run.build import build, training_rows, warn_of_missing_classes
from unihema.training.run.config import DataConfig, ModelConfig, RunConfig


def field(*cells: str, annotated=None, dataset="made"):
    boxes = [[10.0 * number, 10.0, 8.0, 8.0] for number in range(len(cells))]
    return {
        "image": np.full((64, 96, 3), 200, np.uint8),
        "file_name": "a.png",
        "dataset": dataset,
        "task": "detection",
        "objects": {"bbox": boxes, "category": list(cells), "morphology": [{} for _ in cells]},
        "annotated_classes": annotated,
        "size": (96, 64),
    }


def crop(label: str):
    return {"image": "a.png", "file_name": "a.png", "dataset": "made", "task": "single_cell", "label": label}


def write_set(folder, *names: str):
    """A data folder of one field, with one cell of each class."""
    for split in ("train", "val"):
        write_photograph(folder / split / "images" / "a.png", seed=len(names))
        path = write_coco(folder / split / "annotations.json", {"images/a.png": [[5, 5, 20, 20]] * len(names)})
        content = json.loads(path.read_text())
        content["categories"] = [{"id": number, "name": name} for number, name in enumerate(names)]
        for number, annotation in enumerate(content["annotations"]):
            annotation["category_id"] = number
        path.write_text(json.dumps(content))
    return str(folder)


def run_config(tmp_path, *folders: str, **data) -> RunConfig:
    return RunConfig(output_dir=str(tmp_path / "run"), data=DataConfig(folders=list(folders), **data))


def test_one_class_spelled_in_several_ways_is_one():
    rows = {
        "detection": [
            field("RBC", "Platelets", annotated=["RBC", "Platelets"]),
            field("red blood cell", "thrombocyte", "Erythroblast", annotated=["red blood cell", "thrombocyte"]),
            field("erythroblasts", "Leukocytes", annotated=None),
        ],
        "single_cell": [crop("Neutrophil"), crop("neutrophils"), crop("ig")],
    }
    unified = unify_names(rows)
    assert class_names(unified["detection"]) == ["RBC", "platelet", "Erythroblast", "Leukocytes"]
    assert unified["detection"][1]["annotated_classes"] == ["RBC", "platelet"]
    assert single_cell_names(unified["single_cell"]) == ["ig", "neutrophil"]
    assert rows["detection"][1]["objects"]["category"][0] == "red blood cell", "the rows given stay as they are"


def test_a_name_that_all_spell_alike_stays():
    rows = {"detection": [field("Platelets", annotated=["Platelets", "my cell"])] * 2}
    assert unify_names(rows) == rows


def test_the_models_own_names_come_first():
    rows = [field("platelet", "leukocyte", "WBC", "unheard of", annotated=["thrombocytes"])]
    found = as_known(rows, ["Platelets", "WBC", "leukocyte"])[0]
    assert found["objects"]["category"] == ["Platelets", "leukocyte", "WBC", "unheard of"]
    assert found["annotated_classes"] == ["Platelets"]
    assert as_known([crop("Monocytes")], ["monocyte"])[0]["label"] == "monocyte"


def test_known_parents_are_the_closest_in_the_list():
    names = ["White Blood Cells", "Neutrophil", "band neutrophil", "myeloblast", "RBC", "sickle cells", "trophozoite"]
    assert known_parents(names) == {
        "Neutrophil": "White Blood Cells",
        "band neutrophil": "Neutrophil",
        "myeloblast": "White Blood Cells",
        "sickle cells": "RBC",
        "trophozoite": "RBC",
    }
    assert known_parents(["neutrophil", "RBC"]) == {}


def test_a_mix_gives_the_model_one_list_and_its_hierarchy(tmp_path):
    coarse = write_set(tmp_path / "coarse", "RBC", "WBC", "Platelets")
    fine = write_set(tmp_path / "fine", "neutrophil", "Platelet")
    config = run_config(tmp_path, coarse, fine)
    rows = training_rows(config)
    model, processor = build(config, rows)
    assert list(model.config.id2label.values()) == ["RBC", "WBC", "platelet", "neutrophil"]
    assert model.config.label_parents == {"neutrophil": "WBC"}
    assert model.denoising.config.ancestor_matrix == [*[[False] * 4] * 3, [False, True, False, False]]

    apart = run_config(tmp_path, coarse, fine, canonical_names=False, label_parents={})
    model, _ = build(apart, training_rows(apart))
    assert list(model.config.id2label.values()) == ["RBC", "WBC", "Platelets", "neutrophil", "Platelet"]
    assert model.config.ancestor_matrix is None

    wrong = run_config(tmp_path, coarse, label_parents={"basophil": "WBC"})
    with pytest.raises(RunConfigError, match="data.label_parents: no class 'basophil'; the model's classes are RBC"):
        build(wrong, training_rows(wrong))


def test_a_model_trained_on_gets_the_hierarchy_of_its_own_names(tmp_path):
    coarse = write_set(tmp_path / "coarse", "RBC", "WBC", "neutrophil")
    first = run_config(tmp_path, coarse, label_parents={})
    model, processor = build(first, training_rows(first))
    for parents in ({}, None):
        model.config.label_parents = parents
        model.save_pretrained(tmp_path / "model")
        processor.save_pretrained(tmp_path / "model")
        again = RunConfig(
            output_dir=str(tmp_path / "run"),
            data=DataConfig(folders=[coarse]),
            model=ModelConfig(initial_checkpoint=str(tmp_path / "model")),
        )
        loaded, _ = build(again, training_rows(again))
        # Nothing said is not the same as none.
        assert loaded.config.label_parents == (parents if parents == {} else {"neutrophil": "WBC"})
        assert loaded.denoising.config.ancestor_matrix == (
            None if parents == {} else [*[[False] * 3] * 2, [False, True, False]]
        )


def test_classes_without_an_example_are_named(caplog):
    config = SimpleNamespace(
        class_names=["RBC", "WBC", "neutrophil", "platelet"],
        single_cell_names=["monocyte", "ig"],
        label_parents={"neutrophil": "WBC"},
    )
    names = ["RBC", "WBC", "neutrophil", "platelet"]
    rows = {
        "detection": [field("RBC", annotated=names), field("Neutrophil", annotated=names)],
        "single_cell": [crop("monocyte"), crop("ig")],
    }
    model = SimpleNamespace(config=config)
    warn_of_missing_classes(model, rows, {})
    # A neutrophil is an example of WBC, too.
    assert caplog.messages == ["No box of platelet in the training data: not learned."]
    caplog.clear()
    val_rows = {"detection": [field("platelet", annotated=names)], "single_cell": [crop("Monocytes")]}
    warn_of_missing_classes(model, rows, val_rows)
    assert caplog.messages[1:] == [
        "No box of RBC, WBC, neutrophil in the validation data: neither measured nor calibrated.",
        "No crop of ig in the validation data: neither measured nor calibrated.",
    ]
    caplog.clear()
    warn_of_missing_classes(model, {"single_cell": rows["single_cell"]}, {"single_cell": rows["single_cell"]})
    assert caplog.messages == []


def test_labels_say_which_classes_the_image_and_the_run_annotate():
    names = ["RBC", "WBC", "neutrophil", "basophil"]
    processor = UniHemaProcessor.from_default(detection={"longest_edge": 96})
    processor.default_prompts["detection"] = ", ".join(names)
    rows = [field("RBC", annotated=["RBC", "WBC"]), field("Neutrophils", annotated=["neutrophil"])]
    data = SmearDataset(rows, processor, "detection", class_names=names)
    batch = data.collate([data[0], data[1]])
    assert [labels["annotated_classes"].tolist() for labels in batch["labels"]] == [
        [True, True, False, False],
        [False, False, True, False],
    ]
    for labels in batch["labels"]:
        assert labels["taught_classes"].tolist() == [True, True, True, False]
    assert batch["labels"][1]["class_labels"].tolist() == [2]
    measured = SmearDataset(rows, processor, "detection", class_names=names, evaluation=True, name_classes=True)
    batch = measured.collate([measured[0], measured[1]])
    asked = processor.batch_decode(batch["input_ids"], skip_special_tokens=True)
    assert "RBC, WBC cells" in asked[0] and "detection of neutrophil cells" in asked[1]
    everything = SmearDataset([*rows, field("RBC")], processor, "detection", class_names=names)
    assert "taught_classes" not in everything.collate([everything[0]])["labels"][0]
    with pytest.raises(DatasetError, match="unknown class 'blast'"):
        SmearDataset([field("blast")], processor, "detection", class_names=names)


ANCESTORS = np.array([[0, 0, 0], [0, 0, 0], [0, 1, 0]], dtype=bool)
RBC, WBC, NEUTROPHIL = range(3)
BOXES = np.array([[0.0, 0, 10, 10], [20.0, 0, 30, 10], [40.0, 0, 50, 10]])


def test_a_set_that_boxes_the_types_has_boxed_the_coarser_class():
    """So what it leaves without a box is no white cell: a class with positives only would end up on everything."""
    parents = {"neutrophil": "WBC", "eosinophil": "WBC", "basophil": "WBC", "WBC": "cell", "RBC": "cell"}
    assert with_covered_parents(["neutrophil", "eosinophil"], parents) == ["neutrophil", "eosinophil", "WBC"]
    assert with_covered_parents(["neutrophil"], parents) == ["neutrophil"]
    assert with_covered_parents(["neutrophil", "eosinophil", "RBC"], parents)[-2:] == ["WBC", "cell"]
    assert with_covered_parents(["RBC"], {}) == ["RBC"]
    # Whoever boxes the stages of malaria has boxed the infected red cells, not all red cells.
    stages = ["ring", "trophozoite", "schizont", "gametocyte"]
    assert with_covered_parents(stages, known_parents([*stages, "RBC"])) == stages
    listed = known_parents([*stages, "infected red cell", "RBC"])
    assert with_covered_parents(stages, listed) == [*stages, "infected red cell"]
    names = ["RBC", "WBC", "neutrophil", "basophil"]
    processor = UniHemaProcessor.from_default(detection={"longest_edge": 96})
    rows = [field("neutrophil", annotated=["neutrophil", "basophil"])]
    known = {"neutrophil": "WBC", "basophil": "WBC"}
    data = SmearDataset(rows, processor, "detection", class_names=names, label_parents=known)
    assert data.collate([data[0]])["labels"][0]["annotated_classes"].tolist() == [False, True, True, True]


def test_a_typed_cell_counts_under_its_coarser_class_too():
    truth = {"boxes": BOXES, "labels": [RBC, NEUTROPHIL, WBC]}
    found = {"boxes": BOXES, "scores": np.array([0.9, 0.8, 0.7]), "labels": np.array([RBC, NEUTROPHIL, NEUTROPHIL])}
    wide, named = with_coarser_truth(truth, ANCESTORS), with_coarser_names(found, truth, ANCESTORS)
    figures = mean_average_precision([named], [wide], ["RBC", "WBC", "neutrophil"])
    assert {name: one["cells"] for name, one in figures["per_class"].items()} == {"RBC": 1, "WBC": 2, "neutrophil": 1}
    assert figures["mAP50"] == pytest.approx(1.0), "the type of the third cell is unknown, and no mistake"
    scores, right, cells = score_matches([named], [wide], WBC, 3)
    assert (scores.tolist(), right.tolist(), cells) == ([0.8, 0.7], [True, True], 2)
    scores, right, cells = score_matches([named], [wide], NEUTROPHIL, 3)
    assert (scores.tolist(), right.tolist(), cells) == ([0.8], [True], 1)


@pytest.mark.parametrize("annotated", [[NEUTROPHIL], [RBC, WBC]])
def test_a_set_with_one_level_is_measured_on_that_level(annotated):
    labels = [label for label in (RBC, NEUTROPHIL, WBC) if label in annotated]
    truth = {"boxes": BOXES[: len(labels)], "labels": labels, "annotated_classes": annotated}
    wide = with_coarser_truth(truth, ANCESTORS)
    assert np.asarray(wide["labels"]).tolist() == labels
    found = {"boxes": BOXES[:1], "scores": np.array([0.9]), "labels": np.array([labels[0]])}
    assert with_coarser_names(found, truth, ANCESTORS)["labels"].tolist() == labels[:1]


def test_without_a_hierarchy_truth_and_names_stay():
    truth = {"boxes": BOXES, "labels": [RBC, NEUTROPHIL, WBC]}
    found = {"boxes": BOXES, "scores": np.array([0.9, 0.8, 0.7]), "labels": np.arange(3)}
    assert with_coarser_truth(truth, None) == truth
    assert torch.equal(torch.from_numpy(with_coarser_names(found, truth, None)["labels"]), torch.arange(3))


def test_a_cell_of_an_exact_class_is_no_excuse_for_a_finer_name():
    truth = {"boxes": BOXES, "labels": [WBC, WBC, NEUTROPHIL], "annotated_classes": [WBC, NEUTROPHIL]}
    found = [{"boxes": BOXES, "labels": np.full(3, NEUTROPHIL), "scores": np.array([0.9, 0.8, 0.5])}]
    precision = {}
    for name, exact in (("open", []), ("exact", [WBC])):
        wide = with_coarser_truth(truth | {"exact_classes": exact}, ANCESTORS)
        assert sum(wide["iscrowd"]) == (0 if exact else 2)
        report = mean_average_precision(found, [wide], ["RBC", "WBC", "neutrophil"])
        precision[name] = report["per_class"]["neutrophil"]["AP50"]
    assert precision == {"open": 1.0, "exact": pytest.approx(1 / 3, abs=0.01)}
