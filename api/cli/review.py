"""Commands for results that a person corrects: `review`, and `corrections`, which makes data of them."""

from pathlib import Path

import click

from .options import PATH, output_option, port_option


sample_by_option = click.option(
    "--sample-by",
    metavar="image|folder|PATTERN|FILE.csv",
    help="Which images are one sample: each alone, those of a folder, those in whose path a regular expression finds the same "
    "in brackets, or those that a table with the columns image and sample says. All of them by default.",
)


@click.command()
@click.argument("results", type=PATH)
@sample_by_option
@port_option(0)
@click.option("--browser", is_flag=True, help="Open the page in the browser.")
@click.option("--check", is_flag=True, help="Only check that the log is as it was written.")
@click.option("--head", help="With --check, a hash that the log has to hold, as noted from the page.")
def review(results: Path, sample_by: str | None, port: int, browser: bool, check: bool, head: str | None) -> None:
    """Correct results by hand, in a page of this machine's browser.

    RESULTS is a folder that `unihema predict` wrote. Everything goes into an append-only log, review.sqlite in it; the
    predictions stay as they are. Needs the extra `review`. Ctrl-C ends it.

    Exit code 1: --check found an entry that was changed, or is missing.
    """
    if check or head:
        _check(results, head)
        return
    try:
        from unihema.review.server import serve
    except ModuleNotFoundError as error:
        from unihema.errors import PackageMissingError

        raise PackageMissingError(f"The page of a review needs {error.name}: pip install 'unihema[review]'") from error

    def on_address(address: str) -> None:
        click.echo(f"{results}: open this address, whole, in a browser of this machine:\n{address}")
        if browser:
            click.launch(address)

    try:
        serve(results, sample_by, port, on_address)
    except KeyboardInterrupt:
        click.echo(f"\nStopped. Everything that was done is in {results}; the same command goes on.")


def _check(results: Path, head: str | None) -> None:
    from unihema.errors import InputError
    from unihema.files import printable
    from unihema.review.log import Log
    from unihema.review.state import LOG_FILE

    path = results / LOG_FILE
    if not path.is_file():
        raise InputError(f"{path}: no such file. `unihema review` writes it.")
    with Log(path, read_only=True) as log:
        damage, (number, digest) = log.verify(head), log.head
    if damage is not None:
        click.echo(printable(f"{path}: {damage.what}"), err=True)
        raise click.exceptions.Exit(1)
    click.echo(f"{number} entries, all as they were written. The last has the hash {digest}")


@click.command()
@click.argument("results", type=PATH)
@click.argument("edited", nargs=-1, type=PATH)
@output_option(required=True)
@click.option("--whole-fields", is_flag=True, help="Who edited EDITED has looked through all of their images.")
def corrections(results: Path, edited: tuple[Path, ...], output: Path, whole_fields: bool) -> None:
    """Make a data folder of what a person has confirmed or corrected.

    RESULTS is a folder that `unihema predict` wrote and `unihema review` corrected. With EDITED, files that another program
    has saved (GeoJSON of QuPath, COCO, JSON of Label Studio), what was changed there counts instead. `unihema adapt` learns
    from OUTPUT: cells that nobody has looked at are neither targets nor background there.
    """
    from unihema.training.data.curation.corrections import write_corrections

    written = write_corrections(results, output, edited, whole_fields)
    click.echo(
        f"{written.fields} fields ({written.whole_fields} looked through) with {written.cells} cells, {written.ignored} cells "
        f"that nobody has looked at, and {written.crops} single cells."
    )
    click.echo(f"Written to {output}. To learn from it: unihema adapt CHECKPOINT {output} --task detection -o ADAPTER")
