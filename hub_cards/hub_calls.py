"""Calls to the Hub: tried again where that can help, and errors that name the repository and the remedy."""

import json
import time
from collections.abc import Callable
from typing import Any, TypeVar

from huggingface_hub import constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import parse_ratelimit_headers

from unihema.errors import PushError


# huggingface_hub itself tries these again, and every PUT.
RETRIED = ("/preupload/", "/info/lfs/")
PASSING = (429, 500, 502, 503, 504)
TRIES = 5
LONGEST_WAIT = 300.0
Result = TypeVar("Result")

_REMEDIES = {
    401: "there is no valid token. Log in with `hf auth login`, or set HF_TOKEN.",
    403: "the token may not write there. It needs write permission for this repository, and you a place in its "
    "organisation.",
    404: "there is no such repository or revision, or the token may not see it. Check the name.",
    409: "somebody else is writing to it. Wait, and repeat the command: files that arrived are not sent again.",
    412: "somebody else has written to it meanwhile. Repeat the command: files that arrived are not sent again.",
    429: "the Hub has had too many requests from here. Wait some minutes, and repeat the command: files that arrived are "
    "not sent again.",
}


def call_hub(call: Callable[[], Result], repo_id: str, token: str | None = None) -> Result:
    """Calls the Hub, waiting and trying again where the Hub is busy or the connection is cut.

    Args:
        call (`Callable[[], Result]`): What to do; must be harmless to do twice.
        repo_id (`str`): Named in errors.
        token (`str`, *optional*): Kept out of errors; the user's own when missing.

    Returns:
        Result of the call.

    Raises:
        PushError: It failed, or failed five times.
    """
    wait = 1.0
    for remaining in reversed(range(TRIES)):
        try:
            return call()
        except OfflineModeIsEnabled as error:
            raise PushError(f"{repo_id}: HF_HUB_OFFLINE is set, so that nothing reaches the Hub. Unset it.") from error
        except (HTTPError, json.JSONDecodeError) as error:
            if not remaining or not _may_pass(error):
                raise PushError(_without(_message(error, repo_id), token or get_token())) from None
            asked = _wait_asked_for(error)
            time.sleep(wait if asked is None else asked)
            wait = min(2 * wait, 8.0)
    raise AssertionError("the last try returns or raises")


def _may_pass(error: Exception) -> bool:
    if isinstance(error, json.JSONDecodeError):
        return False
    try:
        request = (error.response if isinstance(error, HfHubHTTPError) else error).request
    except RuntimeError:
        # httpx's errors know their request only where one was made.
        return False
    if request.method == "PUT" or any(part in str(request.url) for part in RETRIED):
        return False
    return not isinstance(error, HfHubHTTPError) or error.response.status_code in PASSING


def _wait_asked_for(error: Exception) -> float | None:
    headers: Any = error.response.headers if isinstance(error, HfHubHTTPError) else {}
    limit = parse_ratelimit_headers(headers)
    asked = headers.get("retry-after", "")
    seconds = float(asked) if asked.isdigit() else None
    if limit is not None and limit.remaining == 0:
        seconds = float(limit.reset_in_seconds)
    return None if seconds is None else min(seconds, LONGEST_WAIT)


def _message(error: Exception, repo_id: str) -> str:
    if not isinstance(error, HfHubHTTPError):
        return (
            f"{repo_id}: the connection to {constants.ENDPOINT} failed ({error}). Repeat the command: files that arrived "
            "are not sent again."
        )
    status = error.response.status_code
    said = f" ({error.server_message})" if error.server_message else ""
    remedy = _REMEDIES.get(status)
    if remedy is None:
        remedy = "the Hub has trouble. Repeat the command later: files that arrived are not sent again."
        if status < 500:
            remedy = "the Hub refused it."
    return f"{repo_id}: {status}{said}: {remedy}"


def _without(message: str, token: str | None) -> str:
    return message.replace(token, "(token)") if token else message


__all__ = ["call_hub"]
