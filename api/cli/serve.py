"""The command `serve`: analysis over HTTP."""

import logging
import os
import secrets
from contextlib import ExitStack
from pathlib import Path

import click

from .options import PATH, device_option, int8_option, port_option
from .review import sample_by_option


@click.command()
@click.argument("checkpoint")
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to listen at; 0.0.0.0 is every one of this machine."
)
@port_option(8000)
@click.option("--megabytes", type=click.IntRange(1), default=64, show_default=True, help="Of a request, at most.")
@click.option(
    "--megapixels", type=click.IntRange(1), default=64, show_default=True, help="Of an image, in millions, at most."
)
@click.option(
    "--waiting",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Images that may wait; more are refused (429).",
)
@click.option(
    "--images-together",
    type=click.IntRange(1),
    default=4,
    show_default=True,
    help="Images of one size analysed at once, at most.",
)
@click.option("--seconds", type=click.FloatRange(1), default=120, show_default=True, help="For a request, at most.")
@click.option(
    "--upload-seconds",
    type=click.FloatRange(1),
    default=60,
    show_default=True,
    help="For a request to arrive, at most.",
)
@click.option(
    "--arriving-megabytes",
    type=click.IntRange(1),
    default=2048,
    show_default=True,
    help="Of all requests that are not answered yet, at most. They lie in the folder of temporary files.",
)
@click.option(
    "--review",
    "results",
    metavar="RESULTS",
    type=PATH,
    help="Also the page of a review of this results folder, at /review/. It opens with the token in its address.",
)
@sample_by_option
@device_option
@int8_option
def serve(
    checkpoint: str,
    host: str,
    port: int,
    megabytes: int,
    megapixels: int,
    waiting: int,
    images_together: int,
    seconds: float,
    upload_seconds: float,
    arriving_megabytes: int,
    results: Path | None,
    sample_by: str | None,
    device: str,
    int8: bool,
) -> None:
    """Analyse images that programs send over HTTP.

    CHECKPOINT is a folder, an adapter, a file made by `unihema export`, or a repository on the Hub. With the environment variable
    UNIHEMA_TOKEN, requests have to show it (Authorization: Bearer). Needs the extra `serve`. Ctrl-C or SIGTERM ends it, once what
    was taken is done.
    """
    from unihema.analyzer import Analyzer
    from unihema.errors import PackageMissingError

    try:
        from unihema.review.server import mounted_review
        from unihema.serve.gate import Limits
        from unihema.serve.server import serve as run
    except ModuleNotFoundError as error:
        raise PackageMissingError(f"The server needs {error.name}: pip install 'unihema[serve]'") from error

    token = os.environ.get("UNIHEMA_TOKEN") or None
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    logging.getLogger("unihema.serve").setLevel(logging.INFO)
    # The address of the page stays the same where the service has a token of its own.
    page_token = token or secrets.token_urlsafe(32)
    analyzer = Analyzer.from_pretrained(checkpoint, device=device, int8=int8)

    def on_start(address: str) -> None:
        click.echo(f"{checkpoint} is served at {address}, which shows what can be asked.")
        if results is not None:
            shown = page_token if token is None else "..., with UNIHEMA_TOKEN in its place"
            click.echo(f"{results}: open {address}/review/?token={shown}")
        if token is None and host not in ("127.0.0.1", "localhost", "::1"):
            click.echo(
                "Anyone who reaches this address may use it: set UNIHEMA_TOKEN to let in only who knows it.", err=True
            )

    limits = Limits(
        megabytes,
        megapixels,
        waiting=waiting,
        batch_size=images_together,
        seconds=seconds,
        upload_seconds=upload_seconds,
        arriving_megabytes=arriving_megabytes,
    )
    with ExitStack() as stack:
        mounted = {}
        if results is not None:
            mounted["/review"] = stack.enter_context(mounted_review(results, page_token, sample_by))
        run(analyzer, host, port, limits, token, on_start, mounted)
