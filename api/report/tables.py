"""Tables of a report: order of classes, borders of grades, numbers of cells to count. A laboratory may replace them."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

from unihema.errors import InputError
from unihema.files import read_json_object, shortened
from unihema.results.cell import has, is_list, is_number, is_text, or_none


TABLES_FILE = Path(__file__).with_name("tables.json")
MOST_ENTRIES = 1000
REMEDY = f"Tables of a report are JSON as in {TABLES_FILE}; a file may have some of its sections only."


@dataclass(frozen=True)
class ReportTables:
    """The tables of a report.

    Args:
        differential (`dict`): `name` and `source`, as every section has; `target` (white cells to count), `order` of classes,
            classes `hidden_where_none` was found, nucleated red cells per 100 white cells from which the white count is
            corrected, and smudge cells per 100 above which a warning stands.
        red_cells (`dict`): `findings`: each with its `classes`, the `least` number of red cells for a grade, and `grades`, each
            with the per cent `from` which, or `above` which, it holds.
        parasites (`dict`): `red_cells` to count, classes `not_counted`; of thick films `white_cells` to count, and the
            `assumed_white_count` in 10^9/L.
        platelets (`dict`): `factor` and `field_mm2`: platelets per microlitre for one in a field of that area, or `null`;
            `findings` as of red cells.
    """

    differential: dict[str, Any]
    red_cells: dict[str, Any]
    parasites: dict[str, Any]
    platelets: dict[str, Any]

    @classmethod
    def read(cls, file: str | Path | None = None) -> "ReportTables":
        """The tables of a file, those of the package where it has none.

        Args:
            file (`str` or `Path`, *optional*): JSON with sections as in `tables.json`; each replaces ours.

        Raises:
            InputError: It is no such file; the message names the entry.
        """
        if file is None:
            return cls(**copy.deepcopy(_ours()))
        found = read_json_object(Path(file), InputError, REMEDY)
        return cls.of(found, str(file))

    @classmethod
    def of(cls, values: Mapping[str, Any], source: str = "tables") -> "ReportTables":
        """The tables that a mapping has, those of the package where it has none; `source` names it in errors."""
        for section, found in values.items():
            if section not in _SECTIONS:
                raise InputError(
                    f"{source}: unknown section {shortened(section, 60)!r}; there are {', '.join(_SECTIONS)}. {REMEDY}"
                )
            checks = {"name": is_text, "source": is_text} | _SECTIONS[section]
            for name in (*checks, *(found if isinstance(found, dict) else ())):
                if (
                    not isinstance(found, dict)
                    or name not in found
                    or name not in checks
                    or not checks[name](found[name])
                ):
                    raise InputError(
                        f"{source}: {section}.{shortened(name, 60)} is missing, unknown or no such value. {REMEDY}"
                    )
        return cls(**copy.deepcopy({**_ours(), **values}))

    @property
    def names(self) -> dict[str, dict[str, str]]:
        """Section -> `name` and `source` of its table."""
        return {section: {key: vars(self)[section][key] for key in ("name", "source")} for section in _SECTIONS}


def grade_of(count: int, of: int, grades: Mapping[str, Mapping[str, float]]) -> str | None:
    """The highest grade that a share reaches; `None` below all of them.

    Args:
        count, of (`int`): The share, which is compared exactly.
        grades (`Mapping`): Grade -> the per cent `from` which, or `above` which, it holds; lower ones first.
    """
    percent, found = Fraction(100 * count, of), None
    for grade, border in grades.items():
        # As it is written: 0.1 is a tenth.
        value = Fraction(str(next(iter(border.values()))))
        if percent >= value if "from" in border else percent > value:
            found = grade
    return found


@cache
def _ours() -> dict[str, Any]:
    return read_json_object(TABLES_FILE, InputError, REMEDY)


def _is_amount(value: Any) -> bool:
    return is_number(value) and value >= 0


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and _is_amount(value)


def _are_grades(value: Any) -> bool:
    if not isinstance(value, dict) or not all(map(is_text, value)):
        return False
    borders = [
        next(iter(each.values()))
        for each in value.values()
        if has(**{"from": _is_amount})(each) or has(above=_is_amount)(each)
    ]
    return len(borders) == len(value) and borders == sorted(borders)


_NAMES = is_list(is_text, MOST_ENTRIES)
_FINDINGS = is_list(has(finding=is_text, classes=_NAMES, least=_is_count, grades=_are_grades), MOST_ENTRIES)
_SECTIONS = {
    "differential": {
        "target": _is_count,
        "order": _NAMES,
        "hidden_where_none": _NAMES,
        "corrects_white_count_from": _is_amount,
        "smudge_cells_warned_of_above": or_none(_is_amount),
    },
    "red_cells": {"findings": _FINDINGS},
    "parasites": {
        "red_cells": _is_count,
        "not_counted": _NAMES,
        "white_cells": _is_count,
        "assumed_white_count": _is_amount,
    },
    "platelets": {"factor": or_none(_is_amount), "field_mm2": or_none(_is_amount), "findings": _FINDINGS},
}


__all__ = ["ReportTables", "grade_of"]
