"""What the report says beside the figures: intervals, data sets, counts; and that the batch size does not enter it."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import lively, very_tiny_config

from unihema.modeling_unihema.modeling_unihema import UniHemaForMultiTask
from unihema.processing_unihema.processing_unihema import UniHemaProcessor
from unihema.training.evaluation import bootstrap_intervals, calibrate_thresholds, evaluate_model, write_report
from unihema.training.evaluation.measured import Measured


TASKS = ("detection", "segmentation", "single_cell", "question_answering", "cloze")
SIZES = [(96, 64), (64, 96), (64, 64), (96, 96), (80, 56), (96, 72), (56, 64), (64, 96)]
CLASSES = ["red blood cell", "platelet", "neutrophil"]


@pytest.fixture(scope="module")
def processor() -> UniHemaProcessor:
    return UniHemaProcessor.from_default(**{task: {"longest_edge": 64} for task in TASKS})


@pytest.fixture(scope="module")
def model(processor) -> UniHemaForMultiTask:
    torch.manual_seed(0)
    text = {**very_tiny_config().text_config.to_dict(), "vocab_size": len(processor.tokenizer)}
    return lively(UniHemaForMultiTask(very_tiny_config(text_config=text, fusion_queries=64))).eval()


def cells_near_the_models_own(model, processor, path: str, names: list[str], rng) -> dict:
    """Some of the cells that a model finds, moved a little: so that there is something to be right about."""
    with torch.no_grad():
        output = model(task="detection", **processor(images=path, task="detection"))
    size = Image.open(path).size
    found = processor.post_process_object_detection(output, threshold=0.0, target_sizes=[size[::-1]])[0]
    boxes = found["boxes"][:12:2].numpy() + rng.normal(0, 0.5, (6, 4))
    labels = [CLASSES[label] for label in found["labels"][:12:2].tolist()]
    return {
        "bbox": np.concatenate((boxes[:, :2], boxes[:, 2:] - boxes[:, :2]), 1).clip(1).tolist(),
        "category": [label if label in names else names[n % len(names)] for n, label in enumerate(labels)],
        "morphology": [{"vacuoles": "absent", "shape": ["round", "oval"][n % 2]} for n in range(6)],
    }


def first_word(model, processor, path: str, text: str, task: str) -> str:
    """How the model's own answer begins: so that there is something to be right about."""
    tokens = model.generate(**processor(images=path, text=text, task=task), max_new_tokens=6)
    return processor.decode_answers(tokens)[0].split()[0]


