"""Corruptions, what follows them, and the suite that measures a model under them."""

import json
import math
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import run_config

from unihema.training.data.dataset import SmearDataset
from unihema.training.data.layouts.masks import read_mask
from unihema.training.evaluation import evaluate_model
from unihema.training.run.build import build, load_rows, training_rows
from unihema.training.studies.corruptions import CORRUPTIONS, LEVELS, shifted_rows
from unihema.training.studies.stress import run_stress


TASKS = ["detection", "segmentation", "single_cell"]


@pytest.fixture(scope="module")
def setting(smears, tmp_path_factory):
    """An untrained model, its processor, and rows of the val split."""
    config = run_config(smears, tmp_path_factory.mktemp("run"))
    # Made before the seeds of a single test are set.
    torch.manual_seed(0)
    model, processor = build(config, training_rows(config))
    model.config.trained.detection_thresholds = dict.fromkeys(model.config.label2id, 0.0)
    return model.eval(), processor, load_rows(config.data, "val", TASKS)


def field(path, boxes, size=(100, 80), **more) -> dict:
    """A detection row: a white image with a black rectangle in each box."""
    pixels = np.full((size[1], size[0], 3), 255, np.uint8)
    for x, y, w, h in boxes:
        pixels[y : y + h, x : x + w] = 0
    Image.fromarray(pixels).save(path)
    objects = {"bbox": [[float(v) for v in box] for box in boxes], "category": [f"c{n}" for n in range(len(boxes))]}
    return {
        "image": str(path),
        "file_name": path.name,
        "dataset": "test",
        "task": "detection",
        "size": size,
        "objects": objects,
    } | more


def dark_box(image: Image.Image) -> list[float]:
    """x, y, width, height of what is dark."""
    ys, xs = np.nonzero(np.asarray(image.convert("L")) < 128)
    return [xs.min(), ys.min(), xs.max() - xs.min() + 1, ys.max() - ys.min() + 1]


@pytest.mark.parametrize("name", [name for name, kind in CORRUPTIONS.items() if kind.apply])
def test_a_corruption_keeps_the_size_grows_and_repeats_itself(name, smears, setting):
    rows = setting[2]["detection"][:1]
    original = np.asarray(Image.open(rows[0]["image"]).convert("RGB"), float)
    distances = []
    for severity in range(1, LEVELS + 1):
        (row,) = shifted_rows(rows, CORRUPTIONS[name], severity)
        image = row["image"].opened()
        assert image.mode == "RGB" and image.size == Image.open(rows[0]["image"]).size
        assert image.tobytes() == row["image"].opened().tobytes()
        distances.append(np.abs(np.asarray(image, float) - original).mean())
    # A disc within a pixel is no blur, so the first may be none.
    assert distances[1] > 0.1
    if not CORRUPTIONS[name].zooms:
        # 2 % more for the quantisation of JPEG, which is no strict order.
        assert all(far > 0.98 * near for near, far in zip(distances, distances[1:])), distances


@pytest.mark.parametrize("name", ["smaller_cells", "larger_cells"])
@pytest.mark.parametrize("severity", [1, 3])
def test_boxes_and_masks_follow_a_magnification(tmp_path, name, severity):
    """Within a pixel and a half: edges of a resized image are soft."""
    kind = CORRUPTIONS[name]
    (row,) = shifted_rows([field(tmp_path / "a.png", [(44, 30, 14, 10)])], kind, severity)
    expected = row["objects"]["bbox"][0]
    np.testing.assert_allclose(dark_box(row["image"].opened()), expected, atol=1.5)
    assert expected[2] == pytest.approx(14 * kind.amounts[severity - 1])
    mask = np.zeros((80, 100), np.uint8)
    mask[30:40, 44:58] = 1
    (of_mask,) = shifted_rows(
        [row | {"task": "segmentation", "image": row["image"].source, "mask": mask}], kind, severity
    )
    np.testing.assert_allclose(dark_box(Image.fromarray(255 - 255 * read_mask(of_mask["mask"]))), expected, atol=1.5)


