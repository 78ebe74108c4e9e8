"""Archives and folders turned into data folders: what is kept, what is refused, and nothing half written."""

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from data_folders import write_coco, write_lines, write_mask, write_photograph, write_voc
from PIL import Image

from unihema.errors import DatasetError
from unihema.training.data.curation.archives import ArchiveError, ArchiveLimits
from unihema.training.data.curation.catalog import find_entry
from unihema.training.data.curation.prepare import prepare_data
from unihema.training.data.readers import load_folder
from unihema.training.data.rows import BadRowsError


def zipped(folder: Path) -> Path:
    return Path(shutil.make_archive(str(folder), "zip", folder))


@pytest.fixture
def voc(tmp_path):
    """A VOC data set of 20 photographs inside a folder of its own."""
    folder = tmp_path / "downloads" / "voc"
    for number in range(20):
        write_photograph(folder / "BCCD" / "JPEGImages" / f"{number:02}.png", number, (48, 36))
        objects = [("RBC", (1, 2, 11, 12)), ("Platelets", (20, 20, 25, 26)), ("blob", (30, 1, 40, 9))]
        write_voc(folder / "BCCD" / "Annotations" / f"{number:02}.xml", f"{number:02}.png", *objects)
    return folder


def test_an_archive_becomes_a_data_folder(voc, tmp_path):
    archive = zipped(voc)
    prepared = prepare_data(archive, tmp_path / "out", entry=find_entry("detection/bccd"), val_share=0.3)
    assert prepared.layout == "voc" and prepared.left_out == []
    assert prepared.unmapped == {"detection": ["blob"]}
    train, val = (load_folder(tmp_path / "out", split)["detection"] for split in ("train", "val"))
    assert len(train) + len(val) == 20 and len(val) == prepared.counts["val"]["detection"] > 0
    assert train[0]["objects"]["category"] == ["RBC", "platelet", "blob"]
    assert train[0]["objects"]["bbox"] == [[1, 2, 10, 10], [20, 20, 5, 6], [30, 1, 10, 8]]
    written = sorted(path.read_bytes() for path in (tmp_path / "out").rglob("*.png"))
    assert written == sorted(path.read_bytes() for path in voc.rglob("*.png"))
    described = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert described["catalog"] == "detection/bccd" and described["licence"] == "MIT"
    assert described["source"] == archive.name and len(described["source_sha256"]) == 64
    assert described["counts"] == prepared.counts
    assert sorted(path.name for path in tmp_path.iterdir()) == ["downloads", "out"]


def test_a_photograph_falls_into_the_same_split_whatever_its_name(voc, tmp_path):
    prepare_data(voc, tmp_path / "one", val_share=0.5)
    for number, path in enumerate(sorted((voc / "BCCD" / "JPEGImages").iterdir())):
        path.rename(path.with_name(f"x{number:02}.png"))
    for path in list((voc / "BCCD" / "Annotations").iterdir()):
        write_voc(path.with_name(f"x{path.name}"), None, ("RBC", (1, 2, 3, 4)))
        path.unlink()
    prepare_data(voc, tmp_path / "two", val_share=0.5)
    splits = [
        {path.read_bytes(): path.parts[-3] for path in (tmp_path / name).rglob("*.png")} for name in ("one", "two")
    ]
    assert splits[0] == splits[1] and set(splits[0].values()) == {"train", "val"}


def test_names_can_be_kept_or_given(voc, tmp_path):
    kept = prepare_data(voc, tmp_path / "kept", official_names=False)
    assert kept.labels == {} and kept.unmapped == {}
    names = load_folder(tmp_path / "kept", "train")["detection"][0]["annotated_classes"]
    assert names == ["Platelets", "RBC", "blob"]
    given = prepare_data(voc, tmp_path / "given", rename={"blob": "artefact", "RBC": "red cell"})
    assert given.labels["detection"] == {"Platelets": "platelet", "RBC": "red cell", "blob": "artefact"}


