"""A context of an exact length with questions of several kinds about it."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from data.cases import Frame
from data.facts import Split
from data.needle_placement import hide, sentence_ends, stretch
from data.needles import MIN_FILLER_SHARE
from data.packing import Tokens
from data.passage import Passage
from data.question_kind import Asked, QuestionKind, Turn

OTHER_NAMES = 32
"""Draws of a question until none of its names is another question's."""


class NothingToAsk(Exception):
    """The text or the room has nothing for ``kind``, a kind's name."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind


@dataclass(frozen=True)
class AskedContext:
    """A context without the chat's prefix, and its questions."""

    ids: list[int]
    turns: list[Turn]
    kinds: list[str]
    """The kind of each question, by name."""
    document_ids: list[str]


def asked_context(
    frame: Frame,
    text: Tokens,
    room: int,
    kinds: Sequence[QuestionKind],
    rng: random.Random,
    split: Split,
    depth: float | None = None,
    spare: int = 0,
) -> AskedContext:
    """Ask a question of each of ``kinds`` about ``room`` tokens, a stretch of ``text`` with inserted sentences.

    Inserted sentences go between sentences of the text. ``depth`` is the place of the first question's answer as a
    fraction of the text. Nothing that is asked for lies in the last ``spare`` tokens. A second question of one kind is
    left out if there is nothing left to ask or no room for its sentences: half of the context at least is text.

    Raises
    ------
    NothingToAsk
        If the stretch or the room has nothing for the first question of a kind.
    ValueError
        If the text is empty or too short.
    """
    inserted = _inserted(frame, kinds, room, rng, split)
    used = sum(len(frame.encode(sentence)) for asked in inserted.values() for sentence in asked.hidden)
    filler = stretch(frame, text, room - used, rng)
    body = max(1, len(filler.ids) - spare)
    places = sentence_ends(frame, filler.ids[:body])
    hidden: list[tuple[int, str]] = []
    for slot, asked in inserted.items():
        chosen = _chosen(places, asked, rng, depth if slot == 0 else None, body)
        hidden += zip(chosen, asked.hidden, strict=True)
    passage = Passage(_pieces(frame, filler, hidden, body))
    questions: dict[int, Asked] = {}
    for slot, kind in enumerate(kinds):
        found = inserted.get(slot) if kind.inserts else kind.ask(passage, rng, split, depth if slot == 0 else None)
        if found is not None:
            questions[slot] = found
        elif kind not in [kinds[earlier] for earlier in questions]:
            raise NothingToAsk(kind.name)
    sentences = [frame.encode(sentence) for _, sentence in hidden]
    return AskedContext(
        hide(frame, filler.ids, sentences, [place for place, _ in hidden]),
        [asked.turn for asked in questions.values()],
        [kinds[slot].name for slot in questions],
        filler.document_ids,
    )


def _inserted(
    frame: Frame, kinds: Sequence[QuestionKind], room: int, rng: random.Random, split: Split
) -> dict[int, Asked]:
    """Draw the questions that insert sentences, by their place in ``kinds``, as far as there is room."""
    drawn: dict[int, Asked] = {}
    names: set[str] = set()
    left = (1 - MIN_FILLER_SHARE) * room
    for slot, kind in enumerate(kinds):
        for _ in range(OTHER_NAMES if kind.inserts else 0):
            asked = kind.ask(Passage(), rng, split)
            assert asked is not None, kind.name
            taken = sum(len(frame.encode(sentence)) for sentence in asked.hidden)
            if names.isdisjoint(asked.names) and taken <= left:
                drawn[slot], left = asked, left - taken
                names.update(asked.names)
                break
    return drawn


def _chosen(places: Sequence[int], asked: Asked, rng: random.Random, depth: float | None, body: int) -> list[int]:
    """Choose ascending places for the sentences, the answer's at the place nearest to ``depth``."""
    if depth is None:
        return sorted(rng.choices(places, k=len(asked.hidden)))
    answer = asked.turn.answers[0].lower()
    own = next(
        (i for i, sentence in enumerate(asked.hidden) if answer in sentence.lower()), 0
    )  # 0: it must be computed
    place = min(places, key=lambda place: abs(place - depth * body))
    before = rng.choices([other for other in places if other <= place], k=own)
    after = rng.choices([other for other in places if other >= place], k=len(asked.hidden) - own - 1)
    return [*sorted(before), place, *sorted(after)]


def _pieces(frame: Frame, filler: Tokens, hidden: Sequence[tuple[int, str]], body: int) -> list[tuple[str, bool]]:
    """Cut the text at inserted sentences and at the ends of documents and of the first ``body`` tokens."""
    ends = [*accumulate(count for _, count in filler.spans), frame.before_character(filler.ids, body)]
    text, pieces, done, at = frame.decode(filler.ids), [], 0, 0
    for place, sentence in sorted([*hidden, *((end, "") for end in ends)], key=lambda cut: cut[0]):
        end = len(frame.decode(filler.ids[:place]))
        pieces += [(text[done:end], at < body), (sentence, False)]
        done, at = end, place
    return [*pieces, (text[done:], at < body)]
