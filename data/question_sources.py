"""Where questions about documents come from: the hub, local files, or facts planted in real text."""

import hashlib
import itertools
import json
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.cases import Frame
from data.documents import BOM
from data.facts import Fact, draw_facts
from data.needle_placement import stretch
from data.needles import QUESTION_OPENING, filler_room, needle_ids
from data.packing import Tokens, split_tokens
from data.python_source import PythonSource
from data.text import Splits, TextSource
from sparsekv_pl.models.seeding import random_for

GOLDEN = (5**0.5 - 1) / 2
"""Multiples of it, without their whole part, lie evenly in [0, 1) however many there are (H. Weyl, 1916)."""
SPARE_TOKENS = 32
"""A planted document stays this much shorter than it may be: text that is cut into tokens anew may take a few more."""


@dataclass(frozen=True)
class Question:
    """A question about a document."""

    id: str
    """Unique in its source and the same in every run."""
    document: str
    question: str
    answers: tuple[str, ...]
    answer_at: tuple[int, int] | None = None
    """Characters [start, end) of the document that hold the answer; None where that is not known."""
    answer_prefix: str = ""
    """How the answer is begun for the model."""
    depth: float | None = None
    """Fraction of the document before the answer, where it was chosen."""
    document_ids: tuple[str, ...] = ()
    """What the document is made of."""


class QuestionSource(ABC):
    """A place that questions come from."""

    @abstractmethod
    def samples(self, frame: Frame, max_tokens: int) -> Iterator[Question]:
        """The questions in the source's order, the same in every run; possibly without end.

        A source that makes its documents makes them so long that with frame, question and the answer's beginning they
        take ``max_tokens`` tokens. Others give whole documents.
        """


@dataclass
class PlantedQuestions(QuestionSource):
    """Facts that no document states, each on a line of its own in held-out text; the first of them is asked for.

    Question i is a function of the text, the tokenizer, the seed and i. The places of the asked facts are spread evenly
    over the document, from its beginning to its end. Facts and wordings are those that training never sees.

    Parameters
    ----------
    text
        Where text comes from. The default, the Python library's source, has 250,000 held-out tokens of SmolLM2's
        tokenizer; documents are stretches of it and may overlap.
    splits
        Shares of the text's documents: give those that the model was trained with.
    facts
        Facts in a document. The others lie anywhere; half of the time all are of one kind, the harder case.
    seed
        Of facts and stretches.
    """

    text: TextSource | None = None
    splits: Splits | None = None
    facts: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.facts < 1:
            raise ValueError(f"facts is {self.facts}: plant at least 1")

    def samples(self, frame: Frame, max_tokens: int) -> Iterator[Question]:
        """Without end. ValueError where the text is too short, or ``max_tokens`` too few."""
        source, splits = self.text or PythonSource(), self.splits or Splits()
        text = split_tokens(source, splits, "held_out", frame.tokenizer, max_tokens)
        for number in itertools.count():
            yield self._planted(frame, text, max_tokens, number)

    def _planted(self, frame: Frame, text: Tokens, max_tokens: int, number: int) -> Question:
        rng = random_for("questions", self.seed, number)
        asked, *others = draw_facts(rng, "held_out", self.facts)
        room = document_room(frame, max_tokens, asked.question, asked.answer_prefix) - SPARE_TOKENS
        needles = [needle_ids(frame, fact) for fact in (asked, *others)]
        filler = stretch(frame, text, filler_room(room, needles, max_tokens), rng)
        depth = (0.5 + number * GOLDEN) % 1
        document, start = plant(frame.decode(filler.ids), asked, depth, [(fact, rng.random()) for fact in others])
        return Question(
            id=f"planted-{self.facts}/L{max_tokens}/s{self.seed}/{number}",
            document=document,
            question=asked.question,
            answers=(asked.value,),
            answer_at=(start, start + len(asked.value)),
            answer_prefix=asked.answer_prefix,
            depth=depth,
            document_ids=tuple(filler.document_ids),
        )


def plant(text: str, asked: Fact, depth: float, others: Sequence[tuple[Fact, float]] = ()) -> tuple[str, int]:
    """``text`` with every fact on a line of its own after about its depth, and the character where the value begins.

    A fact stands at the next end of a line, or right there where no line ends any more.
    """
    document, done, start = [], 0, 0
    for fact, share in sorted([(asked, depth), *others], key=lambda pair: pair[1]):
        place = round(share * len(text))
        place = text.find("\n", place) if "\n" in text[place:] else place
        document.append(text[done:place] + "\n")
        if fact is asked:
            start = sum(map(len, document)) + fact.statement.lower().rindex(fact.value.lower())
        document.append(fact.statement + ("" if text[place : place + 1] == "\n" else "\n"))
        done = place
    return "".join([*document, text[done:]]), start


