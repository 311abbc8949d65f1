"""The words of a context: which of them can be quoted, and what occurs among them only once."""

import random
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate

LONGEST_WORD = 24
"""Characters; longer words are links, tables or a script without spaces."""
LETTERS_SHARE = 0.85
"""Least share of a quote's words that begin with a letter: below it are tables, sums and code."""
SENTENCE_WORDS = range(5, 31)
TRIED = 64
"""Most candidates that are tried for one question."""

_BLANK_LINE = re.compile(r"\n[ \t]*\n")
_SENTENCE_END = re.compile(r"[.!?][\"')\]\u201d\u2019]*$")
_SENTENCE_START = re.compile(r"[\"'(\[\u201c\u2018]*[^\W\d_]")
_ABBREVIATION = re.compile(r"^\W*(?:[A-Za-z]|Mr|Mrs|Ms|Dr|St|No|vs|etc|e\.g|i\.e|cf|Prof|Gen|Col)\.$")


def plain(word: str) -> str:
    """Return a word in lower case without outer punctuation; marks alone stay as they are."""
    return re.sub(r"^\W+|\W+$", "", word).casefold() or word


class Passage:
    """Words in order, by index. Texts are given with single spaces between words.

    Parameters
    ----------
    pieces
        The context's parts in order, each with whether it may be quoted. What is quoted lies in one part. A word at a
        cut or at the end of the context may be half a word, so it is not quoted.
    """

    def __init__(self, pieces: Sequence[tuple[str, bool]] = ()) -> None:
        self.quotable = [text for text, quoted in pieces if quoted]
        self.words: list[str] = []
        self.runs: list[range] = []
        """Longest stretches of words that may be quoted."""
        self.paragraphs: set[int] = set()
        """Words before which there is a blank line."""
        self._read("".join(text for text, _ in pieces), pieces)
        self.plain = [plain(word) for word in self.words]
        self._used: list[range] = []

    def _read(self, whole: str, pieces: Sequence[tuple[str, bool]]) -> None:
        ends = list(accumulate(len(text) for text, _ in pieces))
        inside: dict[int, list[int]] = {}
        last = 0
        for match in re.finditer(r"\S+", whole):
            if _BLANK_LINE.search(whole, last, match.start()):
                self.paragraphs.add(len(self.words))
            piece, last = bisect_right(ends, match.start()), match.end()
            if pieces[piece][1] and match.start() > 0 and last <= ends[piece] and last < len(whole):
                inside.setdefault(piece, []).append(len(self.words))
            self.words.append(match.group())
        self.runs = [range(found[0], found[-1] + 1) for found in inside.values()]

    def text(self, span: range) -> str:
        """Return the words of a span."""
        return " ".join(self.words[span.start : span.stop])

    def find(self, words: Sequence[str]) -> range | None:
        """Return where the words stand, by their plain forms; None if nowhere or more than once."""
        wanted = " ".join(map(plain, words))
        first = self._flat.find(f" {wanted} ")
        if first < 0 or self._flat.find(f" {wanted} ", first + 1) >= 0:
            return None
        start = self._flat.count(" ", 0, first + 1) - 1
        return range(start, start + len(words))

    def once(self, span: range) -> bool:
        """Return whether the span's words occur only there."""
        return self.find(self.words[span.start : span.stop]) is not None

    def windows(self, count: int) -> list[range]:
        """Return all spans of ``count`` words that may be quoted."""
        return [range(i, i + count) for run in self.runs for i in range(run.start, run.stop - count + 1)]

    def readable(self, span: range) -> bool:
        """Return whether the span is prose: most words begin with a letter, none is very long."""
        words = self.words[span.start : span.stop]
        prose = sum(bool(_SENTENCE_START.match(word)) for word in words)
        return prose >= LETTERS_SHARE * len(words) and max(map(len, words)) <= LONGEST_WORD

    @cached_property
    def sentences(self) -> list[range]:
        """Whole readable sentences, of the lengths ``SENTENCE_WORDS``, that begin with a capital."""
        found = []
        for run in self.runs:
            start = run.start
            for i in run:
                if i in self.paragraphs:
                    start = i
                if self._ends_sentence(i):
                    span, start = range(start, i + 1), i + 1
                    if span.start > 0 and len(span) in SENTENCE_WORDS and self._is_sentence(span):
                        found.append(span)
        return found

    def candidates(self, spans: Sequence[range], rng: random.Random, depth: float | None) -> Iterator[range]:
        """Yield unused spans, at most ``TRIED``: in random order, or from the nearest to ``depth`` on."""
        free = [span for span in spans if self.unused(span)]
        if depth is None:
            yield from rng.sample(free, min(TRIED, len(free)))
        else:
            place = depth * len(self.words)
            yield from sorted(free, key=lambda span: (abs(span.start + len(span) / 2 - place), span.start))[:TRIED]

    def unused(self, span: range) -> bool:
        """Return whether no earlier question quotes or answers with one of the span's words."""
        return not any(span.start < other.stop and other.start < span.stop for other in self._used)

    def use(self, *spans: range) -> None:
        """Keep later questions away from the spans."""
        self._used += spans

    @cached_property
    def _flat(self) -> str:
        return f" {' '.join(self.plain)} "

    def _ends_sentence(self, i: int) -> bool:
        return bool(_SENTENCE_END.search(self.words[i])) and not _ABBREVIATION.match(self.words[i])

    def _is_sentence(self, span: range) -> bool:
        first = self.words[span.start].lstrip("\"'([\u201c\u2018")
        return first[:1].isupper() and self.readable(span)
