"""What scores mean: fits against known curves, errors and levels that were worked out by hand, and where they are used."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.command import run_command
from tests.tiny_checkpoint import save_tiny_checkpoint
from unihema import SmearReport, SmearResult, UniHemaConfig
from unihema.errors import InputError
from unihema.loading import load_model
from unihema.results.calibration import calibrated_probability, certainty, set_probabilities
from unihema.results.smear_result import Cell
from unihema.training.data.synthetic.folder import write_synthetic
from unihema.training.evaluation import evaluate
from unihema.training.evaluation.calibration import expected_calibration_error, fit_calibration, typing_level


FITTED = {
    "slope": 2.0,
    "shift": 0.0,
    "shifts": {"neutrophil": 1.0},
    "typed_from": 0.7,
    "precision": 0.95,
    "coverage": 0.8,
}


def answers(number=4000, seed=0):
    """Answers whose scores are too sure, more so in one class."""
    draw = np.random.default_rng(seed)
    labels = draw.choice(["neutrophil", "lymphocyte", "RBC"], number)
    scores = draw.uniform(0.02, 0.98, number)
    logits = 0.5 * np.log(scores / (1 - scores)) + np.where(labels == "lymphocyte", -1.0, 0.5)
    return labels, scores, draw.uniform(size=number) < 1 / (1 + np.exp(-logits))


def test_a_fit_finds_the_curve_that_the_answers_follow():
    labels, scores, right = answers()
    found = fit_calibration(labels, scores, right)
    assert found["slope"] == pytest.approx(0.5, abs=0.06)
    assert found["shifts"]["lymphocyte"] == pytest.approx(-1.0, abs=0.15)
    assert found["shifts"]["RBC"] == pytest.approx(0.5, abs=0.15)
    assert found["ece"] < 0.03 < expected_calibration_error(scores, right)
    # Other answers of the same kind.
    labels, scores, right = answers(seed=1)
    told = [calibrated_probability(found, *each) for each in zip(labels, scores, strict=True)]
    assert expected_calibration_error(np.array(told), right) < 0.03


def test_a_class_with_few_answers_stays_near_the_others():
    labels, scores, right = answers(1000)
    found = fit_calibration([*labels, "blast"], [*scores, 0.5], [*right, True])
    assert abs(found["shifts"]["blast"] - found["shift"]) < 0.6


def test_a_higher_score_never_means_less():
    scores = np.linspace(0.05, 0.95, 200)
    found = fit_calibration(["RBC"] * 200, scores, scores < 0.5)
    told = [calibrated_probability(found, "RBC", score) for score in scores]
    assert told == sorted(told)


def test_too_few_answers_and_those_that_are_all_right_fit_nothing():
    assert fit_calibration(["RBC"] * 29, [0.5] * 29, [True, *[False] * 28]) is None
    assert fit_calibration(["RBC"] * 50, [0.5] * 50, [True] * 50) is None


def test_the_calibration_error_is_that_of_its_bins():
    # Bins of a half: 0.2 and 0.4 with none right, 0.9 and 0.7 with one right.
    probabilities, right = np.array([0.2, 0.4, 0.9, 0.7]), np.array([0, 0, 1, 0])
    expected = (2 * abs(0.3 - 0.0) + 2 * abs(0.8 - 0.5)) / 4
    assert expected_calibration_error(probabilities, right, bins=2) == pytest.approx(expected)
    assert expected_calibration_error(np.array([1.0]), np.array([1])) == 0


def test_error_and_curve_are_those_of_netcal():
    # Not in the environment of the tests: it brings Pyro and GPyTorch. `pip install netcal` beside them runs this.
    metrics, scaling = (pytest.importorskip(f"netcal.{part}", exc_type=ImportError) for part in ("metrics", "scaling"))
    labels, scores, right = answers()
    for bins in (1, 7, 15):
        theirs = metrics.ECE(bins).measure(scores, right.astype(int))
        assert expected_calibration_error(scores, right, bins) == pytest.approx(theirs, abs=1e-9)
    curve = scaling.LogisticCalibration(temperature_only=False)
    curve.fit(scores, right.astype(int))
    found = fit_calibration(["RBC"] * len(labels), scores, right)
    ours = [calibrated_probability(found, "RBC", score) for score in scores]
    # Theirs has no prior, ours is rounded to four digits.
    np.testing.assert_allclose(ours, curve.transform(scores), atol=1e-3)


def test_the_level_keeps_as_many_types_as_are_right_often_enough():
    probabilities, right = np.array([0.6, 0.9, 0.7, 0.8, 0.5]), np.array([1, 1, 0, 1, 0])
    kept = typing_level(probabilities, right, 0.75)
    assert (kept["typed_from"], kept["reached"], kept["coverage"]) == (0.6, 0.75, 0.8)
    kept = typing_level(probabilities, right, 0.95)
    assert (kept["typed_from"], kept["reached"], kept["coverage"]) == (0.8, 1.0, 0.4)
    # Of two answers that are equally probable, one is not kept alone.
    assert typing_level(np.array([0.9, 0.9]), np.array([1, 0]), 0.95) is None
    assert typing_level(np.array([]), np.array([]), 0.95) is None


def test_the_level_is_of_types_of_white_cells_alone():
    labels, scores, right = answers()
    found = fit_calibration(labels, scores, right)
    typed = labels != "RBC"
    told = np.array([calibrated_probability(found, *each) for each in zip(labels, scores, strict=True)])
    kept = typed & (told >= found["typed_from"])
    assert right[kept].mean() == pytest.approx(0.95, abs=0.03)
    assert kept.sum() / typed.sum() == pytest.approx(found["coverage"], abs=0.05)
    assert "typed_from" not in fit_calibration(["RBC"] * len(scores), scores, right)


def field():
    cells = [
        Cell(1, (0, 0, 9, 9), "neutrophil", 0.6),
        Cell(2, (10, 0, 19, 9), "lymphocyte", 0.6),
        Cell(3, (20, 0, 29, 9), "RBC", 0.3),
    ]
    return SmearResult(30, 10, cells, classes=["RBC", "WBC", "neutrophil", "lymphocyte"])


def test_cells_have_probabilities_beside_their_scores_and_keep_both():
    result = field()
    set_probabilities(result, {"detection": FITTED})
    # 2 x logit(0.6) + 1, and without it.
    expected = [1 / (1 + np.exp(-(2 * np.log(1.5) + shift))) for shift in (1.0, 0.0)]
    assert [cell.probability for cell in result.cells[:2]] == pytest.approx(expected, abs=1e-4)
    assert [cell.score for cell in result.cells] == [0.6, 0.6, 0.3]
    again = SmearResult.from_dict(json.loads(json.dumps(result.to_dict())))
    assert again.cells == result.cells
    plain = field()
    set_probabilities(plain, {})
    assert certainty(plain.cells[0]) == 0.6 and "probability" not in plain.to_dict()["cells"][0]
    crop = SmearResult(9, 9, single_cell={"label": "neutrophil", "score": 0.6})
    set_probabilities(crop, {"single_cell": FITTED})
    assert SmearResult.from_dict(crop.to_dict()).single_cell == crop.single_cell
    assert crop.single_cell["probability"] == pytest.approx(expected[0], abs=1e-4)


def test_a_type_that_the_crop_gave_has_the_probability_of_its_head():
    result = field()
    result.cells[0].second_look = {"label": "lymphocyte", "score": 0.9, "detection": "neutrophil"}
    result.cells[1].second_look = {"label": "lymphocyte", "score": 0.9, "detection": "neutrophil"}
    of_crop = {"slope": 1.0, "shift": 0.0, "shifts": {}}
    set_probabilities(result, {"detection": FITTED, "single_cell": of_crop})
    # The first kept what detection said, the second did not.
    assert result.cells[0].probability == pytest.approx(calibrated_probability(FITTED, "neutrophil", 0.6), abs=1e-4)
    assert result.cells[1].probability == pytest.approx(0.9, abs=1e-4)
    set_probabilities(result, {"detection": FITTED})
    assert result.cells[1].probability is None


def test_a_report_leaves_types_open_that_are_too_uncertain():
    result = field()
    set_probabilities(result, {"detection": FITTED})
    report = SmearReport.of([result])
    counts = {row["name"]: row["count"] for row in report.figures["white_cells"]["rows"]}
    assert counts == {"neutrophil": 1, "lymphocyte": 0, "unidentified": 1}
    assert any(
        note.startswith("1 of 2 white cells have a type that is too uncertain") for note in report.figures["notes"]
    )
    # The results stay as they are.
    assert [cell.label for cell in result.cells] == ["neutrophil", "lymphocyte", "RBC"]
    kept = SmearReport.of([result], keep_types=True).figures["white_cells"]["rows"]
    assert {row["name"]: row["count"] for row in kept}["lymphocyte"] == 1
    result.cells[1].probability = 1.0
    counted = SmearReport.of([result]).figures["white_cells"]["rows"]
    assert {row["name"]: row["count"] for row in counted}["lymphocyte"] == 1


@pytest.mark.parametrize(
    "fitted",
    [
        {"detection": {"slope": 1.0, "shift": 0.0}},
        {"detection": {"slope": -1.0, "shift": 0.0, "shifts": {}}},
        {"detection": {"slope": 1.0, "shift": 0.0, "shifts": {"RBC": "0"}}},
        {"detection": {"slope": 1.0, "shift": 0.0, "shifts": {}, "typed_from": 2}},
        {"detection": {"slope": 1.0, "shift": 0.0, "shifts": {}, "other": 1}},
        {"segmentation": {"slope": 1.0, "shift": 0.0, "shifts": {}}},
        {"detection": []},
    ],
)
def test_a_configuration_refuses_what_is_no_calibration(fitted):
    with pytest.raises(InputError, match="calibration"):
        UniHemaConfig.tiny(trained={"calibration": fitted})


def test_a_configuration_keeps_a_calibration():
    config = UniHemaConfig.tiny(trained={"calibration": {"detection": FITTED}})
    assert UniHemaConfig.from_dict(config.to_dict()).trained.calibration == {"detection": FITTED}


def test_a_measured_model_has_no_calibration_of_other_data(tmp_path, monkeypatch):
    model, processor = load_model(save_tiny_checkpoint(tmp_path / "checkpoint"), "cpu")
    Image.new("RGB", (64, 64), "pink").save(tmp_path / "a.png")
    cells = {"bbox": [[4, 4, 20, 20]], "category": ["platelet"], "morphology": [{}]}
    row = {"task": "detection", "image": str(tmp_path / "a.png"), "file_name": "a.png", "dataset": "lab"}
    rows = {"detection": [row | {"size": (64, 64), "objects": cells}]}
    old = {"detection": FITTED, "single_cell": FITTED}
    for found in ({"slope": 3.0, "shift": 0.0, "shifts": {}}, None):
        model.config.trained.calibration = dict(old)
        before = model.config.trained.calibration
        monkeypatch.setattr(evaluate, "calibration_of", lambda _, found=found: found)
        evaluate.evaluate_model(model, processor, rows, calibrate=True, bootstrap=0, progress=False)
        expected = {"single_cell": FITTED} | ({"detection": found} if found else {})
        assert model.config.trained.calibration == expected and before == old


def test_the_command_writes_the_calibration_and_nothing_else(tmp_path, monkeypatch):
    checkpoint = save_tiny_checkpoint(tmp_path / "checkpoint")
    before = json.loads((checkpoint / "config.json").read_text())
    write_synthetic(tmp_path / "data", 1, 1, crops_per_field=1, width=224, height=168, crop_size=96, progress=False)
    monkeypatch.setattr(
        evaluate,
        "calibrate_scores",
        lambda *_, **__: {"detection": FITTED | {"ece": 0.01, "cells": 90, "reached": 0.96}},
    )
    done = run_command("evaluate", checkpoint, tmp_path / "data", "--task", "detection", "--calibrate")
    assert done.returncode == 0, done.stderr
    assert (
        "90 answers, calibration error 0.010; from 0.70 on 96.0% of the types of white cells are right" in done.stdout
    )
    after = json.loads((checkpoint / "config.json").read_text())
    assert after["trained"].pop("calibration")["detection"]["shifts"] == {"neutrophil": 1.0}
    before.get("trained", {}).pop("calibration", None)
    assert after == before
