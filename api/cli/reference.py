"""`unihema reference`: what a checkpoint was trained on, so that it can tell when an image is something else."""

from pathlib import Path

import typer

from .options import data_to_measure


def reference(
    checkpoint: Path = typer.Argument(..., help="Checkpoint or adapter folder; the reference is written into it."),
    data: list[Path] = typer.Argument(..., help="The data folders it was trained on."),
    train_split: str = typer.Option("train", help="Split it was trained on: what images are like."),
    split: str = typer.Option("val", help="Split it was not trained on: how much they vary."),
    task: list[str] = typer.Option([], "--task", "-t", help="Of this task only; may be repeated."),
    max_images: int = typer.Option(500, min=2, help="Look at no more images of a data set, task and split."),
    rename: list[str] = typer.Option(
        [], help="Name of a class in the data and in the checkpoint, RBC='red blood cell'; may be repeated."
    ),
) -> None:
    """Record what the training images are like, so that results warn of images unlike them."""
    from unihema.checkpoint_files import is_onnx
    from unihema.loading import load_model
    from unihema.modeling_unihema.tasks import IMAGE_TASKS
    from unihema.training.run.build import load_rows
    from unihema.training.studies.reference import fit_reference

    if is_onnx(checkpoint):
        raise typer.BadParameter(f"{checkpoint}: an ONNX file has no place for a reference; name a checkpoint folder.")
    wrong = [name for name in task if name not in IMAGE_TASKS]
    if wrong:
        raise typer.BadParameter(f"--task {wrong[0]}: choose among {', '.join(IMAGE_TASKS)}.")
    model, processor = load_model(checkpoint)
    config = data_to_measure(model, data, task, rename, among=IMAGE_TASKS)
    rows = [load_rows(config, name) for name in (train_split, split)]
    found = fit_reference(model, processor, *rows, max_images=max_images)
    for name, of_task in found.tasks.items():
        limits = ", ".join(f"{group} {limit:.2f}" for group, limit in zip(of_task.groups, of_task.limits))
        typer.echo(f"{name}: 99 % of validation images are closer than {limits}")
    typer.echo(f"Written to {found.save(checkpoint)}.")
