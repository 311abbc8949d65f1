"""Splits share no wording and no name; facts can be answered from the statement alone."""

import random
from itertools import chain, combinations

import pytest

from data import names
from data.facts import KINDS, draw_fact, draw_facts, part
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
