"""`unihema data`: the catalog of data sets, and preparing, checking and sharding data folders."""

from pathlib import Path

import typer


data = typer.Typer(help="List, prepare, check and shard data sets.", no_args_is_help=True)


@data.command("list")
def list_data(
    task: str = typer.Option(None, "--task", "-t", help="Data sets of this task only."),
    disease: str = typer.Option(None, help="Data sets of this disease only; a part of its name is enough."),
    json_lines: bool = typer.Option(False, "--json", help="A JSON object a line."),
) -> None:
    """List the data sets of the Uni-Hema paper. An empty field is one that nobody has stated."""
    import json
    from dataclasses import asdict

    from unihema.training.data.curation.catalog import find_entries

    entries = find_entries(task, disease)
    if json_lines:
        for entry in entries:
            typer.echo(json.dumps(asdict(entry), ensure_ascii=False))
        return
    lines = [("data set", "disease", "licence", "link")]
    lines += [(entry.key, entry.disease, entry.licence, entry.data_link) for entry in entries]
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    for line in lines:
        typer.echo("  ".join([*(cell.ljust(width) for cell, width in zip(line, widths)), line[3]]).rstrip())


@data.command()
def show(name: str = typer.Argument(..., help="Key or name of a data set, as `unihema data list` shows it.")) -> None:
    """Show what is known of a data set of the catalog."""
    from unihema.training.data.curation.catalog import find_entry

    entry = find_entry(name)
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
            typer.echo(f"{field + ':':10}{value or '(not stated)'}")


@data.command()
def prepare(
    source: Path = typer.Argument(..., help="A downloaded zip or tar file, or a folder."),
    output: Path = typer.Option(..., "--output", "-o", help="New data folder."),
    name: str = typer.Option(None, "--dataset", "-d", help="The data set's key in the catalog."),
    layout: str = typer.Option(
        None, help="coco, yolo, voc, attribute_table, mask_pairs or class_folders; recognised by default."
    ),
    rename: list[str] = typer.Option([], help="Class to rename, such as 'ig=myelocyte'; may be repeated."),
    keep_names: bool = typer.Option(False, help="Leave class names as they are instead of giving them official ones."),
    masks_show: str = typer.Option("white blood cell", help="What the masks show."),
    attribute: list[str] = typer.Option([], help="Column that is an attribute, if not WBCAtt's; may be repeated."),
    licence: str = typer.Option(None, help="Licence of the data set, such as CC-BY-4.0."),
    val_share: float = typer.Option(0.1, help="Part of the training images for validation, if there is no such split."),
    patient_pattern: str = typer.Option(None, help="Regular expression with the patient in brackets, for file names."),
    slide_pattern: str = typer.Option(None, help="The same for the slide."),
    skip_bad: bool = typer.Option(False, help="Leave bad rows out instead of stopping."),
) -> None:
    """Turn a downloaded data set into a data folder. Exit code 1: bad rows were left out; they are listed."""
    from unihema.training.data.curation.catalog import find_entry
    from unihema.training.data.curation.prepare import prepare_data

    prepared = prepare_data(
        source,
        output,
        entry=find_entry(name) if name else None,
        layout=layout,
        official_names=not keep_names,
        rename=_pairs(rename, "--rename"),
        masks_show=masks_show,
        **({"attributes": attribute} if attribute else {}),
        licence=licence,
        val_share=val_share,
        patterns=_patterns(patient_pattern, slide_pattern),
        on_invalid="skip" if skip_bad else "error",
        progress=True,
    )
    for split, counts in prepared.counts.items():
        typer.echo(f"{split}: " + ", ".join(f"{task} {count}" for task, count in counts.items()))
    for task, names in prepared.unmapped.items():
        typer.echo(f"{task}: no official name for {', '.join(names)}; kept as they are (--rename gives others).")
    typer.echo(f"Written to {output}, read as {prepared.layout}.")
    if prepared.left_out:
        for message in prepared.left_out:
            typer.echo(f"left out: {message}", err=True)
        raise typer.Exit(1)


