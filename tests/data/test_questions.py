"""Questions about documents: the answer's tokens, cutting, and the errors of sources."""

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from data.cases import Frame
from data.facts import draw_facts
from data.question_sources import (
    HubQuestions,
    LocalQuestions,
    PlantedQuestions,
    Question,
    QuestionSource,
    located,
    plant,
    value_at,
)
from data.questions import QuestionData
from data.text import EmbeddedText
from sparsekv_pl.models.batch import CaseBatch

Write = Callable[..., str]


@pytest.fixture(scope="module")
def bpe(tiny_models: dict[str, str]) -> Any:
    """A tokenizer whose tokens are words and parts of words."""
    return AutoTokenizer.from_pretrained(tiny_models["llama"])


@pytest.fixture
def lines(tmp_path: Path) -> Write:
    """Write rows (or lines) as JSONL and return the path."""

    def write(*rows: Any) -> str:
        path = tmp_path / "questions.jsonl"
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return str(path)

    return write


def batches(tokenizer: Any, source: QuestionSource | None, **settings: Any) -> list[CaseBatch]:
    data = QuestionData(source, **settings)
    data.tokenizer = tokenizer
    data.setup("predict")
    return list(data.predict_dataloader())


def answer_of(tokenizer: Any, batch: CaseBatch) -> str:
    """The text of the answer's tokens."""
    (case,) = batch["cases"]
    assert case.answer_span is not None
    return str(tokenizer.decode(batch["context_ids"][0, slice(*case.answer_span)])).strip()


def planted(**settings: Any) -> PlantedQuestions:
    return PlantedQuestions(EmbeddedText(), **settings)


def test_planted_answers_are_where_they_are_said_to_be(bpe: Any) -> None:
    frame = Frame(bpe)
    for batch in batches(bpe, planted(), samples=40, max_tokens=400):
        (case,) = batch["cases"]
        context, asked = batch["context_ids"][0].tolist(), batch["continuation_ids"][0].tolist()
        # Where a value begins inside a token (after an opening quote), that token belongs to it.
        assert case.answers[0].lower() in answer_of(bpe, batch).lower()
        assert len(answer_of(bpe, batch)) <= len(case.answers[0]) + 2
        assert case.context.lower().count(case.answers[0].lower()) >= 1
        assert context[: len(frame.prefix_ids)] == frame.prefix_ids
        assert frame.decode(asked) == f"{case.question}{frame.question_suffix}{case.answer_prefix}"
        assert case.question.startswith("\n\n")
        assert 400 - 48 <= len(context) + len(asked) <= 400
        assert batch["continuation_lengths"].tolist() == [len(asked)]


def test_planted_answers_are_spread_over_the_whole_document(bpe: Any) -> None:
    found = batches(bpe, planted(facts=1), samples=40, max_tokens=1000)
    places = [batch["cases"][0].answer_span[0] / batch["context_ids"].shape[1] for batch in found]  # type: ignore[index]
    counts = [sum(tenth / 10 <= place < (tenth + 1) / 10 for place in places) for tenth in range(10)]
    assert sum(counts) == 40
    assert min(counts) >= 2
    assert max(counts) <= 7


def test_a_planted_question_is_the_same_in_every_run(bpe: Any, plain_tokenizer: Any) -> None:
    few, many = (batches(bpe, planted(), samples=n, max_tokens=400) for n in (2, 5))
    for one, other in zip(few, many, strict=False):
        assert one["cases"] == other["cases"]
        assert one["context_ids"].equal(other["context_ids"])
    assert len({batch["cases"][0].id for batch in many}) == 5
    (other_seed,) = batches(bpe, planted(seed=1), samples=1, max_tokens=400)
    assert other_seed["cases"][0].answers != few[0]["cases"][0].answers
    (plain,) = batches(plain_tokenizer, planted(), samples=1, max_tokens=2000)
    assert answer_of(plain_tokenizer, plain) == plain["cases"][0].answers[0]


@pytest.mark.parametrize("depth, ahead", [(0.0, 1), (0.1, 1), (0.2, 2), (0.99, 3)])
def test_facts_stand_on_lines_of_their_own(depth: float, ahead: int) -> None:
    asked, other = draw_facts(random.Random(0), "held_out", 2)
    text, start = plant("one\ntwo two\nthree three", asked, depth, [(other, 0.5)])
    assert text[start : start + len(asked.value)].lower() == asked.value.lower()
    lines = [line for line in text.split("\n") if line]
    assert sorted(lines) == sorted(["one", "two two", "three three", asked.statement, other.statement])
    lines.remove(other.statement)
    assert lines.index(asked.statement) == ahead


