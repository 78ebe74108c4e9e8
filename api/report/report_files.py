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


def table_rows(report: "SmearReport") -> Iterator[list[Any]]:
    """The rows of a report's table, in the order of `COLUMNS`; numbers are rounded to a tenth of a per cent.

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
        if parasites["film"] == "thin":
            yield line("parasites", **parasites["share"])
        for stage in parasites["stages"]:
            note = None if stage["counted"] else "not counted"
            yield line("stages", name=stage["name"], count=stage["count"], note=note)
    yield line("platelets", name="per 1 000 red cells", count=figures["platelets"]["per_1000_red_cells"])
    for note in figures["notes"]:
        yield line("notes", note=note)
    for left in report.left_out:
        yield line("left out", name=left["image"], note=left["why"])


def _measured(report: "SmearReport", name: str) -> dict[str, float]:
    measured = report.classifier.get(name, {})
    return {key: 100 * measured[key] for key in ("precision", "recall") if key in measured}


def _rounded(value: Any) -> Any:
    return round(value, 1) if isinstance(value, float) else value


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
        name = file_name(report.sample, digest)
        if same_file(name) in taken:
            name = f"{name}_{digest}"
        taken.add(same_file(name))
        pages.append(_write(report, folder, name))
    return pages


def _write(report: "SmearReport", folder: Path, name: str) -> Path:
    if report.signatures:
        name = f"{name}_v{report.report_version}"
        there = folder / f"{name}.json"
        if there.exists() and _sha256_in(there) != report.sha256:
            raise OutputError(
                f"{there}: a signed report that differs from this one. Name another folder (--output); what was signed stays."
            )
    write_text(folder / f"{name}.csv", csv_lines(COLUMNS, table_rows(report)))
    write_text(folder / f"{name}_fhir.json", json.dumps(report.to_fhir(), indent=1) + "\n")
    write_text(folder / f"{name}.html", report.to_html())
    # By it a signed report is known again, so it comes last.
    write_text(folder / f"{name}.json", report.to_json())
    return folder / f"{name}.html"


def _sha256_in(path: Path) -> str | None:
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("sha256")
    except (ValueError, AttributeError):
        return None


__all__ = ["COLUMNS", "table_rows", "write_reports"]
