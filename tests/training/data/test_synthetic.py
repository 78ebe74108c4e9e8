"""Synthetic smears: the same for a seed whatever the order, exact truth, and attributes that can be seen."""

import json
import re

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from unihema.errors import DatasetError
from unihema.modeling_unihema.configuration_unihema import PAPER_MORPHOLOGY, SMEAR_CLASSES
from unihema.training.data.readers import load_folder
from unihema.training.data.rows import check_rows
from unihema.training.data.synthetic.cells import CLASSES, MORPHOLOGY, WHITE_CELLS, cell_patch, paint_cell, plan_cell
from unihema.training.data.synthetic.fields import SyntheticSmears, _visible
from unihema.training.data.synthetic.folder import write_synthetic


@pytest.fixture(scope="module")
def samples():
    smears = SyntheticSmears(seed=11)
    return [smears.generate(index) for index in range(24)]


def test_names_are_those_of_the_model():
    assert list(CLASSES) == SMEAR_CLASSES
    assert {name: list(values) for name, values in MORPHOLOGY.items()} == PAPER_MORPHOLOGY


def test_same_whatever_the_order(samples):
    again = SyntheticSmears(seed=11)
    for index in (5, 2, 9):
        sample = again[index]
        assert np.array_equal(sample.image, samples[index].image)
        assert np.array_equal(sample.instance_map, samples[index].instance_map)
        assert (sample.questions, sample.cloze) == (samples[index].questions, samples[index].cloze)
    again.single_cell(3)
    assert np.array_equal(again.single_cell(4).image, SyntheticSmears(seed=11).single_cell(4).image)
    assert not np.array_equal(SyntheticSmears(seed=12).generate(5).image, samples[5].image)
    assert not np.array_equal(samples[5].image, samples[6].image)


def test_truth_is_exact(samples):
    for sample in samples:
        masks = sample.instance_masks
        assert masks.shape == (len(sample.labels), *sample.image.shape[:2])
        assert masks.sum(0).max() <= 1
        for mask, box in zip(masks, sample.boxes):
            rows, columns = np.nonzero(mask)
            assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert mask.sum() >= 12
        white = np.array([label in WHITE_CELLS for label in sample.labels])
        assert np.array_equal(sample.semantic_mask(), masks[white].any(0))
        assert [bool(attributes) for attributes in sample.attributes] == white.tolist()


def test_the_cell_painted_last_is_on_top():
    rng = np.random.default_rng(0)
    plans = [plan_cell("red blood cell", 40, 40, 20, rng), plan_cell("neutrophil", 78, 50, 20, rng)]
    patched = [(plan, cell_patch(plan, 100, 130)) for plan in plans]
    _, top = _visible(plans, 100, 130)
    red_only = np.zeros((100, 130, 3), np.float32)
    paint_cell(red_only, *patched[0])
    both = red_only.copy()
    paint_cell(both, *patched[1])
    assert set(np.unique(top)) == {0, 1, 2}
    changed = (both != red_only).any(-1)
    assert changed[top == 2].all()
    # Beyond the map only the softened edge, half a pixel wide.
    assert not changed[~ndimage.binary_dilation(top == 2, iterations=2)].any()
    assert ((red_only > 0).any(-1) & (top == 2)).sum() > 50


def test_cells_differ_from_the_background(samples):
    for sample in samples:
        image = sample.image.astype(float).mean(-1)
        background = np.median(image[sample.instance_map == 0])
        for mask in sample.instance_masks:
            assert image[mask].mean() < background - 8


def test_answers_follow_from_the_truth(samples):
    for sample in samples:
        answers = {pair["question"]: pair["answer"] for pair in sample.questions}
        white = [label for label in sample.labels if label in WHITE_CELLS]
        assert answers["How many white blood cells are in the field?"] == str(len(white))
        assert answers["How many platelets are in the field?"] == str(sample.labels.count("platelet"))
        assert answers["Is there an eosinophil in the field?"] == ("yes" if "eosinophil" in white else "no")
        asked = answers.get("What type of white blood cell is this?")
        assert asked == (white[0] if len(white) == 1 else None)


