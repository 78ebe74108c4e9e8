"""Figures of a sample: everything that a report says in numbers, from the cells of each class alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unihema.errors import RequestError
from unihema.processing_unihema.class_names import (
    NUCLEATED_RED_CELL,
    PLATELET,
    RED_CELL,
    SMUDGE_CELL,
    UNIDENTIFIED,
    UNINFECTED,
    WHITE_CELL,
    cell_kind,
    is_beside_differential,
    is_infected,
    is_untyped_white_cell,
    lineage,
    usual_name,
)
from unihema.processing_unihema.questions import exact_limits

from .tables import ReportTables, grade_of


_PARASITES = ("parasite", "malaria parasite")
# Red cells that are no finding of shape.
_PLAIN = ("rbc", UNINFECTED, "normal red blood cell", "normocyte", "discocyte")


@dataclass(frozen=True)
class ReportOptions:
    """What a person says of a sample, and how it is to be counted.

    Args:
        target (`int`, *optional*): White cells to count; as the table says when missing.
        white_count (`float`, *optional*): White cells in 10^9/L, of another instrument.
        red_count (`float`, *optional*): Red cells in 10^12/L, of another instrument.
        smudge_as_lymphocytes (`bool`): Count smudge cells as lymphocytes, as in chronic lymphocytic leukaemia.
        thick_film (`bool`): Parasites are counted beside white cells.
        assume_white_count (`bool`): Of a thick film without a white count, take that of the table.

    Raises:
        RequestError: A number that cannot be.
    """

    target: int | None = None
    white_count: float | None = None
    red_count: float | None = None
    smudge_as_lymphocytes: bool = False
    thick_film: bool = False
    assume_white_count: bool = False

    def __post_init__(self) -> None:
        if self.target is not None and not 1 <= self.target <= 1_000_000:
            raise RequestError(f"The target is a number of white cells from 1, got {self.target}.")
        for name, value, most in (("white", self.white_count, 10_000), ("red", self.red_count, 100)):
            if value is not None and not 0 < value <= most:
                raise RequestError(
                    f"A {name} count lies above 0 and up to {most} (10^9/L white, 10^12/L red), got {value}."
                )


def sample_figures(
    counts: Mapping[str, int],
    parents: Mapping[str, str],
    tables: ReportTables | None = None,
    options: ReportOptions | None = None,
    in_monolayer: Mapping[str, int] | None = None,
    area_mm2: float | None = None,
    fields: int = 0,
) -> dict[str, Any]:
    """The figures of a sample, from its cells of each class. It takes well under a millisecond for any number of cells.

    Args:
        counts (`Mapping[str, int]`): Cells of each class that was looked for, zero included, over all images.
        parents (`Mapping[str, str]`): Class -> coarser class, as the checkpoint has it.
        tables ([`ReportTables`], *optional*): Those of the package when missing.
        options ([`ReportOptions`], *optional*): What is known of the sample.
        in_monolayer (`Mapping[str, int]`, *optional*): The same in the monolayer; `counts` when missing. Red cells and platelets
            are of these.
        area_mm2 (`float`, *optional*): Area of all fields in square millimetres, where it is known.
        fields (`int`): Number of fields, 0 where they are no fields.

    Returns:
        `dict`: JSON types. `white_cells`, `beside`, `red_cells`, `parasites`, `platelets` and `notes`, sentences on what to
        mind. Each row has `name`, `count`, `of`, `percent`, and its exact limits `low` and `high`; `None` where `of` is 0.
    """
    tables, options = tables or ReportTables.read(), options or ReportOptions()
    inside = counts if in_monolayer is None else in_monolayer
    kinds = {name: cell_kind(name, parents) for name in counts}
    notes: list[str] = []
    white, beside = _white_cells(counts, parents, kinds, tables, options, notes)
    total = white["total"]
    white["per_field"] = total / fields if fields else None
    white["per_mm2"] = total / area_mm2 if area_mm2 else None
    return {
        "white_cells": white,
        "beside": beside,
        "red_cells": _red_cells(inside, parents, kinds, tables, notes),
        "parasites": _parasites(counts, inside, parents, kinds, tables, options, total, notes),
        "platelets": _platelets(counts, inside, kinds, tables, area_mm2),
        "notes": notes,
    }


def row(name: str, count: int, of: int, **more: Any) -> dict[str, Any]:
    """A share with its exact limits."""
    low, high = exact_limits(count, of) if of else (None, None)
    percent = 100 * count / of if of else None
    return {"name": name, "count": count, "of": of, "percent": percent, "low": low, "high": high, **more}


def _white_cells(
    counts: Mapping[str, int],
    parents: Mapping[str, str],
    kinds: Mapping[str, str | None],
    tables: ReportTables,
    options: ReportOptions,
    notes: list[str],
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The differential, and what stands beside it."""
    table = tables.differential
    typed: dict[str, int] = {}
    for name, count in counts.items():
        if kinds[name] == WHITE_CELL:
            of = UNIDENTIFIED if is_untyped_white_cell(name) else name
            typed[of] = typed.get(of, 0) + count
    smudge = sum(count for name, count in counts.items() if kinds[name] == SMUDGE_CELL)
    if options.smudge_as_lymphocytes and smudge:
        lymphocyte = next((name for name in typed if usual_name(name) == "lymphocyte"), "lymphocyte")
        typed[lymphocyte] = typed.get(lymphocyte, 0) + smudge
        notes.append(f"{smudge} smudge cells are counted as lymphocytes.")
    total = sum(typed.values())
    hidden = set(map(usual_name, table["hidden_where_none"]))
    rows = [
        row(name, typed[name], total, hidden=not typed[name] and (usual_name(name) in hidden or name == UNIDENTIFIED))
        for name in _in_order(typed, parents, table["order"])
    ]
    beside = []
    for name, count in counts.items():
        if is_beside_differential(name, parents) and not (options.smudge_as_lymphocytes and kinds[name] == SMUDGE_CELL):
            per_100 = 100 * count / total if total else None
            beside.append({"name": name, "kind": kinds[name], "count": count, "per_100": per_100})
    target = options.target or table["target"]
    if kinds and not any(kind == WHITE_CELL for kind in kinds.values()):
        notes.append("White cells were not looked for.")
    elif total < target:
        notes.append(f"{total} white cells were counted, fewer than {target}: the limits are wide.")
    warned_of = None if options.smudge_as_lymphocytes else table["smudge_cells_warned_of_above"]
    if total and smudge and warned_of is not None:
        share = 100 * smudge / total
        if share > warned_of:
            notes.append(
                f"{share:.0f} smudge cells per 100 white cells: fragile lymphocytes may be missing from the differential."
            )
    nucleated = sum(each["count"] for each in beside if each["kind"] == NUCLEATED_RED_CELL)
    return {
        "total": total,
        "target": target,
        "enough": total >= target,
        "rows": rows,
        "white_count": _white_count(options.white_count, nucleated, total, table["corrects_white_count_from"]),
    }, beside


