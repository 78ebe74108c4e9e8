"""`unihema train`: a model from data folders."""

from pathlib import Path
from typing import Any

import typer

from .figures import figures_text
from .options import pairs, run_overrides, stopped_runs_exit


def train(
    folders: list[Path] = typer.Argument(None, help="Data folders (their layouts are in docs/data.md)."),
    data: Path = typer.Option(None, help="A mix: a YAML file of data folders and settings (docs/training.md)."),
    recipe: str = typer.Option(None, help="Train in stages: six-stages."),
    stage: int = typer.Option(None, help="With --recipe: run the stage of this number only."),
    output: Path = typer.Option(None, "--output", "-o", help="Folder for the model, its log and its checkpoints."),
    task: list[str] = typer.Option([], "--task", "-t", help="Train this task only; may be repeated. All by default."),
    preset: str = typer.Option(None, help="Size of a new model: tiny or base."),
    init: str = typer.Option(None, help="Checkpoint to go on from, instead of a preset."),
    epochs: float = typer.Option(None, help="Passes over the data."),
    max_steps: int = typer.Option(None, help="Optimizer steps."),
    time_limit: float = typer.Option(None, help="Minutes of training; the learning rate follows the clock."),
    lr: float = typer.Option(None, help="Peak learning rate."),
    batch_size: list[str] = typer.Option([], help="Images of a batch, TASK=N; may be repeated."),
    image_size: list[str] = typer.Option([], help="Longest edge in pixels, TASK=N; may be repeated."),
    task_weight: list[str] = typer.Option([], help="Share of the batches, TASK=SHARE; may be repeated."),
    attributes: bool = typer.Option(False, help="Learn attribute tables of single-cell images as morphology."),
    mask_prompt: str = typer.Option(None, help="What the masks show."),
    bf16: bool = typer.Option(False, help="Train in bfloat16 where that is safe; faster on recent CPUs and GPUs."),
    ema: float = typer.Option(None, help="Decay of averaged weights, such as 0.998."),
    workers: int = typer.Option(None, help="Processes that load images."),
    seed: int = typer.Option(None, help="Of everything random."),
    evaluate_every: int = typer.Option(None, help="Epochs between evaluations; only at the end by default."),
    setting: list[str] = typer.Option([], "--set", help="Any other setting of run_config.json, NAME=JSON."),
    config: Path = typer.Option(None, help="A run_config.json to start from; options override it."),
    resume: bool = typer.Option(False, "--resume", help="Go on from the last checkpoint in --output."),
) -> None:
    """Train a model on data folders, at once or in stages; metrics, thresholds and a card are saved with it.

    Exit code 3: stopped by Ctrl-C or a signal, with a checkpoint saved.
    """
    from unihema.training.run.config import MIX_FILE, Mix, RunConfig, read_mix

    _check_recipe(recipe, stage)
    if data is not None and config is not None:
        raise typer.BadParameter("--data and --config both bring settings: give one of them.")
    if resume and config is None and data is None and output is not None:
        if recipe is not None and (output / MIX_FILE).is_file():
            data = output / MIX_FILE
        elif recipe is None and (output / "run_config.json").is_file():
            config = output
    mix = read_mix(data) if data is not None else Mix(RunConfig.load(config) if config is not None else RunConfig())
    if mix.stages and recipe is None:
        raise typer.BadParameter(f"{data} has settings for stages: train with --recipe six-stages.")
    settings = mix.run
    given = {
        "output_dir": None if output is None else str(output),
        "data.folders": [str(folder) for folder in folders or ()] or None,
        "data.tasks": list(task) or None,
        "data.batch_size": {**settings.data.batch_size, **pairs(batch_size, "--batch-size", "detection=4", int)},
        "data.image_sizes": {
            **settings.data.image_sizes,
            **{
                name: {"longest_edge": edge}
                for name, edge in pairs(image_size, "--image-size", "detection=320", int).items()
            },
        },
        "data.task_weights": {
            **settings.data.task_weights,
            **pairs(task_weight, "--task-weight", "detection=0.5", float),
        },
        "data.attributes_as_detection": attributes or None,
        "data.segmentation_prompt": mask_prompt,
        "data.workers": workers,
        "model.preset": preset,
        "model.initial_checkpoint": init,
        "optimisation.epochs": epochs,
        "optimisation.max_steps": max_steps,
        "optimisation.time_limit_minutes": time_limit,
        "optimisation.learning_rate": lr,
        "optimisation.mixed_precision": "bf16" if bf16 else None,
        "optimisation.ema_decay": ema,
        "optimisation.seed": seed,
        "logging.evaluate_every": evaluate_every,
    }
    with stopped_runs_exit():
        _run(settings.with_overrides(run_overrides(given, setting)), recipe, mix.stages, stage, resume)


def _check_recipe(recipe: str | None, stage: int | None) -> None:
    from unihema.training.studies.stages import RECIPES

    if recipe is not None and recipe not in RECIPES:
        raise typer.BadParameter(f"--recipe {recipe!r} is not known; there is {', '.join(RECIPES)}.")
    if stage is not None and recipe is None:
        raise typer.BadParameter("--stage is a stage of a recipe: add --recipe six-stages.")


def _run(config: Any, recipe: str | None, stages: dict[str, dict[str, Any]], stage: int | None, resume: bool) -> None:
    """Trains, and prints the figures."""
    if recipe is None:
        from unihema.training.run.loop import train as train_at_once

        for name, figures in train_at_once(config, resume=resume).items():
            typer.echo(f"{name}: {figures_text(figures)}")
        return
    from unihema.training.studies.stages import RECIPES, train_stages

    train_stages(config, RECIPES[recipe], stages, only=stage, resume=resume)
    typer.echo((Path(config.output_dir) / "stages.md").read_text(encoding="utf-8"))
