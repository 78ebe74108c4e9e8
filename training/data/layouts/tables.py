"""Tables with a line an image: its label and, in further columns, attributes of its cell."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unihema.training.data.layouts.files import ImageFinder, image_size, is_hidden, read_table, require
from unihema.training.data.rows import BadRows, Row, group_ids
from unihema.training.data.splits import split_in_name


IMAGE_COLUMNS = ("file_name", "img_name", "filename", "image", "path")
LABEL_COLUMNS = ("label", "class")
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


def attribute_tables(folder: Path) -> list[Path]:
    """The tables of a folder and its subfolders that name images and labels."""
    found = []
    for path in sorted([*folder.rglob("*.csv"), *folder.rglob("*.tsv")]):
        if is_hidden(path.relative_to(folder)):
            continue
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            header = file.readline(10_000)
        columns = {cell.strip().strip('"') for cell in header.replace(";", ",").replace("\t", ",").split(",")}
        if columns & set(IMAGE_COLUMNS) and columns & set(LABEL_COLUMNS):
            found.append(path)
    return found


def read_attribute_tables(
    folder: Path,
    dataset: str,
    rename: Mapping[str, str],
    bad: BadRows,
    attributes: Sequence[str] = WBCATT_ATTRIBUTES,
) -> list[Row]:
    """Rows of all attribute tables in a folder: a single-cell row a line, and a detection row if it has attributes.

    Args:
        folder (`Path`): The data set.
        dataset (`str`): Its name.
        rename (`Mapping[str, str]`): Labels to replace.
        bad (`BadRows`): Gets lines that cannot be used.
        attributes (`Sequence[str]`): Columns that are attributes.

    Returns:
        `list[Row]`: With `split` where the table's name says it (`attributes_val.csv`).

    Raises:
        DatasetError: A table without a header.
    """
    images = ImageFinder(folder)
    rows: list[Row] = []
    for path in attribute_tables(folder):
        split = split_in_name(path.name)
        for source, record in read_table(path, bad):
            with bad.collecting():
                name = require(record, "file_name", source, *IMAGE_COLUMNS)
                label = require(record, "label", source, *LABEL_COLUMNS)
                image = images.find([name], path, source)
                row = images.row(image, dataset, "single_cell") | {"split": split, **group_ids(record)}
                rows += rows_of_cell(row, rename.get(label, label), record, attributes)
    return with_annotated_classes(rows)


def rows_of_cell(row: Row, label: str, record: Mapping[str, Any], attributes: Sequence[str]) -> list[Row]:
    """The rows of an image of one cell.

    Args:
        row (`Row`): What they share: image, file name, data set.
        label (`str`): The cell's class.
        record (`Mapping[str, Any]`): The line; attributes without a value are missing.
        attributes (`Sequence[str]`): Its keys that are attributes; with none of them there is no detection row.

    Returns:
        `list[Row]`: A single-cell row and, where there are attributes, a detection row. Its one box is the whole image, and box
            losses ignore it.
    """
    rows = [row | {"task": "single_cell", "label": label}]
    if any(key in record for key in attributes):
        morphology = {key: str(record[key]) for key in attributes if record.get(key) is not None}
        box = [0.0, 0.0, *map(float, image_size(row["image"]))]
        objects = {"bbox": [box], "category": [label], "morphology": [morphology]}
        rows.append(row | {"task": "detection", "objects": objects, "from_attributes": True})
    return rows


def with_annotated_classes(rows: list[Row]) -> list[Row]:
    """Rows whose detections name all classes that any of them has."""
    detections = [row for row in rows if row["task"] == "detection"]
    annotated = sorted({name for row in detections for name in row["objects"]["category"]})
    for row in detections:
        row["annotated_classes"] = annotated
    return rows
