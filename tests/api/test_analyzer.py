"""One object that analyses: any image, several checkpoints, threads and processes, prepared or not."""

import copy
import json
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from same_results import assert_same
from tiny_checkpoint import save_lively, save_lively_adapter, save_tiny_checkpoint
from torch import nn

import unihema
from unihema import Analyzer, CheckpointError, QueryCapWarning, SmearResult, UniHemaError, prepare_for_inference
from unihema.errors import PreparedModelError
from unihema.loading import choose_device, load_model
from unihema.modeling_unihema.configuration_unihema import TrainingResults


pytestmark = pytest.mark.filterwarnings("ignore::unihema.analyzer.QueryCapWarning")
ALL = {"tasks": ["detection", "segmentation", "single_cell"], "questions": ["What is it?", "The cell is ___."]}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_lively(tmp_path_factory.mktemp("models") / "first", 1)


@pytest.fixture(scope="module")
def other_checkpoint(tmp_path_factory):
    names = {0: "erythrocyte", 1: "parasite"}
    return save_lively(tmp_path_factory.mktemp("models") / "second", 2, id2label=names)


@pytest.fixture(scope="module")
def loaded(checkpoint):
    """Shared by tests that change nothing."""
    return Analyzer.from_pretrained(checkpoint, device="cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Finds a cell with every query."""
    return Analyzer.from_pretrained(save_tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny"), device="cpu")


def noise(seed: int, size: tuple[int, int] = (60, 40)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1] // 4, size[0] // 4, 3), np.uint8)
    return Image.fromarray(pixels).resize(size)


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (640, 480)])
def test_results_are_in_pixels_of_the_image_and_drawn(tiny, size):
    image = Image.effect_noise(size, 60).convert("RGB")
    result = tiny(image, tasks=["detection", "segmentation", "single_cell"])
    assert (result.width, result.height) == size and result.mask.shape == size[::-1]
    boxes = np.array([cell.box for cell in result.cells])
    assert (boxes >= 0).all() and (boxes <= [*size, *size]).all()
    assert [cell.id for cell in result.cells] == list(range(1, len(boxes) + 1))
    assert result.single_cell["label"] in ("neutrophil", "lymphocyte")
    assert result.overlay(image).width > size[0]


def test_a_huge_file_keeps_its_own_coordinates(tiny, tmp_path):
    path = tmp_path / "slide.png"
    Image.new("L", (12000, 6000), 200).save(path)  # 72 megapixels: reduced on opening
    result = tiny(path)
    assert (result.width, result.height) == (12000, 6000)
    assert max(cell.box[2] for cell in result.cells) > 6000
    assert result.mask.shape[1] < 12000 and result.mask.shape[1] == pytest.approx(2 * result.mask.shape[0], abs=2)
    assert max(result.overlay(Image.open(path)).size) <= 2048 + 700


def test_a_photo_on_its_side_is_turned_upright(tiny, tmp_path):
    path = tmp_path / "phone.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.effect_noise((60, 40), 50).save(path, exif=exif)
    result = tiny(path)
    assert (result.width, result.height, result.mask.shape) == (40, 60, (60, 40))


def test_as_many_cells_as_queries_is_said(tiny):
    image = Image.effect_noise((60, 40), 50)
    with pytest.warns(QueryCapWarning, match="20 of 20 queries") as warned:
        result = tiny(image, tasks=["detection"], threshold=0.0)
    assert "too low" in result.warnings[0] and warned[0].filename == __file__
    assert tiny(image, tasks=["detection"], threshold=1.0).warnings == []


