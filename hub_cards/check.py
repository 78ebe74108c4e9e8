"""What a card must hold before anybody else sees it: metadata that are true, complete, and known to the Hub."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from huggingface_hub import DatasetCard, ModelCard
from huggingface_hub.repocard import RepoCard
from huggingface_hub.utils import HFValidationError, validate_repo_id

from unihema.errors import CardError
from unihema.files import shortened


# Identifiers that the Hub accepts as `license`. Its "unknown" is not among them: that would be an empty field.
# fmt: off
LICENCES = frozenset((
    "afl-3.0", "agpl-3.0", "apache-2.0", "artistic-2.0", "bsd", "bsd-2-clause", "bsd-3-clause",
    "bsd-3-clause-clear", "bsl-1.0", "c-uda", "cc", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0",
    "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0",
    "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc0-1.0",
    "cdla-permissive-1.0", "cdla-permissive-2.0", "cdla-sharing-1.0", "ecl-2.0", "epl-1.0", "epl-2.0", "etalab-2.0",
    "eupl-1.1", "eupl-1.2", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "isc", "lgpl", "lgpl-2.1", "lgpl-3.0", "lppl-1.3c",
    "mit", "mpl-2.0", "ms-pl", "ncsa", "odbl", "odc-by", "ofl-1.1", "openrail", "osl-3.0", "other", "pddl",
    "postgresql", "unlicense", "wtfpl", "zlib",
))
# fmt: on
REQUIRED = {
    "model": ("license", "library_name", "pipeline_tag", "tags"),
    "dataset": ("license", "pretty_name", "task_categories", "size_categories"),
}
PLACEHOLDER = "[more information needed]"
SAY_NOTHING = (PLACEHOLDER, "todo", "tbd", "fixme", "n/a", "unknown", "none", "not recorded")
NO_DEVICE = "not a medical device"


def check_card(text: str, repo_type: str = "model", source: str = "README.md") -> RepoCard:
    """Checks a card as far as that is possible without the Hub.

    Args:
        text (`str`): The card, metadata and text.
        repo_type (`"model"` or `"dataset"`): What it describes.
        source (`str`): Named in errors.

    Returns:
        [`ModelCard`] or [`DatasetCard`]: The card, read by huggingface_hub.

    Raises:
        CardError: No metadata, metadata that huggingface_hub cannot read, a field that is missing, empty or unknown to
            the Hub, a section without text, or no word that it is no medical device.
    """
    if not text.lstrip().startswith("---"):
        raise CardError(f"{source}: no metadata at its beginning. Write the card with `unihema card`.")
    try:
        card = (DatasetCard if repo_type == "dataset" else ModelCard)(text)
    except Exception as error:
        raise CardError(f"{source}: metadata that cannot be read ({shortened(error)}).") from error
    values = card.data.to_dict()
    for name in REQUIRED[repo_type]:
        if name not in values:
            raise CardError(f"{source}: no `{name}` in its metadata. `unihema card` writes it; see its options.")
    check_metadata(values, source)
    for field in ("base_model", "datasets"):
        for name in _listed(values.get(field, [])):
            if not is_repo_id(name):
                raise CardError(f"{source}: `{field}` is {name!r}, which is no repository id such as lab/blood-smears.")
    _check_text(card.text, source)
    return card


def check_metadata(values: Mapping[str, Any], source: str = "metadata of the card") -> None:
    """Checks that no field is empty or still to be written, and that the Hub knows the licence, if one is given.

    Args:
        values (`Mapping`): The metadata.
        source (`str`): Named in errors.

    Raises:
        CardError: The message names the field, its value and the remedy.
    """
    for name, value in _leaves(values):
        if value in (None, "", [], {}) or (isinstance(value, float) and not math.isfinite(value)):
            raise CardError(f"{source}: `{name}` is empty ({value!r}). Fill it in, or leave it out.")
        if isinstance(value, str) and value.strip().lower() in ("", *SAY_NOTHING):
            raise CardError(f"{source}: `{name}` is {value!r}, which says nothing. Fill it in, or leave it out.")
    for licence in _listed(values.get("license", [])):
        if licence not in LICENCES:
            raise CardError(
                f"{source}: the Hub knows no license {licence!r}. Give one of {', '.join(sorted(LICENCES))}; for "
                "another one `other`, with its license_name and license_link."
            )
        missing = [name for name in ("license_name", "license_link") if licence == "other" and not values.get(name)]
        if missing:
            raise CardError(f"{source}: license `other` needs {' and '.join(missing)} as well.")


def is_repo_id(name: Any) -> bool:
    """Whether this can be the id of a repository on the Hub, such as `lab/blood-smears`."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return isinstance(name, str) and name.count("/") == 1


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)) and value:
        for index, item in enumerate(value):
            yield from _leaves(item, f"{name}[{index}]")
    else:
        yield name, value


def _check_text(text: str, source: str) -> None:
    # Backslashes keep texts from being read as Markdown; see `as_text`.
    if PLACEHOLDER in text.lower().replace("\\", ""):
        raise CardError(f"{source}: the text has {PLACEHOLDER!r} in it. Write the card with `unihema card`.")
    # What looks like a heading within code is none.
    prose = re.sub(r"^```.*?^```", "code", text, flags=re.M | re.S)
    sections = re.split(r"^##\s+(.*)$", prose, flags=re.M)
    for heading, body in zip(sections[1::2], sections[2::2]):
        if not body.strip():
            raise CardError(f"{source}: nothing under '{heading.strip()}'. Write it, or take the heading out.")
    if NO_DEVICE not in " ".join(text.lower().split()):
        raise CardError(f"{source}: it must say that this is {NO_DEVICE}.")


__all__ = ["LICENCES", "PLACEHOLDER", "check_card", "check_metadata", "is_repo_id"]
