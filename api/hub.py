"""What is asked of the Hub has bounds: of time, size, redirects and waiting; and nothing it says is shown as it came."""

import logging
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any

from unihema.errors import RunError
from unihema.files import shortened


# Seconds without a byte, and of one answer that is read into memory.
READ_SECONDS, ANSWER_SECONDS = 60.0, 300.0
# Of all requests of one call that loads.
CALL_SECONDS = 1800.0
# The list of a checkpoint's files.
MOST_LIST = 1 << 20
# An answer in memory; one whose length the Hub does not say; any other file, and weights.
MOST_ANSWER, MOST_UNSAID, MOST_FILE, MOST_WEIGHTS = 32 << 20, 256 << 20, 256 << 20, 200 << 30
# All of one call together, but its weights.
MOST_TOGETHER = 512 << 20
# Compressed, as nobody asked for: a thousand times that is what it may become.
MOST_COMPRESSED = 1 << 20
# Downloads slower than this, in bytes a second, do not come to an end.
SLOWEST = 1000
LONGEST_WAIT = 300.0
MOST_REDIRECTS = 5
_WEIGHTS = re.compile(r"\.(safetensors|onnx)$")
_TOKEN = re.compile(r"hf_\w{8,}")
_lock = threading.Lock()
# Calls with bounds of their own.
_calls: list["_Call"] = []
# The user's client factory, once for each call that is in `bounded_hub`.
_users: list[Any] = []


@dataclass
class _Call:
    """What one call may still ask, and what it has got.

    Args:
        left (`int`): Requests.
        start (`float`): When it began.
        received (`int`): Bytes.
        beside (`int`): Those that are of no weights.
    """

    left: int
    start: float = field(default_factory=time.monotonic)
    received: int = 0
    beside: int = 0

    def is_over(self) -> bool:
        if self.left <= 0 or self.beside > MOST_TOGETHER:
            return True
        return time.monotonic() - self.start > max(CALL_SECONDS, self.received / SLOWEST)


def _count(received: int = 0, beside: bool = False) -> None:
    """Takes a request, or bytes of its answer, off what the calls have; several at once share it.

    Raises:
        RunError: They have none left. huggingface_hub repeats requests that failed otherwise.
    """
    with _lock:
        call = next((call for call in _calls if not call.is_over()), None)
        if call is None and _calls:
            raise RunError("more requests, bytes or time than a checkpoint takes")
        if call is not None:
            call.left -= not received
            call.received += received
            call.beside += received if beside else 0


def hidden(text: object, token: str | None = None, most: int = 300) -> str:
    """What a server or a library says, in one short printable line without tokens.

    Args:
        text (`object`): The text, or an error that has one.
        token (`str`, *optional*): What must not be in it, beside everything that looks like a token of the Hub.
        most (`int`): Characters.
    """
    # Cut before anything is searched, but not through a token.
    said = str(text)[: 8 * most + 200]
    if token:
        said = said.replace(token, "(token)")
    return shortened(_TOKEN.sub("(token)", said), most)


def seconds_to_wait(retry_after: str) -> float | None:
    """Seconds that a `Retry-After` asks for, at most `LONGEST_WAIT`; `None` where it says nothing.

    Args:
        retry_after (`str`): Seconds, or a date.
    """
    asked = retry_after.strip()
    if re.fullmatch(r"[0-9]{1,30}", asked):
        return min(float(asked), LONGEST_WAIT)
    try:
        return min(max(parsedate_to_datetime(asked[:100]).timestamp() - time.time(), 0.0), LONGEST_WAIT)
    except (ValueError, TypeError, OverflowError, OSError):
        return None


@contextmanager
def bounded_hub(most_requests: int | None = None) -> Iterator[None]:
    """Requests of huggingface_hub have bounds in here; the client that the user configured is otherwise as it was.

    It is one client for the whole process, so other threads have the same bounds meanwhile.

    Args:
        most_requests (`int`, *optional*): Of this call. A Hub that lists a million files is asked for no more, its lists are to
            be shorter than `MOST_LIST`, and all together comes at `SLOWEST` bytes a second or within `CALL_SECONDS`.
    """
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    handlers = logging.getLogger("huggingface_hub").handlers
    with _lock:
        if not _users:
            # Private: nothing public gives the factory back, which may know the user's proxy.
            users = _http._GLOBAL_CLIENT_FACTORY  # noqa: SLF001
            set_client_factory(lambda: _bound(users()))
            for handler in handlers:
                handler.addFilter(_hide)
        else:
            users = _users[0]
        _users.append(users)
        if most_requests is not None:
            _calls.append(_Call(most_requests))
    try:
        yield
    finally:
        with _lock:
            _users.pop()
            if most_requests is not None:
                _calls.pop()
            if not _users:
                set_client_factory(users)
                for handler in handlers:
                    handler.removeFilter(_hide)