def test_cells_that_a_magnification_cuts_off_are_no_targets(tmp_path):
    # Twice as large about (50, 40): x 25 and y 20 become the edge.
    boxes = [(44, 30, 14, 10), (0, 0, 20, 15), (23, 35, 10, 10), (20, 35, 6, 10)]
    crowd = [0, 0, 1, 0]
    row = field(tmp_path / "a.png", boxes)
    row["objects"]["iscrowd"] = crowd
    (shifted,) = shifted_rows([row], CORRUPTIONS["larger_cells"], 3)
    assert CORRUPTIONS["larger_cells"].amounts[2] == 2
    assert shifted["objects"]["category"] == ["c0", "c2"] and shifted["objects"]["iscrowd"] == [0, 1]
    np.testing.assert_allclose(shifted["objects"]["bbox"], [[38, 20, 28, 20], [0, 30, 16, 20]])
    assert row["objects"]["bbox"][0] == [44.0, 30.0, 14.0, 10.0]


def test_density_shares_out_the_fields_of_each_data_set(tmp_path):
    boxes = [(5 * n, 5, 4, 4) for n in range(20)]
    rows = [
        field(tmp_path / f"{dataset}{count}.png", boxes[:count], dataset=dataset)
        for dataset, counts in (("few", [3, 1, 2, 5, 4]), ("many", range(19, 9, -1)))
        for count in counts
    ]
    parts = [shifted_rows(rows, CORRUPTIONS["density"], severity) for severity in range(1, LEVELS + 1)]
    counts = [[len(row["objects"]["bbox"]) for row in part] for part in parts]
    assert counts == [[1, 10, 11], [2, 12, 13], [3, 14, 15], [4, 16, 17], [5, 18, 19]]


def test_severity_0_is_the_clean_figure_and_is_measured_first(setting, tmp_path):
    model, processor, rows = setting
    report = run_stress(model, processor, rows, tmp_path, ["noise"], [0, 2], bootstrap=20, progress=False)
    plain = evaluate_model(model, processor, rows, bootstrap=20, progress=False)
    assert [(point["task"], point["severity"]) for point in report["points"]] == [
        (task, severity) for severity in (0, 2) for task in TASKS
    ]
    for point, figure in zip(report["points"], ("mAP50", "dice", "macro_f1")):
        found = plain[point["task"]]
        assert point["figure"] == figure and point["value"] == found[figure] and point["rows"] == found["rows"]
        assert point.get("interval") == found["intervals"].get(figure)
    errors = {name: values["count_error"] for name, values in plain["detection"]["at_threshold"].items()}
    assert report["points"][0]["count_error"] == {name: e for name, e in errors.items() if e is not None}
    # The rows that are measured are as they were.
    assert shifted_rows(rows["detection"], CORRUPTIONS["noise"], 0) == list(rows["detection"])


def test_a_corrupted_image_reaches_the_model(setting):
    model, processor, rows = setting
    options = {"class_names": list(model.config.label2id), "evaluation": True}
    clean, noisy = (
        SmearDataset(shifted_rows(rows["detection"], CORRUPTIONS["noise"], severity), processor, "detection", **options)
        for severity in (0, 5)
    )
    change = (noisy[0]["image"].float() - clean[0]["image"].float()).flatten()
    assert change.std() == pytest.approx(CORRUPTIONS["noise"].amounts[-1], rel=0.3) and clean[0]["image"].ndim == 3


