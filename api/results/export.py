"""A result in the forms of other programs: table rows, COCO, GeoJSON, an image of instances, ROIs of ImageJ, Label Studio,
supervision.

`edits.py` reads them again.
"""

import io
import json
import unicodedata
import uuid
import zipfile
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import numpy as np

from unihema.errors import PackageMissingError, RequestError
from unihema.files import printable

from ..processing_unihema.masks import mask_polygons, rle_in_image
from .overlay import class_colors
from .shapes import NUCLEUS_COLUMNS, SHAPE_COLUMNS, cell_shape, nucleus_row


if TYPE_CHECKING:
    import supervision

    from .cell import Cell
    from .smear_result import SmearResult


CELL_COLUMNS = [
    "image",
    "cell_id",
    "label",
    "score",
    "probability",
    "odd",
    "x_min",
    "y_min",
    "x_max",
    "y_max",
    "centroid_x",
    "centroid_y",
    "width",
    "height",
    "width_um",
    "height_um",
]
# What detection called a cell, and what its crop alone says.
SECOND_LOOK_COLUMNS = ["detection_label", "second_look", "second_look_score"]
# Forms of other programs that a result can be written in, each as one file; see `as_file`.
FORMATS = ("geojson", "coco", "labels", "imagej", "label_studio")
# Metadata of a cell in GeoJSON beside its attributes: its number, and the box that its outline does not say.
CELL_KEY, BOX_KEY = "unihema cell", "unihema box"
# Key of what a ROI's properties say of a cell, as JSON.
ROI_KEY = "unihema"
# Where Label Studio serves files of its own machine: below `LOCAL_FILES_DOCUMENT_ROOT`.
LOCAL_FILES = "/data/local-files/?d="
# Kind of a region in Label Studio -> the tag of its labelling configuration that draws it, and the name of that.
REGION_TAGS = {"rectanglelabels": ("RectangleLabels", "box"), "polygonlabels": ("PolygonLabels", "outline")}
NOT_IN_XML = {0xFFFE: "?", 0xFFFF: "?"}
# Of an image of instances. 16 bits hold 65 535 cells.
MOST_LABEL_PIXELS = 1 << 29
# Bytes of masks as large as the image, as supervision has them.
MOST_DENSE_MASKS = 1 << 30
# ImageJ wraps what is beyond.
LARGEST_ROI = 60_000


def cell_columns(
    attributes: Sequence[str], shapes: bool = False, nuclei: bool = False, second_look: bool = False
) -> list[str]:
    """Columns of a cell table: `CELL_COLUMNS`, with `shapes` `SHAPE_COLUMNS`, with `nuclei` `NUCLEUS_COLUMNS`, with
    `second_look` `SECOND_LOOK_COLUMNS`, then value and score of each attribute."""
    of_attributes = [column for name in attributes for column in (name, f"{name}_score")]
    of_looks = SECOND_LOOK_COLUMNS if second_look else []
    return (
        CELL_COLUMNS
        + (SHAPE_COLUMNS if shapes else [])
        + (NUCLEUS_COLUMNS if nuclei else [])
        + of_looks
        + of_attributes
    )


def cell_row(
    result: "SmearResult",
    cell: "Cell",
    attributes: Sequence[str],
    shapes: bool = False,
    nuclei: bool = False,
    second_look: bool = False,
) -> dict[str, Any]:
    """One row of a cell table; positions and sizes in pixels, to a hundredth, and sizes in micrometres where those are known.

    Args:
        result ([`SmearResult`]): The result the cell is of.
        cell ([`Cell`]): The cell.
        attributes (`Sequence[str]`): Attributes to list; `None` stands where the cell has none.
        shapes (`bool`): Measure the mask, see `cell_shape`.
        nuclei (`bool`): Give the areas of nucleus and cytoplasm, see `nucleus_row`.
    """
    x_min, y_min, x_max, y_max = cell.box
    um = result.um_per_pixel
    row = dict(
        zip(
            CELL_COLUMNS,
            [
                result.image,
                cell.id,
                cell.label,
                round(cell.score, 4),
                cell.probability,
                cell.odd,
                *(round(value, 2) for value in (*cell.box, *cell.center, x_max - x_min, y_max - y_min)),
                *(None if um is None else round(side * um, 2) for side in (x_max - x_min, y_max - y_min)),
            ],
            strict=True,
        )
    )
    if shapes:
        row |= cell_shape(cell.mask, um)
    if nuclei:
        row |= nucleus_row(cell.nucleus)
    if second_look:
        look = cell.second_look or {}
        score = None if cell.second_look is None else round(look["score"], 4)
        row |= dict(zip(SECOND_LOOK_COLUMNS, (look.get("detection"), look.get("label"), score), strict=True))
    for name in attributes:
        attribute = cell.attributes.get(name, {})
        row[name] = attribute.get("value")
        row[f"{name}_score"] = round(attribute["score"], 4) if attribute else None
    return row


