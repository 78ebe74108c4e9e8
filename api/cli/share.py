"""Commands that share: `export` and `convert` to and from other formats, `card` and `push` for the Hub."""

from collections.abc import Sequence
from pathlib import Path

import click

from .options import (
    PATH,
    NameValue,
    base_option,
    data_license_option,
    license_option,
    overwrite_option,
    task_option,
)


@click.command()
@click.argument("checkpoint", type=PATH)
@click.argument("output", type=PATH)
@task_option(multiple=False, default="detection", show_default=True)
@overwrite_option
def export(checkpoint: Path, output: Path, task: str, overwrite: bool) -> None:
    """Write a checkpoint as an ONNX file, or for the authors' code.

    CHECKPOINT is a folder. OUTPUT ends in .onnx for its detection, or its single_cell, which `unihema predict` takes as a
    checkpoint, or in .pth for all of it as the authors' code reads it.
    """
    import logging

    if output.suffix == ".pth":
        if click.get_current_context().get_parameter_source("task") is not click.core.ParameterSource.DEFAULT:
            raise click.UsageError(f"--task {task}: a .pth file has all tasks. Leave it out.")
        from unihema.official.convert import convert_to_official

        count = convert_to_official(checkpoint, output, overwrite)
        click.echo(f"{count} tensors written to {output}. Those without effect in the official model are zero.")
        return
    from unihema.onnx_export import export_onnx

    for name in ("onnxscript", "onnx_ir", "torch.onnx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    path = export_onnx(checkpoint, output, task, overwrite)
    click.echo(f"{path} ({path.stat().st_size / 1e6:.1f} MB, {task}).")


@click.command()
@click.argument("source", type=PATH)
@click.argument("output", type=PATH)
@click.option("--tokenizer", help="T5's spiece.model, a tokenizer folder, or a name on the Hub; flan-T5's by default.")
@click.option("--report", is_flag=True, help="Also write conversion.tsv: what became of every tensor.")
def convert(source: Path, output: Path, tokenizer: str | None, report: bool) -> None:
    """Make a checkpoint of the authors' weights.

    SOURCE is the authors' .pth, OUTPUT a new checkpoint folder. `unihema export` goes the other way.
    """
    from collections import Counter

    from unihema.official.convert import convert_from_official

    became = convert_from_official(source, output, tokenizer, report)
    click.echo(f"{len(became.converted)} tensors converted, {len(became.dropped)} not read:")
    for reason, count in Counter(became.dropped.values()).items():
        if not reason.startswith("the same tensor"):
            click.echo(f"  {count:4d}  {reason}")
    copies = sum(reason.startswith("the same tensor") for reason in became.dropped.values())
    click.echo(f"  {copies:4d}  another name of a tensor that is read")
    click.echo(f"Checkpoint {output}.")


@click.command()
@click.argument("folder", type=PATH)
@license_option
@click.option("--license-name", help="Name of a licence that the Hub calls other.")
@click.option("--license-link", help="Where such a licence is to be read.")
@click.option("--name", help="Title; the folder's name by default.")
@data_license_option
@click.option(
    "--data-source",
    "data_sources",
    multiple=True,
    metavar="[NAME=]ADDRESS",
    help="Where a data set is from: an address, or owner/dataset; of a data folder itself without NAME. May be repeated.",
)
@base_option
@task_option(multiple=False)
@click.option("--description", help="What a data folder shows, and who annotated it.")
@click.option(
    "--space", type=PATH, help="Also make this folder, a Gradio Space of the checkpoint; a card that is there stays."
)
@overwrite_option
def card(
    folder: Path,
    license: str | None,
    license_name: str | None,
    license_link: str | None,
    name: str | None,
    data_licenses: Sequence[tuple[str, str]],
    data_sources: Sequence[str],
    base: str | None,
    task: str | None,
    description: str | None,
    space: Path | None,
    overwrite: bool,
) -> None:
    """Write README.md of a checkpoint, an adapter or data.

    FOLDER is a checkpoint, an adapter or a data folder; the card is made of what lies in it. --task says what an adapter was
    trained for, where that was not measured. Read the card before others do.
    """
    from unihema.files import write_text
    from unihema.hub_cards import folder_card, write_space
    from unihema.hub_cards.card import CARD_FILE, check_replaceable

    path = folder / CARD_FILE
    if space is not None and path.is_file():
        write_space(folder, space, name, overwrite)
        click.echo(f"{space} written. Look at it with `python {space / 'app.py'}`.")
        return
    if not overwrite:
        check_replaceable(path)
    terms = {"licence": license, "licence_name": license_name, "licence_link": license_link, "name": name}
    if (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
        sources = [NameValue("cbc=https://...").convert(source, None, None) for source in data_sources]
        text = folder_card(
            folder,
            data_licences=dict(data_licenses),
            data_sources=dict(sources),
            base_model=base,
            task=task,
            **terms,
        )
    else:
        from unihema.training.data.data_record import data_folder_card

        of_models = {"--base": base, "--task": task, "--data-license": data_licenses}
        if given := [name for name, value in of_models.items() if value]:
            raise click.UsageError(f"{given[0]} is of a checkpoint or an adapter, and {folder} is neither.")
        if len(data_sources) > 1:
            raise click.UsageError("A data folder has one --data-source.")
        source = data_sources[-1] if data_sources else None
        text = data_folder_card(folder, source=source, description=description, **terms)
    write_text(path, [text])
    click.echo(f"{path} written. Read it before others do.")
    if space is not None:
        write_space(folder, space, name, overwrite)
        click.echo(f"{space} written. Look at it with `python {space / 'app.py'}`.")


@click.command()
@click.argument("folder", type=PATH)
@click.argument("repo_id")
@click.option("--public", is_flag=True, help="For everybody; a new repository is private by default.")
@click.option("--revision", help="Branch; made when missing.")
@click.option("--message", "-m", help="Message of the commit.")
@base_option
@click.option(
    "--endpoint", is_flag=True, help="With handler.py, by which the Hub's Inference Endpoints run a checkpoint."
)
@click.option("--dry-run", is_flag=True, help="Check and list the files, and send nothing.")
def push(
    folder: Path,
    repo_id: str,
    public: bool,
    revision: str | None,
    message: str | None,
    base: str | None,
    endpoint: bool,
    dry_run: bool,
) -> None:
    """Upload a checkpoint or an adapter to the Hub.

    FOLDER is a checkpoint or an adapter with its card, REPO_ID a repository such as lab/blood-smears. What had arrived before
    a push broke off is not sent again. The token is the one of `hf auth login` or HF_TOKEN.
    """
    from unihema.hub_cards import plan_push, push_folder

    plan = plan_push(folder, repo_id, base, endpoint)
    for file, size in plan.sizes.items():
        click.echo(f"  {size:>13,}  {file}")
    for name, reason in plan.left_out.items():
        click.echo(f"  {'stays here':>13}  {name} ({reason})")
    visibility = "public" if public else "private"
    where = f"{repo_id}{f' at {revision}' if revision else ''}"
    megabytes = sum(plan.sizes.values()) / 1e6
    click.echo(f"{plan.kind}, {len(plan.files)} files, {megabytes:.1f} MB, to {where} ({visibility}).")
    if dry_run:
        click.echo("Nothing was sent.")
        return
    done = push_folder(
        folder,
        repo_id,
        private=not public,
        revision=revision,
        commit_message=message,
        base_model=base,
        endpoint=endpoint,
    )
    click.echo(f"{done.url} ({'private' if done.private else 'public'}), commit {done.commit[:12]}.")
