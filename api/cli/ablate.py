"""`unihema ablate`: what each part of the model is good for, on one's own data."""

from pathlib import Path

import typer

from .options import run_overrides, stopped_runs_exit


def ablate(
    folders: list[Path] = typer.Argument(None, help="Data folders."),
    output: Path = typer.Option(..., "--output", "-o", help="Folder for the runs and their comparison."),
    only: list[str] = typer.Option([], "--only", help="Run this ablation only; may be repeated."),
    unseen: str = typer.Option(
        None, help="Hold this data folder out for the ablation 'unseen', or a group such as slide=7."
    ),
    data: Path = typer.Option(None, help="A mix: a YAML file of data folders and settings."),
    config: Path = typer.Option(None, help="A run_config.json with the settings of every run."),
    task: list[str] = typer.Option([], "--task", "-t", help="Train this task only; may be repeated. All by default."),
    epochs: float = typer.Option(None, help="Passes over the data, of each run."),
    max_steps: int = typer.Option(None, help="Optimizer steps of each run."),
    time_limit: float = typer.Option(None, help="Minutes of training of each run."),
    setting: list[str] = typer.Option([], "--set", help="Any setting of run_config.json, NAME=JSON."),
    resume: bool = typer.Option(False, "--resume", help="Go on with what an earlier call left in --output."),
) -> None:
    """Train the whole model, and one for each question of the paper's ablations, and compare them.

    Exit code 3: stopped by Ctrl-C or a signal, with a checkpoint saved.
    """
    from unihema.training.run.config import RunConfig, read_mix
    from unihema.training.studies.ablations import run_ablations

    if data is not None and config is not None:
        raise typer.BadParameter("--data and --config both bring settings: give one of them.")
    settings = read_mix(data).run if data is not None else RunConfig.load(config) if config is not None else RunConfig()
    given = {
        "output_dir": str(output),
        "data.folders": [str(folder) for folder in folders or ()] or None,
        "data.tasks": list(task) or None,
        "optimisation.epochs": epochs,
        "optimisation.max_steps": max_steps,
        "optimisation.time_limit_minutes": time_limit,
    }
    with stopped_runs_exit():
        run_ablations(settings.with_overrides(run_overrides(given, setting)), list(only) or None, unseen, resume)
    typer.echo((output / "ablation.md").read_text(encoding="utf-8"))
