"""Servers of a tiny model on loopback, in threads of the test."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from openai import OpenAI

from sparsekv_pl.models.backbone import Backbone
from sparsekv_pl.serve.building import built
from sparsekv_pl.serve.draining_server import DrainingServer, address_of, bound_socket
from sparsekv_pl.serve.serve_arguments import parsed
from sparsekv_pl.usage.loaded_model import LoadedModel

NAME = "tiny"


class RunningServer:
    """A server in a thread, and OpenAI's client of it."""

    def __init__(self, given: list[str]) -> None:
        asked = parsed([*given, "--name", NAME, "--port", "0"])
        self.socket = bound_socket(asked.host, asked.port)
        self.url = address_of(self.socket)
        self.served, self.turns, app = built(asked)
        self.server = DrainingServer(app, self.turns, asked.drain_seconds)
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],), daemon=True)
        self.client = OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=60)

    def ask(self, content: Any, **settings: Any) -> Any:
        """Send one user's message, or a whole conversation."""
        messages = content if isinstance(content, list) else [{"role": "user", "content": content}]
        return self.client.chat.completions.create(**{"model": NAME, "messages": messages, "max_tokens": 6} | settings)

    def figure(self, name: str) -> float:
        """One of the figures of /metrics, added up over its labels."""
        lines = self.served.metrics.text().decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))


@contextmanager
def running(given: list[str]) -> Iterator[RunningServer]:
    made = RunningServer(given)
    made.thread.start()
    try:
        while not made.server.started:
            assert made.thread.is_alive()
            time.sleep(0.01)
        yield made
    finally:
        made.client.close()
        made.turns.close()
        made.server.should_exit = True
        made.thread.join(30)
        made.socket.close()
    assert not made.thread.is_alive()


@pytest.fixture(scope="session")
def model(tiny_backbone: Callable[..., Backbone]) -> LoadedModel:
    """The tiny Qwen3 that is served."""
    return LoadedModel(tiny_backbone("qwen3", lora=None))


@pytest.fixture(scope="module")
def serve(tiny_models: dict[str, str]) -> Iterator[Callable[..., RunningServer]]:
    """serve(arguments): a server of the tiny Qwen3 until the module's tests end; equal arguments share one."""
    with ExitStack() as opened:
        made: dict[tuple[str, ...], RunningServer] = {}

        def start(*given: str) -> RunningServer:
            if given not in made:
                whole = ["--pretrained", tiny_models["qwen3"], "--dtype", "float32", *given]
                made[given] = opened.enter_context(running(whole))
            return made[given]

        yield start
