"""Reading the reply of an OpenAI-compatible endpoint: an answer with its usage, or one of a few kinds of error."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from sparsekv_pl.evaluation.hosted_thoughts import without_thoughts

Final = Literal["context_length", "filtered", "declined", "unreadable"]
Passing = Literal["rate_limit", "timeout", "connection", "server"]
ErrorKind = Final | Passing | Literal["refused", "quota", "malformed", "not_sent"]
FINAL: tuple[str, ...] = get_args(Final)
"""Errors that repeating the request would meet again, most of them billed; the others may be temporary."""
PASSING: tuple[str, ...] = get_args(Passing)
"""Errors after which another attempt is made."""

TOO_LONG = re.compile(
    r"context_length_exceeded|exceed_context_size|maximum (context|model) length|context (length|size|window)|"
    r"exceeds the maximum number of tokens|prompt is too long|`inputs` tokens \+",
    re.IGNORECASE,
)
"""Messages of OpenAI, llama.cpp, vLLM, SGLang, Gemini, Anthropic and TGI about a prompt that does not fit."""
NO_CREDIT = re.compile(
    r"insufficient[ _](quota|balance|credit|fund)|quota_exceeded|billing_(hard_limit_reached|not_active)|"
    r"credit balance is too low|(out of|used all available) credits|per_?day\b|per day\b|PerDay",
    re.IGNORECASE,
)
"""Messages of OpenAI, Anthropic, DeepSeek, xAI, Gemini and Groq about an exhausted account or daily limit. Gemini's
"exceeded your current quota" is not among them: it is also sent for a limit per minute."""
BLOCKED = re.compile(r"content_filter|moderation|flagged", re.IGNORECASE)
WITHHELD = {"content_filter", "refusal", "safety", "recitation", "prohibited_content", "blocklist", "spii"}
"""Finish reasons of OpenAI, Anthropic and Gemini that come without an answer."""
Counter = Literal["provider", "tokenizer", "estimate"]
REFUSED_FOR_ALL = {401, 403, 404}
GATEWAY_TIMEOUTS = {504, 524}
"""Status codes after which the model behind the gateway may have answered and billed."""
MOST_TOKENS = 10**9
"""Larger reported numbers are not taken for token counts."""
MESSAGE_CHARACTERS = 300


@dataclass(frozen=True)
class Usage:
    """Tokens read and tokens written, thinking included."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(self.prompt_tokens + other.prompt_tokens, self.completion_tokens + other.completion_tokens)

    def __sub__(self, other: "Usage") -> "Usage":
        return Usage(self.prompt_tokens - other.prompt_tokens, self.completion_tokens - other.completion_tokens)

    @property
    def total(self) -> int:
        """Tokens read and written."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Answer:
    """The outcome of a request: a text without the model's thoughts, or an ``error`` with its ``message``."""

    text: str = ""
    usage: Usage = Usage()
    """Tokens of all attempts that the provider billed or may have billed."""
    counted_by: Counter = "provider"
    """"tokenizer" (the local one) if the provider reports no usage; "estimate" (an upper bound) for an unread reply."""
    seconds: float = 0.0
    """Duration of the request, all attempts and waits included."""
    finish_reason: str | None = None
    error: ErrorKind | None = None
    message: str = ""
    stops: bool = False
    """Whether every further request would fail alike: wrong key, no permission or credit, unknown model or address."""


def lost(error: ErrorKind, message: str, most: Usage) -> Answer:
    """An attempt that may have been billed, counted as the most it can use."""
    return Answer(error=error, message=message, usage=most, counted_by="estimate")


