"""What `unihema data check` found, in words."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from unihema.training.data.curation.check import CheckReport


SHOWN = 10


def report_lines(report: "CheckReport") -> Iterator[str]:
    """The report, a line a finding; long lists are cut short."""
    from unihema.training.data.curation.duplicates import count_by_places

    for dataset, splits in report.counts.items():
        for split, tasks in splits.items():
            for task, counts in tasks.items():
                classes = ", ".join(f"{name} {count}" for name, count in counts.get("classes", {}).items())
                yield f"{dataset}/{split} {task}: {counts['rows']} rows" + (f" ({classes})" if classes else "")
    for archive, problems in report.unsafe_archives.items():
        if not problems:
            yield f"{archive}: safe to unpack"
        yield from _shown(f"unsafe archive {archive}", problems)
    yield from _shown("bad rows", report.bad_rows)
    yield from _shown("notes", report.notes)
    leaks = [repeat for repeat in report.repeats if repeat.leak]
    yield from _shown(
        "photographs in more than one split (leaks)",
        [f"{repeat.kind} {repeat.similarity:g}: {', '.join(map(_short, repeat.files))}" for repeat in leaks],
    )
    for (first, second), kinds in count_by_places(report.repeats).items():
        numbers = " and ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        where = f"twice in {first}" if first == second else f"both in {first} and {second}"
        yield f"the same photograph {where}: {numbers}"
    yield from _shown(
        "patients, slides or fields in more than one split",
        [
            f"{group.dataset}: {group.group} {group.identifier}: "
            + ", ".join(f"{split} {count}" for split, count in group.images.items())
            for group in report.shared_groups
        ],
    )
    yield from _licence_lines(report)
    yield "Nothing to put right." if report.clean else "Found things to put right."


def _licence_lines(report: "CheckReport") -> Iterator[str]:
    licence = report.licence
    if licence.strictest:
        yield f"strictest licence: {licence.strictest}; all together ask for: {', '.join(licence.terms) or 'nothing'}"
    for conflict in licence.conflicts:
        yield f"licence conflict: {conflict}"
    if licence.unknown:
        yield f"licence not known: {', '.join(licence.unknown)}"


def _shown(title: str, items: list[str]) -> Iterator[str]:
    if not items:
        return
    yield f"{title}: {len(items)}"
    for item in items[:SHOWN]:
        yield f"  {item}"
    if len(items) > SHOWN:
        yield f"  ... and {len(items) - SHOWN} more"


def _short(path: str) -> str:
    return "/".join(Path(path).parts[-4:])