def test_a_threshold_replaces_the_calibrated_ones_and_is_recorded(tiny):
    image = Image.effect_noise((60, 40), 50)
    some = tiny(image, tasks=["detection"])
    score = some.cells[len(some.cells) // 2].score
    fewer = tiny(image, tasks=["detection"], threshold=score)
    assert {cell.box for cell in fewer.cells} == {cell.box for cell in some.cells if cell.score > score}
    assert set(fewer.provenance["detection_thresholds"].values()) == {score}
    assert list(fewer.counts) == ["red blood cell", "platelet", "neutrophil"]


def test_a_prompt_that_names_classes_limits_the_answer_to_them(loaded):
    image = noise(0)
    result = loaded(image, ["detection", "segmentation"], prompt=["platelet", "neutrophil"], threshold=0.0)
    assert list(result.counts) == ["platelet", "neutrophil"] and result.mask_label == "platelet, neutrophil"
    assert result.provenance["prompt"] == ["platelet", "neutrophil"]
    # Another text, another answer.
    other = loaded(image, ["detection"], prompt="malaria", threshold=0.0)
    assert list(other.counts) == ["red blood cell", "platelet", "neutrophil"]
    assert {cell.score for cell in other.cells} != {cell.score for cell in loaded(image, ["detection"]).cells}


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (
            "red blood cel",
            ["'red blood cel', which is no class of this checkpoint, so all classes are answered. Did you mean"],
        ),
        (["platelet", "zebra"], ["'zebra', which is no class of this checkpoint, so all classes are answered."]),
        ("platelet, neutrophyl", ["'neutrophyl'"]),
        ("Platelets, neutrophils", []),
        ("malaria", []),
        (None, []),
    ],
)
def test_a_prompt_that_misspells_a_class_is_said(loaded, prompt, said):
    found = [text for text in loaded(noise(3), ["detection"], prompt=prompt).warnings if "no class" in text]
    assert len(found) == len(said) and all(words in text for words, text in zip(said, found, strict=True))


def test_answers_beside_cells_name_what_supports_them(loaded):
    asked = ["How many cells are there?", "What is it?"]
    result = loaded(noise(0), ["detection", "single_cell"], questions=asked, tiles="off")
    counted, written = result.answers
    answers = loaded.ask(noise(0), asked)
    assert counted["answer"] == str(len(result.cells)) == str(answers[0]) and counted["source"] == "cells"
    assert counted["cells"] == [cell.id for cell in result.cells] and counted["counts"] == answers[0].counts
    assert written["answer"] == written["text"] == str(answers[1]) and written["source"] == "text"
    assert SmearResult.from_dict(result.to_dict()).answers == result.answers
    # Where only some cells were looked for they say nothing of how many there are.
    (alone,) = loaded(noise(0), ["detection"], prompt="neutrophil", questions=asked[:1]).answers
    assert set(alone) == {"question", "answer"}


def test_one_question_has_one_answer_and_several_have_a_list(loaded):
    questions = ["What is it?", "The cell is ___."]
    answers = loaded.ask(noise(0), questions)
    assert len(answers) == 2 and all(answer.source == "text" for answer in answers) and len(set(map(str, answers))) == 2
    assert loaded.ask(noise(0), questions[0]) == answers[0]
    assert loaded.ask(noise(0), questions[1:]) == answers[1:]
    result = loaded(noise(0), tasks=(), questions=questions)
    assert result.answers == [{"question": q, "answer": str(a)} for q, a in zip(questions, answers)]
    assert result.cells == [] and result.mask is None
    # A text is one question, not one for each of its letters.
    (told,) = loaded(noise(0), tasks="detection", questions=questions[0]).answers
    assert told["answer"] == result.answers[0]["answer"]
    with pytest.raises(UniHemaError, match="the limit is 32"):
        loaded.ask(noise(0), "why " * 100)


def test_a_question_that_is_called_like_a_task_is_a_question(loaded):
    both = loaded(noise(0), ["detection", "segmentation"], questions=["detection", "segmentation"])
    assert_same(both, loaded(noise(0), ["detection", "segmentation"], questions=["detection", "segmentation"]))
    alone = loaded(noise(0), ["detection", "segmentation"])
    assert [cell.score for cell in both.cells] == [cell.score for cell in alone.cells]
    np.testing.assert_array_equal(both.mask, alone.mask)


