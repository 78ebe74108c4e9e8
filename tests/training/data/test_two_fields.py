"""Where two fields of a data set say the same, readers compare them; what matches nothing is counted and named."""

import json

import numpy as np
import pytest
from data_folders import photograph, write_lines, write_mask, write_photograph, write_voc
from PIL import Image

from unihema.errors import DatasetError
from unihema.training.data.layouts.masks import read_mask
from unihema.training.data.readers import load_folder, read_foreign
from unihema.training.data.rows import BadRows, class_names, morphology_schema


BOX = [2, 3, 20, 15]


def read(folder, layout=None):
    bad = BadRows()
    return read_foreign(folder, "set", bad, layout=layout), bad


def said(bad, words):
    return sum(words in message for message in (*bad.messages, *bad.notes)) == 1


def coco(folder, images=("a.png",), **changes):
    """A COCO file of an image with one box; `changes` replace fields of the box."""
    for number, name in enumerate(images):
        write_photograph(folder / name, number)
    annotation = {"id": 1, "image_id": 0, "category_id": 1, "bbox": BOX} | changes
    content = {
        "images": [{"id": number, "file_name": name, "width": 96, "height": 72} for number, name in enumerate(images)],
        "annotations": [annotation],
        "categories": [{"id": 1, "name": "RBC"}, {"id": 2, "name": "WBC"}],
    }
    return content


def write(folder, content):
    (folder / "annotations.coco.json").write_text(json.dumps(content))
    return read(folder)


# COCO


def test_two_categories_of_one_id(tmp_path):
    content = coco(tmp_path) | {"categories": [{"id": 1, "name": "RBC"}, {"id": 1, "name": "WBC"}]}
    rows, bad = write(tmp_path, content)
    assert rows == [] and said(bad, "categories[1].id: 1 is the id of RBC and of WBC")


def test_an_image_under_two_ids_is_one_row(tmp_path):
    content = coco(tmp_path)
    content["images"].append(content["images"][0] | {"id": 5})
    first = content["annotations"][0]
    content["annotations"] += [first | {"image_id": 5}, first | {"image_id": 5, "bbox": [60, 40, 9, 9]}]
    (row,), bad = write(tmp_path, content)
    # The box that both have is one.
    assert row["objects"]["bbox"] == [BOX, [60, 40, 9, 9]] and len(row["objects"]["iscrowd"]) == 2
    assert said(bad, "1 more entries for images that have one, such as a.png")


def test_two_files_of_one_image_are_one_row_with_both_their_classes(tmp_path):
    content = coco(tmp_path)
    for name in ("RBC", "WBC"):
        one = content | {"categories": [{"id": 1, "name": name}]}
        (tmp_path / f"{name}.json").write_text(json.dumps(one))
    (row,), bad = read(tmp_path)
    assert row["objects"]["category"] == ["RBC", "WBC"] and row["annotated_classes"] == ["RBC", "WBC"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"segmentation": {"size": [96, 72], "counts": [6912]}}, "a mask of height and width [96, 72], but the image has 72"),
        ({"segmentation": {"size": [72, 96], "counts": [10, 20]}}, "a mask of 30 pixels, but the image has 6912"),
        ({"segmentation": [[60, 40, 80, 40, 80, 60]]}, "the outline lies at [60, 40, 20, 20], but the box is [2, 3, 20, 15]"),
        ({"segmentation": [[20, 30, 220, 30, 220, 180]]}, "One of them is of another cell or of another size"),
        ({"segmentation": {"size": [72, 96], "counts": "abc"}}, "Mask runs add up to 0 pixels, but its size is 72 x 96"),
        ({"segmentation": [[2, 3, 22]]}, "polygons are lists of x and y in turn"),
        ({"bbox": [0.1, 0.2, 0.3, 0.2]}, "all 1 boxes are fractions of the image"),
        ({"image_id": 9}, "image_id: 9 is not among the images"),
    ],
)  # fmt: skip
def test_annotations_that_contradict_themselves(tmp_path, change, words):
    _, bad = write(tmp_path, coco(tmp_path, **change))
    assert said(bad, words), bad.messages


