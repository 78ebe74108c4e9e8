"""`dataset.json`: what a prepared data folder says about itself."""

import json
import re
from pathlib import Path
from typing import Any

from unihema.errors import DatasetError


DESCRIPTION_FILE = "dataset.json"


def read_description(folder: Path) -> dict[str, Any]:
    """The description of a data folder; empty without one.

    Raises:
        DatasetError: It is no JSON object.
    """
    path = folder / DESCRIPTION_FILE
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise DatasetError(f"{path}: cannot be read as JSON ({error}).") from error
    if not isinstance(content, dict):
        raise DatasetError(f"{path}: a JSON object {{...}} is needed, got {type(content).__name__}.")
    return content


def masks_show(folder: Path) -> str | None:
    """What the masks of a folder show, as it says itself.

    Raises:
        DatasetError: `dataset.json` is no JSON object.
    """
    found = read_description(folder).get("masks_show")
    return str(found) if found else None


def folder_licence(folder: Path) -> str:
    """The licence a data folder declares, in `dataset.json` or the front matter of `README.md` (a Hub dataset card).

    Returns:
        `str`: Empty when it declares none.

    Raises:
        DatasetError: `dataset.json` is no JSON object.
    """
    declared = read_description(folder).get("licence")
    if declared:
        return str(declared)
    card = folder / "README.md"
    if not card.is_file():
        return ""
    front = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.S)
    found = re.search(r"^license:\s*([\w.+-]+)\s*$", front.group(1), re.M) if front else None
    return found.group(1) if found else ""