@pytest.mark.parametrize(
    "document, answers, place",
    [
        ("It was John who came.", ["John"], (7, 11)),
        ("It was John, said John.", ["John"], None),
        ("It was Johnson.", ["John"], None),
        ("It was Mary.", ["John", " Mary "], (7, 11)),
        ("Es war (a+b)* da.", ["(a+b)*"], (7, 13)),
        ("他在北京工作", ["北京"], (2, 4)),
        ("Nothing.", ["", "John"], None),
    ],
)
def test_an_answer_is_located_where_it_stands_once(document: str, answers: list[str], place: Any) -> None:
    assert located(document, answers) == place


def test_paths_into_rows() -> None:
    row = {"document": {"text": "d"}, "answers": [{"text": "a"}, {"text": "b"}]}
    assert value_at(row, "document.text", "row") == "d"
    assert value_at(row, "answers[1].text", "row") == "b"
    for path in ("document.body", "answers[2].text", "answers.text", "document.text.more"):
        with pytest.raises(ValueError, match="row 7: there is no"):
            value_at(row, path, "row 7")


def test_local_questions_and_their_cut(bpe: Any, lines: Write, caplog: pytest.LogCaptureFixture) -> None:
    text = "word " * 300
    path = lines(
        {
            "story": f"The cat was called Zebulon. {text}",
            "asked": "What was the cat called?",
            "said": ["Tom", "Zebulon"],
        },
        "",
        {"story": f"{text} The cat was called Zebulon.", "asked": "What was the cat called?", "said": "Zebulon"},
        {"story": "A cat.", "asked": "Why?", "said": "Nobody knows"},
    )
    source = LocalQuestions([path], "story", "asked", "said", answer_prefix="It is")
    early, late, unknown = batches(bpe, source, samples=3, max_tokens=200)
    assert answer_of(bpe, early) == "Zebulon"
    assert early["cases"][0].answers == ("Tom", "Zebulon")
    for batch in (early, late):
        assert batch["context_ids"].shape[1] + batch["continuation_ids"].shape[1] == 200
    assert late["cases"][0].context.startswith("word word")
    assert late["cases"][0].answer_span is None
    assert unknown["cases"][0].answer_span is None
    assert unknown["cases"][0].context == "A cat."
    assert "2 of 3 documents are longer than 200 tokens" in caplog.text
    assert late["cases"][0].id.endswith("line 3")
    assert str(bpe.decode(early["continuation_ids"][0])).endswith("It is")


def test_an_answer_that_is_cut_in_two_has_no_place(bpe: Any, lines: Write) -> None:
    path = lines({"document": "One word and then Zebulonissimus.", "question": "Who?", "answer": "Zebulonissimus"})
    source = LocalQuestions([path])
    (whole,) = batches(bpe, source, samples=1, max_tokens=500)
    (case,) = whole["cases"]
    assert case.answer_span is not None
    asked, (start, end) = whole["continuation_ids"].shape[1], case.answer_span
    assert end - start > 1
    for room, span in ((end, case.answer_span), (end - 1, None), (start + 1, None)):
        (cut,) = batches(bpe, source, samples=1, max_tokens=asked + room)
        assert cut["context_ids"].shape[1] == room
        assert cut["cases"][0].answer_span == span


def test_lengths_are_those_of_the_longest_prompt(bpe: Any, lines: Write) -> None:
    rows = [{"document": "word " * n, "question": "Which?", "answer": "word"} for n in (20, 50, 30)]
    data = QuestionData(LocalQuestions([lines(*rows)]), samples=3, max_tokens=8000)
    data.tokenizer = bpe
    data.setup()
    sizes = [batch["context_ids"].shape[1] + batch["continuation_ids"].shape[1] for batch in data.predict_dataloader()]
    assert data.lengths == [max(sizes)]
    assert sizes.index(max(sizes)) == 1