def test_cloze_is_the_sentence_with_words_left_out(samples):
    smears = SyntheticSmears(seed=3)
    sentences = [sentence for sample in samples for sentence in sample.cloze]
    sentences += [sentence for i in range(20) for sentence in smears.single_cell(i, "monocyte").cloze]
    for sentence in sentences:
        numbers = [int(number) for number in re.findall(r"<extra_id_(\d+)>", sentence["masked"])]
        assert numbers == list(range(len(numbers))) and numbers
        pattern = re.sub(r"<extra_id_\d+>", "(.+?)", re.escape(sentence["masked"]))
        assert re.fullmatch(pattern, sentence["completed"])


def test_all_classes_and_values_occur(samples):
    assert {label for sample in samples for label in sample.labels} == set(CLASSES)
    smears = SyntheticSmears(seed=1)
    seen = {(name, value) for i in range(40) for name, value in smears.single_cell(i).attributes.items()}
    assert seen == {(name, value) for name, values in MORPHOLOGY.items() for value in values}


def painted(label, seed=0, **attributes):
    """Optical density `[h, w, 3]` of one white cell on nothing, and the map of its pixels."""
    plan = plan_cell(label, 64, 64, 28, np.random.default_rng(seed))
    plan.attributes = {name: values[0] for name, values in MORPHOLOGY.items()} | attributes
    density = np.zeros((128, 128, 3), np.float32)
    patch = cell_patch(plan, 128, 128)
    paint_cell(density, plan, patch)
    inside = np.zeros((128, 128), bool)
    inside[patch.window] = patch.distance < patch.edge - 3
    return density, inside


def nucleus(density, inside):
    return inside & (density[..., 1] > 0.7)


@pytest.mark.parametrize("label", ["neutrophil", "lymphocyte", "monocyte"])
@pytest.mark.parametrize("seed", [0, 1, 2])
class TestAttributesAreSeen:
    def test_basophilia(self, label, seed):
        def blueness(value):
            density, inside = painted(label, seed, basophilia=value, cytoplasm="abundant")
            plain = inside & ~nucleus(density, inside)
            return float((density[..., 0] - density[..., 2])[plain].mean())

        assert blueness("moderate") > blueness("slight") + 0.1

    def test_cytoplasm(self, label, seed):
        def share(value):
            density, inside = painted(label, seed, cytoplasm=value)
            return nucleus(density, inside).sum() / inside.sum()

        assert share("scanty") > 1.35 * share("abundant")

    def test_chromatin(self, label, seed):
        def looks(value):
            density, inside = painted(label, seed, nuclear_chromatin=value)
            values = density[..., 1][nucleus(density, inside)]
            return values.mean(), values.std()

        (pale, smooth), (dark, rough) = looks("open"), looks("coarse")
        assert dark > pale + 0.25 and rough > smooth

    def test_nuclear_shape(self, label, seed):
        def raggedness(value):
            density, inside = painted(label, seed, nuclear_shape=value)
            dark = nucleus(density, inside)
            edge = sum((dark ^ np.roll(dark, 1, axis)).sum() for axis in (0, 1))
            return edge**2 / dark.sum()

        assert raggedness("irregular") > raggedness("regular")

    def test_nucleolus_and_vacuoles(self, label, seed):
        plain, inside = painted(label, seed)
        nucleolus, _ = painted(label, seed, nucleolus="prominent")
        vacuoles, _ = painted(label, seed, vacuoles="prominent", cytoplasm="abundant")
        lighter = nucleus(plain, inside) & (nucleolus[..., 1] < plain[..., 1] - 0.25)
        assert lighter.sum() >= 25
        assert (inside & (vacuoles.max(-1) < 0.12)).sum() >= 60


def test_single_cells_carry_their_label():
    smears = SyntheticSmears(seed=2, crop_size=128)
    image, label, attributes = smears.single_cell(0, "basophil")
    assert image.shape == (128, 128, 3) and label == "basophil" and set(attributes) == set(MORPHOLOGY)
    cell = smears.single_cell(1, "platelet")
    assert cell.attributes == {} and cell.cloze == []
    assert cell.questions == [{"question": "Which cell is this?", "answer": "platelet"}]
    asked = {pair["question"]: pair["answer"] for pair in smears.single_cell(2, "lymphocyte").questions}
    assert asked["What type of white blood cell is this?"] == "lymphocyte"
    assert len(asked) == 2 + len(MORPHOLOGY)
    with pytest.raises(ValueError, match="Unknown class 'blast'"):
        smears.single_cell(0, "blast")


