"""Forms of other programs: what goes out comes in again as it was, and what a person changed is said."""

import io
import json
import re
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unihema import SmearResult, UniHemaError
from unihema.errors import InputError, PackageMissingError, RequestError
from unihema.processing_unihema.masks import polygon_mask
from unihema.results.export import as_file, label_studio_config
from unihema.results.smear_result import Cell


WIDTH, HEIGHT = 300, 200


def smear(seed: int = 0, number: int = 12) -> SmearResult:
    """Cells at places to the last bit: with masks of many parts with holes, with none, overlapping and at the edge."""
    random = np.random.default_rng(seed)
    cells = []
    for place in range(number):
        x, y = random.uniform(0, WIDTH - 45), random.uniform(0, HEIGHT - 45)
        box = (x, y, x + random.uniform(1, 40), y + random.uniform(1, 40))
        mask = None
        if place % 3:
            shape = int(np.ceil(box[3]) - np.floor(y)), int(np.ceil(box[2]) - np.floor(x))
            mask = random.random(shape) < (0.7 if place % 2 else 0.97)
        attributes = {"granule colour": {"value": "rosé = +1", "score": random.random()}} if place % 2 else {}
        cells.append(
            Cell(place + 1, box, ["neutrophil", "RBC, young", "𝛼-cell\n"][place % 3], 1 - place / 40, attributes, mask)
        )
    cells.append(Cell(number + 1, (0, 0, WIDTH, 20.5), "RBC, young", 0.1, {}, np.ones((21, WIDTH), bool)))
    cells.append(Cell(number + 2, (250, 150, 260, 160), "neutrophil", 0.05, {}, np.zeros((10, 10), bool)))
    return SmearResult(WIDTH, HEIGHT, cells, ["neutrophil", "RBC, young", "𝛼-cell\n"], image="a/smear.png")


def through(result: SmearResult, form: str, folder: Path, onto: SmearResult | None = None) -> SmearResult:
    ending, content = as_file(result, form)
    path = folder / f"smear{ending}"
    path.write_bytes(content)
    return getattr(onto or result, f"with_{form}")(path)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("form", ["geojson", "coco", "labels", "imagej"])
def test_what_was_not_changed_comes_back_to_the_last_bit(form, seed, tmp_path):
    before = smear(seed)
    after = through(before, form, tmp_path)
    assert after.to_dict() == before.to_dict()
    assert [cell.box for cell in after.cells] == [cell.box for cell in before.cells]


@pytest.mark.parametrize("box", [(5, 5, 5, 5), (5, 2, 5, 9), (20, 20, 20, 20)])
def test_a_cell_without_area_comes_back(box, tmp_path):
    result = SmearResult(20, 20, [Cell(1, box, "RBC", 0.5)], ["RBC"], image="a.png")
    (tmp_path / "rois.zip").write_bytes(result.to_imagej())
    for again in (result.with_geojson(result.to_geojson()), result.with_imagej(tmp_path / "rois.zip")):
        assert again.to_dict() == result.to_dict()


@pytest.mark.parametrize("form", ["geojson", "coco", "imagej"])
def test_a_file_alone_has_the_cells(form, tmp_path):
    before = smear()
    # An empty mask is told from none by COCO alone.
    before.cells = [cell for cell in before.cells if cell.mask is None or cell.mask.any()]
    after = through(before, form, tmp_path, SmearResult(WIDTH, HEIGHT, image="a/smear.png"))
    own = [cell.to_dict() | {"id": 0} for cell in before.cells]
    assert [cell.to_dict() | {"id": 0} for cell in after.cells] == own
    assert [change["what"] for change in after.changes] == ["added"] * len(own)


def annotated(tasks: list) -> list:
    """What Label Studio exports of tasks whose predictions a person took over as they are: regions keep their ids."""
    tasks = json.loads(json.dumps(tasks))
    for number, task in enumerate(tasks, 1):
        (prediction,) = task.pop("predictions")
        regions = [{**region, "origin": "prediction"} for region in prediction["result"]]
        task |= {"id": number, "annotations": [{"id": 1, "was_cancelled": False, "result": regions}]}
    return tasks


