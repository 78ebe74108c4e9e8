"""COCO files: boxes, class names and, where an annotation has them, attributes."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from unihema.errors import DatasetError
from unihema.training.data.layouts.files import checked_box, read_json, recorded_size, require
from unihema.training.data.rows import BadRows, Row, group_ids


def read_coco(
    path: Path,
    find_image: Callable[[Any, str], str],
    dataset: str,
    rename: Mapping[str, str],
    bad: BadRows,
) -> list[Row]:
    """Detection rows of a COCO file.

    Args:
        path (`Path`): `images`, `annotations`, `categories`; an annotation may have `attributes` {name: value}.
        find_image (`Callable`): Path of an image from its `file_name` and the source for messages.
        dataset (`str`): Name of the data set.
        rename (`Mapping[str, str]`): Category names to replace.
        bad (`BadRows`): Gets images and annotations that cannot be used, by their place in the file.

    Raises:
        DatasetError: Not a COCO file, or one without categories.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise DatasetError(f"{path}: a COCO object with images, annotations and categories is needed.")
    for key in ("images", "annotations", "categories"):
        if not isinstance(require(content, key, str(path)), list):
            raise DatasetError(f"{path}: '{key}' must be a list.")
    names = _category_names(content["categories"], path, rename)

    rows: dict[Any, Row] = {}
    left_out = set()
    for number, image in enumerate(content["images"]):
        with bad.collecting():
            source = f"{path}: images[{number}]"
            identifier = _identifier(image, "id", source)
            if identifier in rows:
                raise DatasetError(f"{source}.id: {identifier} occurs twice.")
            left_out.add(identifier)
            file_name = require(image, "file_name", source)
            found = find_image(file_name, source)
            rows[identifier] = {
                "image": found,
                "file_name": file_name,
                "dataset": dataset,
                "task": "detection",
                "objects": {"bbox": [], "category": [], "morphology": [], "iscrowd": []},
                "annotated_classes": list(dict.fromkeys(names.values())),
                "size": recorded_size(image, found),
                **group_ids(image),
            }
            left_out.discard(identifier)

    for number, annotation in enumerate(content["annotations"]):
        with bad.collecting():
            source = f"{path}: annotations[{number}]"
            image_id = _identifier(annotation, "image_id", source)
            # Its image was named already.
            if image_id not in left_out:
                _add_object(rows, image_id, annotation, names, source)
    return list(rows.values())


def _add_object(
    rows: Mapping[Any, Row], image_id: Any, annotation: Mapping[str, Any], names: Mapping[Any, str], source: str
) -> None:
    if image_id not in rows:
        raise DatasetError(f"{source}.image_id: {image_id} is not among the images.")
    row = rows[image_id]
    shown = f"({row['file_name']})"
    category = _identifier(annotation, "category_id", source)
    if category not in names:
        known = ", ".join(f"{key} {name}" for key, name in names.items())
        raise DatasetError(f"{source}.category_id {shown}: {category} is not among the categories ({known}).")
    box = checked_box(require(annotation, "bbox", f"{source} {shown}"), *row["size"], f"{source}.bbox {shown}")
    attributes = _record(annotation.get("attributes") or {}, f"{source}.attributes {shown}")
    row["objects"]["bbox"].append(box)
    row["objects"]["category"].append(names[category])
    row["objects"]["morphology"].append({key: str(value) for key, value in attributes.items() if value is not None})
    row["objects"]["iscrowd"].append(int(bool(annotation.get("iscrowd"))))


def _category_names(categories: list[Any], path: Path, rename: Mapping[str, str]) -> dict[Any, str]:
    if not categories:
        raise DatasetError(f"{path}: no categories. List the annotated classes as {{'id', 'name'}}.")
    names = {}
    for number, category in enumerate(categories):
        source = f"{path}: categories[{number}]"
        identifier = _identifier(category, "id", source)
        name = str(require(category, "name", source))
        names[identifier] = rename.get(name, name)
    return names


def _identifier(value: Any, key: str, source: str) -> int | str:
    identifier = require(_record(value, source), key, source)
    if not isinstance(identifier, (int, str)):
        raise DatasetError(f"{source}.{key}: {identifier!r} must be a number or a text.")
    return identifier


def _record(value: Any, source: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise DatasetError(f"{source}: a JSON object {{...}} is needed, got {type(value).__name__}.")
    return value
