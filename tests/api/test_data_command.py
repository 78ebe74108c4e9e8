"""`unihema data` as a user meets it: what is said, what is written, and the exit code."""

import json
import subprocess
import zipfile
from pathlib import Path

import pytest
from command import run_command
from data_folders import write_coco, write_photograph


def run(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess:
    return run_command("data", *arguments, cwd=cwd)


def test_list_all_and_one():
    listed = run("list")
    assert listed.returncode == 0 and len(listed.stdout.splitlines()) == 48
    records = [json.loads(line) for line in run("list", "--task", "detection", "--json").stdout.splitlines()]
    assert len(records) == 17 and {record["task"] for record in records} == {"detection"}
    shown = run("list", "detection/txl-pbc")
    for text in (
        "MIT AND CC-BY-4.0",
        "notes:    Photographs come from BCCD",
        "Layout `yolo`",
        "disease:  (not stated)",
    ):
        assert text in shown.stdout


def test_prepare_then_check(tmp_path):
    for split, seed in (("train", 1), ("val", 2)):
        write_photograph(tmp_path / "set" / split / "Basophil" / "a.png", seed)
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for path in (tmp_path / "set").rglob("*.png"):
            archive.write(path, path.relative_to(tmp_path))
    prepared = run("prepare", "set.zip", "-o", "out", "--license", "MIT", cwd=tmp_path)
    assert prepared.returncode == 0, prepared.stderr
    assert "train: single_cell 1" in prepared.stdout and "Written to out, read as class_folders." in prepared.stdout
    checked = run("check", "out", cwd=tmp_path)
    assert checked.returncode == 0, checked.stderr
    assert "out/val single_cell: 1 rows (basophil 1)" in checked.stdout
    assert "strictest licence: MIT" in checked.stdout and "Nothing to put right." in checked.stdout

    write_photograph(tmp_path / "out" / "val" / "crops" / "basophil" / "b.png", 1)
    found = run("check", "out", "set.zip", "--data-license", "out=CC-BY-4.0", "-o", "report.json", cwd=tmp_path)
    assert found.returncode == 1
    assert "photographs in more than one split (leaks): 1" in found.stdout
    assert "the same photograph both in out/train and out/val: 1 exact" in found.stdout
    assert "set.zip: safe to unpack" in found.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["clean"] is False and report["repeats"][0]["leak"] is True
    assert report["licence"]["strictest"] == "CC-BY-4.0"


def test_bad_rows_are_listed_and_the_rest_goes_on(tmp_path):
    write_photograph(tmp_path / "set" / "a.png")
    write_coco(tmp_path / "set" / "all.json", {"a.png": [[1, 2, 3, 4], [99, 2, 3, 4]]})
    stopped = run("prepare", "set", "-o", "out", cwd=tmp_path)
    assert stopped.returncode == 2 and "all.json: annotations[1].bbox (a.png)" in stopped.stderr
    assert not (tmp_path / "out").exists() and "Traceback" not in stopped.stderr
    went_on = run("prepare", "set", "-o", "out", "--on-invalid", "skip", "--val-share", 0, cwd=tmp_path)
    assert went_on.returncode == 1 and "left out: set/all.json: annotations[1].bbox" in went_on.stderr
    checked = run("check", "set", cwd=tmp_path)
    assert checked.returncode == 1 and "bad rows: 1" in checked.stdout and "lies outside the image" in checked.stdout


def test_a_planted_path_traversal_is_found(tmp_path):
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        archive.writestr("../../evil.png", b"x")
    checked = run("check", "evil.zip", cwd=tmp_path)
    assert checked.returncode == 1 and "'../../evil.png' leads out of the folder" in checked.stdout
    prepared = run("prepare", "evil.zip", "-o", "out", cwd=tmp_path)
    assert prepared.returncode == 2 and "1 unsafe member, so nothing was unpacked" in prepared.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["evil.zip"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("list", "bccd"), "detection/bccd, single_cell/bccd"),
        (("list", "--task", "counting"), "'counting' is not one of 'detection'"),
        (("prepare", "gone.zip", "-o", "out"), "gone.zip: no such archive or folder"),
        (("prepare", "gone.zip", "-o", "out", "-d", "bcd"), "No data set 'bcd'"),
        (("prepare", "gone.zip", "-o", "out", "--rename", "x"), "Invalid value for '--rename': 'x' must be NAME=VALUE"),
        (("check", "gone"), "gone: neither a data folder nor a zip or tar file"),
    ],
)
def test_errors_are_one_line(tmp_path, arguments, message):
    result = run(*arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr and "Traceback" not in result.stderr and not list(tmp_path.iterdir())
