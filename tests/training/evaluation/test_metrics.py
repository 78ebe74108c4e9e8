"""Metrics against values worked out by hand, and the same as `evaluate` modules without a network."""

import numpy as np
import pytest

from unihema.processing_unihema.masks import rle_in_image
from unihema.training.metrics.detection import (
    best_threshold,
    box_iou,
    mean_average_precision,
    operating_point,
    score_matches,
)
from unihema.training.metrics.dice import dice_scores, mask_counts
from unihema.training.metrics.morphology import match_cells, morphology_scores
from unihema.training.metrics.single_cell import classification_scores
from unihema.training.metrics.text import blank_accuracy, normalise, rouge_l, text_scores


A, B, C = [0, 0, 10, 10], [20, 20, 30, 30], [50, 50, 60, 60]
NAMES = ["red", "white"]


def found(*cells) -> dict:
    """Predictions of an image from (box, score, label)."""
    return {"boxes": [c[0] for c in cells], "scores": [c[1] for c in cells], "labels": [c[2] for c in cells]}


def truth(*cells, **extra) -> dict:
    """References of an image from (box, label)."""
    return {"boxes": [c[0] for c in cells], "labels": [c[1] for c in cells], **extra}


def test_average_precision_by_hand():
    # Ranked: hit, miss, hit of two cells: precision 1 up to recall 1/2, then 2/3. Of COCO's 101 recall points 51 lie at
    # or below 1/2.
    predictions = [found((A, 0.9, 0), (C, 0.8, 0), (B, 0.7, 0))]
    scores = mean_average_precision(predictions, [truth((A, 0), (B, 0))], NAMES)
    assert scores["mAP50"] == pytest.approx((51 + 50 * 2 / 3) / 101, abs=1e-6)
    assert scores["mAP"] == pytest.approx(scores["mAP50"], abs=1e-6)
    assert scores["per_class"]["white"] == {"AP50": None, "AP": None, "cells": 0}


def test_overlap_thresholds_count():
    # 10x8 of 10x10 is IoU 0.8: right at 0.50 to 0.80, wrong at the three above.
    scores = mean_average_precision([found(([0, 0, 10, 8], 0.9, 0))], [truth((A, 0))], NAMES)
    assert scores["mAP50"] == pytest.approx(1.0)
    assert scores["mAP75"] == pytest.approx(1.0)
    assert scores["mAP"] == pytest.approx(0.7)


def test_classes_that_a_data_set_does_not_annotate_are_left_out():
    predictions = [found((A, 0.9, 0)), found((A, 0.95, 0), (B, 0.9, 1))]
    everything = [truth((A, 0)), truth((B, 1))]
    partly = [truth((A, 0)), truth((B, 1), annotated_classes=[1])]
    assert mean_average_precision(predictions, everything, NAMES)["per_class"]["red"]["AP50"] == pytest.approx(0.5)
    assert mean_average_precision(predictions, partly, NAMES)["per_class"]["red"]["AP50"] == pytest.approx(1.0)


def test_nothing_predicted_and_nothing_there():
    assert mean_average_precision([found()], [truth((A, 0))], NAMES)["mAP50"] == 0.0
    assert mean_average_precision([found((A, 0.5, 0))], [truth()], NAMES)["mAP50"] is None


def test_a_crowd_costs_nothing():
    predictions = [found((A, 0.9, 0), (B, 0.95, 0))]
    references = [truth((A, 0), (B, 0), iscrowd=[0, 1])]
    assert mean_average_precision(predictions, references, NAMES)["mAP50"] == pytest.approx(1.0)
    scores, right, cells = score_matches(predictions, references, 0, 2)
    assert scores.tolist() == [0.9]
    assert right.tolist() == [True]
    assert cells == 1


def test_one_prediction_for_each_image():
    with pytest.raises(ValueError, match="1 predictions for 2 references"):
        mean_average_precision([found()], [truth(), truth()], NAMES)


