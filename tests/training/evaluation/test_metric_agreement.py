"""Metrics against other libraries on random cases, and figures of resamples against figures of the same images."""

import numpy as np
import pytest
from scipy.spatial import distance

from unihema.training.metrics.counting import count_error
from unihema.training.metrics.detection import mean_average_precision, score_matches
from unihema.training.metrics.dice import dice_scores, mask_counts, weighted_dice
from unihema.training.metrics.morphology import morphology_scores
from unihema.training.metrics.resampled_precision import MatchedDetections
from unihema.training.metrics.single_cell import classification_scores, one_hot_counts, scores_of_counts
from unihema.training.metrics.text import rouge_l, text_scores, text_statistics, weighted_text_scores


NAMES = ["red", "white", "platelet"]
WORDS = (
    "the cell is",
    "a large",
    "small",
    "neutrophil",
    "lymphocyte with",
    "round",
    "segmented nucleus ,",
    "no vacuoles .",
)


def random_fields(count: int, seed: int = 0, crowds: bool = False) -> tuple[list[dict], list[dict]]:
    """Predictions near the cells, far from them and of the wrong class; some data sets annotate two classes only."""
    rng = np.random.default_rng(seed)
    predictions, references = [], []
    for field in range(count):
        cells = rng.integers(0, 12)
        corner, size = rng.uniform(0, 80, (cells, 2)), rng.uniform(8, 20, (cells, 2))
        boxes, labels = np.hstack((corner, corner + size)), rng.integers(0, 3, cells)
        near = boxes[rng.random(cells) < 0.9].repeat(2, axis=0)
        near = near + rng.normal(0, 1.5, near.shape)
        far = rng.uniform(0, 70, (5, 2))
        found = np.vstack((near, np.hstack((far, far + 15))))
        guessed = rng.integers(0, 3, len(found))
        right = np.where(rng.random(len(found)) < 0.8, np.append(labels.repeat(2)[: len(near)], [0] * 5), guessed)
        predictions.append({"boxes": found, "scores": rng.random(len(found)), "labels": right})
        reference = {"boxes": boxes, "labels": labels}
        if crowds:
            reference["iscrowd"] = (rng.random(cells) < 0.3).astype(int).tolist()
        if field % 3 == 0:
            reference["annotated_classes"] = [0, 1]
            # A data set has no cells of a class that it does not annotate.
            kept = labels < 2
            reference |= {name: np.asarray(reference[name])[kept] for name in ("boxes", "labels")}
            if crowds:
                reference["iscrowd"] = np.asarray(reference["iscrowd"])[kept].tolist()
        references.append(reference)
    return predictions, references


@pytest.mark.parametrize("crowds", [False, True])
def test_resampled_average_precision_is_that_of_the_coco_evaluation(crowds):
    predictions, references = random_fields(25, crowds=crowds)
    matched = MatchedDetections(predictions, references, len(NAMES))
    rng = np.random.default_rng(1)
    for draw in [np.arange(25), rng.integers(25, size=25), rng.integers(25, size=25), np.array([3, 3, 4])]:
        expected = mean_average_precision([predictions[n] for n in draw], [references[n] for n in draw], NAMES)
        precision = matched.average_precision(np.bincount(draw, minlength=25))
        for label, name in enumerate(NAMES):
            of_class = expected["per_class"][name]
            if not of_class["cells"]:
                assert np.isnan(precision[:, label]).all()
                continue
            assert precision[0, label] == pytest.approx(of_class["AP50"], abs=1e-6)
            assert precision[:, label].mean() == pytest.approx(of_class["AP"], abs=1e-6)


def test_a_class_that_is_never_predicted_has_no_precision():
    predictions, references = random_fields(4)
    for predicted in predictions:
        predicted["labels"] = np.zeros_like(predicted["labels"])
    precision = MatchedDetections(predictions, references, len(NAMES)).average_precision(np.ones(4))
    assert precision[:, 1].max() == 0.0


