"""The chat frame around a case, and the pieces that tasks are built of."""

import random
from types import SimpleNamespace
from typing import Any

import pytest

from data.cases import Frame
from data.needle_placement import checked_depth, hide, stretch, word_starts
from data.packing import Tokens
from sparsekv_pl.models.batch import CaseInfo
from sparsekv_pl.models.encoding import Encoder

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
