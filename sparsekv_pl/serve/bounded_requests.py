"""The outermost layer of the server: nothing is read without the key, nor beyond a prompt; every reply is counted."""

from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sparsekv_pl.serve.api_key import ApiKey
from sparsekv_pl.serve.refusals import Refusal
from sparsekv_pl.serve.server_metrics import ServerMetrics


class BoundedRequests:
    """Refuses wrong keys, and long bodies by their Content-Length, which must be given; counts replies.

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

        refusal = self._refusal(scope)
        answering: Any = self.app if refusal is None else refusal.response()
        await answering(scope, receive, counted)

    def _refusal(self, scope: Scope) -> Refusal | None:
        headers = dict(scope["headers"])
        if self.key is not None and (refusal := self.key.refusal(scope["path"], headers)) is not None:
            return refusal
        if scope["method"] != "POST":
            return None
        length = headers.get(b"content-length", b"").decode("latin-1")
        if not length.isdecimal():
            return Refusal("the request has no Content-Length: send one", status=411)
        if int(length) > self.most_bytes:
            what = f"the request is {int(length):,} bytes long, and a prompt within the limits is {self.most_bytes:,}"
            return Refusal(f"{what} at most: shorten it", status=413, code="context_length_exceeded")
        return None