def in_characters(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose texts every table can hold: names of files may have what is no character, which is written as an escape."""
    return {
        name: value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value
        for name, value in row.items()
    }


def table_text(value: Any) -> Any:
    """A value of a table: text in one line that every spreadsheet takes for text, anything else as it is.

    Control characters and line ends are written as escapes such as `\\n`. An apostrophe goes before what spreadsheets would
    take for a formula, as it does in what is typed into them.
    """
    if not isinstance(value, str):
        return value
    text = printable(value)
    first = unicodedata.normalize("NFKC", value[:1])
    return f"'{text}" if first and first in "=+-@" else text


def coco(result: "SmearResult", image_id: int, first_annotation_id: int) -> dict[str, Any]:
    """See [`SmearResult.to_coco`]."""
    names = list(result.counts)
    annotations = []
    for number, cell in enumerate(result.cells, first_annotation_id):
        x_min, y_min, x_max, y_max = cell.box
        annotation = {
            "id": number,
            "image_id": image_id,
            "category_id": names.index(cell.label) + 1,
            "bbox": [x_min, y_min, x_max - x_min, y_max - y_min],
            "area": (x_max - x_min) * (y_max - y_min),
            "iscrowd": 0,
            "score": cell.score,
            "cell_id": cell.id,
        }
        if cell.attributes:
            annotation["attributes"] = {name: found["value"] for name, found in cell.attributes.items()}
            annotation["attribute_scores"] = {name: found["score"] for name, found in cell.attributes.items()}
        if cell.mask is not None:
            annotation["segmentation"] = rle_in_image(cell.mask, cell.origin, (result.height, result.width))
            annotation["area"] = int(cell.mask.sum())
        annotations.append(annotation)
    return {
        "images": [{"id": image_id, "file_name": result.image, "width": result.width, "height": result.height}],
        "categories": [{"id": index, "name": name} for index, name in enumerate(names, 1)],
        "annotations": annotations,
    }


def geojson(result: "SmearResult") -> dict[str, Any]:
    """See [`SmearResult.to_geojson`]."""
    colors = class_colors(result.counts)
    features = []
    for cell in result.cells:
        measurements = {"score": cell.score}
        measurements.update({f"{name} score": found["score"] for name, found in cell.attributes.items()})
        if cell.nucleus is not None:
            of_nucleus = nucleus_row(cell.nucleus).items()
            measurements.update({name.replace("_", " "): value for name, value in of_nucleus if value is not None})
        polygons = outline(cell)
        metadata = {CELL_KEY: str(cell.id)}
        if polygons:
            metadata[BOX_KEY] = json.dumps(cell.box)
        metadata |= {name: found["value"] for name, found in cell.attributes.items()}
        features.append(
            _feature(
                _geometry(polygons or [[box_ring(cell)]]),
                "detection",
                cell.label,
                colors[cell.label],
                geojson_id(result, cell.id),
                measurements=measurements,
                metadata=metadata,
            )
        )
    if result.mask is not None and result.mask.any():
        scale_x, scale_y = result.width / result.mask.shape[1], result.height / result.mask.shape[0]
        polygons = [
            [[[x * scale_x, y * scale_y] for x, y in ring] for ring in polygon]
            for polygon in mask_polygons(result.mask)
        ]
        label = result.mask_label or "mask"
        geometry = {"type": "MultiPolygon", "coordinates": polygons}
        features.append(_feature(geometry, "annotation", label, (0, 160, 160), geojson_id(result, "mask")))
    return {"type": "FeatureCollection", "features": features}


def outline(cell: "Cell") -> list[list[list[list[float]]]]:
    """The polygons of a cell's mask in pixels of the image, none where it has no mask or an empty one."""
    if cell.mask is None:
        return []
    left, top = cell.origin
    return [[[[x + left, y + top] for x, y in ring] for ring in polygon] for polygon in mask_polygons(cell.mask)]


def box_ring(cell: "Cell") -> list[list[float]]:
    """The corners of a cell's box, the first one twice."""
    x_min, y_min, x_max, y_max = cell.box
    return [[x_min, y_min], [x_max, y_min], [x_max, y_max], [x_min, y_max], [x_min, y_min]]


def _geometry(polygons: list[list[list[list[float]]]]) -> dict[str, Any]:
    if len(polygons) == 1:
        return {"type": "Polygon", "coordinates": polygons[0]}
    return {"type": "MultiPolygon", "coordinates": polygons}


def geojson_id(result: "SmearResult", part: int | str) -> str:
    """Id of a cell, by its number, or of the mask, as a QuPath object: a UUID, the same each time."""
    identity = f"{result.image}#{part}".encode("utf-8", "backslashreplace").decode()
    return str(uuid.uuid5(uuid.NAMESPACE_URL, identity))


def _feature(
    geometry: dict[str, Any], object_type: str, label: str, color: Sequence[int], identity: str, **properties: Any
) -> dict[str, Any]:
    return {
        "type": "Feature",
        "id": identity,
        "geometry": geometry,
        "properties": {
            "objectType": object_type,
            "classification": {"name": label, "color": list(color)},
            **properties,
        },
    }


def label_image(result: "SmearResult") -> np.ndarray:
    """See [`SmearResult.to_labels`]."""
    if result.width * result.height > MOST_LABEL_PIXELS:
        raise RequestError(
            f"{result.image or 'image'}: an image of instances would have {result.width} x {result.height} pixels, more than "
            f"{MOST_LABEL_PIXELS:,}. Use GeoJSON."
        )
    largest = max((cell.id for cell in result.cells), default=0)
    labels = np.zeros((result.height, result.width), dtype=np.uint16 if largest < 1 << 16 else np.uint32)
    for cell in sorted(result.cells, key=lambda cell: -cell.score):
        part, inside = cell_part(labels, cell)
        part[inside & (part == 0)] = cell.id
    return labels


def cell_part(image: np.ndarray, cell: "Cell") -> tuple[np.ndarray, np.ndarray]:
    """The part of an image [h, w] that a cell's box covers, as a view, and which of its pixels are the cell's: those of its
    mask, all without one."""
    left, top = cell.origin
    right, bottom = (int(np.ceil(side)) for side in cell.box[2:])
    part = image[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)]
    if cell.mask is None:
        return part, np.ones(part.shape, dtype=bool)
    return part, cell.mask[max(-top, 0) :, max(-left, 0) :][: part.shape[0], : part.shape[1]]


