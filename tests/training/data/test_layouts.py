"""Layouts of others: each on a tiny folder made here, and what is wrong with it."""

import json
from pathlib import Path

import pytest
from data_folders import write_coco, write_lines, write_mask, write_photograph, write_voc

from unihema.errors import DatasetError
from unihema.training.data.readers import load_folder, read_foreign, recognise_foreign
from unihema.training.data.rows import BadRows


def read(folder, layout=None, **options):
    bad = BadRows()
    return read_foreign(folder, "set", bad, layout=layout, **options), bad.messages


def yolo_folder(folder: Path, names="names: [WBC, RBC]\n") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "data.yaml").write_text(names)
    for split, seed in (("train", 1), ("valid", 2)):
        write_photograph(folder / "images" / split / "a.png", seed)
        (folder / "labels" / split).mkdir(parents=True)
        (folder / "labels" / split / "a.txt").write_text("1 0.5 0.5 0.25 0.5\n\n0 0.1 0.1 0.3 0.1 0.3 0.4\n")
    return folder


def test_yolo(tmp_path):
    folder = yolo_folder(tmp_path)
    assert recognise_foreign(folder) == "yolo"
    rows, problems = read(folder, rename={"WBC": "white blood cell"})
    assert problems == []
    assert [(row["split"], row["file_name"]) for row in rows] == [
        ("train", "images/train/a.png"), ("val", "images/valid/a.png")
    ]  # fmt: skip
    objects = rows[0]["objects"]
    assert objects["category"] == ["RBC", "white blood cell"]
    assert objects["bbox"][0] == [36, 18, 24, 36]
    # A polygon gives the box around it.
    assert objects["bbox"][1] == pytest.approx([9.6, 7.2, 19.2, 21.6])
    assert rows[0]["annotated_classes"] == ["white blood cell", "RBC"]
    assert load_folder(folder, "val")["detection"][0]["file_name"] == "images/valid/a.png"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("2 0.5 0.5 0.1 0.1", "class 2, but there are 2 names"),
        ("x 0.5 0.5 0.1 0.1", "a class number and coordinates are needed"),
        ("0 0.5 0.5 0.1", "4 coordinates"),
        ("0 40 30 10 10", "not in 0..1"),
        ("0 0.5 0.5 0 0.1", "has no area"),
        ("0 1.8 0.5 0.1 0.1", "outside the image of 96x72"),
        ("0 nan 0.5 0.1 0.1", "four finite numbers"),
    ],
)
def test_bad_yolo_lines(tmp_path, line, words):
    folder = yolo_folder(tmp_path)
    labels = folder / "labels" / "train" / "a.txt"
    labels.write_text(f"1 0.5 0.5 0.25 0.5\n{line}\n")
    rows, problems = read(folder)
    assert len(problems) == 1 and f"{labels}:2: " in problems[0] and words in problems[0]
    assert [len(row["objects"]["bbox"]) for row in rows] == [1, 2]


def test_yolo_images_without_labels_are_not_taken_for_empty_ones(tmp_path):
    folder = yolo_folder(tmp_path)
    (folder / "labels" / "train" / "a.txt").write_text("")
    (folder / "labels" / "valid" / "a.txt").unlink()
    rows, problems = read(folder)
    assert [row["objects"]["bbox"] for row in rows] == [[]]
    assert len(problems) == 1 and "no label file" in problems[0]


@pytest.mark.parametrize(
    ("names", "words"),
    [("names: [a\n", "broken YAML"), ("names: {0: a, 2: b}\n", "numbered from 0"), ("names: 3\n", "must be a list")],
)
def test_broken_yolo_names(tmp_path, names, words):
    folder = yolo_folder(tmp_path, names)
    with pytest.raises(DatasetError, match=f"data.yaml.*{words}"):
        read(folder, "yolo")
    (folder / "data.yaml").unlink()
    with pytest.raises(DatasetError, match=r"no class names: data\.yaml"):
        read(folder, "yolo")
    (folder / "classes.txt").write_text("WBC\nRBC\n")
    assert read(folder, "yolo")[0][0]["objects"]["category"] == ["RBC", "WBC"]


