"""Invented facts for retrieval tasks, and the wordings that state them.

A fact is an attribute of a subject with a value, for instance the access code for the Lisbon archive, 48213.
Subjects are combined from pools, so they rarely repeat. Every pool and every list of wordings is divided between the
splits: no wording, name, place, noun or attribute of the held-out split is seen in training.
"""

import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from data.names import (
    ADJECTIVES,
    COLOURS,
    FACILITIES,
    FIRST_NAMES,
    LAST_NAMES,
    MONTHS,
    OBJECTS,
    PLACES,
    WORDS,
)
from data.wordings import GENERIC_QUESTIONS, GENERIC_STATEMENTS, KIND_WORDINGS, Wording

Split = Literal["train", "validation", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "validation", "held_out")
T = TypeVar("T")


@dataclass(frozen=True)
class Fact:
    """One needle: ``statement`` contains ``value``; ``answer_prefix`` + " " + ``value`` + "." answers ``question``."""

    kind: str
    subject: str
    statement: str
    question: str
    answer_prefix: str
    value: str


@dataclass(frozen=True)
class Kind:
    """One kind of fact: comma-separated attributes with their prepositions, and the function that draws a value."""

    name: str
    attributes: str
    value: Callable[[random.Random, Split], str]
    held_out_only: bool = False


def part(pool: Sequence[T], split: Split) -> list[T]:
    """Return the items of ``pool`` that belong to ``split``: of every ten, 7 train, 1 validation, 2 held_out."""
    owner: dict[int, Split] = {0: "held_out", 3: "validation", 5: "held_out"}
    return [item for i, item in enumerate(pool) if owner.get(i % 10, "train") == split]


def draw_name(rng: random.Random, split: Split) -> str:
    """Draw a person's name."""
    return f"{rng.choice(part(FIRST_NAMES, split))} {rng.choice(part(LAST_NAMES, split))}"


def _number(rng: random.Random, split: Split) -> str:
    lengths = {"train": (4, 5, 7), "validation": (5,), "held_out": (4, 5, 6, 7)}[split]
    digits = rng.choice(lengths)
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def _code(rng: random.Random, split: Split) -> str:
    letters = "".join(rng.choices(string.ascii_uppercase, k=2 + (split == "held_out")))
    return f"{letters}{rng.choice(('-', ''))}{rng.randrange(100, 1000)}"


def _word(rng: random.Random, split: Split) -> str:
    return rng.choice(part(WORDS, split))


def _date(rng: random.Random, split: Split) -> str:
    day, month, year = rng.randrange(1, 29), rng.choice(MONTHS), rng.randrange(1820, 2060)
    return f"{month} {day}, {year}" if split == "held_out" or rng.random() < 0.3 else f"{day} {month} {year}"


def _place(rng: random.Random, split: Split) -> str:
    return rng.choice(part(PLACES, split))


def _object(rng: random.Random, split: Split) -> str:
    return f"the {rng.choice(part(COLOURS, split))} {rng.choice(part(OBJECTS, split))}"


def _time(rng: random.Random, split: Split) -> str:
    hour, minute = rng.randrange(24), rng.randrange(60)
    if split != "held_out" and rng.random() < 0.5:
        return f"{hour % 12 + 1}:{minute:02d} {'am' if hour < 12 else 'pm'}"
    return f"{hour:02d}:{minute:02d}"


def _money(rng: random.Random, split: Split) -> str:
    amount = rng.randrange(110, 99_000)
    unit = rng.choice(
        {"train": ("dollars", "euros", "francs"), "validation": ("crowns",), "held_out": ("pounds", "pesos")}[split]
    )
    return f"{amount:,} {unit}" if rng.random() < 0.5 else f"{amount} {unit}"


def _phone(rng: random.Random, split: Split) -> str:
    joint = " " if split == "held_out" else "-"
    return joint.join((f"{rng.randrange(200, 1000)}", f"{rng.randrange(10_000):04d}"))


def _plate(rng: random.Random, _split: Split) -> str:
    return f"{''.join(rng.choices(string.ascii_uppercase, k=3))} {rng.randrange(100, 1000)}"