def test_a_box_in_a_crowd_costs_nothing_however_large_the_crowd():
    predictions = [{"boxes": [[10, 10, 20, 20], [60, 60, 70, 70]], "scores": [0.9, 0.8], "labels": [0, 0]}]
    references = [{"boxes": [[0, 0, 50, 50], [60, 60, 70, 70]], "labels": [0, 0], "iscrowd": [1, 0]}]
    scores, right, cells = score_matches(predictions, references, 0, 1)
    assert (scores.tolist(), right.tolist(), cells) == ([0.8], [True], 1)
    assert mean_average_precision(predictions, references, ["red"])["mAP"] == pytest.approx(1.0)
    assert MatchedDetections(predictions, references, 1).average_precision(np.ones(1)) == pytest.approx(1.0)


def test_count_error_by_hand():
    def field(counted: int, true: int, **extra):
        return {"labels": [0] * counted + [1] * 9}, {"labels": [0] * true + [1], **extra}

    fields = [field(10, 10), field(8, 10), field(15, 10), field(3, 0), field(0, 9, annotated_classes=[1])]
    fields += [field(1, 2, iscrowd=[1, 0, 0])]
    predictions, references = zip(*fields)
    # 0, 0.2 and 0.5; without cells, not annotated and with a crowd of unknown number are left out.
    assert count_error(predictions, references, 0, 2) == {"count_error": pytest.approx(0.2), "counted_fields": 3}
    assert count_error(predictions, references, 1, 2)["count_error"] == 8.0
    assert count_error(predictions[3:], references[3:], 0, 2) == {"count_error": None, "counted_fields": 0}
    with pytest.raises(ValueError, match="shorter|longer"):
        count_error(predictions, references[:2], 0, 2)


def test_dice_and_iou_equal_scipy_image_by_image():
    rng = np.random.default_rng(0)
    predicted, true = (rng.random((2, 6, 13, 17)) < np.linspace(0.1, 0.9, 6)[:, None, None]).astype(int)
    counts = [mask_counts(a, b) for a, b in zip(predicted, true)]
    scores = dice_scores(counts)
    for name, dissimilarity in (("dice", distance.dice), ("iou", distance.jaccard)):
        each = [1 - dissimilarity(a.ravel() > 0, b.ravel() > 0) for a, b in zip(predicted, true)]
        assert scores[name] == pytest.approx(np.mean(each), abs=1e-12)
        assert scores[f"{name}_pooled"] == pytest.approx(
            1 - dissimilarity(predicted.ravel() > 0, true.ravel() > 0), abs=1e-12
        )
    drawn = [0, 0, 3, 5]
    again = weighted_dice(np.array(counts), np.bincount(drawn, minlength=6))
    assert again | {"images": 4} == pytest.approx(dice_scores([counts[n] for n in drawn]))
    # A perfect mask is perfect whatever is beside it; the official code gave 0.667 for a batch of two.
    assert dice_scores([mask_counts(true[0], true[0])] * 2)["dice"] == 1.0


def test_f1_equals_nltk():
    confusion_matrix = pytest.importorskip("nltk.metrics.confusionmatrix").ConfusionMatrix
    rng = np.random.default_rng(0)
    true = rng.integers(0, 4, 200)
    predicted = np.where(rng.random(200) < 0.6, true, rng.integers(0, 5, 200))
    names = list("abcde")
    scores = classification_scores(predicted, true, names)
    matrix = confusion_matrix([names[n] for n in true], [names[n] for n in predicted])
    f1 = {name: matrix.f_measure(name) for name in names[:4]}
    for name, value in f1.items():
        assert scores["per_class"][name]["f1"] == pytest.approx(value, abs=1e-12)
    shares = np.bincount(true, minlength=4) / 200
    assert scores["macro_f1"] == pytest.approx(np.mean(list(f1.values())), abs=1e-12)
    assert scores["weighted_f1"] == pytest.approx(
        sum(f1[name] * share for name, share in zip(names, shares)), abs=1e-12
    )


