"""Questions for a list whose items the text tells one by one."""

import random
from collections.abc import Mapping
from itertools import product
from typing import ClassVar, NamedTuple, Self

from data.facts import Split, draw_name, part
from data.names import ADJECTIVES, WORDS
from data.passage import Passage
from data.question_kind import Asked, Asking, QuestionKind, Wordings

TOKENS_PER_ITEM = 5
MOST_ITEMS = 20
"""Fewer than the items of any split."""


class Listed(NamedTuple):
    """The sentence that gives one item, and how the list is asked for."""

    told: str
    asking: Asking


LISTS: Mapping[Split, tuple[Listed, ...]] = {
    "train": (
        Listed(
            " {who} put the {item} into the trunk.",
            Asking("Which things did {who} put into the trunk, in order?", "Into the trunk went the"),
        ),
        Listed(
            " At the fair {who} sold the {item}.",
            Asking("What did {who} sell at the fair, from first to last?", "Sold were the"),
        ),
        Listed(" {who} repaired the {item}.", Asking("List all that {who} repaired.", "Repaired were the")),
    ),
    "validation": (
        Listed(" {who} lent out the {item}.", Asking("Name in sequence what {who} lent out.", "Lent out were the")),
    ),
    "held_out": (
        Listed(" The {item} was found by {who}.", Asking("Recall every find of {who}, in turn.", "The finds are the")),
    ),
}


class ListedItems(QuestionKind):
    """All items of somebody's list, in the order in which the text tells them.

    Parameters
    ----------
    items
        Fewest and most items.
    """

    name: ClassVar[str] = "list"
    inserts = True
    wordings: ClassVar[Wordings] = {split: tuple(one.asking for one in lists) for split, lists in LISTS.items()}

    def __init__(self, items: tuple[int, int] = (3, 6)) -> None:
        self.items = items

    @classmethod
    def writing(cls, tokens: int) -> Self:
        """Ask for answers of about ``tokens`` tokens, of at most 20 items."""
        items = min(MOST_ITEMS, max(2, tokens // TOKENS_PER_ITEM))
        return cls((items, items))

    def ask(self, passage: Passage, rng: random.Random, split: Split, depth: float | None = None) -> Asked:  # noqa: ARG002
        """See ``QuestionKind.ask``."""
        who, listed = draw_name(rng, split), rng.choice(LISTS[split])
        pairs = [" ".join(pair) for pair in product(part(ADJECTIVES, split), part(WORDS, split))]
        items = rng.sample(pairs, min(len(pairs), rng.randint(*self.items)))
        told = tuple(listed.told.format(who=who, item=item) for item in items)
        return Asked(listed.asking.turn(items, ".", who=who), told, (who,))
