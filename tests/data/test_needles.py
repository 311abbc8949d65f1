"""Retrieval cases: needles, their tokens and labels, and cases framed as kvpress's pipeline frames them."""

import random
from types import SimpleNamespace
from typing import Any

import pytest

from data.cases import Frame
from data.needle_placement import checked_depth, hide, stretch, word_starts
from data.needles import NeedleTask
from data.packing import Tokens
from sparsekv_pl.models.batch import IGNORE, CaseInfo
from sparsekv_pl.models.chat_frame import chat_frame
from sparsekv_pl.models.encoding import Encoder


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


INFO = CaseInfo(id="", task="test", answers=("42",))


def test_frame_is_the_one_of_kvpress(tokenizer: Any, plain_tokenizer: Any) -> None:
    from kvpress.pipeline import KVPressTextGenerationPipeline

    for each in (tokenizer, plain_tokenizer):
        pipeline: Any = SimpleNamespace(tokenizer=each)
        theirs = KVPressTextGenerationPipeline.preprocess(pipeline, "Body.\n", ["Who?"], "It is", 10**6)
        frame = Frame(each)
        ours = frame.build(frame.encode("Body.\n"), "Who?", "It is", INFO)
        assert ours.context_ids == theirs["context_ids"][0].tolist()
        assert ours.continuation_ids == theirs["questions_ids"][0][0].tolist()


@pytest.mark.parametrize("query_aware", [False, True])
def test_question_moves_into_the_context_when_the_press_may_see_it(tokenizer: Any, query_aware: bool) -> None:
    frame = Frame(tokenizer)
    case = frame.build(frame.encode("Body.\n"), "Who?", "It is", INFO, query_aware)
    context, continuation = tokenizer.decode(case.context_ids), tokenizer.decode(case.continuation_ids)
    assert context == ("<s>[user]Body.\nWho?" if query_aware else "<s>[user]Body.\n")
    assert context + continuation == "<s>[user]Body.\nWho?<eos>[assistant]It is"
    assert case.info.context == context.removeprefix("<s>[user]")
    assert (case.info.question, case.info.answer_prefix, case.info.answers) == ("Who?", "It is", ("42",))
    assert frame.room(100, "Who?", query_aware) + len(case.context_ids) == 100 + len("Body.\n")


def test_many_texts_are_encoded_as_each_alone(tokenizer: Any) -> None:
    frame = Frame(tokenizer)
    assert frame.encode_all(["one", "", " two"]) == [frame.encode("one"), [], frame.encode(" two")]
    assert frame.encode_all([]) == []


def test_depth_is_drawn_only_where_none_is_given() -> None:
    assert [checked_depth(depth, random.Random(0)) for depth in (0, 0.5, 1)] == [0, 0.5, 1]
    assert checked_depth(None, random.Random(3)) == random.Random(3).random()
    for depth in (-0.01, 1.01, float("nan")):
        with pytest.raises(ValueError, match=f"depth is {depth}"):
            checked_depth(depth, random.Random(0))


def test_hide_puts_each_needle_after_so_many_tokens(tokenizer: Any) -> None:
    frame, filler = Frame(tokenizer), [0, 1, 2, 3]
    assert hide(frame, filler, [[8, 8], [9]], [3, 1]) == [0, 9, 1, 2, 8, 8, 3]
    assert hide(frame, filler, [[7], [8], [9]], [4, 0, 4]) == [8, 0, 1, 2, 3, 7, 9]
    assert hide(frame, filler, [], []) == filler
    with pytest.raises(ValueError, match="zip"):
        hide(frame, filler, [[7]], [])


@pytest.mark.parametrize("at", [0, 1, 90, 100])
def test_stretch_is_cut_at_words(tokenizer: Any, at: int) -> None:
    frame = Frame(tokenizer)
    haystack = Tokens()
    haystack.append("a", frame.encode("some words that go on and on. " * 20))
    haystack.append("b", frame.encode("until the end comes near. " * 20))
    drawn = set()
    for seed in range(30):
        text = stretch(frame, haystack, 100, random.Random(seed), at)
        assert len(text.ids) == 100
        body = frame.decode(text.ids)
        assert body[0] == " " or at == 1  # two spaces never meet: then the needle's own place goes first
        assert body[at : at + 1] in (" ", "")
        drawn.add((body, tuple(text.document_ids)))
    assert {names for _, names in drawn} == {("a",), ("b",), ("a", "b")}
    assert len(drawn) > 10


@pytest.mark.parametrize(
    ("tokens", "starts"),
    [
        (["Ġthe", "re", "Ċ", "Ġis"], [True, False, True, True]),
        (["▁the", "re", "▁is"], [True, False, True]),
        (["the", "##re", "is"], [True, False, True]),
        (["哪", "里"], [True, True]),
    ],
)
def test_words_begin_where_the_vocabulary_says_so(tokens: list[str], starts: list[bool]) -> None:
    frame = Encoder(SimpleNamespace(convert_ids_to_tokens=lambda ids: [tokens[i] for i in ids]))
    assert word_starts(frame, list(range(len(tokens)))) == starts
