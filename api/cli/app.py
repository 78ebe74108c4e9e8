"""The commands together, and what a user sees when one of them fails."""

import os
import sys

import typer

from .ablate import ablate
from .adapt import adapt
from .ask import ask
from .card import card
from .convert import convert
from .data import data
from .demo import demo
from .demo_train import demo_train
from .evaluate import evaluate
from .export import export
from .info import info
from .init import init
from .parity import parity
from .predict import predict
from .push import push
from .reference import reference
from .stress import stress
from .train import train


app = typer.Typer(
    name="unihema",
    help="Blood smears in; cells, attributes, masks and answers out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(value: bool) -> None:
    if value:
        from importlib import metadata

        typer.echo(metadata.version("unihema"))
        raise typer.Exit


@app.callback()
def options(
    debug: bool = typer.Option(False, "--debug", help="Show the whole traceback of an error."),
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
) -> None:
    """Blood smears in; cells, attributes, masks and answers out."""
    if debug:
        os.environ["UNIHEMA_DEBUG"] = "1"


app.command()(init)
app.command()(predict)
app.command()(ask)
app.command()(train)
app.command()(adapt)
app.command()(evaluate)
app.command()(stress)
app.command()(reference)
app.command()(ablate)
app.command()(info)
app.command()(convert)
app.command()(export)
app.command()(parity)
app.command()(card)
app.command()(push)
app.add_typer(data, name="data")
app.command(hidden=True)(demo)
app.command("demo-train", hidden=True)(demo_train)


def main() -> None:
    """Runs the command. Exit codes: 0 done; 1 some files could not be analysed; 2 an error, as one line that names the input and
    the remedy; 3 stopped, a checkpoint saved. A fault of ours shows its traceback, also with exit code 1."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except Exception as error:
        # Not imported before it is needed: the help waits for nothing heavy.
        from unihema.errors import UniHemaError

        if not isinstance(error, UniHemaError) or os.environ.get("UNIHEMA_DEBUG"):
            raise
        typer.echo(f"unihema: {error}", err=True)
        sys.exit(2)
