"""YOLO: a text file of boxes (or polygons) for each image, class names in data.yaml or classes.txt."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unihema.errors import DatasetError
from unihema.training.data.layouts.files import ImageFinder, checked_box, image_size, read_text
from unihema.training.data.rows import BadRows, Row


NAME_LISTS = ("classes.txt", "obj.names", "_darknet.labels")


def read_yolo(folder: Path, dataset: str, rename: Mapping[str, str], bad: BadRows) -> list[Row]:
    """Detection rows of a YOLO folder.

    The labels of `.../images/.../a.jpg` are `.../labels/.../a.txt`; elsewhere they lie beside the image. An empty label
    file says that there is nothing in the image; an image without a label file says nothing, and is a bad row.

    Args:
        folder (`Path`): The data set, with `data.yaml` (`names`) or a list of names (classes.txt, obj.names).
        dataset (`str`): Its name.
        rename (`Mapping[str, str]`): Class names to replace.
        bad (`BadRows`): Gets lines and images that cannot be used.

    Returns:
        `list[Row]`: One an image; `file_name` is relative to `folder`.

    Raises:
        DatasetError: No list of class names, or one that cannot be read.
    """
    names = [rename.get(name, name) for name in yolo_names(folder)]
    images = ImageFinder(folder)
    rows = []
    for path in images.files:
        with bad.collecting():
            labels = labels_of(path, folder)
            if labels is None:
                raise DatasetError(
                    f"{path}: no label file. Add an empty one if the image has no cells, or take it out."
                )
            size = image_size(str(path))
            objects = _read_labels(labels, names, size, bad)
            annotated = {"objects": objects, "annotated_classes": list(dict.fromkeys(names)), "size": size}
            rows.append(images.row(path, dataset, "detection") | annotated)
    return rows


def labels_of(image: Path, root: Path) -> Path | None:
    """The label file of an image: in the `labels` folder that mirrors `images`, else beside it; None without one."""
    parts = list(image.relative_to(root).with_suffix(".txt").parts)
    candidates = []
    for index in reversed(range(len(parts) - 1)):
        if parts[index].lower() == "images":
            candidates.append(root.joinpath(*parts[:index], "labels", *parts[index + 1 :]))
            break
    candidates.append(image.with_suffix(".txt"))
    return next((path for path in candidates if path.is_file()), None)


def yolo_names(folder: Path) -> list[str]:
    """Class names in the order of their numbers.

    Raises:
        DatasetError: No list of them, or one that is broken.
    """
    for path in sorted(folder.rglob("*.yaml")) + sorted(folder.rglob("*.yml")):
        names = _names_of_yaml(path)
        if names:
            return names
    for listed in NAME_LISTS:
        for path in sorted(folder.rglob(listed)):
            names = [line.strip() for line in read_text(path).splitlines() if line.strip()]
            if names:
                return names
    raise DatasetError(
        f"{folder}: no class names: data.yaml with 'names', or one of {', '.join(NAME_LISTS)}, is needed."
    )


def _names_of_yaml(path: Path) -> list[str] | None:
    import yaml

    try:
        content = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise DatasetError(f"{path}:{mark.line + 1 if mark else 1}: broken YAML.") from error
    names: Any = content.get("names") if isinstance(content, dict) else None
    if isinstance(names, dict):
        if sorted(names) != list(range(len(names))):
            raise DatasetError(f"{path}: 'names' must be numbered from 0 without gaps, got {list(names)}.")
        names = [names[number] for number in range(len(names))]
    if names is not None and not isinstance(names, list):
        raise DatasetError(f"{path}: 'names' must be a list or numbered entries, got {type(names).__name__}.")
    return [str(name) for name in names] if names else None


def _read_labels(path: Path, names: list[str], size: tuple[int, int], bad: BadRows) -> dict[str, list]:
    objects: dict[str, list] = {"bbox": [], "category": [], "morphology": [], "iscrowd": []}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        with bad.collecting():
            name, box = _read_line(line.split(), names, size, f"{path}:{number}")
            objects["bbox"].append(box)
            objects["category"].append(name)
            objects["morphology"].append({})
            objects["iscrowd"].append(0)
    return objects


def _read_line(words: list[str], names: list[str], size: tuple[int, int], source: str) -> tuple[str, list[float]]:
    """Class and xywh pixel box of one line: centre and size, or the corners of a polygon, in 0..1 of the image."""
    try:
        number, values = int(words[0]), [float(word) for word in words[1:]]
    except ValueError:
        raise DatasetError(
            f"{source}: a class number and coordinates are needed, got '{' '.join(words[:6])}'."
        ) from None
    if not 0 <= number < len(names):
        raise DatasetError(f"{source}: class {number}, but there are {len(names)} names ({', '.join(names)}).")
    polygon = len(values) >= 6 and len(values) % 2 == 0
    if len(values) != 4 and not polygon:
        raise DatasetError(
            f"{source}: 4 coordinates, or a polygon of 3 or more corners, are needed; got {len(values)}."
        )
    width, height = size
    if polygon:
        xs, ys = values[0::2], values[1::2]
        left, top, w, h = min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)
    else:
        x, y, w, h = values
        left, top = x - w / 2, y - h / 2
    # Pixels instead of fractions are a common mistake, which clipping would hide.
    if max(map(abs, values)) > 2:
        raise DatasetError(f"{source}: coordinates {words[1:5]} are not in 0..1. Divide them by the image's size.")
    return names[number], checked_box([left * width, top * height, w * width, h * height], width, height, source)
