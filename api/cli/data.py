"""`unihema data`: the catalog of data sets, and preparing, checking, comparing and sharding data folders."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import (
    PATH,
    SettingsCommand,
    data_license_option,
    group_pattern_option,
    license_option,
    output_option,
    task_option,
)


if TYPE_CHECKING:
    from unihema.training.data.curation.catalog import CatalogEntry
    from unihema.training.data.curation.check import CheckReport


# Of a list of findings so many are shown.
SHOWN = 10


@click.group()
def data() -> None:
    """List, prepare, check, compare and shard data sets."""


@data.command("list")
@click.argument("name", required=False)
@task_option(multiple=False)
@click.option("--disease", help="Data sets of this disease only; a part of its name is enough.")
@click.option("--json", "json_lines", is_flag=True, help="Answer as JSON.")
def list_data(name: str | None, task: str | None, disease: str | None, json_lines: bool) -> None:
    """List the data sets of the Uni-Hema paper.

    NAME is one of them, by its key or name: everything that is known of it is shown. An empty field is one that nobody has
    stated.
    """
    import json
    from dataclasses import asdict

    from unihema.training.data.curation.catalog import find_entries, find_entry

    entries = [find_entry(name)] if name else find_entries(task, disease)
    if json_lines:
        for entry in entries:
            click.echo(json.dumps(asdict(entry), ensure_ascii=False))
        return
    if name:
        _show(entries[0])
        return
    lines = [("data set", "disease", "licence", "link")]
    lines += [(entry.key, entry.disease, entry.licence, entry.data_link) for entry in entries]
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    for line in lines:
        click.echo("  ".join([*(cell.ljust(width) for cell, width in zip(line, widths)), line[3]]).rstrip())


def _show(entry: "CatalogEntry") -> None:
    fields = {
        "data set": entry.key,
        "name": entry.name,
        "task": entry.task,
        "disease": entry.disease,
        "licence": entry.licence,
        "data": entry.data_link,
        "paper": entry.paper_link,
        "notes": entry.notes,
    }
    for field, value in fields.items():
        if value or field != "notes":
            click.echo(f"{field + ':':10}{value or '(not stated)'}")


@data.command(cls=SettingsCommand, settings=("data.rename", "data.segmentation_prompt", "data.on_invalid"))
@click.argument("source", type=PATH)
@output_option(required=True)
@click.option("--dataset", "-d", help="The data set's key in the catalog.")
@click.option("--layout", help="coco, yolo, voc, attribute_table, mask_pairs or class_folders; recognised by default.")
@click.option("--keep-names", is_flag=True, help="Leave class names as they are instead of giving them official ones.")
@click.option(
    "--attribute",
    "attributes",
    multiple=True,
    help="Column that is an attribute; may be repeated. WBCAtt's by default.",
)
@license_option
@click.option(
    "--val-share",
    type=float,
    default=0.1,
    show_default=True,
    help="Part of the training images for validation, if there is no such split.",
)
@group_pattern_option
def prepare(
    source: Path,
    output: Path,
    dataset: str | None,
    layout: str | None,
    keep_names: bool,
    attributes: tuple[str, ...],
    license: str | None,
    val_share: float,
    group_patterns: Sequence[tuple[str, str]],
    settings: Mapping[str, Any],
) -> None:
    """Turn a downloaded data set into a data folder.

    SOURCE is a zip or tar file, or a folder.

    Exit code 1: bad rows were left out; they are listed.
    """
    from unihema.training.data.curation.catalog import find_entry
    from unihema.training.data.curation.prepare import prepare_data

    shown = settings.get("data.segmentation_prompt")
    prepared = prepare_data(
        source,
        output,
        entry=find_entry(dataset) if dataset else None,
        layout=layout,
        official_names=not keep_names,
        rename=settings.get("data.rename"),
        **({"masks_show": shown} if shown else {}),
        **({"attributes": attributes} if attributes else {}),
        licence=license,
        val_share=val_share,
        patterns=dict(group_patterns),
        on_invalid=settings.get("data.on_invalid", "error"),
        progress=True,
    )
    for split, counts in prepared.counts.items():
        click.echo(f"{split}: " + ", ".join(f"{task} {count}" for task, count in counts.items()))
    for task, names in prepared.unmapped.items():
        click.echo(f"{task}: no official name for {', '.join(names)}; kept as they are (--rename gives others).")
    click.echo(f"Written to {output}, read as {prepared.layout}.")
    if prepared.left_out:
        for message in prepared.left_out:
            click.echo(f"left out: {message}", err=True)
        raise click.exceptions.Exit(1)


@data.command()
@click.argument("paths", nargs=-1, required=True, type=PATH)
@output_option(file=True)
@data_license_option
@group_pattern_option
@click.option("--similarity", type=float, help="Smallest similarity, 0..1, of the same photograph; 0.8 by default.")
@click.option("--exact-only", is_flag=True, help="Compare bytes only, not looks.")
def check(
    paths: tuple[Path, ...],
    output: Path | None,
    data_licenses: Sequence[tuple[str, str]],
    group_patterns: Sequence[tuple[str, str]],
    similarity: float | None,
    exact_only: bool,
) -> None:
    """Find leaks, bad rows and unsafe archives; count classes.

    PATHS are data folders that will be used together, and archives to look into. A leak is a photograph, patient or slide in
    two splits.

    Exit code 1: something has to be put right.
    """
    from unihema.files import write_json
    from unihema.training.data.curation.check import check_data

    report = check_data(
        paths,
        licences=dict(data_licenses),
        patterns=dict(group_patterns),
        near=not exact_only,
        **({} if similarity is None else {"min_similarity": similarity}),
        progress=True,
    )
    for line in _report_lines(report):
        click.echo(line)
    if output is not None:
        write_json(output, report.to_dict())
        click.echo(f"Everything in {output}.")
    if not report.clean:
        raise click.exceptions.Exit(1)


@data.command(cls=SettingsCommand, settings=("data.rename",))
@click.argument("first", type=PATH)
@click.argument("second", type=PATH)
@output_option(file=True)
def compare(first: Path, second: Path, output: Path | None, settings: Mapping[str, Any]) -> None:
    """Compare two annotations of the same photographs.

    FIRST and SECOND are data folders with boxes on photographs that are in both: by how much do the annotators themselves
    differ?
    """
    from unihema.files import write_json
    from unihema.training.data.curation.agreement import annotation_agreement

    found = annotation_agreement(first, second, settings.get("data.rename"), progress=True)
    click.echo(f"{found.photographs} photographs in both.")
    for name, of_class in found.classes.items():
        counts = (
            f"counts differ by {100 * of_class.count_difference:.0f} % (median of {of_class.photographs} photographs)"
            if of_class.photographs
            else "none in the first"
        )
        click.echo(
            f"{name}: {of_class.first} and {of_class.second} boxes, {of_class.both} in both (F1 {of_class.f1:.3f}), {counts}"
        )
    if output is not None:
        write_json(output, found.to_dict())
        click.echo(f"Figures in {output}.")


@data.command(cls=SettingsCommand, settings=("data.attributes_as_detection", "data.on_invalid"))
@click.argument("source", type=PATH)
@output_option(required=True)
@task_option()
@click.option(
    "--split", "splits", multiple=True, help="Split of the data; may be repeated. Those there are by default."
)
@click.option("--shard-samples", type=click.IntRange(1), default=512, show_default=True, help="Samples of a shard.")
def shard(
    source: Path,
    output: Path,
    tasks: tuple[str, ...],
    splits: tuple[str, ...],
    shard_samples: int,
    settings: Mapping[str, Any],
) -> None:
    """Write a data folder as Parquet shards, which `unihema train` reads a few samples at a time."""
    from unihema.training.data.curation.prepare import shard_folder

    written = shard_folder(
        source,
        output,
        splits=splits,
        tasks=list(tasks) or None,
        attributes_as_detection=settings.get("data.attributes_as_detection", False),
        on_invalid=settings.get("data.on_invalid", "error"),
        shard_samples=shard_samples,
        progress=True,
    )
    for name, counts in written.items():
        click.echo(f"{name}: " + ", ".join(f"{of_task} {count}" for of_task, count in counts.items()))
    click.echo(f"Written to {output}.")


def _report_lines(report: "CheckReport") -> Iterator[str]:
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
