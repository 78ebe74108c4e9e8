"""`unihema evaluate`: a checkpoint measured on data folders."""

from pathlib import Path

import typer

from unihema.cli.figures import figures_text


def evaluate(
    checkpoint: Path = typer.Argument(..., help="Checkpoint folder."),
    data: list[Path] = typer.Argument(..., help="Data folders."),
    split: str = typer.Option("val", help="Split to measure on."),
    task: list[str] = typer.Option([], "--task", "-t", help="Measure this task only; may be repeated."),
    output: Path = typer.Option(None, "--output", "-o", help="Folder for metrics.json and metrics.md."),
    batch_size: int = typer.Option(8, help="Images at once."),
    max_samples: int = typer.Option(None, help="Measure on about this many rows of a task."),
    shuffle_images: bool = typer.Option(
        False, help="The image-blind control: every question is asked of another image."
    ),
    attributes: bool = typer.Option(False, help="Measure attribute tables of single-cell images as morphology."),
) -> None:
    """Measure a checkpoint on data folders."""
    from unihema.checkpoint import available_tasks, load_checkpoint, require_tasks
    from unihema.training.build import load_rows
    from unihema.training.evaluation import evaluate_model, write_report
    from unihema.training.run_config import DataConfig

    model, processor = load_checkpoint(checkpoint)
    require_tasks(model, task)
    rows = load_rows(
        DataConfig(
            folders=[str(folder) for folder in data],
            tasks=list(task) or list(available_tasks(model)),
            attributes_as_detection=attributes,
        ),
        split,
    )
    report = evaluate_model(
        model, processor, rows, batch_size=batch_size, max_samples=max_samples, shuffle_images=shuffle_images
    )
    if not report:
        raise ValueError("Nothing to measure: the image-blind control is for question_answering and cloze.")
    for name, figures in report.items():
        typer.echo(f"{name} ({figures['rows']} rows): {figures_text(figures)}")
    if output is not None:
        write_report(report, output)
        typer.echo(f"Written to {output / 'metrics.json'}.")
