"""A model behind an OpenAI-compatible endpoint: how it is asked, its prices and its limits."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from sparsekv_pl.evaluation.hosted_address import check_address, host_of
from sparsekv_pl.evaluation.hosted_reply import Usage

LONGEST_WAIT = 86_400
"""Seconds in a day; the event loop's clock overflows at much longer waits."""


@dataclass(frozen=True)
class HostedRequest:
    """One user message. ``prompt_tokens`` is a local tokenizer's count: an estimate of what is billed."""

    prompt: str
    prompt_tokens: int
    max_new_tokens: int


@dataclass
class HostedModel:
    """A model behind ``base_url``, with prices and limits.

    The key is read from the environment before the first request. It is not part of this object, and it is removed from
    every answer and error message. Raises ``ValueError`` for values that cannot work: a key in place of a variable's
    name, an address with credentials in it, a limit in dollars without prices.

    Parameters
    ----------
    model
        The model's name at the endpoint.
    base_url
        http://localhost:8000/v1 (``vllm serve``, ``transformers serve``), https://api.openai.com/v1,
        https://generativelanguage.googleapis.com/v1beta/openai/, ... A loopback address is reached without the
        proxies of the environment.
    key_variable
        Name, in capitals, of the environment variable that holds the key; null if the endpoint needs none.
    timeout
        Seconds from sending a request to the last byte of its reply, however it arrives.
    retries
        Further attempts after a timeout, a lost connection, or status 408, 409, 429 or 5xx. Waits are 0.5 s, 1 s, 2 s,
        ... 8 s, or the server's Retry-After if that is at most a minute.
    concurrency
        Requests under way at a time.
    dollars_per_million_input, dollars_per_million_output
        Prices of a million tokens read and written; null where unknown or free.
    max_dollars, max_tokens_total
        Limits of one run. The most that all requests can use is checked before the first is sent; actual use is checked
        before every attempt. A timeout or a lost connection counts as the most that it could use. null means no limit.
    length_parameter
        Name of the field that limits an answer; OpenAI's newer models need max_completion_tokens.
    thinking_tokens
        Tokens that a model may think before its answer, added to the tokens of the answer.
    options
        Fields sent with every request, for example {reasoning_effort: none}; null removes a field: {temperature: null}
        is for models that refuse temperature 0.
    """

    model: str
    base_url: str = "http://localhost:8000/v1"
    key_variable: str | None = "OPENAI_API_KEY"
    timeout: float = 120.0
    retries: int = 5
    concurrency: int = 4
    dollars_per_million_input: float | None = None
    dollars_per_million_output: float | None = None
    max_dollars: float | None = None
    max_tokens_total: int | None = 1_000_000
    length_parameter: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    thinking_tokens: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_address(self.base_url)
        if self.key_variable is not None and not re.fullmatch("[A-Z_][A-Z0-9_]*", self.key_variable):
            # Not shown: it may be the key itself.
            raise ValueError("hosted.key_variable must be the name of an environment variable in capitals, not a key")
        if not self.model:
            raise ValueError("hosted.model is empty: give the endpoint's name of a model")
        least_of = {"concurrency": 1, "retries": 0, "thinking_tokens": 0, "max_tokens_total": 1, "max_dollars": 0}
        for name, least in least_of.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"hosted.{name}={value} must be at least {least}")
        if not 0 < self.timeout <= LONGEST_WAIT:
            raise ValueError(f"hosted.timeout={self.timeout} must be more than 0 seconds and at most {LONGEST_WAIT:,}")
        prices = (self.dollars_per_million_input, self.dollars_per_million_output)
        if any(price is not None and price < 0 for price in prices):
            raise ValueError(f"hosted.dollars_per_million_input and _output are {prices}: give prices of 0 or more")
        if (prices[0] is None) != (prices[1] is None) or (self.max_dollars is not None and prices[0] is None):
            raise ValueError(
                f"hosted.max_dollars={self.max_dollars} with prices {prices}: give both "
                "hosted.dollars_per_million_input and _output, or none of the three"
            )

    def key(self) -> str | None:
        """The key, from the environment.

        Raises ``ValueError`` if the variable is not set or holds characters that no HTTP header can carry; the value is
        not shown.
        """
        if self.key_variable is None:
            return None
        key = os.environ.get(self.key_variable, "").strip()
        if not key:
            host = host_of(self.base_url)
            raise ValueError(f"the environment variable {self.key_variable} is not set: put the key of {host} there")
        if not (key.isascii() and key.isprintable()):
            raise ValueError(f"the environment variable {self.key_variable} holds characters that no key has")
        return key

    def dollars(self, usage: Usage) -> float | None:
        """Price of ``usage`` in dollars; None without prices."""
        if self.dollars_per_million_input is None or self.dollars_per_million_output is None:
            return None
        return (
            usage.prompt_tokens * self.dollars_per_million_input
            + usage.completion_tokens * self.dollars_per_million_output
        ) / 1e6

    def most(self, request: HostedRequest) -> Usage:
        """The most tokens that one request can use."""
        return Usage(request.prompt_tokens, request.max_new_tokens + self.thinking_tokens)

    def estimate(self, requests: Sequence[HostedRequest]) -> Usage:
        """The most tokens that ``requests`` can use together."""
        return sum((self.most(request) for request in requests), Usage())

    def passed(self, usage: Usage) -> str | None:
        """The limit that ``usage`` exceeds, as a message; None within the limits."""
        dollars = self.dollars(usage)
        if self.max_tokens_total is not None and usage.total > self.max_tokens_total:
            return f"{usage.total:,} tokens are over max_tokens_total={self.max_tokens_total:,}"
        if self.max_dollars is not None and dollars is not None and dollars > self.max_dollars:
            return f"${dollars:,.4f} are over max_dollars={self.max_dollars:,}"
        return None

    def check(self, requests: Sequence[HostedRequest]) -> None:
        """Raise ``ValueError`` if ``requests`` together could exceed a limit."""
        if reason := self.passed(self.estimate(requests)):
            raise ValueError(
                f"{len(requests)} requests to {self.model} may take too much: {reason}. "
                "Nothing was sent; raise the limit (hosted.max_...) or measure fewer or shorter cases"
            )