def test_all_that_is_asked_of_an_image_looks_at_it_once(tiny):
    looks = []
    hook = tiny.model.model.visual_backbone.register_forward_hook(lambda *_: looks.append(1))
    asked = {"tasks": ["detection", "segmentation", "single_cell"], "questions": ["What is it?"]}
    first, second = (Image.effect_noise((60, 40), strength) for strength in (50, 90))
    together = tiny(first, **asked)
    assert len(looks) == 1
    tiny(second, **asked)
    assert len(looks) == 2
    hook.remove()
    alone = tiny(first, tasks=["segmentation"])
    np.testing.assert_array_equal(together.mask, alone.mask)


def test_tasks_at_different_sizes_are_those_of_each_alone(checkpoint):
    analyzer = Analyzer.from_pretrained(checkpoint, device="cpu", image_sizes={"segmentation": 96})
    together = analyzer(noise(3), **ALL)
    alone = [analyzer(noise(3), [task]) for task in ALL["tasks"]]
    assert [cell.score for cell in together.cells] == pytest.approx([cell.score for cell in alone[0].cells], abs=1e-6)
    np.testing.assert_array_equal(together.mask, alone[1].mask)
    assert together.single_cell["score"] == pytest.approx(alone[2].single_cell["score"], abs=1e-6)
    # Beside them the cells that support them, where these were looked for.
    read = [(entry["question"], entry.get("text", entry["answer"])) for entry in together.answers]
    alone = analyzer(noise(3), (), questions=ALL["questions"]).answers
    assert read == [(entry["question"], entry["answer"]) for entry in alone]


def test_two_analyzers_in_turn_give_what_each_gives_alone(checkpoint, other_checkpoint):
    folders = (checkpoint, other_checkpoint)
    images = [noise(number) for number in range(3)]
    expected = [
        [Analyzer.from_pretrained(folder, device="cpu")(image, **ALL) for image in images] for folder in folders
    ]
    assert expected[0][0].counts != expected[1][0].counts
    analyzers = [Analyzer.from_pretrained(folder, device="cpu") for folder in folders]
    for number, image in enumerate(images):
        for analyzer, results in zip(analyzers, expected, strict=True):
            assert_same(analyzer(image, **ALL), results[number])


def left_on(model: nn.Module) -> dict[str, tuple[list[str], int]]:
    """Attributes and hooks of every module."""
    return {
        name: (sorted(vars(module)), len(module._forward_hooks) + len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    }


def test_threads_that_share_an_analyzer_have_the_results_of_one(checkpoint):
    analyzer = Analyzer.from_pretrained(checkpoint, device="cpu")
    sizes = [(60, 40), (40, 60), (200, 30), (64, 64), (120, 90), (30, 31), (500, 40), (90, 120)]
    images = [noise(number, size) for number, size in enumerate(sizes)]
    expected = [analyzer(image, **ALL) for image in images]
    before = left_on(analyzer.model)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda image: analyzer(image, **ALL), images * 4))
    for number, result in enumerate(found):
        assert_same(result, expected[number % len(images)], atol=1e-5)
    assert left_on(analyzer.model) == before


def first_of_process(analyzer: Analyzer, image: Image.Image) -> SmearResult:
    torch.set_num_threads(1)
    return analyzer(image, **ALL)


def test_processes_have_the_results_of_one(loaded):
    images = [noise(0), noise(1, (90, 50))]
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = list(pool.map(first_of_process, [loaded] * 2, images))
    for image, result in zip(images, found, strict=True):
        assert_same(result, loaded(image, **ALL), atol=1e-5)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda analyzer: pickle.loads(pickle.dumps(analyzer))])
def test_a_copy_gives_the_same_and_is_another_one(loaded, duplicate):
    expected = loaded(noise(0), **ALL)
    other = duplicate(loaded)
    # Its weights lie at other addresses than those of the file that was mapped, by which kernels sum in another order.
    assert_same(other(noise(0), **ALL), expected, atol=1e-6)
    with torch.no_grad():
        other.model.detection_head.class_head.bias -= 9
    assert other(noise(0), **ALL).cells != expected.cells
    assert_same(loaded(noise(0), **ALL), expected)


