"""What stands before the service: who is let in, how much may be sent and how slowly, and what is counted of it."""

import asyncio
import hmac
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from fastapi import HTTPException
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from uvicorn.protocols.http.h11_impl import H11Protocol

from unihema.errors import UniHemaError
from unihema.http_answers import Plain

from .queue import QueueFullError, StoppingError


logger = logging.getLogger("unihema.serve")

# An id that a client may choose for its request.
_REQUEST_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)
# Bytes of a form that are no image.
MOST_FORM = 1 << 20
# Seconds in which what was refused is still read, so that a client that sends first and listens afterwards hears why.
DRAIN_SECONDS = 5.0
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
}

Scope = dict[str, Any]
Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


@dataclass(frozen=True)
class Limits:
    """What a client may ask for.

    Args:
        megabytes (`int`): Of a request.
        megapixels (`int`): Of an image; larger ones are for `unihema predict`.
        images (`int`): Of a request.
        waiting (`int`): Images that wait for the analyzer.
        batch_size (`int`): Images of one size that are analysed together at most.
        seconds (`float`): From the arrival of a request to its answer, and for the answer to be fetched.
        upload_seconds (`float`): For the request itself to arrive.
        arriving (`int`): Requests that arrive at the same time.
        arriving_megabytes (`int`): What has arrived of all requests that are not answered yet. It lies in the folder of temporary
            files.
    """

    megabytes: int = 64
    megapixels: int = 64
    images: int = 16
    waiting: int = 64
    batch_size: int = 4
    seconds: float = 120.0
    upload_seconds: float = 60.0
    arriving: int = 256
    arriving_megabytes: int = 2048


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
        is_open (`Callable[[str], bool]`): Whether a path needs no token.
        check_room (`Callable[[], None]`): Raises [`QueueFullError`] or [`StoppingError`] where an image would not be taken: it is
            told before it is sent.
    """

    def __init__(
        self,
        app: Any,
        token: str | None,
        limits: Limits,
        measures: Measures,
        paths: Sequence[str],
        is_open: Callable[[str], bool],
        check_room: Callable[[], None],
    ):
        self.app, self.token, self.limits, self.measures, self.paths = app, token, limits, measures, tuple(paths)
        self.is_open, self.check_room = is_open, check_room
        self.arriving = Arriving(limits.arriving, limits.arriving_megabytes << 20)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get("x-request-id", "")
        number = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = number
        path = scope["path"] if scope["path"] in self.paths else "other"
        begun = time.monotonic()
        body = Body(receive, headers, self.limits, self.arriving)
        answer = Answer(send, body, HEADERS | {"X-Request-Id": number})
        try:
            refusal = self._refusal(scope, headers)
            if refusal is None:
                await self.app(scope, body, answer)
            else:
                await refusal(scope, body, answer)
        finally:
            body.end()
            seconds = time.monotonic() - begun
            self.measures.requests.labels(path, str(answer.status)).inc()
            self.measures.seconds.labels(path).observe(seconds)
            logger.info(
                "%s %s %s %d %.3f s", number, scope["method"], ascii(scope["path"][:100])[1:-1], answer.status, seconds
            )

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> Plain | None:
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 15 or int(length) > most_bytes(self.limits):
            return _error(413, f"A request has {self.limits.megabytes} MB at most.")
        if self.token is not None and not self.is_open(scope["path"]):
            kind, _, shown = headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not hmac.compare_digest(shown.strip().encode(), self.token.encode()):
                return _error(
                    401, "This server wants a token: Authorization: Bearer ...", {"WWW-Authenticate": "Bearer"}
                )
        if scope["method"] == "POST" and scope["path"] in self.paths:
            if not headers.get("content-type", "").lower().startswith("multipart/form-data"):
                return _error(415, "Images and what is asked come as a form (Content-Type: multipart/form-data).")
            try:
                self.arriving.check()
                self.check_room()
            except (QueueFullError, StoppingError) as error:
                return refused(error)
        return None


class Arriving:
    """What is on its way, of all clients together.

    Args:
        most_requests (`int`): Requests at the same time.
        most_bytes (`int`): Bytes of them.
    """

    def __init__(self, most_requests: int, most_bytes: int):
        self.most_requests, self.most_bytes = most_requests, most_bytes
        self.requests = self.bytes = 0

    def check(self) -> None:
        """Checks that another request may arrive.

        Raises:
            QueueFullError: It may not.
        """
        if self.requests >= self.most_requests or self.bytes >= self.most_bytes:
            raise QueueFullError(5.0)


class Body:
    """What a client sends, up to a number of bytes and seconds.

    Args:
        receive: Gives its parts.
        headers (`dict[str, str]`): Of the request.
        limits ([`Limits`]): How much, and how slowly.
        arriving ([`Arriving`]): Of all clients; this one counts in it until `end`.
    """

    def __init__(self, receive: Receive, headers: dict[str, str], limits: Limits, arriving: Arriving):
        self.receive, self.limits, self.arriving = receive, limits, arriving
        self.bytes, self.until = 0, time.monotonic() + limits.upload_seconds
        # Whether it is here, or will not come.
        self.done = headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers
        arriving.requests += 1

    def end(self) -> None:
        """It is answered: what was kept of it is gone."""
        self.arriving.requests -= 1
        self.arriving.bytes -= self.bytes

    async def __call__(self) -> Message:
        if self.done:
            # From here on nothing comes but that the client has gone.
            return await self.receive()
        try:
            message = await asyncio.wait_for(self.receive(), max(0.0, self.until - time.monotonic()))
        except TimeoutError:
            raise HTTPException(
                408, f"The request did not arrive within {self.limits.upload_seconds:g} seconds."
            ) from None
        if message["type"] != "http.request":
            self.done = True
            raise HTTPException(499, "The client has gone.")
        size = len(message.get("body", b""))
        self.bytes += size
        self.arriving.bytes += size
        self.done = not message.get("more_body", False)
        if self.bytes > most_bytes(self.limits):
            raise HTTPException(413, f"A request has {self.limits.megabytes} MB at most.")
        if self.arriving.bytes > self.arriving.most_bytes:
            raise HTTPException(429, "Too much arrives at once. Ask again in 5 seconds.", {"Retry-After": "5"})
        return message

    async def drain(self) -> None:
        """Reads on for a while what nobody needs, and keeps nothing of it."""
        until, left = time.monotonic() + DRAIN_SECONDS, most_bytes(self.limits)
        with suppress(TimeoutError):
            while not self.done and left > 0:
                message = await asyncio.wait_for(self.receive(), max(0.0, until - time.monotonic()))
                left -= len(message.get("body", b""))
                self.done = message["type"] != "http.request" or not message.get("more_body", False)


class Answer:
    """What a client gets, with headers of ours. Where its request is not wholly here yet, the connection ends with it.

    Args:
        send: Sends its parts.
        body ([`Body`]): The request.
        headers (`dict[str, str]`): Added where the application has none of that name.
    """

    def __init__(self, send: Send, body: Body, headers: dict[str, str]):
        self.send, self.body = send, body
        self.headers = {name.lower().encode(): value.encode() for name, value in headers.items()}
        self.status = 500

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            own = {name.lower() for name, _ in message["headers"]}
            more = self.headers if self.body.done else {**self.headers, b"connection": b"close"}
            added = [(name, value) for name, value in more.items() if name not in own]
            message = {**message, "headers": [*message["headers"], *added]}
        elif not message.get("more_body", False) and not self.body.done:
            # A connection that is closed while data arrives is reset, and the client would not read the answer.
            await self.send({**message, "more_body": True})
            await self.body.drain()
            message = {"type": "http.response.body", "body": b"", "more_body": False}
        await self.send(message)


class PatientProtocol(H11Protocol):
    """HTTP/1.1 that gives up on a connection which begins no request, or does not fetch its answer."""

    # Seconds for a request to begin, and for an answer to be fetched.
    first_seconds, fetch_seconds = 20.0, 120.0
    _stuck: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_request(None)

    def on_response_complete(self) -> None:
        last = self.cycle
        # This may begin the next request, which has come already.
        super().on_response_complete()
        self._expect_request(last)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stuck = self.loop.call_later(self.fetch_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._let_go()

    def connection_lost(self, exc: Exception | None) -> None:
        self._let_go()
        super().connection_lost(exc)

    def _let_go(self) -> None:
        if self._stuck is not None:
            self._stuck.cancel()
            self._stuck = None

    def _expect_request(self, last: Any) -> None:
        until = self.loop.time() + self.fetch_seconds

        def look() -> None:
            if self.cycle is not last:
                return
            if self.transport.get_write_buffer_size() and self.loop.time() < until:
                # The last answer is still being fetched.
                self.loop.call_later(self.first_seconds, look)
            else:
                self.transport.abort()

        self.loop.call_later(self.first_seconds, look)


def most_bytes(limits: Limits) -> int:
    """Bytes of a request, at most."""
    return (limits.megabytes << 20) + MOST_FORM


def refused(error: UniHemaError) -> Plain:
    """The answer where nothing is taken now."""
    if isinstance(error, QueueFullError):
        return _error(429, str(error), {"Retry-After": str(round(error.seconds))})
    return _error(503, str(error))


def _error(status: int, text: str, headers: dict[str, str] | None = None) -> Plain:
    return Plain({"error": text}, status, headers)


__all__ = ["Gate", "Limits", "Measures", "PatientProtocol", "refused"]