def _in_order(names: Mapping[str, int], parents: Mapping[str, str], order: Sequence[str]) -> list[str]:
    """Classes as the table has them, each of which it does not know after its coarser class, the unidentified last."""
    places = {usual_name(name): place for place, name in reversed(list(enumerate(order)))}

    def place(name: str) -> tuple[bool, int, int]:
        line = lineage(name, parents)
        depth = next((depth for depth, each in enumerate(line) if each in places), len(line))
        return name == UNIDENTIFIED, places.get(line[min(depth, len(line) - 1)], len(places) + len(order)), depth

    return sorted(names, key=place)


def _white_count(given: float | None, nucleated: int, total: int, least: float) -> dict[str, Any] | None:
    if given is None:
        return None
    per_100 = 100 * nucleated / total if total else 0.0
    corrected = given * 100 / (100 + per_100) if per_100 >= least else None
    return {"given": given, "corrected": corrected, "from": least, "unit": "10*9/L"}


def _red_cells(
    inside: Mapping[str, int],
    parents: Mapping[str, str],
    kinds: Mapping[str, str | None],
    tables: ReportTables,
    notes: list[str],
) -> dict[str, Any]:
    """Shapes of red cells, with grades."""
    table = tables.red_cells["findings"]
    known = any(kind == RED_CELL for kind in kinds.values())
    total = sum(count for name, count in inside.items() if kinds[name] == RED_CELL)
    shapes = [
        name
        for name in inside
        if _finding(name, table) is not None
        or (kinds[name] == RED_CELL and usual_name(name) not in _PLAIN and not _is_infected(name, parents, kinds))
    ]
    rows, missing = _graded({name: inside[name] for name in shapes}, total, table)
    for each in rows:
        if each["count"] and total < each["least"]:
            notes.append(f"{each['name']}: {total} red cells were counted; a grade needs {each['least']}.")
    return {"looked_for": known, "total": total, "rows": rows, "not_looked_for": missing}


