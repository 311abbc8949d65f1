"""Facts: no wording or name in two splits; in contexts of the exact length at the exact depth."""

import random
from itertools import chain, combinations

import pytest

from data import names
from data.cases import Frame
from data.fact_task import ANSWER_SLACK, Facts
from data.facts import KINDS, draw_fact, draw_facts, part
from data.packing import Tokens
from data.text import EmbeddedText
from data.wordings import GENERIC_QUESTIONS, GENERIC_STATEMENTS, KIND_WORDINGS

SPLITS = ("train", "validation", "held_out")


def _strings(split):
    """Statements, and questions with their answer prefixes, as templates."""
    own = [wording for wordings in KIND_WORDINGS[split].values() for wording in wordings]
    statements = [*GENERIC_STATEMENTS[split], *(wording.statement for wording in own)]
    questions = [*GENERIC_QUESTIONS[split], *((wording.question, wording.answer_prefix) for wording in own)]
    return set(statements), {question for question, _ in questions}, {prefix for _, prefix in questions}


@pytest.mark.parametrize(("one", "other"), list(combinations(SPLITS, 2)))
def test_no_wording_in_two_splits(one, other):
    for mine, theirs in zip(_strings(one), _strings(other), strict=True):
        assert mine
        assert not mine & theirs


@pytest.mark.parametrize("pool", ["FIRST_NAMES", "LAST_NAMES", "PLACES", "FACILITIES", "WORDS", "COLOURS", "OBJECTS"])
def test_no_name_in_two_splits(pool):
    items = getattr(names, pool)
    parts = [part(items, split) for split in SPLITS]
    assert all(parts)
    assert len(set(items)) == len(items)
    assert sorted(chain.from_iterable(parts)) == sorted(items)


def test_many_wordings_kinds_and_subjects():
    assert len(_strings("train")[0]) >= 24
    assert len(_strings("train")[1]) >= 12
    facts = [draw_fact(random.Random(i), "train") for i in range(600)]
    assert len({fact.subject for fact in facts}) > 500
    assert {fact.kind for fact in facts} == {kind.name for kind in KINDS if not kind.held_out_only}
    held_out = {draw_fact(random.Random(i), "held_out").kind for i in range(600)}
    assert held_out == {kind.name for kind in KINDS}


@pytest.mark.parametrize("split", SPLITS)
def test_statement_holds_subject_and_value_and_question_holds_the_subject(split):
    for i in range(400):
        fact = draw_fact(random.Random(i), split)
        statement = fact.statement.lower()
        assert fact.subject.lower() in statement
        assert fact.value.lower() in statement
        assert fact.subject.lower() in fact.question.lower()
        assert fact.value.lower() not in fact.question.lower()
        assert "{" not in fact.statement + fact.question + fact.answer_prefix
        assert fact.answer_prefix == fact.answer_prefix.strip()


def test_facts_of_one_case_differ_in_subject_and_value():
    for i in range(100):
        facts = draw_facts(random.Random(i), "train", 3)
        assert len({fact.subject for fact in facts}) == len({fact.value for fact in facts}) == 3


@pytest.fixture(scope="module")
def documents():
    """The beginning of two topics."""
    return [(document.id, document.text[:3000]) for document, _ in zip(EmbeddedText().documents(), "ab", strict=False)]


def _haystack(tokenizer, documents) -> Tokens:
    text = Tokens()
    for name, content in documents:
        text.append(name, tokenizer.encode(content, add_special_tokens=False))
    return text


def _case(tokenizer, documents, length=500, depth: float | None = 0.5, seed=0, query_aware=False, needles=1):
    frame = Frame(tokenizer)
    haystack = _haystack(tokenizer, documents)
    return frame, Facts(needles).case(frame, haystack, length, depth, random.Random(seed), query_aware)


def _find(ids, part):
    return [i for i in range(len(ids)) if ids[i : i + len(part)] == part]


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("query_aware", [False, True])
@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
def test_the_fact_lies_at_its_exact_token(tokenizer, plain_tokenizer, documents, chat, query_aware, depth):
    tokenizer = tokenizer if chat else plain_tokenizer
    for seed in range(5):
        frame, case = _case(tokenizer, documents, depth=depth, seed=seed, query_aware=query_aware)
        [fact] = draw_facts(random.Random(seed), "held_out", 1)
        needle, asked = frame.encode(f"\n{fact.statement}\n"), frame.encode(case.info.question)
        assert len(case.context_ids) == 500
        assert case.context_ids[: len(frame.prefix_ids)] == frame.prefix_ids
        filler = 500 - len(frame.prefix_ids) - len(needle) - (len(asked) if query_aware else 0)
        assert _find(case.context_ids, needle) == [len(frame.prefix_ids) + round(depth * filler)]
        assert case.info.depth == depth
        assert (case.context_ids[-len(asked) :] == asked) == query_aware
        before = "" if query_aware else f"\n\n{fact.question}"
        assert frame.decode(case.continuation_ids) == f"{before}{frame.question_suffix}{fact.answer_prefix}"


