"""Licence terms of a mix of data sets: what all of their licences ask together."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field


SHARE_ALIKE = "share alike"
# What each licence asks, and how strict it is: a smaller number asks less.
_TERMS: dict[str, tuple[int, tuple[str, ...]]] = {
    "CC0-1.0": (0, ()),
    "MIT": (1, ("attribution",)),
    "BSD-3-Clause": (1, ("attribution",)),
    "Apache-2.0": (2, ("attribution", "state changes")),
    "CC-BY-3.0": (2, ("attribution", "state changes")),
    "CC-BY-4.0": (2, ("attribution", "state changes")),
    "CC-BY-SA-4.0": (3, ("attribution", "state changes", SHARE_ALIKE)),
    "ODbL-1.0": (3, ("attribution", SHARE_ALIKE)),
    "GPL-3.0": (4, ("attribution", "state changes", SHARE_ALIKE, "disclose source")),
    "AGPL-3.0": (4, ("attribution", "state changes", SHARE_ALIKE, "disclose source")),
    "CC-BY-NC-3.0": (5, ("attribution", "state changes", "no commercial use")),
    "CC-BY-NC-4.0": (5, ("attribution", "state changes", "no commercial use")),
    "CC-BY-NC-SA-4.0": (6, ("attribution", "state changes", "no commercial use", SHARE_ALIKE)),
    "CC-BY-ND-4.0": (7, ("attribution", "no changed copies")),
    "CC-BY-NC-ND-4.0": (8, ("attribution", "no commercial use", "no changed copies")),
}
_FURTHER_RESTRICTIONS = ("no commercial use", "no changed copies")


@dataclass
class MixLicence:
    """The licence of a mix.

    Args:
        strictest (`str`): The strictest licence among those known; empty when none is.
        terms (`list[str]`): What any of them asks.
        by_source (`dict[str, str]`): Data set -> its licence as recorded; empty: nobody knows.
        unknown (`list[str]`): Data sets without a licence, or with one that is not in the table: ask their authors.
        conflicts (`list[str]`): Why a work made of all of them could not be passed on under one licence.
    """

    strictest: str = ""
    terms: list[str] = field(default_factory=list)
    by_source: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    conflicts: list[str] = field(default_factory=list)


def known_licence(licence: str) -> str | None:
    """The SPDX name of a licence in the table, however it is written; None for one that is not there."""

    def plain(name: str) -> str:
        name = re.sub(r"[^a-z0-9.]+", "-", name.lower().removesuffix(" licence").removesuffix(" license")).strip("-")
        return name.removesuffix("-only").removesuffix("-or-later")

    table = {plain(name): name for name in _TERMS}
    return table.get(plain(licence))


def mix_licence(licences: Mapping[str, str]) -> MixLicence:
    """The terms of a mix of data sets. Not legal advice: a list of what to look at.

    Args:
        licences (`Mapping[str, str]`): Data set -> licence, SPDX or as people write it; empty when nobody knows. Several
            that apply together are joined by `AND`.
    """
    mix = MixLicence(by_source=dict(licences))
    found: dict[str, str] = {}
    for source, licence in licences.items():
        parts = [part for part in re.split(r"\s+AND\s+", licence) if part]
        names = [known_licence(part) for part in parts]
        if not parts or None in names:
            mix.unknown.append(source)
        for name in filter(None, names):
            found.setdefault(name, source)
    if not found:
        return mix
    mix.strictest = max(found, key=lambda name: _TERMS[name][0])
    mix.terms = sorted({term for name in found for term in _TERMS[name][1]})
    sharing = {name: source for name, source in found.items() if SHARE_ALIKE in _TERMS[name][1]}
    for name, source in sharing.items():
        for other, other_source in found.items():
            if set(_FURTHER_RESTRICTIONS) & (set(_TERMS[other][1]) - set(_TERMS[name][1])):
                mix.conflicts.append(
                    f"{source} ({name}) forbids further restrictions; {other_source} has them ({other})."
                )
    if len(sharing) > 1:
        named = ", ".join(f"{source} ({name})" for name, source in sharing.items())
        mix.conflicts.append(f"{named} each ask for their own licence: see whether one allows another.")
    return mix
