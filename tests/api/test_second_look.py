"""A second look: nucleated cells of a field are cut out and typed, and two opinions become one."""

import csv
import json

import numpy as np
import pytest
from PIL import Image, ImageDraw
from tiny_checkpoint import save_lively

from unihema import Analyzer, CheckpointError, RequestError, UniHemaError, UniHemaForDetection
from unihema.files import OpenedImage
from unihema.report import SmearReport
from unihema.results.cell import Cell
from unihema.results.second_look import (
    Rule,
    cell_types,
    crop_of,
    detection_logits,
    fit_rule,
    look_again,
    look_for_parasites,
)
from unihema.slides import ImageRegions


TYPES = ["neutrophil", "lymphocyte", "erythroblast"]
PARENTS = {"neutrophil": "WBC", "lymphocyte": "WBC"}
CLASSES = ["RBC", "WBC", "Platelets", "neutrophil", "Lymphocytes"]
# The field's cells are known by their colours.
COLOURS = {"neutrophil": (120, 40, 160), "lymphocyte": (40, 60, 200), "RBC": (220, 120, 120)}
PLACES = [
    ("neutrophil", 60, 50),
    ("lymphocyte", 150, 90),
    ("RBC", 100, 140),
    ("neutrophil", 4, 170),
    ("lymphocyte", 195, 3),
]


def field() -> tuple[ImageRegions, list[Cell]]:
    image = Image.new("RGB", (200, 180), (240, 235, 235))
    cells = []
    for number, (name, x, y) in enumerate(PLACES, 1):
        ImageDraw.Draw(image).ellipse([x - 15, y - 15, x + 15, y + 15], fill=COLOURS[name])
        box = (max(x - 15, 0), max(y - 15, 0), min(x + 15, 200), min(y + 15, 180))
        cells.append(Cell(number, box, "RBC" if name == "RBC" else "WBC", 0.9, probability=0.8))
    return ImageRegions(OpenedImage(image, *image.size, "field.png")), cells