def test_the_case_says_what_is_asked(tokenizer, documents):
    frame, case = _case(tokenizer, documents)
    info = case.info
    assert info.task == "facts"
    assert info.answers[0] in info.context
    assert info.answers[0] not in info.question + info.answer_prefix
    assert info.max_new_tokens == len(frame.encode(f" {info.answers[0]}")) + ANSWER_SLACK
    assert set(info.document_ids) <= {name for name, _ in documents}
    assert info.document_ids
    assert info.context == frame.decode(case.context_ids[len(frame.prefix_ids) :])


def test_the_filler_is_the_haystack_uncut(tokenizer, documents):
    frame, case = _case(tokenizer, documents)
    [fact] = draw_facts(random.Random(0), "held_out", 1)
    before, after = frame.decode(case.context_ids[len(frame.prefix_ids) :]).split(f"\n{fact.statement}\n")
    assert before + after in frame.decode(_haystack(tokenizer, documents).ids)


def test_a_case_is_a_function_of_its_draw(tokenizer, documents):
    assert _case(tokenizer, documents)[1] == _case(tokenizer, documents)[1]
    others = {_case(tokenizer, documents, seed=seed)[1].info.question for seed in range(10)}
    assert len(others) == 10
    assert 0 <= _case(tokenizer, documents, depth=None)[1].info.depth <= 1


@pytest.mark.parametrize("depth", [0.0, 1.0])
def test_other_facts_are_hidden_beside_the_asked_one(tokenizer, documents, depth):
    frame, case = _case(tokenizer, documents, length=1500, depth=depth, needles=3)
    facts = draw_facts(random.Random(0), "held_out", 3)
    needles = [frame.encode(f"\n{fact.statement}\n") for fact in facts]
    places = [_find(case.context_ids, needle) for needle in needles]
    assert [len(found) for found in places] == [1, 1, 1]
    assert len(case.context_ids) == 1500
    ordered = sorted(range(3), key=lambda i: places[i])
    assert ordered[0 if depth == 0 else -1] == 0
    assert (case.info.task, case.info.answers) == ("facts-3", (facts[0].value,))


def test_what_does_not_fit_is_said(tokenizer, documents):
    with pytest.raises(ValueError, match=r"1 needle\(s\) of \d+ tokens beside 7 tokens .* context of 60 tokens"):
        _case(tokenizer, documents, length=60)
    frame = Frame(tokenizer)
    [fact] = draw_facts(random.Random(0), "held_out", 1)
    least = len(frame.prefix_ids) + len(frame.encode(f"\n{fact.statement}\n")) + 1
    assert len(_case(tokenizer, documents, length=least)[1].context_ids) == least
    with pytest.raises(ValueError, match=f"give at least {least},"):
        _case(tokenizer, documents, length=least - 1)
    with pytest.raises(ValueError, match=r"beside \d\d+ tokens of prefix and question"):
        _case(tokenizer, documents, length=least, query_aware=True)
    with pytest.raises(ValueError, match="haystack is empty"):
        _case(tokenizer, [])
    with pytest.raises(ValueError, match=r"haystack has 30\d\d tokens"):
        _case(tokenizer, documents[1:], length=9000)
    with pytest.raises(ValueError, match=r"depth is -0.1"):
        _case(tokenizer, documents, depth=-0.1)
    with pytest.raises(ValueError, match="needles is 0"):
        Facts(0)


def test_a_kind_whose_values_are_used_up_is_followed_by_others() -> None:
    """Twelve objects are held out: twenty facts of that kind alone would be drawn for ever."""
    facts = draw_facts(random.Random(0), "held_out", 20)
    kinds = [fact.kind for fact in facts]
    assert kinds.count(kinds[0]) >= 12 and len(set(kinds)) > 2
    assert len({fact.value for fact in facts}) == len({fact.subject for fact in facts}) == 20
