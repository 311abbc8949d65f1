"""RULER's variable tracking: chains of assignments hidden in a haystack. See data.ruler."""

import random
import string
from dataclasses import dataclass
from typing import Literal

from data.cases import Case, CaseTask, Frame
from data.needle_placement import checked_depth, hide
from data.packing import Tokens
from data.ruler_filler import AFTER_CONTEXT, encode_statement, filler_tokens, plain_filler
from data.ruler_vocabulary import random_words
from sparsekv_pl.models.batch import CaseInfo

INTRO = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
QUESTION = "Question: Find all variables that are assigned the value {value} in the text above."
ANSWER_PREFIX = (
    "Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assigned "
    "the value {value}, they are:"
)
NEW_TOKENS = 30
LETTERS, EXAMPLE_LETTERS = 5, 3
MOST_VARIABLES = 1000
"""Far fewer than the available names, so that drawing distinct ones terminates."""
VALUES = range(10_000, 99_999)


@dataclass(frozen=True)
class Chain:
    """Variables with one value: the first is assigned the value, each other one the variable before it."""

    value: int
    names: list[str]

    def statements(self) -> list[str]:
        """Return RULER's assignments, in order."""
        later = [f"VAR {name} = VAR {before}" for before, name in zip(self.names, self.names[1:], strict=False)]
        return [f"VAR {self.names[0]} = {self.value}", *later]


class VariableTracking(CaseTask):
    """RULER's variable tracking: the question asks for all variables of a chain of assignments.

    The first assignment is at the depth, the others in order anywhere after it; other chains are anywhere. The task is
    called "vt", and "vt_noise" with RULER's repeated sentence. Raises ``ValueError`` for a setting out of range.

    Parameters
    ----------
    chains, hops
        Number of chains hidden (the first is asked for), and of assignments in each after its first.
    haystack
        "text": the evaluation's text, RULER's other option. "noise": one repeated sentence, RULER's default.
    example_tokens
        Most tokens of the solved example before the context; RULER's has up to 500. 0 leaves it out.
    """

    def __init__(
        self, chains: int = 1, hops: int = 4, haystack: Literal["text", "noise"] = "text", example_tokens: int = 500
    ) -> None:
        if min(chains, hops) < 1 or chains * (hops + 1) > MOST_VARIABLES or example_tokens < 0:
            raise ValueError(
                f"chains={chains}, hops={hops}, example_tokens={example_tokens}: give at least 1, 1 and 0, and chains "
                f"with at most {MOST_VARIABLES} variables together"
            )
        self.chains, self.hops, self.example_tokens = chains, hops, example_tokens
        self.haystack: Literal["text", "noise"] = haystack
        self.name = "vt" if haystack == "text" else "vt_noise"

    def tokens_needed(self, frame: Frame, length: int) -> int:  # noqa: ARG002
        """Return ``length`` if the haystack is text, else 0."""
        return length if self.haystack == "text" else 0

    def case(
        self,
        frame: Frame,
        haystack: Tokens,
        length: int,
        depth: float | None,
        rng: random.Random,
        query_aware: bool = False,
    ) -> Case:
        values = rng.sample(VALUES, 2 * self.chains)
        chains = self._draw(values[: self.chains], LETTERS, rng)
        question, answer_prefix = self._ask(chains[0])
        depth = checked_depth(depth, rng)
        example = self._example(frame, haystack, values[self.chains :], rng)
        room = frame.room(length, question, query_aware) - len(example)
        where = f"{self.name}: a context of {length} tokens with an example of {len(example)}"
        passage, document_ids = self._passage(frame, haystack, chains, where, room, depth, rng)
        info = CaseInfo(
            id="",
            task=self.name,
            answers=tuple(chains[0].names),
            max_new_tokens=NEW_TOKENS,
            depth=depth,
            document_ids=document_ids,
        )
        return frame.build(example + passage, question, answer_prefix, info, query_aware)

    def _draw(self, values: list[int], letters: int, rng: random.Random) -> list[Chain]:
        each = self.hops + 1
        names = random_words(each * len(values), letters, rng, string.ascii_uppercase)
        return [Chain(value, names[i * each : (i + 1) * each]) for i, value in enumerate(values)]

    def _ask(self, chain: Chain) -> tuple[str, str]:
        count = len(chain.names)
        return QUESTION.format(value=chain.value), ANSWER_PREFIX.format(value=chain.value, count=count)

    def _example(self, frame: Frame, haystack: Tokens, values: list[int], rng: random.Random) -> list[int]:
        """Make a solved case with shorter names."""
        if not self.example_tokens:
            return []
        chains = self._draw(values, EXAMPLE_LETTERS, rng)
        end = frame.encode(" ".join([*self._ask(chains[0]), *chains[0].names]) + "\n\n")
        room, where = self.example_tokens - len(end), f"{self.name}: example_tokens={self.example_tokens}"
        return self._passage(frame, haystack, chains, where, room, rng.random(), rng)[0] + end

    def _passage(
        self,
        frame: Frame,
        haystack: Tokens,
        chains: list[Chain],
        where: str,
        room: int,
        depth: float,
        rng: random.Random,
    ) -> tuple[list[int], tuple[str, ...]]:
        """Return ``room`` tokens from the introduction to the break before the question, and their documents."""
        head, tail = frame.encode(INTRO), frame.encode(AFTER_CONTEXT)
        end = "." if self.haystack == "text" else ""
        statements = [
            encode_statement(frame, f"{statement}{end}", self.haystack)
            for chain in chains
            for statement in chain.statements()
        ]
        count = filler_tokens(where, room, [head, *statements, tail])
        at = round(depth * count)
        filler = plain_filler(frame, haystack, self.haystack, count, at, rng)
        places = [at, *sorted(filler.near(rng.randint(at, count)) for _ in range(self.hops))]
        for _ in chains[1:]:
            places += sorted(filler.near(rng.randint(0, count)) for _ in range(self.hops + 1))
        return head + hide(frame, filler.ids, statements, places) + tail, filler.document_ids
