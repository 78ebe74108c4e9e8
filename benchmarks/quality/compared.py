"""What is compared: the project's tasks, and the attributes of white cells as one of their own.

UniHema reads attributes with its detection head. No single-task detector does, so they have a peer that does nothing else:
on crops of one cell, as attribute tables describe them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from unihema.training.data.rows import Row


ATTRIBUTES = "attributes"
# Fields first, then crops: what is asked of one image comes together.
COMPARED = ("detection", "segmentation", ATTRIBUTES, "single_cell", "question_answering", "cloze")
# The figures of each; the first decides.
FIGURES = {
    "detection": ("mAP50", "mAP"),
    "segmentation": ("dice", "iou"),
    ATTRIBUTES: ("macro_f1", "accuracy"),
    "single_cell": ("macro_f1", "accuracy"),
    "question_answering": ("exact_match", "bleu4"),
    "cloze": ("exact_match", "bleu4"),
}


def task_of(compared: str) -> str:
    """The task that a model is asked to do: attributes are read off the cells of detection."""
    return "detection" if compared == ATTRIBUTES else compared


def size_of(compared: str) -> str:
    """The task whose image size a model gets: a crop with attributes is as large as a single cell."""
    return "single_cell" if compared == ATTRIBUTES else compared


def compared_rows(rows: Mapping[str, Sequence[Row]]) -> dict[str, Sequence[Row]]:
    """Rows of the project's tasks, those of detection parted into fields and crops with attributes.

    Args:
        rows (`Mapping[str, Sequence[Row]]`): Task -> rows.
    """
    found = dict(rows)
    crops = [row for row in found.get("detection", ()) if row.get("from_attributes")]
    if crops:
        found["detection"] = [row for row in found["detection"] if not row.get("from_attributes")]
        found[ATTRIBUTES] = crops
    return {compared: found[compared] for compared in COMPARED if len(found.get(compared, ()))}


def compared_figures(compared: str, report: Mapping[str, Any]) -> dict[str, Any]:
    """What of `evaluate_model`'s report on the rows of one thing compared is shown; of crops the attributes alone.

    Args:
        compared (`str`): What is compared.
        report (`Mapping[str, Any]`): Task -> figures.
    """
    figures = report[task_of(compared)]
    if compared != ATTRIBUTES:
        return figures
    prefix = "morphology "
    limits = {
        name.removeprefix(prefix): value for name, value in figures["intervals"].items() if name.startswith(prefix)
    }
    return {**figures["morphology"], "rows": figures["rows"], "images": figures["images"], "intervals": limits}
