"""`unihema parity`: the official model's recorded outputs against ours."""

from pathlib import Path

import typer


def parity(
    folder: Path = typer.Argument(help="Folder with golden.npz and state_dict_manifest.json."),
    output: Path = typer.Option(None, "--output", "-o", help="Also write the table there, as Markdown."),
) -> None:
    """Reproduce the recorded outputs of the official model and show the differences."""
    from unihema.files import write_text
    from unihema.official.parity import parity as compare
    from unihema.official.parity import parity_table

    rows = compare(folder)
    table = parity_table(rows)
    typer.echo(table)
    if output is not None:
        write_text(output, [table])
    failed = [row.name for row in rows if not row.passed]
    typer.echo(f"{len(rows) - len(failed)} of {len(rows)} arrays within tolerance.")
    if failed:
        raise typer.Exit(1)
