"""Checking data folders: planted duplicates, leaks, broken boxes and unsafe archives, and those known in real data."""

import json
import shutil
import zipfile

import numpy as np
import pytest
from data_folders import photograph, write_coco, write_lines, write_mask, write_photograph
from PIL import Image

from unihema.errors import DatasetError
from unihema.training.data.curation.check import check_data
from unihema.training.data.curation.duplicates import (
    count_by_places,
    fingerprint,
    near_pairs,
    oriented,
    perceptual_hashes,
)


BOX = [4, 5, 10, 8]


@pytest.fixture
def folder(tmp_path):
    """A clean folder of four different photographs, with slides."""
    names = {"train": ("a", "b"), "val": ("c", "d")}
    seeds = {"a": 1, "b": 2, "c": 3, "d": 4}
    for split, stems in names.items():
        for stem in stems:
            write_photograph(tmp_path / "lab" / "images" / split / f"{stem}.png", seeds[stem])
        slides = {stem: {"slide": split} for stem in stems}
        write_coco(tmp_path / "lab" / f"{split}.json", {f"{split}/{stem}.png": [BOX] for stem in stems}, **slides)
    return tmp_path / "lab"


def test_a_clean_folder(folder):
    report = check_data([folder])
    assert report.clean
    assert report.counts == {
        "lab": {
            "train": {"detection": {"rows": 2, "classes": {"RBC": 2}}},
            "val": {"detection": {"rows": 2, "classes": {"RBC": 2}}},
        }
    }
    assert report.to_dict()["clean"] is True and json.dumps(report.to_dict())


def test_a_planted_copy_across_splits_is_a_leak(folder):
    shutil.copyfile(folder / "images" / "train" / "a.png", folder / "images" / "val" / "d.png")
    report = check_data([folder])
    (repeat,) = report.repeats
    assert repeat.kind == "exact" and repeat.leak and repeat.similarity == 1.0
    assert repeat.places == ["lab/train", "lab/val"]
    assert repeat.files[1].endswith("val/d.png")
    assert not report.clean