def labels_suffix(labels: np.ndarray) -> str:
    """`.png`, or `.tif` for what a PNG does not hold: more than 16 bits."""
    return ".png" if labels.dtype == np.uint16 else ".tif"


def write_labels(labels: np.ndarray, file: Any) -> None:
    """Writes an image of instances as 16-bit PNG, or as 32-bit TIFF.

    Args:
        labels (`np.ndarray`): uint16 or uint32 [h, w].
        file (`IO[bytes]`): To write to.
    """
    from PIL import Image

    image = Image.fromarray(labels if labels.dtype == np.uint16 else labels.astype(np.int32))
    image.save(file, "PNG" if labels.dtype == np.uint16 else "TIFF", compression="tiff_lzw")


def roi_name(number: int, label: str) -> str:
    """Name of a cell as a ROI: its number and class. Characters that ImageJ's files do not hold are replaced."""
    text = "".join(each if ord(each) < 1 << 16 else "?" for each in printable(label))
    return f"{number} {text}"


def imagej(result: "SmearResult") -> bytes:
    """See [`SmearResult.to_imagej`]."""
    roifile = import_roifile()
    if max(result.width, result.height) > LARGEST_ROI:
        raise RequestError(
            f"{result.image or 'image'}: ImageJ's ROIs reach to {LARGEST_ROI} pixels, and the image has {result.width} x "
            f"{result.height}. Use GeoJSON."
        )
    colors = class_colors(result.counts)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for cell in result.cells:
            roi = _roi(cell, roifile)
            roi.name = roi_name(cell.id, cell.label)
            roi.stroke_color = bytes([255, *colors[cell.label]])
            stored = {"box": cell.box, "label": cell.label, "score": cell.score, "attributes": cell.attributes}
            # As text without a line end, which would end a property.
            roi.props = f"{ROI_KEY}: {json.dumps(stored)}\n"
            file = "".join(each if each.isalnum() or each in " -_" else "_" for each in roi.name)[:80]
            # Dated as zip files are without a date: the same result is the same bytes.
            archive.writestr(zipfile.ZipInfo(f"{file}.roi"), roi.tobytes(), zipfile.ZIP_DEFLATED)
    return packed.getvalue()


