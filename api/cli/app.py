"""The commands together, and what a user sees when one of them fails."""

import errno
import os
import sys
from typing import Any

import click

from .analyse import ask, demo, info, init, merge, predict
from .data import data
from .measure import evaluate, reference
from .report import report
from .review import corrections, review
from .serve import serve
from .share import card, convert, export, push
from .teach import adapt, train


SECTIONS = {
    "Analyse": (predict, merge, ask, info, init, demo),
    "Review": (report, review, corrections),
    "Teach": (train, adapt),
    "Measure": (evaluate, reference),
    "Serve": (serve,),
    "Share": (export, convert, card, push),
    "Data": (data,),
}


class Commands(click.Group):
    """The commands under the headings of `SECTIONS`."""

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command that was named; Ctrl-C ends it with 128 + SIGINT, as shells have it, where click would say 1."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("\nunihema: stopped. The same command goes on where it was.", err=True)
            raise click.exceptions.Exit(130) from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, self.commands))
        for title, commands in SECTIONS.items():
            with formatter.section(title):
                limit = formatter.width - width - 6
                formatter.write_dl(
                    [(command.name.ljust(width), command.get_short_help_str(limit)) for command in commands]
                )


def _version(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked and not ctx.resilient_parsing:
        from importlib import metadata

        click.echo(metadata.version("unihema"))
        ctx.exit()


@click.group(cls=Commands, name="unihema")
@click.option("--debug", is_flag=True, help="Show the whole traceback of an error.")
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version.")
def app(debug: bool) -> None:
    """Blood smears in; cells, attributes, masks and answers out.

    A command that was stopped goes on where it was when it is repeated, and does nothing twice. With other settings in the
    same place it ends with an error that names the setting; --overwrite starts anew.
    """
    if debug:
        os.environ["UNIHEMA_DEBUG"] = "1"


for _commands in SECTIONS.values():
    for _command in _commands:
        app.add_command(_command)


def main() -> None:
    """Runs the command.

    Exit codes: 0 done; 1 some files could not be analysed; 2 an error, as one line that names the input and the remedy; 3
    stopped, a checkpoint saved; 130 stopped by Ctrl-C. A fault of ours shows its traceback, also with exit code 1.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except Exception as error:
        # Not imported before it is needed: the help waits for nothing heavy.
        from unihema.errors import UniHemaError
        from unihema.files import printable

        # A disk may be full wherever something is written, the output of the command among it.
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        if not (full or isinstance(error, UniHemaError)) or os.environ.get("UNIHEMA_DEBUG"):
            raise
        text = "no space is left to write to. Make room, and repeat the command." if full else str(error)
        # Names of files and texts of servers may hold what a terminal obeys.
        click.echo("\n".join(map(printable, f"unihema: {text}".split("\n"))), err=True)
        sys.exit(2)
