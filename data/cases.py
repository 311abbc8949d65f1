"""Evaluation cases: what a task makes, and the chat frame around context, question and answer."""

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from data.chat import WORD_STARTS, chat_frame
from data.encoding import Encoder
from data.packing import Tokens
from sparsekv_pl.batch import CaseInfo

REACH = 256
"""How many tokens on a word start is looked for."""


@dataclass(frozen=True)
class Case:
    """One row of an evaluation batch, before padding.

    ``continuation_ids`` is what the model reads after the eviction: the question up to where the answer begins,
    or the text that follows.
    """

    context_ids: list[int]
    continuation_ids: list[int]
    info: CaseInfo


class Frame(Encoder):
    """The chat template cut where kvpress's pipeline cuts it: prefix | context question | suffix, answer prefix.

    A tokenizer without a chat template has its bos token (or nothing) as the prefix and a line break as the
    suffix.

    Parameters
    ----------
    tokenizer
        A transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        self.prefix, self.question_suffix = chat_frame(tokenizer)
        self.prefix_ids = self.start(self.prefix)

    def room(self, length: int, question: str, query_aware: bool) -> int:
        """Tokens of a ``length``-token context that remain beside the prefix and, query-aware, the question.

        May be zero or less: the task knows what it needs, and says so.
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
        """Frame ``context_ids`` (without the prefix) and ask ``question``; the parts are joined as they are.

        Query-agnostic: context = prefix + context, continuation = question + suffix + answer prefix.
        Query-aware: the question moves to the end of the context. ``info``'s context, question and answer
        prefix are filled in here.
        """
        context = list(context_ids)
        if query_aware:
            context += self.encode(question)
        asked = "" if query_aware else question
        continuation = self.encode(f"{asked}{self.question_suffix}{answer_prefix}")
        described = replace(info, context=self.decode(context), question=question, answer_prefix=answer_prefix)
        return Case([*self.prefix_ids, *context], continuation, described)


class CaseTask(ABC):
    """Makes the cases of one retrieval task; a case is a pure function of the arguments of ``case``."""

    name: str
    """The task's name in records and reports."""
    uses_depth: bool = True
    """False where nothing sits at a depth: ``case`` then ignores its ``depth``."""

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
        """A case whose context has exactly ``length`` tokens (prefix, needles and, query-aware, question included).

        ``depth`` in [0, 1] puts the asked needle after round(depth * filler) filler tokens; None draws it.
        ``info.id`` and ``info.seed`` are left for the caller to fill in.

        Raises ValueError for a depth outside [0, 1], a haystack that is empty or too short, and a needle that
        does not fit into ``length``.
        """

    def tokens_needed(self, frame: Frame, length: int) -> int:  # noqa: ARG002
        """Haystack tokens that suffice for a context of ``length`` tokens."""
        return length


def checked_depth(depth: float | None, rng: random.Random) -> float:
    """``depth``, or a drawn one where it is None; ValueError outside [0, 1]."""
    if depth is None:
        return rng.random()
    if not 0 <= depth <= 1:
        raise ValueError(f"depth is {depth}: give a fraction of the filler between 0 and 1")
    return depth


def stretch(frame: Frame, haystack: Tokens, count: int, rng: random.Random, at: int = 0) -> Tokens:
    """``count`` tokens from a random place of the haystack on where tokens 0 and ``at`` both begin a word.

    Where there is no such place within ``REACH`` tokens, ``at`` alone begins one, and where there is none for it either
    the place stays as drawn. No character is cut in two: where none ends at the last token, line ends take the place of
    its part. ValueError when the haystack is empty or too short.
    """
    if not haystack.ids:
        raise ValueError("the haystack is empty: give the task some text to hide facts in")
    last = len(haystack.ids) - count
    if last < 0:
        raise ValueError(
            f"the haystack has {len(haystack.ids)} tokens and {count} are needed: give more text or a shorter context"
        )
    drawn = rng.randint(0, last)
    reach = min(last - drawn + 1, REACH)
    begins = word_starts(frame, haystack.ids[drawn : drawn + reach])
    also = word_starts(frame, haystack.ids[drawn + at : drawn + at + reach]) if at < count else begins
    both = (i for i, pair in enumerate(zip(begins, also, strict=True)) if all(pair))
    start = drawn + next(both, also.index(True) if True in also else 0)
    start = frame.before_character(haystack.ids, start)
    end = frame.before_character(haystack.ids, start + count)
    filler = haystack.slice(start, end)
    filler.ids += [frame.line_end] * (start + count - end)
    return filler


def word_starts(frame: Frame, ids: list[int]) -> list[bool]:
    """Which of the tokens begin a word; all that do not continue one where the tokens carry no spaces."""
    tokens = frame.tokenizer.convert_ids_to_tokens(ids)
    starts = [token.startswith(WORD_STARTS) for token in tokens]
    if any(starts):
        return starts
    return [begins and not token.startswith("##") for begins, token in zip(frame.begins(ids), tokens, strict=True)]


def hide(frame: Frame, filler: Sequence[int], needles: Sequence[Sequence[int]], places: Sequence[int]) -> list[int]:
    """``filler`` with ``needles[i]`` after its first ``places[i]`` tokens, at one place in the order given.

    A place within a character moves behind it.
    """
    ids: list[int] = []
    done = 0
    moved = [frame.behind_character(filler, place) for place in places]
    for place, needle in sorted(zip(moved, needles, strict=True), key=lambda pair: pair[0]):
        ids += [*filler[done:place], *needle]
        done = place
    return [*ids, *filler[done:]]
