"""What a person changed in another program, read into the result again: GeoJSON, COCO, JSON of Label Studio, an image of
instances, ROIs of ImageJ.

A cell that comes back as it was written is the cell it was, to the last bit. What differs is taken as it came, and said in
`changes` of the result.
"""

import io
import json
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import numpy as np

from unihema.errors import InputError, UniHemaError
from unihema.files import shortened

from ..processing_unihema.image_io import of_any_size
from ..processing_unihema.masks import MOST_PIXELS, polygon_mask, rle_crop
from .cell import LARGEST_NUMBER, LONGEST_TEXT, MOST_MASK_PIXELS, Cell, has, is_list, is_mapping, is_number, is_text
from .export import BOX_KEY, CELL_KEY, LOCAL_FILES, ROI_KEY, geojson_id, import_roifile, label_image, roi_name


if TYPE_CHECKING:
    from .smear_result import SmearResult


# Class of what a person drew without naming it.
UNCLASSIFIED = "unclassified"
# Corners are rounded on the way: QuPath and ImageJ store them in 32 bits, others with two decimals. Boxes that differ by no
# more, in pixels, are the same.
ROUNDING = 0.02
MOST_BYTES = 1 << 29
# Digits of an id that may be a number; a hash in digits stays text.
LONGEST_ID = 19
MOST_CELLS = 1_000_000

Polygons = list[list[np.ndarray]]


@dataclass
class Found:
    """A cell as a file has it.

    Args:
        entry (`str`): Where it stands in the file, for messages.
        number (`int`, *optional*): Of the cell that it was, where the file says so.
        label (`str`, *optional*): Class; `None` where the file does not say.
        polygons (`list`, *optional*): Outline in pixels of the image: polygons, each a list of rings [n, 2]. Without it `box`
            and `mask` are the cell's.
        is_mask (`bool`): Whether the outline is of a mask also where it is a rectangle.
        box (`tuple`, *optional*): x_min, y_min, x_max, y_max, to the last bit where the outline does not say that.
        mask (`np.ndarray`, *optional*): bool, of the pixels of the box.
        score (`float`, *optional*): Detection score.
        attributes (`dict`, *optional*): As of [`Cell`].
    """

    entry: str
    number: int | None = None
    label: str | None = None
    polygons: Polygons | None = None
    is_mask: bool = False
    box: tuple[float, float, float, float] | None = None
    mask: np.ndarray | None = None
    score: float | None = None
    attributes: dict[str, dict[str, Any]] | None = None


def with_cells(result: "SmearResult", found: Sequence[Found]) -> "SmearResult":
    """A result with the cells of a file in place of its own, and what changed.

    Args:
        result ([`SmearResult`]): As it was; it stays so.
        found (`Sequence[Found]`): The cells of the file.

    Raises:
        InputError: An outline that is none, or masks that are too large together.
    """
    if len(found) > MOST_CELLS:
        raise InputError(f"{len(found):,} cells; at most {MOST_CELLS:,} are read.")
    own = {cell.id: cell for cell in result.cells}
    # A copy of a cell has its number too; the first is the cell.
    of_number: dict[int, Found] = {}
    for each in found:
        if each.number in own:
            of_number.setdefault(each.number, each)
    kept, added, changes = {}, [], []
    following = max(own, default=0) + 1
    pixels = 0
    for each in found:
        original = own[each.number] if of_number.get(each.number) is each else None
        try:
            box, mask = _shape(each, original, result)
        except UniHemaError as error:
            raise InputError(f"{each.entry}: {error}") from error
        pixels += 0 if mask is None else mask.size
        if pixels > MOST_MASK_PIXELS:
            raise InputError(f"{each.entry}: the masks up to here have more than {MOST_MASK_PIXELS:,} pixels together.")
        if original is None:
            label = UNCLASSIFIED if each.label is None else each.label
            score = 1.0 if each.score is None else each.score
            added.append(Cell(following, box, label, score, each.attributes or {}, mask))
            changes.append(_change(following, "added", None, label))
            following += 1
            continue
        cell = replace(
            original,
            box=box,
            label=original.label if each.label is None else each.label,
            score=original.score if each.score is None else each.score,
            attributes=original.attributes if each.attributes is None else each.attributes,
            mask=mask,
        )
        if cell.label != original.label:
            # As in a review: what a person says is certain, and how odd it was is of the class before.
            cell.probability, cell.odd = 1.0, None
        kept[cell.id] = cell
        changes += _differences(original, cell)
    for number, cell in own.items():
        if number not in kept:
            changes.append(_change(number, "deleted", cell.label, None))
    cells = [kept[number] for number in own if number in kept] + added
    return replace(result, cells=cells, changes=[*result.changes, *changes])


