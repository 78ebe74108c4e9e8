"""Parquet shards: what is written comes back, a few samples at a time, in an order that can be resumed and shared out."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from data_folders import write_coco, write_lines, write_mask, write_photograph

from unihema.errors import DatasetError
from unihema.processing_unihema.processing_unihema import UniHemaProcessor
from unihema.training.data.curation.prepare import shard_folder
from unihema.training.data.dataset import SmearDataset
from unihema.training.data.layouts.masks import read_mask
from unihema.training.data.readers import load_folder
from unihema.training.data.rows import class_names, have_cell_masks
from unihema.training.data.shards import WINDOW, JoinedRows, StoredRows, joined, write_shards
from unihema.training.run.batches import RunBatches
from unihema.training.run.config import DataConfig


FIELDS = 11


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of every task, with one validation image."""
    root = tmp_path_factory.mktemp("data") / "lab"
    for split, count in (("train", FIELDS), ("val", 1)):
        images = {}
        for number in range(count):
            write_photograph(root / split / "images" / f"{number}.png", seed=number)
            images[f"images/{number}.png"] = [[3, 4, 10 + number, 12]] * (number % 3)
            write_mask(root / split / "masks" / f"{number}.png")
            write_photograph(root / split / "crops" / ("basophil", "monocyte")[number % 2] / f"{number}.png", seed=90)
        write_coco(root / split / "annotations.json", images, **{"1": {"patient": "p1"}})
        questions = [
            {"image": f"images/{number}.png", "question": f"Question {k}?", "answer": f"{number} {k}"}
            for k in range(3)
            for number in range(count)
            if k <= number
        ]
        write_lines(root / split / "qa.jsonl", *questions)
    (root / "dataset.json").write_text(json.dumps({"licence": "MIT"}))
    return root


