"""The words, numbers, UUIDs and coded words of RULER's needles and word lists.

RULER (https://github.com/NVIDIA/RULER) draws its words from the wonderwords package. Deviation: keys and word values
come from the lists below (96 adjectives x 145 nouns), which share no word with the facts of training (data.names); word
lists use these words and those of Python's documentation (about 2,500 together), and pairs of them if more are needed.
"""

import random
import re
import string
import uuid
from collections.abc import Collection, Iterator
from functools import cache
from typing import Literal

Kind = Literal["word", "number", "uuid"]

ADJECTIVES = """
    able agile airy alert alpine ample arctic arid basic bitter blunt bold brave brief brisk broad calm careful
    cheap chilly civil classic clean clever coastal cold cosmic crisp curious damp daring deep dense dry dull eager
    early easy elegant empty equal exotic faint fair famous fancy fertile fierce final firm flat fluffy foggy fresh
    frugal full fuzzy giant glad glossy grand grave great handy hardy harsh hasty heavy hidden hungry icy idle jolly
    keen kind large lazy light little lively lone loud loyal lucid lucky merry mighty mild misty modest neat nimble
    noble noisy odd patient
""".split()
NOUNS = """
    acorn actor alley almond apple apron arrow artist atlas attic avenue badge bamboo banjo barn barrel beach beaver
    bench berry blanket boat bonnet book boot bottle boulder bowl branch bread brick bridge broom brush bucket buffalo
    bush butter button cabin cable cactus cake camel candle canoe caravan carpet carrot castle cave cedar cello
    cereal chalk cherry chess chimney cliff cloak cloud coat coconut coffee collar corner cottage cotton crab crane
    crater cricket crown cup curtain cushion daisy desert desk dolphin donkey door dragon dune eagle easel elbow
    engine fence fern ferry fiddle field flag flame flute forest fork fossil fountain fox gate geyser giraffe glove
    goat gravel hammer hammock hedge helmet heron hill honey horn horse hotel iron ivory jacket jaguar jar jewel
    jungle kayak kitchen kite koala ladle lagoon lake lemon lion lizard lobster locket magpie mango marsh
    mask melon mitten moon moth mountain
""".split()
NUMBER_DIGITS = 7


def draw(kind: Kind, rng: random.Random) -> str:
    """Draw a key or value: adjective-noun, a number of seven digits, or a version-4 UUID."""
    if kind == "word":
        return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"
    if kind == "number":
        return str(rng.randint(10 ** (NUMBER_DIGITS - 1), 10**NUMBER_DIGITS - 1))
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def draw_besides(taken: Collection[str], kind: Kind, rng: random.Random) -> str:
    """Draw a key or value that is not in ``taken``."""
    while (drawn := draw(kind, rng)) in taken:
        pass
    return drawn


@cache
def words() -> tuple[str, ...]:
    """Return distinct single words in lower case, in alphabetical order."""
    from pydoc_data.topics import topics

    # Only words of prose: nothing next to code or markup.
    prose = re.compile(r"(?<![^\s(])[a-z]{4,12}(?=[,.;:)]?\s)")
    found = {word for topic in topics.values() for word in prose.findall(topic)}
    return tuple(sorted(found | set(ADJECTIVES) | set(NOUNS)))


def distinct_words(rng: random.Random) -> Iterator[str]:
    """Yield distinct words endlessly, in random order: single words, then pairs without the first 100 words."""
    pool = list(words())
    rng.shuffle(pool)
    yield from pool
    seen: set[str] = set()
    while True:
        pair = f"{rng.choice(pool[100:])}-{rng.choice(pool[100:])}"
        if pair not in seen:
            seen.add(pair)
            yield pair


def random_words(count: int, letters: int, rng: random.Random, alphabet: str = string.ascii_lowercase) -> list[str]:
    """Draw ``count`` distinct words of ``letters`` random letters."""
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        drawn["".join(rng.choices(alphabet, k=letters))] = None
    return list(drawn)
