"""Nested dataclasses from nested dictionaries, every name and type checked: a misspelt setting is an error, not a default."""

import dataclasses
import difflib
import types
import typing
from typing import Any, Literal

from unihema.errors import RunConfigError


def settings_from(cls: type, values: Any, prefix: str, source: str) -> Any:
    """A dataclass, and those within it, from dictionaries.

    Args:
        cls (`type`): The dataclass.
        values (`Any`): Its settings by name; those left out have their defaults.
        prefix (`str`): Dotted name of these settings in the whole, for messages.
        source (`str`): Where they are from, for messages.

    Raises:
        RunConfigError: An unknown setting (the message has the closest name) or a value of the wrong type.
    """
    if not isinstance(values, dict):
        raise RunConfigError(f"{source}: '{prefix.rstrip('.')}' must be a set of settings, got {values!r}.")
    hints = typing.get_type_hints(cls)
    arguments = {}
    for name, value in values.items():
        if name not in hints:
            raise RunConfigError(unknown_message(name, hints, prefix, source))
        if dataclasses.is_dataclass(hints[name]):
            arguments[name] = settings_from(hints[name], value, f"{prefix}{name}.", source)
        else:
            if not _fits(value, hints[name]):
                expected = str(hints[name]).replace("typing.", "") if typing.get_origin(hints[name]) else None
                expected = expected or getattr(hints[name], "__name__", str(hints[name]))
                raise RunConfigError(f"{source}: {prefix}{name}={value!r} has the wrong type; expected {expected}.")
            arguments[name] = value
    return cls(**arguments)


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in inner)
    if origin is Literal:
        return value in inner
    if origin is list:
        return isinstance(value, list) and all(_fits(item, inner[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            _fits(key, inner[0]) and _fits(item, inner[1]) for key, item in value.items()
        )
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def unknown_message(name: str, known: Any, prefix: str, source: str) -> str:
    """What to say about a setting that does not exist."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    hint = f" Did you mean '{prefix}{close[0]}'?" if close else ""
    return f"{source}: unknown setting '{prefix}{name}'.{hint} Known: {', '.join(known)}."


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found