def read_reply(status: int, content: bytes, most: Usage, count_tokens: Callable[[str], int]) -> Answer:
    """Read the answer or the error in a reply with any content.

    Raises ``RecursionError`` for JSON that is nested too deep.

    ``most`` is the most that the request can use; with ``count_tokens`` (of a text) it replaces a missing usage.
    """
    excerpt = content[:MESSAGE_CHARACTERS].decode(errors="replace")
    try:
        body = json.loads(content)
    except ValueError as error:
        body, excerpt = None, f"{type(error).__name__}: {excerpt}"
    if isinstance(body, list) and body:  # Gemini's errors
        body = body[0]
    completion = body if isinstance(body, dict) else {}
    if status >= 300 or completion.get("error"):  # OpenRouter sends errors with status 200
        return _read_error(status, completion.get("error") or completion, excerpt, most)
    if not isinstance(completion.get("choices"), list):
        return lost("malformed", f"no answer in the reply: {excerpt}", most)
    try:
        return _read_completion(completion, most, count_tokens)
    except (AttributeError, TypeError, LookupError):
        usage, counted_by = _usage(completion.get("usage"), most)
        by: Counter = "provider" if counted_by == "provider" else "estimate"
        return Answer(error="unreadable", message=f"no text in the reply: {excerpt}", usage=usage, counted_by=by)


def _read_completion(completion: Any, most: Usage, count_tokens: Callable[[str], int]) -> Answer:
    choice = completion["choices"][0]
    message, reason = choice["message"], choice.get("finish_reason")
    text, declined = _content(message.get("content"))
    thoughts = message.get("reasoning_content") or message.get("reasoning")
    written = count_tokens(f"{text}{thoughts}" if isinstance(thoughts, str) else text)
    usage, counted_by = _usage(completion.get("usage"), Usage(most.prompt_tokens, written))
    reason = _clean(reason) if isinstance(reason, str) else None
    answer = Answer(without_thoughts(text), usage, counted_by, finish_reason=reason)
    if reason and reason.lower() in WITHHELD:
        return replace(answer, error="filtered", message=f"the provider withheld the answer ({reason})")
    if refusal := declined or message.get("refusal"):
        return replace(answer, error="declined", message=_clean(str(refusal)))
    return answer


def _content(content: Any) -> tuple[str, str]:
    """(answer, refusal) in a message's content, which is null, a text, or a list of parts."""
    parts = [] if content is None else content if isinstance(content, list) else [content]
    texts, declined = [], []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "refusal":
            declined.append(part["refusal"])
        elif kind not in ("thinking", "reasoning"):
            texts.append(part["text"] if isinstance(content, list) and kind else part)
    return _clean("".join(texts)), "".join(declined)


def _usage(reported: Any, estimate: Usage) -> tuple[Usage, Counter]:
    """The reported usage; missing or invalid numbers are taken from its total or from ``estimate``.

    Gemini counts thinking only in the total.
    """
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    read, written, total = (_tokens(reported.get(name)) if isinstance(reported, dict) else 0 for name in names)
    known = bool(total or (read and written))
    read = read or (total - written if total > written > 0 else min(estimate.prompt_tokens, total or MOST_TOKENS))
    written = max(written, total - read) if known else written or estimate.completion_tokens
    return Usage(read, written), "provider" if known else "tokenizer"


def _tokens(reported: Any) -> int:
    """``reported`` as a count of tokens; 0 if it is not one."""
    number = isinstance(reported, int | float) and not isinstance(reported, bool)
    return int(reported) if number and 0 < reported <= MOST_TOKENS else 0


def _read_error(status: int, fault: Any, excerpt: str, most: Usage) -> Answer:
    details = fault if isinstance(fault, dict) else {"message": fault}
    code = details.get("code")
    status = code if status < 300 and isinstance(code, int) and 400 <= code < 600 else status
    message = details.get("message")
    shown = f"HTTP {status}: {_clean(message) if message and isinstance(message, str) else excerpt}"
    whole = " ".join([shown, *(str(details.get(name)) for name in ("code", "type", "status", "details"))])
    if status in GATEWAY_TIMEOUTS:
        return lost("timeout", shown, most)
    if status in (408, 409) or status >= 500:
        return Answer(error="server", message=shown)
    if status == 402 or NO_CREDIT.search(whole):
        return Answer(error="quota", message=shown, stops=True)
    if status == 429:
        return Answer(error="rate_limit", message=shown)
    if TOO_LONG.search(whole):
        return Answer(error="context_length", message=shown)
    if BLOCKED.search(whole):
        return Answer(error="filtered", message=shown)
    return Answer(error="refused", message=shown, stops=status in REFUSED_FOR_ALL)


def _clean(text: str) -> str:
    """``text`` without lone UTF-16 surrogates, which JSON may hold and UTF-8 cannot: each becomes U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
