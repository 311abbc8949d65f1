"""Evaluation cases, and the chat frame around context, question and answer."""

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from data.facts import Split
from data.packing import Tokens
from sparsekv_pl.models.batch import IGNORE, CaseInfo
from sparsekv_pl.models.chat_frame import chat_frame
from sparsekv_pl.models.encoding import Encoder


@dataclass(frozen=True)
class Case:
    """One row of an evaluation batch, before padding.

    ``continuation_ids`` are the tokens read after the eviction: the question up to the answer's beginning, or the
    text that follows.
    """

    context_ids: list[int]
    continuation_ids: list[int]
    info: CaseInfo


@dataclass(frozen=True)
class TrainingCase:
    """One row of a training batch of questions, before padding."""

    context_ids: list[int]
    continuation_ids: list[int]
    labels: list[int]
    """As ``continuation_ids`` where supervised, else ``IGNORE``."""
    document_ids: list[str]
    task: str
    """The kinds of its questions; "needle" for ``NeedleTask``."""
    turn_ends: tuple[int, ...] = field(default=(), kw_only=True)
    """Tokens of the continuation after which a turn of its conversation ends."""


def read_after(case: TrainingCase, tokens: int) -> TrainingCase:
    """Move the last ``tokens`` tokens of a case's context behind the eviction, unsupervised, before its question."""
    if not tokens:
        return case
    cut = len(case.context_ids) - tokens
    return replace(
        case,
        context_ids=case.context_ids[:cut],
        continuation_ids=[*case.context_ids[cut:], *case.continuation_ids],
        labels=[*[IGNORE] * tokens, *case.labels],
    )


class Frame(Encoder):
    """The chat template, cut as in kvpress's pipeline: prefix | context question | suffix, answer prefix.

    A tokenizer without a chat template has its bos token (or nothing) as the prefix and a line break as the
    suffix.

    Parameters
    ----------
    tokenizer
        A transformers tokenizer.
    split
        Split of the wordings, names and values that evaluation tasks ask with.
    """

    def __init__(self, tokenizer: Any, split: Split = "held_out") -> None:
        super().__init__(tokenizer)
        self.split = split
        self.prefix, self.question_suffix = chat_frame(tokenizer)
        self.prefix_ids = self.start(self.prefix)

    def room(self, length: int, question: str, query_aware: bool) -> int:
        """Return the tokens of a ``length``-token context without the prefix and, if query-aware, the question.

        May be zero or negative: the task checks whether it has enough.
        """
        return length - len(self.prefix_ids) - (len(self.encode(question)) if query_aware else 0)

    def build(
        self,
        context_ids: Sequence[int],
        question: str,
        answer_prefix: str,
        info: CaseInfo,
        query_aware: bool = False,
    ) -> Case:
        """Make a case of ``context_ids`` (without the prefix) and ``question``; parts are joined without separators.

        Query-agnostic: context = prefix + context, continuation = question + suffix + answer prefix.
        Query-aware: the question moves to the end of the context. The context, question and answer prefix of ``info``
        are set here.
        """
        context = list(context_ids)
        if query_aware:
            context += self.encode(question)
        asked = "" if query_aware else question
        continuation = self.encode(f"{asked}{self.question_suffix}{answer_prefix}")
        described = replace(info, context=self.decode(context), question=question, answer_prefix=answer_prefix)
        return Case([*self.prefix_ids, *context], continuation, described)


class CaseTask(ABC):
    """A retrieval task that makes cases; a case is a pure function of the arguments of ``case``."""

    name: str
    """The task's name in records and reports."""
    has_turns: bool = False
    """Whether a case is a conversation of several turns."""
    uses_depth: bool = True
    """False if the task has no needle at a depth: ``case`` then ignores its ``depth``."""

    @abstractmethod
    def case(
        self,
        frame: Frame,
        haystack: Tokens,
        length: int,
        depth: float | None,
        rng: random.Random,
        query_aware: bool = False,
    ) -> Case:
        """Make a case whose context has exactly ``length`` tokens, with prefix, needles and, if query-aware, question.

        ``depth`` in [0, 1] puts the asked needle after round(depth * filler) filler tokens; None draws it. The caller
        sets ``info.id`` and ``info.seed``.

        Raises
        ------
        ValueError
            For a depth outside [0, 1], a haystack that is empty or too short, and a needle that does not fit into
            ``length``.
        """

    def tokens_needed(self, frame: Frame, length: int) -> int:  # noqa: ARG002
        """Return a number of haystack tokens that suffices for a context of ``length`` tokens."""
        return length
