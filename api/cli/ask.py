"""`unihema ask`: one question about one image."""

from pathlib import Path

import typer


def ask(
    checkpoint: Path = typer.Argument(..., help="Checkpoint folder."),
    image: Path = typer.Argument(..., help="Image file."),
    question: list[str] = typer.Argument(..., help="Questions, or sentences with ___ where a word is to be filled in."),
) -> None:
    """Answer questions about an image."""
    from unihema.checkpoint import load_checkpoint
    from unihema.predict import analyze

    model, processor = load_checkpoint(checkpoint)
    result = analyze(model, processor, image, tasks=(), questions=question)
    for entry in result.answers:
        typer.echo(entry["answer"] if len(question) == 1 else f"{entry['question']} {entry['answer']}")
