"""FiftyOne: the cells of a result as labels of a sample."""

import re

from unihema.errors import PackageMissingError
from unihema.results.smear_result import Cell, SmearResult


try:
    from fiftyone import Detection, Detections
except ImportError as error:
    raise PackageMissingError("FiftyOne is not installed: pip install fiftyone.") from error


def detections(result: SmearResult) -> Detections:
    """The cells of a result as a field of a sample: class, score, box, mask, number (`cell_id`), and each attribute as
    `morphology_` and its name.

    Args:
        result ([`SmearResult`]): The result.
    """
    return Detections(detections=[_detection(cell, result) for cell in result.cells])


def _detection(cell: Cell, result: SmearResult) -> Detection:
    left, top, right, bottom = cell.box
    if cell.mask is not None:
        # A mask covers its box there, and ours the pixels that the box touches.
        (left, top), (height, width) = cell.origin, cell.mask.shape
        right, bottom = left + width, top + height
    # No character but these in the name of a field.
    values = {f"morphology_{re.sub(r'[^0-9a-zA-Z]', '_', name)}": of["value"] for name, of in cell.attributes.items()}
    return Detection(
        label=cell.label,
        confidence=cell.score,
        bounding_box=[
            left / result.width,
            top / result.height,
            (right - left) / result.width,
            (bottom - top) / result.height,
        ],
        mask=cell.mask,
        cell_id=cell.id,
        **values,
    )


__all__ = ["detections"]
