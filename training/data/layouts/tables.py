"""Tables with a line an image: its label and, in further columns, attributes of its cell."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unihema.errors import DatasetError
from unihema.processing_unihema.class_names import short_name
from unihema.training.data.layouts.files import (
    DataFiles,
    ImageFinder,
    checked_label,
    encoding_of,
    image_size,
    read_table,
    require,
    table_start,
)
from unihema.training.data.layouts.folders import class_of
from unihema.training.data.rows import (
    IMAGE_COLUMNS,
    LABEL_COLUMNS,
    BadRows,
    Row,
    column_name,
    group_ids,
)
from unihema.training.data.splits import split_in_name


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
    return [path for path in DataFiles(folder).named(".csv", ".tsv") if _names_images_and_labels(path)]


def _names_images_and_labels(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            beginning = file.read(20_000)
    except OSError:
        # Reading it says why.
        return True
    lines = beginning.decode(encoding_of(beginning), errors="replace").splitlines()
    first, delimiter = table_start(lines[:2])
    cells = lines[first].split(delimiter) if len(lines) > first else []
    columns = {column_name(cell.strip().strip('"')) for cell in cells}
    return bool(columns & set(IMAGE_COLUMNS) and columns & set(LABEL_COLUMNS))


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
        DatasetError: An image that is none.
    """
    images = ImageFinder(folder)
    rows: list[Row] = []
    labelled: list[tuple[str, str, str]] = []
    for path in attribute_tables(folder):
        split = split_in_name(path.name)
        with bad.collecting():
            for source, record in read_table(path, bad):
                with bad.collecting():
                    name = require(record, "file_name", source, *IMAGE_COLUMNS)
                    label = checked_label(require(record, "label", source, *LABEL_COLUMNS), source)
                    image = images.find([name], path, source)
                    row = images.row(image, dataset, "single_cell") | {"split": split, **group_ids(record, source)}
                    rows += rows_of_cell(row, rename.get(label, label), record, attributes)
                    labelled.append((source, image, label))
    wrong = _contradicted_by_folders(labelled, folder, bad)
    images.report(bad, rows, "names it in a table")
    return with_annotated_classes([row for row in rows if row["image"] not in wrong])


def _contradicted_by_folders(labelled: Sequence[tuple[str, str, str]], root: Path, bad: BadRows) -> set[str]:
    """Images that lie in the folder of another class than the table says; each is a bad row."""
    classes = {short_name(label) for _, _, label in labelled}
    wrong = set()
    for source, image, label in labelled:
        folder = class_of(Path(image), root)
        if folder is not None and short_name(folder) in classes - {short_name(label)}:
            wrong.add(image)
            with bad.collecting():
                raise DatasetError(f"{source}: {label}, but the image {image} lies in the folder of {folder}.")
    return wrong


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
