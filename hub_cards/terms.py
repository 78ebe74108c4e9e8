"""What every card says alike: what the model is for, what it is not, its limits, terms, environment and citation."""

from collections.abc import Mapping
from typing import Any

from unihema.errors import CardError

from .data_sources import DataRecord, terms_lines
from .fields import LICENCES, NO_DEVICE


PAPER = "https://arxiv.org/abs/2511.13889"
TAGS = ["unihema", "hematology", "blood-smear", "microscopy"]
INTENDED_USE = [
    f"For research on images of stained blood smears. It is {NO_DEVICE}: nothing here was validated for diagnosis, and no",
    "decision about a patient may rest on what it says.",
]
CITATION = [
    "```bibtex",
    "@inproceedings{unihema2026,",
    "  title = {Uni-Hema},",
    "  author = {{The authors of arXiv 2511.13889}},",
    "  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},",
    "  year = {2026},",
    f"  url = {{{PAPER}}}",
    "}",
    "```",
]


def licence_fields(licence: str | None, name: str | None = None, link: str | None = None) -> dict[str, str]:
    """The licence of weights or data as metadata.

    Args:
        licence (`str`, *optional*): Identifier on the Hub; `other` with `name` and `link`. No fields without one.
        name (`str`, *optional*): Name of another licence.
        link (`str`, *optional*): Its address, or a file beside the card.

    Raises:
        CardError: An identifier that the Hub does not know, or `other` without name and link.
    """
    if licence is None:
        return {}
    if licence not in LICENCES:
        raise CardError(
            f"The Hub knows no licence {licence!r}. Give one of {', '.join(sorted(LICENCES))}; for another one `other`, "
            "with its name and link."
        )
    if licence != "other":
        return {"license": licence}
    if not name or not link:
        raise CardError("Licence `other` needs its name and link as well.")
    return {"license": licence, "license_name": name, "license_link": link}


def terms_section(fields: Mapping[str, str], record: DataRecord, of: str = "Weights") -> list[str]:
    """The licences of code, weights and data, each apart."""
    name = fields.get("license_name", fields.get("license"))
    if name:
        shown = f"[{name}]({fields['license_link']})" if "license_link" in fields else name
    else:
        shown = "as free as the data they were trained on; nobody has named a licence yet"
    return ["- Code: apache-2.0.", f"- {of}: {shown}.", *terms_lines(record)]


def environment_line(run: Mapping[str, Any] | None) -> str | None:
    """The versions that a run was made with; nothing where it did not record them."""
    provenance = (run or {}).get("provenance") or {}
    packages = [f"{name} {version}" for name, version in (provenance.get("packages") or {}).items() if version]
    if not packages or not provenance.get("python"):
        return None
    where = f" on {provenance['platform']}" if provenance.get("platform") else ""
    return f"Python {provenance['python']}{where}; {', '.join(packages)}."


def training_line(run: Mapping[str, Any] | None) -> str | None:
    """How a run was trained, in a sentence; nothing without its configuration."""
    settings = (run or {}).get("optimisation")
    if not settings:
        return None
    limits = {"epochs": "epochs", "max_steps": "steps", "time_limit_minutes": "minutes"}
    length = [f"{settings[name]:g} {unit}" for name, unit in limits.items() if settings.get(name) is not None]
    average = f", averaged weights (decay {settings['ema_decay']})" if settings.get("ema_decay") else ""
    precision = "bfloat16" if settings.get("mixed_precision") == "bf16" else "float32"
    return (
        f"AdamW, learning rate {settings['learning_rate']:g}, {precision}{average}, seed {settings['seed']}"
        + (f", at most {' or '.join(length)}" if length else "")
        + ". Every setting is in `run_config.json`."
    )


def limits_lines(tasks: list[str], measured: bool, thresholds: bool) -> list[str]:
    """What the figures do not show."""
    lines = [
        "- Other laboratories, stains, microscopes and diseases than those of the training data were not measured."
    ]
    if measured and thresholds:
        lines.append(
            "- Detection thresholds were chosen on the validation data, which flatters figures at these thresholds."
        )
    if "detection" in tasks:
        lines.append("- Cells of a class that is not listed above are missed, or given a listed name.")
    if {"question_answering", "cloze"} & set(tasks):
        lines.append("- Answers read like sentences and can be wrong; nothing in them says how sure the model is.")
    return lines


__all__ = [
    "CITATION",
    "INTENDED_USE",
    "PAPER",
    "TAGS",
    "environment_line",
    "licence_fields",
    "limits_lines",
    "terms_section",
    "training_line",
]
