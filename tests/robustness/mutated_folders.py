"""Data folders of every layout, damaged by a seeded generator, read in this process.

    python tests/robustness/mutated_folders.py TEMPLATES SEED FIRST COUNT

makes small good folders in TEMPLATES (once), damages copies of them, and prints a line of JSON before each and one for each that
ended in anything but rows or a `DatasetError`. Input N of a seed is always the same.
"""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_folders import write_coco, write_lines, write_mask, write_photograph, write_voc

from unihema.errors import DatasetError
from unihema.training.data.curation.check import check_data
from unihema.training.data.readers import load_folder
from unihema.training.data.rows import BadRows
from unihema.training.data.shards import write_shards
from unihema.training.data.verify import verify_rows


SECONDS = 30
MEMORY = 2 << 30
SIZE = (24, 18)
BOX = [2, 3, 8, 6]
IMAGES = (".png", ".jpg", ".bmp")


def make_templates(folder: Path) -> list[Path]:
    """A good folder of each layout; made once."""
    if not folder.exists():
        partial = Path(f"{folder}.partial")
        for make in (_by_split, _coco, _yolo, _voc, _table, _mask_pairs, _class_folders, _own, _image_folder):
            make(partial / make.__name__.strip("_"))
        for split in ("train", "val"):
            rows = load_folder(partial / "own", split)
            write_shards(rows, partial / "shards" / split, "own", shard_samples=2, group_samples=1)
        partial.rename(folder)
    return sorted(folder.iterdir())


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


# Values that are rarely thought of, as JSON.
VALUES = [
    *(
        "null",
        "true",
        "0",
        "-1",
        "3",
        "1e400",
        "-1e400",
        "NaN",
        "Infinity",
        "9" * 400,
        "9" * 5000,
        "0.5",
        "1e-300",
        "1e9",
    ),
    *('""', '" "', '"\\ud800"', '"\\u0000"', '"\\u001b[2J"', '"../../../etc/passwd"', '"/etc/passwd"', '"C:\\\\a.png"'),
    *('"x"', '"a.png"', '"' + "x" * 5000 + '"', '"2026-13-45"', '"\\u202egpj"'),
    *("[]", "{}", "[[[]]]", "[1,2]", "[1,2,3,4,5]", "[" * 500 + "]" * 500, "[NaN, 1, 2, 3]", '["a", "b", "c", "d"]'),
    *('{"a": 1}', '{"size": [4, 5], "counts": [1]}'),
]
WORDS = [
    *("nan", "inf", "-1", "1e400", "9" * 400, "9" * 5000, "1_0", "\N{SUPERSCRIPT TWO}", "\N{ARABIC-INDIC DIGIT THREE}"),
    *("2026-13-45", "!!python/object:os.system", "&a [*a, *a]", "<<: *x", "? : ?", "%YAML 9", "---\n---", "{" * 3000),
    *("<!DOCTYPE x>", "<a>" * 3000, "]]>", "&amp;&#0;", "encoding='utf-7'"),
    *("\x00", '"', "'", ";;;", "\t", "\N{RIGHT-TO-LEFT OVERRIDE}"),
]


def damage(folder: Path, rng: random.Random) -> list[str]:
    """Changes a few things in a folder, and says which."""
    done = []
    for _ in range(rng.choice((1, 1, 1, 2, 3, 5))):
        files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
        files = [path for path in files if path.stat().st_size < 8 << 20]
        if not files:
            break
        # Most reading is of the few files that are no images.
        texts = [path for path in files if path.suffix not in IMAGES]
        path = rng.choice(texts if texts and rng.random() < 0.7 else files)
        ways: list[Callable] = [_bytes, _bytes, _kind_of_file, _other_file]
        if path.suffix in (".json", ".jsonl"):
            ways += [_json] * 12
        elif path.suffix == ".parquet":
            ways += [_parquet] * 6
        elif path.suffix in IMAGES:
            ways += [_image] * 4
        else:
            ways += [_words] * 8
        way = rng.choice(ways)
        done.append(f"{way.__name__} {path.relative_to(folder)}: {way(path, rng)}")
    return done


def _bytes(path: Path, rng: random.Random) -> str:
    content = bytearray(path.read_bytes())
    at = rng.randrange(len(content) + 1)
    match rng.randrange(7):
        case 0:
            for _ in range(rng.choice((1, 3, 20))):
                if content:
                    content[rng.randrange(len(content))] = rng.randrange(256)
            what = "bytes changed"
        case 1:
            content, what = content[:at], "cut"
        case 2:
            content, what = bytearray(), "empty"
        case 3:
            content[at:at], what = rng.randbytes(rng.choice((1, 100, 5000))), "bytes added"
        case 4:
            content[at:at], what = content[: rng.randrange(2000)], "a piece doubled"
        case 5:
            content, what = bytearray(rng.randbytes(rng.choice((1, 500, 20_000)))), "noise"
        case _:
            content, what = bytearray(content.decode("utf-8", "replace").encode("utf-16")), "UTF-16"
    path.write_bytes(content)
    return what


