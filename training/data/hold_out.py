"""Images that a run must not see: those of a patient, a slide, a field or a microscope."""

from collections.abc import Mapping, Sequence

from unihema.errors import RunConfigError
from unihema.training.data.rows import PROVENANCE_KEYS, Row


def is_held_out(row: Row, hold_out: Mapping[str, Sequence[str]]) -> bool:
    """Whether a row is of one of the groups.

    Args:
        row (`Row`): A schema row, see rows.py.
        hold_out (`Mapping[str, Sequence[str]]`): `patient`, `slide`, `source_image` or `origin` -> those held out.

    Raises:
        RunConfigError: Another kind of group.
    """
    for group, names in hold_out.items():
        if group not in PROVENANCE_KEYS:
            raise RunConfigError(f"data.hold_out: unknown group '{group}'; groups are {', '.join(PROVENANCE_KEYS)}.")
        if str(row.get(group)) in names:
            return True
    return False


__all__ = ["is_held_out"]
