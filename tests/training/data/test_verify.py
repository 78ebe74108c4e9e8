"""Every listed file is read before a run starts; `unihema data check` says what training would say."""

import json

import numpy as np
import pytest
from data_folders import photograph, write_coco, write_mask, write_photograph
from PIL import Image
from tiny_runs import run_config

from unihema.errors import DatasetError
from unihema.training.data.curation.check import check_data
from unihema.training.data.readers import load_folder
from unihema.training.data.rows import BadRows, BadRowsError
from unihema.training.data.verify import verify_rows
from unihema.training.run.build import training_rows, validation_rows, verified_rows
from unihema.training.run.config import RunConfig
from unihema.training.run.loop import train


BOX = [2, 3, 20, 15]


def verified(folder, split="train"):
    bad = BadRows()
    rows = verify_rows(load_folder(folder, split), bad, progress=False)
    return rows, bad


def write_turned(path, seed=7):
    """A photograph of 96x72 as it is seen, stored sideways with an EXIF flag."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(photograph(seed)).transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)


@pytest.fixture
def folder(tmp_path):
    """Good fields, and a truncated one, one that is no image, one of another shape and one turned; a bad mask, a bad crop."""
    images = tmp_path / "lab" / "train" / "images"
    names = [f"images/{name}" for name in ("good.png", "cut.png", "none.png", "shape.png", "turned.jpg")]
    for number, name in enumerate(names):
        write_photograph(tmp_path / "lab" / "train" / name, number)
    content = (images / "cut.png").read_bytes()
    (images / "cut.png").write_bytes(content[: len(content) // 2])
    (images / "none.png").write_bytes(b"no image")
    write_photograph(images / "shape.png", 3, size=(96, 96))
    write_turned(images / "turned.jpg")
    path = write_coco(tmp_path / "lab" / "train" / "annotations.json", {name: [BOX] for name in names})
    annotations = json.loads(path.read_text())
    annotations["images"][-1] |= {"width": 72, "height": 96}
    path.write_text(json.dumps(annotations))
    write_mask(tmp_path / "lab" / "train" / "masks" / "good.png", size=(30, 72))
    write_photograph(tmp_path / "lab" / "train" / "crops" / "monocyte" / "c.png", 9)
    (tmp_path / "lab" / "train" / "crops" / "monocyte" / "bad.png").write_bytes(b"")
    return tmp_path / "lab"


WORDS = [
    "cut.png: the image is truncated or damaged",
    "none.png: not an image",
    "shape.png: its boxes refer to 96x72 pixels, but the image has 96x96",
    "turned.jpg: its boxes refer to 72x96 pixels, but the image has 96x72. They were drawn before its EXIF turn",
    "good.png: 30x72 pixels, but its image",
    "bad.png: the file is empty",
]


def test_everything_bad_is_named_at_once(folder):
    rows, bad = verified(folder)
    assert len(bad.messages) == len(WORDS)
    for words in WORDS:
        assert sum(words in message for message in bad.messages) == 1, words
    assert [row["file_name"] for row in rows["detection"]] == ["images/good.png"]
    assert [row["file_name"] for row in rows["single_cell"]] == ["crops/monocyte/c.png"]
    assert "segmentation" not in rows and any("segmentation: no row is left" in note for note in bad.notes)


def test_a_run_stops_before_its_first_step_or_leaves_them_out(folder, tmp_path):
    config = RunConfig(output_dir=str(tmp_path / "run")).with_overrides(
        {"data.folders": [str(folder)], "data.tasks": ["detection", "single_cell"], "data.val_split": ""}
    )
    rows = training_rows(config)
    with pytest.raises(BadRowsError, match="(?s)bad rows:.*truncated.*EXIF turn") as caught:
        verified_rows(config, rows, validation_rows(config, rows))
    assert len(caught.value.messages) == len(WORDS) - 1
    skipping = config.with_overrides({"data.on_invalid": "skip"})
    kept, _ = verified_rows(skipping, rows, {})
    assert {task: len(found) for task, found in kept.items()} == {"detection": 1, "single_cell": 1}
    (folder / "train" / "crops" / "monocyte" / "c.png").write_bytes(b"x")
    with pytest.raises(DatasetError, match="Every training row of single_cell is bad"):
        verified_rows(skipping, rows, {})


def test_names_of_validation_rows_are_compared_before_the_first_step(tmp_path):
    for split, labels in (("train", ("monocyte", "basophil")), ("val", ("monocyte", "eosinophil"))):
        for number, label in enumerate(labels):
            write_photograph(tmp_path / "lab" / split / "crops" / label / f"{split}.png", number)
    config = run_config(tmp_path / "lab", tmp_path / "run")
    with pytest.raises(BadRowsError, match="unknown single-cell label 'eosinophil'; known: basophil, monocyte"):
        train(config)
    assert not (tmp_path / "run" / "log.jsonl").exists() or (tmp_path / "run" / "log.jsonl").read_text() == ""


def test_one_class_only_is_said(tmp_path):
    write_photograph(tmp_path / "train" / "crops" / "monocyte" / "a.png")
    assert any("of one class only, monocyte" in note for note in verified(tmp_path)[1].notes)


def test_the_check_says_the_same(folder):
    _, bad = verified(folder)
    assert sorted(check_data([folder], near=False).bad_rows) == sorted(bad.messages)


def test_boxes_and_masks_at_another_scale_are_said(tmp_path):
    write_photograph(tmp_path / "images" / "a.png")
    write_coco(tmp_path / "train.json", {"a.png": [[20, 30, 200, 150]]}, size=(960, 720))
    rows, bad = verified(tmp_path)
    assert bad.messages == [] and len(rows["detection"]) == 1
    assert any("boxes refer to 960x720 pixels, but the image has 96x72. 1 rows" in note for note in bad.notes)


def test_a_mask_that_is_all_cell_is_said(tmp_path):
    write_photograph(tmp_path / "train" / "images" / "a.png")
    (tmp_path / "train" / "masks").mkdir()
    Image.fromarray(np.full((72, 96), 255, np.uint8)).save(tmp_path / "train" / "masks" / "a.png")
    rows, bad = verified(tmp_path)
    assert len(rows["segmentation"]) == 1 and any("all of it is cell" in note for note in bad.notes)


def test_a_file_in_two_splits(tmp_path):
    write_photograph(tmp_path / "images" / "a.png")
    for split in ("train", "val"):
        write_coco(tmp_path / f"{split}.json", {"a.png": [BOX]})
    (message,) = check_data([tmp_path]).bad_rows
    assert "a.png: listed in train and in val" in message
