"""Sources of questions about documents: the hub, local files, or facts planted in real text."""

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
from data.documents import BOM, check_files
from data.facts import Fact, draw_facts
from data.needle_placement import stretch
from data.needles import filler_room, needle_ids
from data.packing import Tokens, split_tokens
from data.python_source import PythonSource
from data.text import Splits, TextSource
from sparsekv_pl.models.chat_frame import QUESTION_OPENING
from sparsekv_pl.models.seeding import random_for

GOLDEN = (5**0.5 - 1) / 2
"""Reciprocal of the golden ratio: fractional parts of its multiples spread evenly in [0, 1) (H. Weyl, 1916)."""
SPARE_TOKENS = 32
"""Tokens by which a planted document is shorter than allowed, as tokenising it again may give a few more tokens."""


@dataclass(frozen=True)
class Question:
    """A question about a document."""

    id: str
    """Unique in its source and the same in every run."""
    document: str
    question: str
    answers: tuple[str, ...]
    """The expected answers."""
    answer_at: tuple[int, int] | None = None
    """Characters [start, end) of the document that contain the answer; None if unknown."""
    answer_prefix: str = ""
    """The beginning of the answer, given to the model."""
    depth: float | None = None
    """Fraction of the document before the answer, if it was chosen."""
    document_ids: tuple[str, ...] = ()
    """The documents that this one is made of."""


class QuestionSource(ABC):
    """A source of questions."""

    @abstractmethod
    def samples(self, frame: Frame, max_tokens: int) -> Iterator[Question]:
        """Yield the questions in the source's order, the same in every run; possibly endless.

        A source that makes its documents makes prompts of about ``max_tokens`` tokens, with frame, question and the
        answer's beginning. Others yield whole documents.
        """


@dataclass
class PlantedQuestions(QuestionSource):
    """Invented facts, each on its own line in held-out text; the question asks for the first of them.

    Question i is a function of the text, the tokenizer, the seed and i. The positions of the asked facts are spread
    evenly over the document. Facts and wordings are those that training never sees.

    Parameters
    ----------
    text
        Source of the text. The default, the Python library's source, has 250,000 held-out tokens of SmolLM2's
        tokenizer; documents are stretches of it and may overlap.
    splits
        Shares of the text's documents: use those of the model's training.
    facts
        Number of facts in a document. The others are anywhere; half of the time all are of one kind, which is harder.
    seed
        Seed of the facts and stretches.
    """

    text: TextSource | None = None
    splits: Splits | None = None
    facts: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.facts < 1:
            raise ValueError(f"facts is {self.facts}: plant at least 1")

    def samples(self, frame: Frame, max_tokens: int) -> Iterator[Question]:
        """Yield questions, endlessly. Raises ``ValueError`` if the text is too short or ``max_tokens`` too small."""
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
    """Insert every fact into ``text`` on its own line near its depth; return the text and where the value begins.

    A fact is inserted at the next line end, or at its depth if there is none.
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
    """Questions from JSON lines; an answer's position is known if it occurs in its document exactly once.

    Parameters
    ----------
    paths
        The files.
    document_field, question_field, answer_field
        Keys, or paths such as "document.text" and "answers[0].text". The answer is a string or a list of strings.
    answer_prefix
        The beginning of the answer, given to the model: the attention of its last token is measured.

    Raises
    ------
    ValueError
        If there are no paths, or one of them does not exist.
    """

    paths: list[str]
    document_field: str = "document"
    question_field: str = "question"
    answer_field: str = "answer"
    answer_prefix: str = "The answer is"

    def __post_init__(self) -> None:
        check_files("LocalQuestions", self.paths)

    def samples(self, frame: Frame, max_tokens: int) -> Iterator[Question]:  # noqa: ARG002
        """Yield the questions; ``ValueError`` names the file and the line that is missing or broken."""
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
    """Questions from a Hugging Face dataset, streamed (the default) or downloaded.

    Answers are searched in their documents as in ``LocalQuestions``; NarrativeQA's answers are free-form, so few are
    found there.

    Parameters
    ----------
    name, config, split, data_files, streaming
        As in datasets.load_dataset.
    document_field, question_field, answer_field, answer_prefix
        As in ``LocalQuestions``.
    per_document
        Most questions about one document: NarrativeQA has about 30 per document, one after another.
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
        """Yield the questions; ``ValueError`` if the dataset cannot be opened or a row has no such fields."""
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
    """Return the tokens that a document may take in a prompt of ``max_tokens`` tokens.

    Raises ``ValueError`` if none remain.
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
    """Make the question of a dataset's row; ``fields`` are the paths of document, question and answer.

    Raises ``ValueError`` with ``name`` for missing fields or fields of the wrong type.
    """
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
    """Find characters [start, end) of the first answer that occurs in the document exactly once, as whole words."""
    for answer in filter(None, map(str.strip, answers)):
        # Only Latin letters and digits bound words: Chinese, for example, has no spaces between words.
        places = list(re.finditer(rf"(?<![A-Za-z0-9]){re.escape(answer)}(?![A-Za-z0-9])", document))
        if len(places) == 1:
            return places[0].span()
    return None


def value_at(row: Any, path: str, name: str) -> Any:
    """Return the value at a path such as "answers[0].text"; ``ValueError`` with ``name`` if there is none."""
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
