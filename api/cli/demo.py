"""`unihema demo`: the shipped checkpoint on real smears, from installation to results in a minute."""

from pathlib import Path

import typer


QUESTIONS = (
    "What type of white blood cell is this?",
    "What is the shape of the nucleus?",
    "What is the colour of the granules?",
)


def demo(folder: Path = typer.Argument("demo", help="Where everything is written.")) -> None:
    """Analyse the example smears with the checkpoint that comes with the package; nothing is downloaded or trained."""
    from unihema.analyzer import Analyzer
    from unihema.shipped import copy_examples, lay_down_checkpoint

    checkpoint = lay_down_checkpoint(folder / "unihema", replace=True)
    images = copy_examples(folder / "smears")
    typer.echo(f"1/3 Checkpoint in {checkpoint}, {len(images)} example smears in {folder / 'smears'}")

    fields = [path for path in images if path.name.startswith("field")]
    analyzer = Analyzer.from_pretrained(checkpoint)
    batch = analyzer.analyze_files(fields, folder / "results", overwrite=True)
    totals = ", ".join(f"{name} {count}" for name, count in batch.totals.items())
    typer.echo(f"2/3 Cells in {batch.images} fields: {totals}. Pictures and tables in {folder / 'results'}")

    typer.echo("3/3 Single cells")
    for path in images:
        if path in fields:
            continue
        questions = QUESTIONS if path.name.startswith("white") else ()
        result = analyzer(path, tasks=("single_cell",), questions=questions)
        typer.echo(f"{path.name}: {result.single_cell['label']} ({result.single_cell['score']:.0%})")
        for answer in result.answers:
            typer.echo(f"  {answer['question']} {answer['answer']}")