def _words(path: Path, rng: random.Random) -> str:
    text = path.read_text(encoding="utf-8", errors="replace")
    ends = [index for index, character in enumerate(text) if not character.isalnum()] or [0]
    start = rng.choice(ends) + 1
    end = next((index for index in ends if index >= start), len(text))
    word = rng.choice(WORDS)
    path.write_text(text[:start] + word + (text[end:] if rng.random() < 0.7 else text[start:]), encoding="utf-8")
    return f"{word[:30]!r} at {start}"


def _json(path: Path, rng: random.Random) -> str:
    text = path.read_text(encoding="utf-8", errors="replace")
    if rng.random() < 0.03:
        path.write_text(rng.choice(("[", '{"a":')) * 1_000_000)
        return "nested a million times"
    lines = [text] if path.suffix == ".json" else text.splitlines()
    try:
        chosen = rng.randrange(len(lines))
        value = json.loads(lines[chosen])
    except (ValueError, RecursionError):
        return _words(path, rng)
    holder, key = _place(value, rng)
    if holder is None:
        new = rng.choice(VALUES)
        lines[chosen] = new
    else:
        mark = f"@{rng.random()}@"
        old, new = holder[key], rng.choice(VALUES)
        way = rng.randrange(6)
        if way == 0:
            del holder[key]
            new = "taken out"
        elif way == 1 and isinstance(holder, list):
            holder.append(old)
            new = "doubled"
        elif way == 2 and isinstance(holder, dict):
            holder[f"{key}x"] = holder.pop(key)
            new = "renamed"
        else:
            holder[key] = mark
        # The values are text of JSON, some of which Python would not write.
        lines[chosen] = json.dumps(value).replace(f'"{mark}"', new)
    path.write_text("\n".join(lines))
    return f"{key}: {str(new)[:40]}"


def _place(value: Any, rng: random.Random) -> tuple[Any, Any]:
    """A random place in a JSON value: what holds it, and its key."""
    holder, key = None, None
    while isinstance(value, (dict, list)) and value and (holder is None or rng.random() < 0.75):
        holder, key = value, rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        value = holder[key]
    return holder, key


def _other_file(path: Path, rng: random.Random) -> str:
    others = [other for other in sorted(path.parents[1].rglob("*")) if other.is_file() and other != path]
    if not others:
        return "nothing"
    other = rng.choice(others)
    shutil.copyfile(other, path)
    return f"now {other.name}"


def _kind_of_file(path: Path, rng: random.Random) -> str:
    # A name that is no UTF-8 cannot be written everywhere; a file of two gigabytes takes no room where files have holes.
    kinds = [
        "folder",
        "pipe",
        "broken link",
        "link to itself",
        "link to a folder above",
        "gone",
        "renamed",
        "no permission",
        "large",
    ]
    kind = rng.choice(kinds)
    if kind == "large":
        with path.open("r+b") as file:
            file.truncate(rng.choice((600 << 20, 2 << 30)) if rng.random() < 0.2 else 17 << 20)
        return kind
    if kind == "no permission":
        path.chmod(0)
        return kind
    if kind == "renamed":
        names = [
            "a b.png",
            "x" * 250,
            "a\nb.json",
            "\udcff\udcfe" + path.name,
            ".hidden",
            "-rf.txt",
            "\u202e" + path.name,
            "CON",
        ]
        with contextlib.suppress(OSError):
            path.rename(path.parent / rng.choice(names))
        return kind
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "broken link":
        path.symlink_to("nowhere")
    elif kind == "link to itself":
        path.symlink_to(path.name)
    elif kind == "link to a folder above":
        path.symlink_to(rng.choice((path.parent, path.parents[1], Path("/"))))
    return kind


