"""`unihema stress`: where a checkpoint breaks."""

from pathlib import Path

import typer

from .options import data_to_measure


def stress(
    checkpoint: Path = typer.Argument(..., help="Checkpoint folder."),
    data: list[Path] = typer.Argument(..., help="Data folders."),
    output: Path = typer.Option(..., "--output", "-o", help="Folder for stress.json, stress.md and the curves."),
    split: str = typer.Option("val", help="Split to measure on."),
    task: list[str] = typer.Option([], "--task", "-t", help="Measure this task only; may be repeated."),
    corruption: list[str] = typer.Option([], "--corruption", "-c", help="This corruption only; may be repeated."),
    severity: list[int] = typer.Option([], "--severity", "-s", help="This severity (1 to 5) only; may be repeated."),
    max_samples: int = typer.Option(None, help="Measure on about this many rows of a task."),
    batch_size: int = typer.Option(8, help="Images at once."),
    bootstrap: int = typer.Option(200, min=0, help="Resamples of the images for 95 % intervals; 0 for none."),
    rename: list[str] = typer.Option(
        [], help="Name of a class in the data and in the checkpoint, RBC='red blood cell'; may be repeated."
    ),
    overwrite: bool = typer.Option(False, help="Measure again what was measured before."),
) -> None:
    """Measure a checkpoint on corrupted images: focus, light, stain, file, magnification, dense fields.

    A stopped run goes on where it stopped.
    """
    from unihema.checkpoint_files import fingerprint, is_onnx
    from unihema.loading import load_model
    from unihema.results.out_of_distribution import ModelReference
    from unihema.training.run.build import load_rows
    from unihema.training.studies.stress import STRESS_TASKS, run_stress

    model, processor = load_model(checkpoint)
    config = data_to_measure(model, data, task, rename, among=STRESS_TASKS)
    settings = {
        # Names, not places: the report is read elsewhere.
        "data": [folder.resolve().name for folder in data],
        "split": split,
        "rename": dict(config.rename) or None,
        "checkpoint_sha256": {name: of for name, of in fingerprint(checkpoint).items() if "safetensors" in name},
    }
    report = run_stress(
        model,
        processor,
        load_rows(config, split),
        output,
        corruptions=list(corruption) or None,
        severities=list(severity) or None,
        max_samples=max_samples,
        batch_size=batch_size,
        bootstrap=bootstrap,
        settings=settings,
        overwrite=overwrite,
        reference=None if is_onnx(checkpoint) else ModelReference.of_model(model, checkpoint),
    )
    typer.echo(f"{len(report['points'])} points in {output / 'stress.json'}; tables in {output / 'stress.md'}.")
