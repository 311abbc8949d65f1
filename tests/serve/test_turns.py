"""Many requests: in turn, at most so many, stopped when nobody waits, and all answered when the server drains."""

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from kvpress import KnormPress

from sparsekv_pl.serve.server_metrics import ServerMetrics
from sparsekv_pl.serve.turns import Cancelled, ModelTurn, ModelTurns
from sparsekv_pl.usage.context_cache import ContextCache
from tests.serve.conftest import RunningServer, running
from tests.usage.cache_cases import DOCUMENT, QUESTIONS

Serve = Callable[..., RunningServer]
EVICTED = ("--press", "Knorm", "--compression_ratio", "0.5")
SECONDS = 60


def test_whoever_has_an_answer_may_send_the_next_request() -> None:
    """The turn has left when its outcome is there: a client that waits for each answer is never refused."""

    async def one_after_the_other() -> None:
        turns = ModelTurns(1, ServerMetrics())
        for outcome in range(300):
            turn = turns.take(lambda _, outcome=outcome: outcome)  # type: ignore[misc]
            assert await turn.events.get() == outcome
            assert len(turns) == 0
        turns.close()

    asyncio.run(one_after_the_other())


class Gate:
    """Holds the requests of a server at the model until it is opened."""

    def __init__(self, server: RunningServer, patch: pytest.MonkeyPatch) -> None:
        self.open, self.reached, answer = threading.Event(), threading.Semaphore(0), server.served.answer

        def held(prompt: Any, asked: Any, tokens: int, turn: ModelTurn) -> Any:
            self.reached.release()
            while not self.open.wait(0.01):
                turn.check()
            return answer(prompt, asked, tokens, turn)

        patch.setattr(server.served, "answer", held)

    def wait(self) -> None:
        """Until a request stands at the model."""
        assert self.reached.acquire(timeout=SECONDS)


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as made:
        yield made


def test_requests_at_the_same_time_get_the_answers_they_get_alone(serve: Serve, pool: ThreadPoolExecutor) -> None:
    server = serve(*EVICTED)
    messages = [f"{DOCUMENT}{number}\n\n{question}" for number in range(2) for question in QUESTIONS]

    def answer(message: str) -> str:
        return str(server.ask(message).choices[0].message.content)

    together = list(pool.map(answer, messages))
    assert together == list(map(answer, messages))
    assert len(set(together)) > 3


def test_more_requests_than_allowed_are_refused_at_once(
    serve: Serve, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(*EVICTED, "--max_requests", "2")
    gate = Gate(server, monkeypatch)
    waiting = [pool.submit(server.ask, "Who?") for _ in range(2)]
    gate.wait()
    until(lambda: server.figure("sparsekv_requests_under_way") == 2)
    with pytest.raises(openai.RateLimitError, match=r"2 requests are under way.*\(--max_requests\)") as caught:
        server.ask("Who?")
    assert caught.value.response.headers["retry-after"] == "1"
    assert caught.value.code == "rate_limit_exceeded"
    gate.open.set()
    assert all(one.result().choices for one in waiting)
    assert server.ask("Who?").choices
    assert server.figure("sparsekv_refused_requests_total") == 1


def test_nobody_computes_for_a_client_that_left(
    serve: Serve, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that runs, and one that waits for its turn."""
    server = serve(*EVICTED, "--max_requests", "3")
    gate = Gate(server, monkeypatch)
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Who?"}]}
    clients = [httpx.Client(trust_env=False) for _ in range(2)]

    def send(client: httpx.Client) -> None:
        with pytest.raises(httpx.ReadTimeout):
            client.post(f"{server.url}/chat/completions", json=body, timeout=1)

    left = [pool.submit(send, client) for client in clients]
    gate.wait()
    for one in left:
        one.result()
    until(lambda: server.figure("sparsekv_cancelled_requests_total") == 2)
    until(lambda: len(server.turns) == 0)
    gate.open.set()
    assert server.ask("Who?").choices


def test_a_stream_that_is_closed_stops_at_its_next_token(serve: Serve) -> None:
    server = serve("--max_new_tokens", "1000")
    before = server.figure("sparsekv_cancelled_requests_total")
    stream = server.ask("Who carries it?", stream=True, max_tokens=900, temperature=2, seed=5)
    assert next(iter(stream)).choices
    stream.close()
    until(lambda: len(server.turns) == 0)
    assert server.figure("sparsekv_cancelled_requests_total") == before + 1
    assert server.figure("sparsekv_completion_tokens_total") == 0


@pytest.mark.parametrize("drains", [True, False], ids=["in time", "too slow"])
def test_a_server_that_is_stopped_answers_what_is_under_way(
    tiny_models: dict[str, str],
    drains: bool,
    pool: ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    given = ["--pretrained", tiny_models["qwen3"], "--drain_seconds", "60" if drains else "1"]
    with running(given) as server:
        gate = Gate(server, monkeypatch)
        waiting = [pool.submit(server.ask, "Who?") for _ in range(2)]
        gate.wait()
        until(lambda: len(server.turns) == 2)
        server.server.handle_exit(signal.SIGTERM, None)
        assert "SIGTERM: finishing 2 requests; a second one stops at once" in capfd.readouterr().err

        def refuses() -> bool:
            try:
                httpx.get(server.url.replace("/v1", "/health"), trust_env=False)
            except httpx.ConnectError:
                return True
            return False

        until(refuses)
        if drains:
            gate.open.set()
            assert all(one.result().choices for one in waiting)
        else:
            assert all(isinstance(one.exception(), openai.APIError) for one in waiting)
        server.thread.join(SECONDS)
        assert not server.thread.is_alive()


def test_reading_that_is_broken_off_leaves_nothing_behind(serve: Serve) -> None:
    server = serve(*EVICTED)
    documents, ids = server.served.documents, server.served.model.encoder.start(DOCUMENT + "Once more.")
    before = dict(documents.kept)
    turn = ModelTurn(asyncio.new_event_loop())

    def report(read: int, tokens: int) -> None:
        assert 0 < read < tokens
        turn.cancel()
        turn.check()

    with pytest.raises(Cancelled):
        documents.context(ids, report)
    assert documents.kept == before
    cache, reused = documents.context(ids)
    assert not reused
    assert cache.ask("Who?") == ContextCache.prefill(cache.model, ids, KnormPress(0.5)).ask("Who?")