@data.command()
def check(
    paths: list[Path] = typer.Argument(..., help="Data folders to use together, and archives to look into."),
    output: Path = typer.Option(None, "--output", "-o", help="JSON file for the whole report."),
    licence: list[str] = typer.Option([], help="Licence of a data set, such as 'bccd=MIT'; may be repeated."),
    patient_pattern: str = typer.Option(None, help="Regular expression with the patient in brackets, for file names."),
    slide_pattern: str = typer.Option(None, help="The same for the slide."),
    similarity: float = typer.Option(None, help="Smallest similarity, 0..1, of the same photograph; 0.8 by default."),
    exact_only: bool = typer.Option(False, help="Compare bytes only, not looks."),
) -> None:
    """Find bad rows, photographs that are there twice, patients in two splits, unsafe archives; count classes.

    Exit code 1: something has to be put right.
    """
    from unihema.files import write_json
    from unihema.training.data.curation.check import check_data

    from .data_report import report_lines

    report = check_data(
        paths,
        licences=_pairs(licence, "--licence"),
        patterns=_patterns(patient_pattern, slide_pattern),
        near=not exact_only,
        **({} if similarity is None else {"min_similarity": similarity}),
        progress=True,
    )
    for line in report_lines(report):
        typer.echo(line)
    if output is not None:
        write_json(output, report.to_dict())
        typer.echo(f"Everything in {output}.")
    if not report.clean:
        raise typer.Exit(1)


@data.command()
def agreement(
    first: Path = typer.Argument(..., help="Data folder with boxes."),
    second: Path = typer.Argument(..., help="Another with boxes on some of the same photographs."),
    output: Path = typer.Option(None, "--output", "-o", help="JSON file for the figures."),
    rename: list[str] = typer.Option([], help="Class to rename in either, such as 'leuko=WBC'; may be repeated."),
) -> None:
    """Compare two annotations of the same photographs: by how much do the annotators themselves differ?"""
    from unihema.files import write_json
    from unihema.training.data.curation.agreement import annotation_agreement

    found = annotation_agreement(first, second, _pairs(rename, "--rename"), progress=True)
    typer.echo(f"{found.photographs} photographs in both.")
    for name, of_class in found.classes.items():
        counts = (
            f"counts differ by {100 * of_class.count_difference:.0f} % (median of {of_class.photographs} photographs)"
            if of_class.photographs
            else "none in the first"
        )
        typer.echo(
            f"{name}: {of_class.first} and {of_class.second} boxes, {of_class.both} in both (F1 {of_class.f1:.3f}), {counts}"
        )
    if output is not None:
        write_json(output, found.to_dict())
        typer.echo(f"Figures in {output}.")


@data.command()
def shard(
    source: Path = typer.Argument(..., help="A data folder."),
    output: Path = typer.Option(
        ..., "--output", "-o", help="Folder for the shards; goes on with one that is half written."
    ),
    task: list[str] = typer.Option([], "--task", "-t", help="Task to write; may be repeated. All by default."),
    split: list[str] = typer.Option([], help="Split to write; may be repeated. Those there are by default."),
    attributes: bool = typer.Option(
        False, help="Also write labelled single cells as detection rows with their attributes."
    ),
    skip_bad: bool = typer.Option(False, help="Leave bad rows out instead of stopping."),
    shard_samples: int = typer.Option(512, help="Samples of a shard."),
) -> None:
    """Write a data folder as Parquet shards, which `unihema train` reads a few samples at a time."""
    from unihema.training.data.curation.prepare import shard_folder

    written = shard_folder(
        source,
        output,
        splits=split,
        tasks=task or None,
        attributes_as_detection=attributes,
        on_invalid="skip" if skip_bad else "error",
        shard_samples=shard_samples,
        progress=True,
    )
    for name, counts in written.items():
        typer.echo(f"{name}: " + ", ".join(f"{of_task} {count}" for of_task, count in counts.items()))
    typer.echo(f"Written to {output}.")


def _patterns(patient: str | None, slide: str | None) -> dict[str, str]:
    return {group: pattern for group, pattern in (("patient", patient), ("slide", slide)) if pattern}


def _pairs(values: list[str], option: str) -> dict[str, str]:
    pairs = {}
    for value in values:
        name, equals, new = value.rpartition("=")
        if not equals or not name or not new:
            from unihema.errors import InputError

            raise InputError(f"{option} {value!r}: write it as name=value.")
        pairs[name] = new
    return pairs