def test_operating_threshold_by_hand():
    # F1 after each prediction, two cells: 2/3, 1/2, 4/5, 2/3; the best is after the third, at 0.6.
    predictions = [found((A, 0.9, 0), (C, 0.8, 0), (B, 0.6, 0), (C, 0.2, 0))]
    matches = score_matches(predictions, [truth((A, 0), (B, 0))], 0, 2)
    threshold, f1 = best_threshold(*matches)
    assert threshold == pytest.approx(0.4)
    assert f1 == pytest.approx(0.8)
    point = operating_point(*matches, threshold)
    assert (point["precision"], point["recall"], point["f1"]) == pytest.approx((2 / 3, 1.0, 0.8))
    assert best_threshold(*score_matches(predictions, [truth()], 0, 2)) is None


def test_operating_threshold_is_in_the_middle_of_good_ones():
    # 100 cells found with scores 0.99 to 0.50, one more with 0.1: F1 1.0 there, but within 0.01 of it from 0.505 on.
    scores = np.append(np.linspace(0.99, 0.5, 100), 0.1)
    threshold, f1 = best_threshold(scores, np.ones(101, dtype=bool), 101)
    assert threshold == pytest.approx((0.05 + 0.5) / 2, abs=0.01)
    assert f1 == pytest.approx(200 / 201)
    # Not beyond a stretch of false cells, where F1 is worse.
    right = np.array([True] * 10 + [False] * 5 + [True] * 5)
    threshold, f1 = best_threshold(np.append(np.linspace(0.99, 0.81, 19), 0.2), right, 15)
    assert threshold < 0.7
    assert f1 >= 30 / 35 - 0.05


def test_a_second_box_on_a_cell_is_wrong():
    _, right, _ = score_matches([found((A, 0.9, 0), (A, 0.8, 0))], [truth((A, 0))], 0, 2)
    assert right.tolist() == [True, False]


def test_box_iou():
    np.testing.assert_allclose(box_iou(np.array([A]), np.array([A, [5, 0, 15, 10], B])), [[1, 1 / 3, 0]], atol=1e-12)
    assert box_iou(np.array([[0, 0, 0, 0]]), np.array([[0, 0, 0, 0]]))[0, 0] == 0


def test_dice_by_hand():
    first = mask_counts(np.array([[1, 1, 0, 0]]), np.array([[255, 0, 0, 0]]))
    second = mask_counts(np.zeros((1, 4)), np.zeros((1, 4)))
    third = mask_counts(np.array([[1, 1, 1, 1]]), np.array([[1, 1, 1, 1]]))
    scores = dice_scores([first, second, third])
    assert scores["dice"] == pytest.approx((2 / 3 + 1 + 1) / 3)
    assert scores["dice_pooled"] == pytest.approx(2 * 5 / 11)
    assert scores["iou_pooled"] == pytest.approx(5 / 6)
    with pytest.raises(ValueError, match="different shapes"):
        mask_counts(np.zeros((2, 2)), np.zeros((2, 3)))


def test_classification_by_hand():
    # a: precision 2/3, recall 1, F1 4/5; b: precision 1, recall 1/2, F1 2/3; c is not there; -100 is left out.
    scores = classification_scores([0, 0, 0, 1, 2], [0, 0, 1, 1, -100], ["a", "b", "c"])
    assert scores["accuracy"] == pytest.approx(3 / 4)
    assert scores["macro_f1"] == pytest.approx((4 / 5 + 2 / 3) / 2)
    assert scores["per_class"]["a"] == {"precision": 2 / 3, "recall": 1.0, "f1": 0.8, "cells": 2}
    assert scores["per_class"]["c"]["f1"] is None
    assert scores["confusion"] == [[2, 0, 0], [1, 1, 0], [0, 0, 0]]


def test_cells_are_matched_to_the_query_that_is_shown():
    boxes = np.array([A, [0, 0, 10, 9], B], dtype=float)
    # Query 0 fits best, but query 1 has the score; cell C has no query.
    scores = np.array([[0.1, 0.0], [0.9, 0.0], [0.9, 0.9]])
    queries, cells = match_cells(boxes, np.array([A, C], dtype=float), scores)
    assert queries.tolist() == [1]
    assert cells.tolist() == [0]