def _roi(cell: "Cell", roifile: Any) -> Any:
    rings = [ring[:-1] for polygon in outline(cell) for ring in polygon]
    if len(rings) == 1:
        roi = roifile.ImagejRoi.frompoints(np.asarray(rings[0]))
        roi.roitype = roifile.ROI_TYPE.TRACED
        return roi
    x_min, y_min, x_max, y_max = cell.box
    roi = roifile.ImagejRoi(roitype=roifile.ROI_TYPE.RECT, left=cell.origin[0], top=cell.origin[1])
    roi.right, roi.bottom = int(np.ceil(x_max)), int(np.ceil(y_max))
    if rings:
        # A path: go to (0), lines to (1), close (4).
        path = [[(0.0, *ring[0]), *((1.0, *point) for point in ring[1:]), (4.0,)] for ring in rings]
        roi.multi_coordinates = np.array([value for ring in path for step in ring for value in step], dtype=np.float32)
        roi.shape_roi_size = len(roi.multi_coordinates)
    else:
        roi.options = roifile.ROI_OPTIONS.SUB_PIXEL_RESOLUTION
        roi.xd, roi.yd, roi.widthd, roi.heightd = x_min, y_min, x_max - x_min, y_max - y_min
    return roi


def import_roifile() -> Any:
    """The package that reads and writes ImageJ's ROIs."""
    try:
        import roifile
    except ImportError as error:
        raise PackageMissingError("ROIs of ImageJ need the extra `imagej`: pip install 'unihema[imagej]'.") from error
    return roifile


def label_studio(result: "SmearResult", image: str | None = None) -> list[dict[str, Any]]:
    """See [`SmearResult.to_label_studio`]."""
    regions = []
    for cell in result.cells:
        rings = [ring for polygon in outline(cell) for ring in polygon]
        # A polygon there is one ring; a mask of several parts, or with holes, is shown by its box.
        kind = "polygonlabels" if len(rings) == 1 else "rectanglelabels"
        corners = rings[0][:-1] if len(rings) == 1 else [cell.box[:2], cell.box[2:]]
        # Per cent of the image.
        points = [[100 * x / result.width, 100 * y / result.height] for x, y in corners]
        value: dict[str, Any] = {"points": points, "closed": True}
        if kind == "rectanglelabels":
            (x, y), (right, bottom) = points
            value = {"x": x, "y": y, "width": right - x, "height": bottom - y, "rotation": 0}
        regions.append(
            {
                "id": geojson_id(result, cell.id),
                "type": kind,
                "from_name": REGION_TAGS[kind][1],
                "to_name": "image",
                "original_width": result.width,
                "original_height": result.height,
                "image_rotation": 0,
                "score": cell.score,
                "value": value | {kind: [cell.label]},
            }
        )
    prediction: dict[str, Any] = {"model_version": "UniHema", "result": regions}
    if regions:
        prediction["score"] = float(np.mean([cell.score for cell in result.cells]))
    place = image or LOCAL_FILES + quote((result.image or "image").replace("\\", "/"), errors="replace")
    return [{"data": {"image": place}, "predictions": [prediction]}]


