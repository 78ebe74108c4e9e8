"""Text and JSON files that a reader, or a run that is cut off, never meets half of."""

import json
import math
from pathlib import Path
from typing import Any

from unihema.files import write_atomically


def write_text(path: str | Path, text: str) -> None:
    """Writes a whole file, see [`write_atomically`]; file names that are not UTF-8 as in [`unihema.files.write_text`]."""
    write_atomically(Path(path), lambda file: file.write(text.encode("utf-8", "backslashreplace")))


def write_json(path: str | Path, value: Any) -> None:
    """Writes indented JSON; numbers that JSON does not know (NaN, infinity) become null."""
    write_text(path, json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """`value` with every part turned into what JSON knows."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Path):
        return str(value)
    return value
