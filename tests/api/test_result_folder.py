"""Many images from Python: names, resuming, and what is left when a run is cut off at any moment."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_checkpoint import save_tiny_checkpoint

from unihema import Analyzer, CheckpointError, OutputError, SmearResult
from unihema.files import find_images
from unihema.inference.int8 import to_int8
from unihema.inference.prepare import prepare_for_inference
from unihema.loading import load_model
from unihema.result_folder import read_results


pytestmark = pytest.mark.filterwarnings("ignore::unihema.analyzer.QueryCapWarning")


@pytest.fixture
def draw(tmp_path):
    """Writes a noisy image, of a size that tells it apart, under `images/`."""

    def write(name, size=(60, 40), seed=0):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
        Image.fromarray(noise).save(path)
        return path

    return write


def rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_folders_globs_and_files_give_each_image_once(draw, tmp_path):
    first, second = draw("a.png"), draw("deep/Ä b.TIF")
    draw("deep/.hidden.png")
    (tmp_path / "images" / "notes.txt").write_text("no image")
    odd = draw("x[1].png")
    images, problems = find_images([tmp_path / "images", first, tmp_path / "images" / "*.png", odd])
    assert sorted(images) == sorted([first, second, odd]) and problems == []
    empty = tmp_path / "empty"
    empty.mkdir()
    missing = [str(empty), str(tmp_path / "none.png"), str(tmp_path / "*.gif")]
    assert find_images(missing) == (
        [],
        [
            (missing[0], "no image in this folder or its subfolders"),
            (missing[1], "no such file or folder"),
            (missing[2], "no file matches this pattern"),
        ],
    )


def test_results_beside_or_above_the_images_are_not_taken_for_images(analyzer, draw, tmp_path):
    draw("a.png")
    images = tmp_path / "images"
    for output in (images / "results", tmp_path):
        for _ in range(2):
            report = analyzer.analyze_files([images], output)
            assert report.images == 1 and report.failed == {}
    with pytest.raises(ValueError, match="holds a.png, an image to analyse; name another"):
        analyzer.analyze_files([images], images)
    assert sorted(path.name for path in images.iterdir()) == ["a.png", "results"]


def test_same_stems_keep_their_own_files_and_names_over_runs(analyzer, draw, tmp_path):
    day, night, other = draw("day/s.png", (60, 40)), draw("night/s.png", (50, 40)), draw("night/s.jpg", (40, 40))
    results = tmp_path / "results"
    analyzer.analyze_files([night], results)
    report = analyzer.analyze_files([day, night, other], results, tasks=None)
    assert len(report.analysed) == 2 and report.skipped == [night]
    records = [json.loads(path.read_text()) for path in (results / "records").glob("*.json")]
    assert {(record["source"], record["result"]["width"]) for record in records} == {
        (str(day), 60),
        (str(night), 50),
        (str(other), 40),
    }
    files = [file for record in records for file in record["files"]]
    assert len(files) == len(set(files)) == 6  # overlay and mask of each
    assert {row["image"] for row in rows(results / "cells.csv")} == {str(day), str(night), str(other)}


def test_only_what_changed_is_analysed_again(analyzer, draw, tmp_path):
    a, b = draw("a.png"), draw("b.png", seed=1)
    results = tmp_path / "results"
    analyzer.analyze_files([a, b], results)
    before = contents(results)
    assert analyzer.analyze_files([a, b], results).analysed == []
    assert contents(results) == before
    draw("b.png", seed=2)
    assert analyzer.analyze_files([a, b], results).analysed == [b]
    (results / "a_overlay.png").unlink()
    assert analyzer.analyze_files([a, b], results).analysed == [a]
    for content in ("{half a rec", (results / "records" / "a.json").read_text()):
        tables = (results / "cells.csv").read_bytes()
        (results / "records" / "b.json").write_text(content)
        assert analyzer.analyze_files([a, b], results).analysed == [b]
        assert (results / "cells.csv").read_bytes() == tables
    with pytest.raises(OutputError, match=r"other settings: threshold was None, now it is 0\.9.*--overwrite"):
        analyzer.analyze_files([a], results, threshold=0.9)
    assert analyzer.analyze_files([a, b], results).analysed == []
    changed = analyzer.analyze_files([a], results, threshold=0.9, overwrite=True)
    assert changed.analysed == [a] and changed.other_settings == 1 and changed.images == 1


def test_counts_say_what_the_differential_does_with_a_class(draw, tmp_path):
    names = ["WBC", "erythroblast", "my cell", "RBC"]
    checkpoint = save_tiny_checkpoint(
        tmp_path / "unihema", id2label=dict(enumerate(names)), label_parents={"my cell": "WBC"}
    )
    analyzer = Analyzer.from_pretrained(checkpoint, device="cpu")
    analyzer.analyze_files([draw("a.png")], tmp_path / "results", tasks=["detection"])
    table = {row["label"]: row for row in rows(tmp_path / "results" / "counts.csv")}
    assert {name: row["differential"] for name, row in table.items()} == {
        "WBC": "unidentified",
        "erythroblast": "beside",
        "my cell": "counted",
        "RBC": "",
    }
    white = int(table["WBC"]["count"]) + int(table["my cell"]["count"])
    assert white
    for name in ("WBC", "my cell"):
        share = 100 * int(table[name]["count"]) / white
        assert float(table[name]["percent_of_white_cells"]) == pytest.approx(share, abs=0.05)
    assert table["RBC"]["percent_of_white_cells"] == table["erythroblast"]["percent_of_white_cells"] == ""


def test_tables_and_records_agree(analyzer, draw, tmp_path):
    draw("a.png")
    results = tmp_path / "results"
    seen = []
    report = analyzer.analyze_files(
        [tmp_path / "images"], results, questions=["What is it?"], formats=["geojson"],
        on_image=lambda *call: seen.append(call),
    )  # fmt: skip
    assert [(number, total, path.name) for number, total, path, _ in seen] == [(1, 1, "a.png")]
    whole = json.loads((results / "results.json").read_text())
    result = SmearResult.from_dict(whole["images"][0])
    assert result.to_dict() == seen[0][3].to_dict()
    assert whole["totals"] == report.totals == result.counts
    assert [answer["question"] for answer in result.answers] == ["What is it?"]
    (told,) = rows(results / "answers.csv")
    assert (told["image"], told["question"], told["source"]) == (result.image, "What is it?", "text")
    assert told["cells"].split() == [str(number) for number in result.answers[0].get("cells", [])]
    table = rows(results / "cells.csv")
    assert [row["label"] for row in table] == [cell.label for cell in result.cells]
    assert [float(row["x_max"]) for row in table] == pytest.approx([cell.box[2] for cell in result.cells], abs=0.005)
    # Morphology of nucleus and cytoplasm is given for cells that have them only.
    assert {row["label"] for row in table if row["vacuoles"]} <= {"neutrophil"}
    mask = np.asarray(Image.open(results / "a_mask.png"))
    assert mask.shape == (40, 60) and set(np.unique(mask)) <= {0, 255} and ((mask > 0) == (result.mask > 0)).all()
    assert len(json.loads((results / "a.geojson").read_text())["features"]) >= len(result.cells)
    assert {"checkpoint_sha256", "image_sha256", "detection_thresholds", "torch"} <= result.provenance.keys()


def test_images_of_one_size_together_have_the_results_they_have_alone(analyzer, draw, tmp_path):
    sizes = [(60, 40), (50, 50), (60, 40), (60, 40), (50, 50), (30, 60), (60, 40)]
    images = [draw(f"{number}.png", size, seed=number) for number, size in enumerate(sizes)]
    bad = tmp_path / "images" / "bad.png"
    bad.write_bytes(b"no image")
    options = {"tasks": ["detection", "segmentation", "single_cell"], "questions": ["What is it?"]}
    analyzer.analyze_files([*images, bad], tmp_path / "alone", **options)
    seen = []
    report = analyzer.analyze_files(
        [*images, bad], tmp_path / "together", batch_size=3, **options,
        on_image=lambda number, total, path, outcome: seen.append((number, total, path)),
    )  # fmt: skip
    assert [call[0] for call in seen] == list(range(1, 9)) and {call[2] for call in seen} == {*images, bad}
    assert list(report.failed) == [str(bad)] and sorted(report.analysed) == images
    for number in range(len(sizes)):
        alone, together = (
            SmearResult.from_dict(json.loads((tmp_path / run / "records" / f"{number}.json").read_text())["result"])
            for run in ("alone", "together")
        )
        assert [told["answer"] for told in alone.answers] == [told["answer"] for told in together.answers]
        assert len(alone.cells) == len(together.cells)
        by_place = [sorted((cell.label, *np.round(cell.box, 0)) for cell in r.cells) for r in (alone, together)]
        assert np.mean([a == b for a, b in zip(*by_place)]) > 0.9
        assert alone.single_cell["score"] == pytest.approx(together.single_cell["score"], abs=1e-4)
        masks = [np.asarray(Image.open(tmp_path / run / f"{number}_mask.png")) for run in ("alone", "together")]
        assert (masks[0] != masks[1]).mean() < 0.01
    with pytest.raises(ValueError, match="batch_size must be 1 or more, got 0"):
        analyzer.analyze_files(images, tmp_path / "alone", batch_size=0)


def test_a_batch_that_fails_is_tried_one_by_one(analyzer, draw, tmp_path, monkeypatch):
    images = [draw(f"{number}.png", seed=number) for number in range(3)]
    whole = Analyzer.run

    def short_of_memory(self, request, opened, *options):
        if len(opened) > 1 or opened[0].name == str(images[1]):
            raise MemoryError("no room")
        return whole(self, request, opened, *options)

    monkeypatch.setattr(Analyzer, "run", short_of_memory)
    report = analyzer.analyze_files(images, tmp_path / "results", batch_size=3)
    assert report.failed == {str(images[1]): "no room"} and len(report.analysed) == 2


def test_int8_is_another_setting(checkpoint, analyzer, draw, tmp_path):
    image, seen = draw("a.png"), []
    analyzer.analyze_files([image], tmp_path / "results")
    faster = Analyzer.from_pretrained(checkpoint, int8=True)
    with pytest.raises(OutputError, match="dtype was 'float32', now it is 'int8'"):
        faster.analyze_files([image], tmp_path / "results")
    for analysed in ([image], []):
        report = faster.analyze_files(
            [image], tmp_path / "results", overwrite=bool(analysed), on_image=lambda *call: seen.append(call[3])
        )
        assert report.analysed == analysed
    assert seen[0].provenance["dtype"] == "int8"
    assert json.loads((tmp_path / "results" / "results.json").read_text())["settings"]["dtype"] == "int8"


def test_an_image_size_is_another_setting(checkpoint, analyzer, draw, tmp_path):
    image, seen = draw("a.png"), []
    analyzer.analyze_files([image], tmp_path / "results")
    for edge, analysed in ((96, [image]), (96, []), (128, [image])):
        other = Analyzer.from_pretrained(checkpoint, device="cpu", image_sizes={"detection": edge})
        report = other.analyze_files(
            [image], tmp_path / "results", overwrite=bool(analysed), on_image=lambda *call: seen.append(call[3])
        )
        assert report.analysed == analysed
        with pytest.raises(OutputError, match="image_sizes has changed"):
            analyzer.analyze_files([image], tmp_path / "results")
    sizes = [result.provenance["image_sizes"]["detection"] for result in seen if result]
    assert sizes == [{"longest_edge": 96}, {"longest_edge": 128}]
    settings = json.loads((tmp_path / "results" / "results.json").read_text())["settings"]
    assert settings["image_sizes"]["detection"] == {"longest_edge": 128}
    # The size of the checkpoint is no other setting, whoever names it.
    named = Analyzer.from_pretrained(checkpoint, device="cpu", image_sizes={"detection": 64})
    named.analyze_files([image], tmp_path / "named")
    assert analyzer.analyze_files([image], tmp_path / "named").skipped == [image]
    for sizes, message in (
        ({"detect": 96}, "Unknown task 'detect' for an image size"),
        ({"detection": 3}, "32 to 8192"),
    ):
        with pytest.raises(ValueError, match=message):
            Analyzer.from_pretrained(checkpoint, device="cpu", image_sizes=sizes)


def test_an_image_size_of_the_head_that_answers_is_one_too(checkpoint, analyzer, draw, tmp_path):
    given = {"tasks": ["detection"], "questions": ["What is it?"]}
    analyzer.analyze_files([draw("a.png")], tmp_path / "results", **given)
    settings = json.loads((tmp_path / "results" / "results.json").read_text())["settings"]
    assert sorted(settings["image_sizes"]) == ["detection", "question_answering"]
    other = Analyzer.from_pretrained(checkpoint, device="cpu", image_sizes={"question_answering": 96})
    with pytest.raises(OutputError, match="image_sizes has changed"):
        other.analyze_files([tmp_path / "images"], tmp_path / "results", **given)


def test_images_that_were_moved_count_once_and_those_that_are_gone_are_told(analyzer, draw, tmp_path):
    for number in range(3):
        draw(f"{number}.png", seed=number)
    # Of one content, and both meant.
    shutil.copyfile(tmp_path / "images" / "0.png", tmp_path / "images" / "copy.png")
    first = analyzer.analyze_files([tmp_path / "images"], tmp_path / "results")
    assert first.images == 4 and first.gone == []
    elsewhere = (tmp_path / "images").rename(tmp_path / "tuesday")
    moved = analyzer.analyze_files([elsewhere], tmp_path / "results")
    assert (moved.images, moved.totals) == (4, first.totals) and moved.gone == []
    assert len(rows(tmp_path / "results" / "counts.csv")) and len(list(read_results(tmp_path / "results"))) == 4
    (elsewhere / "1.png").unlink()
    after = analyzer.analyze_files([elsewhere], tmp_path / "results")
    assert after.images == 4 and after.gone == [str(elsewhere / "1.png")]
    # A folder of copies that is there as well is analysed as well.
    shutil.copytree(elsewhere, tmp_path / "copies")
    assert analyzer.analyze_files([tmp_path / "copies"], tmp_path / "results").images == 7


def test_what_other_settings_wrote_does_not_stay(analyzer, draw, tmp_path):
    draw("a.png")
    given = [tmp_path / "images"], tmp_path / "results"
    analyzer.analyze_files(*given, questions=["What is it?"], formats=("geojson", "label_studio"))
    before = {path.name for path in (tmp_path / "results").iterdir()}
    assert {"a.geojson", "a_mask.png", "answers.csv", "label_studio.xml"} <= before
    analyzer.analyze_files(*given, tasks=["detection"], overwrite=True)
    left = {path.name for path in (tmp_path / "results").iterdir()}
    assert not {"a.geojson", "a_mask.png", "answers.csv", "label_studio.xml"} & left and "a_overlay.png" in left


def test_a_crop_is_a_cell_of_the_tables(analyzer, draw, tmp_path):
    draw("a.png")
    report = analyzer.analyze_files([tmp_path / "images"], tmp_path / "results", tasks=["single_cell"])
    (stored,) = read_results(tmp_path / "results")
    label = stored.result.single_cell["label"]
    (cell,), (count,) = rows(tmp_path / "results" / "cells.csv"), rows(tmp_path / "results" / "counts.csv")
    assert report.totals == {label: 1} and cell["label"] == label and (count["label"], count["count"]) == (label, "1")


def test_weights_that_changed_are_another_setting(checkpoint, draw, tmp_path):
    """In memory, where the files say what they said; of models that came from no file, prepared or in 8 bit."""
    image, results = draw("a.png"), tmp_path / "results"
    analyzer = Analyzer.from_pretrained(checkpoint, device="cpu")
    assert analyzer.analyze_files([image], results).analysed == [image]
    with torch.no_grad():
        analyzer.model.detection_head.class_head.bias[0] += 0.5
    with pytest.raises(OutputError, match="checkpoint_sha256 has changed"):
        analyzer.analyze_files([image], results)
    assert analyzer.analyze_files([image], results, overwrite=True).analysed == [image]
    assert analyzer.analyze_files([image], results).skipped == [image]
    for change in (prepare_for_inference, to_int8):
        model, processor = load_model(checkpoint, "cpu")
        change(model)
        given, folder = Analyzer(model, processor), tmp_path / change.__name__
        assert given.analyze_files([image], folder).analysed == given.analyze_files([image], folder).skipped == [image]
        assert list(given.weights_sha256()) == ["weights"]
        first = given.weights_sha256()
        with torch.no_grad():
            model.detection_head.class_head.bias[0] += 0.5
        assert given.weights_sha256() != first


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system sends processes no signals")
@pytest.mark.parametrize("name", ["SIGINT", "SIGKILL"])
def test_a_run_that_is_cut_off_loses_nothing_that_was_done(checkpoint, draw, tmp_path, name):
    stop = getattr(signal, name)
    for number in range(200):
        draw(f"{number:03d}.png", seed=number)
    results = tmp_path / "results"
    command = [
        sys.executable,
        "-m",
        "unihema",
        "predict",
        str(checkpoint),
        str(tmp_path / "images"),
        "-o",
        str(results),
    ]
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # A test run started in the background of a script ignores the interrupt, and what it starts would too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 240
    while len(list((results / "records").glob("*.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(stop)
    assert process.wait(timeout=600) != 0
    done = [json.loads(path.read_text()) for path in (results / "records").glob("*.json")]
    assert 3 <= len(done) < 200
    for record in done:
        for file in record["files"]:
            Image.open(results / file).load()
    if stop == signal.SIGINT:
        assert len({row["image"] for row in rows(results / "cells.csv")}) == len(done)
    sources = [record["source"] for record in done]
    # As the command loads it.
    analyzer = Analyzer.from_pretrained(checkpoint)
    report = analyzer.analyze_files([*sources, tmp_path / "images" / "199.png"], results)
    assert sorted(map(str, report.skipped)) == sorted(sources) and len(report.analysed) == 1
    assert report.images == len(done) + 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"questions": ["why " * 100]}, ValueError, "the limit is 32"),
        ({"prompt": "lymphocyte " * 60}, ValueError, "the limit is 32"),
        ({"tasks": []}, ValueError, "Nothing to do"),
        ({"tasks": ["question_answering"]}, ValueError, "Unknown task 'question_answering'"),
        ({"threshold": float("nan")}, ValueError, "0..1"),
    ],
)
def test_what_cannot_be_asked_stops_before_the_first_image(analyzer, draw, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        analyzer.analyze_files([draw("a.png")], tmp_path / "results", **options)
    assert not (tmp_path / "results").exists()


def test_a_question_for_a_checkpoint_without_the_head(draw, tmp_path):
    from unihema import UniHemaForDetection

    folder = save_tiny_checkpoint(tmp_path / "detector", UniHemaForDetection)
    with pytest.raises(CheckpointError, match="no trained head for 'question_answering'; it does detection"):
        Analyzer.from_pretrained(folder, device="cpu").analyze_files(
            [draw("a.png")], tmp_path / "results", questions=["What is it?"]
        )
    assert Analyzer.from_pretrained(folder, device="cpu").analyze_files([draw("a.png")], tmp_path / "results").totals


def test_damaged_weights_are_named(draw, tmp_path):
    folder = save_tiny_checkpoint(tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: os.path.getsize(weights) // 2])
    with pytest.raises(CheckpointError, match="cannot be read .*model.safetensors"):
        Analyzer.from_pretrained(folder, device="cpu").analyze_files([draw("a.png")], tmp_path / "results")
    (folder / "config.json").write_text('{"model_type": "detr"}')
    with pytest.raises(CheckpointError, match="model type 'detr', not 'unihema'"):
        Analyzer.from_pretrained(folder, device="cpu").analyze_files([draw("a.png")], tmp_path / "results")


def test_an_output_that_is_a_file(analyzer, draw, tmp_path):
    (tmp_path / "results").write_text("mine")
    with pytest.raises(OutputError, match="results: the output must be a folder"):
        analyzer.analyze_files([draw("a.png")], tmp_path / "results")
    assert (tmp_path / "results").read_text() == "mine"
