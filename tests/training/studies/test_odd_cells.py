"""Odd-cell scores: what they are fitted to, where they are kept, and what an analysis says of cells."""

import csv
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_checkpoint import save_lively

from unihema import Analyzer
from unihema.checkpoint_files import REFERENCE_FILE
from unihema.loading import load_model
from unihema.results.odd_cells import MOST, QUANTILE, CellReference, is_odd
from unihema.results.out_of_distribution import ModelReference, ReferenceWarning, backbone_checksum
from unihema.results.smear_result import SmearResult
from unihema.results.tied_gaussians import TiedGaussians
from unihema.training.studies.reference import fit_cells, odd_cell_figures, with_cells


def drawn(number: int, seed: int, away: float = 0.0) -> tuple[list[str], np.ndarray]:
    draw = np.random.default_rng(seed)
    names = [("a", "b")[place % 2] for place in range(number)]
    centres = {"a": 0.0, "b": 6.0}
    return names, np.stack([draw.normal(centres[name] + away, 1.0, 8) for name in names])


def test_scores_are_distances_to_the_own_class_in_parts_of_its_limit():
    train, val = drawn(400, 0), drawn(200, 1)
    known = CellReference.fit(train, val, "h")
    assert known.classes == ("a", "b")
    for number, name in enumerate(known.classes):
        own = val[1][[each == name for each in val[0]]]
        distances = known.gaussians.distances(own)[:, number]
        assert known.limits[number] == pytest.approx(np.quantile(distances, QUANTILE))
        np.testing.assert_allclose(known.scores(own, [name] * len(own)), distances / known.limits[number], atol=6e-4)
    names, states = drawn(200, 2)
    assert np.mean(np.array(known.scores(states, names)) > 1) < 0.15
    # Of another class, and of none.
    assert min(known.scores(states[::2], ["b"] * 100)) > 1
    far = known.scores(states[:1] + 1e9, ["a"])
    assert far == [MOST] == known.scores(np.full((1, 8), np.nan), ["a"])
    assert known.scores(states[:2], ["a", "c"])[1] is None and known.scores(states[:0], []) == []


def test_a_class_of_few_cells_has_no_score_or_the_limit_of_its_training():
    names, states = drawn(60, 0)
    few = ([*names, "c"], np.concatenate([states, states[:1]]))
    known = CellReference.fit(few, ([], np.zeros((0, 8))), "h")
    assert known.classes == ("a", "b")
    own = states[[name == "a" for name in names]]
    assert known.limits[0] == pytest.approx(np.quantile(known.gaussians.distances(own)[:, 0], QUANTILE))
    assert CellReference.fit((["a"] * 9, states[:9]), ([], states[:0]), "h") is None


