"""RULER's aggregation tasks: the most common words of a list, the most frequent coded words. See data.ruler."""

import itertools
import random
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator

from data.cases import Case, CaseTask, Frame
from data.packing import Tokens
from data.ruler_filler import AFTER_CONTEXT
from data.ruler_vocabulary import distinct_words, random_words
from sparsekv_pl.models.batch import CaseInfo

Fill = Callable[[int], list[int]]
"""Takes a number of tokens and returns so many."""

CWE_INTRO = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n"
)
CWE_QUESTION = "Question: What are the 10 most common words in the above list?"
CWE_ANSWER_PREFIX = "Answer: The top 10 words that appear most often in the list are:"
COMMON_WORDS = 10
LONG = 4096
"""Context length in tokens from which words are repeated as often as published."""

FWE_INTRO = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words."
)
FWE_QUESTION = (
    "Question: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?"
)
FWE_ANSWER_PREFIX = "Answer: According to the coded text above, the three most frequently appeared words are:"
FREQUENT_WORDS = 3
CODED_LETTERS = 6
NOISE_WORD = "..."
TOKENS_PER_CODED_WORD = 50


class WordList(CaseTask):
    """A task that fills the context with words: no haystack, and no needle at a depth."""

    uses_depth = False
    question = answer_prefix = ""
    max_new_tokens = 0

    def tokens_needed(self, frame: Frame, length: int) -> int:  # noqa: ARG002
        """Return 0: the task needs no haystack."""
        return 0

    def case(
        self,
        frame: Frame,
        haystack: Tokens,  # noqa: ARG002
        length: int,
        depth: float | None,  # noqa: ARG002
        rng: random.Random,
        query_aware: bool = False,
    ) -> Case:
        text, answers, fill = self._drawn(frame, length, rng)
        head, tail = frame.encode(text), frame.encode(AFTER_CONTEXT)
        words = fill(frame.room(length, self.question, query_aware) - len(head) - len(tail))
        info = CaseInfo(id="", task=self.name, answers=tuple(answers), max_new_tokens=self.max_new_tokens)
        return frame.build([*head, *words, *tail], self.question, self.answer_prefix, info, query_aware)

    @abstractmethod
    def _drawn(self, frame: Frame, length: int, rng: random.Random) -> tuple[str, list[str], Fill]:
        """Return the text before the words, the answers, and the words' tokens for a number of them."""