@pytest.mark.parametrize("seed", range(3))
def test_label_studio_predictions_that_are_taken_over_change_nothing(seed, tmp_path):
    before = smear(seed)
    before.cells.append(Cell(15, (300, 10, 300, 12), "RBC, young", 0.01))
    # Of one part without holes.
    before.cells.append(Cell(16, (-1, 10.5, 5, 14), "neutrophil", 0.01, {}, np.tri(4, 6, dtype=bool)))
    ending, content = as_file(before, "label_studio")
    tasks = json.loads(content)
    (task,) = tasks
    kinds = {region["type"] for region in task["predictions"][0]["result"]}
    assert kinds == {"rectanglelabels", "polygonlabels"}
    with pytest.raises(InputError, match="annotations"):
        # What a program predicted is no correction.
        before.with_label_studio(tasks)
    (tmp_path / f"a{ending}").write_text(json.dumps(annotated(tasks)))
    assert before.with_label_studio(tmp_path / f"a{ending}").to_dict() == before.to_dict()


def test_label_studio_regions_that_are_moved_renamed_and_drawn_are_known_by_their_ids():
    before = smear()
    before.cells[1].mask = np.ones_like(before.cells[1].mask)
    (task,) = annotated(before.to_label_studio())
    regions = task["annotations"][0]["result"]
    assert regions[1]["type"] == "polygonlabels"
    regions[0]["value"] |= {"x": 10, "y": 20, "width": 5, "height": 10, "rectanglelabels": ["blast"]}
    regions[1]["value"]["points"] = [[10, 10], [20, 10], [20, 20]]
    del regions[4]
    regions.append({**regions[2], "id": "a1b2c3"})
    after = before.with_label_studio([task])
    assert [(change["cell"], change["what"]) for change in after.changes] == [
        (1, "class"), (1, "shape"), (2, "shape"), (15, "added"), (5, "deleted"),
    ]  # fmt: skip
    assert after.cells[0].box == pytest.approx((30, 40, 45, 60)) and after.cells[0].label == "blast"
    assert after.cells[1].box == pytest.approx((30, 20, 60, 40)) and after.cells[1].mask.mean() == pytest.approx(
        0.5, abs=0.05
    )


@pytest.mark.parametrize(
    "name", ["b.png", "a/ü %41 & b?.png", "c:\\smears\\a.png", "http://[", "\udcff\ud800.png", None], ids=ascii
)  # fmt: skip
def test_label_studio_finds_the_image_by_any_name(name):
    result = SmearResult(9, 9, [Cell(1, (1, 2, 3, 4), "RBC", 0.5)], ["RBC"], image=name)
    (task,) = annotated(result.to_label_studio())
    json.dumps(task).encode()
    assert task["data"]["image"].startswith("/data/local-files/?d=")
    assert result.with_label_studio([{"data": {"image": "other.png"}}, task]).changes == []
    (task,) = annotated(result.to_label_studio("https://lab.example/smears/field.png?token=1"))
    with pytest.raises(InputError, match="0 of its 1 tasks"):
        result.with_label_studio([task])


def test_the_labelling_configuration_has_every_class_as_text():
    from xml.etree import ElementTree

    classes = ["RBC", '"/><Script>alert(1)</Script>', "a\n\x00\ud800\ufffe", "<!--"]
    view = ElementTree.fromstring(label_studio_config(classes).encode())
    assert [child.tag for child in view] == ["Image", "RectangleLabels", "PolygonLabels"]
    for control in view[1:]:
        assert control.get("toName") == "image"
        assert [label.get("value") for label in control] == [*classes[:2], "a\\n\\x00\\ud800?", "<!--"]
        assert all(re.fullmatch("#[0-9a-f]{6}", label.get("background")) for label in control)


