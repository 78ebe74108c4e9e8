"""Class names of data sets to the 29 + 45 names of the official model."""

import re
from collections.abc import Iterable, Mapping
from functools import cache

from unihema.modeling_unihema.official_labels import OFFICIAL_CELLS, OFFICIAL_CLASSES


# Logit 0 of the official detector was never used.
DETECTION_NAMES = tuple(name for name in OFFICIAL_CLASSES if name != "unused")
OFFICIAL_NAMES = {"detection": DETECTION_NAMES, "single_cell": tuple(OFFICIAL_CELLS)}
_WRITTEN_OUT = {"red blood cell": "rbc", "white blood cell": "wbc"}


def official_name(name: str, task: str) -> str | None:
    """The official name that a class name is another spelling of: case, plural, underscores and hyphens do not count.

    Args:
        name (`str`): As a data set has it.
        task (`str`): `detection` or `single_cell`; other tasks have no list.

    Returns:
        `str` or `None`: None where no official name is spelled like it.
    """
    return _spellings(task).get(_plain(name))


def label_map(names: Iterable[str], task: str, known: Mapping[str, str] | None = None) -> dict[str, str]:
    """Class names -> official names, for those that have one.

    Args:
        names (`Iterable[str]`): As a data set has them.
        task (`str`): `detection` or `single_cell`.
        known (`Mapping[str, str]`, *optional*): The data set's own map, which comes first.
    """
    known = known or {}
    found = {name: known.get(name) or official_name(name, task) for name in names}
    return {name: official for name, official in found.items() if official is not None}


@cache
def _spellings(task: str) -> dict[str, str]:
    return {_plain(name): name for name in OFFICIAL_NAMES.get(task, ())}


def _plain(name: str) -> str:
    plain = re.sub(r"[\s_\-]+", " ", name.strip().lower()).removesuffix("s")
    return _WRITTEN_OUT.get(plain, plain)
