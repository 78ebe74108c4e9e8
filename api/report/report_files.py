"""The files of a report: JSON, CSV, FHIR, and a page."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unihema.errors import OutputError
from unihema.files import write_text
from unihema.result_folder import csv_lines, file_name, same_file


if TYPE_CHECKING:
    from .smear_report import SmearReport


COLUMNS = [
    "sample",
    "status",
    "section",
    "name",
    "count",
    "of",
    "percent",
    "low",
    "high",
    "per_100_white_cells",
    "grade",
]
COLUMNS += ["precision", "recall", "note"]
# Of the files of a report.
ENDINGS = (".csv", "_fhir.json", ".html", ".json")


def table_rows(report: "SmearReport") -> Iterator[list[Any]]:
    """The rows of a report's table, in the order of `COLUMNS`; numbers are rounded to a tenth, those below 1 to two digits.

    Args:
        report ([`SmearReport`]): The report.
    """
    figures = report.figures

    def line(section: str, **values: Any) -> list[Any]:
        values = {"sample": report.sample, "status": report.status, "section": section, **values}
        return [_rounded(values.get(name)) for name in COLUMNS]

    for each in figures["white_cells"]["rows"]:
        yield line("white cells", **each, **_measured(report, each["name"]))
    white_count = figures["white_cells"]["white_count"]
    if white_count and white_count["corrected"] is not None:
        note = f"white count {white_count['given']:g} corrected for nucleated red cells, 10^9/L"
        yield line("white count", name="corrected", count=white_count["corrected"], note=note)
    for each in figures["beside"]:
        yield line("beside", name=each["name"], count=each["count"], per_100_white_cells=each["per_100"])
    for section in ("red_cells", "platelets"):
        for each in figures[section]["rows"]:
            yield line(section.replace("_", " "), **each)
    parasites = figures["parasites"]
    if not parasites["known"]:
        yield line("parasites", name="cannot know", note=parasites["why"])
    else:
        per_ul, note = parasites["per_ul"], None
        if parasites["film"] == "thin":
            yield line("parasites", **parasites["share"])
            of_red_cells = per_ul and {"count": per_ul["percent"], "low": per_ul["low"], "high": per_ul["high"]}
            per_ul, note = of_red_cells, f"with {report.options.red_count} x 10^12/L red cells"
        else:
            yield line(
                "parasites",
                name="parasites",
                count=parasites["parasites"],
                note=f"beside {parasites['white_cells']} white cells",
            )
            if per_ul is not None:
                per_ul = {"count": per_ul}
                note = f"with {parasites['white_count']:g} x 10^9/L white cells, {parasites['white_count_source']}"
        if per_ul:
            yield line("parasites", name="per microlitre", **per_ul, note=note)
        for stage in parasites["stages"]:
            note = None if stage["counted"] else "not counted"
            yield line("stages", name=stage["name"], count=stage["count"], note=note)
    platelets = figures["platelets"]
    if platelets["looked_for"]:
        yield line("platelets", name="counted", count=platelets["count"])
    yield line("platelets", name="per 1 000 red cells", count=platelets["per_1000_red_cells"])
    if platelets["per_ul"] is not None:
        note = f"by the factor {platelets['factor']:g} of {report.tables.platelets['name']}"
        yield line("platelets", name="per microlitre", count=platelets["per_ul"], note=note)
    for note in figures["notes"]:
        yield line("notes", note=note)
    for left in report.left_out:
        yield line("left out", name=left["image"], note=left["why"])


def _measured(report: "SmearReport", name: str) -> dict[str, float]:
    measured = report.classifier.get(name, {})
    return {key: 100 * measured[key] for key in ("precision", "recall") if key in measured}


def _rounded(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    # One infected cell of ten thousand is not none.
    return round(value, 1) if abs(value) >= 1 else float(f"{value:.2g}")


def write_reports(reports: "list[SmearReport]", folder: str | Path) -> list[Path]:
    """Writes the files of reports, named after their samples: `NAME.html`, `NAME.json`, `NAME.csv` and `NAME_fhir.json`.

    A preliminary report replaces an older one. A signed one is never replaced: its files end with its version.

    Args:
        reports (`list[SmearReport]`): One for each sample.
        folder (`str` or `Path`): Where; made when missing.

    Returns:
        `list[Path]`: The pages.

    Raises:
        OutputError: It cannot be written, or holds another report of that sample and version.
    """
    folder, taken, pages = Path(folder), set(), []
    for report in reports:
        digest = hashlib.sha256(report.sample.encode(errors="surrogatepass")).hexdigest()[:12]
        version = f"_v{report.report_version}" if report.signatures else ""
        stem = file_name(report.sample, digest) or "sample"
        # Of the samples `a` and `a_fhir`, or `a` in its first version and `a_v1`, some files would be the same.
        free = {same_file(f"{stem}{version}{ending}") for ending in ENDINGS}.isdisjoint(taken)
        name = f"{stem}{version}" if free else f"{stem}_{digest}{version}"
        taken |= {same_file(f"{name}{ending}") for ending in ENDINGS}
        pages.append(_write(report, folder, name))
    return pages


def _write(report: "SmearReport", folder: Path, name: str) -> Path:
    there = folder / f"{name}.json"
    if there.exists():
        status, sha256 = _status_in(there)
        if (report.signatures or status in ("final", "amended")) and sha256 != report.sha256:
            raise OutputError(
                f"{there}: a signed report that differs from this one. Name another folder (--output); what was signed stays."
            )
    contents = {
        ".csv": lambda: csv_lines(COLUMNS, table_rows(report)),
        "_fhir.json": lambda: json.dumps(report.to_fhir(), indent=1) + "\n",
        ".html": report.to_html,
        # By it a signed report is known again, so it comes last.
        ".json": report.to_json,
    }
    for ending, content in contents.items():
        write_text(folder / f"{name}{ending}", content())
    return folder / f"{name}.html"


def _status_in(path: Path) -> tuple[Any, Any]:
    """Status and hash of the report in a file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found.get("status"), found.get("sha256")
    except (ValueError, AttributeError):
        return None, None


__all__ = ["COLUMNS", "table_rows", "write_reports"]
