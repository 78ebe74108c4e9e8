"""Shards of images: together they are what one run gives, however often they were stopped, repeated and moved."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from review_results import write_results

from unihema import OutputError, RequestError
from unihema.files import json_sha256
from unihema.result_merging import merge_results
from unihema.result_shards import SHARD_FILE, Shard, names_within
from unihema_cli.app import app


pytestmark = pytest.mark.filterwarnings("ignore::unihema.analyzer.QueryCapWarning")


def draw(folder: Path, count: int) -> Path:
    """Images in two folders, of which each two have the same name, and a file that is no image."""
    for number in range(count):
        path = folder / f"slide_{number % 2}" / f"{number // 2:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 255, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    (folder / "slide_0" / "broken.png").write_bytes(b"no image")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Everything of a results folder but its shards; of a record, whatever its place, what it says."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    own = [path for path in files if not path.relative_to(folder).parts[0].startswith(("shard_", "moved"))]
    return {str(path.relative_to(folder)): path.read_bytes() for path in own}


def test_shards_together_are_one_run(analyzer, tmp_path):
    images = draw(tmp_path / "smears", 19)
    analyzer.analyze_files([images], tmp_path / "one")
    counts = [len(analyzer.analyze_files([images], tmp_path / "parts", shard=Shard(n, 3)).analysed) for n in (3, 1, 2)]
    assert sum(counts) == 19 and all(counts)
    report = merge_results(tmp_path / "parts")
    assert report.images == 19 and not report.problems and list(report.failed) == [str(images / "slide_0/broken.png")]
    assert contents(tmp_path / "parts") == contents(tmp_path / "one")
    # Again, and a run over everything: nothing is left to do.
    before = contents(tmp_path / "parts")
    assert merge_results(tmp_path / "parts").images == 19 and contents(tmp_path / "parts") == before
    assert analyzer.analyze_files([images], tmp_path / "parts").analysed == []


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="this system has no links")
def test_an_image_counts_once_where_its_folder_is_a_link_on_the_machine_that_merges(analyzer, tmp_path):
    images = draw(tmp_path / "smears", 4)
    for number in (1, 2):
        analyzer.analyze_files([images], tmp_path / "parts", shard=Shard(number, 2))
    images.rename(tmp_path / "store")
    images.symlink_to(tmp_path / "store")
    first = merge_results(tmp_path / "parts")
    before = contents(tmp_path / "parts")
    again = merge_results(tmp_path / "parts")
    assert first.images == again.images == 4 and again.totals == first.totals
    assert contents(tmp_path / "parts") == before


def test_a_shard_that_ran_twice_counts_once_and_one_that_is_missing_is_told(analyzer, tmp_path):
    images, parts = draw(tmp_path / "smears", 19), tmp_path / "parts"
    analyzer.analyze_files([images], parts, shard=Shard(1, 3))
    shutil.copytree(parts / "shard_1_of_3", parts / "moved_from_elsewhere")
    analyzer.analyze_files([images], parts, shard=Shard(2, 3))
    report = merge_results(parts)
    of_two = {name for name in names_within(sorted(images.rglob("0*.png")), [images]) if not Shard(3, 3).holds(name)}
    assert report.images == len(of_two) and report.repeated == sum(map(Shard(1, 3).holds, of_two))
    assert report.missing == [3] and report.problems == ["Shard 3 is missing."]
    # Of a shard that was stopped.
    record = next((parts / "shard_2_of_3" / "records").glob("*.json"))
    record.unlink()
    shutil.rmtree(parts / "records")
    report = merge_results(parts)
    assert len(report.waiting) == 1 and "1 images are not analysed yet, such as" in report.problems[1]


def test_a_shard_of_another_machine_is_known_by_the_path_within_the_folder(analyzer, tmp_path):
    here, there = draw(tmp_path / "here", 19), tmp_path / "mnt" / "there"
    shutil.copytree(here, there)
    analyzer.analyze_files([here], tmp_path / "parts", shard=Shard(1, 2))
    analyzer.analyze_files([there], tmp_path / "parts", shard=Shard(2, 2))
    (tmp_path / "parts" / "shard_2_of_2").rename(tmp_path / "kept")
    analyzer.analyze_files([here], tmp_path / "parts", shard=Shard(2, 2))
    (tmp_path / "kept").rename(tmp_path / "parts" / "moved")
    report = merge_results(tmp_path / "parts")
    assert report.images == 19 and report.repeated and not report.problems


def test_a_shard_that_is_repeated_where_the_images_are_mounted_elsewhere_counts_once(analyzer, tmp_path, caplog):
    images, parts = draw(tmp_path / "smears", 9), tmp_path / "parts"
    # One image twice under two names: both are meant.
    shutil.copyfile(images / "slide_0" / "0000.png", images / "slide_0" / "copy.png")
    for number in (1, 2):
        analyzer.analyze_files([images], parts, shard=Shard(number, 2))
    assert merge_results(parts).images == 10
    elsewhere = images.rename(tmp_path / "mounted")
    for number in (1, 2):
        analyzer.analyze_files([elsewhere], parts, shard=Shard(number, 2))
    report = merge_results(parts)
    assert report.images == 10 and not report.problems
    analyzer.analyze_files([elsewhere], tmp_path / "one")
    assert contents(parts) == contents(tmp_path / "one")
    of_shards = [json.loads((parts / f"shard_{n}_of_2" / "results.json").read_text())["images"] for n in (1, 2)]
    assert sum(map(len, of_shards)) == 10
    assert f"{parts}: results of 10 images are removed that were analysed at another place before" in caplog.text


def test_shards_that_were_not_given_the_same_images_are_told(analyzer, tmp_path):
    images, parts = draw(tmp_path / "smears", 6), tmp_path / "parts"
    analyzer.analyze_files([images], parts, shard=Shard(1, 2))
    assert not merge_results(parts).unlike
    # On another machine a part of them has not arrived yet.
    (images / "slide_1" / "0002.png").unlink()
    analyzer.analyze_files([images], parts, shard=Shard(2, 2))
    report = merge_results(parts)
    assert report.unlike == {"shard_1_of_2": 7, "shard_2_of_2": 6}
    assert "shard_1_of_2 of 7, shard_2_of_2 of 6. Repeat" in report.problems[0]


def test_shards_are_a_division():
    names = [f"0/a/{number}.png" for number in range(800)]
    holders = [[n for n in range(1, 9) if Shard(n, 8).holds(name)] for name in names]
    assert all(len(found) == 1 for found in holders)
    assert min(Counter(found[0] for found in holders).values()) > 70


@pytest.mark.parametrize(
    "text, environment, shard",
    [
        ("3/8", {}, (3, 8)),
        ("1/1", {}, (1, 1)),
        ("slurm", {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_COUNT": "4"}, (1, 4)),
        (
            "slurm",
            {
                "SLURM_ARRAY_TASK_ID": "7",
                "SLURM_ARRAY_TASK_MIN": "1",
                "SLURM_ARRAY_TASK_STEP": "2",
                "SLURM_ARRAY_TASK_COUNT": "4",
            },
            (4, 4),
        ),
    ],
)
def test_how_a_shard_is_named(text, environment, shard):
    assert Shard.parse(text, environment) == shard


@pytest.mark.parametrize("text", ["", "3", "0/8", "9/8", "1/0", "a/b", "1/2/3", "-1/8", "1/100001", "slurm", "1.5/2"])
def test_what_is_no_shard(text):
    with pytest.raises(RequestError, match="A shard is"):
        Shard.parse(text, {})


def test_what_cannot_be_merged(analyzer, tmp_path):
    images, parts = draw(tmp_path / "smears", 6), tmp_path / "parts"
    parts.mkdir()
    with pytest.raises(OutputError, match=r"no shards\. `unihema predict"):
        merge_results(parts)
    analyzer.analyze_files([images], parts, shard=Shard(1, 2))
    analyzer.analyze_files([images], parts, shard=Shard(2, 2), threshold=0.5)
    with pytest.raises(OutputError, match=r"shard_2_of_2 holds results of other settings: threshold was 0\.5"):
        merge_results(parts)
    shutil.rmtree(parts / "shard_2_of_2")
    analyzer.analyze_files([images], parts, shard=Shard(2, 3))
    with pytest.raises(OutputError, match="shards of several divisions"):
        merge_results(parts)
    shutil.rmtree(parts / "shard_2_of_3")
    said = json.loads((parts / "shard_1_of_2" / SHARD_FILE).read_text())
    changes: list[dict] = [
        {"number": 3},
        {"images": {"0/a.png": []}},
        {"images": {"a.png": "a.png"}},
        {"failed": {"\0": ""}},
    ]
    changes += [
        {"tables": said["tables"] | wrong}
        for wrong in ({"attributes": 5}, {"attributes": [[]]}, {"groups": [True] * 9})
    ]
    for content in ("{half", "[]", "{}", *(json.dumps(said | change) for change in changes)):
        (parts / "shard_1_of_2" / SHARD_FILE).write_text(content)
        with pytest.raises(OutputError, match=SHARD_FILE):
            merge_results(parts)


def test_a_shard_writes_nothing_outside(tmp_path):
    parts = tmp_path / "out" / "parts"
    shard = write_results(parts / "shard_1_of_1", {"records.png": ["RBC"]})
    path = shard / "records" / "records.json"
    record = json.loads(path.read_text())
    record["files"]["records/../../stolen"] = 4
    (parts / "stolen").write_text("evil")
    del record["record_sha256"]
    path.write_text(json.dumps({"record_sha256": json_sha256(record), **record}))
    said = {"number": 1, "of": 1, "images": {"0/records.png": record["source"]}, "failed": {}}
    (shard / SHARD_FILE).write_text(json.dumps(said | {"tables": {"attributes": [], "groups": [False] * 3}}))
    report = merge_results(parts)
    assert report.waiting == [record["source"]] and [path.name for path in parts.parent.iterdir()] == ["parts"]


def test_the_commands(checkpoint, tmp_path, monkeypatch):
    images, parts = draw(tmp_path / "smears", 4), tmp_path / "parts"
    run = CliRunner().invoke
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "1")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "1")
    done = run(app, ["predict", str(checkpoint), str(images), "-o", str(parts), "--shard", "slurm", "--device", "cpu"])
    assert done.exit_code == 1 and f"Results in {parts / 'shard_1_of_1'}" in done.output, done.output
    done = run(app, ["merge", str(parts)])
    assert done.exit_code == 1 and "4 images, 1 failed." in done.output and "broken.png: not an image" in done.output


@pytest.mark.slow
def test_two_thousand_images_over_eight_shards_that_are_killed_and_repeated(checkpoint, tmp_path):
    images, parts = draw(tmp_path / "smears", 2000), tmp_path / "parts"
    (images / "slide_0" / "broken.png").unlink()
    command = [sys.executable, "-m", "unihema", "predict", str(checkpoint), str(images), "--device", "cpu", "-o"]
    subprocess.run([*command, str(tmp_path / "one")], check=True, capture_output=True)
    drawn = random.Random(0)
    kills = [drawn.randint(1, 8) for _ in range(20)]
    for number in range(1, 9):
        shard = [*command, str(parts), "--shard", f"{number}/8"]
        records = parts / f"shard_{number}_of_8" / "records"
        for _ in range(kills.count(number)):
            process = subprocess.Popen(shard, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            enough = len(list(records.glob("*.json"))) + drawn.randint(1, 60)
            while process.poll() is None and len(list(records.glob("*.json"))) < enough:
                time.sleep(0.01)
            process.kill()
            process.wait()
        subprocess.run(shard, check=True, capture_output=True)
    # Two more of them once more, one of these from the beginning and elsewhere.
    subprocess.run([*command, str(parts), "--shard", "2/8"], check=True, capture_output=True)
    subprocess.run([*command, str(tmp_path / "again"), "--shard", "5/8"], check=True, capture_output=True)
    os.rename(tmp_path / "again" / "shard_5_of_8", parts / "moved")
    subprocess.run([sys.executable, "-m", "unihema", "merge", str(parts)], check=True, capture_output=True)
    assert contents(parts) == contents(tmp_path / "one")
    assert len(json.loads((parts / "results.json").read_text())["images"]) == 2000


@pytest.mark.slow
def test_processes_of_a_launch_share_the_images(checkpoint, tmp_path):
    images = draw(tmp_path / "smears", 8)
    (images / "slide_0" / "broken.png").unlink()
    run = ["-m", "unihema", "predict", str(checkpoint), str(images), "-o"]
    subprocess.run([sys.executable, *run, str(tmp_path / "one")], check=True, capture_output=True)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([*launch, *run, str(tmp_path / "two")], check=True, capture_output=True, timeout=600)
    assert {path.name for path in (tmp_path / "two").glob("shard_*")} == {"shard_1_of_2", "shard_2_of_2"}
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
