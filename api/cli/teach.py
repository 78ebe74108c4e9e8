"""Commands that teach: `train`, at once or by a recipe of several runs, and `adapt`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import (
    PATH,
    SettingsCommand,
    batch_size_option,
    image_size_option,
    of_each_task,
    output_option,
    overwrite_option,
    set_option,
    stopped_runs_exit,
    task_option,
)


if TYPE_CHECKING:
    from unihema.training.run.config import Mix, RunConfig


STAGES, ABLATIONS, ABROAD = "six-stages", "ablations", "abroad"
RUN_FILE = "run_config.json"
# By these an output folder of each recipe, or of none, is known, and what it was begun with.
BEGUN_WITH = {None: RUN_FILE, STAGES: "mix.json", ABLATIONS: f"whole/{RUN_FILE}", ABROAD: "abroad_config.json"}
# By one of these that of an adapter: its images are measured before its run begins.
BEGUN_ADAPTING = ("before_after.json", RUN_FILE, "fold-1")
# Settings that are options of both commands.
HOW_TO_TRAIN = (
    "optimisation.max_steps",
    "optimisation.time_limit_minutes",
    "optimisation.learning_rate",
    "optimisation.mixed_precision",
    "optimisation.device",
    "optimisation.compile",
)


@click.command(cls=SettingsCommand, settings=("model.initial_checkpoint", "optimisation.epochs", *HOW_TO_TRAIN))
@click.argument("data", nargs=-1, type=PATH)
@output_option(required=True)
@click.option("--config", type=PATH, help="A run_config.json, or a mix in YAML, to start from; options override it.")
@click.option(
    "--recipe",
    type=click.Choice((STAGES, ABLATIONS, ABROAD)),
    help="Several runs: the paper's six stages, the whole model and one without each part in question, or one without each "
    "data folder, measured on it.",
)
@click.option(
    "--only",
    multiple=True,
    help="Of the recipe, the stage of this number or the ablation of this name; may be repeated. `unseen=FOLDER` or "
    "`unseen=slide=7` holds that out. Of abroad, the data folder of this name; `never=NAME` is in no training.",
)
@task_option()
@batch_size_option
@image_size_option
@set_option
@overwrite_option
def train(
    data: tuple[Path, ...],
    output: Path,
    config: Path | None,
    recipe: str | None,
    only: tuple[str, ...],
    tasks: tuple[str, ...],
    batch_sizes: Sequence[tuple[str | None, int]],
    image_sizes: Sequence[tuple[str | None, int]],
    overwrite: bool,
    settings: Mapping[str, Any],
) -> None:
    """Train a model on data folders.

    DATA are data folders (docs/data.md); the settings that OUTPUT holds already are used where neither DATA nor --config is
    given. Metrics, thresholds and a card are saved with the model.

    Exit code 3: stopped by Ctrl-C or a signal, with a checkpoint saved.
    """
    stage = _only_stage(recipe, only)
    begun_with = output / BEGUN_WITH[recipe]
    if config is None and not data and begun_with.is_file():
        config = begun_with
    mix = _settings_of(config)
    if mix.stages and recipe != STAGES:
        raise click.UsageError(f"{config} has settings for stages: add --recipe {STAGES}.")
    run = mix.run.with_overrides(
        {
            "output_dir": str(output),
            **({"data.folders": [str(folder) for folder in data]} if data else {}),
            **({"data.tasks": list(tasks)} if tasks else {}),
            "data.batch_size": {**mix.run.data.batch_size, **of_each_task(batch_sizes, tasks)},
            "data.image_sizes": {
                **mix.run.data.image_sizes,
                **{task: {"longest_edge": edge} for task, edge in of_each_task(image_sizes, tasks).items()},
            },
            **settings,
        }
    )
    if overwrite:
        run.check()
        _start_anew(output, (BEGUN_WITH[recipe],), run)
    with stopped_runs_exit():
        if recipe == STAGES:
            from unihema.training.studies.stages import train_stages

            train_stages(run, changes=mix.stages, only=stage, resume=True)
            click.echo((output / "stages.md").read_text(encoding="utf-8"))
        elif recipe == ABLATIONS:
            from unihema.training.studies.ablations import run_ablations

            held_out = [name.removeprefix("unseen=") for name in only if name.startswith("unseen=")]
            if len(held_out) > 1:
                raise click.UsageError(
                    f"--only unseen={held_out[1]}: one data set is held out; --recipe abroad holds out each."
                )
            names = ["unseen" if name.startswith("unseen=") else name for name in only]
            run_ablations(run, names or None, held_out[-1] if held_out else None, resume=True)
            click.echo((output / "ablation.md").read_text(encoding="utf-8"))
        elif recipe == ABROAD:
            from unihema.training.studies.abroad import run_abroad

            never = [name.removeprefix("never=") for name in only if name.startswith("never=")]
            run_abroad(run, [name for name in only if not name.startswith("never=")], never, resume=True)
            click.echo((output / "abroad.md").read_text(encoding="utf-8"))
        else:
            from unihema.training.evaluation.report import figures_text
            from unihema.training.run.loop import train as train_at_once

            for task, figures in train_at_once(run, resume=begun_with.is_file()).items():
                click.echo(f"{task}: {figures_text(figures)}")


def _only_stage(recipe: str | None, only: Sequence[str]) -> int | None:
    """The number of the stage to train alone.

    Raises:
        click.UsageError: There is no recipe, or it is not the number of one stage.
    """
    if recipe is None and only:
        raise click.UsageError("--only names a part of a recipe: add --recipe.")
    if recipe != STAGES or not only:
        return None
    if len(only) > 1 or not only[0].isdecimal():
        raise click.UsageError(f"--only {' '.join(only)}: write the number of one stage.")
    return int(only[0])


def _settings_of(config: Path | None) -> "Mix":
    """What a file says, a mix or a run's configuration; the defaults without one."""
    from unihema.training.run.config import MIX_FILE, Mix, RunConfig, read_mix

    if config is None:
        return Mix(RunConfig())
    if config.suffix in (".yaml", ".yml") or config.name == MIX_FILE:
        return read_mix(config)
    return Mix(RunConfig.load(config))


