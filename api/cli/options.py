"""What several commands do with their options."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer


if TYPE_CHECKING:
    from unihema.modeling_unihema.modeling_unihema import UniHemaPreTrainedModel
    from unihema.training.run.config import DataConfig


IMAGE_SIZE_HELP = (
    "Longest edge in pixels at which the model sees images, TASK=N, for another magnification; may be repeated."
)


def pairs(values: Sequence[str], option: str, example: str, convert: Callable[[str], Any] = str) -> dict[str, Any]:
    """`NAME=VALUE` options as a dictionary.

    Args:
        values (`Sequence[str]`): As they were given.
        option (`str`): Its name, for messages.
        example (`str`): A right one, for messages.
        convert (`Callable`): Makes the value of its text.

    Raises:
        typer.BadParameter: No name, no value, or one that `convert` refuses.
    """
    found = {}
    for value in values:
        name, _, text = value.partition("=")
        if not name or not text:
            raise typer.BadParameter(f"{option} {value!r} must look like {example}.")
        try:
            found[name] = convert(text)
        except ValueError as error:
            raise typer.BadParameter(f"{option} {value!r}: {text!r} is not a number.") from error
    return found


def run_overrides(given: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """What changes in a run configuration: options that were given, and over them `--set NAME=JSON`."""
    overrides = {name: value for name, value in given.items() if value is not None}
    return overrides | pairs(settings, "--set", "optimisation.weight_decay=0.05", _json_or_text)


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def data_to_measure(
    model: "UniHemaPreTrainedModel",
    folders: Sequence[Path],
    tasks: Sequence[str],
    rename: Sequence[str],
    among: Sequence[str] | None = None,
    **settings: Any,
) -> "DataConfig":
    """The data of the tasks asked for; of all that the checkpoint does, and are `among` these, where none is.

    Raises:
        CheckpointError: See `require_tasks`.
        ValueError: See `require_tasks`.
        typer.BadParameter: See [`pairs`].
    """
    from unihema.loading import available_tasks, require_tasks
    from unihema.training.run.config import DataConfig

    require_tasks(model, tasks)
    return DataConfig(
        folders=[str(folder) for folder in folders],
        tasks=list(tasks) or [task for task in available_tasks(model) if among is None or task in among],
        rename=pairs(rename, "--rename", "RBC='red blood cell'"),
        **settings,
    )


@contextmanager
def stopped_runs_exit() -> Iterator[None]:
    """A run that was stopped, with a checkpoint saved, ends the command with exit code 3."""
    from unihema.errors import TrainingInterrupted

    try:
        yield
    except TrainingInterrupted as stopped:
        typer.echo(str(stopped), err=True)
        raise typer.Exit(3) from None
