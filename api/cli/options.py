"""What several commands do with their options."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import typer


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


@contextmanager
def stopped_runs_exit() -> Iterator[None]:
    """A run that was stopped, with a checkpoint saved, ends the command with exit code 3."""
    from unihema.training.loop import TrainingInterrupted

    try:
        yield
    except TrainingInterrupted as stopped:
        typer.echo(str(stopped), err=True)
        raise typer.Exit(3) from None
