"""Data of what a person corrected: what was looked at is learned, what was not is neither target nor background."""

import json

import numpy as np
import pytest
import torch
from command import run_command
from PIL import Image
from review_results import write_results
from tiny_checkpoint import save_tiny_checkpoint

from unihema import DatasetError, InputError, SmearResult
from unihema.loading import load_model
from unihema.result_folder import read_results
from unihema.review.state import Review, Target
from unihema.training.data.curation.corrections import write_corrections
from unihema.training.data.dataset import SmearDataset
from unihema.training.data.readers import load_folder
from unihema.training.data.rows import BadRowsError


FIELDS = {"a.png": ["RBC", "neutrophil", "RBC"], "b.png": ["WBC", "Platelets"], "c.png": ["RBC", "RBC"]}


@pytest.fixture
def folder(tmp_path):
    return write_results(tmp_path / "results", FIELDS)


def rows_of(folder, task="detection"):
    return {row["file_name"].split("/")[-1]: row for row in load_folder(folder, "train")[task]}


def objects(row, crowd):
    found = row["objects"]
    return [
        (tuple(box), label)
        for box, label, ignored in zip(found["bbox"], found["category"], found["iscrowd"])
        if ignored == crowd
    ]


def test_what_was_looked_at_is_learned_and_the_rest_ignored(folder, tmp_path):
    with Review(folder) as review:
        review.change("Ada", [Target("a", 1, 0)], "class", "lymphocyte")
        review.change("Ada", [Target("a", 2, 0)], "confirm")
        review.change("Ada", [Target("b", 2, 0)], "delete")
        review.draw("Ada", "b", [100, 100, 130, 120], "blast")
        head = review.log.head[1]
    done = write_corrections(folder, tmp_path / "data")
    assert (done.fields, done.whole_fields, done.cells, done.ignored, done.crops) == (2, 0, 3, 2, 0)
    rows = rows_of(tmp_path / "data")
    assert sorted(rows) == ["a.png", "b.png"], "nobody has looked at c"
    assert objects(rows["a.png"], 0) == [((2, 2, 16, 16), "lymphocyte"), ((22, 2, 16, 16), "neutrophil")]
    # Ignored for every class: for WBC also means for its kinds.
    assert objects(rows["a.png"], 1) == [((42, 2, 16, 16), name) for name in ("RBC", "WBC", "Platelets", "blast")]
    assert objects(rows["b.png"], 0) == [((100, 100, 30, 20), "blast")]
    assert {box for box, _ in objects(rows["b.png"], 1)} == {(2, 2, 16, 16)}, "the deleted platelet is background"
    for row in rows.values():
        assert sorted(row["annotated_classes"]) == sorted(
            ["RBC", "WBC", "Platelets", "neutrophil", "lymphocyte", "blast"]
        )
    assert (tmp_path / "data/train/images/a.png").read_bytes() == (tmp_path / "smears/a.png").read_bytes()
    assert json.loads((tmp_path / "data/dataset.json").read_text())["corrections"]["log"]["hash"] == head


def test_a_field_that_was_looked_through_is_known_whole(folder, tmp_path):
    with Review(folder) as review:
        review.change("Ada", [Target("a", 1, 0)], "delete")
        review.look_through("Ada", "a", review.images["a"].revision)
    write_corrections(folder, tmp_path / "data")
    (row,) = rows_of(tmp_path / "data").values()
    assert [label for _, label in objects(row, 0)] == ["neutrophil", "RBC"] and objects(row, 1) == []


def test_ignored_cells_cost_a_training_nothing(folder, tmp_path):
    with Review(folder) as review:
        review.change("Ada", [Target("a", 2, 0)], "confirm")
    write_corrections(folder, tmp_path / "data")
    classes = ["RBC", "WBC", "Platelets", "neutrophil", "lymphocyte"]
    ids = {name: number for number, name in enumerate(classes)}
    checkpoint = save_tiny_checkpoint(tmp_path / "unihema", id2label=dict(enumerate(classes)), label2id=ids)
    _, processor = load_model(checkpoint, "cpu")
    dataset = SmearDataset(list(rows_of(tmp_path / "data").values()), processor, "detection", class_names=classes)
    (labels,) = dataset.collate([dataset[0]])["labels"]
    assert len(labels["class_labels"]) == 1 and len(labels["ignored_boxes"]) == 2 * 3
    width, height = torch.tensor([200.0, 160.0])
    expected = torch.tensor([[10 / width, 10 / height, 16 / width, 16 / height]])
    assert torch.isclose(labels["ignored_boxes"], expected, atol=1e-5).all(1).any()


