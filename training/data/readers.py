"""Data folders to schema rows (see rows.py)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from unihema.training.data.annotation_files import (
    IMAGE_SUFFIXES,
    ImageFolder,
    checked_box,
    image_size,
    read_coco,
    read_json_lines,
    recorded_size,
    require,
)
from unihema.training.data.rows import TASKS, DatasetError, Row


# Columns of WBCAtt (Tsutsui et al. 2023), the attribute table of the PBC images.
WBCATT_ATTRIBUTES = (
    "cell_size",
    "cell_shape",
    "nucleus_shape",
    "nuclear_cytoplasmic_ratio",
    "chromatin_density",
    "cytoplasm_vacuole",
    "cytoplasm_texture",
    "cytoplasm_colour",
    "granule_type",
    "granule_colour",
    "granularity",
)

LAYOUTS = """Accepted layouts, any part of which may be left out:
  <split>/annotations.json (COCO, file_name relative to <split>/), <split>/images/, <split>/masks/<same stem>.png,
      <split>/crops/<label>/*.png, <split>/qa.jsonl {image, question, answer},
      <split>/cloze.jsonl {image, masked, completed}
  <split>.json (COCO) with images/; images/<split>/metadata.jsonl {file_name, label | mask_file_name | objects};
      qa_<split>.jsonl {image, question, answer}; mlm_<split>.jsonl {image, masked_t5, sentence}"""

SPLIT_ALIASES = {"val": ("val", "validation", "valid"), "validation": ("validation", "val", "valid")}
OWN_PARTS = ("annotations.json", "masks", "crops", "qa.jsonl", "cloze.jsonl")


def load_folder(
    path: str | Path,
    split: str = "train",
    *,
    tasks: Sequence[str] | None = None,
    prompt: str = "white blood cell",
    rename: Mapping[str, str] | None = None,
    attributes_as_detection: bool | Sequence[str] = False,
    on_invalid: Literal["error", "skip"] = "error",
) -> dict[str, list[Row]]:
    """Reads one split of a data folder; the layout is recognised.

    Args:
        path (`str` or `Path`): The folder.
        split (`str`): `"train"`, `"val"` or another name that the folder uses.
        tasks (`Sequence[str]`, *optional*): Read these only; all that the folder has when not given.
        prompt (`str`): What the masks show.
        rename (`Mapping[str, str]`, *optional*): New names of detection classes and single-cell labels.
        attributes_as_detection (`bool` or `Sequence[str]`): Make detection rows of labelled single-cell images: one box
            over the whole image, its class the label, its morphology the attribute columns (WBCAtt's, or those named).
        on_invalid (`"error"` or `"skip"`): For boxes without area or wholly outside. Boxes partly outside are clipped.

    Returns:
        `dict[str, list[Row]]`: Rows of each task that the folder has.

    Raises:
        DatasetError: Missing folder, split or image, a broken line, an invalid box.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise DatasetError(f"{folder}: no such folder.\n{LAYOUTS}")
    unknown = [task for task in tasks or () if task not in TASKS]
    if unknown:
        raise DatasetError(f"Unknown task {unknown[0]!r}; tasks are {', '.join(TASKS)}.")
    wanted = tuple(tasks or TASKS)
    options = {
        "wanted": wanted,
        "dataset": folder.resolve().name,
        "prompt": prompt,
        "rename": dict(rename or {}),
        "on_invalid": on_invalid,
    }
    for name in SPLIT_ALIASES.get(split, (split,)):
        if any((folder / name / part).exists() for part in OWN_PARTS):
            found = _read_own(folder / name, **options)
        else:
            found = _read_by_split(folder, name, attributes_as_detection=attributes_as_detection, **options)
        found = {task: found[task] for task in TASKS if found.get(task)}
        if found:
            return found
    inside = ", ".join(sorted(entry.name for entry in folder.iterdir())[:12]) or "nothing"
    what = f" for {', '.join(wanted)}" if tasks else ""
    raise DatasetError(f"{folder}: no data{what} in split '{split}'; the folder holds {inside}.\n{LAYOUTS}")


def _read_own(folder: Path, wanted, dataset, prompt, rename, on_invalid) -> dict[str, list[Row]]:
    images = ImageFolder(folder)
    rows: dict[str, list[Row]] = {}
    if "detection" in wanted and (folder / "annotations.json").is_file():
        rows["detection"] = read_coco(folder / "annotations.json", folder, dataset, rename, on_invalid)
    if "segmentation" in wanted and (folder / "masks").is_dir():
        stems = {file.stem: file for file in _image_files(folder / "images")}
        rows["segmentation"] = []
        for mask in _image_files(folder / "masks"):
            if mask.stem not in stems:
                raise DatasetError(f"{mask}: no image of this name in {folder / 'images'}.")
            row = _row(stems[mask.stem], f"images/{stems[mask.stem].name}", dataset, "segmentation")
            rows["segmentation"].append(row | {"mask": str(mask), "prompt": prompt})
    if "single_cell" in wanted and (folder / "crops").is_dir():
        rows["single_cell"] = [
            _row(file, f"crops/{label.name}/{file.name}", dataset, "single_cell")
            | {"label": rename.get(label.name, label.name)}
            for label in sorted(entry for entry in (folder / "crops").iterdir() if entry.is_dir())
            for file in _image_files(label)
        ]
    if "question_answering" in wanted and (folder / "qa.jsonl").is_file():
        rows["question_answering"] = _read_questions(folder / "qa.jsonl", images, dataset)
    if "cloze" in wanted and (folder / "cloze.jsonl").is_file():
        rows["cloze"] = _read_cloze(folder / "cloze.jsonl", images, dataset, "masked", "completed")
    return rows


def _read_by_split(
    folder: Path, split: str, wanted, dataset, prompt, rename, on_invalid, attributes_as_detection
) -> dict[str, list[Row]]:
    images = ImageFolder(folder / "images")
    rows: dict[str, list[Row]] = {}
    coco = folder / f"{split}.json"
    if "detection" in wanted and coco.is_file():
        rows["detection"] = read_coco(coco, folder / "images", dataset, rename, on_invalid)
    metadata = folder / "images" / split / "metadata.jsonl"
    if metadata.is_file():
        columns = WBCATT_ATTRIBUTES if attributes_as_detection is True else tuple(attributes_as_detection or ())
        for task, found in _read_metadata(metadata, dataset, prompt, rename, on_invalid, columns).items():
            if task in wanted and task not in rows:
                rows[task] = found
    if "question_answering" in wanted and (folder / f"qa_{split}.jsonl").is_file():
        rows["question_answering"] = _read_questions(folder / f"qa_{split}.jsonl", images, dataset)
    if "cloze" in wanted and (folder / f"mlm_{split}.jsonl").is_file():
        rows["cloze"] = _read_cloze(folder / f"mlm_{split}.jsonl", images, dataset, "masked_t5", "sentence")
    return rows


def _read_metadata(
    path: Path, dataset: str, prompt: str, rename: Mapping[str, str], on_invalid, columns: Sequence[str]
) -> dict[str, list[Row]]:
    """Rows of an image-folder metadata file: by its columns, each line is a row of one task or of several."""
    images = ImageFolder(path.parent)
    rows: dict[str, list[Row]] = {"detection": [], "segmentation": [], "single_cell": []}
    for source, record in read_json_lines(path):
        name = require(record, "file_name", source)
        image, shown = images.path(name, source), f"{path.parent.name}/{name}"
        if record.get("mask_file_name"):
            mask = images.path(record["mask_file_name"], source)
            rows["segmentation"].append(_row(image, shown, dataset, "segmentation") | {"mask": mask, "prompt": prompt})
        if record.get("objects"):
            size = recorded_size(record, image)
            row = _row(image, shown, dataset, "detection") | {"size": size}
            row["objects"] = _read_objects(record, size, source, rename, on_invalid)
            rows["detection"].append(row)
        if isinstance(record.get("label"), str):
            label = rename.get(record["label"], record["label"])
            rows["single_cell"].append(_row(image, shown, dataset, "single_cell") | {"label": label})
            if any(key in record for key in columns):
                morphology = {key: str(record[key]) for key in columns if record.get(key) is not None}
                objects = {
                    "bbox": [[0.0, 0.0, *map(float, image_size(image))]],
                    "category": [label],
                    "morphology": [morphology],
                }
                rows["detection"].append(_row(image, shown, dataset, "detection") | {"objects": objects})
    annotated = sorted({name for row in rows["detection"] for name in row["objects"]["category"]})
    for row in rows["detection"]:
        row["annotated_classes"] = annotated
    return rows


def _read_objects(record, size: tuple[int, int], source: str, rename: Mapping[str, str], on_invalid) -> dict[str, list]:
    objects = record["objects"]
    names = objects.get("category_name") or objects.get("category") or []
    boxes = require(objects, "bbox", source)
    if any(not isinstance(name, str) for name in names):
        raise DatasetError(f"{source}: objects need class names in 'category_name' (or a <split>.json in COCO format).")
    if len(names) != len(boxes):
        raise DatasetError(f"{source}: {len(boxes)} boxes but {len(names)} class names.")
    kept = {"bbox": [], "category": [], "morphology": []}
    for index, (box, name) in enumerate(zip(boxes, names)):
        box = checked_box(box, *size, f"{source}: object {index}", on_invalid)
        if box is not None:
            kept["bbox"].append(box)
            kept["category"].append(rename.get(name, name))
            kept["morphology"].append({})
    return kept


def _read_questions(path: Path, images: ImageFolder, dataset: str) -> list[Row]:
    return [
        _row(images.path(record.get("image"), source), record["image"], dataset, "question_answering")
        | {key: str(require(record, key, source)) for key in ("question", "answer")}
        for source, record in read_json_lines(path)
    ]


def _read_cloze(path: Path, images: ImageFolder, dataset: str, masked: str, completed: str) -> list[Row]:
    rows = []
    for source, record in read_json_lines(path):
        row = _row(images.path(record.get("image"), source), record["image"], dataset, "cloze")
        row["masked"] = str(require(record, masked, source))
        row["completed"] = str(require(record, completed, source))
        if "<extra_id_0>" not in row["masked"]:
            raise DatasetError(f"{source}: field '{masked}' has no blank; mark the first one <extra_id_0>.")
        rows.append(row)
    return rows


def _row(image: str | Path, file_name: str, dataset: str, task: str) -> Row:
    return {"image": str(image), "file_name": file_name, "dataset": dataset, "task": task}


def _image_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