# As pycocotools packs it.
PACKED = {"size": [72, 96], "counts": "c4?i10000000000000000000000000000000000000]V5"}


@pytest.mark.parametrize(
    "outline", [[], [[2, 3, 22, 3, 22, 18, 2, 18]], PACKED, None], ids=["none", "polygon", "packed", "null"]
)
def test_outlines_that_fit(tmp_path, outline):
    rows, bad = write(tmp_path, coco(tmp_path, segmentation=outline))
    assert bad.messages == [] and rows[0]["objects"]["bbox"] == [BOX]


def test_one_box_in_fractions_among_others(tmp_path):
    content = coco(tmp_path)
    content["annotations"].append(content["annotations"][0] | {"bbox": [0.5, 0.5, 0.2, 0.2]})
    _, bad = write(tmp_path, content)
    assert said(bad, "is smaller than a pixel; is it in fractions of the image?")


def test_corners_instead_of_sizes_are_said(tmp_path):
    content = coco(tmp_path)
    content["annotations"] += [content["annotations"][0] | {"bbox": [70, 50, 90, 70]} for _ in range(3)]
    _, bad = write(tmp_path, content)
    assert said(bad, "3 of 4 boxes reach out of their image and are clipped. Are they corners")


def test_a_box_listed_twice_is_one_cell(tmp_path):
    content = coco(tmp_path / "coco")
    (first,) = content["annotations"]
    changed = [{"category_id": 2}, {"bbox": [40, 3, 20, 15]}, {"iscrowd": 1}, {"attributes": {"nucleus": "round"}}, {}]
    content["annotations"] = [first, *(first | {"id": number} | change for number, change in enumerate(changed, 2))]
    (tmp_path / "coco" / "labels.json").write_text(json.dumps(content))
    (row,), bad = read(tmp_path / "coco")
    assert row["objects"]["category"] == ["RBC", "WBC", "RBC", "RBC", "RBC"] and bad.messages == []
    assert [len(values) for values in row["objects"].values()] == [5] * 4
    assert said(bad, "1 boxes that stand in their image already, with the same class, such as one in a.png")
    write_photograph(tmp_path / "yolo" / "x.png")
    (tmp_path / "yolo" / "x.txt").write_text("0 0.5 0.5 0.1 0.1\n" * 3 + "0 0.5 0.5 0.2 0.1\n")
    (tmp_path / "yolo" / "classes.txt").write_text("RBC\n")
    (row,), bad = read(tmp_path / "yolo")
    assert len(row["objects"]["bbox"]) == 2 and said(bad, "2 boxes that stand in their image already")


def test_two_classes_of_one_name_are_said(tmp_path):
    content = coco(tmp_path / "coco")
    content["categories"][1]["name"] = "RBC"
    (tmp_path / "coco" / "labels.json").write_text(json.dumps(content))
    rows, bad = read(tmp_path / "coco")
    assert class_names(rows) == ["RBC"] and said(bad, "categories[1]: RBC is also the category 1.")
    write_photograph(tmp_path / "yolo" / "x.png")
    (tmp_path / "yolo" / "x.txt").write_text("2 0.5 0.5 0.1 0.1\n")
    (tmp_path / "yolo" / "classes.txt").write_text("RBC\nWBC\nRBC\n")
    rows, bad = read(tmp_path / "yolo")
    assert class_names(rows) == ["RBC", "WBC"] and said(bad, "the list of class names has RBC twice")


def test_images_that_nothing_lists_are_counted(tmp_path):
    write_photograph(tmp_path / "b.png", 7)
    _, bad = write(tmp_path, coco(tmp_path))
    assert said(bad, "1 image without a row, since nothing lists it: b.png")


