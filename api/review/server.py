"""The page of a review, served on this machine alone."""

import asyncio
import hashlib
import hmac
import os
import secrets
import socket
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from http.cookies import CookieError, SimpleCookie
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import jinja2
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.middleware.gzip import GZipMiddleware

from unihema.errors import InputError, OutputError, RequestError, UniHemaError
from unihema.files import printable
from unihema.http_answers import Plain, tell_errors
from unihema.results.calibration import certainty

from .pictures import LONGEST_VIEW, Pictures
from .rows import class_rows, differential_rows
from .state import (
    LONGEST_LABEL,
    LONGEST_NAME,
    LONGEST_REASON,
    MOST_AT_ONCE,
    Review,
    ReviewedCell,
    ReviewedImage,
    ReviewedSample,
    SignedError,
    StaleError,
    Target,
)


HOST = "127.0.0.1"
# Of what a page sends: the cells that can be changed at once take about 60 bytes each.
MOST_BODY = 2 << 20
# Entries of the log that the page shows.
SHOWN_ENTRIES = 500
STATIC = dict.fromkeys(("review.js", "gallery.js", "context.js"), "text/javascript") | {"review.css": "text/css"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
NOT_LET_IN = "This page opens with the whole address, with its token, that the server printed."

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    who: Annotated[str, Field(max_length=LONGEST_NAME)]
    why: Annotated[str, Field(max_length=LONGEST_REASON)] = ""


class _Cell(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    image: int
    cell: int
    revision: int


class ChangeBody(_Body):
    """Cells that are changed, each with the revision that the page has seen."""

    kind: Annotated[str, Field(max_length=20)]
    cells: Annotated[list[_Cell], Field(max_length=MOST_AT_ONCE)]
    label: Annotated[str, Field(max_length=LONGEST_LABEL)] | None = None


class DrawBody(_Body):
    """A cell that was missed."""

    image: int
    box: Annotated[list[float], Field(min_length=4, max_length=4)]
    label: Annotated[str, Field(max_length=LONGEST_LABEL)]


class ThroughBody(_Body):
    """An image that was looked through, or not."""

    image: int
    revision: int
    through: bool = True


class SignBody(_Body):
    """The revision of the sample that is signed."""

    revision: int


class Guard:
    """Lets in who has the address, from this page, and nobody else; says how browsers have to treat the answers.

    Args:
        app: The application behind it.
        token (`str`): What the address has.
        hosts (`Sequence[str]`, *optional*): `host:port` by which the page is called; any where none are given.
    """

    def __init__(self, app: Any, token: str, hosts: Sequence[str] | None):
        self.app, self.hosts = app, hosts
        self.token = token.encode()
        # The cookie is another secret: the address stays in the history of the browser, the cookie ends with the server.
        self.session = secrets.token_urlsafe(32)
        self.cookie = "-".join(["unihema-review", *(hosts[0].rpartition(":")[2:] if hosts else ())])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        answer = self._refusal(scope, headers)
        if answer is None:
            body = _LimitedBody(receive)
            await self.app(scope, body, _with_headers(send))
            return
        await answer(scope, receive, _with_headers(send))

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> Response | None:
        host = headers.get("host", "")
        if self.hosts is not None and host not in self.hosts:
            return _error(421, "This server is called by the address that it printed, and no other.")
        # Some other page of the browser, whatever it has been told.
        if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            return _error(403, "Another page may not ask this one.")
        origin = headers.get("origin")
        # Beside another application the page may have come through a proxy, by https.
        own = [f"http://{name}" for name in self.hosts or (host,)] + ([] if self.hosts else [f"https://{host}"])
        if (origin is not None and origin not in own) or (scope["method"] not in ("GET", "HEAD") and origin is None):
            return _error(403, "Changes come from the page of the review itself.")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 12 or int(length) > MOST_BODY:
            return _error(413, f"More than {MOST_BODY >> 20} MB at once.")
        given = _token(scope.get("query_string", b""))
        # Where it is mounted beside another application.
        root = scope.get("root_path", "")
        is_page = scope["path"].removeprefix(root) == "/"
        if scope["method"] == "GET" and is_page and hmac.compare_digest(given, self.token):
            # The address without its secret, so that it does not stay on the screen.
            response = RedirectResponse(f"{root}/", 303)
            response.set_cookie(self.cookie, self.session, httponly=True, samesite="strict", path=f"{root}/")
            return response
        if self._has_cookie(headers.get("cookie", "")):
            return None
        if is_page:
            return HTMLResponse(_template("closed.html").render(text=NOT_LET_IN), 401)
        return _error(401, NOT_LET_IN)

    def _has_cookie(self, header: str) -> bool:
        try:
            morsel = SimpleCookie(header).get(self.cookie)
        except CookieError:
            return False
        return morsel is not None and hmac.compare_digest(morsel.value.encode(), self.session.encode())


class _LimitedBody:
    """What a request sends, up to a number of bytes, also where it does not say how many they are."""

    def __init__(self, receive: Receive):
        self.receive, self.bytes = receive, 0

    async def __call__(self) -> dict[str, Any]:
        message = await self.receive()
        self.bytes += len(message.get("body", b""))
        if self.bytes > MOST_BODY:
            raise HTTPException(413, f"More than {MOST_BODY >> 20} MB at once.")
        return message


def _with_headers(send: Send) -> Send:
    async def sent(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            own = {name.lower() for name, _ in message["headers"]}
            more = {"cache-control": "no-store", **{name.lower(): value for name, value in HEADERS.items()}}
            message["headers"] = [
                *message["headers"],
                *((name.encode(), value.encode()) for name, value in more.items() if name.encode() not in own),
            ]
        await send(message)

    return sent


def _token(query: bytes) -> bytes:
    return next((part[6:] for part in query.split(b"&") if part.startswith(b"token=")), b"")


def _error(status: int, text: str, **more: Any) -> Plain:
    return Plain({"error": text, **more}, status)


def _template(name: str) -> jinja2.Template:
    loader = jinja2.FileSystemLoader(str(resources.files("unihema.review") / "static"))
    return jinja2.Environment(loader=loader, autoescape=True).get_template(name)


def review_app(review: Review, token: str, port: int | None) -> FastAPI:
    """The application of a review.

    Args:
        review ([`Review`]): What is reviewed; the caller closes it.
        token (`str`): What the address has to have.
        port (`int`, *optional*): By which it is called, on this machine; `None` where it is mounted beside an application that is
            called by other names.
    """
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, default_response_class=Plain)
    pictures = Pictures()
    app.state.pictures = pictures
    images, samples = list(review.images.values()), list(review.samples.values())
    place = {image.name: number for number, image in enumerate(images)}
    files = {name: (resources.files("unihema.review") / "static" / name).read_bytes() for name in STATIC}

    def sample_at(number: int) -> ReviewedSample:
        if not 0 <= number < len(samples):
            raise RequestError(f"There is no sample {number}.")
        return samples[number]

    def image_at(number: int) -> ReviewedImage:
        if not 0 <= number < len(images):
            raise RequestError(f"There is no image {number}.")
        return images[number]

    def told(
        sample: ReviewedSample, who: str, cells: Sequence[ReviewedCell], of: Sequence[ReviewedImage]
    ) -> dict[str, Any]:
        counts = sample.counts
        undo, redo = review.can_undo(who, sample.name)
        return {
            "revision": sample.revision,
            "status": sample.status,
            "signatures": sample.signatures,
            "classes": class_rows(sample, counts),
            "differential": differential_rows(sample, counts),
            "cells": [cell_row(cell) for cell in cells],
            "images": [[place[image.name], image.looked_through, image.revision] for image in of],
            "undo": undo,
            "redo": redo,
        }

    def cell_row(cell: ReviewedCell) -> list[Any]:
        original = cell.original
        return [
            place[cell.image],
            original.id,
            cell.label,
            cell.revision,
            cell.present,
            cell.looked_at,
            cell.drawn,
            original.label,
            round(1.0 if cell.drawn else certainty(original), 4),
            [round(value, 1) for value in original.box],
            {name: value["value"] for name, value in original.attributes.items()},
            original.odd,
        ]

    def after(sample: ReviewedSample, who: str, revision: int) -> Plain:
        if revision >= sample.revision:
            return Plain({"after": revision, "revision": sample.revision})
        return Plain({"after": revision, **told(sample, who, *review.changed(sample.name, revision))})

    @app.get("/")
    def page() -> HTMLResponse:
        return HTMLResponse(_template("review.html").render(folder=printable(review.folder.absolute().name)))

    @app.get("/static/{name}")
    def static(name: str, request: Request) -> Response:
        if name not in STATIC:
            raise HTTPException(404, "There is no such file.")
        return _cached(request, hashlib.sha256(files[name]).hexdigest()[:32], lambda: files[name], STATIC[name], 0)

    @app.get("/api/samples")
    def list_samples() -> Plain:
        return Plain(
            [
                {"id": number, "name": sample.name, "images": len(sample.images), "status": sample.status}
                for number, sample in enumerate(samples)
            ]
        )

    @app.get("/api/samples/{number}")
    def whole_sample(number: int, who: str = "") -> Plain:
        sample = sample_at(number)
        with review.reading():
            answer = told(sample, who, list(sample.cells), sample.images)
            answer["name"] = sample.name
            answer["files"] = {
                place[image.name]: [
                    printable(image.stored.source.name),
                    image.stored.result.width,
                    image.stored.result.height,
                    image.shows_one_cell,
                ]
                for image in sample.images
            }
            answer["warnings"] = list(
                dict.fromkeys(text for image in sample.images for text in image.stored.result.warnings)
            )
        return Plain(answer)

    @app.get("/api/samples/{number}/changes")
    def changes(number: int, after_revision: int = 0, who: str = "") -> Plain:
        with review.reading():
            return after(sample_at(number), who, after_revision)

    @app.post("/api/samples/{number}/changes")
    def change(number: int, body: ChangeBody) -> Plain:
        sample = sample_at(number)
        targets = [Target(image_at(each.image).name, each.cell, each.revision) for each in body.cells]
        of_others = next((each for each in targets if review.images[each.image].sample != sample.name), None)
        if of_others is not None:
            raise RequestError("One of the cells is of another sample.")
        with review.reading():
            before = sample.revision
            review.change(body.who, targets, body.kind, body.label, body.why)
            return after(sample, body.who, before)

    @app.post("/api/samples/{number}/draw")
    def draw(number: int, body: DrawBody) -> Plain:
        sample, image = sample_at(number), image_at(body.image)
        if image.sample != sample.name:
            raise RequestError("This image is of another sample.")
        with review.reading():
            before = sample.revision
            review.draw(body.who, image.name, body.box, body.label, body.why)
            return after(sample, body.who, before)

    @app.post("/api/samples/{number}/through")
    def through(number: int, body: ThroughBody) -> Plain:
        sample, image = sample_at(number), image_at(body.image)
        if image.sample != sample.name:
            raise RequestError("This image is of another sample.")
        with review.reading():
            before = sample.revision
            review.look_through(body.who, image.name, body.revision, body.through, body.why)
            return after(sample, body.who, before)

    @app.post("/api/samples/{number}/{direction}")
    def back_or_forth(number: int, direction: str, body: _Body) -> Plain:
        sample = sample_at(number)
        with review.reading():
            before = sample.revision
            if direction == "undo":
                review.undo(body.who, sample.name)
            elif direction == "redo":
                review.redo(body.who, sample.name)
            elif direction == "amend":
                review.amend(body.who, sample.name, body.why)
            else:
                raise HTTPException(404, "There is no such thing here.")
            return after(sample, body.who, before)

    @app.put("/api/samples/{number}/signature")
    def sign(number: int, body: SignBody) -> Plain:
        sample = sample_at(number)
        with review.reading():
            before = sample.revision
            review.sign(body.who, sample.name, body.revision, body.why)
            return after(sample, body.who, before)

    @app.get("/api/samples/{number}/log")
    def log(number: int) -> Plain:
        sample = sample_at(number)
        with review.reading():
            entries = [entry for entry in review.log.entries() if entry.sample == sample.name]
            head = review.log.head
        shown = [
            {
                "number": entry.number,
                "time": entry.time,
                "who": entry.who,
                "image": None if entry.image is None else place[entry.image],
                "cell": entry.cell,
                "kind": entry.kind,
                "old": entry.old,
                "new": entry.new,
                "why": entry.why,
            }
            for entry in entries[-SHOWN_ENTRIES:]
            if entry.kind != "begin"
        ]
        return Plain({"entries": shown, "head": {"number": head[0], "hash": head[1]}})

    @app.get("/api/images/{number}/cells/{cell}")
    def thumbnail(number: int, cell: int, request: Request) -> Response:
        image = image_at(number)
        found = image.cells.get(cell)
        if found is None:
            raise HTTPException(404, f"There is no cell {cell} in this image.")
        return _cached(
            request, pictures.thumbnail_key(image, found), lambda: pictures.thumbnail(image, found), "image/jpeg"
        )

    @app.get("/api/images/{number}/view")
    def view(
        number: int, left: int, top: int, right: int, bottom: int, request: Request, longest: int = 640
    ) -> Response:
        image, box = image_at(number), (left, top, right, bottom)
        longest = min(max(longest, 1), LONGEST_VIEW)
        return _cached(
            request, pictures.view_key(image, box, longest), lambda: pictures.view(image, box, longest), "image/jpeg"
        )

    @app.exception_handler(StaleError)
    async def stale(_: Request, error: StaleError) -> Plain:
        return _error(409, str(error), cells=[cell_row(cell) for cell in error.cells])

    @app.exception_handler(SignedError)
    async def signed(_: Request, error: SignedError) -> Plain:
        return _error(423, str(error))

    @app.exception_handler(OutputError)
    async def unwritten(_: Request, error: OutputError) -> Plain:
        return _error(507, f"The change was not written: {error}")

    @app.exception_handler(UniHemaError)
    async def wrong(_: Request, error: UniHemaError) -> Plain:
        return _error(
            400 if isinstance(error, RequestError) else 422 if isinstance(error, InputError) else 500, str(error)
        )

    tell_errors(app)

    app.add_middleware(GZipMiddleware, minimum_size=4096, compresslevel=4)
    hosts = None if port is None else (f"{HOST}:{port}", f"localhost:{port}")
    app.add_middleware(Guard, token=token, hosts=hosts)
    return app


@contextmanager
def mounted_review(folder: str | Path, token: str, sample_by: str | None = None) -> Iterator[FastAPI]:
    """The application of a review, to be mounted beside another one.

    Args:
        folder (`str` or `Path`): The results folder.
        token (`str`): What the address has to have.
        sample_by (`str`, *optional*): See [`Review`].

    Raises:
        InputError, OutputError: See [`Review`].
    """
    with Review(folder, sample_by) as review:
        app = review_app(review, token, None)
        try:
            yield app
        finally:
            app.state.pictures.close()


def _cached(
    request: Request, key: str, content: Callable[[], bytes], media_type: str, seconds: int = 24 * 3600
) -> Response:
    """What is the same as long as its key is: browsers keep it."""
    headers = {"ETag": f'"{key}"', "Cache-Control": f"private, max-age={seconds}" if seconds else "private, no-cache"}
    if f'"{key}"' in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(content(), media_type=media_type, headers=headers)


def serve(
    folder: str | Path,
    sample_by: str | None = None,
    port: int = 0,
    on_address: Callable[[str], None] = lambda address: None,
) -> None:
    """Serves the page of a review until the process is asked to stop; what was acknowledged is on the disk.

    Args:
        folder (`str` or `Path`): The results folder.
        sample_by (`str`, *optional*): See [`Review`].
        port (`int`): Port on 127.0.0.1; a free one when 0.
        on_address (`Callable[[str], None]`): Gets the address, with its token, when the page can be opened.

    Raises:
        InputError: See [`Review`].
        OutputError: See [`Review`]; or the port is not free.
    """
    with Review(folder, sample_by) as review, socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        if os.name == "posix":
            # Elsewhere it would share a port that another program has.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise OutputError(
                f"Port {port} of this machine is not free ({error}). Name another one, or none."
            ) from error
        port = listener.getsockname()[1]
        token = secrets.token_urlsafe(32)
        app = review_app(review, token, port)
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=5, lifespan="off"
        )
        server = uvicorn.Server(config)
        listener.listen(128)
        on_address(f"http://{HOST}:{port}/?token={token}")
        try:
            asyncio.run(server.serve(sockets=[listener]))
        finally:
            app.state.pictures.close()


__all__ = ["Guard", "HOST", "mounted_review", "review_app", "serve"]
