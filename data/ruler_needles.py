"""RULER's needles in a haystack: single, several keys, several values, several queries. See data.ruler."""

import random
from dataclasses import astuple, dataclass, replace
from typing import Any, Literal

from data.cases import Case, CaseTask, Frame
from data.needle_placement import checked_depth, hide
from data.packing import Tokens
from data.ruler_filler import (
    AFTER_CONTEXT,
    Filler,
    Haystack,
    encode_statement,
    filler_tokens,
    line_filler,
    plain_filler,
)
from data.ruler_vocabulary import Kind, draw_besides
from sparsekv_pl.models.batch import CaseInfo

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
NIAH_MANY = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n",
    "What are all the special magic {kind} for {query} mentioned in the provided text?",
    "The special magic {kind} for {query} mentioned in the provided text are",
)
NIAH_ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n",
    "What is the special magic {kind} for {query} mentioned in the provided text?",
    "The special magic {kind} for {query} mentioned in the provided text is",
)
NIAH_NEW_TOKENS = 128
MOST_KEYS = 1000
"""Far fewer than the available words, so that drawing distinct ones terminates."""


@dataclass(frozen=True)
class Needles:
    """The settings of a needle task; the fields are ``Niah``'s parameters."""

    keys: int = 1
    values: int = 1
    queries: int = 1
    key_kind: Kind = "word"
    value_kind: Kind = "number"
    haystack: Haystack = "text"


Preset = Literal[
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multivalue",
    "niah_multiquery",
]
PRESETS: dict[Preset, Needles] = {
    "niah_single_1": Needles(haystack="noise"),
    "niah_single_2": Needles(),
    "niah_single_3": Needles(value_kind="uuid"),
    "niah_multikey_1": Needles(keys=4),
    "niah_multikey_2": Needles(haystack="needles"),
    "niah_multikey_3": Needles(haystack="needles", key_kind="uuid", value_kind="uuid"),
    "niah_multivalue": Needles(values=4),
    "niah_multiquery": Needles(keys=4, queries=4),
}