def _start_anew(folder: Path, made: Sequence[str], run: "RunConfig") -> None:
    """Empties a folder that an earlier call of the command has left.

    Args:
        folder (`Path`): The folder.
        made (`Sequence[str]`): Names that such a folder has, one of them at least.
        run ([`RunConfig`]): What it reads is not deleted.

    Raises:
        click.UsageError: It is something else, or holds what the command reads.
        OutputError: Another run is writing there.
    """
    from unihema.files import contents, empty_folder, real_path
    from unihema.training.run.distributed import join_processes

    whole = real_path(folder)
    read = [Path(path) for path in (".", *run.data.folders, run.model.initial_checkpoint) if path]
    within = [path for path in read if whole in (real_path(path), *real_path(path).parents)]
    if within:
        raise click.UsageError(f"--overwrite would delete {real_path(within[0])} with {folder}: name another --output.")
    state = join_processes(run.optimisation.device)
    if state.is_main_process and folder.exists():
        if contents(folder) and not any((folder / name).exists() for name in made):
            raise click.UsageError(
                f"--overwrite: {folder} holds something else than an earlier run, and is not deleted. Name another --output."
            )
        empty_folder(folder, last=[Path(name).parts[0] for name in made])
    state.wait_for_everyone()


@click.command(cls=SettingsCommand, settings=("adapter.method", "adapter.labels", "adapter.start_from", *HOW_TO_TRAIN))
@click.argument("base")
@click.argument("data", nargs=-1, required=True, type=PATH)
@output_option(required=True)
@task_option(required=True)
@click.option("--folds", type=click.IntRange(2), help="First train and measure this many, each on other images.")
@click.option("--base-data", type=PATH, help="Data folder of the base: what is forgotten is measured on its val split.")
@batch_size_option
@image_size_option
@set_option
@overwrite_option
def adapt(
    base: str,
    data: tuple[Path, ...],
    output: Path,
    tasks: tuple[str, ...],
    folds: int | None,
    base_data: Path | None,
    batch_sizes: Sequence[tuple[str | None, int]],
    image_sizes: Sequence[tuple[str | None, int]],
    overwrite: bool,
    settings: Mapping[str, Any],
) -> None:
    """Train an adapter on a few images of your own.

    BASE is a checkpoint folder or a repository on the Hub, and stays as it is. DATA are data folders (docs/data.md). The
    adapter has a few megabytes; what was gained and forgotten is printed.

    Exit code 3: stopped by Ctrl-C or a signal, with a checkpoint saved.
    """
    from unihema.training.run.config import RunConfig
    from unihema.training.studies.adapt import adapt as train_adapter
    from unihema.training.studies.adapt import before_after_lines

    name = _adapted(tasks)
    overrides = dict(settings)
    of_adapt = {key: overrides.pop(f"adapter.{key}", None) for key in ("method", "labels", "start_from")}
    if sizes := of_each_task(image_sizes, tasks):
        overrides.setdefault("data.image_sizes", {task: {"longest_edge": edge} for task, edge in sizes.items()})
    if batches := of_each_task(batch_sizes, tasks):
        overrides.setdefault("data.batch_size", batches)
    if overwrite:
        folders = [str(folder) for folder in (*data, *([base_data] if base_data else []))]
        run = RunConfig().with_overrides({"data.folders": folders, "model.initial_checkpoint": base})
        _start_anew(output, BEGUN_ADAPTING, run)
    resume = any((output / made).exists() for made in BEGUN_ADAPTING)
    with stopped_runs_exit():
        report = train_adapter(
            base,
            data,
            name,
            output,
            labels=of_adapt["labels"],
            method=of_adapt["method"] or "lora",
            start_from=of_adapt["start_from"],
            folds=folds,
            base_data=base_data,
            overrides=overrides,
            resume=resume,
        )
    for line in before_after_lines(report):
        click.echo(line)
    size = (output / "adapter_model.safetensors").stat().st_size / 1e6
    click.echo(f"\n{output}: adapter of {size:.1f} MB. Use it as a checkpoint: unihema predict {output} ...")
    click.echo(f"To publish it: unihema card {output} --base OWNER/BASE --license LICENCE, then unihema push.")


def _adapted(tasks: Sequence[str]) -> str:
    """What `adapt` calls the tasks.

    Raises:
        click.UsageError: Tasks that no adapter is trained for together.
    """
    from unihema.training.studies.adapt import ADAPTED_TASKS

    for name, of_one in ADAPTED_TASKS.items():
        if set(tasks) == set(of_one):
            return name
    raise click.UsageError(
        f"--task {' --task '.join(tasks)}: an adapter is of one task, or of question_answering and cloze together."
    )