def test_attributes_that_are_no_classes(tmp_path):
    content = coco(tmp_path)
    first = content["annotations"][0]
    content["annotations"] = [
        first
        | {
            "attributes": {
                "occluded": number == 2, "rotation": 7.25 * number, "track_id": number, "area_um2": number + 0.5,
                "serial": number, "points": [1, 2], "lobes": number % 3, "shape": "round" if number % 2 else "oval",
            }
        }
        for number in range(30)
    ]  # fmt: skip
    rows, bad = write(tmp_path, content)
    assert morphology_schema(rows) == {"lobes": ["0", "1", "2"], "shape": ["oval", "round"]}
    assert said(bad, "attributes that are no classes of cells are left out")
    note = next(note for note in bad.notes if "attributes that" in note)
    assert all(
        f"'{name}' (30)" in note for name in ("occluded", "rotation", "track_id", "area_um2", "serial", "points")
    )


def test_categories_that_only_group_others(tmp_path):
    group = {"id": 0, "name": "blood-cells", "supercategory": "none"}
    content = coco(tmp_path)
    content["categories"] = [group, *(entry | {"supercategory": "blood-cells"} for entry in content["categories"])]
    rows, bad = write(tmp_path, content)
    assert class_names(rows) == ["RBC", "WBC"] and said(bad, "blood-cells: a category over others that no box has")
    # A class that has boxes, and one that is its own supercategory, are classes.
    content["categories"][1]["supercategory"] = "RBC"
    content["annotations"].append(content["annotations"][0] | {"category_id": 0})
    rows, _ = write(tmp_path, content)
    assert class_names(rows) == ["blood-cells", "RBC", "WBC"]


def test_paths_on_another_computer_and_on_this_one(tmp_path):
    content = coco(tmp_path, ("x/a.png", "y/a.png", "y/b.png"))
    names = (str(tmp_path / "x" / "a.png"), "D:\\lab\\y\\a.png", "/home/else/b.png")
    for image, name in zip(content["images"], names):
        image["file_name"] = name
    rows, bad = write(tmp_path, content)
    assert [row["file_name"] for row in rows] == ["x/a.png", "y/a.png", "y/b.png"] and bad.messages == []
    assert said(bad, "2 images named by a path that is not in the folder, and found by the file's name")


# YOLO


