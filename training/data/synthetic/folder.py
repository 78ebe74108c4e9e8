"""Writing synthetic smears as a data folder of our own format (see readers.py)."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from unihema.errors import DatasetError, InputError
from unihema.files import contents, exclusive, read_json_object, write_atomically, write_json, write_text
from unihema.training.data.synthetic.cells import CLASSES
from unihema.training.data.synthetic.fields import SyntheticSmears


SETTINGS_FILE = "synthetic.json"
# A change of what the generator draws for a seed is a new number: old folders are then not continued.
GENERATOR_VERSION = 2
# First index of each split: however many training smears are written, none is ever one of val.
FIRST_INDEX = {"train": 0, "val": 10_000_000}
# The folders of a split.
PARTS = ("images", "masks", *(f"crops/{label}" for label in CLASSES))


def write_synthetic(
    folder: str | Path,
    n_train: int,
    n_val: int,
    seed: int = 0,
    *,
    crops_per_field: int = 3,
    progress: bool = True,
    **appearance: Any,
) -> Path:
    """Writes fields with boxes, masks, attributes, questions and sentences, and single-cell crops.

    A run that was cut off goes on where it stopped; a complete folder is left as it is.

    Args:
        folder (`str` or `Path`): New folder, or one that this function wrote with the same settings.
        n_train (`int`): Fields of `train/`.
        n_val (`int`): Fields of `val/`.
        seed (`int`): Of everything.
        crops_per_field (`int`): Single-cell crops for each field, of all classes in turn.
        progress (`bool`): Show a bar.
        appearance: Settings of [`SyntheticSmears`], such as `width` or `white_cells`.

    Returns:
        `Path`: The folder.

    Raises:
        DatasetError: The folder holds something else; nothing is written.
        OutputError: Another run is writing there, or it cannot be written.
        ValueError: Negative numbers, or a field too small.
    """
    if n_train < 0 or n_val < 0 or crops_per_field < 0 or n_train + n_val == 0:
        raise InputError(f"Numbers of smears must be 0 or more and not all 0: train {n_train}, val {n_val}.")
    folder = Path(folder)
    smears = SyntheticSmears(seed=seed, **appearance)
    settings = {
        "generator": GENERATOR_VERSION,
        "seed": seed,
        "train": n_train,
        "val": n_val,
        "crops_per_field": crops_per_field,
        "appearance": json.loads(json.dumps(appearance)),
    }
    known = folder / SETTINGS_FILE
    if folder.exists() and not known.is_file() and (not folder.is_dir() or contents(folder)):
        raise DatasetError(f"{folder}: is there already and holds something else. Choose a new folder.")
    counts = {"train": n_train, "val": n_val}
    bar = tqdm(total=n_train + n_val, desc="synthetic smears", unit="field", disable=not progress)
    with exclusive(folder, [f"{split}/{part}" for split in counts for part in ("", *PARTS)]), bar:
        _claim(known, settings)
        for split, count in counts.items():
            done = folder / split / "annotations.json"
            if done.is_file() or not count:
                bar.update(count)
                continue
            _write_split(folder / split, split, smears, count, crops_per_field, bar.update)
    return folder


def _claim(known: Path, settings: dict[str, Any]) -> None:
    """Makes sure that the folder was begun with the same settings, or begins it."""
    if not known.is_file():
        write_json(known, settings)
        return
    found = read_json_object(known, DatasetError, "Choose another folder or delete it.")
    if found != settings:
        raise DatasetError(
            f"{known.parent}: holds synthetic smears of other settings ({found}). Choose another folder or delete it."
        )


def _write_split(
    folder: Path,
    split: str,
    smears: SyntheticSmears,
    count: int,
    crops_per_field: int,
    report: Callable[[int], Any],
) -> None:
    for part in PARTS:
        (folder / part).mkdir(parents=True, exist_ok=True)
    images, annotations, questions, cloze = [], [], [], []
    first = FIRST_INDEX[split]
    for number in range(count):
        sample = smears.generate(first + number)
        name = f"images/{number:05d}.png"
        _write_png(folder / name, sample.image)
        _write_png(folder / "masks" / f"{number:05d}.png", sample.semantic_mask().astype(np.uint8) * 255)
        height, width = sample.instance_map.shape
        images.append({"id": number, "file_name": name, "width": width, "height": height})
        areas = np.bincount(sample.instance_map.ravel(), minlength=len(sample.labels) + 1)[1:].tolist()
        for box, label, attributes, area in zip(sample.boxes.tolist(), sample.labels, sample.attributes, areas):
            left, top, right, bottom = box
            annotation = {
                "id": len(annotations),
                "image_id": number,
                "category_id": CLASSES.index(label),
                "bbox": [left, top, right - left, bottom - top],
                "area": area,
                "iscrowd": 0,
            }
            annotations.append(annotation | ({"attributes": attributes} if attributes else {}))
        questions += [{"image": name, **pair} for pair in sample.questions]
        cloze += [{"image": name, **sentence} for sentence in sample.cloze]
        for crop_number in range(number * crops_per_field, (number + 1) * crops_per_field):
            label = CLASSES[crop_number % len(CLASSES)]
            cell = smears.single_cell(first + crop_number, label)
            name_of_crop = f"crops/{label}/{crop_number:05d}.png"
            _write_png(folder / name_of_crop, cell.image)
            questions += [{"image": name_of_crop, **pair} for pair in cell.questions]
            cloze += [{"image": name_of_crop, **sentence} for sentence in cell.cloze]
        report(1)
    categories = [{"id": index, "name": name} for index, name in enumerate(CLASSES)]
    write_text(folder / "qa.jsonl", "".join(json.dumps(line) + "\n" for line in questions))
    write_text(folder / "cloze.jsonl", "".join(json.dumps(line) + "\n" for line in cloze))
    # Last: its presence says that the split is complete.
    coco = {"images": images, "annotations": annotations, "categories": categories}
    write_text(folder / "annotations.json", json.dumps(coco))


def _write_png(path: Path, pixels: np.ndarray) -> None:
    if path.is_file():
        return
    write_atomically(path, lambda file: Image.fromarray(pixels).save(file, format="PNG", compress_level=1))
