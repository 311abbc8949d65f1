"""Requests take turns at the model: one runs, some wait, more are refused, and a cancelled one stops at its next token.

A model runs one forward at a time, so a single thread runs them, in the order of arrival.
"""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

from sparsekv_pl.serve.refusals import Refusal
from sparsekv_pl.serve.server_metrics import ServerMetrics

RETRY_SECONDS = "1"


class Cancelled(Exception):
    """Nobody waits for the answer any more."""


class ModelTurn:
    """One request at the model. Its events arrive in the event loop: pieces of text, then a result or an exception."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.events: asyncio.Queue[Any] = asyncio.Queue()
        self.future: Future[None] | None = None
        self._loop, self._cancelled = loop, threading.Event()

    def check(self, *_: object) -> None:
        """Raise ``Cancelled`` if nobody waits; called between layers and tokens."""
        if self._cancelled.is_set():
            raise Cancelled

    def tell(self, event: object) -> None:
        """Pass an event on to the event loop, from the model's thread."""
        self.in_loop(lambda: self.events.put_nowait(event))

    def in_loop(self, call: Callable[[], object]) -> None:
        """Have ``call`` called in the event loop, in the order of such calls."""
        with suppress(RuntimeError):  # the loop has ended: nobody waits
            self._loop.call_soon_threadsafe(call)

    def cancel(self) -> None:
        """Let the request stop at its next token, or not begin; one that has ended stays as it is."""
        self._cancelled.set()
        if self.future is not None:
            self.future.cancel()


class ModelTurns:
    """The queue at the model.

    Parameters
    ----------
    most
        Requests that run or wait at a time.
    metrics
        Counts them.
    """

    def __init__(self, most: int, metrics: ServerMetrics) -> None:
        self.most, self.metrics = most, metrics
        self._under_way: set[ModelTurn] = set()
        self._pool = ThreadPoolExecutor(1, "model")

    def __len__(self) -> int:
        return len(self._under_way)

    def take(self, work: Callable[[ModelTurn], object]) -> ModelTurn:
        """Queue ``work``, which takes its turn and returns the result.

        Raises
        ------
        Refusal
            With status 429 if as many requests as allowed are under way.
        """
        if len(self) >= self.most:
            self.metrics.refused.inc()
            raise Refusal(
                f"{self.most} requests are under way, the most of this server (--max_requests): send it again later",
                status=429,
                code="rate_limit_exceeded",
                kind="requests",
                headers={"Retry-After": RETRY_SECONDS},
            )
        turn = ModelTurn(asyncio.get_running_loop())
        self._under_way.add(turn)
        self.metrics.under_way.set(len(self))
        turn.future = self._pool.submit(self._run, turn, work)
        turn.future.add_done_callback(partial(self._unbegun, turn))
        return turn

    def _run(self, turn: ModelTurn, work: Callable[[ModelTurn], object]) -> None:
        try:
            turn.check()
            outcome: object = work(turn)
        except BaseException as error:  # it is the request's, and the model goes on
            outcome = error
        self._end(turn, outcome)

    def _unbegun(self, turn: ModelTurn, future: Future[None]) -> None:
        if future.cancelled():
            self._end(turn, Cancelled())

    def _end(self, turn: ModelTurn, outcome: object) -> None:
        """Let the turn leave, then tell its outcome: whoever knows the answer may send the next request."""
        self.metrics.cancelled.inc(isinstance(outcome, Cancelled))

        def leave() -> None:
            self._under_way.discard(turn)
            self.metrics.under_way.set(len(self))
            turn.events.put_nowait(outcome)

        turn.in_loop(leave)

    def close(self) -> None:
        """Cancel what is under way and wait for the model's thread to end."""
        for turn in list(self._under_way):
            turn.cancel()
        self._pool.shutdown(wait=True, cancel_futures=True)
