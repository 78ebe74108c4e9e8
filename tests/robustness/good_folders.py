"""Small good data folders, one of each layout, as the names and contents of their files."""

import json
import zlib
from pathlib import Path

from data_folders import write_coco, write_lines, write_mask, write_photograph, write_voc

from unihema.training.data.readers import load_folder
from unihema.training.data.shards import write_shards


SIZE = (24, 18)
BOX = [2, 3, 8, 6]


def files_of(folder: Path) -> dict[str, bytes]:
    """Name in the folder -> content."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def good_folders(place: Path) -> dict[str, dict[str, bytes]]:
    """Layout -> its files; written to a place once to make them."""
    for make in (_by_split, _coco, _yolo, _voc, _table, _mask_pairs, _class_folders, _own, _image_folder):
        make(place / make.__name__.strip("_"))
    for split in ("train", "val"):
        write_shards(
            load_folder(place / "own", split), place / "shards" / split, "own", shard_samples=2, group_samples=1
        )
    return {folder.name: files_of(folder) for folder in sorted(place.iterdir())}


def _photographs(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        write_photograph(folder / name, zlib.crc32(f"{folder.name}{number}".encode()), SIZE)


def _by_split(folder: Path) -> None:
    _photographs(folder / "images", "a.png", "b.jpg", "val.png")
    write_coco(folder / "train.json", {"a.png": [BOX, [9, 2, 5, 5]], "b.jpg": [BOX]}, SIZE, a={"patient": "1"})
    write_coco(folder / "val.json", {"val.png": [BOX]}, SIZE)
    write_lines(folder / "qa_train.jsonl", {"image": "a.png", "question": "Which?", "answer": "A cell."})
    write_lines(folder / "mlm_train.jsonl", {"image": "a.png", "masked_t5": "A <extra_id_0>.", "sentence": "A cell."})
    (folder / "dataset.json").write_text('{"licence": "MIT", "masks_show": "nucleus"}')
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")


def _coco(folder: Path) -> None:
    for split in ("train", "valid"):
        _photographs(folder / split, f"{split}1.jpg", f"{split}2.png")
        path = write_coco(
            folder / split / "_annotations.coco.json", {f"{split}1.jpg": [BOX], f"{split}2.png": []}, SIZE
        )
        content = json.loads(path.read_text())
        content["annotations"][0] |= {
            "segmentation": [[2, 3, 10, 3, 10, 9, 2, 9]], "attributes": {"shape": "round", "track_id": 4}
        }  # fmt: skip
        path.write_text(json.dumps(content))


def _yolo(folder: Path) -> None:
    for split in ("train", "val"):
        _photographs(folder / "images" / split, "a.png", "b.jpg")
        for name, line in (("a", "1 0.5 0.5 0.4 0.5\n0 0.3 0.3 0.2 0.2\n"), ("b", "0 0.1 0.1 0.6 0.1 0.6 0.7\n")):
            path = folder / "labels" / split / f"{name}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(line)
    (folder / "data.yaml").write_text("nc: 2\nnames: [WBC, RBC]\ndate: 2024-01-02\n")
    (folder / "classes.txt").write_text("WBC\nRBC\n")


def _voc(folder: Path) -> None:
    _photographs(folder / "JPEGImages", "a.jpg", "b.png")
    write_voc(folder / "Annotations" / "a.xml", "a.jpg", ("WBC", (2, 3, 10, 9)), ("RBC", (9, 2, 14, 7)))
    write_voc(folder / "Annotations" / "b.xml", "b.png", ("RBC", (2, 3, 10, 9)))
    path = folder / "ImageSets" / "Main" / "val.txt"
    path.parent.mkdir(parents=True)
    path.write_text("b\n")


def _table(folder: Path) -> None:
    _photographs(folder / "pictures", "a.png", "b.jpg", "c.png")
    (folder / "cells.csv").write_text(
        "img_name,label,cell_size,patient\na.png,basophil,small,1\nb.jpg,monocyte,big,2\nc.png,monocyte,,2\n"
    )


def _mask_pairs(folder: Path) -> None:
    _photographs(folder / "images", "a.png", "b.jpg")
    _photographs(folder, "c.bmp")
    for name in ("masks/a.png", "masks/b.png", "c.png"):
        write_mask(folder / name, SIZE)


def _class_folders(folder: Path) -> None:
    _photographs(folder / "train" / "basophil", "a.png", "b.jpg")
    _photographs(folder / "val" / "monocyte", "c.png")


def _own(folder: Path) -> None:
    for split in ("train", "val"):
        place = folder / split
        _photographs(place / "images", f"{split}a.png", f"{split}b.jpg")
        _photographs(place / "crops" / "basophil", f"{split}c.png")
        write_mask(place / "masks" / f"{split}a.png", SIZE)
        images = {f"images/{split}a.png": [BOX], f"images/{split}b.jpg": [BOX, [9, 2, 5, 5]]}
        write_coco(place / "annotations.json", images, SIZE)
        name = f"images/{split}a.png"
        write_lines(place / "qa.jsonl", *({"image": name, "question": q, "answer": "yes"} for q in ("One?", "Two?")))
        write_lines(place / "cloze.jsonl", {"image": name, "masked": "A <extra_id_0>.", "completed": "A cell."})
        (place / "origins.csv").write_text(f"file_name,patient,slide\n{name},1,2\n")
        (place / "attributes.csv").write_text(f"file_name,cell_size\ncrops/basophil/{split}c.png,small\n")


def _image_folder(folder: Path) -> None:
    for split in ("train", "val"):
        _photographs(folder / split, f"{split}a.png", f"{split}b.jpg")
        write_mask(folder / split / "masks" / f"{split}a.png", SIZE)
        objects = {"bbox": [BOX], "category_name": ["RBC"]}
        write_lines(
            folder / split / "metadata.jsonl",
            {"file_name": f"{split}a.png", "mask_file_name": f"masks/{split}a.png", "objects": objects, "patient": 1},
            {"file_name": f"{split}b.jpg", "label": "basophil", "cell_size": "small"},
        )
