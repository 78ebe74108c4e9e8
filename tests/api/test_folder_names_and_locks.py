"""Results folders take images of any name, and one run at a time; what killed runs leave is cleaned."""

import csv
import json
import os
import subprocess
import sys
import tempfile
import threading
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from microscope_files import field, write_tiff
from PIL import Image
from tiny_checkpoint import save_tiny_checkpoint

from unihema import Analyzer, CheckpointError, OutputError
from unihema.checkpoint_files import read_json
from unihema.files import exclusive, find_images, scratch_folder, whole_folder, write_atomically
from unihema.result_folder import file_name
from unihema.results.export import table_text


pytestmark = pytest.mark.filterwarnings("ignore::unihema.analyzer.QueryCapWarning")

NAMES = [
    "line\nbreak.png",
    "carriage\rreturn.png",
    "both\r\nof them.png",
    'quo"te.png',
    "'quote.png",
    "comma,semicolon;.png",
    "...",
    "..png",
    "caf\udce9.png",
    "\udcff\udcfe.png",
    "x" * 251 + ".png",
    "ü" * 125 + ".png",
    "=1+1.png",
    "=HYPERLINK(1).png",
    "+1.png",
    "-1.png",
    "@SUM(1).png",
    "\t=1.png",
    "\uff1d1.png",
    "\u2028line.png",
    "\x1b[31mred.png",
    "a.png",
    "a.tif",
    "A.png",
    "a_overlay.png",
    "a.b.png",
    unicodedata.normalize("NFC", "ä.png"),
    unicodedata.normalize("NFD", "ä.png"),
]


def draw(path, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 60, 3), np.uint8)
    try:
        Image.fromarray(pixels).save(path, "TIFF" if path.endswith(".tif") else "PNG")
    except OSError:
        pytest.skip("this file system has no such names")


@pytest.fixture
def images(tmp_path, monkeypatch):
    """Images of awkward names in the working directory, so that tables begin with them."""
    (tmp_path / "images").mkdir()
    monkeypatch.chdir(tmp_path / "images")
    for number, name in enumerate(NAMES):
        draw(name, number)
    if len(os.listdir(".")) != len(NAMES):
        pytest.skip("this file system takes some of the names for one")
    return tmp_path / "images"


def test_images_of_any_name_have_files_and_a_row_of_their_own(analyzer, images, tmp_path):
    results = tmp_path / "results"
    for _ in range(2):
        report = analyzer.analyze_files(NAMES, results, formats=["geojson"])
        assert report.failed == {} and report.images == len(NAMES)
    assert len(report.skipped) == len(NAMES)
    whole = json.loads((results / "results.json").read_text(encoding="utf-8"))
    assert sorted(result["image"] for result in whole["images"]) == sorted(NAMES)
    records = [json.loads(path.read_text(encoding="utf-8")) for path in (results / "records").iterdir()]
    assert sorted(record["source"] for record in records) == sorted(str(images / name) for name in NAMES)
    files = [unicodedata.normalize("NFC", file.casefold()) for record in records for file in record["files"]]
    assert len(files) == len(set(files)) == 3 * len(NAMES)
    for file in os.listdir(results):
        assert file.isprintable() and len(os.fsencode(file)) <= 255 and not set(file) & set('<>:"/\\|?*')
        assert not file.startswith(".") or file == ".unihema.lock"
    for table in ("cells.csv", "counts.csv"):
        text = (results / table).read_bytes().decode("utf-8")
        rows = list(csv.DictReader(text.splitlines()))
        assert len(rows) == len(text.splitlines()) - 1 == text.count("\n") - 1 and "\r" not in text
        assert len({row["image"] for row in rows}) == len(NAMES)
        for row in rows:
            assert None not in row and not row["image"].startswith(tuple("=+-@\t＝")), row["image"]


