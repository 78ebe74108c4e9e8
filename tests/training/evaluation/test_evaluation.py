"""The evaluation of all tasks, with models whose answers are known."""

import json

import numpy as np
import pytest
import torch
from data_folders import write_photograph
from PIL import Image
from tiny_checkpoint import save_lively
from tiny_models import very_tiny_config

from unihema import Analyzer
from unihema.loading import load_model
from unihema.modeling_unihema.modeling_unihema import UniHemaForMultiTask
from unihema.modeling_unihema.outputs import (
    UniHemaClassificationOutput,
    UniHemaDetectionOutput,
    UniHemaSegmentationOutput,
)
from unihema.processing_unihema.processing_unihema import UniHemaProcessor
from unihema.training.evaluation import (
    calibrate_thresholds,
    draw_rows,
    evaluate_model,
    exchange_images,
    headline,
    write_report,
)


CELL, PLATELET = [12.0, 8.0, 20.0, 16.0], [60.0, 30.0, 10.0, 8.0]
SIZE = (96, 64)


@pytest.fixture
def processor() -> UniHemaProcessor:
    sizes = {task: {"longest_edge": 64} for task in ("detection", "segmentation", "single_cell", "question_answering")}
    return UniHemaProcessor.from_default(**sizes, cloze={"longest_edge": 64})


@pytest.fixture
def images(tmp_path) -> list[str]:
    """Three fields of 96x64 pixels, told apart by their brightness."""
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for number, path in enumerate(paths):
        Image.new("RGB", SIZE, (80 * number + 20,) * 3).save(path)
    return [str(path) for path in paths]


def row(image: str, task: str, **fields) -> dict:
    return {"image": image, "file_name": image, "dataset": "test", "task": task, **fields}


def detection_rows(images: list[str]) -> list[dict]:
    objects = {
        "bbox": [CELL, PLATELET],
        "category": ["neutrophil", "platelet"],
        "morphology": [{"vacuoles": "prominent", "shape": "oval"}, {}],
    }
    return [row(image, "detection", objects=objects, annotated_classes=["platelet", "neutrophil"]) for image in images]