class Niah(CaseTask):
    """Needles in a haystack: RULER's eight settings by name, or others by options.

    The first asked needle is at the depth. If several are asked, number j of n is at (depth + j / n) modulo 1, so that
    they are spread evenly, starting at the depth; the other needles are anywhere. Raises ``ValueError`` for an unknown
    preset, or a setting out of range.

    Parameters
    ----------
    preset
        RULER's name of the setting. The options below override it.
    keys
        Number of different keys hidden, including the asked ones.
    values
        Values of each key; all are asked for.
    queries
        Number of keys asked for in one question.
    key_kind, value_kind
        "word" (adjective-noun), "number" (seven digits) or "uuid".
    haystack
        "text": the evaluation's text. "noise": RULER's one repeated sentence. "needles": other needles, line by line.
    max_new_tokens
        Most tokens of an answer; 128 as in RULER by default. A number needs ten, and each token of a batch costs a
        pass.
    """

    def __init__(
        self,
        preset: Preset = "niah_single_2",
        keys: int | None = None,
        values: int | None = None,
        queries: int | None = None,
        key_kind: Kind | None = None,
        value_kind: Kind | None = None,
        haystack: Haystack | None = None,
        max_new_tokens: int = NIAH_NEW_TOKENS,
    ) -> None:
        if preset not in PRESETS:
            raise ValueError(f"preset is {preset!r}: give one of {', '.join(PRESETS)}")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}: give at least 1")
        self.max_new_tokens = max_new_tokens
        given: dict[str, Any] = {
            "keys": keys,
            "values": values,
            "queries": queries,
            "key_kind": key_kind,
            "value_kind": value_kind,
            "haystack": haystack,
        }
        self.needles = replace(PRESETS[preset], **{name: value for name, value in given.items() if value is not None})
        needles = self.needles
        if min(needles.values, needles.queries) < 1 or not needles.queries <= needles.keys <= MOST_KEYS:
            raise ValueError(
                f"{needles}: give at least one value and one query, and as many keys as queries, at most {MOST_KEYS}"
            )
        names = {settings: name for name, settings in PRESETS.items()}
        self.name = names.get(needles, "niah_" + "_".join(map(str, astuple(needles))))

    def tokens_needed(self, frame: Frame, length: int) -> int:  # noqa: ARG002
        """Return ``length`` if the haystack is text, else 0."""
        return length if self.needles.haystack == "text" else 0

    def case(
        self,
        frame: Frame,
        haystack: Tokens,
        length: int,
        depth: float | None,
        rng: random.Random,
        query_aware: bool = False,
    ) -> Case:
        facts = self._draw(rng)
        depth = checked_depth(depth, rng)
        queries = list(facts)[: self.needles.queries]
        answers = [value for key in queries for value in facts[key]]
        intro, question, answer_prefix = self._prompt(queries)
        head, tail = frame.encode(intro), frame.encode(AFTER_CONTEXT)
        statements = [self._encode(frame, key, value) for key, values in facts.items() for value in values]
        room = frame.room(length, question, query_aware)
        count = filler_tokens(f"{self.name}: a context of {length} tokens", room, [head, *statements, tail])
        at = round(depth * count)
        filler = self._filler(frame, haystack, count, at, facts, rng)
        shares = [(depth + number / len(answers)) % 1 for number in range(1, len(answers))]
        places = [at, *(filler.near(round(share * count)) for share in shares)]
        places += [filler.near(rng.randint(0, count)) for _ in statements[len(answers) :]]
        info = CaseInfo(
            id="",
            task=self.name,
            answers=tuple(answers),
            max_new_tokens=self.max_new_tokens,
            depth=depth,
            document_ids=filler.document_ids,
        )
        context = head + hide(frame, filler.ids, statements, places) + tail
        return frame.build(context, question, answer_prefix, info, query_aware)

    def _draw(self, rng: random.Random) -> dict[str, list[str]]:
        """Draw values by key, all different; the asked keys come first."""
        kinds = ([self.needles.key_kind] + [self.needles.value_kind] * self.needles.values) * self.needles.keys
        drawn: dict[str, None] = {}
        for kind in kinds:
            drawn[draw_besides(drawn, kind, rng)] = None
        names, each = list(drawn), 1 + self.needles.values
        return {names[i]: names[i + 1 : i + each] for i in range(0, len(names), each)}

    def _prompt(self, queries: list[str]) -> tuple[str, str, str]:
        """Return (introduction, question, answer prefix), in the singular if one value is asked for."""
        one = len(queries) * self.needles.values == 1
        kind = self.needles.value_kind if one else f"{self.needles.value_kind}s"
        query = queries[0] if len(queries) == 1 else f"{', '.join(queries[:-1])}, and {queries[-1]}"
        template = NIAH_ONE if one else NIAH_MANY
        intro, question, answer_prefix = (part.format(kind=kind, query=query) for part in template)
        return intro, question, answer_prefix

    def _encode(self, frame: Frame, key: str, value: str) -> list[int]:
        sentence = NEEDLE.format(kind=f"{self.needles.value_kind}s", key=key, value=value)
        return encode_statement(frame, sentence, self.needles.haystack)

    def _filler(
        self, frame: Frame, haystack: Tokens, count: int, at: int, facts: dict[str, list[str]], rng: random.Random
    ) -> Filler:
        needles = self.needles
        if needles.haystack != "needles":
            return plain_filler(frame, haystack, needles.haystack, count, at, rng)
        taken = {*facts, *(value for values in facts.values() for value in values)}

        def line() -> list[int]:
            key = draw_besides(taken, needles.key_kind, rng)
            return self._encode(frame, key, draw_besides(taken, needles.value_kind, rng))

        return line_filler(line, count, at)
