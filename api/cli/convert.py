"""`unihema convert`: the authors' checkpoint to ours, and back."""

from pathlib import Path

import typer


def convert(
    source: Path = typer.Argument(help="The authors' .pth; with --to-official a checkpoint folder of ours."),
    output: Path = typer.Argument(help="New checkpoint folder; with --to-official a new .pth."),
    tokenizer: str = typer.Option(None, help="T5's spiece.model, a tokenizer folder, or a name on the Hub (flan-T5)."),
    report: bool = typer.Option(False, help="Also write conversion.tsv: what became of every tensor."),
    to_official: bool = typer.Option(False, "--to-official", help="The other way."),
) -> None:
    """Convert the authors' Uni-Hema checkpoint into a UniHema checkpoint folder, or back."""
    from collections import Counter

    from unihema.official.convert import convert_from_official, convert_to_official

    if to_official:
        count = convert_to_official(source, output)
        typer.echo(f"{count} tensors written to {output}. Those without effect in the official model are zero.")
        return
    became = convert_from_official(source, output, tokenizer, report)
    typer.echo(f"{len(became.converted)} tensors converted, {len(became.dropped)} not read:")
    for reason, count in Counter(became.dropped.values()).items():
        if not reason.startswith("the same tensor"):
            typer.echo(f"  {count:4d}  {reason}")
    copies = sum(reason.startswith("the same tensor") for reason in became.dropped.values())
    typer.echo(f"  {copies:4d}  another name of a tensor that is read")
    typer.echo(f"Checkpoint {output}.")