class CommonWords(WordList):
    """Common words extraction, "cwe": ten words of a shuffled, numbered list appear more often than the others.

    The list has as many other words as fit, all equally often. Words that appear once follow, and the last of them is
    cut for the exact length.

    Parameters
    ----------
    repeats
        Number of repeats of a common and of any other word; null for RULER's 30 and 3, or 6 and 1 in contexts below
        4,096 tokens.
    example
        Begin with RULER's solved example: a list of 40 entries, or of 190 from 4,096 tokens on.
    """

    name = "cwe"
    question, answer_prefix, max_new_tokens = CWE_QUESTION, CWE_ANSWER_PREFIX, 120

    def __init__(self, repeats: tuple[int, int] | None = None, example: bool = True) -> None:
        if repeats is not None and not 1 <= repeats[1] < repeats[0]:
            raise ValueError(f"repeats is {repeats}: give (common, other) with 1 <= other < common")
        self.repeats, self.example = repeats, example

    def _drawn(self, frame: Frame, length: int, rng: random.Random) -> tuple[str, list[str], Fill]:
        words = distinct_words(rng)
        text = _example(words, length, rng) if self.example else ""
        common = list(itertools.islice(words, COMMON_WORDS))
        repeats = self.repeats or ((30, 3) if length >= LONG else (6, 1))
        return text + CWE_INTRO, common, lambda room: self._fill(frame, common, words, repeats, room, length, rng)

    def _fill(
        self,
        frame: Frame,
        common: list[str],
        words: Iterator[str],
        repeats: tuple[int, int],
        room: int,
        length: int,
        rng: random.Random,
    ) -> list[int]:
        """Make exactly ``room`` tokens of numbered words."""
        often, seldom = repeats
        # Numbers for as many entries as could fit with two tokens each, and for one word more.
        numbers = frame.encode_all([f" {i + 1}." if i else "1." for i in range(max(room // 2, 0) + seldom)])
        entries = [ids for ids in frame.encode_all([f" {word}" for word in common]) for _ in range(often)]
        total = sum(map(len, entries)) + sum(map(len, numbers[: len(entries)]))
        new = frame.encode(f" {next(words)}")
        while (grown := total + _cost(numbers, len(entries), new, seldom)) <= room:
            entries += [new] * seldom
            total, new = grown, frame.encode(f" {next(words)}")
        if len(entries) == len(common) * often:
            raise ValueError(
                f"{self.name}: {len(common)} words, each {often} times, and others do not fit into a context of "
                f"{length} tokens: give longer contexts, fewer repeats, or example: false"
            )
        rng.shuffle(entries)
        while total < room:
            total += len(numbers[len(entries)]) + len(new)
            entries.append(new)
            new = frame.encode(f" {next(words)}")
        pairs = zip(numbers, entries, strict=False)
        return list(itertools.chain.from_iterable(itertools.chain.from_iterable(pairs)))[:room]


class FrequentWords(WordList):
    """Frequent words extraction, "fwe": the three most frequent of coded words that follow Zipf's law.

    Word k appears floor(n / k^alpha) times, with the largest n for which the text fits and the third word is more
    frequent than the fourth. The first word is "...", RULER's noise, which also fills the rest of the context.

    Parameters
    ----------
    alpha
        Exponent of the law, above 0. RULER's is 2.
    """

    name = "fwe"
    question, answer_prefix, max_new_tokens = FWE_QUESTION, FWE_ANSWER_PREFIX, 50

    def __init__(self, alpha: float = 2.0) -> None:
        if alpha <= 0:
            raise ValueError(f"alpha is {alpha}: give a number above 0")
        self.alpha = alpha

    def _drawn(self, frame: Frame, length: int, rng: random.Random) -> tuple[str, list[str], Fill]:
        vocabulary = max(length // TOKENS_PER_CODED_WORD, FREQUENT_WORDS + 2)
        words = [NOISE_WORD, *random_words(vocabulary - 1, CODED_LETTERS, rng)]
        encoded = frame.encode_all([f" {word}" for word in words])
        return FWE_INTRO, words[1 : 1 + FREQUENT_WORDS], lambda room: self._fill(encoded, room, length, rng)

    def _fill(self, words: list[list[int]], room: int, length: int, rng: random.Random) -> list[int]:
        """Make exactly ``room`` tokens of shuffled words."""

        def tokens(noise: int) -> int:
            return sum(count * len(word) for count, word in zip(self._counts(noise, words), words, strict=True))

        noise = bisect_right(range(max(room, 0) + 1), room, key=tokens) - 1
        while noise > 0 and not self._distinguished(noise, words):
            noise -= 1
        if noise <= 0:
            raise ValueError(
                f"{self.name}: in a context of {length} tokens the {FREQUENT_WORDS} most frequent words are not more "
                "frequent than the others: give longer contexts"
            )
        more, rest = divmod(room - tokens(noise), len(words[0]))
        counts = self._counts(noise, words)
        counts[0] += more
        drawn = [word for count, word in zip(counts, words, strict=True) for _ in range(count)]
        rng.shuffle(drawn)
        return [*itertools.chain.from_iterable(drawn), *words[0][:rest]]

    def _counts(self, noise: int, words: list[list[int]]) -> list[int]:
        return [int(noise / rank**self.alpha) for rank in range(1, len(words) + 1)]

    def _distinguished(self, noise: int, words: list[list[int]]) -> bool:
        counts = self._counts(noise, words)
        return counts[FREQUENT_WORDS] > counts[FREQUENT_WORDS + 1]


def _cost(numbers: list[list[int]], entries: int, word: list[int], repeats: int) -> int:
    """Return the tokens of ``repeats`` more entries."""
    return sum(map(len, numbers[entries : entries + repeats])) + repeats * len(word)


def _example(words: Iterator[str], length: int, rng: random.Random) -> str:
    """Make RULER's solved example, with the break after it."""
    count, often, seldom = (40, 10, 3) if length >= LONG else (20, 3, 1)
    drawn = list(itertools.islice(words, count))
    common, others = drawn[:COMMON_WORDS], drawn[COMMON_WORDS:]
    entries = common * often + others * seldom
    rng.shuffle(entries)
    context = f"{CWE_INTRO}{_numbered(entries)}{AFTER_CONTEXT}"
    return f"{context}{CWE_QUESTION} {CWE_ANSWER_PREFIX} {_numbered(common)}\n"


def _numbered(words: list[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, start=1))
