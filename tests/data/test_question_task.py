"""Evaluation tasks of questions: exact lengths, the frame of kvpress, held-out words, and what the press may see."""

import random
from difflib import SequenceMatcher
from functools import cache
from typing import Any

import pytest

from data.cases import Case, Frame
from data.distractors import Distractors
from data.evaluation import EvaluationData
from data.fact_task import ANSWER_SLACK
from data.packing import Tokens, take_tokens
from data.passage import Passage
from data.question_kinds import QUESTION_KINDS
from data.question_task import ASKED_KINDS, QUERY_TOKENS, QuestionTask
from data.text import Document
from data.unseen_facts import UNSEEN_KINDS
from sparsekv_pl.metrics import retrieval_scores
from tests.data.dialogue import PLAY
from tests.data.test_question_kinds import fields_of
from tests.data.test_question_stream import SPLITS, Scenes


@cache
def encoded(tokenizer: Any, text: str) -> Tokens:
    return take_tokens([Document("play", text)], tokenizer, 10**6)


def case(tokenizer: Any, kind: str, seed: int, query_aware: bool = False, text: str = PLAY, length: int = 1200) -> Case:
    haystack = encoded(tokenizer, text)
    rng = random.Random(seed)
    return QuestionTask(kind).case(Frame(tokenizer), haystack, length, None, rng, query_aware)


@pytest.mark.parametrize("kind", ASKED_KINDS)
@pytest.mark.parametrize("query_aware", [False, True])
def test_a_case_has_its_length_and_is_asked_in_held_out_words(
    tokenizer: Any, plain_tokenizer: Any, kind: str, query_aware: bool
) -> None:
    for chosen in (tokenizer, plain_tokenizer):
        frame = Frame(chosen)
        for seed in range(2):
            one = case(chosen, kind, seed, query_aware)
            info, context = one.info, chosen.decode(one.context_ids)
            assert len(one.context_ids) == 1200
            assert info.task == kind
            assert info.question.startswith("\n\n")
            fields_of(ASKED_KINDS[kind], "held_out", info.question.removeprefix("\n\n"))
            assert context.endswith(info.question) == query_aware
            asked = "" if query_aware else info.question
            assert chosen.decode(one.continuation_ids) == f"{asked}{frame.question_suffix}{info.answer_prefix}"
            shown = " ".join(context.split())
            told = info.answers[0].split(", ")[:1] if kind == "counting" else info.answers
            assert kind == "order" or all(answer.lower() in shown.lower() for answer in told)
            answer = " and ".join([", ".join(info.answers[:-1]), info.answers[-1]][len(info.answers) == 1 :])
            assert info.max_new_tokens == len(frame.encode(f" {answer}")) + ANSWER_SLACK
            assert retrieval_scores(f" {answer}", info.answers)["exact"] == 1
            assert one == case(chosen, kind, seed, query_aware)
            assert (info.document_ids, 0 <= info.depth <= 1) == (("play",), True)  # type: ignore[operator]


def test_tasks_go_over_lengths_depths_and_held_out_documents(tokenizer: Any) -> None:
    tasks = [QuestionTask("quotes"), QuestionTask("unseen"), QuestionTask("unseen_reason")]
    data = EvaluationData(Scenes(), SPLITS, tasks, [700, 900], [0.0, 0.5, 1.0], cases_per_cell=2, windows=0)  # type: ignore[arg-type]
    data.tokenizer = tokenizer
    data.setup()
    cases = [info for batch in data.test_dataloader() for info in batch["cases"]]
    assert len({info.id for info in cases}) == len(cases) == 3 * 2 * 3 * 2
    assert {info.task for info in cases} == {"quotes", "unseen", "unseen_reason"}
    texts = {document.id: document.text for document in Scenes().documents()}
    assert {SPLITS.of(texts[name]) for info in cases for name in info.document_ids} == {"held_out"}
    for info in cases:
        if info.task == "quotes":
            [answer] = info.answers
            assert len(answer.split()) == 8
            half = " ".join([*answer.split()[:4], *["other"] * 4])
            assert retrieval_scores(half, [answer])["words"] == 0.5


def test_what_cannot_be_asked_is_said(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"kind is 'facts': give one of told, distractors, quotes, .*unseen_trade"):
        QuestionTask("facts")
    prose = "The old mill stands by the river, and it has no door at all. " * 400
    with pytest.raises(ValueError, match=r"task speakers found nothing to ask in 64 stretches .* length of 1200"):
        case(tokenizer, "speakers", 0, text=prose)
    with pytest.raises(ValueError, match=r"task unseen found nothing .* length of 80 tokens: give longer contexts"):
        case(tokenizer, "unseen", 0, length=80)
    with pytest.raises(ValueError, match="haystack is empty"):
        QuestionTask("quotes").case(Frame(tokenizer), Tokens(), 500, 0.5, random.Random(0))
    with pytest.raises(ValueError, match=r"depth is 2"):
        QuestionTask("quotes").case(Frame(tokenizer), Tokens([1] * 900, [("a", 900)]), 500, 2, random.Random(0))


def test_every_kind_has_a_task() -> None:
    assert set(ASKED_KINDS) == (set(QUESTION_KINDS) - {"facts"}) | {"distractors_8", "unseen"} | {
        f"unseen_{name}" for name in UNSEEN_KINDS
    }
    assert QUERY_TOKENS < 256


def test_eight_keys_differ_in_little_and_one_is_asked_for() -> None:
    shared = []
    for seed in range(12):
        rng = random.Random(seed)
        asked = Distractors((8, 8), one=True).ask(Passage(), rng, "held_out")
        assert asked is not None
        assert len(asked.hidden) == len(set(asked.hidden)) == 8
        assert len(asked.turn.answers) == 1
        assert sum(asked.turn.answers[0] in text for text in asked.hidden) == 1
        shared.append(min(SequenceMatcher(None, asked.hidden[0], other).ratio() for other in asked.hidden[1:]))
    assert min(shared) > 0.7
    plain = [Distractors().ask(Passage(), random.Random(seed), "train") for seed in range(20)]
    assert {len(one.hidden) for one in plain if one} <= {3, 4, 5, 6}
