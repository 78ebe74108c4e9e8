"""Writes docs/cli.md, the commands and their options, from the code: `python docs/make_cli.py`."""

import inspect
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import click

from unihema_cli.app import SECTIONS


PAGE = Path(__file__).with_name("cli.md")
HEAD = """<!-- Written by docs/make_cli.py. -->
# The command

`unihema --help` lists the commands, `unihema COMMAND --help` the options of one. An option has one name and one meaning
wherever it appears. Options that are settings of a training run have the names of `run_config.json`
([training](training.md#settings)); every other setting is `--set NAME=VALUE`.

**Going on.** A command that was stopped goes on where it was when it is repeated, and what is finished is not done again. With
other settings in the same folder it ends with an error that names the setting; `--overwrite` starts anew. A command whose
result is one file, or a folder that appears whole (`export`, `convert`, `data prepare`), refuses one that is there.

| exit code | |
|---|---|
| 0 | done |
| 1 | some files could not be analysed or prepared, or `data check` found something; they are listed |
| 2 | an error, in one line that names the input and the remedy |
| 3 | stopped by Ctrl-C or a signal; a checkpoint is saved |
| 130 | stopped by Ctrl-C elsewhere; what was finished is kept |
"""


def commands() -> Iterator[tuple[str, str, click.Command]]:
    """Section, full name and command, of every command that does something."""
    for section, of_section in SECTIONS.items():
        for command in of_section:
            inner = command.commands.values() if isinstance(command, click.Group) else [command]
            for one in inner:
                yield section, command.name if one is command else f"{command.name} {one.name}", one


def options(command: click.Command) -> list[click.Option]:
    """Its options, without `--help`."""
    found = command.get_params(click.Context(command))
    return [one for one in found if isinstance(one, click.Option) and "--help" not in one.opts]


def long_name(option: click.Option) -> str:
    """Such as `--task`."""
    return next(name for name in option.opts if name.startswith("--"))


def value_of(option: click.Option) -> str:
    """What the option takes, such as `detection|segmentation`; empty for a switch."""
    if option.is_flag:
        return ""
    if isinstance(option.type, click.Choice):
        return "|".join(option.type.choices)
    if option.metavar:
        return option.metavar
    kinds = {"integer": "N", "integer range": "N", "float": "X", "path": "PATH", "text": "TEXT"}
    return kinds.get(option.type.name, option.type.name)


def page() -> str:
    """The text of docs/cli.md."""
    lines = [HEAD]
    users: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    heading = None
    for section, name, command in commands():
        if section != heading:
            heading = section
            lines.append(f"## {section}\n")
        arguments = " ".join(
            one.make_metavar(click.Context(command))
            for one in command.get_params(click.Context(command))
            if isinstance(one, click.Argument)
        )
        lines += [f"### `{f'unihema {name} {arguments}'.strip()}`\n", inspect.cleandoc(command.help or "") + "\n"]
        names = []
        for option in options(command):
            names.append(f"`{long_name(option)}`" + (" (required)" if option.required else ""))
            spelling = ", ".join(f"`{one}`" for one in sorted(option.opts, key=len, reverse=True))
            users[spelling, value_of(option), option.help or ""].append(name)
        if names:
            lines.append(f"Options: {', '.join(names)}.\n")
    lines.append("## Options\n\n| option | value | meaning | commands |\n|---|---|---|---|")
    for (spelling, value, meaning), of_commands in sorted(users.items()):
        shown = f"`{value}`" if value else ""
        cells = (spelling, shown.replace("|", r"\|"), meaning.replace("|", r"\|"), ", ".join(of_commands))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