def by_colour(crops: list[Image.Image]) -> np.ndarray:
    """What a perfect classifier says: the type whose colour is in the middle of the crop."""
    middles = np.array([np.asarray(crop)[crop.height // 2, crop.width // 2] for crop in crops], float)
    colours = np.array([COLOURS.get(name, (0, 0, 0)) for name in TYPES], float)
    return -np.linalg.norm(middles[:, None] - colours, axis=-1)


def test_each_nucleated_cell_is_typed_by_its_own_crop_also_at_the_edge():
    source, cells = field()
    found = look_again(source, cells, CLASSES, PARENTS, TYPES, Rule(), by_colour)
    assert [cell.label for cell in found] == ["neutrophil", "Lymphocytes", "RBC", "neutrophil", "Lymphocytes"]
    assert found[2] is cells[2] and found[2].second_look is None
    for (name, *_), before, after in zip(PLACES, cells, found, strict=True):
        if name != "RBC":
            assert after.second_look["label"] == name and after.second_look["score"] > 0.99
            assert after.second_look["detection"] == "WBC"
            # It was that of a white cell.
            assert after.probability is None
            assert (after.id, after.box, after.score) == (before.id, before.box, before.score)
    assert all(cell.label in ("RBC", "WBC") for cell in cells)


def test_a_crop_is_twice_the_box_and_repeats_the_last_pixels_beyond_the_image():
    source, cells = field()
    assert crop_of(source, cells[0]).size == (60, 60)
    at_edge = np.asarray(crop_of(source, cells[3]))
    # The box is 19 by 25 pixels of 30, its middle at x 9.5: 50 pixels around it begin 16 beyond the image.
    assert at_edge.shape == (50, 50, 3) and (at_edge[:, :15] == at_edge[:, :1]).all()


def test_crops_are_looked_at_a_few_at_once():
    source, _ = field()
    sizes = []

    def classify(crops):
        sizes.append(len(crops))
        return np.zeros((len(crops), len(TYPES)))

    cells = [Cell(number, (40, 30, 70, 60), "WBC", 0.5) for number in range(1, 101)]
    found = look_again(source, cells, CLASSES, PARENTS, TYPES, Rule(), classify)
    assert sizes == [32, 32, 32, 4]
    # Nothing is more probable than all others together: the cells stay without a type.
    assert {cell.label for cell in found} == {"WBC"}
    assert all(after.probability == before.probability for before, after in zip(cells, found, strict=True))


def test_a_type_that_detection_has_no_class_for_is_reported_and_changes_no_label():
    source, cells = field()
    sure = lambda crops: np.tile([0.0, 0.0, 30.0], (len(crops), 1))
    found = look_again(source, cells[:1], CLASSES, PARENTS, TYPES, Rule(), sure)
    assert found[0].label == "WBC" and found[0].second_look["label"] == "erythroblast"


def test_the_crops_of_red_cells_are_looked_at_for_parasites():
    """Those from the threshold on are called infected; what detection calls infected, and other cells, are not looked at."""
    source, cells = field()
    cells = [*cells, Cell(6, (10, 10, 40, 40), "ring", 0.4), Cell(7, (60, 60, 90, 90), "burr_cell", 0.6)]
    sizes = []

    def classify(crops):
        sizes.extend(crop.size for crop in crops)
        return np.array([0.75, 0.7])

    parents = PARENTS | {"ring": "RBC"}
    found = look_for_parasites(source, cells, parents, 0.75, classify)
    assert sizes == [(60, 60)] * 2
    assert [cell.label for cell in found] == [
        "WBC", "WBC", "infected red cell", "WBC", "WBC", "ring", "burr_cell",
    ]  # fmt: skip
    assert found[2].second_look == {"label": "infected red cell", "score": 0.75, "detection": "RBC"}
    assert (found[2].score, found[2].probability) == (0.9, None)
    told = found[6].second_look
    assert (told["label"], told["detection"]) == ("uninfected red cell", "burr_cell")
    assert told["score"] == pytest.approx(0.3) and found[6].probability == cells[6].probability
    assert all(found[number] is cells[number] for number in (0, 1, 3, 4, 5))


def test_two_opinions_are_put_together_by_the_rule():
    cells = [Cell(1, (0, 0, 9, 9), "neutrophil", 0.9), Cell(2, (0, 0, 9, 9), "WBC", 0.9)]
    detection, crop = detection_logits(cells, TYPES), np.array([[0.0, 5.0, 0.0]] * 2)
    assert detection[1].tolist() == [0, 0, 0] and detection[0].argmax() == 0
    assert Rule(0.0, 1, 1).probabilities(detection, crop)[0].argmax() == 0
    assert Rule(1.0, 1, 1).probabilities(detection, crop)[0].argmax() == 1
    # Of a cell without a type the crop alone decides.
    for weight in (0.1, 0.5, 1.0):
        assert Rule(weight, 1, 1).probabilities(detection, crop)[1].argmax() == 1
    assert Rule(0.4, 2, 0.5).probabilities(detection, crop).sum(1) == pytest.approx([1, 1])


@pytest.mark.parametrize("reliable", ["detection", "crop"])
def test_the_rule_follows_the_opinion_that_is_right(reliable):
    generator = np.random.default_rng(0)
    true = generator.integers(0, 3, 300)
    right, noise = 6.0 * np.eye(3)[true] + generator.normal(0, 1, (300, 3)), generator.normal(0, 3, (300, 3))
    rule = fit_rule(*((right, noise) if reliable == "detection" else (noise, right)), true)
    assert rule.weight <= 0.2 if reliable == "detection" else rule.weight >= 0.8
    both = rule.probabilities(*((right, noise) if reliable == "detection" else (noise, right))).argmax(1)
    assert (both == true).mean() >= (right.argmax(1) == true).mean() - 0.02


def test_the_types_are_those_of_nucleated_cells():
    labels = ["Platelets", "neutrophil", "burr_cell", "erythroblast", "WBC", "reactive lymphocyte", "odd"]
    assert cell_types(labels, {"odd": "WBC"}) == ["neutrophil", "erythroblast", "reactive lymphocyte", "odd"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    names = {0: "RBC", 1: "WBC", 2: "neutrophil", 3: "lymphocyte"}
    folder = tmp_path_factory.mktemp("models") / "looks"
    return save_lively(
        folder, 1, id2label=names, label_parents=PARENTS, single_cell_labels=["neutrophil", "lymphocyte", "burr_cell"]
    )


def test_an_analysis_looks_again_where_that_is_asked_for(checkpoint, tmp_path):
    analyzer = Analyzer.from_pretrained(checkpoint, device="cpu")
    image = Image.effect_noise((96, 72), 60).convert("RGB")
    once, again = (analyzer(image, ["detection"], second_look=asked) for asked in (None, True))
    assert once.provenance["second_look"] is False and all(cell.second_look is None for cell in once.cells)
    assert [cell.box for cell in again.cells] == [cell.box for cell in once.cells]
    looked_at = [cell for cell in again.cells if cell.second_look is not None]
    assert looked_at and {cell.second_look["detection"] for cell in looked_at} <= {"WBC", "neutrophil", "lymphocyte"}
    assert {cell.second_look["label"] for cell in looked_at} <= {"neutrophil", "lymphocyte"}
    assert all((cell.second_look is None) == (cell.label == "RBC") for cell in again.cells)
    # What a crop says is what it says alone.
    source = ImageRegions(OpenedImage(image, *image.size, None))
    first = looked_at[0]
    alone = analyzer(crop_of(source, first), "single_cell", labels=["neutrophil", "lymphocyte"]).single_cell
    assert first.second_look["label"] == alone["label"]
    assert first.second_look["score"] == pytest.approx(alone["score"], abs=1e-5)
    assert type(again).from_dict(json.loads(json.dumps(again.to_dict()))).cells[0] == again.cells[0]
    image.save(tmp_path / "field.png")
    analyzer.analyze_files([tmp_path / "field.png"], tmp_path / "out", ["detection"], second_look=True)
    rows = list(csv.DictReader((tmp_path / "out" / "cells.csv").read_text(encoding="utf-8").splitlines()))
    assert [row["second_look"] for row in rows] == [(cell.second_look or {}).get("label", "") for cell in again.cells]
    assert [row["detection_label"] for row in rows] == [
        (cell.second_look or {}).get("detection", "") for cell in again.cells
    ]


def test_a_second_look_that_cannot_be_is_refused(checkpoint, tmp_path):
    analyzer = Analyzer.from_pretrained(checkpoint, device="cpu")
    with pytest.raises(RequestError, match="task detection"):
        analyzer.request("single_cell", second_look=True)
    alone = Analyzer.from_pretrained(save_lively_detector(tmp_path), device="cpu")
    with pytest.raises(CheckpointError, match="single_cell"):
        alone.request("detection", second_look=True)
    assert alone.request("detection").second_look is False


def save_lively_detector(folder):
    return save_lively(folder / "detector", 1, model_class=UniHemaForDetection)


def test_a_checkpoint_that_states_a_rule_looks_again_by_itself(checkpoint, tmp_path):
    folder = tmp_path / "ruled"
    folder.mkdir()
    for path in checkpoint.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["trained"]["second_look"] = {"weight": 1.0, "detection_temperature": 1.0, "crop_temperature": 1}
    (folder / "config.json").write_text(json.dumps(config))
    analyzer = Analyzer.from_pretrained(folder, device="cpu")
    image = Image.effect_noise((96, 72), 60).convert("RGB")
    result = analyzer(image, ["detection"])
    typed = [cell for cell in result.cells if cell.second_look is not None and cell.label != "WBC"]
    assert typed and all(cell.label == cell.second_look["label"] for cell in typed)
    assert all(cell.second_look is None for cell in analyzer(image, ["detection"], second_look=False).cells)
    config["trained"]["second_look"]["weight"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UniHemaError, match="trained.second_look.weight"):
        Analyzer.from_pretrained(folder, device="cpu")


@pytest.fixture(scope="module")
def malaria_checkpoint(tmp_path_factory):
    names = {0: "RBC", 1: "WBC"}
    folder = tmp_path_factory.mktemp("models") / "parasites"
    parents = {"ring": "infected red cell", "infected red cell": "RBC", "normal": "uninfected red cell"}
    parents |= {"uninfected red cell": "RBC"}
    labels = ["neutrophil", "ring", "normal"]
    save_lively(folder, 1, id2label=names, single_cell_labels=labels, single_cell_parents=parents)
    return folder


def told_of_parasites(folder, to, **told):
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    config = json.loads((to / "config.json").read_text())
    stated = {"threshold": 0.5, "recall": 0.9, "precision": 0.8, "false_positives": 0.004}
    config["trained"]["parasites"] = stated | told
    (to / "config.json").write_text(json.dumps(config))
    return to


@pytest.mark.parametrize(("threshold", "infected"), [(0.0, True), (1.0, False)])
def test_an_analysis_looks_for_parasites_where_that_is_asked_for(malaria_checkpoint, tmp_path, threshold, infected):
    analyzer = Analyzer.from_pretrained(
        told_of_parasites(malaria_checkpoint, tmp_path / "m", threshold=threshold), device="cpu"
    )
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (72, 96, 3), np.uint8))
    once, looked = (analyzer(image, ["detection"], parasites=asked) for asked in (False, True))
    assert once.provenance["parasites"] is None and "infected red cell" not in once.classes
    assert looked.provenance["parasites"]["threshold"] == threshold
    red = [number for number, cell in enumerate(once.cells) if cell.label == "RBC"]
    assert red and "infected red cell" in looked.counts
    for number, cell in enumerate(looked.cells):
        assert cell.label == ("infected red cell" if infected and number in red else once.cells[number].label)
        assert (cell.second_look is not None) == (number in red)
    # Infected cells are red cells still, and a report knows whether there are any and how far that can be trusted.
    report = SmearReport.of([looked]).figures
    assert report["parasites"]["known"] and report["parasites"]["share"]["count"] == infected * len(red)
    assert report["parasites"]["share"]["of"] == len(red)
    assert sum("healthy people up to 0.40%" in note for note in report["notes"]) == 1
    assert not SmearReport.of([once]).figures["parasites"]["known"]
    assert analyzer.report([image], tasks=["detection"], parasites=True).figures["parasites"] == report["parasites"]
    image.save(tmp_path / "field.png")
    told = []
    analyzer.analyze_files(
        [tmp_path / "field.png"], tmp_path / "out", ["detection"], parasites=True, on_progress=told.append
    )
    assert [now[1:] for now in told if now.unit == "crop"] == [("crop", len(red), len(red), len(once.cells))]
    rows = list(csv.DictReader((tmp_path / "out" / "cells.csv").read_text(encoding="utf-8").splitlines()))
    assert [row["label"] for row in rows] == [cell.label for cell in looked.cells]
    with pytest.raises(UniHemaError, match="parasites"):
        analyzer.analyze_files([tmp_path / "field.png"], tmp_path / "out", ["detection"])


def test_where_no_red_cell_is_looked_for_no_report_says_that_there_are_no_parasites(malaria_checkpoint, tmp_path):
    analyzer = Analyzer.from_pretrained(told_of_parasites(malaria_checkpoint, tmp_path / "m"), device="cpu")
    result = analyzer(Image.effect_noise((96, 72), 60).convert("RGB"), ["detection"], prompt="WBC", parasites=True)
    assert "infected red cell" not in result.classes
    assert any("none was looked at for parasites" in warning for warning in result.warnings)
    assert not SmearReport.of([result]).figures["parasites"]["known"]


def test_parasites_that_cannot_be_told_are_not_looked_for(checkpoint, malaria_checkpoint, tmp_path):
    analyzer = Analyzer.from_pretrained(malaria_checkpoint, device="cpu")
    with pytest.raises(RequestError, match=r"does not say .*trained.parasites"):
        analyzer.request("detection", parasites=True)
    with pytest.raises(RequestError, match="task detection"):
        analyzer.request("single_cell", parasites=True)
    alone = Analyzer.from_pretrained(save_lively_detector(tmp_path), device="cpu")
    with pytest.raises(CheckpointError, match="single_cell"):
        alone.request("detection", parasites=True)
    with pytest.raises(RequestError, match="no single-cell classes of infected"):
        Analyzer.from_pretrained(checkpoint, device="cpu").request("detection", parasites=True)
    with pytest.raises(UniHemaError, match=r"trained.parasites.threshold"):
        Analyzer.from_pretrained(told_of_parasites(malaria_checkpoint, tmp_path / "m", threshold=1.5), device="cpu")
    with pytest.raises(UniHemaError, match=r"trained.parasites has .*more"):
        Analyzer.from_pretrained(told_of_parasites(malaria_checkpoint, tmp_path / "n", more=1), device="cpu")


def test_a_question_of_infected_cells_looks_for_them(malaria_checkpoint, tmp_path):
    folder = told_of_parasites(malaria_checkpoint, tmp_path / "m", threshold=0.0)
    analyzer = Analyzer.from_pretrained(folder, device="cpu")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (72, 96, 3), np.uint8))
    red = analyzer(image, ["detection"]).counts["RBC"]
    answer = analyzer.ask(image, "How many red blood cells are infected?")
    assert red and (str(answer), answer.source) == (str(red), "cells")
    assert analyzer.asked_of(["How many cells are there?"])["parasites"] is False
    untold = Analyzer.from_pretrained(malaria_checkpoint, device="cpu")
    assert str(untold.ask(image, "How many red blood cells are infected?")) == "cannot know"
