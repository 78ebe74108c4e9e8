"""Crops of single cells: the nucleus is found wherever it lies, and how the crop was cut does not decide what is seen."""

import json
import math

import numpy as np
import pytest
from PIL import Image, ImageDraw
from tiny_checkpoint import save_lively

from unihema import Analyzer, RequestError, UniHemaError
from unihema.loading import load_model
from unihema.results.crop_framing import CropFrame, find_nucleus, framed, measure_frame, recoloured, views_of


GLASS, RED_CELL, CYTOPLASM, NUCLEUS, PLATELET = (
    (240, 232, 230),
    (214, 160, 160),
    (205, 190, 220),
    (96, 52, 140),
    (150, 100, 170),
)
KNOWN = CropFrame(0.3, (221.6, 189.4, 182.9), (41.5, 48.1, 20.9))


def crop(
    centre=(0.5, 0.5), diameter=0.4, size=(200, 200), nucleus=True, colours=(GLASS, RED_CELL, CYTOPLASM, NUCLEUS)
) -> Image.Image:
    """A cell with a round nucleus of three quarters of its diameter, between red cells; parts of the crop's width."""
    glass, red, cytoplasm, dark = colours
    image = Image.new("RGB", (4 * size[0], 4 * size[1]), glass)
    draw = ImageDraw.Draw(image)

    def disc(x, y, d, colour):
        draw.ellipse([4 * (x - d / 2), 4 * (y - d / 2), 4 * (x + d / 2), 4 * (y + d / 2)], fill=colour)

    width, height = size
    for x, y in ((0.05, 0.1), (0.95, 0.15), (0.1, 0.95), (0.9, 0.9)):
        disc(x * width, y * height, 0.3 * width, red)
    x, y = centre[0] * width, centre[1] * height
    disc(x, y, diameter * width, cytoplasm if nucleus else red)
    if nucleus:
        disc(x, y, 0.75 * diameter * width, dark)
    noisy = np.asarray(image.resize(size, Image.Resampling.BOX)) + np.random.default_rng(0).normal(
        0, 3, (*size[::-1], 3)
    )
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize(
    ("centre", "diameter"),
    [((0.5, 0.5), 0.4), ((0.3, 0.7), 0.4), ((0.5, 0.5), 0.25), ((0.5, 0.5), 0.9), ((0.22, 0.5), 0.5)],
)
@pytest.mark.parametrize("size", [(200, 200), (80, 80), (300, 220)])
def test_the_nucleus_is_found_where_it_lies(centre, diameter, size):
    found = find_nucleus(crop(centre, diameter, size))
    # Within 3 % of the crop, which is about three pixels where it is looked for.
    assert np.abs(np.array(found.centre) / size - centre).max() < 0.03
    assert found.side == pytest.approx(0.75 * diameter * size[0], rel=0.1, abs=0.03 * size[0])


@pytest.mark.parametrize(
    "image",
    [
        crop(nucleus=False),
        crop(diameter=0.12),  # a platelet, not a cell
        crop((0.05, 0.5)),  # a neighbour
        Image.new("RGB", (60, 60), GLASS),
        Image.new("RGB", (1, 1)),
        Image.new("RGB", (3, 500), NUCLEUS),
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 90, 3), np.uint8)),
    ],
    ids=["red cell", "too small", "at the edge", "glass", "a pixel", "a line", "noise"],
)
def test_what_has_no_nucleus_is_left_as_it_is(image):
    assert find_nucleus(image) is None and views_of(image, KNOWN) is None


def test_a_frame_beyond_the_picture_repeats_its_last_pixels():
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    view, box = framed(Image.fromarray(pixels), (1, 3), 6)
    assert box == (-2, 0, 4, 6)
    seen = np.asarray(view)
    assert (seen[:4, 2:] == pixels[:, :4]).all()
    assert (seen[:4, :2] == pixels[:, :1]).all() and (seen[4:] == seen[3]).all()


