"""Analysis over HTTP: images in, results as JSON out."""

import asyncio
import base64
import contextlib
import hmac
import io
import logging
import re
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import jinja2
import uvicorn
from fastapi import FastAPI, File, Form, Request, UploadFile
from fastapi.responses import HTMLResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from unihema.errors import InputError, RequestError, UniHemaError, UnreadableImageError
from unihema.files import printable, shortened
from unihema.http_answers import Plain, tell_errors
from unihema.results.smear_result import SmearResult
from unihema.slides import RegionSource, image_sha256, open_regions
from unihema.version import __version__

from .queue import AnalysisQueue, Job, QueueFullError, StoppingError, asked_of


if TYPE_CHECKING:
    from unihema.analyzer import Analyzer


logger = logging.getLogger("unihema.serve")

# An ending of a file's name, and an id that a client may choose for its request.
_SUFFIX = re.compile(r"\.[a-z0-9]{1,8}", re.ASCII)
_REQUEST_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)
# Paths that anyone may ask for, so that a machine can see whether the server is well.
OPEN = ("/health",)
# Parts of a form besides its images, and bytes of the form that are no image.
MOST_FIELDS, MOST_FORM = 64, 1 << 20
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
}


@dataclass(frozen=True)
class Limits:
    """What a client may ask for.

    Args:
        megabytes (`int`): Of a request.
        megapixels (`int`): Of an image; larger ones are for `unihema predict`.
        images (`int`): Of a request.
        waiting (`int`): Images that wait for the analyzer.
        batch_size (`int`): Images of one size that are analysed together at most.
        seconds (`float`): From the arrival of a request to its answer.
        upload_seconds (`float`): For the request itself to arrive.
    """

    megabytes: int = 64
    megapixels: int = 64
    images: int = 16
    waiting: int = 64
    batch_size: int = 4
    seconds: float = 120.0
    upload_seconds: float = 60.0


class Measures:
    """What `/metrics` shows."""

    def __init__(self, waiting: Callable[[], int]):
        self.registry = CollectorRegistry()
        options = {"registry": self.registry}
        self.requests = Counter("unihema_requests", "Answers given, by path and status.", ["path", "status"], **options)
        self.images = Counter("unihema_images", "Images analysed.", **options)
        self.seconds = Histogram("unihema_request_seconds", "From arrival to answer.", ["path"], **options)
        self.batches = Histogram(
            "unihema_batch_images", "Images analysed together.", buckets=(1, 2, 4, 8, 16), **options
        )
        self.analysis = Counter("unihema_analysis_seconds", "Time spent in the analyzer.", **options)
        Gauge("unihema_waiting_images", "Images that wait.", **options).set_function(waiting)

    def on_batch(self, number: int, seconds: float) -> None:
        self.images.inc(number)
        self.batches.observe(number)
        self.analysis.inc(seconds)