def test_bad_rows_stop_it_or_are_left_out(voc, tmp_path):
    write_voc(voc / "BCCD" / "Annotations" / "00.xml", "00.png", ("RBC", (1, 2, 11, 12)), ("RBC", (400, 2, 500, 12)))
    write_voc(voc / "BCCD" / "Annotations" / "99.xml", "99.png", ("RBC", (1, 2, 11, 12)))
    archive = zipped(voc)
    with pytest.raises(BadRowsError, match=r"(?s)voc\.zip/BCCD/Annotations/00\.xml:4: object RBC.*99\.xml: no image"):
        prepare_data(archive, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["downloads"]
    prepared = prepare_data(archive, tmp_path / "out", on_invalid="skip", val_share=0)
    assert len(prepared.left_out) == 2 and prepared.counts == {"train": {"detection": 20}}
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["left_out"] == 2


def test_hostile_and_wrong_sources(voc, tmp_path):
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        archive.writestr("../evil.png", b"x")
    with pytest.raises(ArchiveError, match="evil.png' leads out of the folder"):
        prepare_data(tmp_path / "evil.zip", tmp_path / "out")
    with pytest.raises(ArchiveError, match="more than 100 bytes"):
        prepare_data(zipped(voc), tmp_path / "out", limits=ArchiveLimits(bytes=100))
    with pytest.raises(DatasetError, match="gone.zip: no such archive or folder"):
        prepare_data(tmp_path / "gone.zip", tmp_path / "out")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DatasetError, match="notes.txt: not a zip or tar file"):
        prepare_data(tmp_path / "notes.txt", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="empty: no known layout.*--layout"):
        prepare_data(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(DatasetError, match="No class 'RCB' to rename; classes are Platelets, RBC, blob"):
        prepare_data(voc, tmp_path / "out", rename={"RCB": "red cell"})
    with zipfile.ZipFile(tmp_path / "notes.zip", "w") as archive:
        archive.writestr("notes.txt", b"x")
    with pytest.raises(DatasetError, match=r"notes\.zip: no known layout"):
        prepare_data(tmp_path / "notes.zip", tmp_path / "out")
    with pytest.raises(DatasetError, match="unknown layout 'vok'"):
        prepare_data(voc, tmp_path / "out", layout="vok")
    with pytest.raises(DatasetError, match=r"A validation share of 1.0 must be"):
        prepare_data(voc, tmp_path / "out", val_share=1.0)
    (tmp_path / "there").mkdir()
    with pytest.raises(DatasetError, match="there: is there already"):
        prepare_data(voc, tmp_path / "there")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_all_tasks_of_our_own_layout_survive(tmp_path):
    split = tmp_path / "lab" / "train"
    write_photograph(split / "images" / "a.png", 1)
    write_mask(split / "masks" / "a.png")
    write_photograph(split / "crops" / "monocyte" / "c.png", 2)
    write_coco(split / "annotations.json", {"images/a.png": [[1, 2, 3, 4]]}, a={"patient": "p1"})
    write_lines(split / "qa.jsonl", {"image": "crops/monocyte/c.png", "question": "Which?", "answer": "monocyte"})
    write_lines(split / "cloze.jsonl", {"image": "images/a.png", "masked": "A <extra_id_0>.", "completed": "A field."})
    prepare_data(tmp_path / "lab", tmp_path / "out", val_share=0, masks_show="nucleus", licence="CC0-1.0")
    before, after = load_folder(tmp_path / "lab"), load_folder(tmp_path / "out")
    assert set(after) == set(before)
    for task, rows in after.items():
        (row,), (original,) = rows, before[task]
        for key in ("objects", "label", "question", "answer", "masked", "completed", "size"):
            assert row.get(key) == original.get(key)
        assert Path(row["image"]).read_bytes() == Path(original["image"]).read_bytes()
    assert after["segmentation"][0]["prompt"] == "nucleus"
    assert Path(after["segmentation"][0]["mask"]).read_bytes() == (split / "masks" / "a.png").read_bytes()
    assert after["detection"][0]["patient"] == "p1"


def test_attributes_stay_apart_from_boxes(tmp_path):
    folder = tmp_path / "cells"
    for number in range(2):
        write_photograph(folder / f"{number}.png", number)
    (folder / "cells_train.csv").write_text("file_name,label,hue\n0.png,basophil,blue\n1.png,monocyte,\n")
    prepared = prepare_data(folder, tmp_path / "out", val_share=0, attributes=["hue"])
    assert prepared.counts == {"train": {"single_cell": 2, "attributes": 2}}
    assert set(load_folder(tmp_path / "out")) == {"single_cell"}
    found = load_folder(tmp_path / "out", attributes_as_detection=True)["detection"]
    assert [row["objects"]["morphology"] for row in found] == [[{"hue": "blue"}], [{}]]
    assert [row["objects"]["category"] for row in found] == [["basophil"], ["monocyte"]]
    prepare_data(tmp_path / "out", tmp_path / "again", val_share=0)
    again = load_folder(tmp_path / "again", attributes_as_detection=True)["detection"]
    assert [row["objects"] for row in again] == [row["objects"] for row in found]


def test_patients_are_not_split(tmp_path):
    folder = tmp_path / "cells"
    for patient in range(12):
        for number in range(3):
            write_photograph(folder / "cell" / f"P{patient}_{number}.png", 3 * patient + number, (32, 32))
    prepare_data(folder, tmp_path / "out", val_share=0.4, patterns={"patient": r"^P(\d+)_"})
    patients = {
        split: {row["patient"] for row in load_folder(tmp_path / "out", split)["single_cell"]}
        for split in ("train", "val")
    }
    assert patients["train"] and patients["val"] and not patients["train"] & patients["val"]


def test_splits_of_the_data_set_are_kept(tmp_path):
    folder = tmp_path / "cells"
    for number, split in enumerate(("training", "validation", "test")):
        write_photograph(folder / split / "RBC" / "same name.png", number)
    prepared = prepare_data(folder, tmp_path / "out", val_share=0.5)
    assert prepared.counts == {split: {"single_cell": 1} for split in ("train", "val", "test")}
    assert load_folder(tmp_path / "out", "test")["single_cell"][0]["label"] == "rbc"


def test_jpeg_masks_lose_their_noise(tmp_path):
    folder = tmp_path / "masks"
    write_photograph(folder / "images" / "a.png")
    mask = np.zeros((72, 96), np.uint8)
    mask[20:40, 30:60] = 255
    (folder / "gt").mkdir()
    Image.fromarray(mask).save(folder / "gt" / "a.jpg", quality=30)
    assert (np.asarray(Image.open(folder / "gt" / "a.jpg")) > 0).sum() > 600
    prepare_data(folder, tmp_path / "out", val_share=0)
    written = np.asarray(Image.open(load_folder(tmp_path / "out")["segmentation"][0]["mask"]))
    assert set(np.unique(written)) == {0, 255} and abs(int((written > 0).sum()) - 600) < 30


def test_names_that_collide_and_classes_that_are_no_folders(tmp_path):
    folder = tmp_path / "cells"
    for number, place in enumerate(("one", "two")):
        write_photograph(folder / place / "RBC" / "a.png", number)
    prepare_data(folder, tmp_path / "out", val_share=0)
    names = [row["file_name"] for row in load_folder(tmp_path / "out")["single_cell"]]
    assert names == ["crops/rbc/a.png", "crops/rbc/a_2.png"]
    (tmp_path / "table").mkdir()
    write_photograph(tmp_path / "table" / "a.png")
    (tmp_path / "table" / "t.csv").write_text("file_name,label\na.png,T/B cell\n")
    with pytest.raises(BadRowsError, match=r"a\.png: class 'T/B cell' cannot be a folder's name.*--rename"):
        prepare_data(tmp_path / "table", tmp_path / "second")
    prepare_data(tmp_path / "table", tmp_path / "second", rename={"T/B cell": "lymphocyte"})
    assert not list(tmp_path.glob(".*"))


def test_tables_hold_text_in_every_spreadsheet_and_are_read_again_as_they_were(tmp_path):
    values = {"=1+1": "+", "-P7": "++", "'quoted": "absent", "@x": "="}
    lines = []
    for number, (patient, grade) in enumerate(values.items()):
        write_photograph(tmp_path / "in" / f"{number}.png", number)
        lines.append(f"{number}.png,monocyte,{patient},{grade}")
    (tmp_path / "in" / "cells.csv").write_text("\n".join(["file_name,label,patient,granularity", *lines]) + "\n")
    prepare_data(tmp_path / "in", tmp_path / "out", val_share=0)
    tables = [path.read_text().splitlines() for path in (tmp_path / "out" / "train").glob("*.csv")]
    assert len(tables) == 2
    cells = [cell for lines in tables for line in lines for cell in line.split(",")]
    assert "'=1+1" in cells and "'+" in cells and not any(cell[:1] in ("=", "+", "-", "@") for cell in cells)
    rows = load_folder(tmp_path / "out", attributes_as_detection=True)
    assert {row["patient"] for row in rows["single_cell"]} == set(values)
    assert {row["objects"]["morphology"][0]["granularity"] for row in rows["detection"]} == set(values.values())


def test_outlines_and_what_was_looked_for_in_each_image_are_kept(tmp_path):
    outline = [[4, 4, 20, 4, 20, 20, 4, 20]]
    for number, (stem, name) in enumerate((("wbc", "WBC"), ("plt", "platelet"))):
        write_photograph(tmp_path / "data" / "images" / "train" / f"{stem}.png", number)
        box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [4, 4, 16, 16], "segmentation": outline}
        content = {
            "images": [{"id": 1, "file_name": f"images/train/{stem}.png", "width": 96, "height": 72}],
            "annotations": [box],
            "categories": [{"id": 1, "name": name}],
        }
        (tmp_path / "data" / f"{stem}_train.json").write_text(json.dumps(content))
    prepare_data(tmp_path / "data", tmp_path / "out", val_share=0.0)
    rows = load_folder(tmp_path / "out", "train")["detection"]
    assert {(Path(row["image"]).stem, *row["annotated_classes"]) for row in rows} == {
        ("wbc", "WBC"),
        ("plt", "platelet"),
    }
    assert [row["objects"]["segmentation"] for row in rows] == [[outline], [outline]]
