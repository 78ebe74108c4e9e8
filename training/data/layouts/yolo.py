"""YOLO: a text file of boxes (or polygons) for each image, class names in data.yaml or classes.txt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unihema.errors import DatasetError
from unihema.files import shortened
from unihema.training.data.layouts.files import (
    ClippedBoxes,
    DataFiles,
    ImageFinder,
    checked_label,
    image_size,
    read_text,
)
from unihema.training.data.rows import BadRows, Row, shown


NAME_LISTS = ("classes.txt", "obj.names", "_darknet.labels")
# Bytes of a list of names, and of the labels of an image.
LARGEST_LIST = 256 << 10
LARGEST_LABELS = 16 << 20


def read_yolo(folder: Path, dataset: str, rename: Mapping[str, str], bad: BadRows) -> list[Row]:
    """Detection rows of a YOLO folder.

    The labels of `.../images/.../a.jpg` are `.../labels/.../a.txt`; elsewhere they lie beside the image. An empty label
    file says that there is nothing in the image; an image without a label file says nothing, and is a bad row. A folder's
    class names are those listed in it, or in the closest folder above; lists that disagree are an error.

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
    images = ImageFinder(folder)
    lists = ClassLists(folder, images.listing)
    if not lists:
        raise lists.missing()
    boxes = ClippedBoxes(bad)
    rows = []
    used: dict[Path, Path] = {}
    shared: list[Path] = []
    # A folder without names is one error, not one an image.
    without: dict[Path, list[Path]] = {}
    for path in images.files:
        with bad.collecting():
            labels = labels_of(path, folder)
            if labels is None:
                raise DatasetError(
                    f"{path}: no label file. Add an empty one if the image has no cells, or take it out."
                )
            if used.setdefault(labels, path) != path:
                shared.append(path)
            try:
                listed = lists.of(labels.parent)
                names = [rename.get(name, name) for name in listed]
            except DatasetError as error:
                others = without.setdefault(labels.parent, [])
                others.append(path)
                if len(others) == 1:
                    raise DatasetError(f"{error} No image of {labels.parent} can be read.") from error
                continue
            twice = next((name for name in listed if listed.count(name) > 1), None)
            if twice is not None:
                bad.note(
                    f"{labels.parent}: the list of class names has {twice} twice. Both numbers are read as {twice}."
                )
            size = image_size(str(path))
            objects = _read_labels(labels, names, size, boxes, bad)
            annotated = {"objects": objects, "annotated_classes": list(dict.fromkeys(names)), "size": size}
            rows.append(images.row(path, dataset, "detection") | annotated)
    for path in images.listing.named(".txt"):
        with bad.collecting():
            if path not in used and path.name not in NAME_LISTS and _has_boxes(path):
                raise DatasetError(f"{path}: no image of this name. Put it there, or take the labels out.")
    if shared:
        labels = labels_of(shared[0], folder)
        bad.note(
            f"{labels}: the labels of {used[labels].name} and of {shared[0].name}. {len(shared)} images share their labels "
            "with another, and each is read."
        )
    boxes.report()
    images.report(bad)
    return rows


def _has_boxes(path: Path) -> bool:
    """Whether a text file begins with a class number and coordinates."""
    lines = read_text(path, LARGEST_LABELS).split("\n", 1)
    words = lines[0].split()
    return len(words) >= 5 and words[0].isdecimal() and all(_is_number(word) for word in words[1:5])


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


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


@dataclass
class _List:
    path: Path
    names: list[str]


class ClassLists:
    """Class names of the folders of a YOLO data set, in the order of their numbers.

    Args:
        root (`Path`): The data set.
        listing (`DataFiles`, *optional*): Its files.

    Raises:
        DatasetError: A list that is broken.
    """

    def __init__(self, root: Path, listing: DataFiles | None = None):
        self.root = root
        files = (listing or DataFiles(root)).files
        self._lists: dict[Path, list[_List]] = {}
        for path in files:
            names = None
            if path.suffix.lower() in (".yaml", ".yml"):
                names = _names_of_yaml(path)
            elif path.name in NAME_LISTS:
                lines = [line.strip() for line in read_text(path, LARGEST_LIST).splitlines()]
                names = [checked_label(line, str(path)) for line in lines if line]
            if names:
                self._lists.setdefault(path.parent, []).append(_List(path, names))

    def __bool__(self) -> bool:
        return bool(self._lists)

    def missing(self) -> DatasetError:
        """The error of a data set without names."""
        return DatasetError(
            f"{self.root}: no class names: data.yaml with 'names', or one of {', '.join(NAME_LISTS)}, is needed."
        )

    def of(self, folder: Path) -> list[str]:
        """The names that count in a folder.

        Raises:
            DatasetError: None, or lists that disagree in this folder and those above it.
        """
        found = []
        for place in (folder, *folder.parents):
            found += self._lists.get(place, ())
            if place == self.root:
                break
        if not found:
            # One list for all, somewhere beside the labels.
            found = [entry for entries in self._lists.values() for entry in entries]
        if not found:
            raise self.missing()
        for other in found[1:]:
            if other.names != found[0].names:
                raise DatasetError(
                    f"{folder}: class names differ: {found[0].path} has {_listed(found[0].names)}, {other.path} has "
                    f"{_listed(other.names)}. Take the wrong list out."
                )
        return found[0].names


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