CHANGES = {
    "jpeg": lambda image: image,
    "half size": lambda image: image.resize((48, 36)),
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "turned": lambda image: image.transpose(Image.Transpose.ROTATE_90),
    "transposed": lambda image: image.transpose(Image.Transpose.TRANSVERSE),
    "darker": lambda image: image.point(lambda value: int(value * 0.8)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_is_found(folder, tmp_path, change):
    copy = CHANGES[change](Image.fromarray(photograph(1)))
    (tmp_path / "other" / "val" / "crops" / "cell").mkdir(parents=True)
    copy.save(tmp_path / "other" / "val" / "crops" / "cell" / "x.jpg", quality=60)
    report = check_data([folder, tmp_path / "other"])
    (repeat,) = report.repeats
    assert repeat.kind == "near" and repeat.leak and repeat.similarity > 0.8
    assert repeat.places == ["lab/train", "other/val"]
    assert check_data([folder, tmp_path / "other"], near=False).clean


def test_different_photographs_are_no_pairs():
    class Stub:
        def __init__(self, seed):
            self.thumbnail = np.asarray(Image.fromarray(photograph(seed, (64, 64))).convert("L"))

    assert near_pairs([Stub(seed) for seed in range(60)], max_distance=16) == []
    blank = Stub(0)
    blank.thumbnail = np.full((64, 64), 200, np.uint8)
    # Empty fields have nothing in which they could be the same photograph.
    assert near_pairs([blank, blank]) == []
    assert near_pairs([blank]) == []


def test_the_eight_orientations_of_a_hash():
    image = np.asarray(Image.fromarray(photograph(5, (64, 64))).convert("L"))
    hashes = perceptual_hashes(image[None])[0]
    assert len(set(hashes.tolist())) == 8
    for orientation in range(8):
        assert perceptual_hashes(oriented(image, orientation)[None])[0, 0] == hashes[orientation]


def test_copies_for_several_tasks_are_one_photograph(tmp_path):
    split = tmp_path / "lab" / "train"
    write_photograph(split / "images" / "a.png")
    write_mask(split / "masks" / "a.png")
    write_photograph(split / "crops" / "monocyte" / "a.png")
    assert check_data([tmp_path / "lab"]).clean
    write_photograph(split / "crops" / "basophil" / "b.png")
    (repeat,) = check_data([tmp_path / "lab"]).repeats
    assert not repeat.leak and len(repeat.files) == 2
    assert dict(count_by_places([repeat])) == {("lab/train", "lab/train"): {"exact": 1}}


def test_broken_rows_are_listed(folder):
    write_coco(
        folder / "train.json", {"train/a.png": [BOX, [96, 0, 5, 5]], "train/b.png": [BOX], "../../outside.png": []}
    )
    (folder / "images" / "train" / "b.png").write_bytes(b"no image")
    report = check_data([folder])
    assert len(report.bad_rows) == 3
    first, second, third = sorted(report.bad_rows, key=lambda row: ("json" in row, "annotations[" in row))
    assert "b.png: not an image" in first
    assert "train.json: images[2]: '../../outside.png' leads out of the folder" in second
    assert "train.json: annotations[1].bbox (train/a.png): box [96, 0, 5, 5] lies outside the image of 96x72" in third
    assert report.counts["lab"]["train"]["detection"]["rows"] == 2


def test_a_file_that_cannot_be_read_does_not_end_the_check(folder):
    (folder / "train.json").write_text("{broken")
    report = check_data([folder])
    assert len(report.bad_rows) == 1 and "train.json:1: broken JSON" in report.bad_rows[0]
    assert list(report.counts["lab"]) == ["val"]


def test_sizes_that_do_not_fit(folder, tmp_path):
    write_coco(folder / "train.json", {"train/a.png": [BOX], "train/b.png": []}, size=(960, 720))
    write_photograph(tmp_path / "masks" / "train" / "images" / "m.png", 9)
    write_mask(tmp_path / "masks" / "train" / "masks" / "m.png", size=(10, 10))
    report = check_data([folder, tmp_path / "masks"])
    # Boxes for the same picture at another scale are scaled, in training as well.
    (note,) = [note for note in report.notes if "boxes refer to 960x720 pixels, but the image has 96x72" in note]
    assert "2 rows are of that kind" in note
    assert len(report.bad_rows) == 1 and "m.png: 10x10 pixels, but its image" in report.bad_rows[0]
    write_coco(folder / "train.json", {"train/a.png": [BOX], "train/b.png": []}, size=(72, 96))
    report = check_data([folder])
    assert sum("boxes refer to 72x96 pixels, but the image has 96x72" in row for row in report.bad_rows) == 2


def test_patients_and_slides_in_two_splits(folder):
    for split in ("train", "val"):
        slides = {stem: {"slide_id": 7, "patient": f"p-{split}"} for stem in ("a", "b", "c", "d")}
        stems = ("a", "b") if split == "train" else ("c", "d")
        write_coco(folder / f"{split}.json", {f"{split}/{stem}.png": [] for stem in stems}, **slides)
    report = check_data([folder])
    (group,) = report.shared_groups
    assert (group.dataset, group.group, group.identifier) == ("lab", "slide", "7")
    assert group.images == {"train": 2, "val": 2} and not report.clean


def test_slides_in_file_names(tmp_path):
    for split, name, seed in (("train", "B-30_0047.png", 1), ("val", "B-30_0048.png", 2), ("val", "N-7_1.png", 3)):
        write_photograph(tmp_path / "lab" / split / "crops" / "cell" / name, seed)
    assert check_data([tmp_path / "lab"]).clean
    report = check_data([tmp_path / "lab"], patterns={"slide": r"-(\d+)_"})
    assert [(group.identifier, group.images) for group in report.shared_groups] == [("30", {"train": 1, "val": 1})]
    for patterns, words in (
        ({"slide": r"-(\d+"}, "no regular expression"),
        ({"slide": r"-\d+_"}, "needs brackets"),
        ({"glass": r"(.)"}, "Unknown group 'glass'; groups are patient, slide"),
    ):
        with pytest.raises(DatasetError, match=words):
            check_data([tmp_path / "lab"], patterns=patterns)


def test_archives_are_looked_into_without_unpacking(tmp_path):
    for name, member in (("good.zip", "a.txt"), ("evil.zip", "../../evil.txt")):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr(member, "x")
    (tmp_path / "cut.zip").write_bytes(b"PK")
    report = check_data([tmp_path / name for name in ("good.zip", "evil.zip", "cut.zip")])
    good, evil, cut = report.unsafe_archives.values()
    assert good == [] and "'../../evil.txt' leads out of the folder" in evil[0] and "Download it again" in cut[0]
    assert not report.clean and sorted(path.name for path in tmp_path.iterdir()) == ["cut.zip", "evil.zip", "good.zip"]


def test_what_cannot_be_checked(folder, tmp_path):
    with pytest.raises(DatasetError, match="Nothing to check"):
        check_data([])
    with pytest.raises(DatasetError, match="gone: neither a data folder nor a zip or tar file"):
        check_data([tmp_path / "gone"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="empty: no known layout"):
        check_data([tmp_path / "empty"])
    with pytest.raises(DatasetError, match="Licence for 'lob', which is not checked; the data sets are lab"):
        check_data([folder], licences={"lob": "MIT"})
    with pytest.raises(DatasetError, match="A similarity of 80 must be above 0 and at most 1"):
        check_data([folder], min_similarity=80)


def test_licences_come_from_the_folders(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "card")
    shutil.copytree(folder, tmp_path / "second" / "lab")
    (tmp_path / "card" / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n# Smears\n")
    (tmp_path / "second" / "lab" / "dataset.json").write_text('{"licence": "MIT"}')
    # Two folders of one name are told apart by their paths.
    licence = check_data([folder, tmp_path / "card", tmp_path / "second" / "lab"]).licence
    assert licence.by_source == {str(folder): "", "card": "cc-by-nc-4.0", str(tmp_path / "second" / "lab"): "MIT"}
    assert licence.strictest == "CC-BY-NC-4.0" and licence.unknown == [str(folder)]
    (tmp_path / "second" / "lab" / "dataset.json").write_text("[")
    with pytest.raises(DatasetError, match="dataset.json:1: broken JSON"):
        check_data([tmp_path / "second" / "lab"])


def test_text_rows_count_their_image_once(tmp_path):
    split = tmp_path / "lab" / "train"
    write_photograph(split / "images" / "a.png")
    questions = [{"image": "images/a.png", "question": question, "answer": "yes"} for question in ("One?", "Two?")]
    write_lines(split / "qa.jsonl", *questions)
    report = check_data([tmp_path / "lab"])
    assert report.clean and report.counts["lab"]["train"]["question_answering"]["rows"] == 2


def test_unreadable_images_are_named(tmp_path):
    with pytest.raises(DatasetError, match="gone.png: no such image file"):
        fingerprint(tmp_path / "gone.png")


def test_bccd_and_cbc_are_the_same_photographs(data_dir):
    report = check_data([data_dir / "bccd", data_dir / "cbc"])
    counts = count_by_places(report.repeats)
    assert counts["bccd/train", "cbc/train"]["exact"] == 204
    assert counts["bccd/val", "cbc/val"]["exact"] == 19
    assert not report.clean and report.bad_rows == []
    assert not any(repeat.leak for repeat in report.repeats)


def test_slides_of_wbc5_keep_to_their_split(data_dir):
    report = check_data([data_dir / "wbc5"])
    assert report.shared_groups == [] and report.bad_rows == []
