"""Replies in OpenAI's shapes: a chat completion whole or in parts, a completion, and their usage."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from uuid import uuid4

from sparsekv_pl.serve.prompt_scores import PromptScores
from sparsekv_pl.serve.served_model import ReplyContent, ReplyUsage, total
from sparsekv_pl.usage.loaded_model import LoadedModel

END = "data: [DONE]\n\n"


def usage_fields(usage: ReplyUsage) -> dict[str, Any]:
    """Return OpenAI's fields, and this server's own: kept_pairs, document_tokens, kv_bytes."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.reused_tokens},
        "document_tokens": usage.document_tokens,
        "kept_pairs": usage.kept_pairs,
        "kv_bytes": usage.kv_bytes,
    }


def event(data: object) -> str:
    """Return one server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


@dataclass(frozen=True)
class ReplyShape:
    """One reply of ``kind``: its whole form, and its parts when streamed."""

    model: str
    kind: Literal["chat", "text"]
    shows_usage: bool = False
    """Whether a streamed reply ends with the usage."""
    id: str = field(default_factory=lambda: uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, contents: Sequence[ReplyContent], decoding: LoadedModel) -> dict[str, Any]:
        """Return the reply to all prompts of a request."""
        choices = []
        for index, content in enumerate(contents):
            answer = content.answer
            choice: dict[str, Any] = {"index": index, "finish_reason": answer.finish, "logprobs": None}
            if self.kind == "chat":
                choice["message"] = {"role": "assistant", "content": answer.text, "refusal": None}
            else:
                choice["text"] = answer.text
                choice["logprobs"] = None if content.scores is None else _log_probs(content.scores, decoding)
            choices.append(choice)
        return self._framed(choices, "", usage_fields(total([content.usage for content in contents])))

    def opening(self) -> list[str]:
        """Return the events before the first piece."""
        return [self._part({"role": "assistant", "content": ""}, "")] if self.kind == "chat" else []

    def piece(self, text: str) -> str:
        """Return the event of a piece of text."""
        return self._part({"content": text}, text)

    def ending(self, content: ReplyContent) -> list[str]:
        """Return the events after the last piece."""
        events = [self._part({}, "", content.answer.finish)]
        if self.shows_usage:
            events.append(event(self._framed([], ".chunk", usage_fields(content.usage))))
        return [*events, END]

    def _part(self, delta: dict[str, Any], text: str, finish: str | None = None) -> str:
        said = {"delta": delta} if self.kind == "chat" else {"text": text}
        return event(self._framed([{"index": 0, **said, "finish_reason": finish, "logprobs": None}], ".chunk"))

    def _framed(self, choices: list[Any], part: str, usage: dict[str, Any] | None = None) -> dict[str, Any]:
        chat = self.kind == "chat"
        return {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{self.id}",
            "object": f"chat.completion{part}" if chat else "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "usage": usage,
        }


def _log_probs(scores: PromptScores, model: LoadedModel) -> dict[str, Any]:
    def text(token: int) -> str:
        return model.encoder.decode([token])

    return {
        "tokens": [text(token) for token in scores.ids],
        "token_logprobs": scores.log_probs,
        "top_logprobs": [None if top is None else _by_text(top, text) for top in scores.top],
    }


def _by_text(top: dict[int, float], text: Any) -> dict[str, float]:
    """Name tokens by their text; of two with one text the likelier stays."""
    named: dict[str, float] = {}
    for token, value in sorted(top.items(), key=lambda pair: pair[1]):
        named[text(token)] = value
    return named
