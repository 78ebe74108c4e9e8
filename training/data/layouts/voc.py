"""Pascal VOC: one XML file of boxes for each image."""

import xml.parsers.expat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from unihema.errors import DatasetError
from unihema.files import shortened
from unihema.training.data.layouts.files import (
    ClippedBoxes,
    ImageFinder,
    checked_label,
    image_size,
    read_bytes,
    recorded_size,
)
from unihema.training.data.rows import BadRows, Row, shown


# A field of a thousand cells takes about 300 kB and 10 000 elements.
LARGEST_FILE = 16 << 20
MOST_ELEMENTS = 200_000


@dataclass
class _Element:
    name: str
    line: int
    texts: list[str] = field(default_factory=list)
    children: list["_Element"] = field(default_factory=list)

    def find(self, name: str) -> "_Element | None":
        return next((child for child in self.children if child.name == name), None)

    def value(self, name: str) -> str | None:
        found = self.find(name)
        return "".join(found.texts).strip() or None if found else None


def read_voc(folder: Path, dataset: str, rename: Mapping[str, str], bad: BadRows) -> list[Row]:
    """Detection rows of all VOC files in a folder and its subfolders.

    The image is the one named by `<filename>`, or the one with the XML file's own stem: beside it, in `JPEGImages/` or
    `images/`, or anywhere in the folder under a name that occurs once. Corners are taken as they are, in pixels:
    `[xmin, ymin, xmax - xmin, ymax - ymin]`, of an image of the size in `<size>`, where there is one.

    Args:
        folder (`Path`): The data set.
        dataset (`str`): Its name.
        rename (`Mapping[str, str]`): Class names to replace.
        bad (`BadRows`): Gets files and objects that cannot be used, with their line.

    Returns:
        `list[Row]`: In the order of the XML files; `file_name` is relative to `folder`.
    """
    images = ImageFinder(folder)
    boxes = ClippedBoxes(bad)
    rows = []
    renamed: list[str] = []
    for path in images.listing.named(".xml"):
        with bad.collecting():
            root = _parse(path)
            if root.name == "annotation":
                row = _read_file(path, root, images, boxes, dataset, rename, bad)
                rows.append(row)
                named = root.value("filename")
                if named and PurePosixPath(named.replace("\\", "/")).stem not in (path.stem, Path(row["image"]).stem):
                    renamed.append(f"{path}: <filename> is {shown(named)}")
    if renamed:
        bad.note(
            f"{renamed[0]}, which is not there, so the image of this file's name is read; so in {len(renamed)} of "
            f"{len(rows)} files."
        )
    boxes.report()
    images.report(bad, rows, "annotates it")
    annotated = sorted({name for row in rows for name in row["objects"]["category"]})
    for row in rows:
        row["annotated_classes"] = annotated
    return rows


def _read_file(
    path: Path,
    root: _Element,
    images: ImageFinder,
    boxes: ClippedBoxes,
    dataset: str,
    rename: Mapping[str, str],
    bad: BadRows,
) -> Row:
    image = _image_of(path, root.value("filename"), images)
    size = _size_of(root, image, str(path))
    objects: dict[str, list] = {"bbox": [], "category": [], "morphology": [], "iscrowd": []}
    for element in root.children:
        if element.name != "object":
            continue
        with bad.collecting():
            source = f"{path}:{element.line}: object"
            name = element.value("name")
            corners = element.find("bndbox")
            if not name or corners is None:
                raise DatasetError(f"{source}: <name> and <bndbox> are needed.")
            name = checked_label(name, source)
            box = _box(corners, f"{source} {name}")
            objects["bbox"].append(boxes.checked(box, *size, f"{source} {name}"))
            objects["category"].append(rename.get(name, name))
            objects["morphology"].append({})
            objects["iscrowd"].append(0)
    return images.row(image, dataset, "detection") | {"objects": objects, "size": size}


def _image_of(path: Path, named: str | None, images: ImageFinder) -> str:
    """The image that a file annotates.

    Raises:
        DatasetError: None, or one that `<filename>` names and another that the XML file is named after.
    """
    names: Sequence[str] = [name for name in (named, path.stem) if name]
    image = images.find(names, path, str(path))
    if named and Path(image).stem != path.stem:
        try:
            other = images.find([path.stem], path, str(path))
        except DatasetError:
            return image
        raise DatasetError(
            f"{path}: <filename> is {shown(named)}, but there is an image of this file's name as well ({other}). "
            "Correct <filename>."
        )
    return image


def _size_of(root: _Element, image: str, source: str) -> tuple[int, int]:
    """Width and height that the boxes refer to: those of `<size>`, else of the image."""
    given = root.find("size")
    if given is None:
        return image_size(image)
    values = {key: given.value(key) for key in ("width", "height")}
    # Some programs write 0 for what they do not know.
    if not all((value or "0").strip("0.") for value in values.values()):
        return image_size(image)
    return recorded_size(values, f"{source}: <size>")


def _box(corners: _Element, source: str) -> list[float]:
    values = {name: corners.value(name) for name in ("xmin", "ymin", "xmax", "ymax")}
    try:
        left, top, right, bottom = (float(value) for value in values.values())
    except (TypeError, ValueError):
        raise DatasetError(f"{source}: corners are no numbers: {shown(values)}.") from None
    return [left, top, right - left, bottom - top]


def is_voc(path: Path) -> bool:
    """Whether an XML file has VOC's root element; a broken file counts, so that reading it names what is broken."""
    try:
        return _parse(path).name == "annotation"
    except DatasetError:
        return True


def _parse(path: Path) -> _Element:
    """An XML file with the line of each element.

    Raises:
        DatasetError: Not XML, larger than an annotation is, or with a document type (entities could expand without end).
    """
    content = read_bytes(path, LARGEST_FILE)
    number = 0
    stack: list[_Element] = []
    roots: list[_Element] = []

    def start(name: str, attributes: dict[str, str]) -> None:
        nonlocal number
        number += 1
        if number > MOST_ELEMENTS:
            raise DatasetError(f"{path}: more than {MOST_ELEMENTS} elements, so not read as a VOC annotation.")
        element = _Element(name, parser.CurrentLineNumber)
        (stack[-1].children if stack else roots).append(element)
        stack.append(element)

    def text(characters: str) -> None:
        if stack:
            stack[-1].texts.append(characters)

    def refuse(*_) -> None:
        raise DatasetError(f"{path}:{parser.CurrentLineNumber}: document types are not read. Take <!DOCTYPE ...> out.")

    parser = xml.parsers.expat.ParserCreate()
    parser.buffer_text = True
    parser.StartElementHandler = start
    parser.EndElementHandler = lambda name: stack.pop()
    parser.CharacterDataHandler = text
    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(content, True)
    except xml.parsers.expat.ExpatError as error:
        reason = xml.parsers.expat.ErrorString(error.code)
        raise DatasetError(f"{path}:{error.lineno}: broken XML ({reason}).") from error
    except (LookupError, ValueError) as error:
        if isinstance(error, DatasetError):
            raise
        # An encoding that Python does not have, or cannot take byte by byte.
        raise DatasetError(f"{path}: cannot be read as XML ({shortened(error)}).") from error
    return roots[0]
