"""A result as table rows, COCO and GeoJSON; masks as run lengths (COCO) and as polygons (GeoJSON)."""

import unicodedata
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from unihema.errors import InputError
from unihema.files import printable

from .overlay import class_colors


if TYPE_CHECKING:
    from .smear_result import Cell, SmearResult


CELL_COLUMNS = [
    "image",
    "cell_id",
    "label",
    "score",
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


def cell_columns(attributes: Sequence[str]) -> list[str]:
    """Columns of a cell table: `CELL_COLUMNS`, then value and score of each attribute."""
    return CELL_COLUMNS + [column for name in attributes for column in (name, f"{name}_score")]


def cell_row(result: "SmearResult", cell: "Cell", attributes: Sequence[str]) -> dict[str, Any]:
    """One row of a cell table; positions and sizes in pixels, to a hundredth, and sizes in micrometres where those are known.

    Args:
        result ([`SmearResult`]): The result the cell is of.
        cell ([`Cell`]): The cell.
        attributes (`Sequence[str]`): Attributes to list; `None` stands where the cell has none.
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
                *(round(value, 2) for value in (*cell.box, *cell.center, x_max - x_min, y_max - y_min)),
                *(None if um is None else round(side * um, 2) for side in (x_max - x_min, y_max - y_min)),
            ],
            strict=True,
        )
    )
    for name in attributes:
        attribute = cell.attributes.get(name, {})
        row[name] = attribute.get("value")
        row[f"{name}_score"] = round(attribute["score"], 4) if attribute else None
    return row


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
        }
        if cell.attributes:
            annotation["attributes"] = {name: found["value"] for name, found in cell.attributes.items()}
        if cell.mask is not None:
            annotation["segmentation"] = rle_encode(_in_image(cell, result, cell.mask))
            annotation["area"] = int(cell.mask.sum())
        annotations.append(annotation)
    return {
        "images": [{"id": image_id, "file_name": result.image, "width": result.width, "height": result.height}],
        "categories": [{"id": index, "name": name} for index, name in enumerate(names, 1)],
        "annotations": annotations,
    }


def _in_image(cell: "Cell", result: "SmearResult", mask: np.ndarray) -> np.ndarray:
    left, top = cell.origin
    full = np.zeros((result.height, result.width), dtype=bool)
    visible = mask[: result.height - top, : result.width - left]
    full[top : top + visible.shape[0], left : left + visible.shape[1]] = visible
    return full


def geojson(result: "SmearResult") -> dict[str, Any]:
    """See [`SmearResult.to_geojson`]."""
    colors = class_colors(result.counts)
    features = []
    for cell in result.cells:
        measurements = {"score": cell.score}
        measurements.update({f"{name} score": found["score"] for name, found in cell.attributes.items()})
        features.append(
            _feature(
                _cell_geometry(cell),
                "detection",
                cell.label,
                colors[cell.label],
                f"{result.image}#{cell.id}",
                measurements=measurements,
                metadata={"cell_id": str(cell.id)} | {name: found["value"] for name, found in cell.attributes.items()},
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
        features.append(_feature(geometry, "annotation", label, (0, 160, 160), f"{result.image}#mask"))
    return {"type": "FeatureCollection", "features": features}


def _cell_geometry(cell: "Cell") -> dict[str, Any]:
    if cell.mask is not None and cell.mask.any():
        left, top = cell.origin
        polygons = [
            [[[x + left, y + top] for x, y in ring] for ring in polygon] for polygon in mask_polygons(cell.mask)
        ]
        if len(polygons) == 1:
            return {"type": "Polygon", "coordinates": polygons[0]}
        return {"type": "MultiPolygon", "coordinates": polygons}
    x_min, y_min, x_max, y_max = cell.box
    corners = [[x_min, y_min], [x_max, y_min], [x_max, y_max], [x_min, y_max], [x_min, y_min]]
    return {"type": "Polygon", "coordinates": [corners]}


def _feature(
    geometry: dict[str, Any], object_type: str, label: str, color: Sequence[int], identity: str, **properties: Any
) -> dict[str, Any]:
    """A QuPath object. Its id is a UUID, as QuPath wants, and the same each time for the same object."""
    identity = identity.encode("utf-8", "backslashreplace").decode()
    return {
        "type": "Feature",
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, identity)),
        "geometry": geometry,
        "properties": {
            "objectType": object_type,
            "classification": {"name": label, "color": list(color)},
            **properties,
        },
    }


def rle_encode(mask: np.ndarray) -> dict[str, Any]:
    """Uncompressed COCO run lengths of a mask.

    Args:
        mask (`np.ndarray`): [h, w], nonzero inside.

    Returns:
        `dict`: {"size": [h, w], "counts": lengths of the runs of zeros and ones in turn, column by column}.
    """
    flat = np.asarray(mask).astype(bool).ravel(order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff(np.concatenate(([0], changes, [flat.size]))).tolist()
    if flat.size and flat[0]:
        counts = [0, *counts]
    return {"size": [int(side) for side in np.shape(mask)], "counts": counts}


def rle_decode(code: dict[str, Any]) -> np.ndarray:
    """The mask of `rle_encode`, uint8 [h, w].

    Raises:
        ValueError: The runs do not add up to the size.
    """
    height, width = code["size"]
    counts = np.asarray(code["counts"], dtype=np.int64)
    if counts.sum() != height * width:
        raise InputError(f"Mask runs add up to {counts.sum()} pixels, but its size is {height} x {width}.")
    values = np.arange(len(counts), dtype=np.uint8) % 2
    return np.repeat(values, counts).reshape((height, width), order="F")


def mask_polygons(mask: np.ndarray) -> list[list[list[list[int]]]]:
    """The connected regions of a mask as GeoJSON polygons along pixel edges.

    Args:
        mask (`np.ndarray`): [h, w], nonzero inside; pixels that touch at a corner only are apart.

    Returns:
        `list`: Polygons; each a list of closed rings, the outer one first; each ring a list of [x, y].
    """
    from scipy import ndimage

    regions, _ = ndimage.label(np.asarray(mask).astype(bool))
    polygons = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(regions), 1):
        rings = _rings(regions[rows, columns] == number)
        rings.sort(key=_signed_area, reverse=True)
        polygons.append([[[x + columns.start, y + rows.start] for x, y in ring] for ring in rings])
    return polygons


def _signed_area(ring: list[tuple[int, int]]) -> float:
    """Area with the sign of the ring's direction: positive for an outer ring of `_rings`, negative for a hole."""
    return sum(x1 * y2 - x2 * y1 for (x1, y1), (x2, y2) in zip(ring, ring[1:], strict=False)) / 2


def _rings(mask: np.ndarray) -> list[list[tuple[int, int]]]:
    """Closed rings along the pixel edges of one region, its pixels on the right of the way."""
    padded = np.pad(mask, 1)
    inside, above, left = padded[1:, 1:], padded[:-1, 1:], padded[1:, :-1]
    moves: dict[tuple[int, int], set[tuple[int, int]]] = {}
    for starts, shift, step in (
        (inside & ~above, (0, 0), (1, 0)),  # top edge, eastwards
        (~inside & above, (1, 0), (-1, 0)),  # bottom edge, westwards
        (inside & ~left, (0, 1), (0, -1)),  # left edge, northwards
        (~inside & left, (0, 0), (0, 1)),  # right edge, southwards
    ):
        for y, x in np.argwhere(starts).tolist():
            moves.setdefault((x + shift[0], y + shift[1]), set()).add(step)
    rings = []
    while moves:
        point = start = next(iter(moves))
        step = next(iter(moves[start]))
        ring = [start]
        while True:
            moves[point].discard(step)
            if not moves[point]:
                del moves[point]
            point = (point[0] + step[0], point[1] + step[1])
            if point == start and not (point in moves and (-step[1], step[0]) in moves[point]):
                break
            right = (-step[1], step[0])
            # Where two regions of the background or the mask meet at a corner, the right turn stays at the same pixel.
            following = right if right in moves[point] else next(iter(moves[point]))
            if following != step:
                ring.append(point)
            step = following
        rings.append([*ring, start])
    return rings


__all__ = [
    "CELL_COLUMNS",
    "cell_columns",
    "cell_row",
    "coco",
    "geojson",
    "mask_polygons",
    "rle_decode",
    "rle_encode",
    "table_text",
]
