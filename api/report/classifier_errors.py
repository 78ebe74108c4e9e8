"""How often the checkpoint itself is right in each class, as its `metrics.json` says: another error than that of sampling."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unihema.checkpoint_files import fingerprint
from unihema.errors import CheckpointError, UniHemaError
from unihema.files import read_json_object


METRICS_FILE = "metrics.json"
# What each task calls its figures of classes.
_FIGURES = {"detection": "at_threshold", "single_cell": "per_class"}


def classifier_errors(checkpoint: str | Path, files: Mapping[str, str] | None = None) -> dict[str, dict[str, Any]]:
    """Precision and recall of each class of a checkpoint, on its validation data.

    Args:
        checkpoint (`str` or `Path`): Its folder.
        files (`Mapping[str, str]`, *optional*): SHA-256 of the files that the results were made with; another checkpoint says
            nothing of them.

    Returns:
        `dict`: Task (`detection` or `single_cell`) -> class -> `precision`, `recall` and `cells`, the number of its cells there.
        Empty where nothing was measured, or the folder holds another checkpoint.

    Raises:
        CheckpointError: `metrics.json` is none.
    """
    path = Path(checkpoint) / METRICS_FILE
    if not path.is_file():
        return {}
    if files is not None:
        try:
            if fingerprint(checkpoint) != dict(files):
                return {}
        except (UniHemaError, OSError):
            return {}
    metrics = read_json_object(path, CheckpointError, "Delete it, and measure again with `unihema evaluate`.")
    found: dict[str, dict[str, Any]] = {}
    for task, figures in _FIGURES.items():
        of_task = metrics.get(task)
        classes = of_task.get(figures) if isinstance(of_task, dict) else None
        for name, values in classes.items() if isinstance(classes, dict) else ():
            told = (
                {key: values.get(key) for key in ("precision", "recall", "cells")} if isinstance(values, dict) else {}
            )
            if told and all(isinstance(value, (int, float)) for value in told.values()):
                found.setdefault(task, {})[name] = told
    return found


__all__ = ["METRICS_FILE", "classifier_errors"]