def test_morphology_drops_missing_labels():
    schema = {"vacuoles": ["absent", "prominent"], "shape": ["round", "oval", "irregular"]}
    scores = morphology_scores([[0, 2], [1, 1]], [[0, -100], [0, 1]], schema, cells=4)
    assert scores["per_attribute"]["vacuoles"]["accuracy"] == pytest.approx(0.5)
    assert scores["per_attribute"]["shape"] == {"accuracy": 1.0, "macro_f1": 1.0, "cells": 1}
    assert scores["accuracy"] == pytest.approx(0.75)
    assert scores["matched"] == pytest.approx(0.5)


def test_text_by_hand():
    scores = text_scores(["The cell is  round.", "It is small"], ["the cell is round", "It is large."])
    assert scores["exact_match"] == 0.5
    assert normalise(" A  cell , round . ") == "a cell, round"
    # "it is" of "it is small" and "it is large": F1 2 * 2 / 6.
    assert scores["rougeL"] == pytest.approx((1 + 2 / 3) / 2)
    same = ["the nucleus is large and round"]
    assert text_scores(same, same)["bleu4"] == pytest.approx(100.0)
    assert text_scores([], [])["bleu4"] is None


def test_rouge_l_keeps_the_order_of_words():
    assert rouge_l("b a c", "a b c") == pytest.approx(2 * 2 / 6)
    assert rouge_l("", "a") == 0.0


def test_rouge_l_equals_the_reference_implementation():
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    pairs = [
        ("The nucleus is segmented, with 3 lobes.", "The nucleus has 3 lobes and is segmented"),
        ("a neutrophil", "The cell is a lymphocyte."),
        ("one two three four five", "five four three two one"),
    ]
    for predicted, true in pairs:
        assert rouge_l(predicted, true) == pytest.approx(scorer.score(true, predicted)["rougeL"].fmeasure, abs=1e-12)


def test_blanks_are_compared_one_by_one():
    masked = ["The <extra_id_0> has a <extra_id_1> nucleus."]
    true = ["The neutrophil has a segmented nucleus."]
    assert blank_accuracy(["The neutrophil has a round nucleus."], true, masked) == 0.5
    assert blank_accuracy(["A neutrophil has a segmented nucleus."], true, masked) == 0.0
    assert blank_accuracy(true, true, masked) == 1.0


def test_evaluate_modules_need_no_network():
    from unihema.training.metrics import modules

    assert modules.DiceMetric().compute(predictions=[[[0, 1]]], references=[[[0, 1]]])["dice"] == 1.0
    assert modules.TextMetric().compute(predictions=["a b"], references=["A b."])["exact_match"] == 1.0
    single = modules.SingleCellMetric().compute(predictions=[0, 1], references=[0, 0], class_names=NAMES)
    assert single["accuracy"] == 0.5
    schema = {"shape": ["round", "oval"]}
    assert modules.MorphologyMetric().compute(predictions=[[1]], references=[[1]], schema=schema)["accuracy"] == 1.0
    detection = modules.DetectionMetric().compute(
        predictions=[found((A, 0.5, 0))], references=[truth((A, 0), annotated_classes=[])], class_names=NAMES
    )
    assert detection["mAP50"] == pytest.approx(1.0)


def test_average_precision_of_masks_is_of_their_pixels():
    inside = np.zeros((10, 10), bool)
    inside[:, :5] = True
    code, size = (lambda mask, place: rle_in_image(mask, place, (70, 70))), (70, 70)
    true = truth((A, 0), (B, 0), masks=[code(inside, (0, 0)), None], size=size)
    right = found((A, 0.9, 0), (B, 0.8, 0)) | {"masks": [code(inside, (0, 0)), code(~inside, (20, 20))]}
    scores = mean_average_precision([right], [true], NAMES, of_masks=True)
    # The cell without a mask is neither found nor missed.
    assert scores["mAP"] == pytest.approx(1.0) and scores["per_class"]["red"]["cells"] == 1
    # The box is right, the mask the other half of it.
    wrong = right | {"masks": [code(~inside, (0, 0)), code(inside, (20, 20))]}
    assert mean_average_precision([wrong], [true], NAMES, of_masks=True)["mAP50"] == 0.0
    assert mean_average_precision([wrong], [true], NAMES)["mAP50"] == pytest.approx(1.0)
