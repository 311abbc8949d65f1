"""A conversation about a text: facts are told in one turn, asked for in a later one, and some corrected in between.

A turn is a message of the user, text with sentences inserted, and the answer. Its last token is the answer's: what the
chat template writes between an answer and the next message begins the next turn.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from data.cases import Frame
from data.fact_questions import FactQuestions
from data.facts import Split
from data.needle_placement import hide, sentence_ends, stretch
from data.packing import Tokens
from data.passage import Passage
from data.question_kind import Turn
from data.told_facts import ToldFacts
from sparsekv_pl.models.batch import IGNORE
from sparsekv_pl.models.chat_frame import QUESTION_OPENING, next_turn

TOLD: dict[str, FactQuestions | ToldFacts] = {kind.name: kind for kind in (FactQuestions(), ToldFacts())}
"""The kinds of facts that a conversation can tell and correct, by name."""
ACKNOWLEDGED = "Noted."
"""The answer of a turn that asks nothing."""
ASKING = 2 / 3
"""Share of the turns between the first and the last that ask."""
CORRECTING = 1 / 3
"""Share of the facts that are corrected, where there is a turn between telling and asking."""
TEXT_SHARE = 0.25
"""Least share of a turn's tokens that is text."""
DRAWS = 32
"""Draws of the last question until it and its sentences fit; other questions are left out if they do not."""


@dataclass(frozen=True)
class Exchange:
    """A question, and the turns that have told its fact, counted from 0: the last of them has the value asked for."""

    turn: Turn
    told_in: tuple[int, ...]
    outdated: str = ""
    """The value before the correction; empty if there was none."""


@dataclass(frozen=True)
class Transcript:
    """The tokens of a conversation of turns of exact lengths."""

    ids: list[int]
    labels: list[int]
    """As ``ids`` on the answers of questions, else ``IGNORE``."""
    exchanges: dict[int, Exchange]
    """By the turn that asks, counted from 0."""
    document_ids: list[str]


@dataclass
class Script:
    """What the turns tell and ask, as far as there is room.

    Parameters
    ----------
    frame
        The chat frame.
    lengths
        Tokens of each turn.
    kinds
        Weights of the kinds of facts by name: see ``TOLD``.
    rng, split
        Source of the draws; split of wordings, names and values.
    answered
        Whether the last turn ends with its answer; otherwise it ends where the answer begins.
    """

    frame: Frame
    lengths: Sequence[int]
    kinds: Mapping[str, float]
    rng: random.Random
    split: Split
    answered: bool = True
    exchanges: dict[int, Exchange] = field(default_factory=dict)

    def __post_init__(self) -> None:
        between = self.frame.encode(next_turn(self.frame.tokenizer))
        self.openings = [self.frame.prefix_ids, *[between] * (len(self.lengths) - 1)]
        self.closings = [self.frame.parts([f"{self.frame.question_suffix}{ACKNOWLEDGED}", "", ""])] * len(self.lengths)
        self.sentences: list[list[list[int]]] = [[] for _ in self.lengths]
        self._taken: set[str] = set()

    def draw(self, told_in: tuple[int, ...] | None = None) -> None:
        """Draw the last turn's question, whose fact is told in ``told_in`` or drawn turns, then those of others.

        Raises ``ValueError`` if a turn has no room for it.
        """
        last = len(self.lengths) - 1
        if not any(self.ask(last, told_in or self._turns_before(last)) for _ in range(DRAWS)):
            raise ValueError(
                f"a turn of {min(self.lengths)} tokens has no room for a fact, a question and text around them: give "
                "longer turns (more tokens, or fewer turns)"
            )
        for asks in range(1, last):
            told = self._turns_before(asks)
            if self.rng.random() < ASKING:
                self.ask(asks, told)

    def ask(self, asks: int, told_in: tuple[int, ...]) -> bool:
        """Let turn ``asks`` ask for a fact that the earlier turns ``told_in`` tell; return whether there was room."""
        kind = TOLD[self.rng.choices(list(self.kinds), list(self.kinds.values()))[0]]
        outdated = ""
        if len(told_in) == 1:
            asked = kind.ask(Passage(), self.rng, self.split)
        else:
            correction = kind.correct(self.rng, self.split)
            asked, outdated = correction.asked, correction.outdated
        turn = asked.turn
        question = f"{QUESTION_OPENING}{turn.question}{self.frame.question_suffix}{turn.answer_prefix}"
        answer = (f" {turn.answer}", turn.stop) if self.answered or asks < len(self.lengths) - 1 else ("", "")
        closing = self.frame.parts([question, *answer])
        sentences = [self.frame.encode(sentence) for sentence in asked.hidden]
        fits = self._free(asks, closing) >= 0 and all(
            self._free(where) >= len(sentence) for where, sentence in zip(told_in, sentences, strict=True)
        )
        own = {*asked.names, turn.answer, outdated} - {""}
        if not fits or not self._taken.isdisjoint(own):
            return False
        self._taken |= own
        self.closings[asks] = closing
        for where, sentence in zip(told_in, sentences, strict=True):
            self.sentences[where].append(sentence)
        self.exchanges[asks] = Exchange(turn, told_in, outdated)
        return True

    def room(self, turn: int, closing: Sequence[Sequence[int]] | None = None) -> int:
        """Return the tokens of a turn that are left for text, with its own or another ``closing``."""
        used = [self.openings[turn], *(closing or self.closings[turn]), *self.sentences[turn]]
        return self.lengths[turn] - sum(map(len, used))

    def _free(self, turn: int, closing: Sequence[Sequence[int]] | None = None) -> int:
        return self.room(turn, closing) - int(TEXT_SHARE * self.lengths[turn])

    def _turns_before(self, asks: int) -> tuple[int, ...]:
        told = self.rng.randrange(asks)
        if told < asks - 1 and self.rng.random() < CORRECTING:
            return told, self.rng.randrange(told + 1, asks)
        return (told,)


def transcript(script: Script, text: Tokens, supervise_stop: bool = True) -> Transcript:
    """Write a drawn ``script`` down, with a stretch of ``text`` that goes on from turn to turn.

    ``supervise_stop`` puts labels on the answers' full stops too. Raises ``ValueError`` if the text is empty or too
    short.
    """
    frame, ids, labels = script.frame, list[int](), list[int]()
    rooms = [script.room(turn) for turn in range(len(script.lengths))]
    filler, at = stretch(frame, text, sum(rooms), script.rng), 0
    for turn, room in enumerate(rooms):
        end = frame.before_character(filler.ids, at + room)
        piece = [*filler.ids[at:end], *[frame.line_end] * (at + room - end)]
        told, at = script.sentences[turn], end
        user = hide(frame, piece, told, sorted(script.rng.choices(sentence_ends(frame, piece), k=len(told))))
        question, answer, stop = script.closings[turn]
        ids += [*script.openings[turn], *user, *question, *answer, *stop]
        unasked = len(script.openings[turn]) + len(user) + len(question)
        labels += [*[IGNORE] * unasked, *answer, *(stop if supervise_stop else [IGNORE] * len(stop))]
    return Transcript(ids, labels, script.exchanges, filler.document_ids)


def turn_lengths(tokens: int, turns: int, rng: random.Random | None = None) -> list[int]:
    """Cut ``tokens`` into turns: equal ones, or with ``rng`` of three to five quarters of that length."""
    reach = 0 if rng is None else tokens // (8 * turns)
    inner = [tokens * turn // turns for turn in range(1, turns)]
    edges = [0, *(edge + (rng.randint(-reach, reach) if rng else 0) for edge in inner), tokens]
    return [stop - start for start, stop in pairwise(edges)]
