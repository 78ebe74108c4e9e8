"""Hostile files that once crashed a reader, made it wait, or took gigabytes: each ends in an error that names it."""

import json
import os
import struct
import tarfile
import zlib

import pyarrow.parquet as parquet
import pytest
from data_folders import write_coco, write_lines, write_photograph

from unihema.errors import DatasetError
from unihema.training.data.curation.archives import unpack, unsafe_members
from unihema.training.data.curation.check import check_data
from unihema.training.data.layouts import files
from unihema.training.data.layouts.files import read_json, read_table, read_text
from unihema.training.data.layouts.voc import LARGEST_FILE, MOST_ELEMENTS, is_voc, read_voc
from unihema.training.data.readers import load_folder
from unihema.training.data.rows import BadRows
from unihema.training.data.shards import write_shards
from unihema.training.data.verify import verify_rows


BOX = [2, 3, 20, 15]


@pytest.fixture
def lab(tmp_path):
    write_photograph(tmp_path / "images" / "a.png")
    write_coco(tmp_path / "train.json", {"a.png": [BOX]})
    return tmp_path


# Text files


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[" * 1_000_000, "cannot be read as JSON"),
        (b'{"a":' * 1_000_000, "cannot be read as JSON"),
        (b"9" * 5000, "cannot be read as JSON"),
        (b'{"a": "\\ud800"}', "half a surrogate pair"),
        (b'{"a": 1, "a": 2}', "the key 'a' twice"),
        (b"\xff\xfe\x00", "cannot be read as UTF-8"),
        (b"", "broken JSON"),
        (b"\x00\x01", "broken JSON"),
    ],
)
def test_json(tmp_path, content, words):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(DatasetError, match=rf"x\.json.*{words}"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize("number", ["1e400", "-1e400", "NaN", "9" * 400, "true", '"1"', "[]", "{}", '"\\u001b[2J"'])
def test_values_of_a_coco_file(lab, number):
    whole = json.loads((lab / "train.json").read_text())
    places = [("images", key) for key in whole["images"][0]] + [("annotations", key) for key in whole["annotations"][0]]
    for group, key in (*places, ("categories", "id"), ("categories", "name")):
        content = json.loads(json.dumps(whole))
        content[group][0][key] = "@"
        (lab / "train.json").write_text(json.dumps(content).replace('"@"', number))
        try:
            rows = load_folder(lab, "train")
        except DatasetError as error:
            assert "train.json" in str(error) or "a.png" in str(error)
        else:
            json.dumps(rows, ensure_ascii=False).encode()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes among files are of Unix")
def test_text_files_that_are_no_files(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "broken").symlink_to("nowhere")
    (tmp_path / "circle").symlink_to("circle")
    for name, words in (
        ("folder", "not a regular file"), ("pipe", "not a regular file"), ("broken", "No such file"), ("circle", "symbolic"),
    ):  # fmt: skip
        with pytest.raises(DatasetError, match=words):
            read_text(tmp_path / name)


def test_large_text_is_not_read(tmp_path, monkeypatch):
    path = tmp_path / "x.csv"
    with path.open("wb") as file:
        file.truncate(files.LARGEST_TEXT + 1)
    for read in (read_json, read_text, lambda path: list(read_table(path, BadRows()))):
        with pytest.raises(DatasetError, match=r"x\.csv: larger than 512 MB"):
            read(path)


def test_a_table_with_a_cell_of_a_megabyte(tmp_path):
    (tmp_path / "x.csv").write_text('"' + "x" * 1_000_000)
    with pytest.raises(DatasetError, match=r"x\.csv:1: not a table row"):
        list(read_table(tmp_path / "x.csv", BadRows()))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"<annotation>" * (MOST_ELEMENTS + 1), f"more than {MOST_ELEMENTS} elements"),
        (b" " * (LARGEST_FILE + 1), "larger than 16 MB"),
        (b'<?xml version="1.0" encoding="utf-7"?><annotation/>', "cannot be read as XML|broken XML"),
        (b"\x00", "broken XML"),
    ],
)
def test_xml(tmp_path, content, words):
    path = tmp_path / "x.xml"
    path.write_bytes(content)
    assert is_voc(path)
    bad = BadRows()
    assert read_voc(tmp_path, "set", {}, bad) == []
    with pytest.raises(DatasetError, match=words):
        raise DatasetError(bad.messages[0])


