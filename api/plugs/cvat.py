"""CVAT: the cells of a task's images, by `cvat-cli task auto-annotate ID --function-module unihema.plugs.cvat`."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from unihema.analyzer import Analyzer
from unihema.errors import PackageMissingError
from unihema.results.export import outline
from unihema.results.smear_result import Cell


try:
    import cvat_sdk.auto_annotation as cvat
    from cvat_sdk import models
    from cvat_sdk.masks import encode_mask
except ImportError as error:
    raise PackageMissingError("cvat-sdk is not installed: pip install 'unihema[cvat]'.") from error


class DetectionFunction:
    """Finds cells as CVAT's auto-annotation asks for them: rectangles, or masks of a checkpoint that gives each cell one.

    Args:
        checkpoint (`str`): As of [`Analyzer.from_pretrained`].
        device (`str`): As there.
        attributes (`bool`): Give morphology as attributes too; the labels of the task then need them.
        **asked: `prompt`, `tiles`, `um_per_pixel` and others of [`Analyzer`].
    """

    def __init__(self, checkpoint: str, device: str = "auto", attributes: bool = False, **asked: Any):
        self.analyzer, self.asked = Analyzer.from_pretrained(checkpoint, device=device), asked
        config = self.analyzer.model.config
        self.labels = {name: number for number, name in enumerate(config.class_names)}
        self.morphology = list(config.morphology.items()) if attributes else []
        self.gives_masks = bool(config.trained.cell_masks)

    @cached_property
    def spec(self) -> cvat.DetectionFunctionSpec:
        """Labels and attributes, which CVAT matches with those of the task by their names."""
        kind = "mask" if self.gives_masks else "rectangle"
        attributes = [
            cvat.select_attribute_spec(name, number, list(values))
            for number, (name, values) in enumerate(self.morphology)
        ]
        labels = [
            cvat.label_spec(name, number, type=kind, attributes=attributes) for name, number in self.labels.items()
        ]
        return cvat.DetectionFunctionSpec(labels=labels)

    def detect(self, context: cvat.DetectionFunctionContext, image: Image.Image) -> list[models.LabeledShapeRequest]:
        """The cells of an image."""
        result = self.analyzer(image, "detection", threshold=context.conf_threshold, **self.asked)
        return [self._shape(cell, context.conv_mask_to_poly) for cell in result.cells]

    def _shape(self, cell: Cell, as_polygon: bool) -> models.LabeledShapeRequest:
        options = {"score": cell.score, "attributes": list(self._attributes(cell))}
        label = self.labels[cell.label]
        if not self.gives_masks:
            return cvat.rectangle(label, list(cell.box), **options)
        # What has no mask, or an empty one, fills its box.
        (left, top), (right, bottom) = cell.origin, np.ceil(cell.box[2:]).astype(int).tolist()
        mask = cell.mask if cell.mask is not None and cell.mask.any() else np.ones((bottom - top, right - left), bool)
        if as_polygon:
            # A polygon there is one ring: around the largest part.
            outer = max((ring for ring, *_ in outline(replace(cell, mask=mask))), key=_area)
            return cvat.polygon(label, np.ravel(outer[:-1]).tolist(), **options)
        *runs, x_min, y_min, x_max, y_max = encode_mask(mask)
        return cvat.mask(label, [*runs, x_min + left, y_min + top, x_max + left, y_max + top], **options)

    def _attributes(self, cell: Cell) -> Iterator[models.AttributeValRequest]:
        for number, (name, _) in enumerate(self.morphology):
            if name in cell.attributes:
                yield models.AttributeValRequest(spec_id=number, value=cell.attributes[name]["value"])


def _area(ring: list[list[float]]) -> float:
    x, y = np.array(ring).T
    return abs(float(x[:-1] @ y[1:] - y[:-1] @ x[1:]))


# What `cvat-cli` calls with its `-p` parameters.
create = DetectionFunction

__all__ = ["DetectionFunction", "create"]
