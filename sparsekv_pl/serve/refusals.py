"""Refusals in OpenAI's shape: what a client asked for that cannot be, the field that says it, and the fix."""

from typing import Any

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException


class Refusal(HTTPException):
    """A request that is not answered; an ``HTTPException``, which FastAPI lets through where a body is read.

    Parameters
    ----------
    message
        One line with the value and the fix.
    status
        HTTP status code.
    code
        OpenAI's name of the case, such as "context_length_exceeded"; None where there is none.
    param
        The field of the request; None where it is none.
    kind
        OpenAI's ``type`` of the error.
    headers
        Of the reply, such as Retry-After.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        code: str | None = None,
        param: str | None = None,
        kind: str = "invalid_request_error",
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.body: dict[str, Any] = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        """Return it as a reply."""
        return JSONResponse(self.body, self.status_code, self.headers)


def refusal_of(error: BaseException) -> Refusal:
    """Return ``error`` as a refusal: a ``ValueError`` is the client's, anything else the server's."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, ValueError):
        return Refusal(str(error))
    return Refusal(
        "the server failed, and its log says how: report it", status=500, kind="server_error", code="internal_error"
    )