def _names_of_yaml(path: Path) -> list[str] | None:
    """`names` of a YAML file: the text as it stands (YAML would make a truth value of a class called No).

    Raises:
        DatasetError: Broken, or names that are no list, have gaps, or are another number than `nc`.
    """
    import yaml

    try:
        root = yaml.compose(read_text(path, LARGEST_LIST), Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise DatasetError(f"{path}:{mark.line + 1 if mark else 1}: broken YAML.") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(f"{path}: cannot be read as YAML ({shortened(error)}).") from error
    if not isinstance(root, yaml.MappingNode):
        return None
    nodes = {key.value: value for key, value in root.value if isinstance(key, yaml.ScalarNode)}
    given = nodes.get("names")
    if given is None:
        return None
    if isinstance(given, yaml.MappingNode):
        numbered = [(key.value if isinstance(key, yaml.ScalarNode) else None, value) for key, value in given.value]
        numbers = [int(key) if isinstance(key, str) and key.isdecimal() and len(key) < 6 else -1 for key, _ in numbered]
        if sorted(numbers) != list(range(len(numbers))):
            raise DatasetError(
                f"{path}: 'names' must be numbered from 0 without gaps, got {shown([key for key, _ in numbered])}."
            )
        entries: list[Any] = [value for _, (_, value) in sorted(zip(numbers, numbered), key=lambda pair: pair[0])]
    elif isinstance(given, yaml.SequenceNode):
        entries = given.value
    else:
        raise DatasetError(f"{path}: 'names' must be a list or numbered entries, got {shown(given.value)}.")
    if not all(isinstance(entry, yaml.ScalarNode) for entry in entries):
        raise DatasetError(f"{path}: 'names' must be texts.")
    names = [checked_label(entry.value, f"{path}: names") for entry in entries]
    count = nodes.get("nc")
    if names and isinstance(count, yaml.ScalarNode) and count.value != str(len(names)):
        raise DatasetError(f"{path}: nc is {shown(count.value)}, but there are {len(names)} names.")
    return names or None


def _read_labels(
    path: Path, names: list[str], size: tuple[int, int], boxes: ClippedBoxes, bad: BadRows
) -> dict[str, list]:
    objects: dict[str, list] = {"bbox": [], "category": [], "morphology": [], "iscrowd": []}
    for number, line in enumerate(read_text(path, LARGEST_LABELS).splitlines(), start=1):
        if not line.strip():
            continue
        with bad.collecting():
            name, box = _read_line(line.split(), names, size, boxes, f"{path}:{number}")
            objects["bbox"].append(box)
            objects["category"].append(name)
            objects["morphology"].append({})
            objects["iscrowd"].append(0)
    return objects


def _read_line(
    words: list[str], names: list[str], size: tuple[int, int], boxes: ClippedBoxes, source: str
) -> tuple[str, list[float]]:
    """Class and xywh pixel box of one line: centre and size, or the corners of a polygon, in 0..1 of the image."""
    try:
        number, values = int(words[0]), [float(word) for word in words[1:]]
    except ValueError:
        raise DatasetError(
            f"{source}: a class number and coordinates are needed, got {shown(' '.join(words[:6]))}."
        ) from None
    if not 0 <= number < len(names):
        raise DatasetError(f"{source}: class {shown(number)}, but there are {len(names)} names ({_listed(names)}).")
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
        raise DatasetError(
            f"{source}: coordinates {shown(words[1:5])} are not in 0..1. Divide them by the image's size."
        )
    return names[number], boxes.checked([left * width, top * height, w * width, h * height], width, height, source)