def test_f1_by_hand_and_of_a_resample():
    predicted, true = np.array([0, 0, 0, 1, 2]), np.array([0, 0, 1, 1, -100])
    scores = classification_scores(predicted, true, NAMES)
    assert scores["weighted_f1"] == pytest.approx(0.5 * 4 / 5 + 0.5 * 2 / 3)
    counts = one_hot_counts(predicted, true, 3)
    drawn = np.array([0, 2, 2, 3, 4])
    again, _ = scores_of_counts(*np.tensordot(np.bincount(drawn, minlength=5), counts, 1))
    expected = classification_scores(predicted[drawn], true[drawn], NAMES)
    assert again == pytest.approx({name: expected[name] for name in again})
    with pytest.raises(ValueError, match="2 predictions for 1 references"):
        classification_scores([0, 1], [0], NAMES)


def test_morphology_by_hand():
    # Vacuoles: true 0 0 1 1, read 0 1 1 1: F1 2/3 and 4/5. Shape: the second cell has no label; 2 of 3 right,
    # F1 2/3 for round (1 right, 1 read, 2 true), 1 for none else: oval is read once and never true, irregular 1 of 1.
    schema = {"vacuoles": ["absent", "present"], "shape": ["round", "oval", "irregular"]}
    read, true = [[0, 0], [1, 0], [1, 1], [1, 2]], [[0, 0], [0, -100], [1, 0], [1, 2]]
    scores = morphology_scores(read, true, schema, cells=5)
    assert scores["per_attribute"]["vacuoles"]["macro_f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert scores["per_attribute"]["shape"]["macro_f1"] == pytest.approx((2 / 3 + 1) / 2)
    assert scores["macro_f1"] == pytest.approx(((2 / 3 + 4 / 5) / 2 + (2 / 3 + 1) / 2) / 2)
    assert scores["matched"] == pytest.approx(0.8)


def random_texts(count: int) -> tuple[list[str], list[str]]:
    rng = np.random.default_rng(0)
    true = [" ".join(rng.choice(WORDS, rng.integers(1, 9))).capitalize() for _ in range(count)]
    predicted = [" ".join(word for word in text.split() if rng.random() < 0.8) for text in true]
    return predicted, true


def test_bleu_of_every_order_equals_sacrebleu():
    from sacrebleu.metrics import BLEU

    predicted, true = random_texts(60)
    scores = text_scores(predicted, true)
    for order in (1, 2, 3, 4):
        expected = BLEU(lowercase=True, max_ngram_order=order).corpus_score(predicted, [true]).score
        assert scores[f"bleu{order}"] == pytest.approx(expected, abs=1e-9)
    drawn = [1, 1, 7, 30, 59]
    again = weighted_text_scores(text_statistics(predicted, true), np.bincount(drawn, minlength=60))
    expected = text_scores([predicted[n] for n in drawn], [true[n] for n in drawn])
    assert again == pytest.approx({name: expected[name] for name in again}, abs=1e-9)


def test_bleu_by_hand():
    # "the cell is big" for "the cell is large": 3 of 4 words, 2 of 3 pairs, 1 of 2 triples, no four, smoothed to 1/2.
    scores = text_scores(["the cell is big"], ["the cell is large"])
    for order, precisions in enumerate(
        [[3 / 4], [3 / 4, 2 / 3], [3 / 4, 2 / 3, 1 / 2], [3 / 4, 2 / 3, 1 / 2, 1 / 2]], 1
    ):
        assert scores[f"bleu{order}"] == pytest.approx(100 * np.prod(precisions) ** (1 / order))
    assert text_scores([""], ["a"])["bleu1"] == 0.0
    with pytest.raises(ValueError, match="1 predictions for 2 references"):
        text_scores(["a"], ["a", "b"])


def test_rouge_l_of_random_texts_equals_the_reference_implementation():
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    for predicted, true in zip(*random_texts(40)):
        assert rouge_l(predicted, true) == pytest.approx(scorer.score(true, predicted)["rougeL"].fmeasure, abs=1e-12)