@pytest.fixture(scope="module")
def rows(model, processor, tmp_path_factory) -> dict[str, list[dict]]:
    """Images of several sizes, so that a batch has padding; of two data sets, the second of which boxes no platelets."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    rows: dict[str, list[dict]] = {task: [] for task in TASKS}
    for number, (width, height) in enumerate(SIZES):
        path = str(folder / f"{number}.png")
        pixels = rng.integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((width, height)).save(path)
        second = number >= 5
        common = {"image": path, "file_name": path, "dataset": "second" if second else "first"}
        names = ["red blood cell", "neutrophil"] if second else CLASSES
        objects = cells_near_the_models_own(model, processor, path, names, rng)
        rows["detection"].append({**common, "task": "detection", "objects": objects, "annotated_classes": names})
        mask = (rng.random((height, width)) < 0.5).astype(np.uint8)
        rows["segmentation"].append({**common, "task": "segmentation", "mask": mask, "prompt": "white blood cell"})
        label = "lymphocyte" if number % 2 and not second else "neutrophil"
        rows["single_cell"].append({**common, "task": "single_cell", "label": label})
        for question in range(1 + number % 3):
            asked = ["What is it?", "Is it large?", "Is it round?"][question]
            answer = f"{first_word(model, processor, path, asked, 'question_answering')} cell"
            row = {**common, "task": "question_answering", "question": asked, "answer": answer}
            rows["question_answering"].append(row)
            masked = "The <extra_id_0> is round."
            completed = masked.replace("<extra_id_0>", first_word(model, processor, path, masked, "cloze"))
            rows["cloze"].append({**common, "task": "cloze", "masked": masked, "completed": completed})
    return rows


def assert_same(first, second, path: str = "") -> None:
    """Reports alike but for rounding; what is counted, and text, is exactly the same."""
    if isinstance(first, dict):
        assert first.keys() == second.keys(), path
        for name in first:
            assert_same(first[name], second[name], f"{path} / {name}")
    elif isinstance(first, list):
        for number, (one, other) in enumerate(zip(first, second, strict=True)):
            assert_same(one, other, f"{path} / {number}")
    elif isinstance(first, float):
        assert first == pytest.approx(second, abs=1e-4), path
    else:
        assert first == second, path


@pytest.fixture(scope="module")
def report(model, processor, rows) -> dict:
    model.config.trained.detection_thresholds = calibrate_thresholds(
        model, processor, rows["detection"], progress=False
    )
    return evaluate_model(
        model, processor, rows, 3, progress=False, generate_kwargs={"max_new_tokens": 6}, bootstrap=200
    )


@pytest.mark.parametrize("task", TASKS)
def test_the_batch_size_does_not_matter(model, processor, rows, report, task):
    for batch_size in (1, 8):
        other = evaluate_model(
            model,
            processor,
            {task: rows[task]},
            batch_size,
            progress=False,
            generate_kwargs={"max_new_tokens": 6},
            bootstrap=200,
        )
        assert_same(report[task], other[task])
    # Something is right and something wrong, or any batch size would give the same.
    figure = {"detection": "mAP50", "segmentation": "dice", "single_cell": "accuracy"}.get(task, "rougeL")
    assert 0 < report[task][figure] < 1


def test_detection_is_asked_without_a_prompt_or_for_the_classes_of_each_data_set(model, rows):
    asked = UniHemaProcessor.from_default(**{task: {"longest_edge": 64} for task in TASKS})
    asked.default_prompts["detection"] = "red blood cell, neutrophil"
    second = {"detection": [row for row in rows["detection"] if row["dataset"] == "second"]}
    plain = UniHemaProcessor.from_default(**{task: {"longest_edge": 64} for task in TASKS})
    options = {"progress": False, "bootstrap": 0}
    named = evaluate_model(model, plain, second, name_classes=True, **options)
    assert named == evaluate_model(model, asked, second, **options)
    assert named != evaluate_model(model, plain, second, **options)


def test_every_main_figure_has_an_interval_around_it(report):
    expected = {
        "detection": {"mAP", "mAP50", "mAP75", "morphology accuracy", "morphology macro_f1"},
        "segmentation": {"dice", "iou", "dice_pooled", "iou_pooled"},
        "single_cell": {"accuracy", "macro_f1", "weighted_f1"},
        "question_answering": {"exact_match", "bleu1", "bleu2", "bleu3", "bleu4", "rougeL"},
        "cloze": {"exact_match", "bleu1", "bleu2", "bleu3", "bleu4", "rougeL", "blank_accuracy"},
    }
    for task, names in expected.items():
        intervals = report[task]["intervals"]
        assert names <= set(intervals)
        for name in names:
            value = report[task]["morphology"][name.split()[1]] if " " in name else report[task][name]
            low, high = intervals[name]
            assert low <= value <= high
        assert report[task]["bootstrap"] == {"draws": 200, "level": 0.95, "seed": 0, "resampled": "images"}
        assert report[task]["images"] == len(SIZES)
    assert report["question_answering"]["rows"] == 15


def test_each_data_set_has_its_own_figures(model, processor, rows, report):
    for task in TASKS:
        parts = report[task]["datasets"]
        assert list(parts) == ["first", "second"]
        assert [part["images"] for part in parts.values()] == [5, 3]
        for name, part in parts.items():
            own = [row for row in rows[task] if row["dataset"] == name]
            alone = evaluate_model(
                model, processor, {task: own}, progress=False, generate_kwargs={"max_new_tokens": 6}, bootstrap=200
            )[task]
            assert "datasets" not in alone
            for figure, value in part.items():
                if isinstance(value, float):
                    assert value == pytest.approx(alone[figure], abs=1e-4), (task, name, figure)
    second = report["detection"]["datasets"]["second"]
    assert set(second["per_class"]) == {"red blood cell", "neutrophil"}
    assert "platelet" not in second["at_threshold"]
    assert set(report["single_cell"]["datasets"]["second"]["per_class"]) == {"neutrophil"}


def test_a_class_that_is_not_annotated_takes_no_query(model, processor, rows, monkeypatch):
    """A data set of neutrophils alone: what looks more like a platelet is still measured as the neutrophil asked for."""
    one_class = [
        {
            **row,
            "annotated_classes": ["neutrophil"],
            "objects": {"bbox": row["objects"]["bbox"][:1], "category": ["neutrophil"], "morphology": [{}]},
        }
        for row in rows["detection"]
    ]
    monkeypatch.setattr(model.config.trained, "detection_thresholds", {"neutrophil": 0.005})
    shown = evaluate_model(model, processor, {"detection": one_class}, progress=False, bootstrap=0)["detection"]
    assert set(shown["at_threshold"]) == {"neutrophil"}
    with torch.no_grad():
        bias = model.detection_head.class_head.bias
        before = bias.clone()
        bias[1] += 20
        again = evaluate_model(model, processor, {"detection": one_class}, progress=False, bootstrap=0)["detection"]
        bias.copy_(before)
    assert again["at_threshold"]["neutrophil"]["predicted"] == shown["at_threshold"]["neutrophil"]["predicted"] > 0
    assert shown["intervals"] == {} and "bootstrap" not in shown


class _Coin(Measured):
    """Each row is right or wrong; the figure is their mean."""

    def __init__(self, right: list[int], images: list[str]):
        super().__init__(None, None)
        for value, image in zip(right, images):
            self.keep({"image": image, "dataset": "coins"}, value)

    def add(self, batch, rows):
        raise NotImplementedError("coins are kept at once")

    def figures(self, part=False):
        return {"mean": float(np.mean(self.records))}

    def resampler(self):
        right = np.array(self.records)
        return lambda weights: {"mean": float(np.average(right, weights=weights)), "never": None}


def test_intervals_are_those_of_the_mean_of_independent_images():
    right = ([1] * 60) + ([0] * 40)
    coin = _Coin(right, [str(n) for n in range(100)])
    low, high = bootstrap_intervals(coin, draws=4000)["mean"]
    # The mean of 100 has a standard error of 0.049; the tolerance is several standard errors of the percentile.
    assert (low, high) == pytest.approx((0.6 - 1.96 * 0.049, 0.6 + 1.96 * 0.049), abs=0.012)
    assert bootstrap_intervals(coin, draws=50) == bootstrap_intervals(coin, draws=50)
    assert bootstrap_intervals(coin, draws=50) != bootstrap_intervals(coin, draws=50, seed=1)
    assert "never" not in bootstrap_intervals(coin, draws=50)


def test_the_questions_of_an_image_are_drawn_together():
    """100 questions of ten images, alike within each: as uncertain as ten, not as a hundred."""
    right = [1, 0] * 5
    few = bootstrap_intervals(_Coin(right, [str(n) for n in range(10)]), draws=2000)["mean"]
    many = bootstrap_intervals(_Coin(right * 10, [str(n) for n in range(10)] * 10), draws=2000)["mean"]
    assert many == pytest.approx(few, abs=1e-12)
    assert bootstrap_intervals(_Coin([1, 0], ["one", "one"])) == {}


def test_the_files_of_a_report_of_two_data_sets(report, tmp_path):
    write_report(report, tmp_path)
    saved = json.loads((tmp_path / "metrics.json").read_text())
    assert saved["segmentation"]["datasets"]["second"]["images"] == 3
    table = (tmp_path / "metrics.md").read_text().splitlines()
    dice = report["segmentation"]["datasets"]["second"]
    low, high = dice["intervals"]["dice"]
    assert f"| segmentation | second | 3 | 3 | dice | {dice['dice']:.4f} | {low:.4f} to {high:.4f} |" in table
    morphology = report["detection"]["morphology"]["macro_f1"]
    assert any(line.startswith(f"| detection | morphology / macro_f1 | {morphology:.4f} | 0.") for line in table)
    assert any("95%, percentiles of 200 resamples of its images (seed 0)" in line for line in table)