def test_the_smallest_fields():
    assert SyntheticSmears(width=64, height=65, crop_size=64).generate(0).image.shape == (65, 64, 3)


def test_impossible_smears():
    with pytest.raises(ValueError, match="40x336"):
        SyntheticSmears(width=40)
    with pytest.raises(ValueError, match="seed=-1"):
        SyntheticSmears(seed=-1)
    with pytest.raises(ValueError, match=r"white_cells=\(0.5, 0.4\)"):
        SyntheticSmears(white_cells=(0.5, 0.4))
    with pytest.raises(IndexError):
        SyntheticSmears(length=3)[3]


def test_white_cells_as_asked():
    crowded = SyntheticSmears(seed=5, white_cells=(0, 0, 0, 1), red_radius=(0.05, 0.06))
    counts = [sum(label in WHITE_CELLS for label in crowded[index].labels) for index in range(12)]
    assert max(counts) == 3 and sum(counts) > 30
    bare = SyntheticSmears(seed=5, white_cells=(1,))
    assert not any(label in WHITE_CELLS for index in range(12) for label in bare[index].labels)


SMALL = {"crops_per_field": 7, "width": 160, "height": 120, "crop_size": 96, "progress": False}


def test_folder_reads_back(tmp_path):
    folder = write_synthetic(tmp_path / "smears", 2, 1, seed=4, **SMALL)
    smears = SyntheticSmears(seed=4, width=160, height=120, crop_size=96)
    rows = load_folder(folder, "train")
    assert {task: len(found) for task, found in rows.items() if task != "question_answering"} == {
        "detection": 2,
        "segmentation": 2,
        "single_cell": 14,
        "cloze": len(rows["cloze"]),
    }
    for index, row in enumerate(rows["detection"]):
        sample = smears.generate(index)
        assert row["objects"]["category"] == sample.labels
        assert row["objects"]["morphology"] == sample.attributes
        assert np.array_equal(np.asarray(Image.open(row["image"])), sample.image)
        x, y, w, h = np.array(row["objects"]["bbox"]).T
        assert np.array_equal(np.stack([x, y, x + w, y + h], 1), sample.boxes)
        mask = np.asarray(Image.open(rows["segmentation"][index]["mask"]))
        assert np.array_equal(mask > 0, sample.semantic_mask())
    for found in rows.values():
        check_rows(found, CLASSES, CLASSES, MORPHOLOGY)
    assert {row["label"] for row in rows["single_cell"]} == set(CLASSES)
    val = load_folder(folder, "val")["detection"]
    assert val[0]["objects"] != rows["detection"][0]["objects"]


def test_folder_goes_on_where_it_stopped(tmp_path):
    whole = write_synthetic(tmp_path / "whole", 2, 1, seed=4, **SMALL)
    cut = write_synthetic(tmp_path / "cut", 2, 1, seed=4, **SMALL)
    (cut / "train" / "annotations.json").unlink()
    (cut / "train" / "images" / "00001.png").unlink()
    write_synthetic(cut, 2, 1, seed=4, **SMALL)
    files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(cut) for path in cut.rglob("*") if path.is_file())
    assert all((whole / file).read_bytes() == (cut / file).read_bytes() for file in files)


def test_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(DatasetError, match="holds something else"):
        write_synthetic(tmp_path, 1, 1, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    folder = write_synthetic(tmp_path / "smears", 1, 0, seed=1, **SMALL)
    assert json.loads((folder / "synthetic.json").read_text())["seed"] == 1
    with pytest.raises(DatasetError, match="other settings"):
        write_synthetic(folder, 1, 0, seed=2, **SMALL)
    with pytest.raises(ValueError, match="not all 0"):
        write_synthetic(tmp_path / "none", 0, 0)