def test_a_frame_holds_the_cell_as_the_training_does():
    (as_cut, view), told = views_of(crop((0.35, 0.6), 0.6), KNOWN)
    assert as_cut.size == (200, 200)
    found = find_nucleus(view)
    assert np.array(found.centre) / view.width == pytest.approx([0.5, 0.5], abs=0.03)
    assert found.side / view.width == pytest.approx(KNOWN.nucleus, rel=0.06)
    assert told["nucleus"] == pytest.approx(0.45, rel=0.06) and told["colour"] == 0.5
    x_min, y_min, x_max, y_max = told["box"]
    assert x_max - x_min == y_max - y_min == view.width


def test_how_a_crop_was_cut_does_not_decide_what_the_framed_view_shows():
    field = crop((0.5, 0.5), 0.25, (480, 480))
    views = []
    for box in ((120, 120, 360, 360), (150, 170, 340, 330), (100, 150, 330, 350), (160, 160, 320, 320)):
        _, view = views_of(field.crop(box), KNOWN)[0]
        views.append(np.asarray(view.resize((64, 64), Image.Resampling.BOX), float))
    # The middle of the view: 12 of 255 on average, where colours follow from what else is in the crop.
    inside = [view[16:48, 16:48] for view in views]
    assert max(np.abs(view - inside[0]).mean() for view in inside) < 12
    # The crops themselves differ by more.
    crops = [
        np.asarray(field.crop(box).resize((64, 64)), float) for box in ((100, 150, 330, 350), (160, 160, 320, 320))
    ]
    assert np.abs(crops[0][16:48, 16:48] - crops[1][16:48, 16:48]).mean() > 20


def test_colours_go_to_those_of_the_training():
    image = crop(colours=((250, 240, 200), (230, 150, 110), (220, 200, 190), (110, 50, 120)))
    whole = np.asarray(recoloured(image, KNOWN, 1.0), float)
    # Clipping at 0 and 255 costs a little of it.
    assert whole.mean((0, 1)) == pytest.approx(KNOWN.mean, abs=4) and whole.std((0, 1)) == pytest.approx(
        KNOWN.deviation, abs=4
    )
    assert (np.asarray(recoloured(image, KNOWN, 0.0)) == np.asarray(image)).all()
    half = np.asarray(recoloured(image, KNOWN), float)
    assert half == pytest.approx((whole + np.asarray(image, float)) / 2, abs=1)
    # A picture of one colour stays one.
    assert np.asarray(recoloured(Image.new("RGB", (9, 9), (10, 20, 30)), KNOWN)).std((0, 1)).max() == 0


def test_what_crops_look_like_is_measured():
    crops = [crop(diameter=diameter) for diameter in np.linspace(0.3, 0.5, 25)]
    measured = measure_frame([*crops, *[crop(nucleus=False)] * 30])
    assert measured["nucleus"][0] == pytest.approx(0.3, rel=0.06)
    pixels = np.asarray(crops[12], float)
    assert measured["mean"] == pytest.approx(pixels.mean((0, 1)).tolist(), abs=2)
    assert measured["deviation"] == pytest.approx(pixels.std((0, 1)).tolist(), abs=2)
    assert CropFrame.of_checkpoint(json.loads(json.dumps(measured))).nucleus == measured["nucleus"][0]
    assert measure_frame(crops[:5]) is None


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    stored = {"nucleus": [0.3], "mean": list(KNOWN.mean), "deviation": list(KNOWN.deviation)}
    labels = ["neutrophil", "lymphocyte", "monocyte", "burr_cell"]
    folder = tmp_path_factory.mktemp("models") / "framed"
    return save_lively(folder, 1, single_cell_labels=labels, trained={"crop_frame": stored})


