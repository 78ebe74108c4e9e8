"""Boxes of fields as crops of single cells: rows that say which cell of which image, cut out when they are read."""

from collections.abc import Mapping, Sequence

import numpy as np

from unihema.errors import DatasetError
from unihema.modeling_unihema.configuration_unihema import ancestors
from unihema.processing_unihema.class_names import INFECTED, STANDARD_PARENTS, UNINFECTED, usual_name
from unihema.training.data.rows import PROVENANCE_KEYS, Row
from unihema.training.data.shards import LazyRows


# Boxes of a class and a data set that become crops: more red cells teach nothing new, and each is a row to keep.
MOST_CROPS, MOST_MEASURED = 3000, 100
# Pixels of the shorter side of a box below which there is nothing to see.
LEAST_SIDE = 6


def crops_of_boxes(rows: Sequence[Row], most: int | None = MOST_CROPS) -> list[Row]:
    """Rows of single cells for the boxes of detection rows.

    The label is the box's class, coarse or fine. Crowds, cells whose box is not known and tiny boxes are left out.

    Args:
        rows (`Sequence[Row]`): Of detection and of one data set, in memory.
        most (`int`, *optional*): Crops of a class at most: a draw that hangs on nothing but the number of boxes.

    Returns:
        `list[Row]`: With `box`, xywh pixels of the image of `size`.

    Raises:
        DatasetError: The rows are of shards.
    """
    if isinstance(rows, LazyRows):
        raise DatasetError(
            "data.boxes_as_crops: boxes of shards are not cut out; name the folder that they were made of."
        )
    found: dict[str, list[tuple[int, int]]] = {}
    for number, row in enumerate(rows):
        if row.get("from_attributes"):
            continue
        objects = row["objects"]
        crowds = objects.get("iscrowd") or [0] * len(objects["bbox"])
        for cell, (box, name, crowd) in enumerate(zip(objects["bbox"], objects["category"], crowds, strict=True)):
            if not crowd and min(box[2:]) >= LEAST_SIDE:
                found.setdefault(name, []).append((number, cell))
    crops = []
    for name, places in found.items():
        if most is not None and len(places) > most:
            chosen = np.random.default_rng(0).choice(len(places), most, replace=False)
            places = [places[index] for index in sorted(chosen.tolist())]
        crops += [_crop(rows[number], name, cell) for number, cell in places]
    return crops


def with_declared_classes(rows: Sequence[Row], exact: Sequence[str] = (), absent: Sequence[str] = ()) -> list[Row]:
    """Detection rows with what is known about their data set, and no file of it says.

    Args:
        rows (`Sequence[Row]`): Of detection and of one data set, in memory.
        exact (`Sequence[str]`): Coarser classes, in any spelling, whose cells are of none of the finer classes that it boxes.
        absent (`Sequence[str]`): Classes of which it has no cell, so that all of it is their background.

    Raises:
        DatasetError: The data set does not annotate an exact class, has cells of an absent one, or the rows are of shards.
    """
    if isinstance(rows, LazyRows):
        raise DatasetError(
            "data.exact_classes and data.absent_classes: of shards that cannot be said; name the folder that they were made of."
        )
    where = f"data.exact_classes: {rows[0]['dataset'] if rows else 'the data set'}"
    known = {usual_name(name): name for row in rows for name in row.get("annotated_classes") or ()}
    if missing := [name for name in exact if usual_name(name) not in known]:
        raise DatasetError(f"{where} has no class {missing[0]!r}; it has {', '.join(known.values())}.")
    there = {usual_name(name) for row in rows for name in row["objects"]["category"]}
    if found := [name for name in absent if usual_name(name) in there]:
        raise DatasetError(f"data.absent_classes: {rows[0]['dataset']} has boxes of {found[0]}.")
    names, more = (
        [known[usual_name(name)] for name in exact],
        [name for name in absent if usual_name(name) not in known],
    )
    declared = []
    for row in rows:
        row = dict(row)
        if row.get("annotated_classes") is not None:
            row["exact_classes"] = [name for name in names if name in row["annotated_classes"]]
            row["annotated_classes"] = [*row["annotated_classes"], *more]
        declared.append(row)
    return declared


def _crop(row: Row, name: str, cell: int) -> Row:
    kept: Mapping = {key: row[key] for key in ("image", "file_name", "dataset", "size", *PROVENANCE_KEYS) if key in row}
    return {
        **kept,
        "task": "single_cell",
        "label": _label(name, row),
        "box": list(row["objects"]["bbox"][cell]),
    }


def _label(name: str, row: Row) -> str:
    """A red cell of a set that boxes infected ones by their own names is uninfected."""
    if name not in (row.get("exact_classes") or ()) or usual_name(name) != "rbc":
        return name
    finer = (ancestors(usual_name(other), STANDARD_PARENTS) for other in row["annotated_classes"])
    return UNINFECTED if any(INFECTED in line for line in finer) else name


__all__ = ["MOST_CROPS", "MOST_MEASURED", "crops_of_boxes", "with_declared_classes"]
