"""A result as table rows, COCO and GeoJSON."""

import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .results_masks import mask_polygons, rle_encode
from .results_overlay import class_colors


if TYPE_CHECKING:
    from .results import Cell, SmearResult


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
]


def cell_columns(attributes: Sequence[str]) -> list[str]:
    """Columns of a cell table: `CELL_COLUMNS`, then value and score of each attribute."""
    return CELL_COLUMNS + [column for name in attributes for column in (name, f"{name}_score")]


def cell_row(result: "SmearResult", cell: "Cell", attributes: Sequence[str]) -> dict[str, Any]:
    """One row of a cell table; positions and sizes in pixels, to a hundredth.

    Args:
        result ([`SmearResult`]): The result the cell is of.
        cell ([`Cell`]): The cell.
        attributes (`Sequence[str]`): Attributes to list; `None` stands where the cell has none.
    """
    x_min, y_min, x_max, y_max = cell.box
    row = dict(
        zip(
            CELL_COLUMNS,
            [
                result.image,
                cell.id,
                cell.label,
                round(cell.score, 4),
                *(round(value, 2) for value in (*cell.box, *cell.center, x_max - x_min, y_max - y_min)),
            ],
            strict=True,
        )
    )
    for name in attributes:
        attribute = cell.attributes.get(name, {})
        row[name] = attribute.get("value")
        row[f"{name}_score"] = round(attribute["score"], 4) if attribute else None
    return row


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
            annotation["segmentation"] = rle_encode(_in_image(cell, result))
            annotation["area"] = int(cell.mask.sum())
        annotations.append(annotation)
    return {
        "images": [{"id": image_id, "file_name": result.image, "width": result.width, "height": result.height}],
        "categories": [{"id": index, "name": name} for index, name in enumerate(names, 1)],
        "annotations": annotations,
    }


def _in_image(cell: "Cell", result: "SmearResult"):
    left, top = cell.origin
    full = np.zeros((result.height, result.width), dtype=bool)
    visible = cell.mask[: result.height - top, : result.width - left]
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


def _feature(geometry, object_type, label, color, identity, **properties) -> dict[str, Any]:
    """A QuPath object. Its id is a UUID, as QuPath wants, and the same each time for the same object."""
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


__all__ = ["CELL_COLUMNS", "cell_columns", "cell_row", "coco", "geojson"]