def test_crops_of_nucleated_cells_are_framed_and_others_are_not(analyzer):
    images = [crop((0.4, 0.5), 0.7), crop(nucleus=False), crop()]
    results = analyzer.analyze_images(images, tasks="single_cell")
    assert results[0].framing["box"][2] > 200 and results[1].framing is None and results[2].framing is not None
    for image, result in zip(images, results, strict=True):
        alone = analyzer(image, tasks="single_cell")
        assert alone.framing == result.framing and alone.single_cell["label"] == result.single_cell["label"]
        assert alone.single_cell["score"] == pytest.approx(result.single_cell["score"], abs=1e-5)
        as_is = analyzer(image, tasks="single_cell", framing="off")
        assert as_is.framing is None and as_is.provenance["framing"] == "off"
        same = as_is.single_cell["score"] == pytest.approx(alone.single_cell["score"], abs=1e-6)
        assert same == (result.framing is None)
    stored = json.loads(json.dumps(results[0].to_dict()))
    assert type(results[0]).from_dict(stored).framing == results[0].framing


def test_a_framed_crop_is_the_mean_of_its_views(analyzer):
    image = crop((0.4, 0.5), 0.7)
    views = views_of(image, CropFrame.of_checkpoint(analyzer.model.config.trained.crop_frame))[0]
    scores = []
    for label in analyzer.model.config.single_cell_labels:
        asked = [
            analyzer(view, tasks="single_cell", framing="off", labels=[label, *_others(analyzer, label)])
            for view in views
        ]
        scores.append([result.single_cell for result in asked])
    best = scores[0]
    assert {result["label"] for result in best} <= set(analyzer.model.config.single_cell_labels)
    result = analyzer(image, tasks="single_cell").single_cell
    if len({each["label"] for each in best}) == 1:
        assert result["label"] == best[0]["label"]
        geometric = math.sqrt(best[0]["score"] * best[1]["score"])
        # Renormalised over the classes, so no less than the geometric mean.
        assert geometric - 1e-5 <= result["score"] <= max(each["score"] for each in best) + 1e-5


def _others(analyzer, label):
    return [name for name in analyzer.model.config.single_cell_labels if name != label]


def test_labels_that_are_asked_for_are_the_only_ones_answered(analyzer):
    image = crop()
    result = analyzer(image, tasks="single_cell", labels=["Lymphocytes", "monocyte"])
    assert result.single_cell["label"] in ("lymphocyte", "monocyte") and result.single_cell["score"] >= 0.5
    assert result.provenance["labels"] == ["lymphocyte", "monocyte"]
    assert analyzer(image, tasks="single_cell", labels=["burr cell"]).single_cell == {
        "label": "burr_cell",
        "score": 1.0,
    }
    with pytest.raises(RequestError, match="no single-cell label 'blast'; there are neutrophil"):
        analyzer(image, tasks="single_cell", labels=["blast"])
    with pytest.raises(RequestError, match="single cells"):
        analyzer(image, tasks="detection", labels=["neutrophil"])


def test_a_probability_is_of_what_was_calibrated(checkpoint):
    analyzer = Analyzer.from_pretrained(checkpoint, device="cpu")
    analyzer.model.config.trained.calibration = {"single_cell": {"slope": 1.0, "shift": 0.0, "shifts": {}}}
    answer = analyzer(crop(), tasks="single_cell").single_cell
    assert answer["probability"] == pytest.approx(answer["score"], abs=1e-4)
    for asked in ({"framing": "off"}, {"labels": ["neutrophil", "monocyte"]}):
        assert "probability" not in analyzer(crop(), tasks="single_cell", **asked).single_cell


def test_a_framing_that_there_is_not_is_refused(analyzer):
    with pytest.raises(RequestError, match="framing must be auto or off, got 'on'"):
        analyzer(crop(), tasks="single_cell", framing="on")


@pytest.mark.parametrize(
    "broken",
    [
        {"nucleus": [0.3]},
        {"nucleus": [0.3], "mean": [1, 2, 3], "deviation": [1, 2]},
        {"nucleus": [0.0], "mean": [1, 2, 3], "deviation": [1, 2, 3]},
        {"nucleus": [0.3], "mean": [1, 2, 300], "deviation": [1, 2, 3]},
    ],
)
def test_a_frame_that_cannot_be_is_named(checkpoint, tmp_path, broken):
    folder = tmp_path / "broken"
    folder.mkdir()
    for path in checkpoint.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["trained"]["crop_frame"] = broken
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UniHemaError, match="crop_frame"):
        load_model(folder, "cpu")
