"""The shape of a cell, from its mask."""

import importlib.util
import math
from typing import Any

import numpy as np


# Columns of a cell table: in pixels, and in micrometres where a pixel's size is known.
SHAPE_COLUMNS = [
    "area",
    "equivalent_diameter",
    "perimeter",
    "circularity",
    "eccentricity",
    "area_um2",
    "equivalent_diameter_um",
    "perimeter_um",
]
# Of white cells whose nucleus was told apart, the ratio of the two areas.
NUCLEUS_COLUMNS = ["nucleus_area", "cytoplasm_area", "nuclear_cytoplasmic_ratio"]


def can_measure() -> bool:
    """Whether scikit-image is installed (the extra `shapes`)."""
    return importlib.util.find_spec("skimage") is not None


def cell_shape(mask: np.ndarray | None, um_per_pixel: float | None = None) -> dict[str, Any]:
    """Measures of a mask, by scikit-image.

    Args:
        mask (`np.ndarray`, *optional*): bool [h, w]; its parts are measured as one.
        um_per_pixel (`float`, *optional*): Size of a pixel in micrometres.

    Returns:
        `dict`: Of each of `SHAPE_COLUMNS` a number, to a hundredth (of ratios, to a ten-thousandth), or `None` where there is
        none: `area` in pixels; `equivalent_diameter` of a circle of that area; `perimeter` by Crofton's formula, holes
        included; `circularity` 4 pi area / perimeter^2, 1 for a circle, less for all else; `eccentricity` of the ellipse with
        the same moments, 0 for a circle; and the lengths and the area in micrometres.
    """
    found: dict[str, Any] = dict.fromkeys(SHAPE_COLUMNS)
    if mask is None or not mask.any():
        return found
    from skimage.measure import regionprops

    # Crofton's formula counts borders, which a mask up to the edge of its box has not.
    (region,) = regionprops(np.pad(mask, 1).astype(np.uint8))
    area, diameter, perimeter = region.area, region.equivalent_diameter_area, region.perimeter_crofton
    found["area"] = int(area)
    found["equivalent_diameter"], found["perimeter"] = round(float(diameter), 2), round(float(perimeter), 2)
    found["circularity"] = round(4 * math.pi * float(area) / float(perimeter) ** 2, 4)
    found["eccentricity"] = round(float(region.eccentricity), 4)
    if um_per_pixel is not None:
        found["area_um2"] = round(float(area) * um_per_pixel**2, 2)
        found["equivalent_diameter_um"] = round(float(diameter) * um_per_pixel, 2)
        found["perimeter_um"] = round(float(perimeter) * um_per_pixel, 2)
    return found


def nucleus_of(cell: np.ndarray, nuclei: np.ndarray) -> dict[str, float] | None:
    """The areas of a cell's nucleus and cytoplasm; `None` where no nucleus is seen in it.

    Args:
        cell (`np.ndarray`): bool `[h, w]`, the cell.
        nuclei (`np.ndarray`): The same place in a mask of nuclei.
    """
    nucleus = int((cell & (nuclei > 0)).sum())
    if not nucleus:
        return None
    return {"nucleus_area": float(nucleus), "cytoplasm_area": float(cell.sum() - nucleus)}


def nucleus_row(areas: dict[str, float] | None) -> dict[str, Any]:
    """Of each of `NUCLEUS_COLUMNS` a number, or `None` where there is none; the ratio is none of a cell that is all nucleus."""
    if areas is None:
        return dict.fromkeys(NUCLEUS_COLUMNS)
    nucleus, cytoplasm = areas["nucleus_area"], areas["cytoplasm_area"]
    return dict(
        zip(
            NUCLEUS_COLUMNS,
            (round(nucleus, 1), round(cytoplasm, 1), round(nucleus / cytoplasm, 3) if cytoplasm > 0 else None),
            strict=True,
        )
    )


__all__ = ["NUCLEUS_COLUMNS", "SHAPE_COLUMNS", "can_measure", "cell_shape", "nucleus_of", "nucleus_row"]
