"""What the servers of this package answer alike: plain JSON, and errors as one sentence."""

import json
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from unihema.files import printable


class Plain(Response):
    """JSON in ASCII: what is no character in a name of a file arrives as an escape."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, separators=(",", ":"), allow_nan=False).encode()


def tell_errors(app: FastAPI) -> None:
    """Answers what an application refuses, and a request that does not fit, with `{"error": sentence}`."""

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> Plain:
        return Plain({"error": str(error.detail)}, error.status_code)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Plain:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:]) or "the request"
        return Plain({"error": f"{printable(where)[:100]}: {printable(first['msg'])[:200]}."}, 422)


__all__ = ["Plain", "tell_errors"]
