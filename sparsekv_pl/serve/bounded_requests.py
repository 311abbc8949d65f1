"""The outermost layer of the server: nothing is read without the key, nor beyond a prompt; every reply is counted."""

from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sparsekv_pl.serve.api_key import ApiKey
from sparsekv_pl.serve.refusals import Refusal
from sparsekv_pl.serve.server_metrics import ServerMetrics


class BoundedRequests:
    """Refuses wrong keys, and long bodies: unread by their Content-Length, else while they are read; counts replies.

    A body in chunks may have a Content-Length beside it that is not its length, so what arrives is counted in any case.

    Parameters
    ----------
    app
        What answers.
    most_bytes
        The longest body.
    metrics
        Counts replies, by endpoint and status.
    key
        The key that clients must send; None asks for none.
    """

    def __init__(self, app: ASGIApp, most_bytes: int, metrics: ServerMetrics, key: ApiKey | None) -> None:
        self.app, self.most_bytes, self.metrics, self.key = app, most_bytes, metrics, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or refuse."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                endpoint = getattr(scope.get("route"), "path", "other")
                self.metrics.replies.labels(endpoint, message["status"]).inc()
            await send(message)

        arrived = 0

        async def bounded() -> Message:
            nonlocal arrived
            message = await receive()
            arrived += len(message.get("body", b""))
            if arrived > self.most_bytes:
                raise self._too_long(f"at least {arrived:,}")
            return message

        refusal = self._refusal(scope)
        answering: Any = self.app if refusal is None else refusal.response()
        await answering(scope, bounded, counted)

    def _refusal(self, scope: Scope) -> Refusal | None:
        headers = dict(scope["headers"])
        if self.key is not None and (refusal := self.key.refusal(scope["path"], headers)) is not None:
            return refusal
        length = headers.get(b"content-length", b"").decode("latin-1")
        known = int(length) if length.isdecimal() else 0
        return self._too_long(f"{known:,}") if known > self.most_bytes else None

    def _too_long(self, length: str) -> Refusal:
        what = f"the request is {length} bytes long, and a prompt within the limits is {self.most_bytes:,} at most"
        return Refusal(f"{what}: shorten it", status=413, code="context_length_exceeded")