def _differences(before: "Cell", after: "Cell") -> list[dict[str, Any]]:
    out = []
    if before.label != after.label:
        out.append(_change(before.id, "class", before.label, after.label))
    if before.box != after.box or not _same_mask(before.mask, after.mask):
        out.append(_change(before.id, "shape", None, None))
    if before.score != after.score:
        out.append(_change(before.id, "score", str(before.score), str(after.score)))
    for name in dict.fromkeys((*before.attributes, *after.attributes)):
        was, now = (cell.attributes.get(name, {}).get("value") for cell in (before, after))
        if was != now:
            out.append(_change(before.id, f"attribute {name}", was, now))
    return out


def _change(cell: int, what: str, before: str | None, after: str | None) -> dict[str, Any]:
    return {"cell": cell, "what": what, "before": before, "after": after}


def _same_mask(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    return one is other or (one is not None and other is not None and np.array_equal(one, other))


def _shape(
    found: Found, original: "Cell | None", result: "SmearResult"
) -> tuple[tuple[float, float, float, float], np.ndarray | None]:
    """Box and mask of a cell; those it had where the file shows the same."""
    if found.polygons is None:
        assert found.box is not None
        return found.box, found.mask
    corners = np.concatenate([ring for polygon in found.polygons for ring in polygon])
    (left, top), (right, bottom) = corners.min(0).tolist(), corners.max(0).tolist()
    bounds = (left, top, right, bottom)
    is_box = _is_rectangle(found.polygons)
    if original is not None:
        if original.mask is None or not original.mask.any():
            # A box without area is no rectangle any more.
            if (is_box or left == right or top == bottom) and _near(bounds, original.box):
                return original.box, original.mask
        elif _within(bounds, original.box) and np.array_equal(
            polygon_mask(found.polygons, _pixels(original.box)), original.mask
        ):
            return original.box, original.mask
    if is_box and not found.is_mask:
        return (found.box if found.box is not None and _near(bounds, found.box) else bounds), None
    box = found.box
    # The box that the cell had is that of its outline, unless a person drew it anew.
    if original is not None or box is None or not _within(bounds, box):
        # What was drawn over the edge of the image is not in it.
        box = (max(left, 0.0), max(top, 0.0), min(right, float(result.width)), min(bottom, float(result.height)))
        if box[0] >= box[2] or box[1] >= box[3]:
            raise InputError(f"its outline lies outside the image of {result.width} x {result.height} pixels.")
    return box, polygon_mask(found.polygons, _pixels(box))


def _pixels(box: Sequence[float]) -> tuple[int, int, int, int]:
    return math.floor(box[0]), math.floor(box[1]), math.ceil(box[2]), math.ceil(box[3])


def _near(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(abs(a - b) <= ROUNDING for a, b in zip(one, other, strict=True))


def _within(bounds: Sequence[float], box: Sequence[float]) -> bool:
    """Whether an outline covers pixels of a box only."""
    left, top, right, bottom = _pixels(box)
    low, high = (left - 0.5, top - 0.5), (right + 0.5, bottom + 0.5)
    return bounds[0] > low[0] and bounds[1] > low[1] and bounds[2] < high[0] and bounds[3] < high[1]


def _is_rectangle(polygons: Polygons) -> bool:
    if len(polygons) != 1 or len(polygons[0]) != 1:
        return False
    ring = polygons[0][0]
    ring = ring[:-1] if len(ring) == 5 and np.array_equal(ring[0], ring[-1]) else ring
    if len(ring) != 4:
        return False
    # Each edge goes along one axis.
    steps = np.abs(np.roll(ring, -1, axis=0) - ring) > 0
    return bool((steps.sum(1) == 1).all() and (steps[0] != steps[1]).all())


def read_json(source: Any, what: str) -> tuple[Any, str]:
    """JSON of a file, or what was read of one already, and how it is called in messages."""
    if not isinstance(source, (str, Path)):
        return source, what
    path = Path(source)
    try:
        return json.loads(read_bytes(path).decode("utf-8-sig")), str(path)
    except (ValueError, RecursionError) as error:
        if isinstance(error, UniHemaError):
            raise
        raise InputError(f"{path}: not readable as JSON ({shortened(error)}). Export it again.") from error


def read_bytes(path: Path) -> bytes:
    """A file's bytes.

    Raises:
        InputError: It is missing, no regular file, or too large.
    """
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: not a regular file.")
        if path.stat().st_size > MOST_BYTES:
            raise InputError(f"{path}: larger than {MOST_BYTES >> 20} MB; export fewer cells at once.")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({shortened(error.strerror)}).") from error


def _text(value: Any, entry: str, what: str) -> str:
    if not isinstance(value, str) or len(value) > LONGEST_TEXT:
        raise InputError(f"{entry}: its {what} is {shortened(repr(value), 60)}, and a text is expected.")
    return value


def _number(value: Any, entry: str, what: str) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) <= LARGEST_NUMBER:
        raise InputError(f"{entry}: its {what} is {shortened(repr(value), 60)}, and a number is expected.")
    return float(value)


def _object(value: Any, entry: str, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{entry}: its {what} is {shortened(repr(value), 60)}, and an object is expected.")
    return value


def _list(value: Any, entry: str, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise InputError(f"{entry}: its {what} is {shortened(repr(value), 60)}, and a list is expected.")
    return value


def _ring(points: Any, entry: str) -> np.ndarray:
    corners = [
        [_number(value, entry, "coordinate") for value in _list(point, entry, "corner")[:2]]
        for point in _list(points, entry, "outline")
    ]
    if len(corners) < 3 or any(len(corner) != 2 for corner in corners):
        raise InputError(f"{entry}: an outline has three corners or more, each x and y.")
    return np.array(corners)


def of_geojson(result: "SmearResult", source: Any) -> "SmearResult":
    """See [`SmearResult.with_geojson`]."""
    values, name = read_json(source, "GeoJSON")
    features = values.get("features") if isinstance(values, dict) else values
    if not isinstance(features, list):
        raise InputError(f"{name}: no GeoJSON FeatureCollection. In QuPath: File, Export objects as GeoJSON.")
    numbers = {geojson_id(result, cell.id): cell.id for cell in result.cells}
    mask = geojson_id(result, "mask")
    found = []
    for place, feature in enumerate(features):
        entry = f"{name}: features[{place}]"
        feature = _object(feature, entry, "value")
        properties = feature.get("properties")
        properties = {} if properties is None else _object(properties, entry, "properties")
        classification = properties.get("classification")
        if feature.get("id") == mask or (properties.get("objectType") == "annotation" and classification is None):
            # The mask of the whole image, and regions that a person marked.
            continue
        found.append(_of_feature(feature, properties, numbers, entry))
    # By its id, which QuPath keeps; by its number where another program dropped that.
    known = {each.number for each, by_id in found if by_id}
    for each, by_id in found:
        if not by_id and each.number in known:
            each.number = None
    return with_cells(result, [each for each, _ in found])


def _of_feature(
    feature: dict[str, Any], properties: dict[str, Any], numbers: Mapping[str, int], entry: str
) -> tuple[Found, bool]:
    geometry = _object(feature.get("geometry"), entry, "geometry")
    kind, coordinates = geometry.get("type"), geometry.get("coordinates")
    if kind not in ("Polygon", "MultiPolygon"):
        raise InputError(
            f"{entry}: its geometry is {shortened(repr(kind), 60)}, and a cell is a Polygon or MultiPolygon. Delete it, or take "
            "its class off."
        )
    polygons = [
        [_ring(ring, entry) for ring in _list(polygon, entry, "polygon")]
        for polygon in _list([coordinates] if kind == "Polygon" else coordinates, entry, "coordinates")
    ]
    if not polygons or not all(polygons):
        raise InputError(f"{entry}: its outline is empty. Delete it.")
    metadata = _object(properties.get("metadata") or {}, entry, "metadata")
    measured = properties.get("measurements") or {}
    if isinstance(measured, list):
        # As QuPath wrote them before 0.4.
        measured = {_object(each, entry, "measurement").get("name"): each.get("value") for each in measured}
    measured = _object(measured, entry, "measurements")
    by_id = isinstance(feature.get("id"), str) and feature["id"] in numbers
    stored = metadata.get(CELL_KEY)
    number = numbers[feature["id"]] if by_id else _whole_number(stored)
    attributes = {
        attribute: {
            "value": _text(value, entry, f"attribute {shortened(attribute, 60)}"),
            "score": _number(measured[f"{attribute} score"], entry, "score"),
        }
        for attribute, value in metadata.items()
        if attribute not in (CELL_KEY, BOX_KEY) and f"{attribute} score" in measured
    }
    return Found(
        entry,
        number,
        _class_of(properties.get("classification"), entry),
        polygons,
        BOX_KEY in metadata,
        _stored_box(metadata.get(BOX_KEY)),
        score=_number(measured["score"], entry, "score") if "score" in measured else None,
        # Where a program drops what it does not know, the attributes are those of before.
        attributes=attributes if stored is not None else None,
    ), by_id


def _class_of(classification: Any, entry: str) -> str:
    if classification is None:
        return UNCLASSIFIED
    if isinstance(classification, dict) and "name" not in classification and "names" in classification:
        names = _list(classification["names"], entry, "classification")
        return ": ".join(_text(name, entry, "classification") for name in names)
    return _text(_object(classification, entry, "classification").get("name"), entry, "classification")


def _whole_number(text: Any) -> int | None:
    return int(text) if isinstance(text, str) and re.fullmatch("[0-9]{1,9}", text) else None


def _stored_box(text: Any) -> tuple[float, float, float, float] | None:
    """The box that was written beside an outline; `None` where it says none."""
    try:
        box = json.loads(text) if isinstance(text, str) and len(text) < LONGEST_TEXT else None
    except (ValueError, RecursionError):
        return None
    return _as_box(box)


def _as_box(box: Any) -> tuple[float, float, float, float] | None:
    if not isinstance(box, list) or len(box) != 4:
        return None
    if not all(type(value) in (int, float) and abs(value) <= LARGEST_NUMBER for value in box):
        return None
    return tuple(map(float, box)) if box[0] <= box[2] and box[1] <= box[3] else None


def of_coco(result: "SmearResult", source: Any) -> "SmearResult":
    """See [`SmearResult.with_coco`]."""
    values, name = read_json(source, "COCO")
    values = _object(values, name, "content")
    images, categories, annotations = (
        [
            _object(each, f"{name}: {part}[{place}]", "value")
            for place, each in enumerate(_list(values.get(part), name, part))
        ]
        for part in ("images", "categories", "annotations")
    )
    image = _image_of(result, images, name)
    places = [_key(each.get("id"), f"{name}: images[{place}]") for place, each in enumerate(images)]
    own = _key(image.get("id"), name)
    if places.count(own) > 1:
        raise InputError(f"{name}: {places.count(own)} of its images have the id {own}. Give each its own.")
    names: dict[int | str, str] = {}
    for place, category in enumerate(categories):
        entry = f"{name}: categories[{place}]"
        key, label = _key(category.get("id"), entry), _text(category.get("name"), entry, "name")
        if names.setdefault(key, label) != label:
            raise InputError(f"{entry}: {key} is the id of {names[key]} and of {label}. Give each its own.")
    known = {cell.id: cell for cell in result.cells}
    boxes = np.array([cell.box for cell in result.cells], dtype=np.float64).reshape(-1, 4)
    found = []
    for place, annotation in enumerate(annotations):
        entry = f"{name}: annotations[{place}]"
        of = _key(annotation.get("image_id"), entry)
        if of not in places:
            raise InputError(f"{entry}: its image {of} is not among the images of the file.")
        # A crowd is a region, no cell.
        if of != own or annotation.get("iscrowd") == 1:
            continue
        category = _key(annotation.get("category_id"), entry)
        if category not in names:
            raise InputError(f"{entry}: its category {category} is not among the categories of the file.")
        found.append(_of_annotation(annotation, names[category], result, known, boxes, entry))
    return with_cells(result, found)


def coco_id(value: Any) -> int | str | None:
    """An id of a COCO file, of which programs write one as 7, 7.0 (pandas) and "7" (pylabel); `None` of what is none."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < LONGEST_ID:
        return int(value)
    return value if isinstance(value, (int, str)) and not isinstance(value, bool) else None


def _key(value: Any, entry: str) -> int | str:
    found = coco_id(value)
    if found is None:
        raise InputError(f"{entry}: its id is {shortened(repr(value), 60)}, and a whole number or a text is expected.")
    return found


def _image_of(result: "SmearResult", images: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """The image of a COCO file that a result is of: that of its name, or the only one."""
    wanted = str(result.image).replace("\\", "/")
    named = [image for image in images if isinstance(image.get("file_name"), str)]
    same = [image for image in named if image["file_name"].replace("\\", "/") == wanted] or [
        image for image in named if image["file_name"].replace("\\", "/").split("/")[-1] == wanted.split("/")[-1]
    ]
    same = same or images
    if len(same) != 1:
        raise InputError(
            f"{name}: {len(same)} of its {len(images)} images may be {shortened(wanted)}; one is expected."
        )
    if (same[0].get("width"), same[0].get("height")) != (result.width, result.height):
        raise InputError(
            f"{name}: the image is {same[0].get('width')} x {same[0].get('height')} pixels there, and the result's "
            f"{result.width} x {result.height}. Give the file of this image."
        )
    return same[0]


def _of_annotation(
    annotation: dict[str, Any],
    label: str,
    result: "SmearResult",
    known: Mapping[int, Cell],
    boxes: np.ndarray,
    entry: str,
) -> Found:
    box = _list(annotation.get("bbox"), entry, "bbox")
    if len(box) != 4:
        raise InputError(f"{entry}: its bbox has {len(box)} numbers, and x, y, width and height are expected.")
    x, y, width, height = (_number(value, entry, "bbox") for value in box)
    if width < 0 or height < 0:
        raise InputError(f"{entry}: its bbox is {width} x {height} pixels.")
    own = (x, y, x + width, y + height)
    number = annotation.get("cell_id")
    if type(number) is not int:
        # Of a program that drops what it does not know: by its place.
        near = np.flatnonzero((np.abs(boxes - own) <= ROUNDING).all(1))
        number = result.cells[near[0]].id if len(near) else None
    if number in known and _near(known[number].box, own):
        own = known[number].box
    values = _object(annotation.get("attributes") or {}, entry, "attributes")
    scores = _object(annotation.get("attribute_scores") or {}, entry, "attribute_scores")
    attributes = {
        attribute: {
            "value": _text(values[attribute], entry, "attribute"),
            "score": _number(scores[attribute], entry, "attribute score"),
        }
        for attribute in values
        if attribute in scores
    }
    found = Found(
        entry,
        number,
        label,
        box=own,
        score=_number(annotation["score"], entry, "score") if "score" in annotation else None,
        attributes=attributes if "attribute_scores" in annotation or "cell_id" in annotation else None,
    )
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, dict):
        _fill_from_runs(found, segmentation, result)
    elif segmentation:
        rings = []
        for ring in _list(segmentation, entry, "segmentation"):
            flat = [_number(value, entry, "segmentation") for value in _list(ring, entry, "segmentation")]
            if len(flat) < 6 or len(flat) % 2:
                raise InputError(f"{entry}: a polygon of its segmentation has {len(flat)} numbers.")
            rings.append([np.array(flat).reshape(-1, 2)])
        found.polygons, found.is_mask = rings, True
    return found


def _fill_from_runs(found: Found, code: dict[str, Any], result: "SmearResult") -> None:
    """Lays a mask into the pixels of the annotation's box; the box grows where the mask goes beyond."""
    counts = code.get("counts")
    right_type = isinstance(counts, str) or (
        isinstance(counts, list) and all(type(count) is int and 0 <= count <= LARGEST_NUMBER**2 for count in counts)
    )
    if code.get("size") != [result.height, result.width] or not right_type:
        raise InputError(
            f"{found.entry}: its segmentation is of {shortened(repr(code.get('size')), 60)} pixels, and the image of "
            f"{[result.height, result.width]}."
        )
    try:
        inside, (x, y) = rle_crop(code)
    except InputError as error:
        raise InputError(f"{found.entry}: {error}") from error
    assert found.box is not None
    height, width = inside.shape
    if not inside.size or not _within((x, y, x + width, y + height), found.box):
        if (
            not inside.size
            and math.prod(np.subtract(_pixels(found.box)[2:], _pixels(found.box)[:2]).tolist()) < MOST_PIXELS
        ):
            left, top, right, bottom = _pixels(found.box)
            found.mask = np.zeros((bottom - top, right - left), dtype=bool)
            return
        found.box, found.mask = (float(x), float(y), float(x + width), float(y + height)), inside
        return
    left, top, right, bottom = _pixels(found.box)
    if (right - left) * (bottom - top) > MOST_PIXELS:
        raise InputError(f"{found.entry}: its bbox is larger than a cell's.")
    found.mask = np.zeros((bottom - top, right - left), dtype=bool)
    found.mask[y - top : y - top + height, x - left : x - left + width] = inside


def images_of(content: Any) -> list[list[str]]:
    """Of each image that COCO, or JSON of Label Studio, is about (each entry of `images`, each task), where it may lie.

    Args:
        content (`Any`): What was read of the file.
    """
    if isinstance(content, dict):
        entries = content.get("images")
        entries = entries if isinstance(entries, list) else []
        names = [each.get("file_name") if isinstance(each, dict) else None for each in entries]
        return [
            [name.replace("\\", "/"), *_uploaded(_place_of(name))] if isinstance(name, str) else [] for name in names
        ]
    return [_places_of_task(task) if isinstance(task, dict) else [] for task in content]


def _place_of(place: str) -> str:
    if LOCAL_FILES in place:
        place = unquote(place.partition(LOCAL_FILES)[2])
    # Half a surrogate pair is "?" in a URL.
    place = place.encode(errors="replace").decode()
    # What is no URL, such as "http://[", raises an error.
    with suppress(ValueError):
        place = urlsplit(place).path if "://" in place else place
    return unquote(place).replace("\\", "/")


def _name(place: str) -> str:
    return place.split("/")[-1]


def _places_of_task(task: dict[str, Any]) -> list[str]:
    """Places of the image of a task."""
    data = task.get("data")
    given = [*(data.values() if isinstance(data, dict) else ()), task.get("file_upload")]
    return [each for place in given if isinstance(place, str) for each in _uploaded(_place_of(place))]


def _uploaded(place: str) -> list[str]:
    """A place, and the one without the eight digits that Label Studio puts before the name of a file that was uploaded."""
    return [each for each in (place, re.sub(r"(^|/)[0-9a-f]{8}-([^/]*)$", r"\1\2", place)) if each]


def of_label_studio(result: "SmearResult", source: Any) -> "SmearResult":
    """See [`SmearResult.with_label_studio`]."""
    values, name = read_json(source, "JSON of Label Studio")
    tasks = [_object(task, f"{name}: [{place}]", "value") for place, task in enumerate(_list(values, name, "content"))]
    wanted = _name(_place_of(result.image or "image"))
    same = [place for place, task in enumerate(tasks) if wanted in map(_name, _places_of_task(task))]
    if len(same) != 1:
        raise InputError(f"{name}: {len(same)} of its {len(tasks)} tasks are of {shortened(wanted)}; one is expected.")
    entry = f"{name}: [{same[0]}]"
    annotations = [
        _object(each, f"{entry}.annotations[{place}]", "value")
        for place, each in enumerate(_list(tasks[same[0]].get("annotations"), entry, "annotations"))
    ]
    done = [place for place, each in enumerate(annotations) if not each.get("was_cancelled")]
    if not done:
        raise InputError(f"{entry}: nobody has submitted an annotation. Export the task with its annotations.")
    # The last one is the one that counts, as in Label Studio itself.
    entry = f"{entry}.annotations[{done[-1]}]"
    regions = _list(annotations[done[-1]].get("result"), entry, "result")
    own = {geojson_id(result, cell.id): cell for cell in result.cells}
    found = []
    for place, region in enumerate(regions):
        each = _of_region(_object(region, f"{entry}.result[{place}]", "value"), own, result, f"{entry}.result[{place}]")
        found += [] if each is None else [each]
    # By its id, which Label Studio keeps of a prediction; by its box where another program dropped that.
    used = {each.number for each in found}
    boxes = np.array([cell.box for cell in result.cells], dtype=np.float64).reshape(-1, 4)
    for each in found:
        if each.number is None and each.box is not None:
            near = np.flatnonzero((np.abs(boxes - each.box) <= ROUNDING).all(1)).tolist()
            cell = next((result.cells[at] for at in near if result.cells[at].id not in used), None)
            if cell is not None:
                used.add(cell.id)
                each.number, each.box, each.mask = cell.id, cell.box, cell.mask
    return with_cells(result, found)


def _of_region(region: dict[str, Any], own: Mapping[str, Cell], result: "SmearResult", entry: str) -> Found | None:
    kind = region.get("type")
    if kind in ("rectangle", "polygon", "choices", "textarea", "relation", "labels", "rating", "number"):
        # A shape comes once more with its label; the others are about the whole image.
        return None
    if kind not in ("rectanglelabels", "polygonlabels"):
        raise InputError(
            f"{entry}: it is {shortened(repr(kind), 60)}, and cells are rectangles or polygons with labels (RectangleLabels, "
            "PolygonLabels)."
        )
    size = region.get("original_width"), region.get("original_height")
    if size != (None, None) and size != (result.width, result.height):
        raise InputError(
            f"{entry}: its image is {size[0]} x {size[1]} pixels, and the result's {result.width} x {result.height}."
        )
    value = _object(region.get("value"), entry, "value")
    names = _list(value.get(kind), entry, kind)
    label = _text(names[0], entry, "label") if names else None
    identity = region.get("id")
    cell = own.get(identity) if isinstance(identity, str) else None
    number = None if cell is None else cell.id
    # Per cent of the image.
    across, down = result.width / 100, result.height / 100
    if kind == "polygonlabels":
        corners = _ring(value.get("points"), entry) * (across, down)
        return Found(entry, number, label, [[corners]], is_mask=True)
    x, y, width, height = (_number(value.get(name), entry, name) for name in ("x", "y", "width", "height"))
    turn = math.radians(_number(value.get("rotation") or 0, entry, "rotation"))
    left, top, right, bottom = x * across, y * down, (x + width) * across, (y + height) * down
    if cell is not None and not turn and _near((left, top, right, bottom), cell.box):
        return Found(entry, number, label, box=cell.box, mask=cell.mask)
    if width <= 0 or height <= 0:
        raise InputError(f"{entry}: its rectangle has no area.")
    if turn:
        # Around its first corner.
        corners = np.array([[0, 0], [right - left, 0], [right - left, bottom - top], [0, bottom - top]])
        turned = corners @ np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
        low, high = turned.min(0) + (left, top), turned.max(0) + (left, top)
        left, top, right, bottom = *low.tolist(), *high.tolist()
    box = max(left, 0.0), max(top, 0.0), min(right, float(result.width)), min(bottom, float(result.height))
    if box[0] >= box[2] or box[1] >= box[3]:
        raise InputError(f"{entry}: it lies outside the image of {result.width} x {result.height} pixels.")
    return Found(entry, number, label, box=box)


def of_labels(result: "SmearResult", source: Any, label: str = UNCLASSIFIED) -> "SmearResult":
    """See [`SmearResult.with_labels`]."""

    labels, name = _read_labels(result, source)
    before = label_image(result)
    differs = labels != before
    changed = np.setdiff1d(np.union1d(labels[differs], before[differs]), [0])
    there, shown = set(np.unique(labels).tolist()), set(np.unique(before).tolist())
    own = {cell.id: cell for cell in result.cells}
    # One that others hide altogether has no pixel to change.
    found = [
        Found(f"{name}: {number}", number, box=cell.box, mask=cell.mask)
        for number, cell in own.items()
        if number not in changed and (number in there or number not in shown)
    ]
    ys, xs = np.nonzero(np.isin(labels, changed))
    order = np.argsort(labels[ys, xs], kind="stable")
    ys, xs = ys[order], xs[order]
    numbers, starts = np.unique(labels[ys, xs], return_index=True)
    for number, rows, columns in zip(
        numbers.tolist(), np.split(ys, starts[1:]), np.split(xs, starts[1:]), strict=bool(len(numbers))
    ):
        left, top, right, bottom = int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1
        if (right - left) * (bottom - top) > MOST_PIXELS:
            raise InputError(f"{name}: the pixels of {number} lie further apart than a cell's.")
        mask = np.zeros((bottom - top, right - left), dtype=bool)
        mask[rows - top, columns - left] = True
        kept = number if number in own else None
        box = (float(left), float(top), float(right), float(bottom))
        found.append(Found(f"{name}: {number}", kept, None if kept else label, box=box, mask=mask))
    return with_cells(result, found)


def _read_labels(result: "SmearResult", source: Any) -> tuple[np.ndarray, str]:
    from PIL import Image

    size, name = (result.height, result.width), "labels"
    if isinstance(source, (str, Path)):
        name = str(source)
        content = io.BytesIO(read_bytes(Path(source)))
        try:
            with of_any_size():
                opened = Image.open(content, formats=("PNG", "TIFF"))
            with opened as image:
                pages = getattr(image, "n_frames", 1)
                if pages > 1:
                    raise InputError(
                        f"{name}: {pages} pages, and an image of instances has one. Save that of this image."
                    )
                # The size first: pixels of another one are not decoded.
                source = np.array(image) if image.size[::-1] == size else np.empty((*image.size[::-1], 0))
        except Exception as error:
            if isinstance(error, UniHemaError):
                raise
            # Pillow's readers raise almost anything at damaged files.
            raise InputError(f"{name}: not readable as PNG or TIFF ({shortened(error)}). Save it again.") from error
    labels = np.asarray(source)
    if labels.shape != size:
        raise InputError(
            f"{name}: an image of instances has one number a pixel and is {size[1]} x {size[0]} pixels like the image; this has "
            f"the shape {labels.shape}."
        )
    if labels.dtype.kind not in "uib" or int(labels.min()) < 0 or int(labels.max()) > LARGEST_NUMBER:
        raise InputError(f"{name}: an image of instances has whole numbers from 0 to {LARGEST_NUMBER}.")
    return labels.astype(np.uint32), name


def of_imagej(result: "SmearResult", source: str | Path) -> "SmearResult":
    """See [`SmearResult.with_imagej`]."""
    roifile = import_roifile()
    path = Path(source)
    content = io.BytesIO(read_bytes(path))
    found = []
    try:
        with zipfile.ZipFile(content) as archive:
            entries = [entry for entry in archive.infolist() if not entry.is_dir()]
            if len(entries) > MOST_CELLS or sum(entry.file_size for entry in entries) > MOST_BYTES:
                raise InputError(f"{len(entries):,} entries, or more than {MOST_BYTES >> 20} MB")
            rois = [(entry.filename, archive.read(entry)) for entry in entries]
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError, OSError) as error:
        raise InputError(
            f"{path}: no zip file of ROIs ({shortened(error)}). In ImageJ: ROI Manager, More, Save."
        ) from error
    found = [_of_roi(roi, file, roifile, f"{path}: {shortened(file, 100)}") for file, roi in rois]
    return with_cells(result, found)


def _of_roi(content: bytes, file: str, roifile: Any, entry: str) -> Found:
    kinds = roifile.ROI_TYPE
    try:
        roi = roifile.ImagejRoi.frombytes(content)
        is_box = roi.roitype == kinds.RECT and not roi.composite
        if is_box and roi.subpixelrect:
            x, y, width, height = roi.xd, roi.yd, roi.widthd, roi.heightd
            rings = [np.array([[x, y], [x + width, y], [x + width, y + height], [x, y + height]], dtype=np.float64)]
        else:
            rings = [np.asarray(ring, dtype=np.float64) for ring in roi.coordinates(multi=True)]
    except (ValueError, TypeError, IndexError, OverflowError, AssertionError, struct.error, RuntimeError) as error:
        raise InputError(f"{entry}: no ROI of ImageJ ({shortened(error)}).") from error
    if roi.roitype not in (kinds.RECT, kinds.OVAL, kinds.POLYGON, kinds.FREEHAND, kinds.TRACED):
        raise InputError(f"{entry}: a {roi.roitype.name.lower()} has no inside. Take it out of the ROIs.")
    if not rings or any(len(ring) < 3 for ring in rings):
        raise InputError(f"{entry}: its outline is empty.")
    # Also what is no number is not below.
    if not all((np.abs(ring) <= LARGEST_NUMBER).all() for ring in rings):
        raise InputError(f"{entry}: its outline has corners that are no place in an image.")
    name = roi.name or Path(file).stem
    first, _, label = name.partition(" ")
    number = _whole_number(first)
    if number is None and not re.fullmatch(r"[0-9]+(-[0-9]+)+", name):
        # ImageJ calls by their place what a person did not name.
        label = name
    found = Found(entry, number, label[:LONGEST_TEXT] or None, [rings], not is_box)
    stored = _stored_in_roi(roi.props)
    if stored is not None:
        found.box, found.score, found.attributes = _as_box(stored["box"]), stored["score"], stored["attributes"]
        if number is not None and roi_name(number, stored["label"]) == name:
            found.label = stored["label"]
    return found


_STORED_IN_ROI = has(
    box=is_list(is_number, 4),
    label=is_text,
    score=is_number,
    attributes=is_mapping(has(value=is_text, score=is_number)),
)


def _stored_in_roi(properties: str) -> dict[str, Any] | None:
    """What `to_imagej` wrote into a ROI's properties; `None` where it is not there, or no longer so."""
    line = next((line for line in properties.splitlines() if line.startswith(f"{ROI_KEY}: ")), None)
    try:
        stored = json.loads(line.removeprefix(f"{ROI_KEY}: ")) if line else None
    except (ValueError, RecursionError):
        return None
    return stored if _STORED_IN_ROI(stored) else None


__all__ = [
    "UNCLASSIFIED",
    "coco_id",
    "images_of",
    "of_coco",
    "of_geojson",
    "of_imagej",
    "of_label_studio",
    "of_labels",
    "read_json",
]
