"""A made-up play of 300 speeches, no two of them equal."""

import random

WHO = ("First Miller", "Second Miller", "QUEEN AGNES", "Hob")
SUBJECTS = "miller river lantern shepherd captain orchard window baker harbour sister kettle garden".split()
VERBS = "carried forgot painted followed remembered buried borrowed counted answered repaired".split()
PLACES = "beyond the northern meadow,under the broken stairs,before the last harvest,without a single word".split(",")


def _speech(rng: random.Random, number: int) -> str:
    first, second, third = rng.sample(SUBJECTS, 3)
    numbered = f"{first}{'abcdefghij'[number % 10]}{'klmnopqrst'[number // 10 % 10]}{'uvwxyz'[number // 100]}"
    return (
        f"The {numbered} {rng.choice(VERBS)} every {second} {rng.choice(PLACES)}.\n"
        f"Nobody {rng.choice(VERBS)} the {third}, and {rng.choice(SUBJECTS)} number {1000 + number} was lost!"
    )


def _play() -> str:
    rng = random.Random(0)
    return "".join(f"\n\n{rng.choice(WHO)}:\n{_speech(rng, number)}" for number in range(300))


PLAY = _play()
