"""What the commands share: options of one spelling and one meaning, and options that are settings of a training run."""

import json
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import click


# The names of the table of tasks (modeling_unihema/tasks.py), which would take PyTorch to import; a test compares them.
TASKS = ("detection", "segmentation", "single_cell", "question_answering", "cloze")
PATH = click.Path(path_type=Path)


class NameValue(click.ParamType):
    """`NAME=VALUE`, as a pair.

    Args:
        example (`str`): A right one, for messages.
    """

    name = "NAME=VALUE"

    def __init__(self, example: str):
        self.example = example

    def get_metavar(self, *_: Any, **__: Any) -> str:
        return self.name

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        name, _, text = value.partition("=")
        if not name or not text:
            self.fail(f"{value!r} must be {self.name}, such as {self.example}.", param, ctx)
        return name, text


class TaskNumber(click.ParamType):
    """`N`, or `TASK=N`, as a pair of the task (or `None`) and the number."""

    name = "N|TASK=N"

    def get_metavar(self, *_: Any, **__: Any) -> str:
        return self.name

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str | None, int]:
        if isinstance(value, tuple):
            return value
        task, equals, text = value.rpartition("=")
        if equals and task not in TASKS:
            self.fail(f"{value!r}: unknown task {task!r}; tasks are {', '.join(TASKS)}.", param, ctx)
        if not text.isdecimal() or int(text) < 1:
            self.fail(
                f"{value!r}: {text!r} is not a number above 0. Write N, or TASK=N such as detection=480.", param, ctx
            )
        return task or None, int(text)


def of_each_task(values: Sequence[tuple[str | None, int]], tasks: Sequence[str]) -> dict[str, int]:
    """Task -> number: what a [`TaskNumber`] option says of single tasks, and of all other `tasks` where it says so.

    Raises:
        click.UsageError: A task that `tasks`, where there are some, has not.
    """
    other = next((name for name, _ in values if name is not None and tasks and name not in tasks), None)
    if other is not None:
        raise click.UsageError(f"{other}=N: that task is not asked for (--task {' --task '.join(tasks)}).")
    found = {task: number for name, number in values if name is None for task in tasks or TASKS}
    return found | {name: number for name, number in values if name is not None}


def of_all_tasks(values: Sequence[tuple[str | None, int]], option: str, default: int) -> int:
    """The one number of a [`TaskNumber`] option, where tasks share it.

    Raises:
        click.UsageError: Tasks have numbers of their own.
    """
    if any(task is not None for task, _ in values):
        raise click.UsageError(f"{option} TASK=N: the tasks share their batches here. Write {option} N.")
    return values[-1][1] if values else default


def task_option(multiple: bool = True, **details: Any) -> Callable:
    """`--task`, by the names of the table of tasks."""
    name, help = ("tasks", "Task; may be repeated.") if multiple else ("task", "One task.")
    return click.option("--task", "-t", name, type=click.Choice(TASKS), multiple=multiple, help=help, **details)


def output_option(file: bool = False, **details: Any) -> Callable:
    """`--output`, the one place that a command writes to."""
    help = "JSON file for what the command finds." if file else "Folder for what the command writes."
    return click.option("--output", "-o", type=PATH, help=help, **details)


image_size_option = click.option(
    "--image-size",
    "image_sizes",
    type=TaskNumber(),
    multiple=True,
    help="Longest edge in pixels at which the model sees images; may be repeated. The checkpoint's by default.",
)
batch_size_option = click.option(
    "--batch-size",
    "batch_sizes",
    type=TaskNumber(),
    multiple=True,
    help="Images of a batch; may be repeated. TASK=N where each task has batches of its own.",
)
device_option = click.option(
    "--device",
    default="auto",
    show_default=True,
    help="auto, cpu, cuda, cuda:0 or mps; auto is an NVIDIA GPU, else Apple's, else the processor.",
)
int8_option = click.option(
    "--int8", is_flag=True, help="8-bit linear layers on the CPU: faster, less exact. `evaluate` says how much."
)
overwrite_option = click.option("--overwrite", is_flag=True, help="Start anew, and replace what is there already.")
base_option = click.option(
    "--base", help="Repository of the model that this one was made from, where the folder does not name it."
)
license_option = click.option("--license", help="Licence as the Hub calls it: cc-by-4.0, mit, other and so on.")
data_license_option = click.option(
    "--data-license",
    "data_licenses",
    type=NameValue("cbc=mit"),
    multiple=True,
    help="Licence of a data set that does not state it; may be repeated.",
)
group_pattern_option = click.option(
    "--group-pattern",
    "group_patterns",
    type=NameValue(r"patient='^P(\d+)_'"),
    multiple=True,
    help="patient, slide or source_image, and a regular expression that has it in brackets, for file names; may be repeated.",
)
set_option = click.option(
    "--set",
    "more_settings",
    type=NameValue("optimisation.weight_decay=0.05"),
    multiple=True,
    help="Any other setting of run_config.json, its value in JSON; may be repeated.",
)