def test_pictures_of_one_cell_become_crops(tmp_path):
    folder = write_results(tmp_path / "results", {"x.png": "neutrophil", "y.png": "RBC", "z.png": "WBC"}, size=(60, 60))
    with Review(folder) as review:
        review.change("Ada", [Target("x", 0, 0)], "confirm")
        review.change("Ada", [Target("y", 0, 0)], "class", "lymphocyte")
    assert write_corrections(folder, tmp_path / "data").crops == 2
    rows = rows_of(tmp_path / "data", "single_cell")
    assert {name: row["label"] for name, row in rows.items()} == {"x.png": "neutrophil", "y.png": "lymphocyte"}


def test_images_seen_in_tiles_become_windows_of_their_size(tmp_path):
    tiling = {"tiles": 6, "tile": [100, 80], "scale": 1.0, "scale_source": "given"}
    folder = write_results(tmp_path / "results", {"wide.png": ["RBC"] * 12}, size=(220, 100), tiling=tiling)
    with Review(folder) as review:
        review.change("Ada", [Target("wide", 5, 0)], "confirm")
        review.change("Ada", [Target("wide", 6, 0)], "class", "neutrophil")
        review.change("Ada", [Target("wide", 12, 0)], "confirm")
    done = write_corrections(folder, tmp_path / "data")
    rows = rows_of(tmp_path / "data")
    assert sorted(rows) == ["wide_0_0.png", "wide_100_0.png"] and done.cells == 3 and done.ignored == 9
    assert objects(rows["wide_0_0.png"], 0) == [((82, 2, 16, 16), "RBC"), ((2, 22, 16, 16), "RBC")]
    assert objects(rows["wide_100_0.png"], 0) == [((2, 2, 16, 16), "neutrophil")]
    assert len({box for box, _ in objects(rows["wide_100_0.png"], 1)}) == 4
    whole = np.asarray(Image.open(tmp_path / "smears/wide.png"))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "data/train/images/wide_100_0.png")), whole[:80, 100:200])
    assert {row["source_image"] for row in rows.values()} == {"wide"}


def test_a_cell_that_a_window_cuts_is_learned_where_most_of_it_lies(tmp_path):
    tiling = {"tiles": 2, "tile": [90, 100], "scale": 1.0, "scale_source": "given"}
    folder = write_results(tmp_path / "results", {"wide.png": ["RBC"] * 11}, size=(220, 100), tiling=tiling)
    with Review(folder) as review:
        review.look_through("Ada", "wide", 0 or review.images["wide"].revision)
    write_corrections(folder, tmp_path / "data")
    rows = rows_of(tmp_path / "data")
    assert sorted(rows) == ["wide_0_0.png", "wide_130_0.png", "wide_90_0.png"]
    # From 82 to 98, cut at 90: half of it on each side.
    assert ((82, 2, 8, 16), "RBC") in objects(rows["wide_0_0.png"], 0)
    assert ((0, 2, 8, 16), "RBC") in objects(rows["wide_90_0.png"], 0)
    # From 122 to 138, cut at 130; from 202 to 218, within.
    assert ((72, 2, 16, 16), "RBC") in objects(rows["wide_130_0.png"], 0)


def test_samples_stay_together(tmp_path):
    folder = write_results(tmp_path / "results", {"p1/x.png": ["RBC"], "p1/y.png": ["RBC"], "p2/z.png": ["RBC"]})
    with Review(folder, "folder") as review:
        for name in ("x", "y", "z"):
            review.look_through("Ada", name, 0)
    write_corrections(folder, tmp_path / "data")
    slides = {name: row["slide"] for name, row in rows_of(tmp_path / "data").items()}
    assert slides == {"x.png": "p1", "y.png": "p1", "z.png": "p2"}


def stored_of(folder, name="a"):
    return next(each for each in read_results(folder) if each.name == name)


def edited_geojson(result):
    values = result.to_geojson()
    values["features"][0]["properties"]["classification"] = {"name": "lymphocyte"}
    del values["features"][2]
    return values


def edited_coco(result):
    values = result.to_coco()
    names = {category["name"]: category["id"] for category in values["categories"]}
    values["annotations"][0]["category_id"] = names["lymphocyte"]
    del values["annotations"][2]
    return values