def test_figures_are_those_that_were_worked_out_by_hand():
    names, states = drawn(400, 0)
    known = CellReference.fit((names, states), drawn(200, 1), "h")
    scores = np.array(known.scores(states[:5], names[:5]))
    right = np.array([True, True, False, True, False])
    told = odd_cell_figures(known, [*names[:5], "c"], states[:6], [*right, True])
    pairs = [scores[wrong] > scores[rest] for wrong in (2, 4) for rest in (0, 1, 3)]
    assert told["cells"] == 5 and told["auc"] == pytest.approx(np.mean(pairs)) and told["right"] == 0.6
    assert told["odd"] == np.mean(scores > 1) and told["right_of_others"] == right[scores <= 1].mean()
    assert np.isnan(odd_cell_figures(known, ["c"], states[:1], [True])["auc"])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint, and rows whose truth is what its model says, so that all of it is right."""
    root = tmp_path_factory.mktemp("odd")
    folder = save_lively(root / "unihema", 3)
    model, _ = load_model(folder, "cpu")
    analyzer = Analyzer.from_pretrained(folder, device="cpu")
    rows = {"detection": [], "single_cell": []}
    for number in range(24):
        path = root / f"{number}.png"
        pixels = np.random.default_rng(number).integers(60, 230, (6, 8, 3), np.uint8)
        Image.fromarray(pixels).resize((80, 60)).save(path)
        result = analyzer(path, ["detection", "single_cell"], tiles="off")
        boxes = [[x, y, right - x, bottom - y] for x, y, right, bottom in (cell.box for cell in result.cells)]
        objects = {"bbox": boxes, "category": [cell.label for cell in result.cells]}
        shared = {"image": str(path), "file_name": path.name, "dataset": "lab"}
        rows["detection"].append({**shared, "task": "detection", "objects": objects, "size": [80, 60]})
        rows["single_cell"].append({**shared, "task": "single_cell", "label": result.single_cell["label"]})
    return folder, rows


def saved(folder, rows) -> ModelReference:
    model, processor = load_model(folder, "cpu")
    cells, figures = fit_cells(model, processor, rows, rows, progress=False)
    assert {head: told["right"] for head, told in figures.items()} == dict.fromkeys(cells, 1.0)
    reference = ModelReference({}, backbone_checksum(model), cells)
    reference.save(folder)
    return reference


def test_an_analysis_says_how_odd_cells_are(checkpoint, tmp_path):
    folder, rows = checkpoint
    known = saved(folder, rows).cells
    assert set(known) == {"detection", "single_cell"}
    analyzer = Analyzer.from_pretrained(folder, device="cpu")
    results = [analyzer(row["image"], ["detection", "single_cell"], tiles="off") for row in rows["detection"]]
    of_cells = [cell for result in results for cell in result.cells]
    scored = [cell for cell in of_cells if cell.label in known["detection"].classes]
    assert all((cell.odd is not None) == (cell in scored) for cell in of_cells)
    # Boxes that overlap were one cell in the fit, so not every cell was in it.
    assert len(scored) > 50 and 0.8 < np.mean([not is_odd(cell) for cell in scored]) < 1
    crops = [result.single_cell for result in results if result.single_cell["label"] in known["single_cell"].classes]
    assert crops and np.mean([crop["odd"] > 1 for crop in crops]) < 0.2
    # The same from a batch, from a file, and in tables.
    together = analyzer.analyze_images([row["image"] for row in rows["detection"][:3]], tiles="off")
    for alone, result in zip(results, together, strict=False):
        assert [cell.odd for cell in result.cells] == pytest.approx([cell.odd for cell in alone.cells], abs=0.02)
    assert SmearResult.from_dict(results[0].to_dict()).to_dict() == results[0].to_dict()
    analyzer.analyze_files([rows["detection"][0]["image"]], tmp_path / "out", ["detection"], tiles="off")
    with open(tmp_path / "out" / "cells.csv", newline="") as file:
        told = [row["odd"] for row in csv.DictReader(file)]
    assert told == ["" if cell.odd is None else str(cell.odd) for cell in results[0].cells]
    # What a prompt of one's own makes of cells was never fitted.
    assert all(cell.odd is None for cell in analyzer(rows["detection"][0]["image"], prompt="malaria").cells)


def test_cells_that_are_named_wrongly_are_not_learned(checkpoint):
    folder, rows = checkpoint
    model, processor = load_model(folder, "cpu")
    others = {
        name: next(label for label in model.config.class_names if label != name) for name in model.config.class_names
    }
    wrong = [
        {**row, "objects": {**row["objects"], "category": [others[name] for name in row["objects"]["category"]]}}
        for row in rows["detection"]
    ]
    assert fit_cells(model, processor, {"detection": wrong}, {}, progress=False) == ({}, {})
    # Nor those of boxes that are crops, and of crops without boxes.
    cut = [{**row, "box": [0, 0, 9, 9]} for row in rows["single_cell"]]
    whole = [{**row, "from_attributes": True} for row in rows["detection"]]
    assert fit_cells(model, processor, {"detection": whole, "single_cell": cut}, {}, progress=False) == ({}, {})


def test_it_is_kept_with_the_weights_that_it_belongs_to(checkpoint, tmp_path):
    folder, rows = checkpoint
    reference = saved(folder, rows)
    loaded = ModelReference.load(folder)
    for head, of in reference.cells.items():
        assert (loaded.cells[head].classes, loaded.cells[head].head) == (of.classes, of.head)
        np.testing.assert_allclose(loaded.cells[head].limits, of.limits, rtol=1e-6)
    model, _ = load_model(folder, "cpu")
    with torch.no_grad():
        model.single_cell_head.layers[0].weight.add_(0.1)
    assert set(loaded.with_heads_of(model).cells) == {"detection"}
    loaded.save_with(model, tmp_path)
    assert set(ModelReference.load(tmp_path).cells) == {"detection"}
    with torch.no_grad():
        next(model.model.visual_backbone.backbone.parameters()).add_(0.1)
    model.save_pretrained(tmp_path)
    with pytest.warns(ReferenceWarning, match="other weights"), pytest.raises(ValueError, match="leave out --cells"):
        with_cells(tmp_path, model, reference.cells)
    # One of before has none.
    replace(reference, cells={}).save(tmp_path)
    assert ModelReference.load(tmp_path).cells == {}


@pytest.mark.parametrize(
    ("name", "value"),
    [("limits", torch.zeros(2)), ("limits", torch.ones(3)), ("scale", torch.ones(3)), ("vectors", torch.ones(4, 2))],
)
def test_a_damaged_one_is_named(tmp_path, name, value):
    known = CellReference.fit(drawn(60, 0), drawn(60, 1), "h")
    assert isinstance(known.gaussians, TiedGaussians)
    path = ModelReference({}, "b", {"detection": known}).save(tmp_path)
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        about = file.metadata()
    save_file({**load_file(path), f"cells.detection.{name}": value}, path, about)
    with pytest.raises(ValueError, match=f"{REFERENCE_FILE}: cannot be read .what cells"):
        ModelReference.load(tmp_path)
