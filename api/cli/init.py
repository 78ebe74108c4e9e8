"""`unihema init`: the shipped checkpoint as a folder."""

from pathlib import Path

import typer


def init(
    folder: Path = typer.Argument("unihema", help="Folder for the checkpoint."),
    examples: Path = typer.Option(None, help="Also copy example smears into this folder."),
    replace: bool = typer.Option(False, "--replace", help="Delete what is in the folder."),
) -> None:
    """Lay down the checkpoint that comes with the package, as ./unihema; nothing is downloaded."""
    from unihema.shipped import copy_examples, lay_down_checkpoint

    typer.echo(f"Checkpoint in {lay_down_checkpoint(folder, replace)}")
    if examples is not None:
        typer.echo(f"{len(copy_examples(examples))} example smears in {examples}")