class Oracle(torch.nn.Module):
    """Answers as the test decides, through the model's own interface."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, answer):
        super().__init__()
        self.config = very_tiny_config()
        self.answer = answer

    def forward(self, task, **inputs):
        assert not self.training
        return self.answer(**inputs)

    def generate(self, input_ids, pixel_values, **options):
        assert not torch.is_grad_enabled()
        return self.answer(input_ids=input_ids, pixel_values=pixel_values)


def cells(pixel_values, **inputs) -> UniHemaDetectionOutput:
    """Both cells, a copy of the neutrophil that overlaps it, and a red cell that no one annotated."""
    boxes = torch.tensor([CELL, PLATELET, CELL, [0, 0, 9, 9]]) / torch.tensor([*SIZE, *SIZE])
    boxes[:, :2] += boxes[:, 2:] / 2
    logits = torch.full((4, 3), -9.0)
    logits[[0, 1, 2, 3], [2, 1, 2, 0]] = torch.tensor([3.0, 1.0, 0.5, 4.0])
    morphology = torch.zeros(4, 5)
    morphology[0] = torch.tensor([-1.0, 1.0, 0.0, 0.0, 1.0])
    batch = len(pixel_values)
    return UniHemaDetectionOutput(
        logits=logits.repeat(batch, 1, 1),
        pred_boxes=boxes.repeat(batch, 1, 1),
        pred_morphology=morphology.repeat(batch, 1, 1),
    )


def test_detection_is_measured_in_pixels_of_the_original(images, processor):
    model = Oracle(cells)
    figures = evaluate_model(model, processor, {"detection": detection_rows(images)}, batch_size=2, progress=False)
    figures = figures["detection"]
    assert figures["rows"] == 3
    # The copy is a false positive that ranks below the hit; the red cell does not count.
    assert figures["mAP50"] == pytest.approx(1.0)
    assert figures["per_class"]["red blood cell"]["AP50"] is None
    # As shown: the overlapping copy is removed, the threshold is the default.
    assert figures["at_threshold"]["neutrophil"]["precision"] == 1.0
    assert figures["at_threshold"]["neutrophil"]["predicted"] == 3
    assert figures["at_threshold"]["platelet"]["recall"] == 1.0
    # Vacuoles are right, shape is read as irregular; the platelet has no attributes and does not count.
    assert figures["morphology"]["per_attribute"]["vacuoles"]["accuracy"] == 1.0
    assert figures["morphology"]["per_attribute"]["shape"]["accuracy"] == 0.0
    assert figures["morphology"]["per_attribute"]["shape"]["cells"] == 3
    assert figures["morphology"]["matched"] == 1.0
    assert model.training


def test_a_crop_counts_for_its_attributes_alone(images, processor):
    """Its cell has no box: the best-scoring cell found speaks for it, wherever it lies."""
    crops = [
        row(
            image,
            "detection",
            objects={
                "bbox": [[0.0, 0.0, *SIZE]],
                "category": ["neutrophil"],
                "morphology": [{"vacuoles": "prominent"}],
            },
            annotated_classes=["neutrophil"],
            from_attributes=True,
        )
        for image in images
    ]
    alone = evaluate_model(Oracle(cells), processor, {"detection": crops}, progress=False)["detection"]
    assert alone["mAP50"] is None and alone["at_threshold"] == {}
    assert alone["morphology"]["per_attribute"]["vacuoles"] == {"accuracy": 1.0, "macro_f1": 1.0, "cells": 3}
    assert alone["morphology"]["matched"] == 1.0
    fields = detection_rows(images)
    together = evaluate_model(Oracle(cells), processor, {"detection": fields + crops}, progress=False)["detection"]
    apart = evaluate_model(Oracle(cells), processor, {"detection": fields}, progress=False)["detection"]
    for figure in ("mAP", "mAP50", "per_class", "at_threshold"):
        assert together[figure] == apart[figure]
    assert together["morphology"]["per_attribute"]["vacuoles"]["cells"] == 6


def test_thresholds_are_calibrated_for_each_class(images, processor):
    model = Oracle(cells)
    rows = detection_rows(images)
    thresholds = calibrate_thresholds(model, processor, rows, progress=False)
    assert set(thresholds) == {"neutrophil", "platelet"}
    # Half way between the last right score and nothing.
    assert thresholds["platelet"] == pytest.approx(torch.tensor(1.0).sigmoid().item() / 2, abs=0.01)
    report = evaluate_model(model, processor, {"detection": rows}, progress=False, calibrate=True)
    assert model.config.trained.detection_thresholds == thresholds
    assert report["detection"]["at_threshold"]["platelet"]["threshold"] == thresholds["platelet"]
    assert model.config.trained.unfound_classes == []
    # A class that is there and never found is not answered unasked.
    for each in rows:
        each["objects"]["category"] = ["red blood cell", "platelet"]
        each["annotated_classes"] = ["platelet", "neutrophil", "red blood cell"]
    evaluate_model(model, processor, {"detection": rows}, progress=False, calibrate=True)
    assert model.config.trained.unfound_classes == ["red blood cell"]
    rows = detection_rows(images)
    model.config.trained.detection_thresholds = {"platelet": 0.9}
    report = evaluate_model(model, processor, {"detection": rows}, progress=False)
    assert report["detection"]["at_threshold"]["platelet"]["recall"] == 0.0


def test_figures_at_thresholds_that_were_just_fitted_are_those_that_are_measured_again(tmp_path):
    images = [str(write_photograph(tmp_path / f"{seed}.png", seed)) for seed in range(3)]
    names = {0: "WBC", 1: "neutrophil", 2: "lymphocyte", 3: "RBC"}
    tree = {"neutrophil": "WBC", "lymphocyte": "WBC"}
    labels = {"id2label": names, "label2id": {name: index for index, name in names.items()}, "label_parents": tree}
    model, processor = load_model(save_lively(tmp_path / "tree", 7, **labels), "cpu")
    model.config.trained.detection_thresholds = {}
    with torch.no_grad():
        # Scores about the usual threshold.
        model.detection_head.class_head.bias.add_(1.5)
    analyzer, rng = Analyzer(model, processor), np.random.default_rng(0)
    rows = []
    for image in images:
        cells = [cell for cell in analyzer(image, "detection", threshold=0.0, tiles="off").cells if rng.random() < 0.7]
        boxes = [[x0, y0, x1 - x0, y1 - y0] for x0, y0, x1, y1 in (cell.box for cell in cells)]
        objects = {"bbox": boxes, "category": ["neutrophil"] * len(boxes)}
        rows.append(row(image, "detection", objects=objects, annotated_classes=None))

    def measured(**options):
        report = evaluate_model(model, processor, {"detection": rows}, progress=False, bootstrap=0, **options)
        return report["detection"]["at_threshold"]

    fitted = measured(calibrate=True)
    thresholds = dict(model.config.trained.detection_thresholds)
    assert fitted["neutrophil"]["recall"] > 0.3 and measured() == fitted
    assert measured(calibrate=True) == fitted and model.config.trained.detection_thresholds == thresholds
    # What `predict` shows: no class that is known not to be found.
    for unfound in ([], ["neutrophil"]):
        model.config.trained.unfound_classes = unfound
        shown = [cell.label for image in images for cell in analyzer(image, "detection", tiles="off").cells]
        assert {name: of["predicted"] for name, of in measured().items() if name in ("neutrophil", "RBC")} == {
            name: shown.count(name) for name in measured() if name in ("neutrophil", "RBC")
        }


def test_dice_at_the_size_of_the_image(images, processor):
    def half(pixel_values, **inputs):
        logits = torch.full((len(pixel_values), *pixel_values.shape[-2:]), -5.0)
        logits[:, :, : 64 // 2] = 5.0
        return UniHemaSegmentationOutput(mask_logits=logits)

    mask = np.zeros((64, 96), dtype=np.uint8)
    mask[:, :48] = 1
    rows = [row(images[0], "segmentation", mask=mask, prompt="cell"), row(images[1], "segmentation", mask=1 - mask)]
    rows[1]["prompt"] = "cell"
    figures = evaluate_model(Oracle(half), processor, {"segmentation": rows}, progress=False)["segmentation"]
    assert figures["dice"] == pytest.approx(0.5, abs=0.01)
    assert figures["images"] == 2


def test_single_cells(images, processor):
    def brightest_is_a_neutrophil(pixel_values, **inputs):
        bright = pixel_values.mean((1, 2, 3)) > 0
        return UniHemaClassificationOutput(logits=torch.stack((bright, ~bright), 1).float())

    rows = [row(images[0], "single_cell", label="lymphocyte"), row(images[2], "single_cell", label="neutrophil")]
    rows += [row(images[2], "single_cell", label="lymphocyte")]
    figures = evaluate_model(Oracle(brightest_is_a_neutrophil), processor, {"single_cell": rows}, progress=False)
    assert figures["single_cell"]["accuracy"] == pytest.approx(2 / 3)
    assert figures["single_cell"]["confusion"] == [[1, 0], [1, 1]]


def questions(images: list[str]) -> list[dict]:
    answers = ["dark", "grey", "bright"]
    asked = [("How bright is it?", answers), ("What is it?", ["a smear"] * 3)]
    return [
        row(image, "question_answering", question=question, answer=given[number])
        for number, image in enumerate(images)
        for question, given in asked[: 2 if number else 1]
    ]


def looks_at(processor):
    """Says how bright the image of each question is, or that it is a smear."""

    def answer(input_ids, pixel_values):
        texts = []
        each = len(input_ids) // len(pixel_values)
        for number, tokens in enumerate(input_ids):
            level = pixel_values[number // each].mean()
            brightness = "dark" if level < -1 else "grey" if level < 0.5 else "bright"
            asked = processor.tokenizer.decode(tokens, skip_special_tokens=True)
            texts.append(brightness if "bright" in asked else "a smear")
        return processor.tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]

    return answer


def test_questions_and_the_image_blind_control(images, processor):
    rows = questions(images)
    model = Oracle(looks_at(processor))
    seeing = evaluate_model(model, processor, {"question_answering": rows}, progress=False)["question_answering"]
    assert seeing["exact_match"] == 1.0
    assert seeing["texts"] == 5
    assert seeing["per_question"]["How bright is it?"] == {"exact_match": 1.0, "texts": 3}
    blind = evaluate_model(
        model, processor, {"question_answering": rows, "detection": []}, progress=False, shuffle_images=True
    )
    assert set(blind) == {"question_answering"}
    assert blind["question_answering"]["image_blind"]
    assert blind["question_answering"]["per_question"]["How bright is it?"]["exact_match"] == 0.0
    assert blind["question_answering"]["per_question"]["What is it?"]["exact_match"] == 1.0


def test_every_image_is_exchanged(images):
    rows = questions(images)
    for seed in range(5):
        exchanged = exchange_images(rows, seed)
        original = {(r["file_name"], r["question"]): r["image"] for r in rows}
        assert len(exchanged) == len(rows)
        assert all(original[r["file_name"], r["question"]] != r["image"] for r in exchanged)
    assert exchange_images(rows, 1) == exchange_images(rows, 1)
    with pytest.raises(ValueError, match="at least two images"):
        exchange_images(rows[:1], 0)


def test_blanks_of_cloze_sentences(images, processor):
    rows = [
        row(images[0], "cloze", masked="This cell is <extra_id_0>.", completed="This cell is dark."),
        row(images[2], "cloze", masked="This cell is <extra_id_0>.", completed="This cell is bright."),
    ]

    def always_dark(input_ids, pixel_values):
        texts = ["This cell is dark."] * len(input_ids)
        return processor.tokenizer(texts, return_tensors="pt")["input_ids"]

    figures = evaluate_model(Oracle(always_dark), processor, {"cloze": rows}, progress=False)["cloze"]
    assert figures["exact_match"] == figures["blank_accuracy"] == 0.5


def test_a_draw_keeps_the_questions_of_an_image_together(images):
    rows = questions(images)
    drawn = draw_rows(rows, 2, seed=0)
    assert drawn == draw_rows(rows, 2, seed=0)
    for image in {r["image"] for r in drawn}:
        assert [r for r in drawn if r["image"] == image] == [r for r in rows if r["image"] == image]
    assert draw_rows(rows, None, 0) == draw_rows(rows, 99, 0) == rows


def test_a_real_model_on_all_tasks(images, processor):
    text = {**very_tiny_config().text_config.to_dict(), "vocab_size": len(processor.tokenizer)}
    model = UniHemaForMultiTask(very_tiny_config(text_config=text, fusion_queries=64))
    rows = {
        "detection": detection_rows(images),
        "segmentation": [row(images[0], "segmentation", mask=np.ones((64, 96), np.uint8), prompt="cell")],
        "single_cell": [row(images[0], "single_cell", label="neutrophil")],
        "question_answering": questions(images),
    }
    first = evaluate_model(model, processor, rows, progress=False, generate_kwargs={"max_new_tokens": 4})
    assert set(first) == set(rows)
    assert first == evaluate_model(model, processor, rows, progress=False, generate_kwargs={"max_new_tokens": 4})
    assert model.training


def test_report_files(tmp_path):
    report = {
        "detection": {"mAP50": 0.5, "per_class": {"platelet": {"AP50": np.float64(0.25), "cells": 3}}},
        "single_cell": {"macro_f1": None, "confusion": [[1]]},
    }
    write_report(report, tmp_path, name="val")
    assert json.loads((tmp_path / "val.json").read_text())["detection"]["per_class"]["platelet"]["AP50"] == 0.25
    table = (tmp_path / "val.md").read_text()
    assert "| detection | per_class / platelet / AP50 | 0.2500 |" in table
    assert "confusion" not in table
    assert headline(report) == (0.5, "detection mAP50 0.500, single_cell macro_f1 none")


def test_a_typed_cell_above_its_threshold_is_one_of_the_coarser_class(images, processor):
    """As results show it: whatever the threshold of the coarser class is."""
    model = Oracle(cells)
    model.config.label_parents = {"neutrophil": "platelet"}
    model.config.trained.detection_thresholds = {"neutrophil": 0.3, "platelet": 0.99}
    rows = [
        row(image, "detection", objects={"bbox": [CELL], "category": ["neutrophil"]}, annotated_classes=names)
        for image in images
        for names in (["neutrophil", "platelet"],)
    ]
    report = evaluate_model(model, processor, {"detection": rows}, progress=False)["detection"]["at_threshold"]
    assert report["platelet"]["recall"] == 1.0 and report["platelet"]["predicted"] == 3
    assert report["platelet"]["threshold"] == 0.99 and report["platelet"]["count_error"] == 0
