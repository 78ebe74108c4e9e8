"""Whom and what images come from: patient, slide and field, where rows or file names say so."""

import re
from collections.abc import Mapping
from pathlib import PurePosixPath

from unihema.errors import DatasetError
from unihema.training.data.rows import GROUP_KEYS, Row


def compile_patterns(patterns: Mapping[str, str]) -> dict[str, re.Pattern]:
    """Regular expressions whose first group is an identifier in a file name.

    Args:
        patterns (`Mapping[str, str]`): `patient`, `slide` or `source_image` -> expression.

    Raises:
        DatasetError: Another key, a broken expression, or one without a group.
    """
    compiled = {}
    for group, pattern in patterns.items():
        if group not in GROUP_KEYS:
            raise DatasetError(f"Unknown group '{group}'; groups are {', '.join(GROUP_KEYS)}.")
        try:
            compiled[group] = re.compile(pattern)
        except re.error as error:
            raise DatasetError(f"{group} pattern {pattern!r} is no regular expression ({error}).") from error
        if compiled[group].groups < 1:
            raise DatasetError(f"{group} pattern {pattern!r} needs brackets around the identifier, such as '-(\\d+)_'.")
    return compiled


def groups_of(row: Row, patterns: Mapping[str, re.Pattern]) -> dict[str, str]:
    """Patient, slide and field of a row: as it has them, else as the patterns find them in its file's name."""
    groups = {group: str(row[group]) for group in GROUP_KEYS if row.get(group)}
    for group, pattern in patterns.items():
        found = pattern.search(PurePosixPath(row["file_name"]).name)
        if found and found.group(1):
            groups.setdefault(group, found.group(1))
    return groups
