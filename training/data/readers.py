"""Data folders to schema rows (see rows.py): layouts of our own, those in which others publish data sets, and shards."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unihema.errors import DatasetError
from unihema.training.data.layouts.coco import read_coco
from unihema.training.data.layouts.files import (
    ImageFinder,
    ImageFolder,
    checked_box,
    image_files,
    is_hidden,
    read_json,
    read_json_lines,
    read_table,
    recorded_size,
    require,
)
from unihema.training.data.layouts.folders import class_of, read_class_folders
from unihema.training.data.layouts.masks import is_mask, read_mask_pairs
from unihema.training.data.layouts.tables import (
    WBCATT_ATTRIBUTES,
    attribute_tables,
    read_attribute_tables,
    rows_of_cell,
    with_annotated_classes,
)
from unihema.training.data.layouts.voc import is_voc, read_voc
from unihema.training.data.layouts.yolo import labels_of, read_yolo, yolo_names
from unihema.training.data.rows import TASKS, BadRows, OnInvalid, Row, group_ids
from unihema.training.data.shards import INDEX_FILE, read_stored
from unihema.training.data.splits import split_in_name, split_in_path


# Layouts in which others publish data sets.
FOREIGN_LAYOUTS = ("coco", "yolo", "voc", "attribute_table", "mask_pairs", "class_folders")

LAYOUTS = f"""Accepted layouts, any part of which may be left out:
  <split>/annotations.json (COCO, file_name relative to <split>/), <split>/images/, <split>/masks/<same stem>.png,
      <split>/crops/<label>/*.png, <split>/qa.jsonl {{image, question, answer}},
      <split>/cloze.jsonl {{image, masked, completed}}
  <split>.json (COCO) with images/; images/<split>/ or <split>/metadata.jsonl {{file_name, label | mask_file_name | objects}};
      attributes_<split>.csv {{file_name, label, attributes}}; qa_<split>.jsonl {{image, question, answer}};
      mlm_<split>.jsonl {{image, masked_t5, sentence}}
  {", ".join(FOREIGN_LAYOUTS)}, with the split in a folder's name
  <split>/{INDEX_FILE}, written by `unihema data shard`"""

SPLIT_ALIASES = {"val": ("val", "validation", "valid"), "validation": ("validation", "val", "valid")}
# What a prepared data folder says about itself.
DESCRIPTION_FILE = "dataset.json"
OWN_PARTS = ("annotations.json", "masks", "crops", "qa.jsonl", "cloze.jsonl")


def load_folder(
    path: str | Path,
    split: str = "train",
    *,
    tasks: Sequence[str] | None = None,
    prompt: str = "white blood cell",
    rename: Mapping[str, str] | None = None,
    attributes_as_detection: bool | Sequence[str] = False,
    on_invalid: OnInvalid = "error",
) -> dict[str, list[Row]]:
    """Reads one split of a data folder; the layout is recognised.

    Args:
        path (`str` or `Path`): The folder.
        split (`str`): `"train"`, `"val"` or another name that the folder uses.
        tasks (`Sequence[str]`, *optional*): Read these only; all that the folder has when not given.
        prompt (`str`): What the masks show, where the folder does not say so itself (`dataset.json`).
        rename (`Mapping[str, str]`, *optional*): New names of detection classes and single-cell labels.
        attributes_as_detection (`bool` or `Sequence[str]`): Make detection rows of labelled single-cell images: one box
            over the whole image, its class the label, its morphology the attribute columns (WBCAtt's, or those named).
        on_invalid (`"error"` or `"skip"`): Whether bad rows (a broken line, a missing image, a box without area or wholly
            outside) stop the reading, all named at once, or are left out with a warning. Boxes partly outside are clipped.

    Returns:
        `dict[str, list[Row]]`: Rows of each task that the folder has; of shards (`unihema data shard`) [`StoredRows`],
            which are read when they are asked for.

    Raises:
        DatasetError: Missing folder or split, or a file that cannot be read at all.
        BadRowsError: Bad rows, with `on_invalid="error"`.
    """
    bad = BadRows()
    rows = read_folder(
        path, split, bad, tasks=tasks, prompt=prompt, rename=rename, attributes_as_detection=attributes_as_detection
    )
    bad.settle(on_invalid)
    if not rows:
        raise DatasetError(f"{path}: every row of split '{split}' is bad: {bad.messages[0]}")
    return rows


def read_folder(
    path: str | Path,
    split: str,
    bad: BadRows,
    *,
    tasks: Sequence[str] | None = None,
    prompt: str = "white blood cell",
    rename: Mapping[str, str] | None = None,
    attributes_as_detection: bool | Sequence[str] = False,
) -> dict[str, list[Row]]:
    """[`load_folder`], with bad rows given to `bad` instead of stopping or warning.

    Raises:
        DatasetError: Missing folder or split, or a file that cannot be read at all.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise DatasetError(f"{folder}: no such folder.\n{LAYOUTS}")
    unknown = [task for task in tasks or () if task not in TASKS]
    if unknown:
        raise DatasetError(f"Unknown task {unknown[0]!r}; tasks are {', '.join(TASKS)}.")
    wanted = tuple(task for task in TASKS if task in (tasks or TASKS))
    columns = WBCATT_ATTRIBUTES if attributes_as_detection is True else tuple(attributes_as_detection or ())
    dataset, rename = folder.resolve().name, dict(rename or {})
    prompt = str(read_description(folder).get("masks_show") or prompt)
    options = {"wanted": wanted, "dataset": dataset, "prompt": prompt, "rename": rename, "bad": bad}
    already_bad = len(bad.messages)
    for name in SPLIT_ALIASES.get(split, (split,)):
        if (folder / name / INDEX_FILE).is_file():
            found = read_stored(folder / name, wanted, rename)
        elif _has_own(folder, name):
            found = _read_own(folder / name, attributes_as_detection=attributes_as_detection, **options)
        else:
            found = _read_by_split(folder, name, columns=columns, **options)
        found = {task: found[task] for task in wanted if found.get(task)}
        if found or len(bad.messages) > already_bad:
            return found
    if not splits_of(folder) and (layout := recognise_foreign(folder)):
        rows = read_foreign(folder, dataset, bad, layout=layout, rename=rename, prompt=prompt, attributes=columns)
        # A set without splits is one to train on.
        names = SPLIT_ALIASES.get(split, (split,))
        rows = [row for row in rows if (row.get("split") or "train") in names]
        found = {task: kept for task in wanted if (kept := [row for row in rows if row["task"] == task])}
        if found or len(bad.messages) > already_bad:
            return found
    inside = ", ".join(sorted(entry.name for entry in folder.iterdir())[:12]) or "nothing"
    what = f" for {', '.join(wanted)}" if tasks else ""
    if split == "val":
        inside += ". `unihema data prepare` makes such a split, and --set data.val_split='\"\"' trains without one"
    raise DatasetError(f"{folder}: no data{what} in split '{split}'; the folder holds {inside}.\n{LAYOUTS}")


def splits_of(folder: Path) -> list[str]:
    """The splits among train, val and test that a folder of one of our layouts has."""
    found = []
    for split in ("train", "val", "test"):
        for name in SPLIT_ALIASES.get(split, (split,)):
            if _has_own(folder, name) or any(path.is_file() for path in _split_files(folder, name)):
                found.append(split)
                break
    return found


def recognise_foreign(folder: Path) -> str | None:
    """The layout of a folder: a key of `FOREIGN_LAYOUTS`, or None.

    The layout that says most about its images comes first: class folders are what is left.
    """
    images = ImageFinder(folder)
    if _coco_files(folder):
        return "coco"
    if any(labels_of(path, folder) for path in images.files[:200]) and _has_names(folder):
        return "yolo"
    annotations = [path for path in folder.rglob("*.xml") if not is_hidden(path.relative_to(folder))]
    if any(is_voc(path) for path in annotations[:20]):
        return "voc"
    if not images.files:
        return None
    if attribute_tables(folder):
        return "attribute_table"
    if any(is_mask(path, folder) for path in images.files):
        return "mask_pairs"
    if any(class_of(path, folder) for path in images.files):
        return "class_folders"
    return None


def read_foreign(
    folder: Path,
    dataset: str,
    bad: BadRows,
    *,
    layout: str | None = None,
    rename: Mapping[str, str] | None = None,
    prompt: str = "white blood cell",
    attributes: Sequence[str] = WBCATT_ATTRIBUTES,
) -> list[Row]:
    """Rows of a folder in a layout that is not ours.

    Args:
        folder (`Path`): The folder.
        dataset (`str`): Name of the data set.
        bad (`BadRows`): Gets the bad rows.
        layout (`str`, *optional*): A key of `FOREIGN_LAYOUTS`; recognised when not given.
        rename (`Mapping[str, str]`, *optional*): Class names to replace.
        prompt (`str`): What the masks show.
        attributes (`Sequence[str]`): Columns of attribute tables that are attributes.

    Returns:
        `list[Row]`: With `split` (`train`, `val`, `test`), or None where nothing names one.

    Raises:
        DatasetError: No such layout, or none recognised.
    """
    layout = layout or recognise_foreign(folder)
    if layout not in FOREIGN_LAYOUTS:
        what = f"unknown layout '{layout}'" if layout else "no known layout"
        raise DatasetError(f"{folder}: {what}; known are {', '.join(FOREIGN_LAYOUTS)}. Name the one it has.")
    names = dict(rename or {})
    if layout == "coco":
        rows = _read_coco_files(folder, dataset, names, bad)
    elif layout == "attribute_table":
        rows = read_attribute_tables(folder, dataset, names, bad, attributes)
    elif layout == "mask_pairs":
        rows = read_mask_pairs(folder, dataset, prompt, bad)
    else:
        read = {"yolo": read_yolo, "voc": read_voc, "class_folders": read_class_folders}[layout]
        rows = read(folder, dataset, names, bad)
    lists = _voc_lists(folder) if layout == "voc" else {}
    for row in rows:
        stem = Path(row["file_name"]).stem
        row["split"] = row.get("split") or split_in_path(row["file_name"]) or lists.get(stem)
    return rows


def read_description(folder: Path) -> dict[str, Any]:
    """The description of a data folder; empty without one.

    Raises:
        DatasetError: It is no JSON object.
    """
    path = folder / DESCRIPTION_FILE
    if not path.is_file():
        return {}
    content = read_json(path)
    if not isinstance(content, dict):
        raise DatasetError(f"{path}: a JSON object {{...}} is needed, got {type(content).__name__}.")
    return content


def folder_licence(folder: Path) -> str:
    """The licence a data folder declares, in `dataset.json` or the front matter of `README.md` (a Hub dataset card).

    Returns:
        `str`: Empty when it declares none.

    Raises:
        DatasetError: `dataset.json` is no JSON object.
    """
    declared = read_description(folder).get("licence")
    if declared:
        return str(declared)
    card = folder / "README.md"
    if not card.is_file():
        return ""
    front = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.S)
    found = re.search(r"^license:\s*([\w.+-]+)\s*$", front.group(1), re.M) if front else None
    return found.group(1) if found else ""


def _has_own(folder: Path, split: str) -> bool:
    # An image folder of `datasets` may keep its masks in a folder of that name, too.
    image_folder = (folder / split / "metadata.jsonl").is_file()
    return not image_folder and any((folder / split / part).exists() for part in OWN_PARTS)


def _split_files(folder: Path, split: str) -> tuple[Path, ...]:
    metadata = folder / split / "metadata.jsonl"
    if not metadata.is_file():
        metadata = folder / "images" / split / "metadata.jsonl"
    tables = (folder / f"attributes_{split}.csv", folder / f"qa_{split}.jsonl", folder / f"mlm_{split}.jsonl")
    return folder / f"{split}.json", metadata, *tables


def _read_own(
    folder: Path, wanted, dataset, prompt, rename, bad: BadRows, attributes_as_detection: bool | Sequence[str]
) -> dict[str, list[Row]]:
    images = ImageFolder(folder)
    rows: dict[str, list[Row]] = {}
    if "detection" in wanted and (folder / "annotations.json").is_file():
        rows["detection"] = read_coco(folder / "annotations.json", images.path, dataset, rename, bad)
    if "segmentation" in wanted and (folder / "masks").is_dir():
        stems = {file.stem: file for file in image_files(folder / "images")}
        rows["segmentation"] = []
        for mask in image_files(folder / "masks"):
            with bad.collecting():
                if mask.stem not in stems:
                    raise DatasetError(f"{mask}: no image of this name in {folder / 'images'}.")
                row = _row(stems[mask.stem], f"images/{stems[mask.stem].name}", dataset, "segmentation")
                rows["segmentation"].append(row | {"mask": str(mask), "prompt": prompt})
    if "single_cell" in wanted and (folder / "crops").is_dir():
        rows["single_cell"] = [
            _row(file, f"crops/{label.name}/{file.name}", dataset, "single_cell")
            | {"label": rename.get(label.name, label.name)}
            for label in sorted(entry for entry in (folder / "crops").iterdir() if entry.is_dir())
            for file in image_files(label)
        ]
    if "question_answering" in wanted and (folder / "qa.jsonl").is_file():
        rows["question_answering"] = _read_questions(folder / "qa.jsonl", images, dataset, bad)
    if "cloze" in wanted and (folder / "cloze.jsonl").is_file():
        rows["cloze"] = _read_cloze(folder / "cloze.jsonl", images, dataset, bad)
    if "detection" in wanted and attributes_as_detection and (folder / "attributes.csv").is_file():
        cells = _read_attributes(folder / "attributes.csv", images, dataset, rename, bad, attributes_as_detection)
        rows["detection"] = [*rows.get("detection", ()), *cells]
    _add_groups(folder / "origins.csv", rows, bad)
    return rows


def _read_attributes(
    path: Path, images: ImageFolder, dataset: str, rename, bad: BadRows, wanted: bool | Sequence[str]
) -> list[Row]:
    """Detection rows of crops, the folder of each its class: all columns are attributes, or those wanted."""
    rows: list[Row] = []
    for source, record in read_table(path, bad):
        with bad.collecting():
            name = require(record, "file_name", source)
            row = {"image": images.path(name, source), "file_name": name, "dataset": dataset}
            columns = [key for key in record if key != "file_name" and (wanted is True or key in wanted)]
            label = Path(name).parent.name
            rows += rows_of_cell(row, rename.get(label, label), record, columns)[1:]
    return with_annotated_classes(rows)


def _add_groups(path: Path, rows: Mapping[str, list[Row]], bad: BadRows) -> None:
    """Adds patient, slide and source image, which folders of the own layout keep in a table beside their images."""
    if not path.is_file():
        return
    groups = {}
    for source, record in read_table(path, bad):
        with bad.collecting():
            groups[require(record, "file_name", source)] = group_ids(record)
    for row in (row for found in rows.values() for row in found):
        row.update(groups.get(row["file_name"], {}))


def _read_by_split(
    folder: Path, split: str, wanted, dataset, prompt, rename, bad: BadRows, columns: Sequence[str]
) -> dict[str, list[Row]]:
    images = ImageFolder(folder / "images")
    rows: dict[str, list[Row]] = {}
    coco, metadata, table, questions, cloze = _split_files(folder, split)
    if "detection" in wanted and coco.is_file():
        rows["detection"] = read_coco(coco, images.path, dataset, rename, bad)
    records = None
    if metadata.is_file():
        records = read_json_lines(metadata, bad)
    elif table.is_file():
        records = read_table(table, bad)
    if records is not None:
        # Boxes that the COCO file has already are not read, nor reported, a second time.
        tasks = [task for task in wanted if task not in rows]
        beside = metadata.parent if metadata.is_file() else folder / "images" / split
        found = _read_records(records, ImageFolder(beside), tasks, dataset, prompt, rename, bad, columns)
        rows |= {task: found[task] for task in tasks if task in found}
    if "question_answering" in wanted and questions.is_file():
        rows["question_answering"] = _read_questions(questions, images, dataset, bad)
    if "cloze" in wanted and cloze.is_file():
        rows["cloze"] = _read_cloze(cloze, images, dataset, bad)
    return rows


def _read_records(
    records, images: ImageFolder, tasks: Sequence[str], dataset, prompt, rename, bad: BadRows, columns: Sequence[str]
) -> dict[str, list[Row]]:
    """Rows of an image-folder metadata file or table: each line is a row of one task or of several."""
    rows: dict[str, list[Row]] = {"detection": [], "segmentation": [], "single_cell": []}
    for source, record in records:
        with bad.collecting():
            name = require(record, "file_name", source)
            image, shown = images.path(name, source), f"{images.root.name}/{name}"
            row = {"image": image, "file_name": shown, "dataset": dataset, **group_ids(record)}
            if record.get("mask_file_name"):
                mask = images.path(record["mask_file_name"], source)
                rows["segmentation"].append(row | {"task": "segmentation", "mask": mask, "prompt": prompt})
            if record.get("objects") and "detection" in tasks:
                size = recorded_size(record, image)
                objects = _read_objects(record["objects"], size, source, rename, bad)
                rows["detection"].append(row | {"task": "detection", "size": size, "objects": objects})
            if isinstance(record.get("label"), str):
                label = rename.get(record["label"], record["label"])
                for cell in rows_of_cell(row, label, record, columns):
                    rows[cell["task"]].append(cell)
    with_annotated_classes(rows["detection"])
    return rows


def _read_objects(objects: Any, size: tuple[int, int], source: str, rename, bad: BadRows) -> dict[str, list]:
    if not isinstance(objects, Mapping):
        raise DatasetError(f"{source}: 'objects' must hold 'bbox' and 'category_name', got {type(objects).__name__}.")
    names = objects.get("category_name") or objects.get("category") or []
    boxes = require(objects, "bbox", source)
    if any(not isinstance(name, str) for name in names):
        raise DatasetError(f"{source}: objects need class names in 'category_name' (or a <split>.json in COCO format).")
    if len(names) != len(boxes):
        raise DatasetError(f"{source}: {len(boxes)} boxes but {len(names)} class names.")
    kept: dict[str, list] = {"bbox": [], "category": [], "morphology": []}
    for index, (box, name) in enumerate(zip(boxes, names)):
        with bad.collecting():
            kept["bbox"].append(checked_box(box, *size, f"{source}: objects.bbox[{index}]"))
            kept["category"].append(rename.get(name, name))
            kept["morphology"].append({})
    return kept


def _read_questions(path: Path, images: ImageFolder, dataset: str, bad: BadRows) -> list[Row]:
    rows = []
    for source, record in read_json_lines(path, bad):
        with bad.collecting():
            row = _row(images.path(record.get("image"), source), record["image"], dataset, "question_answering")
            row["question"] = str(require(record, "question", source, "Question"))
            row["answer"] = str(require(record, "answer", source, "Answer"))
            rows.append(row | group_ids(record))
    return rows


def _read_cloze(path: Path, images: ImageFolder, dataset: str, bad: BadRows) -> list[Row]:
    rows = []
    for source, record in read_json_lines(path, bad):
        with bad.collecting():
            row = _row(images.path(record.get("image"), source), record["image"], dataset, "cloze")
            masked = "masked_t5" if record.get("masked_t5") is not None else "masked"
            row["masked"] = str(require(record, masked, source))
            row["completed"] = str(require(record, "completed", source, "sentence"))
            if "<extra_id_0>" not in row["masked"]:
                raise DatasetError(f"{source}: field '{masked}' has no blank; mark the first one <extra_id_0>.")
            rows.append(row | group_ids(record))
    return rows


def _row(image: str | Path, file_name: str, dataset: str, task: str) -> Row:
    return {"image": str(image), "file_name": file_name, "dataset": dataset, "task": task}


def _read_coco_files(folder: Path, dataset: str, rename: Mapping[str, str], bad: BadRows) -> list[Row]:
    images = ImageFinder(folder)
    rows: list[Row] = []
    for path in _coco_files(folder):
        where = path.relative_to(folder).as_posix()
        split = split_in_path(where) or split_in_name(where)
        with bad.collecting():
            found = read_coco(
                path, lambda name, source, path=path: images.find([name], path, source), dataset, rename, bad
            )
            rows += [row | {"file_name": images.relative(row["image"]), "split": split} for row in found]
    return rows


def _coco_files(folder: Path) -> list[Path]:
    """COCO files; a broken one counts, so that reading it names what is broken."""
    found = []
    for path in sorted(folder.rglob("*.json")):
        if is_hidden(path.relative_to(folder)):
            continue
        try:
            content = read_json(path)
            matches = isinstance(content, dict) and {"images", "annotations", "categories"} <= set(content)
        except DatasetError:
            matches = b'"annotations"' in path.read_bytes()
        if matches:
            found.append(path)
    return found


def _has_names(folder: Path) -> bool:
    try:
        return bool(yolo_names(folder))
    except DatasetError:
        return False


def _voc_lists(folder: Path) -> dict[str, str]:
    """Stem -> split, from `ImageSets/Main/<split>.txt`; stems that two lists have are drawn anew."""
    found: dict[str, set[str]] = {}
    for path in sorted(folder.rglob("ImageSets/Main/*.txt")):
        split = split_in_name(path.name) if path.stem.lower() != "trainval" else None
        if split is None:
            continue
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.strip():
                found.setdefault(line.split()[0], set()).add(split)
    return {stem: splits.pop() for stem, splits in found.items() if len(splits) == 1}