def test_class_lists_of_each_folder(tmp_path):
    for place, names in (("a", "RBC\nWBC\n"), ("b", "WBC\nRBC\n")):
        write_photograph(tmp_path / place / "x.png")
        (tmp_path / place / "x.txt").write_text("0 0.5 0.5 0.1 0.1\n")
        (tmp_path / place / "classes.txt").write_text(names)
    rows, bad = read(tmp_path)
    assert [row["objects"]["category"] for row in rows] == [["RBC"], ["WBC"]] and bad.messages == []
    # One list above that says something else.
    (tmp_path / "data.yaml").write_text("names: [RBC, WBC]\n")
    rows, bad = read(tmp_path)
    assert len(rows) == 1 and said(bad, "class names differ:") and "No image of" in bad.messages[0]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("nc: 3\nnames: [RBC, WBC]\n", "nc is '3', but there are 2 names"),
        ("names: {0: RBC, 0: WBC}\n", "numbered from 0 without gaps"),
        ("names: [[RBC], WBC]\n", "'names' must be texts"),
    ],
)
def test_yaml_that_contradicts_itself(tmp_path, content, words):
    write_photograph(tmp_path / "x.png")
    (tmp_path / "x.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    (tmp_path / "data.yaml").write_text(content)
    with pytest.raises(DatasetError) as caught:
        load_folder(tmp_path, "train")
    assert words in str(caught.value)


def test_yaml_names_stay_as_they_stand(tmp_path):
    write_photograph(tmp_path / "x.png")
    (tmp_path / "x.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    (tmp_path / "data.yaml").write_text("date: 2026-13-45\nnames: [No, 1.10]\n")
    assert class_names(read(tmp_path)[0]) == ["No", "1.10"]


def test_labels_without_an_image(tmp_path):
    write_photograph(tmp_path / "images" / "x.png")
    (tmp_path / "labels").mkdir()
    (tmp_path / "classes.txt").write_text("RBC\n")
    for name in ("x", "gone"):
        (tmp_path / "labels" / f"{name}.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    (tmp_path / "notes.txt").write_text("stained with Giemsa\n")
    rows, bad = read(tmp_path, "yolo")
    assert len(rows) == 1 and len(bad.messages) == 1 and said(bad, "gone.txt: no image of this name")


def test_one_label_file_of_two_images(tmp_path):
    for number, name in enumerate(("x.png", "x.jpg", "y.png")):
        write_photograph(tmp_path / name, number)
    for name in ("x", "y"):
        (tmp_path / f"{name}.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    (tmp_path / "classes.txt").write_text("RBC\n")
    rows, bad = read(tmp_path, "yolo")
    assert len(rows) == 3 and said(bad, "x.txt: the labels of x.jpg and of x.png. 1 images share their labels")


def test_exif_turns_in_yolo_voc_and_mask_pairs(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for place in ("yolo", "voc", "masks/images"):
        (tmp_path / place).mkdir(parents=True)
        Image.fromarray(photograph(1)).transpose(Image.Transpose.ROTATE_90).save(tmp_path / place / "a.jpg", exif=exif)
    (tmp_path / "yolo" / "a.txt").write_text("0 0.5 0.25 0.25 0.5\n")
    (tmp_path / "yolo" / "classes.txt").write_text("RBC\n")
    write_voc(tmp_path / "voc" / "a.xml", "a.jpg", ("RBC", (80, 10, 90, 30)))
    write_mask(tmp_path / "masks" / "masks" / "a.png")
    (yolo,), _ = read(tmp_path / "yolo")
    (voc,), _ = read(tmp_path / "voc")
    (pair,), bad = read(tmp_path / "masks")
    assert yolo["size"] == (96, 72) and yolo["objects"]["bbox"] == [[36, 0, 24, 36]]
    assert voc["size"] == (96, 72) and voc["objects"]["bbox"] == [[80, 10, 10, 20]]
    assert bad.messages == [] and pair["mask"].endswith("a.png")


# VOC


def test_voc_boxes_are_for_the_size_that_it_says(tmp_path):
    write_photograph(tmp_path / "a.png")
    path = write_voc(tmp_path / "a.xml", "a.png", ("RBC", (100, 100, 150, 140)))
    text = path.read_text()
    path.write_text(text.replace("<object>", "<size><width>192</width><height>144</height></size><object>"))
    (row,), bad = read(tmp_path)
    assert row["size"] == (192, 144) and row["objects"]["bbox"] == [[100, 100, 50, 40]] and bad.messages == []
    path.write_text(text.replace("<object>", "<size><width>0</width><height>0</height></size><object>"))
    _, bad = read(tmp_path)
    assert said(bad, "lies outside the image of 96x72")


def test_voc_named_after_one_image_and_naming_another(tmp_path):
    for number, name in enumerate(("a.png", "b.png")):
        write_photograph(tmp_path / name, number)
    write_voc(tmp_path / "a.xml", "b.png", ("RBC", (2, 3, 9, 9)))
    rows, bad = read(tmp_path)
    assert rows == [] and said(bad, "<filename> is 'b.png', but there is an image of this file's name as well")


def test_voc_that_names_an_image_which_is_not_there(tmp_path):
    for number, (name, named) in enumerate((("a", "a.png"), ("b", "before.png"), ("c", "C:\\lab\\c.jpg"), ("d", "d"))):
        write_photograph(tmp_path / f"{name}.png", number)
        write_voc(tmp_path / f"{name}.xml", named, ("RBC", (2, 3, 9, 9)))
    rows, bad = read(tmp_path)
    assert [row["file_name"] for row in rows] == ["a.png", "b.png", "c.png", "d.png"]
    assert said(bad, "b.xml: <filename> is 'before.png', which is not there") and said(bad, "so in 1 of 4 files")


# Tables, folders, the own layout


@pytest.mark.parametrize("start", ["", "sep=;\n", '"sep=;"\n'])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_tables_as_spreadsheets_write_them(tmp_path, start, encoding):
    write_photograph(tmp_path / "a.png")
    table = start + "file_name;label\na.png;lymphozyt, groß\nb.png;x\n"
    (tmp_path / "cells.csv").write_bytes(table.encode(encoding))
    (row,), bad = read(tmp_path)
    assert row["label"] == "lymphozyt, groß" and said(bad, f"cells.csv:{3 + bool(start)}: no image b.png")


def test_other_encodings_and_spreadsheets_are_named(tmp_path):
    write_photograph(tmp_path / "a.png")
    (tmp_path / "cells.csv").write_bytes("file_name,label\na.png,groß\n".encode("latin-1"))
    _, bad = read(tmp_path)
    assert said(
        bad, "cells.csv: cannot be read as UTF-8 text (invalid continuation byte at byte 25). Save it as UTF-8."
    )
    (tmp_path / "cells.csv").rename(tmp_path / "Cells.XLSX")
    with pytest.raises(DatasetError, match="Tables are read as CSV: save Cells.XLSX as CSV"):
        load_folder(tmp_path)


def test_labels_that_contradict_each_other_or_the_folder(tmp_path):
    for number, name in enumerate(("monocyte/a.png", "basophil/b.png", "basophil/c.png")):
        write_photograph(tmp_path / name, number)
    lines = [
        "file_name,Class,Patient ID",
        "a.png,monocyte,7",
        "b.png,monocyte,7",
        "c.png,basophil,8",
        "c.png,basophil,8",
    ]
    (tmp_path / "cells.csv").write_text("\n".join(lines))
    rows, bad = read(tmp_path, "attribute_table")
    assert [(row["file_name"], row["patient"]) for row in rows] == [("monocyte/a.png", "7"), ("basophil/c.png", "8")]
    assert said(bad, "cells.csv:3: monocyte, but the image") and said(bad, "1 more entries for images that have one")
    write_photograph(tmp_path / "more" / "d.png", 4)
    (tmp_path / "cells.csv").write_text(
        "file_name,label\na.png,monocyte\nd.png,monocyte\nd.png,basophil\nc.png,basophil\n"
    )
    rows, bad = read(tmp_path, "attribute_table")
    assert said(bad, "d.png: listed twice, as monocyte and as basophil")
    assert said(bad, "1 image without a row, since nothing names it in a table: basophil/b.png")


@pytest.fixture
def own(tmp_path):
    for number, label in enumerate(("monocyte", "basophil")):
        write_photograph(tmp_path / "train" / "crops" / label / "1.png", number)
    return tmp_path


@pytest.mark.parametrize(
    ("head", "name"),
    [
        ("file_name,patient", "crops\\monocyte\\1.png"),
        ("file_name,patient", "./crops/monocyte/1.png"),
        ("file_name,patient", "train/crops/monocyte/1.png"),
        ("file_name,patient", "C:\\lab\\train\\crops\\monocyte\\1.png"),
        ("File Name,Patient ID", "crops/monocyte/1.png"),
    ],
)
def test_origins_in_other_spellings(own, head, name):
    (own / "train" / "origins.csv").write_text(f"{head}\n{name},p1\n")
    rows = load_folder(own, "train")["single_cell"]
    assert {row["label"]: row.get("patient") for row in rows} == {"monocyte": "p1", "basophil": None}


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("file_name,patient\n1.png,p1\n", r"origins.csv:2: 2 images are called 1.png"),
        ("file_name,patient\ncrops/monocyte/7.png,p1\n", r"origins.csv:2: no image crops/monocyte/7.png"),
        ("file_name,donor\ncrops/monocyte/1.png,p1\n", r"no patient, slide, source_image or origin; the columns are"),
        ("file_name,patient\ncrops/monocyte/1.png,p1\ncrops/monocyte/1.png,p2\n", "another origin in a line before"),
    ],
)
def test_origins_that_match_nothing(own, table, words):
    (own / "train" / "origins.csv").write_text(table)
    with pytest.raises(DatasetError, match=words):
        load_folder(own, "train")


def test_crops_in_no_class_folder_and_empty_classes(own, caplog):
    (own / "train" / "crops" / "eosinophil").mkdir()
    load_folder(own, "train")
    assert "no images in the folders of eosinophil" in caplog.text
    write_photograph(own / "train" / "crops" / "loose.png")
    write_photograph(own / "train" / "crops" / "monocyte" / "more" / "2.png")
    with pytest.raises(
        DatasetError, match="(?s)2 bad rows:.*loose.png: lies in no class folder.*more/2.png: lies in no"
    ):
        load_folder(own, "train")


def test_masks_of_two_images_and_two_masks_of_one(tmp_path):
    for number, name in enumerate(("a.png", "a.jpg", "b.png")):
        write_photograph(tmp_path / "train" / "images" / name, number)
    for name in ("a.png", "b.png", "b.bmp"):
        write_mask(tmp_path / "train" / "masks" / name)
    with pytest.raises(
        DatasetError, match=r"(?s)2 bad rows:.*a\.png: several images.*b\.png: listed twice, with the masks"
    ):
        load_folder(tmp_path, "train")


def test_metadata_without_anything_to_learn(tmp_path, caplog):
    for number, name in enumerate("abc"):
        write_photograph(tmp_path / "train" / f"{name}.png", number)
    lines = [
        {"file_name": "a.png", "label": "RBC"},
        {"file_name": "b.png", "lable": "RBC"},
        {"file_name": "c.png", "label": 3},
    ]
    write_lines(tmp_path / "train" / "metadata.jsonl", *lines)
    rows = load_folder(tmp_path, "train", on_invalid="skip")
    assert len(rows["single_cell"]) == 1
    assert "metadata.jsonl:2: 1 lines have no label" in caplog.text
    assert "metadata.jsonl:3: label 3 must be the class's name" in caplog.text


def test_a_folder_in_two_layouts_says_so(tmp_path):
    write_photograph(tmp_path / "a.png")
    write_voc(tmp_path / "a.xml", "a.png", ("RBC", (2, 3, 9, 9)))
    (tmp_path / "a.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    (tmp_path / "classes.txt").write_text("RBC\n")
    _, bad = read(tmp_path)
    assert said(bad, "read as yolo; it could be voc as well, which is not read")


def test_annotations_of_unknown_programs_beside_class_folders_are_said(tmp_path):
    for number, name in enumerate(("a", "b")):
        write_photograph(tmp_path / "monocyte" / f"{name}.png", number)
    (tmp_path / "monocyte" / "a.json").write_text('{"shapes": [], "imagePath": "a.png"}')
    (tmp_path / "monocyte" / "LICENCE.txt").write_text("MIT")
    rows, bad = read(tmp_path)
    assert len(rows) == 2 and said(bad, "1 files that are named like an image, such as monocyte/a.json")


def test_questions_with_two_answers_are_counted(tmp_path, caplog):
    write_photograph(tmp_path / "train" / "images" / "a.png")
    asked = {"image": "images/a.png", "question": "What is it?"}
    answers = ("A monocyte.", "A monocyte.", "A lymphocyte.")
    write_lines(tmp_path / "train" / "qa.jsonl", *(asked | {"answer": answer} for answer in answers))
    assert len(load_folder(tmp_path)["question_answering"]) == 3
    assert (
        "1 questions have more than one answer for the same image, such as 'What is it?' of images/a.png" in caplog.text
    )


def test_linked_folders_are_read(tmp_path):
    write_photograph(tmp_path / "elsewhere" / "b.png", 1)
    write_photograph(tmp_path / "set" / "monocyte" / "a.png", 2)
    (tmp_path / "set" / "basophil").symlink_to(tmp_path / "elsewhere")
    rows, bad = read(tmp_path / "set")
    assert [row["label"] for row in rows] == ["basophil", "monocyte"] and bad.messages == []
    (tmp_path / "set" / "circle").symlink_to("..")
    (tmp_path / "set" / "again").symlink_to("monocyte")
    (tmp_path / "set" / "monocyte" / "gone.png").symlink_to("nowhere.png")
    rows, bad = read(tmp_path / "set")
    assert len(rows) == 2 and len(bad.messages) == 3
    assert said(bad, "circle: a link to a folder around it") and said(bad, "which is read already")
    assert said(bad, "gone.png: a broken link")


# Masks

_Y, _X = np.mgrid[:120, :160]
_DISTANCE = np.hypot(_X - 80, _Y - 60)
DISC = _DISTANCE <= 30


def overlap(picture, path, **options):
    picture.save(path, **options)
    mask = read_mask(str(path)) > 0
    return (mask & DISC).sum() / (mask | DISC).sum()


def test_what_pixels_of_a_mask_mean(tmp_path):
    gray = Image.fromarray((DISC * 255).astype(np.uint8))
    assert overlap(gray, tmp_path / "a.png") == 1
    assert overlap(gray, tmp_path / "a.jpg", quality=60) > 0.97
    soft = Image.fromarray((np.clip((33 - _DISTANCE) / 6, 0, 1) * 255).astype(np.uint8))
    assert overlap(soft, tmp_path / "b.png") > 0.97
    # JPEG saved again as PNG.
    assert overlap(Image.open(tmp_path / "a.jpg"), tmp_path / "c.png") > 0.97
    # Numbers of classes and of cells are no soft edges.
    classes = np.where(_DISTANCE <= 10, 255, np.where(_DISTANCE <= 20, 128, np.where(_DISTANCE <= 25, 40, 7))) * DISC
    assert overlap(Image.fromarray(classes.astype(np.uint8)), tmp_path / "d.png") == 1
    cells = (_X // 4 * 6 + _Y // 8) * DISC
    assert (
        overlap(Image.fromarray(np.where(DISC, np.maximum(cells % 256, 1), 0).astype(np.uint8)), tmp_path / "e.png")
        == 1
    )


def test_levels_of_a_palette_are_its_numbers(tmp_path):
    numbers = np.zeros((8, 8), np.uint8)
    numbers[:4], numbers[4:, :4] = 1, 2
    mask = Image.fromarray(numbers, "P")
    # The colours that VOC's programs give to classes: two of one brightness.
    mask.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    mask.save(tmp_path / "a.png")
    assert [int(read_mask(str(tmp_path / "a.png"), [level]).sum()) for level in (1, 2, 128)] == [32, 16, 0]
    assert int(read_mask(str(tmp_path / "a.png")).sum()) == 48


def test_masks_with_palettes_and_opacity(tmp_path):
    palette = Image.fromarray(DISC.astype(np.uint8), "P")
    palette.putpalette([0, 0, 0, 200, 0, 0])
    assert overlap(palette, tmp_path / "a.png") == 1
    # Black is the second colour.
    swapped = Image.fromarray((~DISC).astype(np.uint8), "P")
    swapped.putpalette([255, 255, 255, 0, 0, 0])
    assert overlap(swapped, tmp_path / "b.png") == 1
    # No black at all: the numbers count.
    coloured = Image.fromarray(DISC.astype(np.uint8), "P")
    coloured.putpalette([10, 10, 60, 200, 0, 0])
    assert overlap(coloured, tmp_path / "c.png") == 1
    opacity = np.zeros((120, 160, 4), np.uint8)
    opacity[..., 3] = DISC * 255
    assert overlap(Image.fromarray(opacity), tmp_path / "d.png") == 1
    with pytest.raises(DatasetError, match="cells cannot be told from noise"):
        overlap(Image.fromarray(DISC.astype(np.uint8) * 60), tmp_path / "e.jpg")


@pytest.mark.parametrize("written", [1, 1.0, "1"])
def test_ids_as_programs_write_them(tmp_path, written):
    content = coco(tmp_path, category_id=written)
    content["images"][0]["id"] = 1
    content["annotations"][0]["image_id"] = written
    (row,), bad = write(tmp_path, content)
    assert row["objects"]["category"] == ["RBC"] and not bad.messages


def test_ids_that_are_no_whole_number_or_twins(tmp_path):
    rows, bad = write(tmp_path, coco(tmp_path, category_id=1.5))
    assert rows[0]["objects"]["category"] == [] and said(bad, "category_id: 1.5 must be a whole number or a text")
    content = coco(tmp_path)
    content["categories"].append({"id": "1", "name": "WBC"})
    _, bad = write(tmp_path, content)
    assert said(bad, "categories[2].id: 1 is the id of RBC and of WBC")