def _graded(
    counts: Mapping[str, int], total: int, table: Sequence[Mapping[str, Any]]
) -> tuple[list[dict[str, Any]], list[str]]:
    """A row for each finding, and the findings of the table that no class is of."""
    findings: dict[str, tuple[int, Mapping[str, Any] | None]] = {}
    for name, count in counts.items():
        finding = _finding(name, table)
        key = name if finding is None else finding["finding"]
        findings[key] = findings.get(key, (0, None))[0] + count, finding
    rows = []
    for name, (count, finding) in findings.items():
        least = finding["least"] if finding else 0
        grade = grade_of(count, total, finding["grades"]) if finding and total and total >= least else None
        rows.append(row(name, count, total, grade=grade, least=least, has_grades=bool(finding)))
    rows.sort(key=lambda each: -each["count"])
    return rows, [each["finding"] for each in table if each["finding"] not in findings]


def _finding(name: str, table: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    usual = usual_name(name)
    return next((each for each in table if usual in map(usual_name, each["classes"])), None)


def _is_infected(name: str, parents: Mapping[str, str], kinds: Mapping[str, str | None]) -> bool:
    """Whether a class is of red cells with parasites."""
    return kinds[name] == RED_CELL and _shows_parasites(name, parents)


def _shows_parasites(name: str, parents: Mapping[str, str]) -> bool:
    return is_infected(name, parents) or not {*lineage(name, parents)}.isdisjoint(_PARASITES)


def _parasites(
    counts: Mapping[str, int],
    inside: Mapping[str, int],
    parents: Mapping[str, str],
    kinds: Mapping[str, str | None],
    tables: ReportTables,
    options: ReportOptions,
    white: int,
    notes: list[str],
) -> dict[str, Any]:
    table = tables.parasites
    classes = [name for name in counts if _shows_parasites(name, parents)]
    if not options.thick_film:
        classes = [name for name in classes if kinds[name] == RED_CELL]
    if not classes:
        why = (
            "No class of parasites or infected cells was looked for, so this report cannot know whether there are any."
        )
        return {"known": False, "why": why}
    # Red cells stand in the monolayer; a thick film has none.
    counts = counts if options.thick_film else inside
    sparing = set(map(usual_name, table["not_counted"]))
    stages = [
        {"name": name, "count": counts[name], "counted": sparing.isdisjoint(lineage(name, parents))} for name in classes
    ]
    found = sum(stage["count"] for stage in stages if stage["counted"])
    if options.thick_film:
        count = options.white_count or (table["assumed_white_count"] if options.assume_white_count else None)
        # 10^9/L are thousands per microlitre.
        per_ul = 1000 * count * found / white if count and white else None
        if white < table["white_cells"]:
            notes.append(f"Thick film: {white} white cells were counted, fewer than {table['white_cells']}.")
        source = None if count is None else "given" if options.white_count else "assumed"
        told = {"parasites": found, "white_cells": white, "white_count": count, "white_count_source": source}
        return {"known": True, "film": "thick", **told, "per_ul": per_ul, "stages": stages}
    total = sum(count for name, count in counts.items() if kinds[name] == RED_CELL)
    share = row("infected red cells", found, total)
    if total < table["red_cells"]:
        notes.append(f"Parasites: {total} red cells were counted, fewer than {table['red_cells']}.")
    per_ul: dict[str, float] | None = None
    if options.red_count is not None and total:
        per_ul = {key: share[key] / 100 * options.red_count * 1e6 for key in ("percent", "low", "high")}
    return {"known": True, "film": "thin", "share": share, "per_ul": per_ul, "stages": stages}


def _platelets(
    counts: Mapping[str, int],
    inside: Mapping[str, int],
    kinds: Mapping[str, str | None],
    tables: ReportTables,
    area_mm2: float | None,
) -> dict[str, Any]:
    table = tables.platelets
    classes = [name for name in counts if kinds[name] == PLATELET]
    count, near = (sum(of[name] for name in classes) for of in (counts, inside))
    red = sum(of for name, of in inside.items() if kinds[name] == RED_CELL)
    findings = {name: counts[name] for name in classes if _finding(name, table["findings"]) is not None}
    rows, missing = _graded(findings, count, table["findings"])
    estimate = None
    if classes and table["factor"] and table["field_mm2"] and area_mm2:
        estimate = count / area_mm2 * table["field_mm2"] * table["factor"]
    return {
        "looked_for": bool(classes),
        "count": count,
        "per_1000_red_cells": 1000 * near / red if red and classes else None,
        "per_ul": estimate,
        "factor": table["factor"],
        "rows": rows,
        "not_looked_for": missing,
    }


__all__ = ["ReportOptions", "exact_limits", "row", "sample_figures"]