def test_text_between_many_elements_takes_no_square_of_time(tmp_path):
    write_photograph(tmp_path / "x.png")
    (tmp_path / "x.xml").write_text("<annotation>" + "word<a/>" * (MOST_ELEMENTS - 1) + "</annotation>")
    assert len(read_voc(tmp_path, "set", {}, BadRows())) == 1


@pytest.mark.parametrize(
    "content", ["names: " + "[" * 5000, "a: &a [x]\nnames: [*a, *a]", "names: !!python/object:os.x [1]", "\x00"]
)
def test_yaml(tmp_path, content):
    write_photograph(tmp_path / "x.png")
    (tmp_path / "x.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    (tmp_path / "data.yaml").write_text(content)
    try:
        rows = load_folder(tmp_path, "train")
    except DatasetError as error:
        assert "data.yaml" in str(error)
    else:
        assert rows["detection"][0]["annotated_classes"] == ["1"]


# Images and folders


def test_a_header_that_promises_a_billion_pixels(lab):
    header = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    chunks = (header, b"IDAT" + zlib.compress(bytes(100)), b"IEND")
    body = b"".join(struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    (lab / "images" / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    bad = BadRows()
    assert verify_rows(load_folder(lab, "train"), bad, progress=False) == {}
    assert len(bad.messages) == 1 and "a.png: not a readable image (more than 400000000 pixels)" in bad.messages[0]


def test_a_file_far_larger_than_its_pixels(lab):
    with (lab / "images" / "a.png").open("r+b") as file:
        file.truncate(2 << 30)
    (message,) = check_data([lab]).bad_rows
    assert "a.png: not a readable image (2147483648 bytes for 96x72 pixels)" in message


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes among files are of Unix")
@pytest.mark.parametrize("kind", ["folder", "pipe", "broken link", "link to itself"])
def test_images_that_are_no_files(lab, kind):
    path = lab / "images" / "a.png"
    path.unlink()
    make = {
        "folder": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
        "broken link": lambda: path.symlink_to("nowhere"),
        "link to itself": lambda: path.symlink_to("a.png"),
    }
    make[kind]()
    with pytest.raises(DatasetError, match=r"images\[0\]: no image .*a\.png"):
        load_folder(lab, "train")
    assert len(check_data([lab]).bad_rows) == 1


def test_names_that_are_no_text(tmp_path):
    write_photograph(tmp_path / "monocyte" / "a.png")
    os.rename(os.fsencode(tmp_path / "monocyte" / "a.png"), os.fsencode(tmp_path / "monocyte") + b"/\xff.png")
    write_photograph(tmp_path / "monocyte" / "b.png")
    with pytest.raises(DatasetError, match="the name is not UTF-8") as caught:
        load_folder(tmp_path, "train")
    str(caught.value).encode()


@pytest.mark.parametrize("path", ["x" * 5000, "a\0b"])
def test_paths_that_no_file_system_takes(path):
    with pytest.raises(DatasetError, match="no such folder"):
        load_folder(path)


# Shards


@pytest.fixture
def shards(tmp_path):
    source, out = tmp_path / "lab", tmp_path / "shards"
    for number in range(3):
        write_photograph(source / "images" / f"{number}.png", number)
    write_coco(source / "train.json", {f"{number}.png": [BOX] for number in range(3)})
    questions = [{"image": f"{number}.png", "question": "Q?", "answer": "A."} for number in (0, 0, 1)]
    write_lines(source / "qa_train.jsonl", *questions)
    write_shards(load_folder(source, "train"), out / "train", "lab")
    return out


def rows_of(folder):
    return [row for rows in load_folder(folder, "train").values() for row in rows]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tasks": []}, "'tasks' must be an object"),
        ({"tasks": {"detection": 3}}, "tasks.'detection': an object with rows"),
        ({"tasks": {"flying": {}}}, "tasks.'flying': no such task"),
        ({"rows": 7}, "7 rows of detection, but the shards have 3"),
        ({"rows": "x"}, "an object with rows"),
        ({"shards": 3}, "shards and witnesses must be lists"),
        ({"shards": [3]}, "a shard has a file and row_groups"),
        ({"shards": [{"file": "../x.parquet", "row_groups": [3]}]}, "leads out of the folder"),
        ({"shards": [{"file": "detection-00000.parquet", "row_groups": [-3]}]}, "whole numbers above 0"),
        (
            {"shards": [{"file": "detection-00000.parquet", "row_groups": [2]}]},
            r"row groups of \[3\] samples, but shards.json",
        ),
        ({"witnesses": [{"file_name": "a"}]}, r"witnesses\[0\] lacks objects"),
        ({"witnesses": [{"objects": {"bbox": 1, "category": ["RBC"]}}]}, "objects.bbox must be a list"),
    ],
)
def test_an_index_of_another_shape(shards, change, words):
    index = json.loads((shards / "train" / "shards.json").read_text())
    (index if "tasks" in change else index["tasks"]["detection"]).update(change)
    (shards / "train" / "shards.json").write_text(json.dumps(index))
    with pytest.raises(DatasetError, match=rf"(?s)shards\.json.*{words}|{words}"):
        rows_of(shards)


@pytest.mark.parametrize("task", ["detection", "question_answering"])
@pytest.mark.parametrize("column", ["image", "rows", "row_count"])
@pytest.mark.parametrize("values", [None, 1.5, "x", "[1]", '[{"file_name": 3}]', b"x", [1], {"bytes": 3}])
def test_columns_that_are_missing_or_of_another_type(shards, task, column, values):
    path = shards / "train" / f"{task}-00000.parquet"
    table = parquet.read_table(path)
    at = table.column_names.index(column)
    other = table.remove_column(at) if values is None else table.set_column(at, column, [[values] * len(table)])
    parquet.write_table(other, path)
    # What is not needed to read a row is missed when its image is opened.
    with pytest.raises(DatasetError, match=rf"{task}|Parquet"):
        for row in rows_of(shards):
            row["image"].check()
        if task == "detection" and column == "row_count":
            raise DatasetError("detection has a row a sample and does not ask for their number")


# Archives


@pytest.mark.parametrize(
    "content", [b"", b"x" * 512, b"\x1f\x8b" + b"x" * 600, b"PK\x03\x04" + bytes(100), b"\xfd7zXZ\x00" + bytes(9)]
)
@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tar.xz", ".zip"])
def test_archives_of_noise(tmp_path, content, suffix):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    for read in (unsafe_members, lambda path: unpack(path, tmp_path / "out")):
        with pytest.raises(DatasetError, match=r"x\."):
            read(path)


def test_damaged_tar_headers(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        (tmp_path / "a.txt").write_text("x" * 300)
        archive.add(tmp_path / "a.txt", "a.txt")
        info = tarfile.TarInfo("b" * 200)
        info.pax_headers = {"mtime": "12.5"}
        archive.addfile(info)
    good = path.read_bytes()
    for place in range(0, len(good), 37):
        for value in (0, 0x20, 0x39, 0x80, 0xFF):
            damaged = bytearray(good)
            damaged[place] = value
            path.write_bytes(damaged)
            try:
                unsafe_members(path)
            except DatasetError as error:
                assert "x.tar" in str(error)


def test_a_name_of_ten_thousand_characters_is_not_quoted_whole(tmp_path):
    write_photograph(tmp_path / "images" / "a.png")
    write_coco(tmp_path / "train.json", {"a.png": [BOX], "b" * 10_000 + ".png": [BOX]})
    with pytest.raises(DatasetError, match=r"images\[1\]: no image .*b+ \.\.\. b+") as caught:
        load_folder(tmp_path, "train")
    assert len(str(caught.value)) < 2000
