"""Home and abroad in an evaluation: groups follow the record of the training, and warnings of strange images are measured."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import lively, very_tiny_config

from unihema.modeling_unihema.modeling_unihema import UniHemaForMultiTask
from unihema.processing_unihema.processing_unihema import UniHemaProcessor
from unihema.results.crop_framing import CropFrame, views_of
from unihema.training.evaluation import evaluate_model, sources
from unihema.training.evaluation.report import parts_of, report_lines, unlike_text
from unihema.training.evaluation.sources import ABROAD, HOME, Distances, groups_of
from unihema.training.studies.reference import fit_reference


LABELS = ["neutrophil", "lymphocyte", "burr_cell"]


@pytest.fixture(scope="module")
def processor() -> UniHemaProcessor:
    return UniHemaProcessor.from_default(single_cell={"longest_edge": 64})


@pytest.fixture(scope="module")
def model() -> UniHemaForMultiTask:
    torch.manual_seed(1)
    return lively(UniHemaForMultiTask(very_tiny_config(single_cell_labels=LABELS))).eval()


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[dict]:
    """Four bright crops of each of two data sets, and dark ones of a third."""
    folder = tmp_path_factory.mktemp("images")
    found = []
    for number, (name, level) in enumerate((("a", 200), ("b", 190), ("far", 40)) * 4):
        pixels = np.random.default_rng(number).normal(level, 8, (40, 40, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        found.append(
            {
                "image": str(folder / f"{number}.png"),
                "file_name": f"{number}.png",
                "dataset": name,
                "task": "single_cell",
                "label": LABELS[number % 3 if name == "a" else number % 2],
            }
        )
    return found


def test_sources_are_told_apart_by_the_record_of_the_training():
    assert groups_of(["a", "far", "b"], {"a", "b", "c"}) == {HOME: ["a", "b"], ABROAD: ["far"]}
    assert groups_of(["far"], {"a"}) == {ABROAD: ["far"]}
    assert groups_of(["a", "far"], ()) == {}


def test_each_group_has_the_figures_of_its_rows_alone(model, processor, rows):
    report = evaluate_model(model, processor, {"single_cell": rows}, progress=False, bootstrap=20, home=["a", "b"])
    groups = report["single_cell"]["groups"]
    for group, names in ((HOME, ("a", "b")), (ABROAD, ("far",))):
        own = [row for row in rows if row["dataset"] in names]
        alone = evaluate_model(model, processor, {"single_cell": own}, progress=False, bootstrap=20)["single_cell"]
        assert groups[group]["rows"] == len(own) and groups[group]["accuracy"] == alone["accuracy"]
        assert groups[group]["kinds"] == alone["kinds"] and groups[group].get("types") == alone.get("types")
        assert groups[group]["intervals"] == alone["intervals"]
    assert list(parts_of(report["single_cell"])) == [HOME, ABROAD, "a", "b", "far"]
    assert any(f"| {ABROAD} |" in line for line in report_lines(report))
    assert (
        "groups"
        not in evaluate_model(model, processor, {"single_cell": rows}, progress=False, bootstrap=0)["single_cell"]
    )


def test_kinds_and_types_are_those_of_cells_that_can_be(model, processor, rows):
    figures = evaluate_model(model, processor, {"single_cell": rows}, progress=False, bootstrap=0)["single_cell"]
    with torch.inference_mode():
        pixels = processor.image_processor([row["image"] for row in rows], task="single_cell")["pixel_values"]
        logits = model(pixel_values=pixels, task="single_cell").logits
    true = np.array([LABELS.index(row["label"]) for row in rows])
    found = logits.argmax(-1).numpy()
    assert figures["kinds"] == {"accuracy": pytest.approx(((found < 2) == (true < 2)).mean()), "cells": 12}
    white = true < 2
    # A red cell's shape cannot be answered.
    types = logits[:, :2].argmax(-1).numpy()
    assert figures["types"]["accuracy"] == pytest.approx((types == true)[white].mean())
    assert figures["types"]["among"] == LABELS[:2] and figures["types"]["cells"] == white.sum()


def test_crops_are_framed_as_predict_frames_them(model, processor, rows, tmp_path):
    pixels = np.full((80, 80, 3), (238, 230, 228), np.uint8)
    pixels[15:60, 20:65] = (96, 52, 140)
    Image.fromarray(pixels).save(tmp_path / "cell.png")
    row = rows[0] | {"image": str(tmp_path / "cell.png"), "file_name": "cell.png"}
    framing = copy.deepcopy(model)
    framing.config.trained.crop_frame = {"nucleus": [0.3], "mean": [200, 180, 180], "deviation": [40, 40, 20]}
    seen = []
    framing.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True
    )
    evaluate_model(framing, processor, {"single_cell": [row]}, progress=False, bootstrap=0)
    views = views_of(Image.fromarray(pixels), CropFrame.of_checkpoint(framing.config.trained.crop_frame))[0]
    expected = [processor.image_processor([view], task="single_cell")["pixel_values"] for view in views]
    for view in expected:
        assert any(torch.equal(view, batch) for batch in seen)


def test_strange_images_are_told_and_that_is_measured(model, processor, rows):
    home = [row for row in rows if row["dataset"] != "far"]
    reference = fit_reference(model, processor, {"single_cell": home}, {"single_cell": home}, progress=False)
    options = {"progress": False, "bootstrap": 0, "reference": reference}
    found = evaluate_model(model, processor, {"single_cell": rows}, batch_size=5, home=["a", "b"], **options)
    unlike = found["single_cell"]["out_of_distribution"]
    assert unlike["auc"] == 1.0 and unlike["warned_at_1_percent"] == 1.0
    assert unlike["warned"]["far"] == 1.0 and unlike["warned"]["a"] <= 0.25
    assert unlike_text(unlike).startswith("AUC 1.000, 100.0 % of images from elsewhere at 1 % false alarms; warned of")
    alone = evaluate_model(model, processor, {"single_cell": home}, home=["a", "b"], **options)
    assert "auc" not in alone["single_cell"]["out_of_distribution"]


def test_the_area_is_how_often_a_strange_image_is_further_away(monkeypatch):
    distances = Distances(None, None)
    distances._found = [np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0])]
    rows = [{"dataset": name} for name in ("a", "a", "a", "far", "far")]
    found = distances.figures(rows, ["a"])
    # Of six pairs 2 is further than 1, equal to 2, and 4 further than all.
    assert found["auc"] == pytest.approx((1 + 0.5 + 3) / 6)
    assert found["warned"] == {"a": pytest.approx(2 / 3), "far": 1.0}
    assert found["warned_at_1_percent"] == 0.5 and sources.FALSE_ALARMS == 0.01
