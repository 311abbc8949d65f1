"""Conversations: exact turns, facts told before they are asked for, corrections, rows of training, cases."""

import random
from itertools import accumulate, pairwise
from typing import Any

import pytest

from data.cases import Frame
from data.collate import needle_batch
from data.conversation import TOLD, Script, transcript, turn_lengths
from data.conversation_cases import ConversationCases
from data.conversation_task import Conversation
from data.correction import CORRECTIONS
from data.facts import SPLITS, Split
from data.mixture import EvictionData
from data.packing import Tokens
from data.text import EmbeddedText
from sparsekv_pl.models.batch import IGNORE, rows_of_equal_length, turn_ends
from tests.data.conftest import Numbered

TURN = 700
KINDS = dict.fromkeys(TOLD, 1.0)


@pytest.fixture(scope="module")
def text(tokenizer: Any) -> Tokens:
    ids = tokenizer.encode(" ".join(document.text for document in EmbeddedText().documents())[:20_000])
    return Tokens(ids, [("text", len(ids))])


def cut(tokenizer: Any, ids: list[int], lengths: list[int]) -> list[str]:
    edges = [0, *accumulate(lengths)]
    return [tokenizer.decode(ids[start:stop]) for start, stop in pairwise(edges)]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("chat", [True, False], ids=["chat", "plain"])
def test_turns_are_as_long_as_asked_and_tell_facts_before_they_are_asked_for(
    split: Split, chat: bool, tokenizer: Any, plain_tokenizer: Any, text: Tokens
) -> None:
    own, corrections = tokenizer if chat else plain_tokenizer, 0
    for seed in range(6):
        lengths = turn_lengths(6 * TURN, 6, random.Random(seed))
        script = Script(Frame(own), lengths, KINDS, random.Random(seed), split)
        script.draw()
        made = transcript(script, text)
        assert len(made.ids) == len(made.labels) == sum(lengths) and 3 * TURN // 4 <= min(lengths) < max(lengths)
        turns = cut(own, made.ids, lengths)
        assert 5 in made.exchanges and 0 not in made.exchanges
        for asks, exchange in made.exchanges.items():
            turn, told = exchange.turn, exchange.told_in
            end = f"{turn.answer_prefix} {turn.answer}{turn.stop}"
            assert turns[asks].endswith(end) and turn.question in turns[asks] and max(told) < asks
            assert turn.answer.lower() in turns[told[-1]].lower()
            if exchange.outdated:
                corrections += 1
                assert exchange.outdated.lower() in turns[told[0]].lower() and told[0] < told[1]
                wordings = (wording.removesuffix("{told}").strip() for wording in CORRECTIONS[split])
                assert any(wording in turns[told[1]] for wording in wordings)
                assert turn.answer.lower() not in turns[told[0]].lower()
        supervised = own.decode([token for token in made.labels if token != IGNORE])
        assert supervised == "".join(f" {one.turn.answer}{one.turn.stop}" for _, one in sorted(made.exchanges.items()))
    assert corrections > 1
    strings = [set(CORRECTIONS[one]) for one in SPLITS]
    assert not strings[0] & strings[1] and not strings[0] & strings[2] and not strings[1] & strings[2]


def test_a_case_s_depth_chooses_the_turn_that_tells_and_its_question_ends_the_last(
    tokenizer: Any, text: Tokens
) -> None:
    frame = Frame(tokenizer)
    for task, since in ((Conversation(5), (4, 2, 1)), (Conversation(5, corrected=True), (3, 2, 1))):
        for depth, distance in zip((0.0, 0.5, 1.0), since, strict=True):
            case = task.case(frame, text, TURN, depth, random.Random(3))
            assert case == task.case(frame, text, TURN, depth, random.Random(3))
            turns = case.info.turns
            assert turns is not None and (turns.asked_in, turns.since) == (5, distance)
            assert turns.ends == tuple(TURN * turn for turn in range(1, 4)) and len(case.continuation_ids) == 4 * TURN
            said = cut(tokenizer, case.context_ids + case.continuation_ids, [TURN] * 5)
            [answer] = case.info.answers
            assert said[4].endswith(case.info.answer_prefix) and answer.lower() in said[4 - distance].lower()
            assert bool(turns.outdated) == task.corrected
            assert not turns.outdated or any(turns.outdated.lower() in turn.lower() for turn in said[: 4 - distance])
            assert "<eos>" not in case.info.context and case.info.context.endswith(case.info.question)
    assert (Conversation(5).name, Conversation(5, corrected=True).name) == ("turns-5", "turns-5-corrected")


def test_training_draws_turns_that_the_rows_of_a_batch_share(tokenizer: Any) -> None:
    settings: dict[str, Any] = {
        "text": Numbered(200),
        "context_tokens": 3600,
        "continuation_tokens": 64,
        "batch_size": 2,
    }
    data = EvictionData(**settings, turns=(3, 5), retrieval_share=1.0, questions=KINDS, validation_needles=3)
    data.tokenizer = tokenizer
    data.setup()
    stream, again = iter(data.train_dataloader()), iter(data.train_dataloader())
    seen = set()
    for _ in range(4):
        batch, same = next(stream), next(again)
        assert (batch["continuation_ids"] == same["continuation_ids"]).all()
        assert batch["turn_ends"][0] == batch["turn_ends"][1] and batch["tasks"] == ["conversation"] * 2
        first, ends = batch["context_ids"].shape[1], batch["turn_ends"][0]
        assert first in data.evicted_lengths and first + ends[-1] == 3600
        seen.add(len(ends) + 1)
    assert len(seen) > 1 and seen <= {3, 4, 5}
    last = list(data.val_dataloader())[-1]
    assert last["context_ids"].shape[1] == 720 and turn_ends(last) == (720, 1440, 2160, 2880)


def test_rows_with_other_turns_run_apart(tokenizer: Any, text: Tokens) -> None:
    maker = ConversationCases(tokenizer, {})
    lengths = [[TURN] * 4, [TURN, TURN + 50, TURN - 50, TURN], [TURN] * 4]
    batch = needle_batch([maker.case(row, text, own) for row, own in enumerate(lengths)], 0)
    parts = list(rows_of_equal_length(batch))
    assert [(len(part["labels"]), turn_ends(part)) for part in parts] == [
        (2, (TURN, 2 * TURN, 3 * TURN)),
        (1, (TURN + 50, 2 * TURN, 3 * TURN)),
    ]


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Conversation(1), "turns is 1: give at least 2"),
        (lambda: Conversation(2, corrected=True), "turns is 2: give at least 3 with corrected"),
        (lambda: EvictionData(turns=(1, 3)), r"turns is \(1, 3\)"),
        (lambda: EvictionData(turns=(2, 3), read_tokens=(1, 2)), r"read_tokens is \(1, 2\) and turns is \(2, 3\)"),
        (lambda: EvictionData(turns=(2, 3), questions={"quotes": 1.0}), "questions has 'quotes': with turns"),
    ],
)
def test_unknown_settings_are_refused(make: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make()


def test_turns_without_room_are_refused_before_training(tokenizer: Any) -> None:
    data = EvictionData(Numbered(), context_tokens=400, turns=(3, 5), retrieval_share=1.0)
    data.tokenizer = tokenizer
    with pytest.raises(ValueError, match="a turn of 60 tokens has no room for a fact"):
        data.setup()
