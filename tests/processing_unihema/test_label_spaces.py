"""Which name a cell gets where classes are coarse and fine, and what a prompt asks for."""

from types import SimpleNamespace

import pytest
import torch

from unihema.modeling_unihema.configuration_unihema import UniHemaConfig
from unihema.processing_unihema.post_processing import (
    asked_classes,
    distinct_cells,
    post_process_object_detection,
)


RBC, WBC, NEUTROPHIL, PLATELET = range(4)
NAMES = {RBC: "RBC", WBC: "WBC", NEUTROPHIL: "neutrophil", PLATELET: "Platelets"}
THRESHOLDS = torch.tensor([0.3, 0.3, 0.5, 0.3])
BOX = [0.5, 0.5, 0.2, 0.2]


@pytest.fixture(scope="module")
def config():
    return UniHemaConfig.tiny(id2label=NAMES, label_parents={"neutrophil": "WBC"})


def output(*scores: list[float], boxes=None):
    logits = torch.tensor(scores)[None].logit()
    return SimpleNamespace(logits=logits, pred_boxes=torch.tensor([boxes or [BOX] * len(scores)]))


def labels_of(config, found, **options):
    options = {"threshold": THRESHOLDS, "ancestors": config.ancestor_matrix, **options}
    return post_process_object_detection(found, **options)[0]["labels"].tolist()


@pytest.mark.parametrize(
    ("scores", "label"),
    [
        # Above both thresholds the finer name is taken, whichever score is higher.
        ([0.1, 0.9, 0.6, 0.1], NEUTROPHIL),
        ([0.1, 0.4, 0.8, 0.1], NEUTROPHIL),
        # Below its own threshold it is not, and does not hide the coarser one.
        ([0.1, 0.4, 0.45, 0.1], WBC),
        ([0.1, 0.9, 0.2, 0.1], WBC),
        # However sure the coarser one is.
        ([0.1, 0.99, 0.51, 0.1], NEUTROPHIL),
        # A finer class needs no support by the coarser one.
        ([0.1, 0.2, 0.8, 0.1], NEUTROPHIL),
        ([0.9, 0.4, 0.6, 0.1], RBC),
    ],
)
def test_the_finest_name_above_its_threshold(config, scores, label):
    assert labels_of(config, output(scores)) == [label]


def test_a_finer_name_less_likely_than_not_is_not_given(config):
    low = torch.full((4,), 0.1)
    assert labels_of(config, output([0.05, 0.8, 0.39, 0.05]), threshold=low) == [WBC]
    assert labels_of(config, output([0.05, 0.8, 0.41, 0.05]), threshold=low) == [NEUTROPHIL]
    # An unlikely finer name is none, were the coarser one below its threshold too.
    assert labels_of(config, output([0.05, 0.8, 0.3, 0.05]), threshold=torch.tensor([0.1, 0.9, 0.1, 0.1])) == []
    # Nor does it win by way of another query.
    found = output([0.05, 0.8, 0.05, 0.05], [0.05, 0.1, 0.3, 0.05])
    assert labels_of(config, found, threshold=low, nms_iou=0.6) == [WBC]
    found = output([0.05, 0.8, 0.05, 0.05], [0.05, 0.1, 0.5, 0.05])
    assert labels_of(config, found, threshold=low, nms_iou=0.6) == [NEUTROPHIL]


def test_nothing_above_a_threshold_is_no_cell(config):
    assert labels_of(config, output([0.2, 0.25, 0.45, 0.2])) == []


def test_the_prompt_restricts_the_answer(config):
    found = output([0.1, 0.9, 0.8, 0.1], [0.9, 0.1, 0.1, 0.1])
    assert sorted(labels_of(config, found)) == [RBC, NEUTROPHIL]
    assert labels_of(config, found, classes=asked_classes(config, "WBC")) == [WBC]
    assert labels_of(config, found, classes=[asked_classes(config, ["rbc"])]) == [RBC]
    assert labels_of(config, found, classes=[asked_classes(config, "platelet")], threshold=0.0) == [PLATELET, PLATELET]
    assert sorted(labels_of(config, found, classes=[None])) == [RBC, NEUTROPHIL]
    every_class = labels_of(config, found, classes=asked_classes(config, "WBC, RBC"), one_class_per_query=False)
    assert sorted(every_class) == [RBC, WBC]


def test_what_a_prompt_asks_for(config):
    assert asked_classes(config, "platelets, Neutrophil").tolist() == [False, False, True, True]
    assert asked_classes(config, ["RBC", "WBCs"]).tolist() == [True, True, False, False]
    for prompt in (None, "malaria", "RBC, malaria", "", []):
        assert asked_classes(config, prompt) is None
    config.trained.unfound_classes = [config.class_names[PLATELET]]
    for prompt in (None, "malaria"):
        assert asked_classes(config, prompt).tolist() == [number != PLATELET for number in range(4)]
    assert asked_classes(config, "platelets").tolist() == [number == PLATELET for number in range(4)]


def test_a_cell_of_two_queries_is_boxed_once_under_the_finer_name(config):
    apart = [0.2, 0.2, 0.1, 0.1]
    found = output(
        [0.1, 0.95, 0.1, 0.1], [0.1, 0.1, 0.7, 0.1], [0.8, 0.1, 0.1, 0.1], boxes=[BOX, [0.5, 0.5, 0.2, 0.18], apart]
    )
    assert labels_of(config, found, nms_iou=0.6) == [RBC, NEUTROPHIL]
    assert labels_of(config, found, nms_iou=0.6, ancestors=None) == [WBC, RBC]
    nucleus = torch.tensor([[0.0, 0, 10, 10], [3.0, 3, 7, 7]])
    labels = torch.tensor([WBC, NEUTROPHIL])
    assert distinct_cells(nucleus, labels, ancestors=torch.tensor(config.ancestor_matrix)).tolist() == [False, True]
    assert distinct_cells(nucleus, labels).tolist() == [True, True]


def test_without_a_hierarchy_the_best_score_names_the_cell():
    plain = UniHemaConfig.tiny(id2label=NAMES)
    assert plain.ancestor_matrix is None
    assert labels_of(plain, output([0.1, 0.9, 0.6, 0.1])) == [WBC]