@dataclass
class LocalQuestions(QuestionSource):
    """JSON lines; where a row's answer stands in its document word for word, exactly once, its place is known.

    Parameters
    ----------
    paths
        Files.
    document_field, question_field, answer_field
        Keys, or paths such as "document.text" and "answers[0].text". The answer is a string or a list of them.
    answer_prefix
        How the answer is begun for the model: the last token before the answer is the one that is looked at.
    """

    paths: list[str]
    document_field: str = "document"
    question_field: str = "question"
    answer_field: str = "answer"
    answer_prefix: str = "The answer is"

    def samples(self, frame: Frame, max_tokens: int) -> Iterator[Question]:  # noqa: ARG002
        """ValueError names the file and the line that is missing or broken."""
        if not self.paths:
            raise ValueError("LocalQuestions got an empty list of paths: name at least one file")
        fields = self.document_field, self.question_field, self.answer_field
        for path in (Path(path).expanduser() for path in self.paths):
            try:
                lines = path.read_text(encoding="utf-8-sig").split("\n")
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(
                    f"{path}: not readable as UTF-8 text ({error}). Check the path and the file"
                ) from error
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    try:
                        row = json.loads(line)
                    except ValueError as error:
                        raise ValueError(f"{path}, line {number}: not JSON ({error}). Repair or remove it") from error
                    yield question_of(row, fields, self.answer_prefix, f"{path}, line {number}")


@dataclass
class HubQuestions(QuestionSource):
    """A Hugging Face dataset by name, streamed (the default) or downloaded whole.

    Answers are looked for in their documents as ``LocalQuestions`` does; NarrativeQA's are people's own words, so few
    are found there.

    Parameters
    ----------
    name, config, split, data_files, streaming
        As in datasets.load_dataset.
    document_field, question_field, answer_field, answer_prefix
        As in ``LocalQuestions``.
    per_document
        Most questions about one document: rows of NarrativeQA ask some 30 about each, one after another.
    """

    name: str = "deepmind/narrativeqa"
    config: str | None = None
    split: str = "validation"
    document_field: str = "document.text"
    question_field: str = "question.text"
    answer_field: str = "answers[0].text"
    answer_prefix: str = "The answer is"
    per_document: int = 1
    streaming: bool = True
    data_files: list[str] | None = None

    def samples(self, frame: Frame, max_tokens: int) -> Iterator[Question]:  # noqa: ARG002
        """ValueError where the dataset cannot be opened or a row has no such fields."""
        from datasets import load_dataset

        try:
            rows = load_dataset(
                self.name, self.config, split=self.split, streaming=self.streaming, data_files=self.data_files
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"could not open the dataset {self.name!r} (config {self.config!r}, split {self.split!r}): {error}. "
                "Check the name and the connection (HF_HUB_OFFLINE), or use LocalQuestions or PlantedQuestions"
            ) from error
        fields = self.document_field, self.question_field, self.answer_field
        asked = Counter[tuple[str, ...]]()
        for number, row in enumerate(rows):
            question = question_of(row, fields, self.answer_prefix, f"{self.name}/{self.split}/{number}")
            asked[question.document_ids] += 1
            if asked[question.document_ids] <= self.per_document:
                yield question


def document_room(frame: Frame, max_tokens: int, question: str, answer_prefix: str) -> int:
    """Tokens that a document may take where everything that the model reads is ``max_tokens`` long.

    Raises ValueError where nothing remains.
    """
    asked = frame.encode(f"{QUESTION_OPENING}{question}{frame.question_suffix}{answer_prefix}")
    room = max_tokens - len(frame.prefix_ids) - len(asked)
    if room < 1:
        raise ValueError(
            f"max_tokens is {max_tokens}, but chat frame, question and the answer's beginning take {max_tokens - room} "
            f"tokens alone: give more ({question[:80]!r})"
        )
    return room


def question_of(row: Mapping[str, Any], fields: tuple[str, str, str], answer_prefix: str, name: str) -> Question:
    """The question in a dataset's row; ``fields`` are the paths of document, question and answer."""
    document, question = (_text(row, field, name) for field in fields[:2])
    found = value_at(row, fields[2], name)
    answers = tuple(found) if isinstance(found, (list, tuple)) else (found,)
    if not answers or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"{name}: {fields[2]!r} holds {found!r:.80}: name a field with a string or a list of strings")
    digest = hashlib.blake2b(document.encode(), digest_size=12).hexdigest()
    return Question(
        name, document, question, answers, located(document, answers), answer_prefix, document_ids=(digest,)
    )


def located(document: str, answers: Sequence[str]) -> tuple[int, int] | None:
    """Characters [start, end) of the first answer that stands in the document exactly once, as words of its own."""
    for answer in filter(None, map(str.strip, answers)):
        # Letters of other scripts are not looked at: Chinese has no spaces between its words.
        places = list(re.finditer(rf"(?<![A-Za-z0-9]){re.escape(answer)}(?![A-Za-z0-9])", document))
        if len(places) == 1:
            return places[0].span()
    return None


def value_at(row: Any, path: str, name: str) -> Any:
    """What stands at a path such as "answers[0].text"; ValueError with ``name`` where nothing does."""
    value = row
    for key, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path):
        try:
            value = value[key] if key else value[int(index)]
        except (KeyError, IndexError, TypeError) as error:
            has = f"has {sorted(value)}" if isinstance(value, Mapping) else f"holds {value!r:.80}"
            raise ValueError(f"{name}: there is no {path!r}, it {has} there: set the field to what it has") from error
    return value


def _text(row: Mapping[str, Any], field: str, name: str) -> str:
    value = value_at(row, field, name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name}: {field!r} holds {value!r:.80}: name a field with text")
    return value.removeprefix(BOM)
