"""Data folders to schema rows (see rows.py): layouts of our own, those in which others publish data sets, and shards."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from unihema.errors import DatasetError
from unihema.files import real_path
from unihema.modeling_unihema.tasks import LANGUAGE_TASKS, TASKS
from unihema.training.data.layouts.coco import read_coco
from unihema.training.data.layouts.files import (
    ClippedBoxes,
    DataFiles,
    ImageFinder,
    ImageFolder,
    checked_label,
    checked_text,
    read_bytes,
    read_json,
    read_json_lines,
    read_table,
    read_text,
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
from unihema.training.data.layouts.yolo import ClassLists, labels_of, read_yolo
from unihema.training.data.rows import PROVENANCE_KEYS, BadRows, OnInvalid, Row, group_ids, image_key, shown
from unihema.training.data.shards import INDEX_FILE, LazyRows, read_stored
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
    if not is_folder(folder):
        raise DatasetError(f"{folder}: no such folder.\n{LAYOUTS}")
    unknown = [task for task in tasks or () if task not in TASKS]
    if unknown:
        raise DatasetError(f"Unknown task {unknown[0]!r}; tasks are {', '.join(TASKS)}.")
    wanted = tuple(task for task in TASKS if task in (tasks or TASKS))
    columns = WBCATT_ATTRIBUTES if attributes_as_detection is True else tuple(attributes_as_detection or ())
    dataset, rename = real_path(folder).name, dict(rename or {})
    prompt = checked_text(
        read_description(folder).get("masks_show") or prompt, f"{folder / DESCRIPTION_FILE}: masks_show"
    )
    options = {"wanted": wanted, "dataset": dataset, "prompt": prompt, "rename": rename, "bad": bad}
    already_bad = len(bad.messages)
    for name in SPLIT_ALIASES.get(split, (split,)):
        if (folder / name / INDEX_FILE).is_file():
            found = read_stored(folder / name, wanted, rename)
        elif _has_own(folder, name):
            found = _read_own(folder / name, attributes_as_detection=attributes_as_detection, **options)
        else:
            found = _read_by_split(folder, name, columns=columns, **options)
        found = {task: _each_image_once(found[task], bad) for task in wanted if found.get(task)}
        if found or len(bad.messages) > already_bad:
            return found
    if not splits_of(folder) and recognise_foreign(folder):
        rows = read_foreign(folder, dataset, bad, rename=rename, prompt=prompt, attributes=columns)
        # A set without splits is one to train on.
        names = SPLIT_ALIASES.get(split, (split,))
        rows = [row for row in rows if (row.get("split") or "train") in names]
        found = {task: kept for task in wanted if (kept := [row for row in rows if row["task"] == task])}
        if found or len(bad.messages) > already_bad:
            return found
    inside = ", ".join(map(ascii_name, sorted(entry.name for entry in folder.iterdir())[:12])) or "nothing"
    what = f" for {', '.join(wanted)}" if tasks else ""
    sheets = [entry.name for entry in folder.iterdir() if entry.suffix.lower() in (".xls", ".xlsx", ".ods")]
    if sheets:
        inside += f". Tables are read as CSV: save {ascii_name(min(sheets))} as CSV"
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
    return next(iter(_layouts_of(folder)), None)


def _layouts_of(folder: Path) -> Iterator[str]:
    """All layouts that a folder may be in, the one that says most first."""
    images = ImageFinder(folder)
    if _coco_files(folder):
        yield "coco"
    if any(labels_of(path, folder) for path in images.files[:200]) and _has_names(folder):
        yield "yolo"
    if any(is_voc(path) for path in images.listing.named(".xml")[:20]):
        yield "voc"
    if not images.files:
        return
    if attribute_tables(folder):
        yield "attribute_table"
    if any(is_mask(path, folder) for path in images.files):
        yield "mask_pairs"
    if any(class_of(path, folder) for path in images.files):
        yield "class_folders"


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
    if layout is None:
        # Any image in a folder could be one of a class folder.
        possible = [name for name in _layouts_of(folder) if name != "class_folders"] or [recognise_foreign(folder)]
        layout = possible[0]
        if len(possible) > 1:
            bad.note(
                f"{folder}: read as {layout}; it could be {', '.join(possible[1:])} as well, which is not read. "
                "`unihema data prepare --layout` reads another."
            )
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
    _share_groups(rows)
    return _each_image_once(rows, bad)


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
    text = read_bytes(card, 16 << 20).decode("utf-8", errors="replace")
    front = re.match(r"---\n(.*?)\n---", text, re.S)
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
        rows["segmentation"] = _read_own_masks(folder, dataset, prompt, bad)
    if "single_cell" in wanted and (folder / "crops").is_dir():
        rows["single_cell"] = _read_crops(folder, dataset, rename, bad)
    if "question_answering" in wanted and (folder / "qa.jsonl").is_file():
        rows["question_answering"] = _read_questions(folder / "qa.jsonl", images, dataset, bad)
    if "cloze" in wanted and (folder / "cloze.jsonl").is_file():
        rows["cloze"] = _read_cloze(folder / "cloze.jsonl", images, dataset, bad)
    if "detection" in wanted and attributes_as_detection and (folder / "attributes.csv").is_file():
        cells = _read_attributes(folder / "attributes.csv", images, dataset, rename, bad, attributes_as_detection)
        rows["detection"] = [*rows.get("detection", ()), *cells]
    _add_groups(folder / "origins.csv", rows, bad)
    # Crops have images of their own.
    known = set(rows) <= {"detection", "single_cell"} or "detection" in rows
    boxes = () if known else _rows_of_boxes(folder / "annotations.json", images, dataset, bad)
    _share_groups([*boxes, *(row for found in rows.values() for row in found)])
    if set(wanted) == set(TASKS) and (folder / "images").is_dir():
        every = [row for found in rows.values() for row in found]
        ImageFinder(folder / "images").report(bad, every, "names it")
    return rows


def _read_own_masks(folder: Path, dataset: str, prompt: str, bad: BadRows) -> list[Row]:
    """Rows of `masks/`: the image of each is that of the same name, whatever its type, in `images/`."""
    images, masks = ImageFinder(folder / "images"), ImageFinder(folder / "masks")
    by_name: dict[str, list[Path]] = {}
    if (folder / "images").is_dir():
        for path in images.files:
            by_name.setdefault(_without_suffix(images.relative(path)), []).append(path)
    rows = []
    for mask in masks.files:
        with bad.collecting():
            found = by_name.get(_without_suffix(masks.relative(mask)), [])
            if not found:
                raise DatasetError(f"{mask}: no image of this name in {folder / 'images'}.")
            if len(found) > 1:
                raise DatasetError(f"{mask}: several images of this name: {', '.join(path.name for path in found)}.")
            row = _row(found[0], f"images/{images.relative(found[0])}", dataset, "segmentation")
            rows.append(row | {"mask": str(mask), "prompt": prompt})
    masks.report(bad)
    return rows


def _without_suffix(name: str) -> str:
    return PurePosixPath(name).with_suffix("").as_posix()


def _read_crops(folder: Path, dataset: str, rename: Mapping[str, str], bad: BadRows) -> list[Row]:
    """Rows of `crops/<label>/`; a class without images is noted."""
    crops = ImageFinder(folder / "crops")
    rows = []
    for path in crops.files:
        with bad.collecting():
            name = crops.relative(path)
            if name.count("/") != 1:
                raise DatasetError(f"{path}: lies in no class folder of {folder / 'crops'}. Move it into one.")
            label = checked_label(name.split("/")[0], str(path))
            rows.append(_row(path, f"crops/{name}", dataset, "single_cell") | {"label": rename.get(label, label)})
    crops.report(bad)
    full = {Path(row["file_name"]).parent.name for row in rows}
    places = [place for place in (folder / "crops").iterdir() if place.is_dir() and not place.name.startswith(".")]
    empty = sorted(ascii_name(place.name) for place in places if place.name not in full)
    if empty:
        bad.note(f"{folder / 'crops'}: no images in the folders of {', '.join(empty)}.")
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
            label = checked_label(Path(name).parent.name, source)
            rows += rows_of_cell(row, rename.get(label, label), record, columns)[1:]
    return with_annotated_classes(rows)


def _add_groups(path: Path, rows: Mapping[str, list[Row]], bad: BadRows) -> None:
    """Adds patient, slide and source image, which folders of the own layout keep in a table beside their images."""
    if not path.is_file():
        return
    images = ImageFinder(path.parent)
    groups: dict[str, dict[str, str]] = {}
    for source, record in read_table(path, bad):
        with bad.collecting():
            name = images.relative(images.find([require(record, "file_name", source)], path, source))
            found = group_ids(record, source)
            if not found:
                raise DatasetError(
                    f"{source}: no patient, slide, source_image or origin; the columns are {shown(list(record))}."
                )
            if groups.setdefault(name, found) != found:
                raise DatasetError(f"{source}: {name} has another origin in a line before: {groups[name]}.")
    for row in (row for found in rows.values() for row in found):
        row.update(groups.get(Path(row["file_name"]).as_posix(), {}))
    images.report(bad)


def _rows_of_boxes(path: Path, images: ImageFolder, dataset: str, bad: BadRows) -> list[Row]:
    """Boxes that nobody asked for: what they say of patients and slides holds for masks and questions as well."""
    if not path.is_file():
        return []
    try:
        return read_coco(path, images.path, dataset, {}, BadRows())
    except DatasetError as error:
        bad.note(f"{path}: not read, so patients and slides of its images are not known. {error}")
        return []


def _share_groups(rows: Sequence[Row]) -> None:
    """Gives all rows of an image, of every task, the patient, slide and source image that any of them states."""
    known: dict[Any, dict[str, Any]] = {}
    for row in rows:
        stated = {key: row[key] for key in PROVENANCE_KEYS if row.get(key)}
        known[image_key(row)] = stated | known.get(image_key(row), {})
    for row in rows:
        row.update(known[image_key(row)] | {key: row[key] for key in PROVENANCE_KEYS if row.get(key)})


def _each_image_once(rows: Any, bad: BadRows) -> Any:
    """Rows in which no image of a split is there twice for the same task; questions and clozes may be many.

    Each of two rows with boxes of one image would teach the other's cells as background, so they become one. A second label
    is left out if it is the same, and a bad row if it is another; a second mask is a bad row. A box that stands twice in its
    image is one cell. Shards are as they were written.
    """
    if isinstance(rows, LazyRows):
        return rows
    kept: dict[Any, Row] = {}
    merged: list[str] = []
    repeated: list[str] = []
    contradicted: list[str] = []
    answers: dict[tuple[str, str], str] = {}
    for number, row in enumerate(rows):
        one = row["task"] not in LANGUAGE_TASKS
        repeated += [row["file_name"]] * _drop_repeated_boxes(row)
        if row["task"] == "question_answering":
            asked = (os.path.realpath(row["image"]), row["question"])
            if answers.setdefault(asked, row["answer"]) != row["answer"]:
                contradicted.append(f"{shown(row['question'])} of {row['file_name']}")
        key = (
            row["task"],
            os.path.realpath(row["image"]) if one else number,
            row.get("split"),
            row.get("from_attributes"),
        )
        first = kept.setdefault(key, row)
        if first is row:
            continue
        with bad.collecting():
            _merge(first, row)
            merged.append(row["file_name"])
    if merged:
        bad.note(
            f"{rows[0]['dataset']}: {len(merged)} more entries for images that have one, such as {merged[0]}. Those of one image "
            "are read as one."
        )
    if contradicted:
        bad.note(
            f"{rows[0]['dataset']}: {len(contradicted)} questions have more than one answer for the same image, such as "
            f"{contradicted[0]}. All are learned."
        )
    if repeated:
        bad.note(
            f"{rows[0]['dataset']}: {len(repeated)} boxes that stand in their image already, with the same class, such as one "
            f"in {repeated[0]}. Each is read once."
        )
    return list(kept.values())


def _drop_repeated_boxes(row: Row) -> int:
    """Takes boxes out of a detection row that are there before, alike in everything; says how many."""
    if row["task"] != "detection":
        return 0
    objects = row["objects"]
    names = [name for name, values in objects.items() if len(values) == len(objects["bbox"])]
    seen: set[str] = set()
    new = []
    for number in range(len(objects["bbox"])):
        cell = repr([objects[name][number] for name in names])
        if cell not in seen:
            new.append(number)
        seen.add(cell)
    dropped = len(objects["bbox"]) - len(new)
    for name in names if dropped else ():
        objects[name] = [objects[name][number] for number in new]
    return dropped


def _merge(first: Row, second: Row) -> None:
    """Adds to a row of an image what another row of it says.

    Raises:
        DatasetError: They contradict each other.
    """
    where = f"{second['image']}: listed twice"
    if second["task"] == "single_cell":
        if first["label"] != second["label"]:
            raise DatasetError(f"{where}, as {first['label']} and as {second['label']}. Take one entry out.")
    elif second["task"] == "segmentation":
        raise DatasetError(f"{where}, with the masks {first['mask']} and {second['mask']}. Make one mask of them.")
    elif not first.get("from_attributes"):
        if first.get("size") != second.get("size"):
            raise DatasetError(f"{where}, with the sizes {first.get('size')} and {second.get('size')}.")
        there = set(zip(map(tuple, first["objects"]["bbox"]), first["objects"]["category"]))
        boxes = zip(map(tuple, second["objects"]["bbox"]), second["objects"]["category"])
        new = [number for number, box in enumerate(boxes) if box not in there]
        if "segmentation" in first["objects"] or "segmentation" in second["objects"]:
            for objects in (first["objects"], second["objects"]):
                objects.setdefault("segmentation", [None] * len(objects["bbox"]))
        for name, values in second["objects"].items():
            first["objects"].setdefault(name, []).extend(values[number] for number in new)
        names = [*(first.get("annotated_classes") or ()), *(second.get("annotated_classes") or ())]
        first["annotated_classes"] = list(dict.fromkeys(names))


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
    boxes = ClippedBoxes(bad)
    idle = []
    for source, record in records:
        with bad.collecting():
            name = require(record, "file_name", source)
            image = images.path(name, source)
            row = {
                "image": image,
                "file_name": f"{images.root.name}/{name}",
                "dataset": dataset,
                **group_ids(record, source),
            }
            if record.get("mask_file_name") is not None:
                mask = images.path(record["mask_file_name"], source)
                rows["segmentation"].append(row | {"task": "segmentation", "mask": mask, "prompt": prompt})
            if record.get("objects") is not None and "detection" in tasks:
                size = recorded_size(record, image)
                objects = _read_objects(record["objects"], size, source, rename, boxes, bad)
                rows["detection"].append(row | {"task": "detection", "size": size, "objects": objects})
            if record.get("label") is not None:
                if not isinstance(record["label"], str):
                    raise DatasetError(f"{source}: label {shown(record['label'])} must be the class's name.")
                label = checked_label(record["label"], source)
                for cell in rows_of_cell(row, rename.get(label, label), record, columns):
                    rows[cell["task"]].append(cell)
            if all(record.get(key) is None for key in ("mask_file_name", "objects", "label")):
                idle.append(source)
    boxes.report()
    if idle:
        bad.note(
            f"{idle[0]}: {len(idle)} lines have no label, no mask_file_name and no objects: nothing is read of them."
        )
    with_annotated_classes(rows["detection"])
    return rows


def _read_objects(
    objects: Any, size: tuple[int, int], source: str, rename, boxes: ClippedBoxes, bad: BadRows
) -> dict[str, list]:
    if not isinstance(objects, Mapping):
        raise DatasetError(f"{source}: 'objects' must hold 'bbox' and 'category_name', got {type(objects).__name__}.")
    names = objects.get("category_name") or objects.get("category") or []
    given = require(objects, "bbox", source)
    if not isinstance(names, list) or any(not isinstance(name, str) for name in names):
        raise DatasetError(f"{source}: objects need class names in 'category_name' (or a <split>.json in COCO format).")
    if not isinstance(given, list) or len(names) != len(given):
        number = len(given) if isinstance(given, list) else shown(given)
        raise DatasetError(f"{source}: {number} boxes but {len(names)} class names.")
    crowds = objects.get("iscrowd") or [0] * len(given)
    if not isinstance(crowds, list) or len(crowds) != len(given):
        raise DatasetError(f"{source}: 'iscrowd' must have a 0 or 1 for each of {len(given)} boxes.")
    kept: dict[str, list] = {"bbox": [], "category": [], "morphology": [], "iscrowd": []}
    for index, (box, name, crowd) in enumerate(zip(given, names, crowds)):
        with bad.collecting():
            label = checked_label(name, f"{source}: objects[{index}]")
            kept["bbox"].append(boxes.checked(box, *size, f"{source}: objects.bbox[{index}]"))
            kept["category"].append(rename.get(label, label))
            kept["morphology"].append({})
            kept["iscrowd"].append(int(bool(crowd)))
    return kept


def _read_questions(path: Path, images: ImageFolder, dataset: str, bad: BadRows) -> list[Row]:
    rows = []
    for source, record in read_json_lines(path, bad):
        with bad.collecting():
            row = _row(images.path(record.get("image"), source), record["image"], dataset, "question_answering")
            row["question"] = checked_text(require(record, "question", source, "Question"), source)
            row["answer"] = checked_text(require(record, "answer", source, "Answer"), source)
            rows.append(row | group_ids(record, source))
    return rows


def _read_cloze(path: Path, images: ImageFolder, dataset: str, bad: BadRows) -> list[Row]:
    rows = []
    for source, record in read_json_lines(path, bad):
        with bad.collecting():
            row = _row(images.path(record.get("image"), source), record["image"], dataset, "cloze")
            masked = "masked_t5" if record.get("masked_t5") is not None else "masked"
            row["masked"] = checked_text(require(record, masked, source), source)
            row["completed"] = checked_text(require(record, "completed", source, "sentence"), source)
            if "<extra_id_0>" not in row["masked"]:
                raise DatasetError(f"{source}: field '{masked}' has no blank; mark the first one <extra_id_0>.")
            rows.append(row | group_ids(record, source))
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
    images.report(bad, rows, "lists it")
    return rows


def _coco_files(folder: Path) -> list[Path]:
    """COCO files; a broken one counts, so that reading it names what is broken."""
    found = []
    for path in DataFiles(folder).named(".json"):
        try:
            content = read_json(path)
            matches = isinstance(content, dict) and {"images", "annotations", "categories"} <= set(content)
        except DatasetError:
            matches = _speaks_of_annotations(path)
        if matches:
            found.append(path)
    return found


def _speaks_of_annotations(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return any(b'"annotations"' in block for block in iter(lambda: file.read(1 << 24), b""))
    except OSError:
        # Reading it says why.
        return True


def _has_names(folder: Path) -> bool:
    try:
        return bool(ClassLists(folder))
    except DatasetError:
        # Reading names what is broken.
        return True


def _voc_lists(folder: Path) -> dict[str, str]:
    """Stem -> split, from `ImageSets/Main/<split>.txt`; stems that two lists have are drawn anew."""
    found: dict[str, set[str]] = {}
    for path in DataFiles(folder).named(".txt"):
        split = split_in_name(path.name) if path.stem.lower() != "trainval" else None
        if split is None or path.parts[-3:-1] != ("ImageSets", "Main"):
            continue
        for line in read_text(path).splitlines():
            if line.strip():
                found.setdefault(line.split()[0], set()).add(split)
    return {stem: splits.pop() for stem, splits in found.items() if len(splits) == 1}


def is_folder(path: Path) -> bool:
    """Whether a path is that of a folder; one that no file system would take is not."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def ascii_name(name: str) -> str:
    """A file's name for a message: what is no text in UTF-8 is escaped."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")