@pytest.mark.parametrize(
    "row, message",
    [
        ("{", "line 2: not JSON"),
        (
            {"document": "text", "question": "Why?"},
            "line 2: there is no 'answer', it has ..document., .question.. there",
        ),
        ({"document": "", "question": "Why?", "answer": "So"}, "line 2: 'document' holds ''"),
        ({"document": "text", "question": 3, "answer": "So"}, "line 2: 'question' holds 3"),
        ({"document": "text", "question": "Why?", "answer": 3}, "line 2: 'answer' holds 3"),
        ({"document": "text", "question": "Why?", "answer": []}, r"line 2: 'answer' holds \[\]"),
    ],
)
def test_broken_rows_are_refused_by_file_and_line(bpe: Any, lines: Write, row: Any, message: str) -> None:
    path = lines({"document": "text", "question": "Why?", "answer": "So"}, row)
    with pytest.raises(ValueError, match=message):
        batches(bpe, LocalQuestions([path]), samples=2)


def test_too_little_is_refused(bpe: Any, lines: Write, tmp_path: Path) -> None:
    path = lines({"document": "text", "question": "Why?", "answer": "So"})
    with pytest.raises(ValueError, match=r"has 1 questions and 2 were requested: set data.samples to 1"):
        batches(bpe, LocalQuestions([path]), samples=2)
    with pytest.raises(ValueError, match="max_tokens is 5, but chat frame, question"):
        batches(bpe, LocalQuestions([path]), samples=1, max_tokens=5)
    with pytest.raises(ValueError, match=r"needle\(s\)"):
        batches(bpe, planted(), samples=1, max_tokens=200)
    with pytest.raises(ValueError, match="empty list of paths"):
        batches(bpe, LocalQuestions([]), samples=1)
    with pytest.raises(ValueError, match="not readable"):
        batches(bpe, LocalQuestions([str(tmp_path / "gone.jsonl")]), samples=1)
    with pytest.raises(ValueError, match="samples is 0"):
        QuestionData(samples=0)
    with pytest.raises(ValueError, match="facts is 0"):
        PlantedQuestions(facts=0)


def test_a_dataset_is_read_by_name_and_its_documents_in_turn(bpe: Any, lines: Write) -> None:
    def row(document: str, question: str, answer: str) -> dict[str, Any]:
        return {"document": {"text": document}, "question": {"text": question}, "answers": [{"text": answer}]}

    path = lines(
        row("The sky was green.", "Which colour?", "green"),
        row("The sky was green.", "What was green?", "sky"),
        row("The dog barked.", "Who barked?", "dog"),
    )
    frame = Frame(bpe)
    for streaming in (True, False):
        source = HubQuestions("json", split="train", data_files=[path], streaming=streaming)
        once = list(source.samples(frame, 100))
        assert [question.question for question in once] == ["Which colour?", "Who barked?"]
        source.per_document = 2
        both = list(source.samples(frame, 100))
        assert [question.answer_at for question in both] == [(12, 17), (4, 7), (4, 7)]
        assert [question.id for question in both] == [f"json/train/{i}" for i in range(3)]
    with pytest.raises(ValueError, match="json/train/0: there is no 'summary'"):
        list(HubQuestions("json", split="train", data_files=[path], document_field="summary").samples(frame, 100))


def test_a_dataset_that_cannot_be_opened_is_explained(bpe: Any) -> None:
    with pytest.raises(ValueError, match=r"could not open the dataset 'nobody/nothing'.*LocalQuestions"):
        next(HubQuestions("nobody/nothing").samples(Frame(bpe), 100))


class Slow:
    """A tokenizer that does not map tokens to characters."""

    is_fast = False

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


class Given(QuestionSource):
    """One question."""

    def __init__(self, place: tuple[int, int] | None) -> None:
        self.place = place

    def samples(self, frame: Frame, max_tokens: int) -> Any:  # noqa: ARG002
        """The same one for ever."""
        return itertools.repeat(Question("given", "A tall tree.", "How tall?", ("tall",), self.place))


def test_a_slow_tokenizer_is_refused_where_a_place_is_asked_for(bpe: Any) -> None:
    with pytest.raises(ValueError, match="use a fast tokenizer"):
        batches(Slow(bpe), Given((2, 6)), samples=1)
    (batch,) = batches(Slow(bpe), Given(None), samples=1)
    assert batch["cases"][0].answer_span is None
