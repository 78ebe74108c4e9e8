"""`unihema adapt`: an adapter for a lab's own images and classes."""

from pathlib import Path
from typing import Any

import typer

from .options import pairs, run_overrides, stopped_runs_exit


def adapt(
    base: str = typer.Argument(..., help="Checkpoint folder, or a repository on the Hub. It is not changed."),
    data: list[Path] = typer.Option(..., "--data", help="Data folder (docs/data.md); may be repeated."),
    task: str = typer.Option(..., "--task", "-t", help="detection, segmentation, classification or qa."),
    output: Path = typer.Option(..., "--output", "-o", help="Folder for the adapter."),
    labels: str = typer.Option(None, help="Your classes, separated by commas; those of the data by default."),
    start_from: list[str] = typer.Option([], "--from", help="NEW=BASE: what a new class starts from; may be repeated."),
    method: str = typer.Option("lora", help="lora, dora or ia3."),
    rank: int = typer.Option(None, help="Width of the change of each layer; 8 by default."),
    lr: float = typer.Option(None, help="Peak learning rate."),
    max_steps: int = typer.Option(None, help="Optimizer steps; fewer when it no longer gets better."),
    time_limit: float = typer.Option(None, help="Minutes of training."),
    patience: int = typer.Option(None, help="Evaluations without a better one before it stops."),
    max_samples: int = typer.Option(None, help="Train on at most this many images, drawn by chance."),
    image_size: int = typer.Option(None, help="Longest edge in pixels; the base's by default."),
    batch_size: int = typer.Option(None, help="Images of a batch."),
    bf16: bool = typer.Option(False, help="Train in bfloat16 where that is safe."),
    seed: int = typer.Option(None, help="Of everything random."),
    folds: int = typer.Option(None, help="Also train and measure this many times, each on other images."),
    base_data: Path = typer.Option(
        None, help="Data folder of the base: what is forgotten is measured on its val split."
    ),
    setting: list[str] = typer.Option([], "--set", help="Any other setting of run_config.json, NAME=JSON."),
    resume: bool = typer.Option(False, "--resume", help="Go on where the same command was stopped."),
    license: str = typer.Option(None, help="Licence of the adapter's weights: writes a card that may be published."),
    data_license: list[str] = typer.Option([], help="Licence of a data folder, NAME=LICENCE; may be repeated."),
    base_repo: str = typer.Option(None, help="For the card: the base's repository on the Hub."),
) -> None:
    """Train an adapter on a few images of your own: a few megabytes beside a checkpoint that stays as it is.

    Prints what was gained and forgotten. Exit code 3: stopped by Ctrl-C or a signal, with a checkpoint saved.
    """
    from unihema.files import write_text
    from unihema.hub_cards import folder_card
    from unihema.training.studies.adapt import ADAPTED_TASKS, before_after_lines
    from unihema.training.studies.adapt import adapt as run

    tasks = ADAPTED_TASKS.get(task, [])
    given: dict[str, Any] = {
        "adapter.rank": rank,
        "optimisation.learning_rate": lr,
        "optimisation.max_steps": max_steps,
        "optimisation.time_limit_minutes": time_limit,
        "optimisation.patience": patience,
        "optimisation.mixed_precision": "bf16" if bf16 else None,
        "optimisation.seed": seed,
        "data.max_samples": max_samples,
        "data.image_sizes": {name: {"longest_edge": image_size} for name in tasks} if image_size else None,
        "data.batch_size": dict.fromkeys(tasks, batch_size) if batch_size else None,
    }
    with stopped_runs_exit():
        report = run(
            base,
            data,
            task,
            output,
            labels=None if labels is None else [name.strip() for name in labels.split(",") if name.strip()],
            method=method,
            start_from=pairs(start_from, "--from", "blast=WBC"),
            folds=folds,
            base_data=base_data,
            overrides=run_overrides(given, setting),
            resume=resume,
        )
    for line in before_after_lines(report):
        typer.echo(line)
    size = (output / "adapter_model.safetensors").stat().st_size / 1e6
    typer.echo(f"\n{output}: adapter of {size:.1f} MB. Use it as a checkpoint: unihema predict {output} ...")
    if license is None:
        typer.echo(f"To publish it: unihema card {output} --base OWNER/BASE --license LICENCE, then unihema push.")
        return
    licences = pairs(data_license, "--data-license", "my_data=mit")
    card = folder_card(output, licence=license, data_licences=licences, base_model=base_repo, task=tasks[0])
    write_text(output / "README.md", [card])
    typer.echo(f"{output / 'README.md'} written. Read it before others do.")