KINDS: tuple[Kind, ...] = (
    Kind(
        "number",
        "locker code of, access code for, PIN for, validation count for, inventory number of, badge "
        "number of, serial number of, case number for, meter reading for, order number for, room code "
        "of, registration number of, magic number for",
        _number,
    ),
    Kind(
        "code",
        "activation key for, password for, ticket code for, entry token of, product code of, "
        "reference of, batch code of",
        _code,
    ),
    Kind(
        "word",
        "secret word of, passphrase for, code word for, watchword of, nickname of, keyword for, call sign of",
        _word,
    ),
    Kind(
        "name",
        "owner of, caretaker of, manager of, auditor of, founder of, director of, chief engineer of, "
        "contact person for",
        draw_name,
    ),
    Kind(
        "date",
        "closing date of, launch date of, opening date of, audit date of, renewal date for, deadline "
        "for, inspection date of",
        _date,
    ),
    Kind(
        "place",
        "backup site of, new home of, meeting place of, twin city of, destination of, delivery "
        "address of, next stop of",
        _place,
    ),
    Kind(
        "object",
        "hiding place marker of, mascot of, emblem of, lost item of, trophy of, gift for, signal of",
        _object,
    ),
    Kind(
        "time",
        "departure time of, alarm time for, closing time of, curfew of, start time for, arrival time "
        "of, briefing time of",
        _time,
    ),
    Kind(
        "money",
        "insurance value of, annual budget of, monthly rent of, repair bill of, grant for, fee for, debt of",
        _money,
    ),
    Kind(
        "phone",
        "hotline of, extension of, phone number of, fax number of, emergency line of, contact number "
        "for, pager number of",
        _phone,
    ),
    Kind(
        "plate",
        "licence plate of",
        _plate,
        held_out_only=True,
    ),
)


SPENT = 1_000
"""Draws in a row without another value, after which a kind counts as used up; its last value takes a few dozen."""


def draw_subject(rng: random.Random, split: Split) -> str:
    """Draw a subject from the split's names: a facility, a project, a person or a person's possession."""
    form = rng.randrange(4)
    if form == 0:
        return f"the {_place(rng, split)} {rng.choice(part(FACILITIES, split))}"
    if form == 1:
        return f"Project {rng.choice(part(ADJECTIVES, split)).title()} {_word(rng, split).title()}"
    if form == 2:
        return draw_name(rng, split)
    return f"{draw_name(rng, split)}'s {rng.choice(part(FACILITIES, split))}"


def draw_fact(rng: random.Random, split: Split, kind: Kind | None = None) -> Fact:
    """Draw a fact from the split's words; the kind is drawn too unless ``kind`` is given."""
    kind = kind or rng.choice([k for k in KINDS if split == "held_out" or not k.held_out_only])
    subject, who = draw_subject(rng, split), draw_name(rng, split)
    value = kind.value(rng, split)
    while value.lower() in f"{subject} {who}".lower():
        value = kind.value(rng, split)
    wording = _draw_wording(rng, split, kind)
    attributes = kind.attributes.split(", ")
    if not kind.held_out_only:
        attributes = part(attributes, split)
    topic = f"{rng.choice(attributes)} {subject}"
    words = {
        "subject": subject,
        "Subject": subject[0].upper() + subject[1:],
        "topic": topic,
        "Topic": topic[0].upper() + topic[1:],
        "value": value,
        "Value": value[0].upper() + value[1:],
        "who": who,
    }
    return Fact(
        kind.name,
        subject,
        wording.statement.format(**words),
        wording.question.format(**words),
        wording.answer_prefix.format(**words),
        value,
    )


def draw_facts(rng: random.Random, split: Split, count: int) -> list[Fact]:
    """Draw ``count`` facts with distinct subjects and values; half of the time all are of one kind, which is harder.

    Once that kind has no more values (there are twelve held-out objects), the rest are of any kind.
    """
    facts = [draw_fact(rng, split)]
    kind = {kind.name: kind for kind in KINDS}[facts[0].kind] if rng.random() < 0.5 else None
    failed = 0
    while len(facts) < count:
        fact = draw_fact(rng, split, kind)
        if all(fact.subject != other.subject and fact.value != other.value for other in facts):
            facts.append(fact)
            failed = 0
        elif (failed := failed + 1) == SPENT and kind is not None:
            kind, failed = None, 0
    return facts


def _draw_wording(rng: random.Random, split: Split, kind: Kind) -> Wording:
    """Draw a wording made for the kind (in a third of the draws, if it has one), else a general one."""
    own = KIND_WORDINGS[split].get(kind.name, ())
    if own and rng.random() < 1 / 3:
        return rng.choice(own)
    question, answer_prefix = rng.choice(GENERIC_QUESTIONS[split])
    return Wording(rng.choice(GENERIC_STATEMENTS[split]), question, answer_prefix)