def test_weights_that_are_changed_in_place_change_the_result(checkpoint):
    analyzer = Analyzer.from_pretrained(checkpoint, device="cpu")
    before = analyzer(noise(0), **ALL)
    parts = {
        "visual_backbone.backbone": "cells",
        "visual_backbone.input_projection": "cells",
        "image_encoder": "cells",
        "text_branch.encoder": "cells",
        "text_branch.decoder": "answers",
    }
    for part, changed in parts.items():
        kept = {name: value.clone() for name, value in analyzer.model.model.named_parameters() if name.startswith(part)}
        assert kept, part
        with torch.no_grad():
            for name in kept:
                analyzer.model.model.get_parameter(name).add_(torch.randn_like(kept[name]))
        after = analyzer(noise(0), **ALL)
        values = [getattr(result, changed) for result in (before, after)]
        assert values[0] != values[1], part
        with torch.no_grad():
            for name, value in kept.items():
                analyzer.model.model.get_parameter(name).copy_(value)
    assert_same(analyzer(noise(0), **ALL), before)


def test_a_model_in_training_mode_is_refused(checkpoint):
    analyzer = Analyzer.from_pretrained(checkpoint, device="cpu", prepare=False)
    analyzer.model.train()
    with pytest.raises(UniHemaError, match=r"training mode: call model.eval\(\)"):
        analyzer(noise(0))


@pytest.mark.parametrize("size", [(60, 40), (500, 40)])
def test_a_prepared_model_has_the_results_of_an_unprepared_one(checkpoint, loaded, size):
    assert loaded.model.preparation.fused_norms
    model, processor = load_model(checkpoint, "cpu")
    assert_same(loaded(noise(0, size), **ALL), Analyzer(model, processor)(noise(0, size), **ALL), atol=1e-4)
    assert not hasattr(model, "preparation")
    # Of several sizes, padded to one.
    images = [noise(0, size), noise(1, (64, 64))]
    together = loaded.analyze_images(images, **ALL)
    for image, result in zip(images, together, strict=True):
        assert_same(result, Analyzer(model, processor)(image, **ALL), atol=1e-4)


@pytest.mark.parametrize("device_dtype", [torch.bfloat16, torch.float16])
def test_a_prepared_model_can_be_moved_to_another_dtype(checkpoint, device_dtype):
    model, processor = load_model(checkpoint, "cpu")
    prepare_for_inference(model)
    half = Analyzer(model.to(device_dtype), processor)(noise(0), ["single_cell"])
    assert 0 < half.single_cell["score"] <= 1 and half.provenance["dtype"] == str(device_dtype).removeprefix("torch.")


def test_a_prepared_model_is_not_saved(loaded, tmp_path):
    for save in (loaded.model.save_pretrained, loaded.save_pretrained):
        with pytest.raises(PreparedModelError, match="Load the checkpoint again to save it"):
            save(tmp_path / "saved")
    assert not list(tmp_path.iterdir())


def test_an_adapter_loads_onto_a_prepared_model(checkpoint, tmp_path):
    save_lively_adapter(checkpoint, tmp_path / "ours", seed=0)
    plain = Analyzer(*load_model(checkpoint, "cpu", adapters=[tmp_path / "ours"]))
    expected = plain(noise(0), threshold=0.0)
    assert plain.tasks == ("detection",)
    prepared = Analyzer.from_pretrained(checkpoint, device="cpu")
    base = prepared(noise(0), threshold=0.0)
    prepared.model.load_adapter(tmp_path / "ours", "ours")
    for analyzer in (prepared, Analyzer.from_pretrained(checkpoint, device="cpu", adapters=[tmp_path / "ours"])):
        found = analyzer(noise(0), threshold=0.0)
        assert_same(found, expected, atol=1e-4)
        assert set(found.counts) == {"neutrophil", "eosinophil"} and found.provenance["adapters"] == ["ours"]
        assert {cell.score for cell in found.cells} != {cell.score for cell in base.cells}
        analyzer.model.disable_adapters()
        assert_same(analyzer(noise(0), threshold=0.0), base, atol=1e-5)
    # What it answers depends on the adapter's files.
    hashes = Analyzer.from_pretrained(checkpoint, device="cpu", adapters={"stain": tmp_path / "ours"}).weights_sha256()
    assert {"model.safetensors", "stain/adapter_model.safetensors"} <= hashes.keys()
    (tmp_path / "again").mkdir()
    with pytest.raises(CheckpointError, match="2 adapters and the names ours: give each its own"):
        load_model(checkpoint, "cpu", adapters=[tmp_path / "ours", tmp_path / "again" / ".." / "ours"])


