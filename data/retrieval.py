"""Needle cases: a fact hidden in real text at an exact token depth, asked for after the eviction."""

import random
from dataclasses import dataclass
from typing import Any, Literal

from data.facts import Fact, Split, draw_facts
from data.packing import Tokens
from sparsekv_pl.batch import IGNORE

CHAT_MARK = "<<<the text goes here>>>"
WORD_STARTS = ("Ġ", "Ċ", "▁", " ", "\n")
"""How tokens that begin with whitespace are spelled in byte-level, sentencepiece and plain vocabularies."""
QUESTION_FIRST_SHARE = 0.1
MIN_FILLER_SHARE = 0.5


@dataclass(frozen=True)
class NeedleCase:
    """One row of a batch, before padding. ``position`` counts the filler tokens before the needle that is
    asked for.
    """

    context_ids: list[int]
    continuation_ids: list[int]
    labels: list[int]
    document_ids: list[str]
    fact: Fact
    depth: float
    position: int
    task: str = "needle"


class NeedleTask:
    """Makes needle cases; case ``i`` is a pure function of (seed, split, i) and of the text it is given.

    Parameters
    ----------
    tokenizer
        A transformers tokenizer. With a chat template the context is the beginning of the user's message, up
        to the question, exactly as kvpress's pipeline cuts it; without one it begins with the bos token where
        there is one.
    context_tokens
        Length of every context, in tokens, chat prefix and needles included.
    needles
        Least and most facts hidden in a case, only while the filler remains at least half of the context. Where
        one is asked for, more than one are hidden in a third of the cases that the range leaves the choice.
    ask
        "one": for the first of the facts. "all": for each in a turn of its own, which teaches far more per
        context, because the context costs most.
    supervise
        "value": labels on the value's tokens alone, for exact match. "value_and_stop": on the full stop too.
    """

    def __init__(
        self,
        tokenizer: Any,
        context_tokens: int,
        seed: int = 0,
        split: Split = "train",
        needles: tuple[int, int] = (1, 1),
        supervise: Literal["value", "value_and_stop"] = "value",
        ask: Literal["one", "all"] = "one",
    ) -> None:
        if context_tokens < 1:
            raise ValueError(f"context_tokens is {context_tokens}: give at least 1")
        if not 1 <= needles[0] <= needles[1]:
            raise ValueError(f"needles is {needles}: give (least, most) with 1 <= least <= most")
        self.tokenizer, self.context_tokens, self.seed, self.split = tokenizer, context_tokens, seed, split
        self.needles, self.supervise, self.ask = needles, supervise, ask
        self.prefix, self.question_suffix = chat_frame(tokenizer)
        self.next_turn = next_turn(tokenizer)

    def case(self, index: int, text: Tokens, depth: float | None = None) -> NeedleCase:
        """Hide the facts of case ``index`` in a stretch of ``text`` that begins at a random word.

        ``depth`` in [0, 1] puts the asked needle after round(depth * filler) filler tokens; None draws it.

        Raises ValueError when the text is empty or shorter than the filler, or when the needle does not fit.
        """
        if depth is not None and not 0 <= depth <= 1:
            raise ValueError(f"depth is {depth}: give a fraction of the filler between 0 and 1")
        rng = random.Random(f"needle/{self.seed}/{self.split}/{index}")
        facts = draw_facts(rng, self.split, self._count(rng))
        asked = facts[0]
        prefix = self.prefix
        if self.split == "train" and rng.random() < QUESTION_FIRST_SHARE:
            prefix = prefix + asked.question + "\n\n"
        prefix_ids = self._encode(prefix)
        needles = self._fit(facts, len(prefix_ids))
        filler = self._cut(rng, text, self.context_tokens - len(prefix_ids) - sum(map(len, needles)))
        depth = rng.random() if depth is None else depth
        position = round(depth * len(filler.ids))
        places = [position, *(rng.randint(0, len(filler.ids)) for _ in needles[1:])]
        continuation, labels = self._continuation(facts[: len(needles)] if self.ask == "all" else [asked])
        return NeedleCase(
            prefix_ids + _hide(filler.ids, needles, places),
            continuation,
            labels,
            filler.document_ids,
            asked,
            depth,
            position,
        )

    def _count(self, rng: random.Random) -> int:
        least, most = self.needles
        if self.ask == "all":
            return rng.randint(least, most)
        if least == most or (least == 1 and rng.random() >= 1 / 3):
            return least
        return rng.randint(max(least, 2), most)

    def _fit(self, facts: list[Fact], used: int) -> list[list[int]]:
        """Token ids of the needles that fit; the asked one must."""
        needles = [self._encode(f"\n{fact.statement}\n") for fact in facts]
        room = self.context_tokens - used - len(needles[0])
        if room < 1:
            raise ValueError(
                f"a needle of {len(needles[0])} tokens after a prefix of {used} leaves no room for text in "
                "context_tokens="
                f"{self.context_tokens}: give at least {used + len(needles[0]) + 1}, better 64 more"
            )
        kept = needles[:1]
        for needle in needles[1:]:
            room -= len(needle)
            if room >= MIN_FILLER_SHARE * self.context_tokens:
                kept.append(needle)
        return kept

    def _cut(self, rng: random.Random, text: Tokens, count: int) -> Tokens:
        if not text.ids:
            raise ValueError("the haystack is empty: give the needle task some text to hide facts in")
        last = len(text.ids) - count
        if last < 0:
            raise ValueError(
                f"the haystack has {len(text.ids)} tokens and {count} are needed: give more text or a shorter context"
            )
        drawn = rng.randint(0, last)
        tokens = self.tokenizer.convert_ids_to_tokens(text.ids[drawn : min(last + 1, drawn + 64)])
        # Without a word start within reach (scripts that put no spaces) the cut stays where it was drawn.
        start = next((drawn + i for i, token in enumerate(tokens) if token.startswith(WORD_STARTS)), drawn)
        return text.slice(start, start + count)

    def _continuation(self, facts: list[Fact]) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        labels: list[int] = []
        for number, fact in enumerate(facts):
            opening = self.next_turn if number else "\n\n"
            head = self._encode(f"{opening}{fact.question}{self.question_suffix}{fact.answer_prefix}")
            value, stop = self._encode(f" {fact.value}"), self._encode(".")
            ids += head + value + stop
            labels += [IGNORE] * len(head) + value
            labels += stop if self.supervise == "value_and_stop" else [IGNORE] * len(stop)
        return ids, labels

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))


