"""The layouts in which others publish data sets: which one a folder has, and its rows."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from unihema.errors import DatasetError
from unihema.training.data.bad_rows import BadRows
from unihema.training.data.image_finder import ImageFinder, is_hidden
from unihema.training.data.layouts.annotation_files import read_located_json
from unihema.training.data.layouts.coco import read_coco
from unihema.training.data.layouts.folders import class_of, read_class_folders
from unihema.training.data.layouts.masks import is_mask, read_mask_pairs
from unihema.training.data.layouts.tables import WBCATT_ATTRIBUTES, attribute_tables, read_attribute_tables
from unihema.training.data.layouts.voc import is_voc, read_voc
from unihema.training.data.layouts.yolo import labels_of, read_yolo, yolo_names
from unihema.training.data.rows import Row
from unihema.training.data.splits import split_in_name, split_in_path


FOREIGN_LAYOUTS = {
    "coco": "COCO files anywhere",
    "yolo": "YOLO (labels/*.txt with data.yaml)",
    "voc": "Pascal VOC (*.xml)",
    "attribute_table": "attribute tables (*.csv with file_name and label)",
    "mask_pairs": "image/mask pairs",
    "class_folders": "class folders (<label>/*.png)",
}


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
            content, _ = read_located_json(path)
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
