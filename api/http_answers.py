"""What the servers of this package answer alike: plain JSON, and errors as one sentence."""

import json
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from unihema.files import printable, shortened


class Plain(Response):
    """JSON in ASCII: what is no character in a name of a file arrives as an escape."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_json(content)


def to_json(content: Any) -> bytes:
    """JSON in ASCII, without spaces."""
    return json.dumps(content, separators=(",", ":"), allow_nan=False).encode()


def tell_errors(app: FastAPI) -> None:
    """Answers what an application refuses, and a request that does not fit, with `{"error": sentence}`."""

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> Plain:
        if isinstance(error.__cause__, OSError) and error.status_code == 400:
            # A form whose parts found no room on the disk.
            return Plain({"error": f"The server cannot keep what is sent ({shortened(error.__cause__, 100)})."}, 507)
        return Plain({"error": str(error.detail)}, error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Plain:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:]) or "the request"
        return Plain({"error": f"{printable(where)[:100]}: {printable(first['msg'])[:200]}."}, 422)


__all__ = ["Plain", "tell_errors", "to_json"]
