"""How far a count of cells is off."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unihema.training.metrics.detection import annotated_classes


def count_error(
    predictions: Sequence[Mapping[str, Any]], references: Sequence[Mapping[str, Any]], label: int, num_classes: int
) -> dict[str, Any]:
    """Median over fields of |predicted - true| / true.

    Fields without a cell of the class have no such ratio, and those with a crowd of it no true count: both are left out,
    and so are fields whose data set does not annotate the class.

    Args:
        predictions (`Sequence[Mapping]`): For each field the `labels` `[n]` of the cells that are counted.
        references (`Sequence[Mapping]`): For each field `labels` `[m]`, optionally `iscrowd` `[m]` and
            `annotated_classes` (see `mean_average_precision`).
        label (`int`): The class.
        num_classes (`int`): How many classes there are.

    Returns:
        `dict`: `count_error`, 0 for right counts; `counted_fields`. `None` without such a field.

    Raises:
        ValueError: As many predictions as references are needed.
    """
    errors = []
    for predicted, reference in zip(predictions, references, strict=True):
        if not annotated_classes(reference, num_classes)[label]:
            continue
        of_class = np.asarray(reference["labels"], dtype=int) == label
        if (np.asarray(reference.get("iscrowd") or np.zeros(len(of_class)), dtype=bool) & of_class).any():
            continue
        true = int(of_class.sum())
        if true:
            counted = int((np.asarray(predicted["labels"], dtype=int) == label).sum())
            errors.append(abs(counted - true) / true)
    return {"count_error": float(np.median(errors)) if errors else None, "counted_fields": len(errors)}
