"""Readers: each layout on a tiny folder made here, what is wrong with a folder, and the real folders where present."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unihema.errors import DatasetError
from unihema.training.data.readers import load_folder
from unihema.training.data.rows import check_rows, class_names, morphology_schema, single_cell_names


def write_image(path: Path, size=(40, 30), value=200):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size[1], size[0], 3), value, np.uint8)).save(path)


def write_mask(path: Path, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = np.zeros((size[1], size[0]), np.uint8)
    mask[5:15, 10:25] = 255
    Image.fromarray(mask).save(path)


def write_lines(path: Path, *records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def coco(file_name="a.png", **box):
    annotation = {"id": 7, "image_id": 1, "category_id": 2, "bbox": [4, 5, 10, 8], "iscrowd": 0} | box
    return {
        "images": [{"id": 1, "file_name": file_name, "width": 40, "height": 30}],
        "annotations": [annotation],
        "categories": [{"id": 1, "name": "RBC"}, {"id": 2, "name": "WBC"}],
    }


@pytest.fixture
def coco_folder(tmp_path):
    def make(content):
        write_image(tmp_path / "images" / "a.png")
        (tmp_path / "train.json").write_text(json.dumps(content))
        return tmp_path

    return make


@pytest.fixture
def own_folder(tmp_path):
    split = tmp_path / "lab" / "val"
    write_image(split / "images" / "a.png")
    write_mask(split / "masks" / "a.png")
    write_image(split / "crops" / "monocyte" / "c.png")
    content = coco("images/a.png", attributes={"vacuoles": "absent", "nucleolus": None})
    (split / "annotations.json").write_text(json.dumps(content))
    write_lines(split / "qa.jsonl", {"image": "crops/monocyte/c.png", "question": "Which cell?", "answer": "monocyte"})
    write_lines(split / "cloze.jsonl", {"image": "images/a.png", "masked": "A <extra_id_0>.", "completed": "A field."})
    return tmp_path / "lab"


def test_own_format_gives_all_tasks(own_folder):
    rows = load_folder(own_folder, "val")
    assert {task: len(found) for task, found in rows.items()} == dict.fromkeys(
        ("detection", "segmentation", "single_cell", "question_answering", "cloze"), 1
    )
    detection = rows["detection"][0]
    assert detection["objects"]["bbox"] == [[4.0, 5.0, 10.0, 8.0]]
    assert detection["objects"]["category"] == ["WBC"]
    assert detection["objects"]["morphology"] == [{"vacuoles": "absent"}]
    assert detection["annotated_classes"] == ["RBC", "WBC"]
    assert detection["dataset"] == "lab"
    assert rows["segmentation"][0]["prompt"] == "white blood cell"
    assert Path(rows["segmentation"][0]["mask"]).parent.name == "masks"
    assert rows["single_cell"][0]["label"] == "monocyte"
    assert rows["question_answering"][0]["answer"] == "monocyte"
    assert rows["cloze"][0]["completed"] == "A field."
    for found in rows.values():
        assert Path(found[0]["image"]).is_file()


def test_tasks_prompt_and_rename(own_folder):
    rows = load_folder(
        own_folder, "val", tasks=["segmentation", "single_cell"], prompt="nucleus", rename={"monocyte": "mono"}
    )
    assert set(rows) == {"segmentation", "single_cell"}
    assert rows["segmentation"][0]["prompt"] == "nucleus"
    assert single_cell_names(rows["single_cell"]) == ["mono"]
    renamed = load_folder(own_folder, "validation", rename={"WBC": "white blood cell"})["detection"]
    assert class_names(renamed) == ["RBC", "white blood cell"]


def test_metadata_layout(tmp_path):
    folder = tmp_path / "images" / "train"
    write_image(folder / "a.png")
    write_image(folder / "b.png", size=(20, 24))
    write_mask(folder / "masks" / "a.png")
    write_lines(
        folder / "metadata.jsonl",
        {"file_name": "a.png", "mask_file_name": "masks/a.png", "label": "basophil", "cell_size": "small"},
        {"file_name": "b.png", "label": "eosinophil", "cell_size": None},
    )
    write_lines(tmp_path / "qa_train.jsonl", {"image": "train/a.png", "question": "What?", "answer": "Basophil."})
    sentence = {"masked": "<extra_id_0> <extra_id_0>", "masked_t5": "<extra_id_0> <extra_id_1>", "sentence": "a b"}
    write_lines(tmp_path / "mlm_train.jsonl", {"image": "train/b.png", **sentence})

    rows = load_folder(tmp_path, "train")
    assert "detection" not in rows
    assert [row["label"] for row in rows["single_cell"]] == ["basophil", "eosinophil"]
    assert len(rows["segmentation"]) == 1
    assert rows["cloze"][0]["masked"] == "<extra_id_0> <extra_id_1>"
    assert rows["cloze"][0]["completed"] == "a b"
    assert rows["question_answering"][0]["file_name"] == "train/a.png"

    whole = load_folder(tmp_path, "train", tasks=["detection"], attributes_as_detection=True)["detection"]
    assert whole[1]["objects"]["bbox"] == [[0.0, 0.0, 20.0, 24.0]]
    assert [row["objects"]["morphology"] for row in whole] == [[{"cell_size": "small"}], [{}]]
    assert whole[0]["annotated_classes"] == ["basophil", "eosinophil"]


def test_metadata_beside_its_images(tmp_path):
    write_image(tmp_path / "train" / "a.png")
    write_mask(tmp_path / "train" / "masks" / "a.png")
    write_lines(
        tmp_path / "train" / "metadata.jsonl", {"file_name": "a.png", "mask_file_name": "masks/a.png", "slide": 3}
    )
    row = load_folder(tmp_path, "train")["segmentation"][0]
    assert (row["file_name"], row["slide"]) == ("train/a.png", "3")


def test_metadata_objects(tmp_path):
    folder = tmp_path / "images" / "train"
    write_image(folder / "a.png")
    objects = {"bbox": [[1, 2, 3, 4]], "category": [0], "category_name": ["RBC"]}
    write_lines(folder / "metadata.jsonl", {"file_name": "a.png", "objects": objects})
    row = load_folder(tmp_path, "train")["detection"][0]
    assert row["objects"]["category"] == ["RBC"]
    assert row["annotated_classes"] == ["RBC"]


def test_boxes_partly_outside_are_clipped(coco_folder):
    row = load_folder(coco_folder(coco(bbox=[-3, 20, 10, 30])), "train")["detection"][0]
    assert row["objects"]["bbox"] == [[0.0, 20.0, 7.0, 10.0]]


@pytest.mark.parametrize(
    ("box", "words"),
    [
        ([4, 5, 0, 8], "has no area"),
        ([4, 5, 10, -2], "has no area"),
        ([50, 5, 10, 8], "outside the image of 40x30"),
        ([4, 5, 10], "four finite numbers"),
        ([4, float("nan"), 10, 8], "four finite numbers"),
    ],
)
def test_invalid_boxes(coco_folder, box, words):
    folder = coco_folder(coco(bbox=box))
    with pytest.raises(DatasetError, match=rf"train\.json: annotations\[0\]\.bbox \(a\.png\): .*{words}"):
        load_folder(folder, "train")
    assert load_folder(folder, "train", on_invalid="skip")["detection"][0]["objects"]["bbox"] == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_id": 9}, r"annotations\[0\]\.image_id: 9 is not among the images"),
        ({"category_id": 5}, r"annotations\[0\]\.category_id \(a\.png\): 5 .*1 RBC, 2 WBC"),
        ({"bbox": None}, "field 'bbox' is missing"),
    ],
)
def test_wrong_references(coco_folder, change, words):
    with pytest.raises(DatasetError, match=words):
        load_folder(coco_folder(coco(**change)), "train")


def test_missing_things_are_named(tmp_path, coco_folder):
    with pytest.raises(DatasetError, match=r"nowhere: no such folder.\nAccepted layouts"):
        load_folder(tmp_path / "nowhere")
    folder = coco_folder(coco("missing.png"))
    with pytest.raises(DatasetError, match=r"train.json: images\[0\]: no image .*missing.png"):
        load_folder(folder, "train")
    with pytest.raises(DatasetError, match=r"no data in split 'val'; the folder holds images, train.json"):
        load_folder(folder, "val")
    with pytest.raises(DatasetError, match="Unknown task 'detect'"):
        load_folder(folder, "train", tasks=["detect"])


def test_broken_json_is_located(tmp_path, coco_folder):
    folder = coco_folder(coco())
    (folder / "train.json").write_text('{"images": [],\n "annotations": [}')
    with pytest.raises(DatasetError, match=r"train\.json:2: broken JSON"):
        load_folder(folder, "train")
    (folder / "train.json").unlink()
    (folder / "qa_train.jsonl").write_text('{"image": "a.png", "question": "q", "answer": "a"}\n\n{"image": \n')
    with pytest.raises(DatasetError, match=r"qa_train\.jsonl:3: broken JSON"):
        load_folder(folder, "train")
    (folder / "qa_train.jsonl").write_text('{"image": "a.png", "question": "q"}\n')
    with pytest.raises(DatasetError, match=r"qa_train\.jsonl:1: field 'answer' is missing"):
        load_folder(folder, "train")


def test_mask_without_image(own_folder):
    write_mask(own_folder / "val" / "masks" / "stray.png")
    with pytest.raises(DatasetError, match=r"stray\.png: no image of this name"):
        load_folder(own_folder, "val")


def test_unknown_names_suggest_the_closest(own_folder):
    rows = load_folder(own_folder, "val")
    with pytest.raises(DatasetError, match=r"images/a\.png: unknown class 'WBC'; known: rbc, wbc\. Did you mean 'wbc'"):
        check_rows(rows["detection"], class_names=["rbc", "wbc"])
    with pytest.raises(DatasetError, match="unknown single-cell label 'monocyte'.*Did you mean 'monocytes'"):
        check_rows(rows["single_cell"], single_cell_labels=["basophil", "monocytes"])
    with pytest.raises(DatasetError, match="unknown value of vacuoles 'absent'; known: none, many"):
        check_rows(rows["detection"], morphology={"vacuoles": ["none", "many"]})
    check_rows(rows["detection"], ["RBC", "WBC"], morphology={"basophilia": ["slight", "moderate"]})


def test_malformed_rows():
    row = {"image": "x.png", "file_name": "x.png", "dataset": "d", "task": "detection"}
    with pytest.raises(DatasetError, match=r"x\.png: a detection row needs objects"):
        check_rows([row])
    objects = {"bbox": [[0, 0, 1, 1]], "category": ["a", "b"]}
    with pytest.raises(DatasetError, match="different lengths"):
        check_rows([row | {"objects": objects}])
    with pytest.raises(DatasetError, match="unknown task 'detct'"):
        check_rows([row | {"task": "detct"}])


def test_morphology_schema_leaves_out_constants():
    def row(attributes):
        objects = {"bbox": [[0, 0, 1, 1]], "category": ["a"], "morphology": [attributes]}
        return {"task": "detection", "objects": objects}

    rows = [row({"vacuoles": "yes", "size": "big"}), row({"vacuoles": "no", "size": "big"}), row({})]
    assert morphology_schema(rows) == {"vacuoles": ["no", "yes"]}


@pytest.mark.parametrize(
    ("folder", "counts"),
    [
        ("cbc", {"detection": 19}),
        ("bccd_wbc_seg", {"segmentation": 20}),
        ("pbc", {"single_cell": 1205, "question_answering": 12300, "cloze": 1025}),
        ("wbc_seg_zheng1", {"segmentation": 34, "single_cell": 34}),
    ],
)
def test_real_folders(data_dir, folder, counts):
    rows = load_folder(data_dir / folder, "val")
    assert {task: len(found) for task, found in rows.items()} == counts
    for found in rows.values():
        check_rows(found, class_names(found) or None, single_cell_names(found) or None)


def test_a_name_that_boxes_have_is_a_class_though_a_group_has_it_too(coco_folder):
    content = coco(category_id="1")
    content["annotations"].append(content["annotations"][0] | {"id": 8, "category_id": 2, "bbox": [20, 5, 9, 9]})
    content["categories"] = [
        {"id": 0, "name": "RBC", "supercategory": "none"},
        {"id": "1", "name": "RBC", "supercategory": "RBC"},
        {"id": 2, "name": "WBC", "supercategory": "RBC"},
    ]
    (row,) = load_folder(coco_folder(content), "train")["detection"]
    assert row["annotated_classes"] == ["RBC", "WBC"] and row["objects"]["category"] == ["RBC", "WBC"]
    renamed = {"RBC": "cell", "WBC": "cell"}
    (row,) = load_folder(coco_folder(content), "train", rename=renamed)["detection"]
    assert row["annotated_classes"] == ["cell"]


def test_an_image_may_say_itself_what_was_looked_for_in_it(coco_folder):
    content = coco()
    content["images"][0]["annotated_classes"] = ["WBC"]
    (row,) = load_folder(coco_folder(content), "train")["detection"]
    assert row["annotated_classes"] == ["WBC"]
    for wrong, words in (
        ("WBC", "a list of class names"),
        (["blast"], "'blast' is not among the categories"),
        ([3], "3 is"),
    ):
        content["images"][0]["annotated_classes"] = wrong
        with pytest.raises(DatasetError, match=rf"images\[0\].annotated_classes: .*{words}"):
            load_folder(coco_folder(content), "train")


def test_what_boxes_say_of_a_patient_holds_for_masks_and_questions(own_folder):
    path = own_folder / "val" / "annotations.json"
    content = json.loads(path.read_text())
    content["images"][0]["patient"] = "p7"
    path.write_text(json.dumps(content))
    rows = load_folder(own_folder, "val")
    assert [rows[task][0].get("patient") for task in ("detection", "segmentation", "cloze")] == ["p7"] * 3
    assert rows["single_cell"][0].get("patient") is None
    alone = load_folder(own_folder, "val", tasks=["segmentation"])
    assert list(alone) == ["segmentation"] and alone["segmentation"][0]["patient"] == "p7"
