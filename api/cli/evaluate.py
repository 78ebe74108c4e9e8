"""`unihema evaluate`: a checkpoint measured on data folders."""

from functools import partial
from pathlib import Path

import typer

from .figures import figures_text
from .options import IMAGE_SIZE_HELP, data_to_measure, pairs


def evaluate(
    checkpoint: Path = typer.Argument(..., help="Checkpoint folder."),
    data: list[Path] = typer.Argument(..., help="Data folders; of several, each is also reported by itself."),
    split: str = typer.Option("val", help="Split to measure on."),
    task: list[str] = typer.Option([], "--task", "-t", help="Measure this task only; may be repeated."),
    output: Path = typer.Option(None, "--output", "-o", help="Folder for metrics.json and metrics.md."),
    batch_size: int = typer.Option(8, help="Images at once."),
    max_samples: int = typer.Option(None, help="Measure on about this many rows of a task."),
    shuffle_images: bool = typer.Option(
        False, help="The image-blind control: every question is asked of another image."
    ),
    attributes: bool = typer.Option(False, help="Measure attribute tables of single-cell images as morphology."),
    rename: list[str] = typer.Option(
        [], help="Name of a class in the data and in the checkpoint, RBC='red blood cell'; may be repeated."
    ),
    image_size: list[str] = typer.Option([], help=IMAGE_SIZE_HELP),
    name_classes: bool = typer.Option(
        False,
        "--name-classes",
        help="Ask detection for the classes each data folder annotates, as predict does with --prompt, instead of what it "
        "asks without.",
    ),
    bootstrap: int = typer.Option(1000, min=0, help="Resamples of the images for 95 % intervals; 0 for none."),
    int8: bool = typer.Option(
        False, "--int8", help="Measure with 8-bit linear layers on the CPU, and what that costs in accuracy."
    ),
) -> None:
    """Measure a checkpoint on data folders."""
    from unihema.analyzer import set_image_sizes
    from unihema.inference.int8 import to_int8
    from unihema.loading import load_model
    from unihema.training.evaluation import evaluate_model, write_report
    from unihema.training.run.build import load_rows

    model, processor = load_model(checkpoint, "cpu" if int8 else None)
    set_image_sizes(processor, pairs(image_size, "--image-size", "detection=480", int))
    rows = load_rows(data_to_measure(model, data, task, rename, attributes_as_detection=attributes), split)
    measure = partial(
        evaluate_model,
        model,
        processor,
        rows,
        batch_size=batch_size,
        max_samples=max_samples,
        shuffle_images=shuffle_images,
        bootstrap=bootstrap,
        name_classes=name_classes,
    )
    report, exact = measure(), {}
    if int8:
        to_int8(model)
        report, exact = measure(), report
    if not report:
        from unihema.errors import InputError

        raise InputError("Nothing to measure: the image-blind control is for question_answering and cloze.")
    for name, figures in report.items():
        typer.echo(f"{name} ({figures['rows']} rows): {figures_text(figures)}")
        if exact:
            typer.echo(f"  without int8: {figures_text(exact[name])}")
        for data_set, part in figures.get("datasets", {}).items():
            typer.echo(f"  {data_set} ({part['rows']} rows): {figures_text(part)}")
    if output is not None:
        write_report(report, output)
        typer.echo(f"Written to {output / 'metrics.json'}.")