def label_studio(result, upload=False):
    name = result.image.replace("\\", "/").split("/")[-1]
    regions = [
        {
            "type": "rectanglelabels",
            "original_width": result.width,
            "original_height": result.height,
            "value": {
                "x": 100 * cell.box[0] / result.width,
                "y": 100 * cell.box[1] / result.height,
                "width": 100 * (cell.box[2] - cell.box[0]) / result.width,
                "height": 100 * (cell.box[3] - cell.box[1]) / result.height,
                "rotation": 0,
                "rectanglelabels": [cell.label],
            },
        }
        for cell in result.cells
    ]
    place = f"/data/upload/1/1a2b3c4d-{name}" if upload else f"s3://bucket/smears/{name}"
    return [{"id": 1, "data": {"image": place}, "annotations": [{"was_cancelled": True}, {"result": regions}]}]


def edited_label_studio(result):
    values = label_studio(result, upload=True)
    regions = values[0]["annotations"][1]["result"]
    regions[0]["value"]["rectanglelabels"] = ["lymphocyte"]
    del regions[2]
    return values


@pytest.mark.parametrize(
    ("edited", "name"),
    [
        (edited_geojson, "a.geojson"),
        (edited_geojson, "a.png.geojson"),
        (edited_coco, "c.json"),
        (edited_label_studio, "project.json"),
    ],
)
def test_what_other_programs_saved_counts_as_well(folder, tmp_path, edited, name):
    (tmp_path / "edited").mkdir()
    (tmp_path / "edited" / name).write_text(json.dumps(edited(stored_of(folder).result)))
    for whole, left in ((False, {(22, 2, 16, 16)}), (True, set())):
        data = tmp_path / f"data-{whole}"
        write_corrections(folder, data, [tmp_path / "edited"], whole)
        (row,) = rows_of(data).values()
        learned = ["lymphocyte"] if not whole else ["lymphocyte", "neutrophil"]
        assert [label for _, label in objects(row, 0)] == learned
        assert {box for box, _ in objects(row, 1)} == left


@pytest.fixture
def patients(tmp_path):
    """Photographs of two patients, of the same name; their results are `01` and `p2_01`."""
    return write_results(tmp_path / "results", {"p1/01.png": ["RBC", "RBC"], "p2/01.png": ["neutrophil", "RBC"]})


@pytest.mark.parametrize("form", ["geojson", "coco", "label_studio"])
def test_images_of_one_name_are_told_apart_or_the_file_is_refused(patients, tmp_path, form):
    result = stored_of(patients, "p2_01").result
    if form == "geojson":
        values = result.to_geojson()
        values["features"][0]["properties"]["classification"] = {"name": "lymphocyte"}
    elif form == "coco":
        values = result.to_coco()
        values["images"][0]["file_name"] = "p2\\01.png"
        values["annotations"][0]["category_id"] = 5
    else:
        values = label_studio(result)
        values[0]["data"]["image"] = "/data/local-files/?d=smears/p2/01.png"
        values[0]["annotations"][1]["result"][0]["value"]["rectanglelabels"] = ["lymphocyte"]
    # As QuPath calls it, after the image, which is the name of the other result here.
    path = tmp_path / ("01.geojson" if form == "geojson" else "project.json")
    path.write_text(json.dumps(values))
    write_corrections(patients, tmp_path / "data", [path])
    (row,) = rows_of(tmp_path / "data").values()
    assert row["file_name"].endswith("p2_01.png") and objects(row, 0) == [((2, 2, 16, 16), "lymphocyte")]

    if form == "coco":
        values["images"][0]["file_name"] = "01.png"
    elif form == "label_studio":
        values[0]["data"]["image"] = "/data/upload/1/1a2b3c4d-01.png"
    else:
        return
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"\[0\]: it may be of 01 or p2_01"):
        write_corrections(patients, tmp_path / "other", [path])


def test_two_files_about_one_image_are_refused(folder, tmp_path):
    result = stored_of(folder).result
    for name, values in {"a.geojson": edited_geojson(result), "c.json": edited_coco(result)}.items():
        (tmp_path / name).write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"c.json: a is in .*a.geojson, too"):
        write_corrections(folder, tmp_path / "data", [tmp_path / "a.geojson", tmp_path / "c.json"])


@pytest.mark.parametrize("whole", [False, True])
def test_what_was_drawn_and_not_named_is_no_class_to_learn(folder, tmp_path, whole):
    values = stored_of(folder).result.to_geojson()
    ring = [[100, 100], [120, 100], [120, 120], [100, 120], [100, 100]]
    drawn = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": {}}
    values["features"] = [drawn, *values["features"]]
    (tmp_path / "a.geojson").write_text(json.dumps(values))
    done = write_corrections(folder, tmp_path / "data", [tmp_path / "a.geojson"], whole)
    (row,) = rows_of(tmp_path / "data").values()
    assert "unclassified" not in row["annotated_classes"] and (100, 100, 20, 20) in {box for box, _ in objects(row, 1)}
    assert len(objects(row, 0)) == done.cells == (3 if whole else 0)