def label_studio_config(classes: Iterable[str]) -> str:
    """The labelling configuration of a project of Label Studio for what `to_label_studio` writes: classes as rectangles and as
    polygons.

    Args:
        classes (`Iterable[str]`): Their names.
    """
    # The two that `printable` leaves and XML does not take.
    labels = [
        f"<Label value={quoteattr(printable(name).translate(NOT_IN_XML))} background={quoteattr('#' + bytes(color).hex())}/>"
        for name, color in class_colors(classes).items()
    ]
    controls = [
        f'  <{tag} name="{name}" toName="image">\n    ' + "\n    ".join(labels) + f"\n  </{tag}>"
        for tag, name in REGION_TAGS.values()
    ]
    return "\n".join(['<View>\n  <Image name="image" value="$image" zoom="true"/>', *controls, "</View>\n"])


def supervision_detections(result: "SmearResult") -> "supervision.Detections":
    """See [`SmearResult.to_supervision`]."""
    try:
        import supervision
    except ImportError as error:
        raise PackageMissingError("supervision is not installed: pip install 'unihema[supervision]'.") from error
    names, cells = list(result.counts), result.cells
    masks = None
    if cells and all(cell.mask is not None for cell in cells):
        if len(cells) * result.height * result.width > MOST_DENSE_MASKS:
            raise RequestError(
                f"{result.image or 'image'}: supervision holds a mask of {result.width} x {result.height} pixels for each of "
                f"{len(cells)} cells, more than {MOST_DENSE_MASKS >> 30} GB. Take the masks off the cells, or use COCO."
            )
        masks = np.zeros((len(cells), result.height, result.width), dtype=bool)
        for mask, cell in zip(masks, cells, strict=True):
            part, inside = cell_part(mask, cell)
            part[...] = inside
    return supervision.Detections(
        xyxy=np.array([cell.box for cell in cells], dtype=np.float64).reshape(-1, 4),
        mask=masks,
        confidence=np.array([cell.score for cell in cells], dtype=np.float64),
        class_id=np.array([names.index(cell.label) for cell in cells], dtype=np.int64),
        data={
            "class_name": np.array([cell.label for cell in cells], dtype=str),
            "cell_id": np.array([cell.id for cell in cells], dtype=np.int64),
            **{
                name: np.array([cell.attributes.get(name, {}).get("value", "") for cell in cells], dtype=str)
                for name in dict.fromkeys(name for cell in cells for name in cell.attributes)
            },
        },
    )


def as_file(result: "SmearResult", form: str) -> tuple[str, bytes]:
    """A result as the file of another program.

    Args:
        result ([`SmearResult`]): The result.
        form (`str`): One of `FORMATS`.

    Returns:
        `tuple[str, bytes]`: Ending of the file's name, and its content.

    Raises:
        RequestError: The image is too large for the form.
        PackageMissingError: The form needs an extra.
    """
    if form == "geojson":
        return ".geojson", json.dumps(geojson(result), ensure_ascii=False).encode()
    if form == "coco":
        return "_coco.json", json.dumps(coco(result, 1, 1)).encode()
    if form == "imagej":
        return "_rois.zip", imagej(result)
    if form == "label_studio":
        return "_label_studio.json", json.dumps(label_studio(result)).encode()
    labels, file = label_image(result), io.BytesIO()
    write_labels(labels, file)
    return f"_labels{labels_suffix(labels)}", file.getvalue()


__all__ = [
    "CELL_COLUMNS",
    "FORMATS",
    "as_file",
    "cell_columns",
    "cell_row",
    "coco",
    "geojson",
    "imagej",
    "in_characters",
    "label_image",
    "label_studio",
    "label_studio_config",
    "supervision_detections",
    "table_text",
    "write_labels",
]