def _hide(record: logging.LogRecord) -> bool:
    record.msg, record.args = hidden(record.getMessage()), ()
    return True


def _bound(client: Any) -> Any:
    client.timeout = READ_SECONDS
    client.max_redirects = MOST_REDIRECTS
    hooks = client.event_hooks
    client.event_hooks = {
        "request": [*hooks["request"], _plain_only],
        "response": [_tame_headers, *hooks["response"], _limit_body],
    }
    return client


def _library() -> Any:
    """The HTTP library of huggingface_hub, httpx or its successor."""
    from huggingface_hub.errors import HfHubHTTPError

    theirs = next(of for of in HfHubHTTPError.__mro__ if not of.__module__.startswith("huggingface_hub"))
    return sys.modules[theirs.__module__.partition(".")[0]]


def _plain_only(request: Any) -> None:
    _count()
    # What is not compressed cannot become a thousand times as large.
    request.headers["Accept-Encoding"] = "identity"
    from huggingface_hub import constants

    # huggingface_hub asks for some answers without any limit of time, and gives limits of its own for others.
    given = request.extensions.get("timeout") or {}
    most = max(READ_SECONDS, constants.HF_HUB_ETAG_TIMEOUT, constants.HF_HUB_DOWNLOAD_TIMEOUT)
    parts = {name: min(given.get(name) or READ_SECONDS, most) for name in ("connect", "read", "write", "pool")}
    request.extensions = {**request.extensions, "timeout": parts}


def _tame_headers(response: Any) -> None:
    """huggingface_hub waits as long as these say, and logs the warning."""
    headers = response.headers
    headers.pop("x-hf-warning", None)
    limit = re.search(r"\br=0+;t=([0-9]{1,30})", headers.pop("ratelimit", "")[:200])
    asked = limit[1] if limit else headers.pop("retry-after", "")
    headers.pop("retry-after", None)
    wait = seconds_to_wait(asked)
    if wait is not None:
        headers["retry-after"] = str(int(wait))


def _limit_body(response: Any) -> None:
    request, length = response.request, response.headers.get("content-length", "")
    encoding, path = response.headers.get("content-encoding", "identity"), request.url.path
    if encoding != "identity":
        most = MOST_COMPRESSED if encoding in ("gzip", "deflate") else 0
    elif request.method != "GET" or "/api/" in path or response.is_error or response.has_redirect_location:
        most = MOST_LIST if _calls else MOST_ANSWER
    elif not length:
        most = MOST_UNSAID
    else:
        # Storage that the Hub redirects to does not say what a file is called.
        most = MOST_FILE if "/resolve/" in path and not _WEIGHTS.search(path) else MOST_WEIGHTS
    if length.isascii() and length.isdigit() and request.method != "HEAD" and (len(length) > 18 or int(length) > most):
        raise _library().RemoteProtocolError(f"an answer of {shortened(length, 20)} bytes", request=request)
    response.stream = _bounded_stream(response, most)


def _bounded_stream(response: Any, most: int) -> Any:
    library = _library()
    stream_class: Any = library.SyncByteStream

    class Bounded(stream_class):
        def __init__(self, stream: Any):
            self.stream = stream

        def __iter__(self) -> Iterator[bytes]:
            start, size = time.monotonic(), 0
            for part in self.stream:
                size += len(part)
                _count(len(part), beside=most < MOST_WEIGHTS)
                if size > most:
                    raise library.RemoteProtocolError(
                        f"an answer of more than {most >> 10} KB", request=response.request
                    )
                if time.monotonic() - start > max(ANSWER_SECONDS, size / SLOWEST):
                    raise library.RemoteProtocolError("an answer that does not end", request=response.request)
                yield part

        def close(self) -> None:
            self.stream.close()

    return Bounded(response.stream)


__all__ = ["bounded_hub", "hidden", "seconds_to_wait"]
