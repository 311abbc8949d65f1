"""Questions for who says a line, in plays and in dialogue between quotation marks."""

import random
import re
from collections.abc import Iterator
from typing import ClassVar

from data.facts import Split
from data.passage import Passage
from data.question_kind import Asked, Asking, QuestionKind, Wordings

LINE_WORDS = (4, 12)
"""Least words of a line, and the most that are quoted of it."""
FEWEST_SPEECHES = 3
"""Fewer speeches between blank lines are no play."""

_SPEECH = re.compile(
    r"\n[ \t]*\n[ \t]*(?P<who>[A-Z][\w'\u2019-]*(?: [A-Z][\w'\u2019-]*){0,3})(?::\n|\.\n|(?<=[A-Z]{3})[.:] )"
    r"(?P<line>\S.*?)(?=\n[ \t]*\n)",
    re.DOTALL,
)
_HEADINGS = re.compile(
    r"(?i)(?:notes?|warnings?|important|todo|examples?|see also|returns?|raises|parameters|args|usage|contents"
    r"|copyright|act|scene|chapter|part|book|enter|exit|exeunt)\b"
)
_NAME = r"(?P<who>(?:the )?(?:(?:Mr|Mrs|Miss|Dr|Sir|Lady|Captain)\.? )?[A-Z][a-z]+(?: [A-Z][a-z]+)?)(?=[\s,.;:!?])"
_VERB = r"(?:said|asked|replied|cried|answered|exclaimed|whispered|shouted|added|returned|observed|remarked|says)"
_QUOTED = r"[\"\u201c](?P<line>[A-Z][^\"\u201c\u201d]{12,400})[\"\u201d]"
_DIALOGUE = (
    re.compile(rf"{_QUOTED},?\s+{_VERB}\s+{_NAME}"),
    re.compile(rf"{_QUOTED},?\s+{_NAME}\s+{_VERB}\b"),
    re.compile(rf"\b{_NAME}\s+{_VERB}[^\"\u201c\u201d.]{{0,30}}[,:]\s+{_QUOTED}"),
)
_NO_NAMES = {"He", "She", "They", "It", "I", "We", "You", "The", "A", "An", "This", "That", "Then", "And", "But", "Who"}


class Speakers(QuestionKind):
    """Who says a line of the passage that occurs once. A passage without dialogue has nothing to ask."""

    name: ClassVar[str] = "speakers"
    wordings: ClassVar[Wordings] = {
        "train": (
            Asking('Who says "{line}"?', "It is said by"),
            Asking('"{line}" - whose words are these?', "These are the words of"),
            Asking("Name the speaker of: {line}", "The speaker is"),
            Asking('From whom do we hear "{line}"?', "We hear it from"),
        ),
        "validation": (
            Asking('Which person utters "{line}"?', "It is uttered by"),
            Asking('Attribute this line: "{line}"', "The line belongs to"),
        ),
        "held_out": (
            Asking('In the document somebody speaks thus: "{line}" Who?', "Thus speaks"),
            Asking('To which speaker does the document give "{line}"?', "The document gives it to"),
        ),
    }

    def ask(self, passage: Passage, rng: random.Random, split: Split, depth: float | None = None) -> Asked | None:
        """See ``QuestionKind.ask``."""
        lines: dict[range, str] = {}
        speakers: dict[range, set[str]] = {}
        for who, line in (found for text in passage.quotable for found in spoken(text)):
            words = line.split()[: LINE_WORDS[1]]
            span = passage.find(words) if len(words) >= LINE_WORDS[0] else None
            if span is not None:
                speakers.setdefault(span, set()).add(who)
                lines[span] = " ".join(words)
        for span in passage.candidates([span for span in lines if len(speakers[span]) == 1], rng, depth):
            passage.use(span)
            return Asked(rng.choice(self.wordings[split]).turn(list(speakers[span]), ".", line=lines[span]))
        return None


def spoken(text: str) -> Iterator[tuple[str, str]]:
    """Yield (speaker, line) of a play's speeches and of dialogue between quotation marks."""
    speeches = [(match["who"], match["line"]) for match in _SPEECH.finditer(text)]
    speeches = [(who, line) for who, line in speeches if not _HEADINGS.match(who)]
    if len(speeches) >= FEWEST_SPEECHES and len({who for who, _ in speeches}) > 1:
        yield from speeches
    for form in _DIALOGUE:
        for match in form.finditer(text):
            who = " ".join(match["who"].split())
            if who.split()[0] not in _NO_NAMES:
                yield who, match["line"]