def qupath(collection: dict) -> dict:
    """As QuPath writes what it read: coordinates in 32 bits, other order of features, corners and keys, measurements in its
    older form."""

    def moved(ring):
        points = [[float(np.float32(value)) for value in point] for point in ring[:-1]][::-1]
        points = points[2:] + points[:2]
        return [*points, points[0]]

    features = []
    for feature in reversed(collection["features"]):
        feature = json.loads(json.dumps(feature))
        geometry = feature["geometry"]
        if geometry["type"] == "Polygon":
            geometry["coordinates"] = [moved(ring) for ring in geometry["coordinates"]]
        else:
            geometry["coordinates"] = [[moved(ring) for ring in rings] for rings in geometry["coordinates"][::-1]]
        measurements = feature["properties"].get("measurements", {})
        feature["properties"]["measurements"] = [{"name": name, "value": of} for name, of in measurements.items()]
        features.append(feature)
    return {"type": "FeatureCollection", "features": features}


def test_what_qupath_writes_of_a_result_changes_nothing():
    before = smear()
    before.mask = np.zeros((HEIGHT // 2, WIDTH // 2), np.uint8)
    before.mask[10:20, 10:30] = 1
    assert before.with_geojson(qupath(before.to_geojson())).to_dict() == before.to_dict()


def test_what_a_person_changes_is_said_by_cell():
    before = smear()
    stored = before.to_dict()
    collection = qupath(before.to_geojson())
    features = {feature["properties"]["metadata"]["unihema cell"]: feature for feature in collection["features"]}
    features["2"]["properties"]["classification"]["name"] = "lymphocyte"
    features["5"]["geometry"] = {"type": "Polygon", "coordinates": [[[10, 20], [30, 20], [30, 41], [10, 41], [10, 20]]]}
    features["4"]["geometry"] = {"type": "Polygon", "coordinates": [[[1.5, 2], [9, 2], [9, 8], [1.5, 8], [1.5, 2]]]}
    features["2"]["properties"]["metadata"]["granule colour"] = "blue"
    collection["features"].remove(features["7"])
    drawn = {"type": "Polygon", "coordinates": [[[-5, 100], [20, 100], [20, 130], [-5, 100]]]}
    named = {"objectType": "annotation", "classification": {"name": "blast", "color": [1, 2, 3]}}
    region = {"objectType": "annotation"}
    collection["features"] += [
        {"type": "Feature", "id": "new", "geometry": drawn, "properties": named},
        {"type": "Feature", "id": "region", "geometry": drawn, "properties": region},
        # A copy is another cell.
        {**features["3"], "id": "copy"},
    ]
    after = before.with_geojson(collection)
    assert before.to_dict() == stored
    said = [(change["cell"], change["what"], change["before"], change["after"]) for change in after.changes]
    assert sorted(said, key=str) == sorted(
        [
            (2, "class", "RBC, young", "lymphocyte"),
            (2, "attribute granule colour", "rosé = +1", "blue"),
            (5, "shape", None, None),
            (4, "shape", None, None),
            (7, "deleted", "neutrophil", None),
            (15, "added", None, "blast"),
            (16, "added", None, before.cells[2].label),
        ],
        key=str,
    )
    cells = {cell.id: cell for cell in after.cells}
    assert cells[5].box == (10, 20, 30, 41) and cells[5].mask.all()
    assert cells[4].box == (1.5, 2, 9, 8) and cells[4].mask is None
    # What lies beyond the image is no part of it.
    assert cells[15].box == (0, 100, 20, 130) and cells[15].score == 1
    assert cells[15].mask.sum() == pytest.approx(1.2 * (5 + 25) / 2 * 20, rel=0.02)
    assert after.counts["lymphocyte"] == 1 and after.counts["blast"] == 1
    # A report does not leave open what a person has said.
    assert (cells[2].probability, cells[2].odd) == (1.0, None)
    # Stored and read again, with what was changed.
    assert SmearResult.from_dict(json.loads(json.dumps(after.to_dict()))).to_dict() == after.to_dict()
    assert after.with_geojson(after.to_geojson()).to_dict() == after.to_dict()


def test_instances_that_are_painted_over_erased_and_new(tmp_path):
    cells = [Cell(1, (10.5, 10, 20, 20), "A", 0.9), Cell(2, (40, 40, 50, 50), "B", 0.8, {}, np.ones((10, 10), bool)),
             Cell(3, (41, 41, 49, 49), "hidden", 0.1)]  # fmt: skip
    before = SmearResult(100, 80, cells, ["A", "B"])
    labels = before.to_labels()
    assert labels.dtype == np.uint16 and (labels[10:20, 10:20] == 1).all() and not (labels == 3).any()
    labels[labels == 1] = 0
    labels[40:50, 45:52] = 2
    labels[70:75, 5:9] = 9
    Image.fromarray(labels).save(tmp_path / "edited.tif")
    after = before.with_labels(tmp_path / "edited.tif", label="C")
    assert [(change["cell"], change["what"]) for change in after.changes] == [
        (2, "shape"),
        (4, "added"),
        (1, "deleted"),
    ]
    assert [(cell.id, cell.label) for cell in after.cells] == [(2, "B"), (3, "hidden"), (4, "C")]
    assert after.cells[0].box == (40, 40, 52, 50) and after.cells[2].box == (5, 70, 9, 75)
    assert after.cells[1] is not before.cells[2] and after.cells[1] == before.cells[2]


def test_more_than_65535_instances_are_a_tiff(tmp_path):
    result = SmearResult(40, 30, [Cell(70_000, (3, 4, 9, 9), "A", 0.5), Cell(3, (20, 4, 29, 9), "A", 0.5)], ["A"])
    assert as_file(result, "labels")[0] == "_labels.tif"
    assert through(result, "labels", tmp_path).to_dict() == result.to_dict()


def test_other_programs_coco(tmp_path):
    """Compressed runs, polygons, and no keys but those of COCO."""
    from faster_coco_eval.core import mask as coco_mask

    before = smear()
    values = before.to_coco()
    for annotation in values["annotations"]:
        annotation["bbox"] = [round(value, 2) for value in annotation["bbox"]]
        annotation["id"] += 100
        for name in ("cell_id", "attributes", "attribute_scores", "score"):
            annotation.pop(name, None)
        if "segmentation" in annotation:
            packed = coco_mask.frPyObjects(annotation["segmentation"], HEIGHT, WIDTH)
            annotation["segmentation"] = {**packed, "counts": packed["counts"].decode()}
    values["images"][0]["file_name"] = "other/folder\\smear.png"
    after = before.with_coco(values)
    assert after.to_dict() == before.to_dict()
    # Ids as pylabel and pandas write them: as text, and with a point.
    for annotation in values["annotations"]:
        annotation["image_id"], annotation["category_id"] = "1", float(annotation["category_id"])
    assert before.with_coco(values).to_dict() == before.to_dict()
    polygon = {
        "id": 1,
        "image_id": 1,
        "category_id": 1,
        "bbox": [5, 5, 10, 10],
        "segmentation": [[5, 5, 15, 5, 15, 15, 5, 15]],
    }
    drawn = before.with_coco(values | {"annotations": [polygon, polygon | {"iscrowd": 1}]})
    assert len(drawn.cells) == 1 and drawn.cells[0].box == (5, 5, 15, 15) and drawn.cells[0].mask.all()


def test_imagej_reads_what_is_written_and_a_person_renames_moves_and_draws(tmp_path):
    roifile = pytest.importorskip("roifile")
    before = smear()
    ending, content = as_file(before, "imagej")
    assert as_file(before, "imagej") == (ending, content)
    path = tmp_path / "rois.zip"
    path.write_bytes(content)
    rois = roifile.roiread(path)
    assert rois[0].name == "1 neutrophil" and rois[0].roitype == roifile.ROI_TYPE.RECT
    by_number = {roi.name.partition(" ")[0]: roi for roi in rois}
    assert {len(roi.coordinates(multi=True)) > 1 for roi in rois} == {True, False}
    by_number["1"].name = "1 eosinophil"
    del by_number["4"]
    new = roifile.ImagejRoi.frompoints([[50, 50], [70, 50], [70, 80]], name="blast")
    unnamed = roifile.ImagejRoi(
        roitype=roifile.ROI_TYPE.OVAL, left=100, top=100, right=120, bottom=110, name="0105-0110"
    )
    path.unlink()
    roifile.roiwrite(path, [*by_number.values(), new, unnamed])
    after = before.with_imagej(path)
    assert [(change["cell"], change["what"], change["after"]) for change in after.changes] == [
        (1, "class", "eosinophil"),
        (15, "added", "blast"),
        (16, "added", "unclassified"),
        (4, "deleted", None),
    ]
    assert after.cells[-1].mask.sum() == pytest.approx(np.pi * 10 * 5, rel=0.06)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("line.roi", roifile.ImagejRoi(roitype=roifile.ROI_TYPE.LINE).tobytes())
    with pytest.raises(InputError, match=r"rois.zip: line.roi: a line has no inside"):
        before.with_imagej(path)


def test_supervision_has_the_cells():
    pytest.importorskip("supervision")
    result = smear()
    plain = result.to_supervision()
    assert plain.mask is None and len(plain) == len(result.cells)
    assert plain.xyxy.tolist() == [list(cell.box) for cell in result.cells]
    assert plain.data["class_name"].tolist() == [cell.label for cell in result.cells]
    assert plain[plain.confidence > 0.5].data["cell_id"].tolist() == [c.id for c in result.cells if c.score > 0.5]
    result.cells = [cell for cell in result.cells if cell.mask is not None]
    masked = result.to_supervision()
    assert masked.mask.sum((1, 2)).tolist() == [cell.mask.sum() for cell in result.cells]
    assert len(SmearResult(5, 5).to_supervision()) == 0


@pytest.mark.parametrize("package, call", [("roifile", "to_imagej"), ("supervision", "to_supervision")])
def test_a_missing_package_names_its_extra(package, call, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(PackageMissingError, match=r"pip install 'unihema\["):
        getattr(smear(), call)()


def test_images_too_large_for_a_form_name_another():
    wide = SmearResult(
        70_000, 10_000, [Cell(1, (69_000, 9_000, 69_050, 9_040), "A", 0.5, {}, np.ones((40, 50), bool))], ["A"]
    )
    for form in ("labels", "imagej"):
        with pytest.raises(RequestError, match="Use GeoJSON"):
            as_file(wide, form)
    # Others lay no image out.
    assert wide.with_geojson(wide.to_geojson()).changes == wide.with_coco(wide.to_coco()).changes == []


ROI = b"Iout" + struct.pack(">hBxhhhhH16xhi4s4shhBBhii", 229, 0, 1, 1, 9, 9, 4, 0, 0, b"", b"", 0, 0, 0, 0, 0, 0, 0)


def feature(**changed):
    shape = {"type": "Polygon", "coordinates": [[[1, 1], [5, 1], [5, 9], [1, 1]]]}
    return {"type": "Feature", "geometry": shape, "properties": {"classification": {"name": "A"}}} | changed


def annotation(**changed):
    image = {"id": 1, "file_name": "a/smear.png", "width": WIDTH, "height": HEIGHT}
    one = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]} | changed
    return {"images": [image], "categories": [{"id": 1, "name": "A"}], "annotations": [one]}


def shape(kind, coordinates):
    return {"type": kind, "coordinates": coordinates}


@pytest.mark.parametrize(
    "form, content, said",
    [
        ("geojson", [feature(geometry=shape("Point", [1, 2]))], r"features\[0\]: its geometry is 'Point'"),
        ("geojson", [feature(geometry=shape("Polygon", [[[1, 2], [3, float("nan")], [1, 1]]]))], "coordinate is nan"),
        ("geojson", [feature(geometry=shape("Polygon", [[[1, 2], [3, 4]]]))], "three corners"),
        ("geojson", [feature(geometry=shape("MultiPolygon", []))], "outline is empty"),
        ("geojson", [feature(geometry=shape("Polygon", [[[900, 1], [950, 1], [950, 90]]]))], "outside the image"),
        ("geojson", [feature(geometry=shape("Polygon", [[[1e300, 1], [950, 1], [950, 90]]]))], "coordinate is 1e"),
        ("geojson", [feature(properties={"classification": {"name": 7}})], "classification is 7, and a text"),
        ("geojson", [feature(), 5], r"features\[1\]: its value is 5"),
        ("geojson", {"type": "Topology"}, "no GeoJSON FeatureCollection"),
        ("coco", annotation(bbox=[1, 2, 3]), r"annotations\[0\]: its bbox has 3 numbers"),
        ("coco", annotation(bbox=[1, 2, -3, 4]), "-3.0 x 4.0"),
        ("coco", annotation(category_id=5), "category 5"),
        ("coco", annotation(segmentation={"size": [3, 3], "counts": [9]}), r"of \[3, 3\] pixels"),
        ("coco", annotation(segmentation={"size": [HEIGHT, WIDTH], "counts": "zzzz"}), "annotations"),
        ("coco", annotation(segmentation={"size": [HEIGHT, WIDTH], "counts": [5]}), "add up to 5"),
        ("coco", annotation() | {"images": []}, "0 of its 0 images"),
        ("coco", annotation(image_id=2), r"annotations\[0\]: its image 2 is not among the images"),
        ("coco", annotation(image_id=1.5), r"annotations\[0\]: its id is 1.5"),
        ("coco", annotation() | {"categories": [{"id": 1, "name": "A"}, {"id": "1", "name": "B"}]}, "1 is the id of A and of B"),
        ("coco", annotation() | {"images": annotation()["images"] + [{"id": 1, "file_name": "b.png"}]}, "2 .* have the id 1"),
        ("coco", [], "an object is expected"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_names_file_and_entry(form, content, said, tmp_path):
    path = tmp_path / "edited.json"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=said) as caught:
        getattr(smear(), f"with_{form}")(path)
    assert str(caught.value).startswith(str(path))


def packed(**entries: bytes) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, data in entries.items():
            archive.writestr(f"{name}.roi", data)
    return content.getvalue()


@pytest.mark.parametrize(
    "form, content",
    [
        ("geojson", b"\xff{"), ("geojson", b"[" * 100_000), ("coco", b"{}"), ("labels", b"no image"),
        ("imagej", b"PK no zip"), ("imagej", packed(a=b"Iout")), ("imagej", packed(a=ROI)), ("imagej", packed(a=ROI[:70])),
    ],
)  # fmt: skip
def test_damaged_files_are_named(form, content, tmp_path):
    path = tmp_path / "damaged"
    path.write_bytes(content)
    with pytest.raises(UniHemaError, match="damaged: ") as caught:
        getattr(smear(), f"with_{form}")(path)
    assert "\n" not in str(caught.value)
    for missing in (tmp_path / "none", tmp_path):
        with pytest.raises(UniHemaError, match="cannot be read|not a regular file"):
            getattr(smear(), f"with_{form}")(missing)


def test_labels_of_another_size_or_kind_are_refused(tmp_path):
    Image.new("L", (7, 9)).save(tmp_path / "other.png")
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "colour.png")
    for name in ("other.png", "colour.png"):
        with pytest.raises(InputError, match=f"{name}: an image of instances .* {WIDTH} x {HEIGHT}"):
            smear().with_labels(tmp_path / name)
    with pytest.raises(InputError, match="whole numbers"):
        smear().with_labels(np.zeros((HEIGHT, WIDTH)))
    pages = [Image.new("I", (WIDTH, HEIGHT), number) for number in (0, 1)]
    pages[0].save(tmp_path / "stack.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(InputError, match=r"stack.tif: 2 pages, and an image of instances has one"):
        smear().with_labels(tmp_path / "stack.tif")


def test_pixels_whose_centre_lies_inside():
    triangle = [[[0, 0], [8, 0], [0, 8]]]
    mask = polygon_mask([triangle], (0, 0, 8, 8))
    ys, xs = np.indices((8, 8)) + 0.5
    assert (mask == (xs + ys < 8)).all()
    # Clipped, and twice around is a hole.
    assert (polygon_mask([triangle], (2, 1, 6, 5)) == mask[1:5, 2:6]).all()
    assert not polygon_mask([triangle * 2], (0, 0, 8, 8)).any()