def test_a_device_or_dtype_that_there_is_not_is_named(checkpoint, monkeypatch):
    with pytest.raises(UniHemaError, match="device 'nonsense': no such device; use auto, cpu, cuda, cuda:0 or mps"):
        Analyzer.from_pretrained(checkpoint, device="nonsense")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for device in ("cuda", "cuda:0", torch.device("cuda"), "mps", "xpu", "meta"):
        with pytest.raises(UniHemaError, match="not there on this machine; use cpu, or auto"):
            Analyzer.from_pretrained(checkpoint, device=device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UniHemaError, match="device 'cuda:2': not there"):
        Analyzer.from_pretrained(checkpoint, device="cuda:2")
    for dtype in ("int3", "auto", torch.int8, torch.float64):
        with pytest.raises(UniHemaError, match="choose one of float32, bfloat16, float16"):
            Analyzer.from_pretrained(checkpoint, device="cpu", dtype=dtype)


@pytest.mark.parametrize("cuda, mps, device", [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_auto_is_the_best_device_that_there_is(monkeypatch, cuda, mps, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert choose_device() == choose_device("auto") == torch.device(device)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_a_dtype_is_what_is_computed_in(checkpoint, loaded, dtype):
    analyzer = Analyzer.from_pretrained(checkpoint, device="cpu", dtype=dtype)
    assert {parameter.dtype for parameter in analyzer.model.parameters()} == {torch.bfloat16}
    result, exact = analyzer(noise(0), **ALL), loaded(noise(0), **ALL)
    assert result.provenance["dtype"] == "bfloat16" and result.provenance["device"] == "cpu"
    assert len(result.answers) == 2 and result.mask.shape == exact.mask.shape
    assert result.single_cell["score"] == pytest.approx(exact.single_cell["score"], abs=0.05)


def test_a_model_with_one_head_does_its_task(tmp_path):
    folder = save_tiny_checkpoint(tmp_path / "cells", unihema.UniHemaForImageClassification)
    analyzer = Analyzer.from_pretrained(folder, device="cpu")
    assert analyzer.tasks == ("single_cell",) and analyzer(noise(0)).single_cell["label"] in (
        "neutrophil",
        "lymphocyte",
    )
    with pytest.raises(CheckpointError, match="no trained head for 'detection'; it does single_cell"):
        analyzer(noise(0), ["detection"])


@pytest.mark.parametrize("source", ["none/such", "./nowhere", Path("nowhere")])
def test_a_source_that_is_nowhere_is_named(source):
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        Analyzer.from_pretrained(source, local_files_only=True)


def test_cells_have_masks_where_the_checkpoint_was_trained_on_them(tmp_path):
    trained = TrainingResults(cell_masks=True, red_cell_diameter=[5, 6, 7])
    analyzer = Analyzer.from_pretrained(save_lively(tmp_path / "masks", 3, trained=trained), device="cpu")
    for image, tiles in ((noise(0, (61, 43)), "off"), (noise(1, (300, 200)), 64)):
        result = analyzer(image, tiles=tiles)
        assert result.cells and all(cell.mask is not None for cell in result.cells)
        assert (result.tiling is None) == (tiles == "off")
        again = SmearResult.from_dict(json.loads(json.dumps(result.to_dict())))
        assert again.to_dict() == result.to_dict()
        assert result.with_geojson(result.to_geojson()).changes == []
    whole = analyzer.analyze_images([noise(0), noise(2)])
    assert_same(whole[1], analyzer(noise(2)), atol=1e-4)
