"""A report as a FHIR DiagnosticReport with its observations."""

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unihema.errors import InputError, printable
from unihema.files import read_json_object
from unihema.processing_unihema.class_names import usual_name


if TYPE_CHECKING:
    from .smear_report import SmearReport


CODES_FILE = Path(__file__).with_name("codes.json")
LOINC, UCUM = "http://loinc.org", "http://unitsofmeasure.org"
CATEGORIES = "http://terminology.hl7.org/CodeSystem/v2-0074"
ABSENT = "http://terminology.hl7.org/CodeSystem/data-absent-reason"
# Status of a report -> those of FHIR for reports and observations, which are the same three words.
STATUS = {"preliminary": "preliminary", "final": "final", "amended": "amended"}


def diagnostic_report(report: "SmearReport") -> dict[str, Any]:
    """A report as a FHIR R4 `DiagnosticReport`, its observations contained in it.

    Shares are in UCUM `%`. A class without a LOINC code has its name alone. Who the patient is, the laboratory's system adds.

    Args:
        report ([`SmearReport`]): The report.
    """
    codes, figures = _codes(), report.figures
    observations: list[dict[str, Any]] = []

    def add(name: str, coding: dict[str, Any] | None, **values: Any) -> None:
        code: dict[str, Any] = {"text": _text(name)}
        if coding is not None:
            code = {"coding": [{"system": LOINC, "code": coding["code"]}], **code}
        number = len(observations) + 1
        entry = {"resourceType": "Observation", "id": f"o{number}", "status": STATUS[report.status], "code": code}
        observations.append(entry | values)

    for row in figures["white_cells"]["rows"]:
        if not row["hidden"]:
            add(row["name"], codes["classes"].get(usual_name(row["name"])), **_share(row, "white cells"))
    for each in figures["beside"]:
        add(
            f"{each['name']} per 100 white cells", None, **_number(each["per_100"], "/100{WBCs}", "per 100 white cells")
        )
    for section, of in (("red_cells", "red cells"), ("platelets", "platelets")):
        for row in figures[section]["rows"]:
            graded = {"interpretation": [{"text": _text(row["grade"])}]} if row["grade"] else {}
            add(row["name"], codes["findings"].get(row["name"]), **_share(row, of), **graded)
    parasites = figures["parasites"]
    if not parasites["known"]:
        absent = {"coding": [{"system": ABSENT, "code": "not-performed"}], "text": _text(parasites["why"])}
        add("parasites", None, dataAbsentReason=absent)
    elif parasites["film"] == "thin":
        add("infected red cells", None, **_share(parasites["share"], "red cells"))
        if parasites["per_ul"]:
            add(
                "infected red cells per microlitre",
                None,
                **_number(parasites["per_ul"]["percent"], "/uL", "per microlitre"),
            )
    else:
        add("parasites, thick film", None, **_number(parasites["per_ul"], "/uL", "per microlitre"))
    per_1000 = figures["platelets"]["per_1000_red_cells"]
    if per_1000 is not None:
        add("platelets per 1 000 red cells", None, **_number(per_1000, "/1000{RBCs}", "per 1 000 red cells"))
    found: dict[str, Any] = {
        "resourceType": "DiagnosticReport",
        "contained": observations,
        "identifier": [{"system": "urn:ietf:rfc:3986", "value": f"urn:sha256:{report.sha256}"}],
        "status": STATUS[report.status],
        "category": [{"coding": [{"system": CATEGORIES, "code": "HM", "display": "Hematology"}]}],
        "code": {"coding": [{"system": LOINC, "code": codes["panel"]["code"]}], "text": "blood smear"},
        "effectiveDateTime": report.made,
        "issued": report.made,
        "result": [{"reference": f"#{each['id']}"} for each in observations],
        "conclusion": " ".join(
            map(_text, [f"Sample {report.sample}, version {report.report_version}.", *figures["notes"]])
        ),
    }
    if report.signatures:
        found["resultsInterpreter"] = [{"display": _text(report.signatures[-1]["who"])}]
    return found


def _share(row: dict[str, Any], of: str) -> dict[str, Any]:
    """A percentage, with its limits and the cells that it is of."""
    if row["percent"] is None:
        return {
            "dataAbsentReason": {"coding": [{"system": ABSENT, "code": "unknown"}], "text": f"no {of} were counted"}
        }
    low, high = (_quantity(row[side], "%", "%") for side in ("low", "high"))
    limits = {"code": {"text": "exact 95 % limits of sampling"}, "valueRange": {"low": low, "high": high}}
    counted = {"code": {"text": f"cells counted, of {row['of']} {of}"}, "valueInteger": row["count"]}
    return {"valueQuantity": _quantity(row["percent"], "%", "%"), "component": [counted, limits]}


def _number(value: float | None, code: str, unit: str) -> dict[str, Any]:
    if value is None:
        return {"dataAbsentReason": {"coding": [{"system": ABSENT, "code": "unknown"}]}}
    return {"valueQuantity": _quantity(value, code, unit)}


def _quantity(value: float, code: str, unit: str) -> dict[str, Any]:
    return {"value": round(value, 4), "unit": unit, "system": UCUM, "code": code}


def _text(text: str) -> str:
    """Text as FHIR's strings have it: no control characters, and no blanks around it."""
    return printable(text).strip() or "-"


@cache
def _codes() -> dict[str, Any]:
    return read_json_object(CODES_FILE, InputError, "Install the package again.")


__all__ = ["CODES_FILE", "diagnostic_report"]
