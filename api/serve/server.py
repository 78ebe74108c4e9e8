"""Analysis over HTTP: images in, results as JSON out."""

import asyncio
import base64
import hashlib
import io
import re
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import lru_cache, partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import jinja2
import uvicorn
from fastapi import FastAPI, File, Form, HTTPException, Request, UploadFile
from fastapi.responses import HTMLResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.concurrency import run_in_threadpool

from unihema.errors import InputError, RequestError, UniHemaError, UnreadableImageError
from unihema.files import scratch_folder, shortened
from unihema.http_answers import Plain, tell_errors, to_json
from unihema.processing_unihema.image_io import stored_size
from unihema.results.smear_result import SmearResult
from unihema.slides import RegionSource, open_regions
from unihema.version import __version__

from .gate import Gate, Limits, Measures, PatientProtocol, refused
from .queue import AnalysisQueue, Job, QueueFullError, StoppingError


if TYPE_CHECKING:
    from unihema.analyzer import Analyzer


# An ending of a file's name.
_SUFFIX = re.compile(r"\.[a-z0-9]{1,8}", re.ASCII)
# Paths that anyone may ask for, so that a machine can see whether the server is well.
OPEN = ("/health",)
# Questions of a request.
MOST_QUESTIONS = 64
# Requests whose texts stay read.
KEPT_REQUESTS = 64

Written = Callable[[SmearResult, RegionSource], Any]


