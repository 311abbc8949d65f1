"""The requests of one run to a hosted model, sent concurrently within limits of time, size, tokens and money."""

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from random import SystemRandom

import httpx

from sparsekv_pl.evaluation.hosted_address import host_of, is_loopback
from sparsekv_pl.evaluation.hosted_client import HostedModel, HostedRequest
from sparsekv_pl.evaluation.hosted_reply import MESSAGE_CHARACTERS, PASSING, Answer, Usage, lost, read_reply
from sparsekv_pl.reporting.public_addresses import without_private_parts
from sparsekv_pl.reporting.redaction import redacted

MOST_BYTES = 4 * 2**20
"""Largest accepted reply in bytes: about thirty times the longest answer."""
OnAnswer = Callable[[int, Answer], None]
"""Called with a request's index and its answer."""
FIRST_PAUSE, LAST_PAUSE = 0.5, 8.0
"""Seconds before the second attempt, doubled before each further one, and their maximum."""
LONGEST_PAUSE = 60.0
"""Longest accepted Retry-After of a server, in seconds."""
NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError)
"""Errors before a connection exists: nothing can have been billed."""


def ask(
    hosted: HostedModel,
    requests: Sequence[HostedRequest],
    count_tokens: Callable[[str], int],
    on_answer: OnAnswer | None = None,
) -> list[Answer]:
    """Send all requests and return the answers in their order; a failed request has an answer with an error.

    Raises ``ValueError`` before anything is sent, if the requests could exceed a limit or there is no key.

    ``count_tokens`` counts the tokens of an answer if the endpoint reports no usage. ``on_answer`` is called with each
    answer as it arrives, one at a time: a stopped run loses no paid answer.
    """
    hosted.check(requests)
    asking = _Asking(hosted, hosted.key(), count_tokens, on_answer)
    # A thread of its own, because a notebook runs an event loop in this one.
    with ThreadPoolExecutor(1, thread_name_prefix="hosted") as pool:
        try:
            return pool.submit(asyncio.run, asking.all(requests)).result()
        finally:  # after Ctrl-C: wait for requests already sent and paid for, send no more
            asking.ended = True


