"""What runs at the model for a request: the document's cache, then the answer; and the limits, checked before."""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparsekv_pl.serve.kept_documents import KeptDocuments
from sparsekv_pl.serve.prompt_scores import PromptScores, prompt_scores
from sparsekv_pl.serve.prompts import SplitPrompt
from sparsekv_pl.serve.refusals import Refusal
from sparsekv_pl.serve.request_fields import AskedFields, ChatFields, CompletionFields
from sparsekv_pl.serve.server_metrics import ServerMetrics
from sparsekv_pl.serve.token_limits import TokenLimits
from sparsekv_pl.serve.turns import ModelTurn
from sparsekv_pl.usage.answers import AnswerGiven, greedy_answers, sampled_answer, sampling_of
from sparsekv_pl.usage.context_cache import ContextCache

COMPLETION_TOKENS = 16
"""Tokens of a completion if nothing is said, as OpenAI's."""


@dataclass(frozen=True)
class ReplyUsage:
    """Tokens of a request, and what the document's cache keeps."""

    prompt_tokens: int
    completion_tokens: int
    document_tokens: int
    reused_tokens: int
    """The document's tokens, if it had been read before; else 0."""
    kept_pairs: float
    """KV pairs a head of the document, a mean over layers."""
    kv_bytes: int


@dataclass(frozen=True)
class ReplyContent:
    """An answer with its usage."""

    answer: AnswerGiven
    usage: ReplyUsage
    scores: PromptScores | None = None


class ServedModel:
    """The model, its documents and limits.

    Parameters
    ----------
    name
        The model's name at the endpoint.
    documents
        The documents' caches, with the model and the press.
    limits
        Most tokens of a request.
    metrics
        Counts tokens and times.
    """

    def __init__(self, name: str, documents: KeptDocuments, limits: TokenLimits, metrics: ServerMetrics) -> None:
        self.name, self.documents, self.limits, self.metrics = name, documents, limits, metrics
        self.model = documents.model

    def check_name(self, name: str) -> None:
        """Raise ``Refusal`` for another model's name."""
        if name != self.name:
            raise Refusal(
                f"there is no model {name!r} here: take {self.name!r}",
                status=404,
                code="model_not_found",
                param="model",
            )

    def new_tokens(self, asked: AskedFields, prompt: SplitPrompt) -> int | None:
        """Return the most tokens of the answer that a client asks for; None if it leaves them open.

        Raises
        ------
        Refusal
            For a prompt or an answer beyond the limits.
        """
        param = "max_tokens"
        most = asked.max_tokens
        if isinstance(asked, ChatFields) and asked.max_completion_tokens is not None:
            most, param = asked.max_completion_tokens, "max_completion_tokens"
        if isinstance(asked, CompletionFields) and asked.echo:
            return self._echoed_tokens(asked, prompt)
        if most is not None and not 0 < most <= self.limits.answer:
            raise Refusal(
                f"{param}={most} must be 1 to {self.limits.answer}, the most of this server (--max_new_tokens)",
                param=param,
                code="max_tokens_exceeded",
            )
        self._check_length(prompt, most or 1, param)
        return most

    def _echoed_tokens(self, asked: CompletionFields, prompt: SplitPrompt) -> int:
        if asked.max_tokens not in (0, 1) or asked.logprobs is None:
            raise Refusal("echo needs logprobs, and max_tokens of 0 or 1: prompts are scored by it", param="echo")
        self._check_length(prompt, 1, "prompt")
        return asked.max_tokens

    def _room(self, asked: AskedFields, cache: ContextCache, prompt: SplitPrompt) -> int:
        """Return the most tokens of an answer of open length."""
        most = min(self.limits.answer, COMPLETION_TOKENS if isinstance(asked, CompletionFields) else self.limits.answer)
        if self.limits.positions is None:
            return most
        return max(1, min(most, self.limits.positions + 1 - cache.kept.next_position - len(prompt.question)))

    def _check_length(self, prompt: SplitPrompt, answer: int, param: str) -> None:
        """Speak as OpenAI and vLLM do, whose words clients look for."""
        positions = None if self.limits.frees else self.limits.positions
        beyond = positions is not None and prompt.tokens + answer - 1 > positions
        if prompt.tokens > self.limits.prompt or beyond:
            limit = self.limits.prompt if prompt.tokens > self.limits.prompt else positions
            raise Refusal(
                f"This model's maximum context length is {limit} tokens here, and the request has {prompt.tokens} in "
                f"the prompt and up to {answer} in the answer: shorten the document or {param}",
                code="context_length_exceeded",
                param=param,
            )

    def answer(self, prompt: SplitPrompt, asked: AskedFields, most: int | None, turn: ModelTurn) -> ReplyContent:
        """Answer at the model by ``most`` tokens, see ``new_tokens``, telling ``turn`` each piece of a streamed answer.

        Raises
        ------
        ValueError
            For what only the model knows: a press whose window does not fit, positions of a re-rotating press.
        """
        start = time.monotonic()
        cache, reused = self.documents.context(prompt.document, turn.check)
        first: list[float] = []

        def on_token() -> None:
            if not first:
                first.append(time.monotonic())
                self.metrics.first_token.observe(first[0] - start)
            turn.check()

        turn.check()
        new_tokens = self._room(asked, cache, prompt) if most is None else most
        if isinstance(asked, CompletionFields) and asked.echo:
            content = self._scored(cache, prompt, asked, new_tokens, reused)
        else:
            settings: dict[str, Any] = {"stop": asked.stop or (), "on_text": turn.tell if asked.stream else None}
            settings["on_token"] = on_token
            seed = secrets.randbits(62) if asked.seed is None else asked.seed
            drawn, row = sampling_of(asked.temperature, asked.top_p, seed), prompt.question
            if drawn is None:
                (answer,) = greedy_answers(self.model, cache.kept, [row], new_tokens, **settings)
            else:
                answer = sampled_answer(self.model, cache.kept, row, new_tokens, drawn, **settings)
            content = ReplyContent(answer, _usage(cache, prompt, len(answer.ids), reused))
        self._count(content.usage)
        self.metrics.turn.observe(time.monotonic() - start)
        return content

    def _scored(
        self, cache: ContextCache, prompt: SplitPrompt, asked: CompletionFields, new_tokens: int, reused: bool
    ) -> ReplyContent:
        scores = prompt_scores(self.model, cache.kept, prompt, asked.logprobs or 0, new_tokens)
        ids = scores.ids[prompt.tokens :]
        text = self.model.text_of(scores.ids)
        return ReplyContent(AnswerGiven(text, ids, "length"), _usage(cache, prompt, len(ids), reused), scores)

    def _count(self, usage: ReplyUsage) -> None:
        self.metrics.prompt_tokens.inc(usage.prompt_tokens)
        self.metrics.reused_tokens.inc(usage.reused_tokens)
        self.metrics.completion_tokens.inc(usage.completion_tokens)


def _usage(cache: ContextCache, prompt: SplitPrompt, written: int, reused: bool) -> ReplyUsage:
    document = len(prompt.document)
    return ReplyUsage(prompt.tokens, written, document, document if reused else 0, cache.kept_pairs, cache.kv_bytes)


def total(usages: Sequence[ReplyUsage]) -> ReplyUsage:
    """Return the usage of several prompts of one request; kept pairs are their mean."""
    sums = [sum(values) for values in zip(*(vars(one).values() for one in usages), strict=True)]
    tokens, written, document, reused, pairs, size = sums
    return ReplyUsage(int(tokens), int(written), int(document), int(reused), pairs / len(usages), int(size))