def _image(path: Path, rng: random.Random) -> str:
    if rng.random() < 0.3:
        # A header that promises a billion pixels; its checksum is right.
        side = rng.choice((30_000, 100_000, 2**31 - 1))
        header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        data = zlib.compress(bytes(1000))
        chunks = [header, b"IDAT" + data, b"IEND"]
        body = b"".join(struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
        return f"{side} pixels wide"
    mode = rng.choice(("1", "L", "P", "RGBA", "LA", "I;16", "I", "F", "CMYK", "RGB"))
    size = rng.choice((SIZE, SIZE[::-1], (1, 1), (240, 180), (500, 3)))
    if mode == "I;16":
        picture = Image.fromarray(np.full(size[::-1], 700, np.uint16))
    else:
        picture = (
            Image.new("RGB", size, (200, 10, 10)).convert("L").convert(mode) if mode in "IF" else Image.new(mode, size)
        )
    kind = rng.choice(("PNG", "TIFF", "JPEG", "GIF", "BMP", "WEBP"))
    exif = Image.Exif()
    exif[0x0112] = rng.choice((1, 3, 6, 8, 77))
    with contextlib.suppress(OSError, ValueError, KeyError):
        picture.save(path, kind, exif=exif)
    return f"{mode} {kind} {size}"


def _parquet(path: Path, rng: random.Random) -> str:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        table = parquet.read_table(path)
    except Exception:
        return _bytes(path, rng)
    name = rng.choice(table.column_names)
    at = table.column_names.index(name)
    way = rng.randrange(6)
    number = table.num_rows
    if way == 0:
        table = table.remove_column(at)
    elif way == 1:
        odd = [
            [None] * number,
            [1.5] * number,
            ["x"] * number,
            [b"x"] * number,
            [[1]] * number,
            [{"bytes": 3}] * number,
        ]
        table = table.set_column(at, name, [rng.choice(odd)])
    elif way == 2:
        table = table.slice(0, rng.randrange(number + 1))
    elif way == 3 and "rows" in table.column_names:
        texts = [
            rng.choice([rng.choice(VALUES), f"[{rng.choice(VALUES)}]", '[{"file_name": 3}]']) for _ in range(number)
        ]
        table = table.set_column(table.column_names.index("rows"), "rows", [pyarrow.array(texts)])
    elif way == 4:
        table = table.rename_columns([f"{column}x" if column == name else column for column in table.column_names])
    else:
        table = pyarrow.concat_tables([table, table])
    parquet.write_table(table, path, row_group_size=rng.choice((1, 1, 100)))
    return f"{name}, way {way}"


def read_all(folder: Path, rng: random.Random) -> None:
    """Reads a folder as training and as `unihema data check` do; a `DatasetError` is as good as rows."""
    on_invalid, attributes = rng.choice(("error", "skip")), rng.random() < 0.5
    for split in ("train", "val"):
        with contextlib.suppress(DatasetError):
            rows = load_folder(folder, split, on_invalid=on_invalid, attributes_as_detection=attributes)
            for found in rows.values():
                for row in found:
                    _open_stored(row)
            bad = BadRows()
            verify_rows(rows, bad, workers=2, progress=False)
            with contextlib.suppress(DatasetError):
                bad.settle("error")
    with contextlib.suppress(DatasetError):
        report = check_data([folder], near=False)
        # What is found can be written.
        json.dumps(report.to_dict(), ensure_ascii=False).encode()


def _open_stored(row: dict[str, Any]) -> None:
    for key in ("image", "mask"):
        if hasattr(row.get(key), "check"):
            with contextlib.suppress(DatasetError):
                row[key].check()


class TooLongError(BaseException):
    """More than `SECONDS` for one folder."""


def main(templates: str, seed: str, first: str, count: str) -> None:
    """Reads `count` damaged folders from number `first` on."""
    import logging

    # A warning for each bad row is not what is tested here.
    logging.disable(logging.WARNING)
    made = make_templates(Path(templates))
    _limit_memory()

    def too_long(*_):
        raise TooLongError

    signal.signal(signal.SIGALRM, too_long)
    for number in range(int(first), int(first) + int(count)):
        rng = random.Random(f"{seed}-{number}")
        print(json.dumps({"begins": number}), flush=True)
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "lab"
            shutil.copytree(rng.choice(made), folder)
            done = damage(folder, rng)
            signal.alarm(SECONDS)
            try:
                read_all(folder, rng)
            except (Exception, TooLongError):
                print(json.dumps({"failed": number, "damage": done, "error": traceback.format_exc()}), flush=True)
            finally:
                signal.alarm(0)
                for path in folder.rglob("*"):
                    if path.exists():
                        path.chmod(0o700)
    print(json.dumps({"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10}), flush=True)


def _limit_memory() -> None:
    """What is in use, and `MEMORY` beside it; where the system does not say what that is, nothing."""
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text().splitlines()
        used = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmData:"))
        resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY, used + MEMORY))


if __name__ == "__main__":
    main(*sys.argv[1:])
