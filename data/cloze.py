"""Questions for a rare word or name that is left out of its sentence."""

import random
import re
from collections import Counter
from typing import ClassVar

from data.facts import Split
from data.passage import Passage, plain
from data.question_kind import Asked, Asking, QuestionKind, Wordings

BLANK = "____"
AROUND = 10
"""Most words of the sentence on each side of the blank."""
RARE_LETTERS, NAME_LETTERS = 6, 3
"""Least letters of a word, and of a name, that is left out."""
WORD = re.compile(r"^(\W*)([^\W\d_]+(?:['\u2019-][^\W\d_]+)*|\d{2,})(\W*)$")


class Cloze(QuestionKind):
    """A sentence of the passage with one word left out: a name, a number or a longer word that occurs only there."""

    name: ClassVar[str] = "cloze"
    wordings: ClassVar[Wordings] = {
        "train": (
            Asking("Which word is missing? {sentence}", "The missing word is"),
            Asking('Fill the blank with the word of the text: "{sentence}"', "The blank is"),
            Asking("{sentence}\nWhat stands in place of the gap?", "In place of the gap stands"),
            Asking("One word was left out here: {sentence} Say which.", "It was"),
            Asking('The text has a word where this line has none: "{sentence}"', "The word is"),
        ),
        "validation": (
            Asking("Put back the word that was removed: {sentence}", "The removed word is"),
            Asking('What did "{sentence}" say in full?', "The gap said"),
        ),
        "held_out": (
            Asking("A word of the document is blanked out: {sentence} Which one?", "The word blanked out is"),
            Asking('Restore the original: "{sentence}"', "In the original, the blank reads"),
        ),
    }

    def ask(self, passage: Passage, rng: random.Random, split: Split, depth: float | None = None) -> Asked | None:
        """See ``QuestionKind.ask``."""
        counts = Counter(passage.plain)
        gaps = {
            range(i, i + 1): sentence
            for sentence in passage.sentences
            for i in sentence[1:]
            if counts[passage.plain[i]] == 1 and _is_rare(passage.words[i])
        }
        text = " ".join(passage.words).casefold()  # where a word is also inside others: f(word)
        for gap in passage.candidates(list(gaps), rng, depth):
            sentence, place = gaps[gap], gap.start
            shown = range(max(sentence.start, place - AROUND), min(sentence.stop, place + AROUND + 1))
            match = WORD.match(passage.words[place])
            assert match is not None
            before, word, after = match.groups()
            if _places(passage, shown, place) != 1 or len(re.findall(rf"\b{word.casefold()}\b", text)) != 1:
                continue
            words = passage.words[shown.start : shown.stop]
            words[place - shown.start] = f"{before}{BLANK}{after}"
            passage.use(sentence)
            return Asked(rng.choice(self.wordings[split]).turn([word], ".", sentence=" ".join(words)))
        return None


def _is_rare(word: str) -> bool:
    match = WORD.match(word)
    if match is None:
        return False
    inside = match.group(2)
    return len(inside) >= RARE_LETTERS or inside.isdigit() or (inside[0].isupper() and len(inside) >= NAME_LETTERS)


def _places(passage: Passage, shown: range, place: int) -> int:
    """Return how often the words around the gap occur, with any word in it."""
    words, gap = [plain(word) for word in passage.words[shown.start : shown.stop]], place - shown.start
    around = words[:gap], words[gap + 1 :]
    starts = range(len(passage.plain) - len(words) + 1)
    return sum(
        passage.plain[i : i + gap] == around[0] and passage.plain[i + gap + 1 : i + len(words)] == around[1]
        for i in starts
    )