def test_voc(tmp_path):
    write_photograph(tmp_path / "JPEGImages" / "a.png", 1)
    write_photograph(tmp_path / "JPEGImages" / "b.png", 2)
    write_voc(tmp_path / "Annotations" / "a.xml", "a.png", ("RBC", (10, 20, 30, 50)), ("WBC", (-5, 0, 5, 8)))
    # The name in the file is often that of another computer's file; the stem is right.
    write_voc(tmp_path / "Annotations" / "b.xml", "somewhere.jpg", ("RBC", (0, 0, 4, 4)))
    (tmp_path / "ImageSets" / "Main").mkdir(parents=True)
    (tmp_path / "ImageSets" / "Main" / "val.txt").write_text("b\n")
    assert recognise_foreign(tmp_path) == "voc"
    rows, problems = read(tmp_path)
    assert problems == []
    assert rows[0]["objects"]["bbox"] == [[10, 20, 20, 30], [0, 0, 5, 8]]
    assert rows[0]["annotated_classes"] == rows[1]["annotated_classes"] == ["RBC", "WBC"]
    assert [row["split"] for row in rows] == [None, "val"]
    # What names no split is there to train on.
    assert [row["file_name"] for row in load_folder(tmp_path, "train")["detection"]] == ["JPEGImages/a.png"]


def test_bad_voc_files(tmp_path):
    write_photograph(tmp_path / "a.png")
    bomb = '<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><annotation><filename>&b;</filename></annotation>'
    cases = {
        "a.xml": (None, ":4: object RBC: box"),
        "bomb.xml": (bomb, ":1: document types are not read"),
        "broken.xml": ("<annotation>\n<object>\n</annotation>", ":3: broken XML"),
        "missing.xml": ("<annotation/>", "no image missing"),
        "out.xml": ("<annotation><filename>../../a.png</filename></annotation>", "leads out of the folder"),
    }
    write_voc(tmp_path / "a.xml", "a.png", ("WBC", (1, 1, 9, 9)), ("RBC", (200, 1, 300, 9)), ("", (1, 1, 2, 2)))
    write_voc(tmp_path / "no_numbers.xml", "a.png", ("WBC", ("x", 1, 9, 9)))
    for name, (content, _) in cases.items():
        if content:
            (tmp_path / name).write_text(content)
    rows, problems = read(tmp_path, "voc")
    for name, (_, words) in cases.items():
        assert any(f"{tmp_path / name}" in problem and words in problem for problem in problems), (name, problems)
    assert any("a.xml:5: object: <name> and <bndbox> are needed" in problem for problem in problems)
    assert any("no_numbers.xml:3: object WBC: corners are no numbers" in problem for problem in problems)
    assert len(problems) == len(cases) + 2
    # Two files of one image are one row.
    assert [row["objects"]["category"] for row in rows] == [["WBC"]]


def test_coco_anywhere(tmp_path):
    for split, seed in (("train", 1), ("valid", 2)):
        write_photograph(tmp_path / "export" / split / f"{split}.png", seed)
        write_coco(tmp_path / "export" / split / "_annotations.coco.json", {f"{split}.png": [[1, 2, 3, 4]]})
    assert recognise_foreign(tmp_path) == "coco"
    rows, problems = read(tmp_path)
    assert problems == []
    assert [(row["split"], row["file_name"]) for row in rows] == [
        ("train", "export/train/train.png"), ("val", "export/valid/valid.png")
    ]  # fmt: skip


def test_a_broken_coco_file_is_named_and_the_others_are_read(tmp_path):
    write_photograph(tmp_path / "a.png")
    write_coco(tmp_path / "good.json", {"a.png": [[1, 2, 3, 4]]})
    (tmp_path / "broken.json").write_text('{"images": [], "annotations": [\n')
    rows, problems = read(tmp_path)
    assert len(rows) == 1 and len(problems) == 1 and "broken.json:2: broken JSON" in problems[0]


def test_an_image_name_that_occurs_twice_is_not_guessed(tmp_path):
    for folder, seed in (("one", 1), ("two", 2)):
        write_photograph(tmp_path / folder / "a.png", seed)
    write_coco(tmp_path / "annotations" / "all.json", {"a.png": [[1, 2, 3, 4]], "two/a.png": [[1, 2, 3, 4]]})
    rows, problems = read(tmp_path, "coco")
    assert len(problems) == 1 and "2 images are called a.png: one/a.png, two/a.png" in problems[0]
    assert [row["file_name"] for row in rows] == ["two/a.png"]