@pytest.fixture(scope="module")
def shards(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("shards") / "lab"
    shard_folder(folder, output, shard_samples=4, group_samples=2)
    return output


@pytest.fixture(scope="module")
def processor():
    size = {"longest_edge": 96}
    return UniHemaProcessor.from_default(detection=size, segmentation=size, single_cell=size, question_answering=size)


def dataset(rows, processor, task="detection", **options):
    names = {"class_names": ["RBC"], "single_cell_labels": ["basophil", "monocyte"]}
    return SmearDataset(rows, processor, task, **names, **options)


def without_files(rows):
    kept = [{key: value for key, value in row.items() if key not in ("image", "mask")} for row in rows]
    return sorted(kept, key=lambda row: json.dumps(row, sort_keys=True))


def test_every_row_comes_back(folder, shards):
    assert sorted(file.name for file in (shards / "train").glob("detection*")) == [
        f"detection-0000{number}.parquet" for number in range(3)
    ]
    for split in ("train", "val"):
        plain, stored = load_folder(folder, split), load_folder(shards, split)
        assert list(plain) == list(stored)
        for task, rows in plain.items():
            assert isinstance(stored[task], StoredRows) and len(stored[task]) == len(rows)
            assert without_files(stored[task]) == without_files(rows), task
            # By number as well as in turn.
            assert without_files(stored[task][number] for number in range(len(rows))) == without_files(rows)
    files = {row["file_name"]: row for row in load_folder(folder, "train")["segmentation"]}
    for row in load_folder(shards, "train")["segmentation"]:
        original = files[row["file_name"]]
        assert row["image"].content() == Path(original["image"]).read_bytes()
        assert np.array_equal(read_mask(row["mask"]), read_mask(original["mask"]))
    assert json.loads((shards / "dataset.json").read_text()) == {"licence": "MIT"}


@pytest.mark.parametrize("task", ["detection", "segmentation", "single_cell", "question_answering"])
def test_samples_are_those_of_the_folder(folder, shards, processor, task):
    plain = dataset(load_folder(folder, "train")[task], processor, task, evaluation=True, questions_per_image=3)
    rows = load_folder(shards, "train")[task]
    stored = dataset(list(rows), processor, task, evaluation=True, questions_per_image=3)
    assert len(plain) == len(stored)
    by_name = {plain[number]["file_name"]: plain[number] for number in range(len(plain))}
    for number in range(len(stored)):
        sample = stored[number]
        expected = by_name[sample["file_name"]]
        for key in set(expected) - {"index", "row_indices"}:
            if isinstance(expected[key], torch.Tensor):
                assert torch.equal(sample[key], expected[key]), key
            elif key == "annotations":
                assert sample[key]["annotations"] == expected[key]["annotations"]
            else:
                assert sample[key] == expected[key], key


def test_training_reads_nothing_it_is_not_asked_for(shards, processor, monkeypatch):
    read = []
    monkeypatch.setattr(
        StoredRows, "_read", lambda self, *group, real=StoredRows._read: read.append(1) or real(self, *group)
    )
    rows = load_folder(shards, "train")["question_answering"]
    data = dataset(rows, processor, "question_answering", questions_per_image=2)
    assert data.rows is rows and len(data) == FIELDS and not read
    batch = data.collate([data[0, 1], data[1, 1]])
    assert batch["input_ids"].shape[0] == 4 and len(read) == 1, "two samples of a row group are one read"


def batches(sets, processor, count, start=0, process=0, processes=1, workers=0, **settings):
    data = {"detection": dataset(sets, processor)}
    config = DataConfig(batch_size={"detection": 2}, workers=workers, **settings)
    stream = RunBatches(data, config, seed=5, process=process, processes=processes).stream(start)
    return [(number, batch["file_names"]) for number, batch in (next(stream) for _ in range(count))]


def test_order_is_resumed_and_shared_out(shards, processor):
    rows = load_folder(shards, "train")["detection"]
    whole = batches(rows, processor, 14)
    epoch = [name for _, names in whole[:6] for name in names]
    assert sorted(epoch) == sorted(row["file_name"] for row in rows), "an epoch has every sample once"
    assert epoch != [name for _, names in whole[6:12] for name in names]
    assert batches(rows, processor, 5, start=9) == whole[9:]
    assert batches(rows, processor, 14, workers=2) == whole
    first, second = (batches(rows, processor, 4, process=process, processes=2) for process in (0, 1))
    # Twice as many samples a step, dealt out in turn.
    together = [name for pair in zip(first[:2], second[:2]) for names in zip(pair[0][1], pair[1][1]) for name in names]
    assert together == epoch[:8]


def test_a_set_in_shards_beside_one_in_memory(folder, shards, processor):
    rows = joined([load_folder(shards, "train")["detection"], load_folder(folder, "val")["detection"]])
    assert isinstance(rows, JoinedRows) and len(rows) == FIELDS + 1 and class_names(rows.witnesses) == ["RBC"]
    names = [name for _, names in batches(rows, processor, 6) for name in names]
    assert sorted(names) == sorted(row["file_name"] for row in rows)
    assert [name for name, _ in rows.sources] == ["lab", "lab"]
    renamed = rows.renamed({"RBC": "red cell"})
    assert class_names(renamed) == class_names(renamed.witnesses) == ["red cell"]
    assert rows[FIELDS]["image"] == str(folder / "val" / "images" / "0.png")
    copy = pickle.loads(pickle.dumps(rows))
    assert copy[0]["image"].content() == rows[0]["image"].content()


def test_an_interrupted_writing_goes_on(folder, tmp_path, monkeypatch):
    from unihema.training.data import shards

    written, real = [], shards._write_shard

    def stop_at_the_third(path, *arguments):
        if len(written) == 2:
            raise KeyboardInterrupt
        real(path, *arguments)
        written.append(path)

    monkeypatch.setattr(shards, "_write_shard", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        shard_folder(folder, tmp_path / "out", splits=["train"], tasks=["detection"], shard_samples=4)
    with pytest.raises(DatasetError, match="no data"):
        load_folder(tmp_path / "out", "train")
    times = {path: path.stat().st_mtime_ns for path in written}
    monkeypatch.setattr(shards, "_write_shard", real)
    shard_folder(folder, tmp_path / "out", splits=["train"], tasks=["detection"], shard_samples=4)
    assert {path: path.stat().st_mtime_ns for path in written} == times
    assert len(load_folder(tmp_path / "out", "train")["detection"]) == FIELDS
    with pytest.raises(DatasetError, match="holds shards of other data or other sizes"):
        shard_folder(folder, tmp_path / "out", splits=["train"], tasks=["detection"], shard_samples=5)


def test_what_cannot_be_used_is_named(folder, shards, tmp_path):
    (tmp_path / "full" / "train").mkdir(parents=True)
    (tmp_path / "full" / "train" / "a.txt").touch()
    rows = load_folder(folder, "val")
    with pytest.raises(DatasetError, match="is not empty"):
        write_shards(rows, tmp_path / "full" / "train", "lab")
    with pytest.raises(ValueError, match="both must be 1 or more"):
        write_shards(rows, tmp_path / "new", "lab", shard_samples=0)
    with pytest.raises(DatasetError, match="write its shards into another"):
        shard_folder(folder, folder)
    with pytest.raises(DatasetError, match="no such folder"):
        shard_folder(tmp_path / "nowhere", tmp_path / "new")
    write_shards(rows, tmp_path / "lab" / "val", "lab")
    (tmp_path / "lab" / "val" / "detection-00000.parquet").unlink()
    with pytest.raises(DatasetError, match=r"detection-00000\.parquet is missing"):
        load_folder(tmp_path / "lab", "val")
    (tmp_path / "lab" / "val" / "shards.json").write_text('{"format": "other"}')
    with pytest.raises(DatasetError, match=r"shards\.json: not an index of shards that this version reads"):
        load_folder(tmp_path / "lab", "val")


def test_shards_are_files_of_datasets(shards, tmp_path):
    from datasets import load_dataset

    files = [str(file) for file in sorted((shards / "train").glob("detection*.parquet"))]
    opened = load_dataset("parquet", data_files=files, split="train", streaming=True, cache_dir=str(tmp_path))
    samples = list(opened)
    assert len(samples) == FIELDS and samples[0]["image"].size == (96, 72)
    assert json.loads(samples[0]["rows"])[0]["objects"].keys() >= {"bbox", "category"}


def test_no_more_row_groups_are_kept_than_are_shuffled_together(tmp_path):
    """Memory by count: the bytes are measured by `python -m benchmarks.streaming`."""
    picture = np.zeros((4, 4, 3), np.uint8)
    rows = [
        {"image": picture, "file_name": f"{n}.png", "dataset": "many", "task": "single_cell", "label": "a"}
        for n in range(40 * WINDOW)
    ]
    write_shards({"single_cell": rows}, tmp_path / "train", "many", shard_samples=200, group_samples=1)
    stored = load_folder(tmp_path, "train")["single_cell"]
    for number in np.random.default_rng(0).permutation(len(stored))[: 5 * WINDOW]:
        stored[int(number)]["image"].content()
    assert len(stored._kept) == WINDOW + 2


def test_masks_that_the_first_row_has_not_are_known_of(tmp_path):
    root = tmp_path / "lab" / "train"
    images = {f"images/{number}.png": [[3, 4, 20, 12]] for number in range(3)}
    for number in range(3):
        write_photograph(root / "images" / f"{number}.png", seed=number)
    path = write_coco(root / "annotations.json", images)
    content = json.loads(path.read_text())
    content["annotations"][2]["segmentation"] = [[3, 4, 23, 4, 23, 16, 3, 16]]
    path.write_text(json.dumps(content))
    shard_folder(tmp_path / "lab", tmp_path / "shards", ["train"])
    assert have_cell_masks(load_folder(tmp_path / "lab", "train")["detection"])
    assert have_cell_masks(load_folder(tmp_path / "shards", "train")["detection"])


def test_fields_and_crops_with_attributes_are_not_mixed_in_shards(tmp_path):
    root = tmp_path / "lab" / "train"
    write_photograph(root / "images" / "a.png")
    write_coco(root / "annotations.json", {"images/a.png": [[3, 4, 20, 12]]})
    write_photograph(root / "crops" / "basophil" / "b.png")
    (root / "attributes.csv").write_text("file_name,shape\ncrops/basophil/b.png,round\n")
    with pytest.raises(DatasetError, match="cannot be told apart in shards"):
        shard_folder(tmp_path / "lab", tmp_path / "shards", ["train"], attributes_as_detection=True)
    assert shard_folder(tmp_path / "lab", tmp_path / "shards", ["train"])["train"]["detection"] == 1
