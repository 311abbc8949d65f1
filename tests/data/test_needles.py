"""Needles at the exact token, in contexts of the exact length."""

import pytest

from data.needles import NeedleTask
from data.packing import Tokens
from sparsekv_pl.models.batch import IGNORE
from sparsekv_pl.models.chat_frame import chat_frame


@pytest.fixture
def text(tokenizer):
    ids = tokenizer.encode("some words that go on and on until the end comes near. " * 60, add_special_tokens=False)
    return Tokens(ids, [("a", 1000), ("b", len(ids) - 1000)])


def _task(tokenizer, **options):
    return NeedleTask(tokenizer, **({"context_tokens": 400, "split": "held_out"} | options))


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_needle_lies_at_its_exact_token(tokenizer, text, depth, index):
    task = _task(tokenizer)
    case = task.case(index, text, depth)
    prefix = tokenizer.encode(chat_frame(tokenizer)[0], add_special_tokens=False)
    needle = tokenizer.encode(f"\n{case.fact.statement}\n", add_special_tokens=False)
    assert len(case.context_ids) == 400
    start = len(prefix) + round(depth * (400 - len(prefix) - len(needle)))
    assert case.context_ids[: len(prefix)] == prefix
    assert case.context_ids[start : start + len(needle)] == needle
    assert case.position == start - len(prefix)
    filler = case.context_ids[len(prefix) : start] + case.context_ids[start + len(needle) :]
    source = " ".join(map(str, text.ids))
    assert " ".join(map(str, filler)) in source
    assert tokenizer.decode(filler[:1]) == " "  # begins at a word


@pytest.mark.parametrize(("supervise", "end"), [("value", ""), ("value_and_stop", ".")])
def test_labels_are_the_value(tokenizer, text, supervise, end):
    case = _task(tokenizer, supervise=supervise).case(3, text, 0.5)
    supervised = [label for label in case.labels if label != IGNORE]
    assert tokenizer.decode(supervised) == f" {case.fact.value}{end}"
    assert case.labels[0] == IGNORE
    assert all(label in (IGNORE, i) for label, i in zip(case.labels, case.continuation_ids, strict=True))
    suffix = chat_frame(tokenizer)[1]
    expected = f"\n\n{case.fact.question}{suffix}{case.fact.answer_prefix} {case.fact.value}."
    assert tokenizer.decode(case.continuation_ids) == expected


def test_case_is_a_function_of_seed_and_index(tokenizer, text):
    task = _task(tokenizer)
    assert task.case(5, text, 0.5) == _task(tokenizer).case(5, text, 0.5)
    assert task.case(5, text, 0.5).fact != task.case(6, text, 0.5).fact
    assert task.case(5, text, 0.5).fact != _task(tokenizer, seed=1).case(5, text, 0.5).fact


def test_distractors_are_hidden_in_a_third_of_the_cases(tokenizer, text):
    task = _task(tokenizer, context_tokens=1200, split="train", needles=(1, 3))
    lines = [tokenizer.decode(task.case(i, text).context_ids).count("\n") for i in range(90)]
    hiding = sum(count > 4 for count in lines)  # a needle brings two line breaks, a question first two more
    assert 15 <= hiding <= 45
    both = _task(tokenizer, context_tokens=1200, needles=(3, 3)).case(0, text, 0.5)
    assert tokenizer.decode(both.context_ids).count("\n") == 6
    assert len(both.context_ids) == 1200


def test_documents_of_the_filler_are_named(tokenizer, text):
    named = {tuple(_task(tokenizer).case(i, text).document_ids) for i in range(30)}
    assert named <= {("a",), ("b",), ("a", "b")}
    assert len(named) > 1


def test_bad_input_is_named(tokenizer, text):
    with pytest.raises(ValueError, match="a context of 40 tokens: give at least"):
        _task(tokenizer, context_tokens=40).case(0, text)
    with pytest.raises(ValueError, match="haystack is empty"):
        _task(tokenizer).case(0, Tokens())
    with pytest.raises(ValueError, match="haystack has 100 tokens"):
        _task(tokenizer).case(0, text.slice(0, 100))
    with pytest.raises(ValueError, match=r"depth is 1.5"):
        _task(tokenizer).case(0, text, 1.5)
    with pytest.raises(ValueError, match=r"needles is \(2, 1\)"):
        _task(tokenizer, needles=(2, 1))
