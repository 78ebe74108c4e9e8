"""COCO files: boxes, class names and, where an annotation has them, attributes and masks."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from unihema.errors import DatasetError, InputError
from unihema.processing_unihema.masks import check_runs
from unihema.results.edits import coco_id
from unihema.training.data.layouts.files import (
    LONGEST_NAME,
    ClippedBoxes,
    checked_label,
    read_json,
    recorded_size,
    require,
)
from unihema.training.data.rows import BadRows, Row, group_ids, shown


# Attributes that annotation programs (CVAT, Datumaro, labelImg, LabelMe) write of their own accord. No cell has them.
BOOKKEEPING = frozenset(
    {
        "occluded",
        "rotation",
        "track_id",
        "keyframe",
        "outside",
        "truncated",
        "difficult",
        "pose",
        "z_order",
        "group_id",
        "group",
        "shape_type",
        "flags",
        "source",
        "score",
        "is_crowd",
        "iscrowd",
        "ignored",
        "id",
        "label_id",
        "annotation_id",
    }
)
# More values than this, all numbers, are measurements or identifiers.
MOST_NUMBERS = 20
# Of a box and of the outline of the same cell: overlap over union below which they belong to two.
LEAST_OVERLAP = 0.5


def read_coco(
    path: Path,
    find_image: Callable[[Any, str], str],
    dataset: str,
    rename: Mapping[str, str],
    bad: BadRows,
) -> list[Row]:
    """Detection rows of a COCO file.

    Where two fields say the same, they are compared: ids of categories and images, the image's size and that of a mask (RLE),
    a box and the outline of its cell. A category that only groups others and that no box has (Roboflow's first) is no class.

    Args:
        path (`Path`): `images`, `annotations`, `categories`; an annotation may have `attributes` {name: value}, and an image
            `annotated_classes`, names of categories, where not all of them were looked for in it.
        find_image (`Callable`): Path of an image from its `file_name` and the source for messages.
        dataset (`str`): Name of the data set.
        rename (`Mapping[str, str]`): Category names to replace.
        bad (`BadRows`): Gets images and annotations that cannot be used, by their place in the file.

    Raises:
        DatasetError: Not a COCO file, one without categories or with two of one id, or one whose boxes are fractions.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise DatasetError(f"{path}: a COCO object with images, annotations and categories is needed.")
    for key in ("images", "annotations", "categories"):
        if not isinstance(require(content, key, str(path)), list):
            raise DatasetError(f"{path}: '{key}' must be a list.")
    names = _category_names(content["categories"], path, rename, bad)
    _check_pixels(content["annotations"], path)
    classes = _without_groups(names, content, path, bad)

    rows: dict[Any, Row] = {}
    left_out = set()
    for number, image in enumerate(content["images"]):
        with bad.collecting():
            source = f"{path}: images[{number}]"
            identifier = _identifier(image, "id", source)
            if identifier in rows:
                raise DatasetError(f"{source}.id: {shown(identifier)} occurs twice.")
            left_out.add(identifier)
            file_name = require(image, "file_name", source)
            found = find_image(file_name, source)
            rows[identifier] = {
                "image": found,
                "file_name": file_name,
                "dataset": dataset,
                "task": "detection",
                "objects": {"bbox": [], "category": [], "morphology": [], "iscrowd": [], "segmentation": []},
                "annotated_classes": _annotated_in(image, classes, names, rename, source),
                "size": recorded_size(image, found),
                **group_ids(image, source),
            }
            left_out.discard(identifier)

    boxes = ClippedBoxes(bad)
    scored = 0
    for number, annotation in enumerate(content["annotations"]):
        with bad.collecting():
            source = f"{path}: annotations[{number}]"
            image_id = _identifier(annotation, "image_id", source)
            # Its image was named already.
            if image_id not in left_out:
                _add_object(rows, image_id, annotation, names, source, boxes)
                scored += annotation.get("score") is not None
    boxes.report()
    if not any(mask for row in rows.values() for mask in row["objects"]["segmentation"]):
        for row in rows.values():
            del row["objects"]["segmentation"]
    if scored:
        bad.note(f"{path}: {scored} boxes have a score, as predictions have. They are taken for the truth.")
    _keep_classes_of_attributes(list(rows.values()), path, bad)
    return list(rows.values())


def _annotated_in(
    image: Mapping[str, Any], classes: Sequence[str], names: Mapping[Any, str], rename: Mapping[str, str], source: str
) -> list[str]:
    """The classes that were looked for in an image: those of the file, or those that it lists itself.

    Raises:
        DatasetError: It lists no list, or a class that is no category.
    """
    listed = image.get("annotated_classes")
    if listed is None:
        return list(classes)
    if not isinstance(listed, list):
        raise DatasetError(f"{source}.annotated_classes: a list of class names is needed, got {shown(listed)}.")
    found = [rename.get(name, name) if isinstance(name, str) else name for name in listed]
    if unknown := [name for name in found if name not in names.values()]:
        raise DatasetError(f"{source}.annotated_classes: {shown(unknown[0])} is not among the categories.")
    return list(dict.fromkeys(found))


def _add_object(
    rows: Mapping[Any, Row],
    image_id: Any,
    annotation: Mapping[str, Any],
    names: Mapping[Any, str],
    source: str,
    boxes: ClippedBoxes,
) -> None:
    if image_id not in rows:
        raise DatasetError(f"{source}.image_id: {shown(image_id)} is not among the images.")
    row = rows[image_id]
    where = f"({row['file_name']})"
    category = _identifier(annotation, "category_id", source)
    if category not in names:
        known = ", ".join(f"{key} {name}" for key, name in list(names.items())[:50])
        raise DatasetError(f"{source}.category_id {where}: {shown(category)} is not among the categories ({known}).")
    given = require(annotation, "bbox", f"{source} {where}")
    box = boxes.checked(given, *row["size"], f"{source}.bbox {where}")
    outline = annotation.get("segmentation")
    _check_outline(outline, given, row["size"], f"{source}.segmentation {where}")
    attributes = _record(annotation.get("attributes") or {}, f"{source}.attributes {where}")
    row["objects"]["bbox"].append(box)
    row["objects"]["category"].append(names[category])
    row["objects"]["morphology"].append({key: value for key, value in attributes.items() if value is not None})
    row["objects"]["iscrowd"].append(int(bool(annotation.get("iscrowd"))))
    row["objects"]["segmentation"].append(_as_mask(outline))


def _as_mask(outline: Any) -> dict[str, Any] | list[list[float]] | None:
    """What is kept of a checked outline; a polygon of two corners is none."""
    if isinstance(outline, Mapping):
        counts = outline.get("counts")
        return {"size": list(outline["size"]), "counts": counts} if counts and outline.get("size") else None
    polygons = [part for part in outline or () if len(part) >= 6]
    return polygons or None


def _check_pixels(annotations: Sequence[Any], path: Path) -> None:
    """Checks that the boxes are in pixels.

    Raises:
        DatasetError: None of them reaches beyond 1.
    """
    largest = []
    for annotation in annotations:
        box = annotation.get("bbox") if isinstance(annotation, Mapping) else None
        if isinstance(box, list) and len(box) == 4 and all(isinstance(value, (int, float)) for value in box):
            largest.append(max(box))
    if largest and 0 < max(largest) <= 1:
        raise DatasetError(
            f"{path}: all {len(largest)} boxes are fractions of the image. COCO boxes are in pixels: multiply them by its size."
        )


def _check_outline(outline: Any, box: Sequence[float], size: tuple[int, int], source: str) -> None:
    """Checks that an outline (polygons, or a mask as RLE) belongs to the image and to the box.

    Raises:
        DatasetError: It does not.
    """
    if isinstance(outline, Mapping):
        recorded, counts = outline.get("size"), outline.get("counts")
        if recorded is not None and recorded != [size[1], size[0]]:
            raise DatasetError(
                f"{source}: a mask of height and width {shown(recorded)}, but the image has {size[1]} and {size[0]}."
            )
        if isinstance(counts, list):
            if not all(isinstance(count, int) and count >= 0 for count in counts):
                raise DatasetError(f"{source}: counts must be whole numbers of 0 or more.")
            if sum(counts) != size[0] * size[1]:
                raise DatasetError(f"{source}: a mask of {sum(counts)} pixels, but the image has {size[0] * size[1]}.")
        elif isinstance(counts, str):
            try:
                check_runs({"size": [size[1], size[0]], "counts": counts})
            except InputError as error:
                raise DatasetError(f"{source}: {error}") from error
        elif counts is not None:
            raise DatasetError(f"{source}: counts must be a list or a text, got {shown(counts)}.")
        return
    if not isinstance(outline, list) or not outline:
        return
    polygons = [part for part in outline if isinstance(part, list)]
    values = [value for part in polygons for value in part]
    numbers = all(isinstance(value, (int, float)) and math.isfinite(value) for value in values)
    if len(polygons) != len(outline) or not numbers or any(len(part) % 2 or len(part) < 4 for part in polygons):
        raise DatasetError(f"{source}: polygons are lists of x and y in turn, got {shown(outline)}.")
    xs = [value for part in polygons for value in part[0::2]]
    ys = [value for part in polygons for value in part[1::2]]
    x, y, width, height = (float(value) for value in box)
    across = min(x + width, max(xs)) - max(x, min(xs))
    down = min(y + height, max(ys)) - max(y, min(ys))
    # Pixels are counted from their corner or from their centre.
    common = max(across + 2, 0) * max(down + 2, 0)
    union = width * height + (max(xs) - min(xs)) * (max(ys) - min(ys)) - max(across, 0) * max(down, 0)
    if common < LEAST_OVERLAP * union:
        raise DatasetError(
            f"{source}: the outline lies at [{min(xs):g}, {min(ys):g}, {max(xs) - min(xs):g}, {max(ys) - min(ys):g}], but the "
            f"box is {shown(list(box))}. One of them is of another cell or of another size of the image."
        )


def _without_groups(names: Mapping[Any, str], content: Mapping[str, Any], path: Path, bad: BadRows) -> list[str]:
    """The classes: all categories but those that only group others. A name that some box has is a class."""
    ids = [entry.get("category_id") for entry in content["annotations"] if isinstance(entry, Mapping)]
    used = {names.get(coco_id(given)) for given in ids}
    # In COCO itself some categories are their own supercategory.
    above = {
        shown(entry.get("supercategory"))
        for entry in content["categories"]
        if entry.get("supercategory") != entry["name"]
    }
    groups = {
        name: None
        for entry in content["categories"]
        if (name := names[coco_id(entry["id"])]) not in used and shown(entry["name"]) in above
    }
    if groups:
        bad.note(f"{path}: {', '.join(groups)}: a category over others that no box has. It is not taken for a class.")
    return [name for name in dict.fromkeys(names.values()) if name not in groups]


def _keep_classes_of_attributes(rows: Sequence[Row], path: Path, bad: BadRows) -> None:
    """Leaves what tells cells apart: values as text, without book-keeping, measurements and identifiers."""
    values: dict[str, set[Any]] = {}
    plain: dict[str, bool] = {}
    times: Counter = Counter()
    for row in rows:
        for attributes in row["objects"]["morphology"]:
            for name, value in attributes.items():
                times[name] += 1
                simple = isinstance(value, (str, int)) and len(str(value)) <= LONGEST_NAME
                plain[name] = plain.get(name, True) and (simple or _whole(value))
                if isinstance(value, (str, int, float)):
                    values.setdefault(name, set()).add(value)
    dropped = {
        name: number
        for name, number in times.items()
        if name.lower() in BOOKKEEPING or not plain[name] or _are_measurements(values.get(name, set()))
    }
    for row in rows:
        row["objects"]["morphology"] = [
            {name: str(value) for name, value in attributes.items() if name not in dropped}
            for attributes in row["objects"]["morphology"]
        ]
    if dropped:
        listed = ", ".join(f"{shown(name)} ({number})" for name, number in list(dropped.items())[:20])
        bad.note(
            f"{path}: attributes that are no classes of cells are left out, with the number of boxes that have them: {listed}."
        )


def _are_measurements(values: set[Any]) -> bool:
    return len(values) > MOST_NUMBERS and all(isinstance(value, (int, float)) for value in values)


def _whole(value: Any) -> bool:
    return isinstance(value, float) and value.is_integer()


def _category_names(categories: list[Any], path: Path, rename: Mapping[str, str], bad: BadRows) -> dict[Any, str]:
    if not categories:
        raise DatasetError(f"{path}: no categories. List the annotated classes as {{'id', 'name'}}.")
    names: dict[Any, str] = {}
    ids: dict[str, int | str] = {}
    for number, category in enumerate(categories):
        source = f"{path}: categories[{number}]"
        identifier = _identifier(category, "id", source)
        name = checked_label(require(category, "name", source), f"{source}.name")
        if ids.setdefault(name, identifier) != identifier:
            bad.note(f"{source}: {name} is also the category {shown(ids[name])}. Both are read as one class.")
        name = rename.get(name, name)
        if names.get(identifier, name) != name:
            raise DatasetError(
                f"{source}.id: {shown(identifier)} is the id of {names[identifier]} and of {name}. Give each its own."
            )
        names[identifier] = name
    return names


def _identifier(value: Any, key: str, source: str) -> int | str:
    """An id. Two that are alike as `coco_id` reads them are found as twins."""
    given = require(_record(value, source), key, source)
    identifier = coco_id(given)
    if identifier is None:
        raise DatasetError(f"{source}.{key}: {shown(given)} must be a whole number or a text.")
    return identifier


def _record(value: Any, source: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise DatasetError(f"{source}: a JSON object {{...}} is needed, got {type(value).__name__}.")
    return value