class SettingsCommand(click.Command):
    """A command with options that are settings of a run: name, type and help are those of `RunConfig`.

    They are made when the command is called or its help is asked for, since `RunConfig` takes PyTorch to import. The command
    gets one argument `settings` of them and of `--set`: dotted name -> value, of those that were given.

    Args:
        settings (`Sequence[str]`): Dotted names of settings, such as `optimisation.learning_rate`.
    """

    def __init__(self, *args: Any, settings: Sequence[str] = (), **details: Any):
        super().__init__(*args, **details)
        self.settings = settings

    @cached_property
    def setting_options(self) -> dict[str, click.Option]:
        """Dotted name -> option."""
        return {name: setting_as_option(name) for name in self.settings}

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        *own, help_option = super().get_params(ctx)
        return [*own, *self.setting_options.values(), help_option]

    def invoke(self, ctx: click.Context) -> Any:
        settings = {}
        for name, option in self.setting_options.items():
            value = ctx.params.pop(option.name)
            if option.multiple:
                value = dict(value) if isinstance(option.type, NameValue) else list(value)
            if value not in (None, [], {}):
                settings[name] = value
        ctx.params["settings"] = settings | settings_of(ctx.params.pop("more_settings", ()))
        return super().invoke(ctx)


def setting_as_option(dotted: str) -> click.Option:
    """A setting of a run as an option of the same name, with the type and the help of its dataclass.

    Args:
        dotted (`str`): Its name, such as `optimisation.learning_rate`.
    """
    from unihema.training.run.config import RunConfig

    section: Any = RunConfig
    *sections, name = dotted.split(".")
    for inner in sections:
        section = typing.get_type_hints(section)[inner]
    details = _option_details(typing.get_type_hints(section)[name])
    again = " May be repeated." if details.get("multiple") else ""
    return click.Option([f"--{name.replace('_', '-')}"], help=_meaning(section, name) + again, **details)


def _option_details(hint: Any) -> dict[str, Any]:
    """What click needs to know of a setting's type."""
    optional = typing.get_origin(hint) in (typing.Union, types.UnionType)
    kind = typing.get_args(hint)[0] if optional else hint
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return {"type": click.Choice(inner)}
    if origin is list:
        return {"type": inner[0], "multiple": True}
    if origin is dict:
        return {"type": NameValue("blast=WBC"), "multiple": True}
    return {"is_flag": True, "default": None} if kind is bool else {"type": kind}


def _meaning(section: type, name: str) -> str:
    """What the docstring of a dataclass says of a field under `Args:`."""
    found = re.search(rf"^ +{name} \(.*?\): (.+?)(?=^ +\w+ \(|^\s*$|\Z)", section.__doc__ or "", re.M | re.S)
    assert found, f"{section.__name__} says nothing of {name}"
    return " ".join(found.group(1).split())


def settings_of(pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Dotted name -> value, of what `--set` was given."""
    return {name: _json_or_text(text) for name, text in pairs}


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def data_of(folders: Sequence[Path], tasks: Sequence[str], settings: Mapping[str, Any], command: str) -> Any:
    """The `DataConfig` of a command that reads data and trains nothing.

    Raises:
        click.UsageError: A setting of something else than data.
        RunConfigError: An unknown setting or a value of the wrong type.
    """
    from unihema.training.run.config import RunConfig

    other = [name for name in settings if not name.startswith("data.")]
    if other:
        raise click.UsageError(
            f"--set {other[0]}: `{command}` trains nothing; only settings of data.* change what it does."
        )
    given = {"data.folders": [str(folder) for folder in folders], "data.tasks": list(tasks)}
    return RunConfig().with_overrides({**given, **settings}).data


@contextmanager
def stopped_runs_exit() -> Iterator[None]:
    """A run that was stopped, with a checkpoint saved, ends the command with exit code 3."""
    from unihema.errors import TrainingInterrupted

    try:
        yield
    except TrainingInterrupted as stopped:
        click.echo(str(stopped), err=True)
        raise click.exceptions.Exit(3) from None


def port_option(default: int) -> Callable[[Callable], Callable]:
    """`--port`, of a command that listens."""
    return click.option(
        "--port", type=click.IntRange(0, 65535), default=default, show_default=True, help="Port; 0 takes a free one."
    )