class Gate:
    """Numbers requests, lets in who has the token, bounds what is sent and how long it may take, and counts answers.

    Args:
        app: The application behind it.
        token (`str`, *optional*): What a client has to show (`Authorization: Bearer`); none lets everyone in.
        limits ([`Limits`]): Of a request.
        measures ([`Measures`]): Where answers are counted.
        paths (`Sequence[str]`): That are counted by their name; all others together.
    """

    def __init__(self, app: Any, token: str | None, limits: Limits, measures: Measures, paths: Sequence[str]):
        self.app, self.token, self.limits, self.measures, self.paths = app, token, limits, measures, tuple(paths)

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get("x-request-id", "")
        number = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = number
        path = scope["path"] if scope["path"] in self.paths else "other"
        begun, status = time.monotonic(), 500

        async def sent(message: dict[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = {name.lower() for name, _ in message["headers"]}
                more = {name.lower(): value for name, value in (HEADERS | {"X-Request-Id": number}).items()}
                message["headers"] = [
                    *message["headers"],
                    *((name.encode(), value.encode()) for name, value in more.items() if name.encode() not in own),
                ]
            await send(message)

        try:
            refusal = self._refusal(scope, headers)
            if refusal is not None:
                await refusal(scope, receive, sent)
            else:
                await self.app(scope, _Body(receive, self.limits), sent)
        finally:
            seconds = time.monotonic() - begun
            self.measures.requests.labels(path, str(status)).inc()
            self.measures.seconds.labels(path).observe(seconds)
            logger.info(
                "%s %s %s %d %.3f s", number, scope["method"], printable(shortened(scope["path"], 100)), status, seconds
            )

    def _refusal(self, scope: dict[str, Any], headers: dict[str, str]) -> Response | None:
        length = headers.get("content-length", "0")
        most = self.limits.megabytes << 20
        if not length.isdecimal() or len(length) > 15 or int(length) > most + MOST_FORM:
            return _error(413, f"A request has {self.limits.megabytes} MB at most.")
        if self.token is not None and scope["path"] not in OPEN:
            kind, _, shown = headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not hmac.compare_digest(shown.strip().encode(), self.token.encode()):
                return _error(
                    401, "This server wants a token: Authorization: Bearer ...", {"WWW-Authenticate": "Bearer"}
                )
        return None


class _Body:
    """What a client sends, up to a number of bytes and seconds."""

    def __init__(self, receive: Callable[[], Awaitable[dict[str, Any]]], limits: Limits):
        self.receive, self.limits = receive, limits
        self.bytes, self.until, self.done = 0, time.monotonic() + limits.upload_seconds, False

    async def __call__(self) -> dict[str, Any]:
        if self.done:
            # From here on nothing comes but that the client has gone.
            return await self.receive()
        try:
            message = await asyncio.wait_for(self.receive(), max(0.0, self.until - time.monotonic()))
        except TimeoutError:
            raise HTTPException(
                408, f"The request did not arrive within {self.limits.upload_seconds:g} seconds."
            ) from None
        self.bytes += len(message.get("body", b""))
        self.done = not message.get("more_body", False)
        if self.bytes > (self.limits.megabytes << 20) + MOST_FORM:
            raise HTTPException(413, f"A request has {self.limits.megabytes} MB at most.")
        return message


def _error(status: int, text: str, headers: dict[str, str] | None = None) -> Plain:
    return Plain({"error": text}, status, headers)


def serve_app(analyzer: "Analyzer", limits: Limits | None = None, token: str | None = None) -> FastAPI:
    """The application.

    Args:
        analyzer ([`Analyzer`]): Analyses, one batch after another.
        limits ([`Limits`], *optional*): What a client may ask for.
        token (`str`, *optional*): What a client has to show.
    """
    limits = limits or Limits()
    measures = Measures(lambda: len(queue))
    queue = AnalysisQueue(analyzer, limits.waiting, limits.batch_size, measures.on_batch)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(queue.stop)

    app = FastAPI(
        title="UniHema", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan, default_response_class=Plain,
        description="Blood smears in; cells, attributes, masks and answers out. For research; not a medical device.",
    )  # fmt: skip
    app.state.queue = queue

    async def analysed(
        request: Request, uploads: Sequence[UploadFile], asked: tuple
    ) -> list[tuple[SmearResult, RegionSource]]:
        """The result of each image, or an error for all of them."""
        if not 1 <= len(uploads) <= limits.images:
            raise HTTPException(422, f"A request has 1 to {limits.images} images, got {len(uploads)}.")
        # What cannot be asked of this checkpoint is known before an image is read.
        await run_in_threadpool(analyzer.request, *asked)
        until = time.monotonic() + limits.seconds
        with tempfile.TemporaryDirectory(prefix="unihema-serve-") as place:
            jobs: list[Job] = []
            try:
                for number, upload in enumerate(uploads):
                    jobs.append(Job(await run_in_threadpool(_opened, upload, Path(place), number, limits), asked))
                queue.add(jobs)
            except BaseException:
                for job in jobs:
                    job.source.close()
                raise
            results = await _all_of([job.result for job in jobs], request, until, limits.seconds)
            for result, job in zip(results, jobs, strict=True):
                result.image = job.source.name
                result.provenance |= {"checkpoint_sha256": analyzer.files, "image_sha256": job.source.sha256}
            return [(result, job.source) for result, job in zip(results, jobs, strict=True)]

    @app.post("/v1/analyze")
    async def analyze(
        request: Request,
        images: Annotated[list[UploadFile], File(description="Photographs of smears, or crops of one cell.")],
        tasks: Annotated[
            list[str], Form(description="detection, segmentation, single_cell; the checkpoint's own if none.")
        ] = [],  # noqa: B006
        prompt: Annotated[str | None, Form(description="Class names, or a disease, to look for.")] = None,
        questions: Annotated[list[str], Form(description="Questions about each image.")] = [],  # noqa: B006
        threshold: Annotated[float | None, Form(description="Smallest score of a cell.")] = None,
        tiles: Annotated[str, Form(description="auto, off, or pixels of a tile's edge.")] = "auto",
        um_per_pixel: Annotated[float | None, Form(description="Size of a pixel in micrometres.")] = None,
        geojson: Annotated[bool, Form(description="Also cells as GeoJSON for QuPath.")] = False,
        overlay: Annotated[bool, Form(description="Also the image with its cells drawn, as base64 PNG.")] = False,
    ) -> Plain:
        """Cells, attributes, masks, single-cell classes and answers of images."""
        asked = asked_of(
            tasks=tuple(tasks) or None,
            prompt=prompt,
            questions=tuple(questions),
            threshold=threshold,
            tiles=int(tiles) if tiles.isascii() and tiles.isdigit() and len(tiles) < 10 else tiles,
            um_per_pixel=um_per_pixel,
        )
        found = await analysed(request, images, asked)
        return Plain({"results": await run_in_threadpool(_written, found, geojson, overlay)})

    @app.post("/v1/ask")
    async def ask(
        request: Request,
        image: Annotated[UploadFile, File(description="A photograph of a smear, or a crop of one cell.")],
        questions: Annotated[list[str], Form(description="Questions, or sentences with ___ to fill in.")],
    ) -> Plain:
        """Answers to questions about an image."""
        if len(questions) > MOST_FIELDS or not any(questions):
            raise HTTPException(422, f"Ask 1 to {MOST_FIELDS} questions.")
        ((result, _),) = await analysed(request, [image], asked_of(tasks=(), questions=tuple(questions)))
        return Plain({"answers": result.answers, "warnings": result.warnings})

    @app.get("/v1/info")
    def info() -> Plain:
        """The checkpoint, what it can do, and the limits of this server."""
        config = analyzer.model.config
        return Plain(
            {
                "unihema": __version__,
                "checkpoint_sha256": analyzer.files,
                "device": str(analyzer.model.device),
                "tasks": list(analyzer.tasks),
                "classes": list(config.class_names),
                "single_cell_classes": list(config.single_cell_labels or ()),
                "attributes": {name: list(values) for name, values in config.morphology.items()},
                "limits": vars(limits),
            }
        )

    @app.get("/health")
    def health() -> Plain:
        """200 while images are taken."""
        return (
            Plain({"status": "ok", "waiting": len(queue)})
            if queue.is_alive
            else _error(503, "The server is being stopped.")
        )

    @app.get("/metrics")
    def metrics() -> Response:
        """Counters for Prometheus."""
        return Response(generate_latest(measures.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    @app.get("/docs", include_in_schema=False)
    def page() -> HTMLResponse:
        return HTMLResponse(_page(app.openapi()))

    @app.exception_handler(QueueFullError)
    async def full(_: Request, error: QueueFullError) -> Plain:
        return _error(429, str(error), {"Retry-After": str(round(error.seconds))})

    @app.exception_handler(StoppingError)
    async def stopping(_: Request, error: StoppingError) -> Plain:
        return _error(503, str(error))

    @app.exception_handler(UniHemaError)
    async def wrong(_: Request, error: UniHemaError) -> Plain:
        return _error(422 if isinstance(error, InputError | RequestError) else 500, str(error))

    tell_errors(app)

    @app.exception_handler(Exception)
    async def fault(request: Request, error: Exception) -> Plain:
        return _error(500, f"A fault of the server. Its log has it under {request.state.request_id}.")

    paths = [route.path for route in app.routes if hasattr(route, "path")]
    app.add_middleware(Gate, token=token, limits=limits, measures=measures, paths=paths)
    return app


async def _all_of(
    futures: Sequence["Future[SmearResult]"], request: Request, until: float, seconds: float
) -> list[SmearResult]:
    """Waits for results until a time, and no longer than the client does."""
    waited = asyncio.gather(*map(asyncio.wrap_future, futures))
    try:
        while True:
            done, _ = await asyncio.wait([waited], timeout=min(1.0, max(0.0, until - time.monotonic())))
            if done:
                return list(waited.result())
            if time.monotonic() >= until:
                raise HTTPException(504, f"Not done within {seconds:g} seconds.")
            if await request.is_disconnected():
                raise HTTPException(499, "The client has gone.")
    finally:
        # What is not begun is not done for nobody.
        for future in futures:
            future.cancel()
        waited.cancel()


def _opened(upload: UploadFile, place: Path, number: int, limits: Limits) -> RegionSource:
    """An uploaded image, kept under a name of ours.

    Raises:
        UnreadableImageError: It is none, or larger than allowed. The message has the client's name for it.
    """
    name = shortened(Path(upload.filename or "image").name, 100)
    suffix = Path(name).suffix.lower()
    # Readers of slides go by the ending.
    path = place / f"{number}{suffix if _SUFFIX.fullmatch(suffix) else ''}"
    with path.open("wb") as file:
        while block := upload.file.read(1 << 20):
            file.write(block)
    try:
        source = open_regions(path)
        if source.width * source.height > limits.megapixels * 1_000_000:
            source.close()
            raise UnreadableImageError(
                f"{name}: {source.width} x {source.height} pixels; this server takes {limits.megapixels} million. "
                "`unihema predict` takes more."
            )
        # What cannot be read at all is known from here.
        source.pixels.load()
    except UniHemaError as error:
        raise UnreadableImageError(str(error.args[0]).replace(str(path), name)) from error
    source.name, source.sha256 = name, image_sha256(path)
    return source


def _written(found: Sequence[tuple[SmearResult, RegionSource]], geojson: bool, overlay: bool) -> list[dict[str, Any]]:
    written = []
    for result, source in found:
        entry = {"result": result.to_dict()}
        if geojson:
            entry["geojson"] = result.to_geojson()
        if overlay:
            drawn = io.BytesIO()
            result.overlay(source.pixels).save(drawn, "PNG", compress_level=1)
            entry["overlay_png"] = base64.b64encode(drawn.getvalue()).decode("ascii")
        written.append(entry)
    return written


def _page(schema: dict[str, Any]) -> str:
    """What can be asked, as a page without any script."""
    text = (resources.files("unihema.serve") / "page.html").read_text(encoding="utf-8")
    return jinja2.Environment(autoescape=True).from_string(text).render(schema=schema)


def serve(
    analyzer: "Analyzer",
    host: str = "127.0.0.1",
    port: int = 8000,
    limits: Limits | None = None,
    token: str | None = None,
    on_start: Callable[[str], None] = lambda address: None,
) -> None:
    """Serves until the process is asked to stop (SIGTERM, Ctrl-C); what was taken is finished first.

    Args:
        analyzer ([`Analyzer`]): Analyses.
        host (`str`): Address to listen at.
        port (`int`): Port; a free one when 0.
        limits ([`Limits`], *optional*): What a client may ask for.
        token (`str`, *optional*): What a client has to show.
        on_start (`Callable[[str], None]`): Gets the address when requests are taken.

    Raises:
        RequestError: The address is not free, or none of this machine.
    """
    limits = limits or Limits()
    app = serve_app(analyzer, limits, token)
    config = uvicorn.Config(
        app, host=host, port=port, log_level="warning", access_log=False, server_header=False,
        timeout_graceful_shutdown=round(limits.seconds) + 5, timeout_keep_alive=15, limit_concurrency=None,
    )  # fmt: skip
    try:
        listener = config.bind_socket()
    except (OSError, SystemExit, OverflowError) as error:
        raise RequestError(
            f"{host}:{port} cannot be listened at ({shortened(error)}). Name another --host or --port."
        ) from error
    with listener:
        server = uvicorn.Server(config)
        on_start(f"http://{listener.getsockname()[0]}:{listener.getsockname()[1]}")
        server.run(sockets=[listener])


__all__ = ["Limits", "serve", "serve_app"]