def test_the_command_takes_them_and_prints_them_as_text(checkpoint, images, tmp_path):
    command = [
        sys.executable,
        "-m",
        "unihema",
        "predict",
        str(checkpoint),
        "-o",
        str(tmp_path / "results"),
        "--",
        *NAMES,
    ]
    bad = "bad\udcff\x1b[31m\n.png"
    (images / os.fsencode(bad).decode("utf-8", "surrogateescape")).write_bytes(b"no image")
    done = subprocess.run([*command, bad], capture_output=True, timeout=600)
    assert done.returncode == 1, done.stderr[-2000:]
    assert f"{len(NAMES)} analysed, 0 already done, 1 failed.".encode() in done.stdout
    assert b"\x1b[31m" not in done.stdout + done.stderr
    assert b"bad\\udcff\\x1b[31m\\n.png: not an image" in done.stderr.replace(b"\n  ", b"")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("=1+1", "'=1+1"),
        ("+1", "'+1"),
        ("-1", "'-1"),
        ("@A1", "'@A1"),
        ("\uff1d1", "'\uff1d1"),
        ("\t=1", "\\t=1"),
        ("a\r\nb\x00\u2028", "a\\r\\nb\\x00\\u2028"),
        ("Zelle ä 1.png", "Zelle ä 1.png"),
        ("", ""),
        (-1.5, -1.5),
        (None, None),
    ],
)
def test_text_of_tables(value, text):
    assert table_text(value) == text


def test_class_names_reach_tables_as_text(tmp_path):
    names = {0: "=cmd|' /C calc'!A0", 1: "-neutrophil"}
    folder = save_tiny_checkpoint(tmp_path / "unihema", id2label=names)
    draw(str(tmp_path / "a.png"))
    Analyzer.from_pretrained(folder, device="cpu").analyze_files(
        [tmp_path / "a.png"], tmp_path / "results", "detection"
    )
    rows = list(csv.DictReader((tmp_path / "results" / "counts.csv").read_text().splitlines()))
    assert [row["label"] for row in rows] == ["'=cmd|' /C calc'!A0", "'-neutrophil"]


def test_patterns_in_folders_with_brackets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("exp [1]", "exp [1]/deep*", "exp 1"):
        (tmp_path / folder).mkdir()
        draw(str(tmp_path / folder / "a.png"))
    for pattern, found in (
        ("exp [1]/*.png", ["exp [1]/a.png"]),
        ("exp [1]/**/*.png", ["exp [1]/a.png", "exp [1]/deep*/a.png"]),
        ("exp [1]/deep*/*.png", ["exp [1]/deep*/a.png"]),
        ("exp ?/*.png", ["exp 1/a.png"]),
    ):
        for prefix in ("", f"{tmp_path}/"):
            images, problems = find_images([prefix + pattern])
            assert sorted(map(str, images)) == [prefix + name for name in found] and problems == []
    assert find_images(["x" * 5000]) == ([], [("x" * 5000, "no such file or folder")])


