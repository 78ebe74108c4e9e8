"""One image of any kind through `analyze`."""

import numpy as np
import pytest
from PIL import Image
from tiny_checkpoint import save_tiny_checkpoint

from unihema import QueryCapWarning, analyze, load_checkpoint


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_checkpoint(save_tiny_checkpoint(tmp_path_factory.mktemp("model")), device="cpu")


pytestmark = pytest.mark.filterwarnings("ignore::unihema.predict.QueryCapWarning")


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (640, 480)])
def test_results_are_in_pixels_of_the_image_and_drawn(loaded, size):
    image = Image.effect_noise(size, 60).convert("RGB")
    result = analyze(*loaded, image, tasks=["detection", "segmentation", "single_cell"])
    assert (result.width, result.height) == size and result.mask.shape == size[::-1]
    boxes = np.array([cell.box for cell in result.cells])
    assert (boxes >= 0).all() and (boxes <= [*size, *size]).all()
    assert [cell.id for cell in result.cells] == list(range(1, len(boxes) + 1))
    assert result.single_cell["label"] in ("neutrophil", "lymphocyte")
    assert result.overlay(image).width > size[0]


def test_a_huge_file_keeps_its_own_coordinates(loaded, tmp_path):
    path = tmp_path / "slide.png"
    Image.new("L", (12000, 6000), 200).save(path)  # 72 megapixels: reduced on opening
    result = analyze(*loaded, path)
    assert (result.width, result.height) == (12000, 6000)
    assert max(cell.box[2] for cell in result.cells) > 6000
    assert result.mask.shape[1] < 12000 and result.mask.shape[1] == pytest.approx(2 * result.mask.shape[0], abs=2)
    assert max(result.overlay(Image.open(path)).size) <= 2048 + 700


def test_a_photo_on_its_side_is_turned_upright(loaded, tmp_path):
    path = tmp_path / "phone.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.effect_noise((60, 40), 50).save(path, exif=exif)
    assert (lambda r: (r.width, r.height, r.mask.shape))(analyze(*loaded, path)) == (40, 60, (60, 40))


def test_as_many_cells_as_queries_is_said(loaded):
    image = Image.effect_noise((60, 40), 50)
    with pytest.warns(QueryCapWarning, match="20 of 20 queries"):
        result = analyze(*loaded, image, tasks=["detection"], threshold=0.0)
    assert "too low" in result.warnings[0]
    assert analyze(*loaded, image, tasks=["detection"], threshold=1.0).warnings == []


def test_a_threshold_replaces_the_calibrated_ones_and_is_recorded(loaded):
    model, processor = loaded
    image = Image.effect_noise((60, 40), 50)
    some = analyze(model, processor, image, tasks=["detection"])
    score = some.cells[len(some.cells) // 2].score
    fewer = analyze(model, processor, image, tasks=["detection"], threshold=score)
    assert {cell.box for cell in fewer.cells} == {cell.box for cell in some.cells if cell.score > score}
    assert set(fewer.provenance["detection_thresholds"].values()) == {score}
    assert list(fewer.counts) == ["red blood cell", "platelet", "neutrophil"]


def test_a_blank_is_filled_and_a_question_answered_by_the_same_call(loaded):
    image = Image.effect_noise((60, 40), 50)
    result = analyze(*loaded, image, tasks=(), questions=["What is it?", "The cell is ___."])
    assert [answer["question"] for answer in result.answers] == ["What is it?", "The cell is ___."]
    assert all(isinstance(answer["answer"], str) for answer in result.answers)
    assert result.cells == [] and result.mask is None


def test_all_that_is_asked_of_an_image_looks_at_it_once(loaded):
    model, processor = loaded
    looks = []
    hook = model.model.visual_backbone.register_forward_hook(lambda *_: looks.append(1))
    asked = {"tasks": ["detection", "segmentation", "single_cell"], "questions": ["What is it?"]}
    first, second = (Image.effect_noise((60, 40), strength) for strength in (50, 90))
    together = analyze(model, processor, first, **asked)
    assert len(looks) == 1
    analyze(model, processor, second, **asked)
    assert len(looks) == 2
    hook.remove()
    alone = analyze(model, processor, first, tasks=["segmentation"])
    np.testing.assert_array_equal(together.mask, alone.mask)
