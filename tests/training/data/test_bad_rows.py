"""Every bad row is named with its file and line or entry; reading stops or goes on as asked, and loses nothing good."""

import json
import logging

import pytest
from data_folders import write_coco, write_photograph

from unihema.errors import DatasetError
from unihema.training.data.readers import load_folder
from unihema.training.data.rows import BadRowsError, check_rows


@pytest.fixture
def folder(tmp_path):
    """Two good images and boxes among bad ones."""
    for name in ("a", "b"):
        write_photograph(tmp_path / "images" / f"{name}.png")
    good = [1, 2, 3, 4]
    write_coco(
        tmp_path / "train.json",
        {"a.png": [good, [500, 2, 3, 4]], "gone.png": [good], "../../etc/passwd": [], "b.png": [[1, 2, 0, 4], good]},
    )
    (tmp_path / "qa_train.jsonl").write_text(
        '{"image": "a.png", "question": "q", "answer": "a"}\n'
        "{broken\n"
        "[1, 2]\n"
        '{"image": "a.png", "question": "q"}\n'
        '{"image": "/etc/passwd", "question": "q", "answer": "a"}\n'
    )
    return tmp_path


EXPECTED = [
    "train.json: images[1]: no image",
    "train.json: images[2]: '../../etc/passwd' leads out of the folder",
    "train.json: annotations[1].bbox (a.png): box [500, 2, 3, 4] lies outside the image of 96x72 pixels",
    "train.json: annotations[3].bbox (b.png): box [1, 2, 0, 4] has no area",
    "qa_train.jsonl:2: broken JSON",
    "qa_train.jsonl:3: a JSON object {...} is needed, got list",
    "qa_train.jsonl:4: field 'answer' is missing",
    "qa_train.jsonl:5: '/etc/passwd' is an absolute path",
]


def test_all_bad_rows_are_listed_at_once(folder):
    with pytest.raises(BadRowsError) as caught:
        load_folder(folder, "train")
    assert len(caught.value.messages) == len(EXPECTED)
    for message, expected in zip(caught.value.messages, EXPECTED):
        assert message.startswith(f"{folder}/{expected}"), message
    assert "8 bad rows:" in str(caught.value) and 'on_invalid="skip"' in str(caught.value)


def test_going_on_loses_nothing_good(folder, caplog):
    with caplog.at_level(logging.WARNING):
        rows = load_folder(folder, "train", on_invalid="skip")
    assert [row["objects"]["bbox"] for row in rows["detection"]] == [[[1, 2, 3, 4]], [[1, 2, 3, 4]]]
    assert len(rows["question_answering"]) == 1
    assert [record.getMessage() for record in caplog.records] == [
        message for message in (record.getMessage() for record in caplog.records) if message.endswith("Left out.")
    ]
    assert len(caplog.records) == len(EXPECTED)


def test_nothing_good_at_all(tmp_path):
    write_photograph(tmp_path / "images" / "a.png")
    (tmp_path / "qa_train.jsonl").write_text("{broken\n")
    with pytest.raises(DatasetError, match=r"every row of split 'train' is bad: .*qa_train\.jsonl:1"):
        load_folder(tmp_path, "train", on_invalid="skip")


def test_a_wrong_setting(folder):
    with pytest.raises(ValueError, match="on_invalid='ignore' must be 'error' or 'skip'"):
        load_folder(folder, "train", on_invalid="ignore")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"images": [{"id": 1},\n}', r"train\.json:2: broken JSON"),
        ('{"images": {}, "annotations": [], "categories": []}', r"'images' must be a list"),
        ('{"images": [], "annotations": [], "categories": []}', "no categories"),
        ('{"images": [], "annotations": []}', "field 'categories' is missing"),
        ("[]", "a COCO object"),
        ('{"images": []} x', "Extra data"),
        ('{"images" []}', r"train\.json:1: broken JSON at column 11"),
        ("[" * 100_000, r"train\.json:1: cannot be read as JSON"),
        ('{"id": ' + "1" * 5000 + "}", r"train\.json:1: cannot be read as JSON"),
    ],
)
def test_files_that_cannot_be_read_at_all(tmp_path, content, words):
    (tmp_path / "train.json").write_text(content)
    for on_invalid in ("error", "skip"):
        with pytest.raises(DatasetError, match=words):
            load_folder(tmp_path, "train", on_invalid=on_invalid)


@pytest.mark.parametrize(
    ("image", "annotation", "words"),
    [
        ("x", {}, r"images\[0\]: a JSON object"),
        ({"id": [1]}, {}, r"images\[0\]\.id: \[1\] must be a whole number or a text"),
        ({"id": 1, "file_name": 7}, {}, "a file name is needed, got 7"),
        ({"id": 1, "file_name": "a.png", "width": -4, "height": 3}, {}, "no size in pixels"),
        ({"id": 1, "file_name": "a.png", "width": float("inf"), "height": 3}, {}, "no size in pixels"),
        ({"id": 1, "file_name": "a.png"}, "x", r"annotations\[0\]: a JSON object"),
        (
            {"id": 1, "file_name": "a.png"},
            {"image_id": 1, "category_id": {}},
            r"annotations\[0\]\.category_id: {} must be",
        ),
        ({"id": 1, "file_name": "a.png"}, {"image_id": 1, "category_id": 0, "bbox": "box"}, "four finite numbers"),
        (
            {"id": 1, "file_name": "a.png"},
            {"image_id": 1, "category_id": 0, "bbox": [0, 0, 10**400, 1]},
            "four finite numbers",
        ),
        (
            {"id": 1, "file_name": "a.png"},
            {"image_id": 1, "category_id": 0, "bbox": [1, 1, 2, 2], "attributes": [1]},
            r"annotations\[0\]\.attributes \(a\.png\): a JSON object",
        ),
    ],
)
def test_entries_of_the_wrong_kind(tmp_path, image, annotation, words):
    write_photograph(tmp_path / "images" / "a.png")
    annotations = [annotation] if annotation else []
    content = {"images": [image], "annotations": annotations, "categories": [{"id": 0, "name": "RBC"}]}
    (tmp_path / "train.json").write_text(json.dumps(content))
    with pytest.raises(BadRowsError, match=words):
        load_folder(tmp_path, "train")


def test_all_unknown_names_are_listed():
    rows = [
        {"image": "x", "file_name": f"{number}.png", "dataset": "d", "task": "single_cell", "label": "blob"}
        for number in range(60)
    ]
    with pytest.raises(
        BadRowsError, match="(?s)60 bad rows:.*49.png: unknown single-cell label.*and 10 more"
    ) as caught:
        check_rows(rows, single_cell_labels=["monocyte"])
    assert len(caught.value.messages) == 60