HOLD = """
import sys
from pathlib import Path
from unihema.files import exclusive
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_run_is_refused_and_the_first_one_named(analyzer, tmp_path):
    draw(str(tmp_path / "a.png"))
    results = tmp_path / "results"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(results)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    try:
        with pytest.raises(
            OutputError, match=rf"results: another run \(process {holder.pid} on .*, since 20.*\) is writing"
        ):
            analyzer.analyze_files([tmp_path / "a.png"], results)
        assert not (results / "results.json").exists()
    finally:
        holder.kill()
        holder.wait(timeout=600)
    # The system gives the lock of a killed process back.
    assert analyzer.analyze_files([tmp_path / "a.png"], results).images == 1
    assert sorted(os.listdir(results)) == [
        ".unihema.lock", "a_mask.png", "a_overlay.png", "cells.csv", "counts.csv", "records", "results.json",
        "settings.json",
    ]  # fmt: skip


def test_threads_of_one_process_keep_each_other_out(tmp_path):
    entered, refused = [], []
    together = threading.Barrier(8)

    def write():
        together.wait()
        try:
            with exclusive(tmp_path / "results"):
                entered.append(1)
                assert len(entered) == 1
                while len(refused) < 7 and together.n_waiting == 0:
                    threading.Event().wait(0.01)
        except OutputError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=write) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(entered) == 1 and len(refused) == 7
    assert all(f"process {os.getpid()} on" in text for text in refused)
    with exclusive(tmp_path / "results"):
        pass


def test_two_commands_at_once_mix_nothing(checkpoint, tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        for number in range(6):
            draw(str(tmp_path / folder / f"{number}.png"), number)
    command = [sys.executable, "-m", "unihema", "predict", str(checkpoint), "-o", "results"]
    runs = [
        subprocess.Popen([*command, folder], cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for folder in "ab"
    ]
    said = [run.communicate(timeout=600)[1] for run in runs]
    shown = {image["image"] for image in json.loads((tmp_path / "results" / "results.json").read_text())["images"]}
    images = {folder: {os.path.join(folder, f"{number}.png") for number in range(6)} for folder in "ab"}
    for run, text in zip(runs, said, strict=True):
        # Whoever did not write says why.
        assert run.returncode == 0 or "is writing there" in text.replace("\n", " "), text
    # All images of each run that ended well, and no others. One may have ended before the other began.
    ended = [images[folder] for folder, run in zip("ab", runs, strict=True) if run.returncode == 0]
    assert ended and shown == set().union(*ended)


def test_what_a_killed_run_was_writing_is_removed_by_the_next_and_nothing_else(analyzer, tmp_path):
    draw(str(tmp_path / "a.png"))
    results = tmp_path / "results"
    (results / "records").mkdir(parents=True)
    kill = (
        "import os, sys; from pathlib import Path; from unihema.files import write_atomically\n"
        "write_atomically(Path(sys.argv[1]), lambda file: (file.write(b'half'), file.flush(), os.kill(os.getpid(), 9)))"
    )
    for name in ("cells.csv", "records/a.json"):
        subprocess.run([sys.executable, "-c", kill, str(results / name)], timeout=600)
    left = [path for path in results.rglob("*") if path.is_file()]
    assert len(left) == 2 and not any(path.name in ("cells.csv", "a.json") for path in left)
    (results / ".mine.partial").write_text("mine")
    (results / "other.partial").write_text("mine")
    analyzer.analyze_files([tmp_path / "a.png"], results)
    assert not any(path.exists() for path in left)
    assert sorted(path.name for path in results.rglob("*.partial")) == [".mine.partial", "other.partial"]


def test_every_writer_removes_what_killed_ones_left_and_leaves_living_ones_alone(tmp_path):
    write = (
        "import os, sys; from pathlib import Path; from unihema.files import write_atomically\n"
        "write_atomically(Path(sys.argv[1]), lambda file: (file.write(b'half'), file.flush(), {}))"
    )
    stop = "print('writing', flush=True), sys.stdin.read()"
    living = subprocess.Popen(
        [sys.executable, "-c", write.format(stop), str(tmp_path / "b")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert living.stdout.readline() == "writing\n"
    for code, left in (("os.kill(os.getpid(), 9)", 2), ("None", 1)):
        subprocess.run([sys.executable, "-c", write.format(code), str(tmp_path / "a")], timeout=600)
        assert len(list(tmp_path.glob(".*.partial"))) == left
    living.communicate(timeout=600)
    assert sorted(os.listdir(tmp_path)) == ["a", "b"] and (tmp_path / "b").read_text() == "half"


def test_a_folder_is_whole_or_not_there(tmp_path, monkeypatch):
    folder = tmp_path / "made" / "results"
    (folder.parent / ".results.partial" / "results").mkdir(parents=True)
    (folder.parent / ".results.partial" / "results" / "a").write_text("of a killed run")
    with whole_folder(folder) as whole:
        (whole / "b").write_text("new")
        assert not folder.exists()
        refused = []

        def again():
            with pytest.raises(OutputError) as error, whole_folder(folder):
                pass
            refused.append(str(error.value))

        thread = threading.Thread(target=again)
        thread.start()
        thread.join()
        assert f"another run (process {os.getpid()} on" in refused[0]
    assert os.listdir(folder.parent) == ["results"] and os.listdir(folder) == ["b"]
    with pytest.raises(ZeroDivisionError), whole_folder(folder.parent / "other") as whole:
        (whole / "b").write_text("half")
        raise ZeroDivisionError
    with pytest.raises(OutputError, match="results: cannot be written .Directory not empty"), whole_folder(folder):
        pass
    monkeypatch.chdir(folder)
    with pytest.raises(OutputError, match="cannot be written"), whole_folder(Path(".")):
        pass
    assert os.listdir(folder.parent) == ["results"] and os.listdir(folder) == ["b"]


def test_temporary_folders_of_killed_processes_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    kill = (
        "import os; from unihema.files import scratch_folder\n"
        "with scratch_folder() as folder: (folder / 'a').touch(), os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", kill], env={**os.environ, "TMPDIR": str(tmp_path)}, timeout=600)
    assert [path.name for path in tmp_path.rglob("*")][1:] == ["a"]
    with scratch_folder() as folder:
        assert os.listdir(tmp_path) == [folder.name]
    assert os.listdir(tmp_path) == []


def test_a_write_that_fails_leaves_nothing(tmp_path):
    def fail(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    (tmp_path / "a").write_text("before")
    with pytest.raises(OutputError, match="cannot be written .No space left"):
        write_atomically(tmp_path / "a", fail)
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "before"


def test_what_was_guessed_about_pixels_stands_in_result_and_table(analyzer, tmp_path):
    pixels = field().astype(np.uint16) * 16
    path = write_tiff(tmp_path / "a.tif", [pixels[..., band] for band in range(3)], 1)
    result = analyzer(path)
    assert [warning.split(" are ")[0] for warning in result.warnings[:2]] == ["Three gray pages", "How many bits"]
    analyzer.analyze_files([path], tmp_path / "results")
    rows = list(csv.DictReader((tmp_path / "results" / "counts.csv").read_text().splitlines()))
    assert "Three gray pages are read as red, green and blue." in rows[0]["warnings"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipes_and_devices_are_not_waited_for(analyzer, tmp_path):
    Image.fromarray(field()).save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "endless.png").symlink_to("/dev/zero")
    report = analyzer.analyze_files([tmp_path], tmp_path / "out", tasks=["single_cell"])
    assert [Path(image).name for image in report.analysed] == ["a.png"]
    assert report.failed == {
        str(tmp_path / name): "not a regular file. Take it out." for name in ("endless.png", "pipe.png")
    }
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="config.json: not readable as JSON .not a regular file."):
        read_json(tmp_path / "config.json")


def test_links_in_a_circle_are_named_and_the_rest_goes_on(analyzer, tmp_path):
    folder = tmp_path / "smears"
    folder.mkdir()
    Image.fromarray(field()).save(folder / "a.JPG")
    (folder / "circle.png").symlink_to("circle.png")
    (folder / "broken.png").symlink_to("nowhere")
    (folder / "folder.png").mkdir()
    (folder / "around").symlink_to("../smears")
    report = analyzer.analyze_files([folder], tmp_path / "out", tasks=["single_cell"])
    assert [Path(image).name for image in report.analysed] == ["a.JPG"]
    assert sorted(Path(image).name for image in report.failed) == ["broken.png", "circle.png"]
    with pytest.raises(OutputError):
        analyzer.analyze_files([folder], folder / "circle.png" / "out", tasks=["single_cell"])


def test_linked_folders_are_read_once(tmp_path):
    for name in ("slides/a/1.png", "elsewhere/2.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "slides" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "slides" / "a" / "around").symlink_to(tmp_path / "slides")
    images, problems = find_images([tmp_path / "slides"])
    assert [path.name for path in images] == ["1.png", "2.png"] and problems == []


@pytest.mark.parametrize("stem", ["aux", "NUL", "com1.field"])
def test_names_that_windows_keeps_for_devices_are_changed(stem):
    assert file_name(stem, "d" * 12) == f"{stem}_{'d' * 12}"
    assert file_name(f"x{stem}", "d" * 12) == f"x{stem}"
