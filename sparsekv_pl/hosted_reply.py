"""What an OpenAI-compatible endpoint says back: an answer with its usage, or one of a few kinds of error."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

ErrorKind = Literal[
    "context_length", "filtered", "rate_limit", "timeout", "connection", "server", "refused", "malformed", "not_sent"
]
FINAL: frozenset[ErrorKind] = frozenset({"context_length", "filtered"})
"""Errors that the same request would meet again; the others may pass, or end with a mended configuration."""

TOO_LONG = re.compile(
    r"context_length_exceeded|exceed_context_size|maximum (context|model) length|context (length|size|window)|"
    r"exceeds the maximum number of tokens|prompt is too long|`inputs` tokens \+",
    re.IGNORECASE,
)
"""How OpenAI, llama.cpp, vLLM, SGLang, Gemini, Anthropic and TGI say that a prompt does not fit."""


@dataclass(frozen=True)
class Usage:
    """Tokens read and tokens written, those of a model's thinking included."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(self.prompt_tokens + other.prompt_tokens, self.completion_tokens + other.completion_tokens)

    def times(self, factor: int) -> "Usage":
        """So many requests of this usage."""
        return Usage(self.prompt_tokens * factor, self.completion_tokens * factor)

    @property
    def total(self) -> int:
        """Tokens read and written."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Answer:
    """What came back: a text, or an ``error`` with its ``message``."""

    text: str = ""
    usage: Usage = Usage()
    counted_by: Literal["provider", "tokenizer"] = "provider"
    """Where a provider reports no usage, the local tokenizer counted."""
    seconds: float = 0.0
    """Of the request with all its retries and the waits between them."""
    finish_reason: str | None = None
    error: ErrorKind | None = None
    message: str = ""


def read_reply(completion: Any, prompt_tokens: int, count_tokens: Callable[[str], int]) -> Answer:
    """The answer in a chat completion, whose shape the openai client does not check.

    ``prompt_tokens`` and ``count_tokens(answer)`` stand in where the provider reports no usage.
    """
    try:
        choice, usage = completion.choices[0], completion.usage
        text, finish_reason = choice.message.content or "", choice.finish_reason
        if usage is None:
            used = Usage(prompt_tokens, count_tokens(text))
        else:  # Gemini counts what was thought in the total alone
            used = Usage(usage.prompt_tokens, max(usage.completion_tokens, usage.total_tokens - usage.prompt_tokens))
    except (AttributeError, TypeError, IndexError):
        return Answer(error="malformed", message=f"no answer in the reply {completion!r}")
    withheld = finish_reason == "content_filter"
    return Answer(
        text,
        used,
        counted_by="tokenizer" if usage is None else "provider",
        finish_reason=finish_reason,
        error="filtered" if withheld else None,
        message="the provider withheld the answer" if withheld else "",
    )


def error_kind(error: Exception) -> ErrorKind:
    """What kind of failure one of the openai client's errors, or of a JSON parser's, is."""
    import openai

    if isinstance(error, openai.APITimeoutError):
        return "timeout"
    if isinstance(error, openai.APIConnectionError):
        return "connection"
    if not isinstance(error, openai.APIStatusError):
        return "malformed"
    if error.status_code == 429:
        return "rate_limit"
    if error.status_code in (408, 409) or error.status_code >= 500:
        return "server"
    said = f"{error.code} {error.type} {error} {error.body}"
    if TOO_LONG.search(said):
        return "context_length"
    return "filtered" if "content_filter" in said else "refused"


def error_message(error: Exception) -> str:
    """What an error says, also where the endpoint does not say it in OpenAI's shape, which the client then omits."""
    body = getattr(error, "body", None)
    told = body is None or (isinstance(body, dict) and body.get("message"))
    return str(error) if told else f"{error}: {body}"