def test_a_stopped_run_goes_on_and_writes_tables_and_curves(setting, tmp_path):
    model, processor, rows = setting
    rows = {"detection": rows["detection"]}
    run = {"bootstrap": 0, "progress": False, "settings": {"checkpoint": "a"}}
    run_stress(model, processor, rows, tmp_path, ["jpeg"], [1], **run)
    record = tmp_path / "stress.json"
    written = json.loads(record.read_text())
    written["runs"]["detection clean 0"]["result"]["value"] = 0.123456
    record.write_text(json.dumps(written))
    report = run_stress(model, processor, rows, tmp_path, ["jpeg", "density"], [1, 5], **run)
    # The clean point, marked above, was not measured again.
    assert report["points"][0]["value"] == 0.123456
    places = [(point["corruption"], point["severity"]) for point in report["points"]]
    # Of two fields the densest fifth is empty, so it is left out.
    assert places == [("clean", 0), ("jpeg", 1), ("jpeg", 5), ("density", 1)]
    written = json.loads(record.read_text())
    assert [run["result"] for run in written["runs"].values()] == report["points"]
    assert written["settings"] == report["settings"]
    text = (tmp_path / "stress.md").read_text()
    assert "| jpeg | 0.123 |" in text and "## detection: mAP50" in text and "| jpeg | quality | 50 | 30 |" in text
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]
    if find_spec("matplotlib"):
        assert Image.open(tmp_path / "stress.png").width > 500

    with pytest.raises(
        ValueError, match="begun with checkpoint='a'; now it is 'b'.*start anew .--overwrite, or delete .*stress.json"
    ):
        run_stress(model, processor, rows, tmp_path, ["jpeg"], [1], **run | {"settings": {"checkpoint": "b"}})
    again = run_stress(model, processor, rows, tmp_path, ["jpeg"], [1], **run | {"overwrite": True})
    assert len(again["points"]) == 2 and again["points"][0]["value"] != 0.123456
    record.write_text("{")
    with pytest.raises(ValueError, match="stress.json: not readable as JSON"):
        run_stress(model, processor, rows, tmp_path, ["jpeg"], [1], **run)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"corruptions": ["fog"]}, "Unknown corruption 'fog'; choose among defocus"),
        ({"severities": [6]}, "Severities go from 0 .as it is. to 5, got 6"),
        ({"rows_by_task": {"cloze": []}}, "cloze is not measured under corruptions; choose among detection"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(setting, tmp_path, arguments, message):
    model, processor, rows = setting
    with pytest.raises(ValueError, match=message):
        run_stress(model, processor, **{"rows_by_task": rows, "output": tmp_path, **arguments}, progress=False)
    assert not list(tmp_path.iterdir())


def test_stain_and_light_change_what_they_say(tmp_path):
    """A blue nucleus on white: less of the dye makes it paler, more light lighter, warm light redder. Grey values."""
    pixels = np.full((40, 40, 3), 240, np.uint8)
    pixels[10:30, 10:30] = (90, 60, 160)
    image = Image.fromarray(pixels)

    def centre(name, severity):
        kind = CORRUPTIONS[name]
        changed = kind.apply(image, kind.amounts[severity - 1], np.random.default_rng(0))
        return np.asarray(changed, float)[20, 20], np.asarray(changed, float)[2, 2]

    nucleus, ground = centre("pale_stain", 3)
    # 0.45 of the density: the background to the power of 0.55 times the colour to the power of 0.45.
    np.testing.assert_allclose(nucleus, 240 ** (1 - 0.45) * np.array([90, 60, 160]) ** 0.45, atol=1.5)
    np.testing.assert_allclose(ground, 240, atol=1)
    assert (centre("strong_stain", 3)[0] < [90, 60, 160]).all()
    assert centre("warm_light", 3)[0][0] > 90 and centre("warm_light", 3)[0][2] < 160
    # A stop less is half the light: linear((90/255)) / 2 = 0.0511, in sRGB again 64.
    assert centre("underexposure", 2)[0][0] == pytest.approx(_half_lit(90), abs=1)
    assert (centre("overexposure", 5)[1] == 255).all()


def _half_lit(value: float) -> float:
    linear = ((value / 255 + 0.055) / 1.055) ** 2.4 / 2
    return 255 * (1.055 * math.pow(linear, 1 / 2.4) - 0.055)
