"""`unihema ask`: one question about one image."""

from pathlib import Path

import typer


def ask(
    checkpoint: Path = typer.Argument(..., help="Checkpoint folder."),
    image: Path = typer.Argument(..., help="Image file."),
    question: list[str] = typer.Argument(..., help="Questions, or sentences with ___ where a word is to be filled in."),
) -> None:
    """Answer questions about an image."""
    from unihema.analyzer import Analyzer

    answers = Analyzer.from_pretrained(checkpoint).ask(image, question)
    for asked, answer in zip(question, answers, strict=True):
        typer.echo(answer if len(question) == 1 else f"{asked} {answer}")
