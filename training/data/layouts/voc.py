"""Pascal VOC: one XML file of boxes for each image."""

import xml.parsers.expat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from unihema.errors import DatasetError
from unihema.training.data.layouts.files import ImageFinder, checked_box, image_size
from unihema.training.data.rows import BadRows, Row


LARGEST_FILE = 64 << 20


@dataclass
class _Element:
    name: str
    line: int
    text: str = ""
    children: list["_Element"] = field(default_factory=list)

    def find(self, name: str) -> "_Element | None":
        return next((child for child in self.children if child.name == name), None)

    def value(self, name: str) -> str | None:
        found = self.find(name)
        return found.text.strip() or None if found else None


def read_voc(folder: Path, dataset: str, rename: Mapping[str, str], bad: BadRows) -> list[Row]:
    """Detection rows of all VOC files in a folder and its subfolders.

    The image is the one named by `<filename>`, or the one with the XML file's own stem: beside it, in `JPEGImages/` or
    `images/`, or anywhere in the folder under a name that occurs once. Corners are taken as they are, in pixels:
    `[xmin, ymin, xmax - xmin, ymax - ymin]`.

    Args:
        folder (`Path`): The data set.
        dataset (`str`): Its name.
        rename (`Mapping[str, str]`): Class names to replace.
        bad (`BadRows`): Gets files and objects that cannot be used, with their line.

    Returns:
        `list[Row]`: In the order of the XML files; `file_name` is relative to `folder`.
    """
    images = ImageFinder(folder)
    rows = []
    for path in sorted(folder.rglob("*.xml")):
        with bad.collecting():
            root = _parse(path)
            if root.name == "annotation":
                rows.append(_read_file(path, root, images, dataset, rename, bad))
    annotated = sorted({name for row in rows for name in row["objects"]["category"]})
    for row in rows:
        row["annotated_classes"] = annotated
    return rows


def _read_file(
    path: Path, root: _Element, images: ImageFinder, dataset: str, rename: Mapping[str, str], bad: BadRows
) -> Row:
    named = root.value("filename")
    image = images.find([name for name in (named, path.stem) if name], path, str(path))
    size = image_size(image)
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
            box = _box(corners, f"{source} {name}")
            objects["bbox"].append(checked_box(box, *size, f"{source} {name}"))
            objects["category"].append(rename.get(name, name))
            objects["morphology"].append({})
            objects["iscrowd"].append(0)
    return images.row(image, dataset, "detection") | {"objects": objects, "size": size}


def _box(corners: _Element, source: str) -> list[float]:
    values = {name: corners.value(name) for name in ("xmin", "ymin", "xmax", "ymax")}
    try:
        left, top, right, bottom = (float(value) for value in values.values())
    except (TypeError, ValueError):
        raise DatasetError(f"{source}: corners are no numbers: {values}.") from None
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
    stack: list[_Element] = []
    roots: list[_Element] = []

    def start(name: str, attributes: dict[str, str]) -> None:
        element = _Element(name, parser.CurrentLineNumber)
        (stack[-1].children if stack else roots).append(element)
        stack.append(element)

    def text(characters: str) -> None:
        if stack:
            stack[-1].text += characters

    def refuse(*_) -> None:
        raise DatasetError(f"{path}:{parser.CurrentLineNumber}: document types are not read. Take <!DOCTYPE ...> out.")

    parser = xml.parsers.expat.ParserCreate()
    parser.buffer_text = True
    parser.StartElementHandler = start
    parser.EndElementHandler = lambda name: stack.pop()
    parser.CharacterDataHandler = text
    parser.StartDoctypeDeclHandler = refuse
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise DatasetError(f"{path}: larger than {LARGEST_FILE >> 20} MB, so not read as a VOC annotation.")
        parser.Parse(path.read_bytes(), True)
    except xml.parsers.expat.ExpatError as error:
        reason = xml.parsers.expat.ErrorString(error.code)
        raise DatasetError(f"{path}:{error.lineno}: broken XML ({reason}).") from error
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error}).") from error
    return roots[0]
