"""An OpenAI-compatible endpoint on loopback that answers from a test's script."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Reply:
    """A reply after ``delay`` seconds; ``body`` is sent as it is if it is bytes, part by part if it yields them.

    With status 0 the body is all that is sent: no status line, no headers but its own.
    """

    body: Any
    status: int = 200
    delay: float = 0.0
    headers: dict[str, str] = field(default_factory=dict)


def said(text: str | None, usage: tuple[int, int] | None = (7, 3), finish_reason: str = "stop") -> Reply:
    """A chat completion with (prompt, completion) tokens of usage."""
    choice = {"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", "content": text}}
    body: dict[str, Any] = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
    if usage is not None:
        names = ("prompt_tokens", "completion_tokens", "total_tokens")
        body["usage"] = dict(zip(names, (*usage, sum(usage)), strict=True))
    return Reply(body)


def failed(status: int, message: str = "no", code: str | None = None, **headers: str) -> Reply:
    """An error in OpenAI's shape."""
    return Reply({"error": {"message": message, "code": code, "type": "error"}}, status, headers=headers)


class ScriptedServer:
    """Sends the replies of its script in turn and repeats the last, or calls a function of the request."""

    def __init__(self, script: Sequence[Reply] | Callable[[dict[str, Any]], Reply]) -> None:
        self.script = script
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.under_way = self.most_under_way = 0
        self.lock = threading.Lock()

    def reply(self, body: dict[str, Any], headers: dict[str, str]) -> Reply:
        with self.lock:
            self.bodies.append(body)
            self.headers.append(headers)
            self.times.append(time.monotonic())
            if callable(self.script):
                return self.script(body)
            return self.script[min(len(self.bodies), len(self.script)) - 1]

    @contextmanager
    def counted(self) -> Iterator[None]:
        with self.lock:
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            yield
        finally:
            with self.lock:
                self.under_way -= 1


@contextmanager
def serving(*script: Reply, answer: Callable[[dict[str, Any]], Reply] | None = None) -> Iterator[tuple[Any, str]]:
    """(the server, its base_url), while the context is open."""
    scripted = ScriptedServer(answer or script)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with scripted.counted():
                reply = scripted.reply(body, {name.lower(): value for name, value in self.headers.items()})
                time.sleep(reply.delay)
            content = reply.body
            if not isinstance(content, Iterator):
                content = iter([content if isinstance(content, bytes) else json.dumps(content).encode()])
            try:
                if reply.status:
                    self.send_response(reply.status)
                    for name, value in ({"content-type": "application/json"} | reply.headers).items():
                        self.send_header(name.replace("_", "-"), value)
                    self.end_headers()  # and no length: the end of the connection is the end of the body
                for part in content:
                    self.wfile.write(part)
            except OSError:
                self.close_connection = True  # the client has waited long enough

        def log_message(self, format: str, *arguments: Any) -> None:
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.block_on_close = False
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield scripted, f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