def serve_app(
    analyzer: "Analyzer",
    limits: Limits | None = None,
    token: str | None = None,
    mounted: Mapping[str, Any] | None = None,
) -> FastAPI:
    """The application.

    Args:
        analyzer ([`Analyzer`]): Analyses, one batch after another. Its weights stay what they are.
        limits ([`Limits`], *optional*): What a client may ask for.
        token (`str`, *optional*): What a client has to show.
        mounted (`Mapping[str, Any]`, *optional*): Path -> another application there, which lets in whom it wants to.

    Raises:
        RequestError: A token that no client can send.
    """
    if token is not None and not (token.isascii() and token.isprintable() and token.strip() == token):
        raise RequestError("The token has characters that no client can send: take letters, digits and signs of ASCII.")
    limits, mounted = limits or Limits(), mounted or {}
    measures = Measures(lambda: len(queue))
    queue = AnalysisQueue(analyzer, limits.waiting, limits.batch_size, measures.on_batch)

    @lru_cache(KEPT_REQUESTS)
    def request_of(asked: tuple[tuple[str, Any], ...]) -> Any:
        return analyzer.request(**dict(asked))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        # What a server that was killed has left there is removed.
        with scratch_folder() as app.state.folder:
            yield
            await run_in_threadpool(queue.stop)

    app = FastAPI(
        title="UniHema", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan, default_response_class=Plain,
        description="Blood smears in; cells, attributes, masks and answers out. For research; not a medical device.",
    )  # fmt: skip
    app.state.queue = queue

    async def answered(
        request: Request, uploads: Sequence[UploadFile], asked: Mapping[str, Any], written: Written
    ) -> list[bytes]:
        """What `written` makes of each image, or an error for all of them."""
        most = min(limits.images, limits.waiting)
        if not 1 <= len(uploads) <= most:
            raise HTTPException(422, f"A request has 1 to {most} images, got {len(uploads)}.")
        if len(asked["questions"]) > MOST_QUESTIONS:
            raise HTTPException(422, f"A request has {MOST_QUESTIONS} questions at most.")
        key = tuple(asked.items())
        try:
            # What cannot be asked of this checkpoint is known before an image is read.
            read = await run_in_threadpool(request_of, key)
        except UniHemaError as error:
            raise HTTPException(422, str(error)) from error
        until = time.monotonic() + limits.seconds
        with _new_folder(app.state.folder) as place:
            received = [await run_in_threadpool(_received, place, each, limits) for each in uploads]
            jobs = [
                Job(partial(image.opened, limits), image.size, key, read, partial(image.written, written))
                for image in received
            ]
            queue.add(jobs)
            try:
                return await _all_of(jobs, request, until, limits.seconds)
            except InputError as error:
                text = str(error)
                for image in received:
                    text = text.replace(str(image.path), image.name)
                raise HTTPException(422, text) from error
            finally:
                queue.leave(jobs)

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
        white_cells: Annotated[int | None, Form(description="Look for so many white cells alone, in tiles.")] = None,
        labels: Annotated[list[str], Form(description="What a single cell may be; all classes if none.")] = [],  # noqa: B006
        geojson: Annotated[bool, Form(description="Also cells as GeoJSON for QuPath.")] = False,
        overlay: Annotated[bool, Form(description="Also the image with its cells drawn, as base64 PNG.")] = False,
    ) -> Response:
        """Cells, attributes, masks, single-cell classes and answers of images."""
        asked = {
            "tasks": tuple(tasks) or None,
            "prompt": prompt,
            "questions": tuple(questions),
            "threshold": threshold,
            "tiles": int(tiles) if tiles.isascii() and tiles.isdigit() and len(tiles) < 10 else tiles,
            "um_per_pixel": um_per_pixel,
            "white_cells": white_cells,
            "labels": tuple(labels) or None,
        }
        await _check_fields(request, {"images", "geojson", "overlay", *asked})

        def written(result: SmearResult, source: RegionSource) -> dict[str, Any]:
            result.provenance |= {"checkpoint_sha256": analyzer.files}
            entry: dict[str, Any] = {"result": result.to_dict()}
            if geojson:
                entry["geojson"] = result.to_geojson()
            if overlay:
                drawn = io.BytesIO()
                result.overlay(source.pixels).save(drawn, "PNG", compress_level=1)
                entry["overlay_png"] = base64.b64encode(drawn.getvalue()).decode("ascii")
            return entry

        entries = await answered(request, images, asked, written)
        return Response(b'{"results":[' + b",".join(entries) + b"]}", media_type=Plain.media_type)

    @app.post("/v1/ask")
    async def ask(
        request: Request,
        image: Annotated[UploadFile, File(description="A photograph of a smear, or a crop of one cell.")],
        questions: Annotated[list[str], Form(description="Questions, or sentences with ___ to fill in.")],
    ) -> Response:
        """Answers to questions about an image, with the cells that support them."""
        await _check_fields(request, {"image", "questions"})
        if not all(question.strip() for question in questions):
            raise HTTPException(422, "A question is empty.")

        def written(result: SmearResult, _: RegionSource) -> dict[str, Any]:
            answers = analyzer.answers(result, questions)
            told = [{"question": each.question, "answer": each.answer, **each.support()} for each in answers]
            return {"answers": told, "warnings": result.warnings}

        (entry,) = await answered(request, [image], analyzer.asked_of(questions), written)
        return Response(entry, media_type=Plain.media_type)

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
        if not queue.is_alive:
            return refused(StoppingError("The server is being stopped."))
        return Plain({"status": "ok", "waiting": len(queue)})

    @app.get("/metrics")
    def metrics() -> Response:
        """Counters for Prometheus."""
        return Response(generate_latest(measures.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    @app.get("/docs", include_in_schema=False)
    def page() -> HTMLResponse:
        return HTMLResponse(_page(app.openapi()))

    @app.exception_handler(QueueFullError)
    @app.exception_handler(StoppingError)
    async def not_taken(_: Request, error: UniHemaError) -> Plain:
        return refused(error)

    @app.exception_handler(UniHemaError)
    async def wrong(_: Request, error: UniHemaError) -> Plain:
        return Plain({"error": str(error)}, 422 if isinstance(error, InputError | RequestError) else 500)

    tell_errors(app)

    @app.exception_handler(Exception)
    async def fault(request: Request, error: Exception) -> Plain:
        return Plain({"error": f"A fault of the server. Its log has it under {request.state.request_id}."}, 500)

    paths = [route.path for route in app.routes if hasattr(route, "path")]
    for path, other in mounted.items():
        app.mount(path, other)

    def is_open(path: str) -> bool:
        return path in OPEN or any(path == there or path.startswith(f"{there}/") for there in mounted)

    app.add_middleware(
        Gate,
        token=token,
        limits=limits,
        measures=measures,
        paths=paths,
        is_open=is_open,
        check_room=queue.check_room,
    )
    return app


async def _check_fields(request: Request, known: Collection[str]) -> None:
    """Checks that nothing was asked that would be passed over, such as a misspelt field, or one in the address."""
    for name in (*await request.form(), *request.query_params):
        if name not in known or name in request.query_params:
            raise HTTPException(
                422,
                f"{shortened(name, 60)}: no field of this form. There are {', '.join(sorted(known))}, none in the address.",
            )


async def _all_of(jobs: Sequence[Job], request: Request, until: float, seconds: float) -> list[bytes]:
    """Waits for answers until a time, and no longer than the client does."""
    waited = asyncio.gather(*(asyncio.wrap_future(job.answer) for job in jobs))
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
        waited.cancel()


class _Received:
    """An image that a client has sent, kept under a name of ours.

    Args:
        path (`Path`): Where.
        name (`str`): The client's name for it.
        size (`tuple[int, int]`): Its width and height in pixels.
        sha256 (`str`): Of its bytes.
    """

    def __init__(self, path: Path, name: str, size: tuple[int, int], sha256: str):
        self.path, self.name, self.size, self.sha256 = path, name, size, sha256

    def opened(self, limits: Limits) -> RegionSource:
        """The image, decoded."""
        source = open_regions(self.path, most_pixels=limits.megapixels * 1_000_000)
        source.name = self.name
        return source

    def written(self, written: Written, result: SmearResult, source: RegionSource) -> bytes:
        """The answer as JSON."""
        result.image = self.name
        result.provenance |= {"image_sha256": self.sha256}
        return to_json(written(result, source))


@contextmanager
def _new_folder(within: Path) -> Iterator[Path]:
    try:
        folder = tempfile.TemporaryDirectory(dir=within)
    except OSError as error:
        raise _no_room(error) from error
    with folder as place:
        yield Path(place)


def _no_room(error: OSError) -> HTTPException:
    return HTTPException(507, f"The server cannot keep what is sent ({shortened(error.strerror)}).")


def _received(place: Path, upload: UploadFile, limits: Limits) -> _Received:
    """Keeps an image that was sent.

    Raises:
        UnreadableImageError: It is none, or larger than allowed. The message has the client's name for it.
        HTTPException: There is no room for it.
    """
    name = shortened(Path(upload.filename or "image").name, 100)
    suffix = Path(name).suffix.lower()
    digest = hashlib.sha256()
    try:
        # Readers of slides go by the ending, and look at what lies beside the file.
        path = Path(tempfile.mkdtemp(dir=place)) / f"image{suffix if _SUFFIX.fullmatch(suffix) else ''}"
        with path.open("wb") as file:
            while block := upload.file.read(1 << 20):
                digest.update(block)
                file.write(block)
        # What was sent lies on the disk twice no longer than it has to.
        upload.file.close()
    except OSError as error:
        raise _no_room(error) from error
    try:
        try:
            size = stored_size(path)
        except UnreadableImageError:
            # A slide, perhaps.
            with open_regions(path, most_pixels=limits.megapixels * 1_000_000) as source:
                size = source.size
    except UnreadableImageError as error:
        raise UnreadableImageError(str(error).replace(str(path), name)) from error
    if size[0] * size[1] > limits.megapixels * 1_000_000:
        raise UnreadableImageError(
            f"{name}: {size[0]} x {size[1]} pixels; this server takes {limits.megapixels} million. "
            "`unihema predict` takes more."
        )
    return _Received(path, name, size, digest.hexdigest())


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
    mounted: Mapping[str, Any] | None = None,
) -> None:
    """Serves until the process is asked to stop (SIGTERM, Ctrl-C); what was taken is finished first.

    Args:
        analyzer ([`Analyzer`]): Analyses.
        host (`str`): Address to listen at.
        port (`int`): Port; a free one when 0.
        limits ([`Limits`], *optional*): What a client may ask for.
        token (`str`, *optional*): What a client has to show.
        on_start (`Callable[[str], None]`): Gets the address when requests are taken.
        mounted (`Mapping[str, Any]`, *optional*): See [`serve_app`].

    Raises:
        RequestError: The address is not free, or none of this machine.
    """
    limits = limits or Limits()
    app = serve_app(analyzer, limits, token, mounted)
    protocol = type("Protocol", (PatientProtocol,), {"fetch_seconds": limits.seconds})
    config = uvicorn.Config(
        app, host=host, port=port, log_level="warning", access_log=False, server_header=False, http=protocol, ws="none",
        timeout_graceful_shutdown=round(limits.upload_seconds + limits.seconds) + 5, timeout_keep_alive=15,
    )  # fmt: skip
    try:
        listener = config.bind_socket()
    except (OSError, SystemExit, OverflowError) as error:
        raise RequestError(
            f"{host}:{port} cannot be listened at ({shortened(error)}). Name another --host or --port."
        ) from error
    with listener:
        server = uvicorn.Server(config)
        listener.listen(config.backlog)
        on_start(f"http://{listener.getsockname()[0]}:{listener.getsockname()[1]}")
        server.run(sockets=[listener])


__all__ = ["serve", "serve_app"]