def test_label_studio_comes_back_as_it_went(folder):
    result = stored_of(folder).result
    assert result.with_label_studio(label_studio(result)).changes == []
    values = label_studio(result)
    regions = values[0]["annotations"][1]["result"]
    regions.append(
        {"type": "polygonlabels", "value": {"points": [[50, 50], [60, 50], [60, 60]], "polygonlabels": ["blast"]}}
    )
    regions.append({"type": "choices", "value": {"choices": ["good"]}})
    turned = {"x": 50, "y": 50, "width": 10, "height": 5, "rotation": 90, "rectanglelabels": ["RBC"]}
    regions.append({"type": "rectanglelabels", "value": turned})
    edited = result.with_label_studio(values)
    assert [(change["what"], change["after"]) for change in edited.changes] == [("added", "blast"), ("added", "RBC")]
    assert edited.cells[3].box == (100, 80, 120, 96) and edited.cells[3].mask is not None
    assert edited.cells[4].box == pytest.approx((92, 80, 100, 100))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda values: values.append(values[0]), "2 of its 2 tasks"),
        (lambda values: values.clear(), "0 of its 0 tasks"),
        (lambda values: values[0].update(annotations=[{"was_cancelled": True}]), "nobody has submitted"),
        (lambda values: values[0].update(annotations=3), "annotations"),
        (
            lambda values: values[0]["annotations"][1]["result"][0].update(type="brushlabels"),
            r"result\[0\].*brushlabels",
        ),
        (lambda values: values[0]["annotations"][1]["result"][0].update(original_width=3), "3 x 160"),
        (lambda values: values[0]["annotations"][1]["result"][0]["value"].update(x="<b>"), "x is '<b>'"),
        (lambda values: values[0]["annotations"][1]["result"][0]["value"].update(width=0), "no area"),
        (lambda values: values[0]["annotations"][1]["result"][0]["value"].update(x=500), "outside"),
        (lambda values: values[0]["annotations"][1]["result"][0].update(value=None), "value"),
    ],
)
def test_what_is_no_export_of_label_studio_is_told(folder, spoil, said):
    result = stored_of(folder).result
    values = label_studio(result)
    spoil(values)
    with pytest.raises(InputError, match=said):
        result.with_label_studio(values)


def test_nothing_corrected_and_what_is_in_the_way_is_told(folder, tmp_path):
    with pytest.raises(InputError, match="no results folder"):
        write_corrections(tmp_path, tmp_path / "data")
    with pytest.raises(InputError, match="nobody has reviewed"):
        write_corrections(folder, tmp_path / "data")
    with Review(folder) as review:
        pass
    with pytest.raises(InputError, match="nobody has confirmed"):
        write_corrections(folder, tmp_path / "data")
    with Review(folder) as review:
        review.change("Ada", [Target("a", 2, 0)], "confirm")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    with pytest.raises(DatasetError, match="already"):
        write_corrections(folder, tmp_path / "there")
    other = tmp_path / "other.geojson"
    other.write_text(json.dumps({"type": "FeatureCollection", "features": []}))
    with pytest.raises(InputError, match="other.geojson: no image"):
        write_corrections(folder, tmp_path / "data", [other])
    Image.new("RGB", (200, 160)).save(tmp_path / "smears/a.png")
    with pytest.raises(InputError, match="not the image that was analysed"):
        write_corrections(folder, tmp_path / "data")
    (tmp_path / "smears/a.png").unlink()
    with pytest.raises(InputError, match="no such file"):
        write_corrections(folder, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_a_class_that_is_no_folder_is_named(tmp_path):
    folder = write_results(tmp_path / "results", {"x.png": "RBC"}, size=(60, 60))
    with Review(folder) as review:
        review.change("Ada", [Target("x", 0, 0)], "class", "../../outside")
    with pytest.raises(BadRowsError, match="cannot be a folder's name"):
        write_corrections(folder, tmp_path / "data")
    assert not (tmp_path / "data").exists() and not (tmp_path / "outside").exists()


def test_the_command_writes_them_while_the_page_is_open(folder, tmp_path):
    with Review(folder) as review:
        review.change("Ada", [Target("a", 2, 0)], "confirm")
        run = run_command("corrections", folder, "-o", tmp_path / "data")
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("1 fields (0 looked through) with 1 cells, 2 cells that nobody has looked at")
    assert isinstance(stored_of(folder).result, SmearResult)
