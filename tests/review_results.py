"""Results folders to review, written as `unihema predict` writes them, without a model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unihema.files import claim_folder
from unihema.result_folder import BatchReport, ResultFolder
from unihema.results.smear_result import Cell, SmearResult
from unihema.slides import image_sha256


CLASSES = ["RBC", "WBC", "Platelets", "neutrophil", "lymphocyte"]
PARENTS = {"neutrophil": "WBC", "lymphocyte": "WBC"}


def cells_of(labels: Sequence[str], width: int = 200, side: int = 20) -> list[Cell]:
    """Cells side by side in rows, the first the surest."""
    across = width // side
    found = []
    for number, label in enumerate(labels):
        x, y = side * (number % across), side * (number // across)
        attributes = {"granules": {"value": "fine" if number % 2 else "coarse", "score": 0.8}}
        score = 0.95 - 0.9 * number / max(1, len(labels))
        found.append(Cell(number + 1, (x + 2, y + 2, x + side - 2, y + side - 2), label, score, attributes))
    return found


def write_results(
    folder: Path,
    images: Mapping[str, Any],
    size: tuple[int, int] = (200, 160),
    odd: Mapping[int, float] | None = None,
    **more: Any,
) -> Path:
    """Writes images beside a results folder, and the folder.

    Args:
        folder (`Path`): The results folder.
        images (`Mapping[str, Any]`): Name of each image's file -> its labels, or the label of its only cell.
        size (`tuple[int, int]`): Width and height of each.
        odd (`Mapping[int, float]`, *optional*): Number of a cell -> its odd-cell score.
        **more: Fields of every result.

    Returns:
        `Path`: The folder.
    """
    settings = {"formats": [], "tasks": ["detection"]}
    folder.mkdir(parents=True, exist_ok=True)
    claim_folder(folder, settings)
    results = ResultFolder(folder, settings)
    for number, (name, labels) in enumerate(images.items()):
        path = folder.parent / "smears" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            noise = np.random.default_rng(number).integers(90, 200, (size[1] // 8 + 1, size[0] // 8 + 1, 3), np.uint8)
            Image.fromarray(noise).resize(size).save(path)
        alone = isinstance(labels, str)
        values = {"classes": CLASSES, "class_parents": PARENTS, "image": str(path), **more}
        if alone:
            values.setdefault("single_cell", {"label": labels, "score": 0.7})
        result = SmearResult(*size, [] if alone else cells_of(labels, size[0]), **values)
        for cell in result.cells:
            cell.odd = (odd or {}).get(cell.id)
        results.write(results.names([path])[path], path, image_sha256(path), result, Image.open(path).convert("RGB"))
    results.write_tables([], BatchReport(), (False, False))
    return folder