def test_mask_pairs(tmp_path):
    for image, mask in (
        ("folders/images/a.jpg", "folders/masks/a.png"),
        ("Dataset 1/001.bmp", "Dataset 1/001.png"),
        ("suffix/b.png", "suffix/b_mask.png"),
    ):
        write_photograph(tmp_path / image)
        write_mask(tmp_path / mask)
    assert recognise_foreign(tmp_path) == "mask_pairs"
    rows, problems = read(tmp_path, prompt="nucleus")
    assert problems == []
    assert {row["file_name"]: Path(row["mask"]).relative_to(tmp_path).as_posix() for row in rows} == {
        "folders/images/a.jpg": "folders/masks/a.png",
        "Dataset 1/001.bmp": "Dataset 1/001.png",
        "suffix/b.png": "suffix/b_mask.png",
    }
    assert {row["prompt"] for row in rows} == {"nucleus"}
    write_mask(tmp_path / "folders/masks/stray.png")
    write_mask(tmp_path / "folders/masks/a.png", size=(10, 10))
    rows, problems = read(tmp_path)
    assert len(rows) == 2
    assert any("stray.png: no image of this name" in problem for problem in problems)
    assert any("a.png: 10x10 pixels, but its image" in problem and "has 96x72" in problem for problem in problems)


def test_class_folders(tmp_path):
    for name in ("train/Basophil/a.png", "test/Monocyte/b.png", "__MACOSX/x/c.png", "loose.png"):
        write_photograph(tmp_path / name)
    assert recognise_foreign(tmp_path) == "class_folders"
    rows, problems = read(tmp_path, rename={"Monocyte": "monocyte"})
    assert [(row["split"], row["label"]) for row in rows] == [("test", "monocyte"), ("train", "Basophil")]
    assert len(problems) == 1 and "loose.png: lies in no class folder" in problems[0]


def test_attribute_tables(tmp_path):
    write_photograph(tmp_path / "pictures" / "a.png")
    (tmp_path / "cells_val.csv").write_text(
        "img_name;label;cell_size;slide\na.png;basophil;small;7\na.png;basophil\nmissing.png;basophil;big;8\n"
    )
    assert recognise_foreign(tmp_path) == "attribute_table"
    rows, problems = read(tmp_path)
    assert [row["task"] for row in rows] == ["single_cell", "detection"]
    assert rows[1]["objects"] == {
        "bbox": [[0, 0, 96, 72]], "category": ["basophil"], "morphology": [{"cell_size": "small"}]
    }  # fmt: skip
    assert {row["split"] for row in rows} == {"val"} and {row["slide"] for row in rows} == {"7"}
    assert any("cells_val.csv:3: 2 cells, but 4 columns" in problem for problem in problems)
    assert any("cells_val.csv:4: no image missing.png" in problem for problem in problems)
    assert set(load_folder(tmp_path, "val", on_invalid="skip")) == {"single_cell"}
    (tmp_path / "cells_val.csv").write_text("img_name,label,label\n")
    rows, problems = read(tmp_path, "attribute_table")
    assert rows == [] and len(problems) == 1 and "cells_val.csv:1: a column is named twice" in problems[0]


def test_attribute_table_of_our_layout(tmp_path):
    write_photograph(tmp_path / "images" / "train" / "a.png")
    (tmp_path / "attributes_train.csv").write_text("file_name,label,cell_size\na.png,basophil,\n")
    rows = load_folder(tmp_path, "train", attributes_as_detection=True)
    assert rows["single_cell"][0]["label"] == "basophil"
    assert rows["detection"][0]["objects"]["morphology"] == [{}]


def test_official_text_keys(tmp_path):
    write_photograph(tmp_path / "images" / "a.png")
    write_lines(tmp_path / "qa_train.jsonl", {"image": "a.png", "Question": "Which?", "Answer": "A cell."})
    assert load_folder(tmp_path, "train")["question_answering"][0]["answer"] == "A cell."


def test_unknown_layouts(tmp_path):
    (tmp_path / "notes.json").write_text(json.dumps({"a": 1}))
    assert recognise_foreign(tmp_path) is None
    with pytest.raises(DatasetError, match="no known layout; known are coco, yolo, voc"):
        read(tmp_path)
    with pytest.raises(DatasetError, match="unknown layout 'vok'"):
        read(tmp_path, "vok")