def chat_frame(tokenizer: Any) -> tuple[str, str]:
    """What stands before the text and after the question, as kvpress's pipeline has it: (prefix, question
    suffix).
    """
    if tokenizer.chat_template is None:
        return tokenizer.bos_token or "", "\n"
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": CHAT_MARK}],
        add_generation_prompt=True,
        tokenize=False,
        enable_thinking=False,
    )
    if rendered.count(CHAT_MARK) != 1:
        raise ValueError(
            f"the chat template repeats or drops the user's message: {rendered!r}. Set tokenizer.chat_template = None"
        )
    prefix, suffix = rendered.split(CHAT_MARK)
    return prefix, suffix


def next_turn(tokenizer: Any) -> str:
    """What stands between an answer and the next question in a conversation."""
    if tokenizer.chat_template is None:
        return "\n"
    answer = CHAT_MARK.replace("text", "answer")
    user = {"role": "user", "content": CHAT_MARK}
    rendered = tokenizer.apply_chat_template(
        [user, {"role": "assistant", "content": answer}, user], tokenize=False, enable_thinking=False
    )
    return rendered.split(answer)[1].split(CHAT_MARK)[0]


def _hide(filler: list[int], needles: list[list[int]], places: list[int]) -> list[int]:
    ids: list[int] = []
    done = 0
    for place, needle in sorted(zip(places, needles, strict=False), key=lambda pair: pair[0]):
        ids += filler[done:place] + needle
        done = place
    return ids + filler[done:]