class _Asking:
    """The state shared by the requests of one ``ask``."""

    def __init__(
        self, hosted: HostedModel, key: str | None, count_tokens: Callable[[str], int], on_answer: OnAnswer | None
    ) -> None:
        self.hosted, self.key, self.count_tokens, self.on_answer = hosted, key, count_tokens, on_answer
        self.used = Usage()
        """Tokens of finished attempts, and the most that running ones can use."""
        self.halted: str | None = None
        """Why no more requests are sent; the answer of every remaining request."""
        self.ended = False
        """Whether to send and answer nothing more."""

    async def all(self, requests: Sequence[HostedRequest]) -> list[Answer]:
        """The answers in the order of ``requests``."""
        hosted, answers, waiting = self.hosted, [Answer(error="not_sent")] * len(requests), iter(enumerate(requests))

        async def work(client: httpx.AsyncClient) -> None:
            for index, request in waiting:
                if self.ended:
                    return
                try:
                    answers[index] = await self.one(client, request)
                    if self.on_answer is not None:
                        self.on_answer(index, answers[index])
                except BaseException:
                    self.ended = True
                    raise

        async with httpx.AsyncClient(
            base_url=hosted.base_url,
            # No compression: a small reply could unpack to more than the memory.
            headers={"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {}),
            timeout=httpx.Timeout(None, connect=hosted.timeout / 2),
            limits=httpx.Limits(max_connections=hosted.concurrency),
            follow_redirects=False,  # the prompt is for this host alone
            trust_env=not is_loopback(hosted.base_url),
        ) as client:
            workers = [work(client) for _ in range(hosted.concurrency)]
            for error in await asyncio.gather(*workers, return_exceptions=True):
                if error is not None:
                    raise error
        return answers

    async def one(self, client: httpx.AsyncClient, request: HostedRequest) -> Answer:
        """The answer to one request, after as many attempts as are allowed."""
        most, start = self.hosted.most(request), time.perf_counter()
        answer, spent = Answer(error="not_sent"), Usage()
        for attempt in range(self.hosted.retries + 1):
            reason = self.halted or self.hosted.passed(self.used + most)
            if reason or self.ended:
                answer = replace(answer, message="; not sent again: ".join(filter(None, [answer.message, reason])))
                break
            self.used += most
            answer, headers = await self.attempt(client, request, most)
            self.used += answer.usage - most
            spent += answer.usage
            if answer.stops:
                self.halted = f"an earlier request was refused: {answer.message}"
            if answer.error not in PASSING or attempt == self.hosted.retries:
                break
            doubled = min(FIRST_PAUSE * 2**attempt, LAST_PAUSE) * SystemRandom().uniform(0.75, 1)
            await self.pause(_seconds_asked(headers, doubled))
        text, message = self.hidden(answer.text), redacted(self.hidden(answer.message))[:MESSAGE_CHARACTERS]
        counted_by = answer.counted_by if spent == answer.usage else "estimate"
        seconds = time.perf_counter() - start
        return replace(answer, text=text, message=message, usage=spent, counted_by=counted_by, seconds=seconds)

    async def attempt(
        self, client: httpx.AsyncClient, request: HostedRequest, most: Usage
    ) -> tuple[Answer, httpx.Headers]:
        """Send a request once; return the answer and the reply's headers."""
        hosted, headers = self.hosted, httpx.Headers()
        settings = {"temperature": 0, hosted.length_parameter: request.max_new_tokens + hosted.thinking_tokens}
        sent = {name: value for name, value in (settings | hosted.options).items() if value is not None}
        body = {"model": hosted.model, "messages": [{"role": "user", "content": request.prompt}]} | sent
        try:
            async with (
                asyncio.timeout(hosted.timeout),
                client.stream(
                    "POST",
                    "chat/completions",
                    content=json.dumps(body).encode(),
                    headers={"Content-Type": "application/json"},
                ) as response,
            ):
                headers = response.headers
                if response.is_redirect:
                    return Answer(error="refused", message=_redirection(response)), headers
                content, fault = await _content(response)
        except TimeoutError:
            return lost("timeout", f"no whole reply within hosted.timeout={hosted.timeout:g} s", most), headers
        except NOT_SENT as error:
            return Answer(error="connection", message=f"no connection: {error!r}"), headers
        except httpx.HTTPError as error:
            return lost("connection", f"the connection was lost: {error!r}", most), headers
        if fault and response.is_success:
            return lost("malformed", fault, most), headers
        try:
            return read_reply(response.status_code, content or fault.encode(), most, self.count_tokens), headers
        except RecursionError:
            return lost("malformed", "the reply's JSON is nested too deep", most), headers

    async def pause(self, seconds: float) -> None:
        """Wait, unless the run ends meanwhile."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and not (self.halted or self.ended):
            await asyncio.sleep(min(left, 0.05))

    def hidden(self, text: str) -> str:
        """``text`` without the key and the private parts of the address, which some servers repeat in their replies."""
        text = text.replace(self.key, "[key]") if self.key else text
        return without_private_parts(text, self.hosted.base_url)


async def _content(response: httpx.Response) -> tuple[bytes, str]:
    """A reply's bytes, and a message about what is wrong with them ("" if nothing)."""
    coding = response.headers.get("content-encoding", "identity")
    if coding != "identity":
        return b"", f"the reply is compressed as {coding!r}, although no compression was requested"
    content = bytearray()
    async for part in response.aiter_raw():
        content += part
        if len(content) > MOST_BYTES:
            return bytes(content), f"a reply of more than {MOST_BYTES:,} bytes"
    return bytes(content), ""


def _redirection(response: httpx.Response) -> str:
    """A message about a redirection and its fix, without the target's path."""
    target = "another address"
    with suppress(httpx.InvalidURL, ValueError):
        target = host_of(str(response.url.join(response.headers["location"])))
    return f"HTTP {response.status_code} redirects to {target}, which is not followed: set hosted.base_url to it"


def _seconds_asked(headers: httpx.Headers, otherwise: float) -> float:
    """Seconds that a reply's headers ask to wait before the next attempt."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        with suppress(KeyError, ValueError):
            seconds = float(headers[name]) * unit
            if 0 <= seconds <= LONGEST_PAUSE:
                return seconds
    return otherwise
