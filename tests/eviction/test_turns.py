"""Evicting after every turn: the press never sees the next question, and training and evaluation run."""

from typing import Any

import pytest
import torch
from kvpress import BasePress, KeyDiffPress, KnormPress, SnapKVPress
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from callbacks.curriculum import Curriculum
from sparsekv_pl.evaluation.measurement import Measurement
from sparsekv_pl.evaluation.points import Point
from sparsekv_pl.eviction.continuation import Continuation
from sparsekv_pl.eviction.prefill import ChunkedPrefill
from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.eviction.request import Request
from sparsekv_pl.eviction.while_decoding import Decoding, check_turns
from sparsekv_pl.models.batch import CaseBatch, CaseInfo, CaseTurns
from sparsekv_pl.presses.nesting import press_name
from sparsekv_pl.presses.ratio import set_compression_ratio
from sparsekv_pl.schedules import Fixed
from sparsekv_pl.training.eit_module import EITModule
from tests.eviction.token_by_token import CONTEXT, CONTINUATION, RATIO, TURNS, ids
from tests.random_models import Build
from tests.tiny_training import MakeBackbone, MakeData, MakeTrainer, adamw, mixed

TURN = Decoding("turn")
PRESSES = [KeyDiffPress(), SnapKVPress(window_size=3)]


def kept(model: PreTrainedModel, press: BasePress, continuation: Tensor, way: str) -> tuple[list[Tensor], Tensor]:
    """Read a conversation; return the positions that are kept when its last turn begins, and its hidden states."""
    set_compression_ratio(press, RATIO)
    filling = ChunkedPrefill(model, press, CONTEXT, request=Request(contexts=True))
    filling.run(ids()[0])
    going = Continuation(filling, TURN, RATIO, CONTINUATION - 1, TURNS)
    hidden = going.read(continuation) if way == "read" else going.train(continuation, way == "checkpoint")[0]
    return [places.clone() for places in going.reading.tracker.positions.values()], hidden


@torch.no_grad()
@pytest.mark.parametrize("way", ["read", "train", "checkpoint"])
@pytest.mark.parametrize("press", PRESSES, ids=press_name)
def test_what_is_kept_does_not_depend_on_the_next_question(random_model: Build, press: BasePress, way: str) -> None:
    model, asked, last = random_model(), ids()[1], TURNS[-1]
    other_question, other_turn = asked.clone(), asked.clone()
    other_question[:, last:] = asked[:, last:].flip(1)
    other_turn[:, TURNS[0] : last] = asked[:, TURNS[0] : last].flip(1)
    places, hidden = kept(model, press, asked, way)
    same, until = kept(model, press, other_question, way)
    assert all(torch.equal(one, two) for one, two in zip(places, same, strict=True))
    torch.testing.assert_close(until[:, :last], hidden[:, :last])
    assert not torch.allclose(until[:, last:], hidden[:, last:])
    moved, _ = kept(model, press, other_turn, way)  # a turn that it has seen
    assert not all(torch.equal(one, two) for one, two in zip(places, moved, strict=True))


@torch.no_grad()
def test_rows_of_equal_turns_are_measured_together_and_their_bytes_stay_flat(tiny_models: dict[str, str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_models["llama"])
    model = AutoModelForCausalLM.from_pretrained(tiny_models["llama"], dtype=torch.float32).eval()
    context, asked = ids()
    turns = [TURNS, TURNS, (4,)]
    cases = [
        CaseInfo(str(row), "turns-4", ("zebra",), max_new_tokens=4, turns=CaseTurns(ends, 1, "horse"))
        for row, ends in enumerate(turns)
    ]
    rows = [0, 1, 0]
    lengths = torch.full((3,), CONTINUATION)
    batch = CaseBatch(
        context_ids=context[rows], continuation_ids=asked[rows], continuation_lengths=lengths, cases=cases
    )
    point = Point(KnormPress(), RATIO, decoding=TURN)
    whole = Measurement(model, tokenizer, batch)
    assert whole.by_row(point)  # the last row's turns are others
    alone = whole.at(point)
    equal: Any = {name: values[:2] for name, values in dict[str, Any](batch).items()}
    together = Measurement(model, tokenizer, equal)
    assert not together.by_row(point)
    assert [record["answer"] for record in together.at(point)] == [record["answer"] for record in alone[:2]]
    held = alone[0]["kv_bytes_over_turns"]
    assert len(held) == 3 and len({*held}) == 1 and len(alone[2]["kv_bytes_over_turns"]) == 2
    assert "kv_bytes_over_tokens" not in alone[0]
    assert (alone[0]["turn"], alone[0]["turns_since"], alone[0]["stale"]) == (4, 1, 0.0)
    [full] = {record["turn"] for record in whole.at(Point())[:2]}
    assert full == 4


@pytest.mark.parametrize("checkpoint", [False, True])
def test_it_trains_on_conversations(
    checkpoint: bool, tiny_backbone: MakeBackbone, tiny_data: MakeData, tiny_trainer: MakeTrainer
) -> None:
    eviction = RealEviction(KeyDiffPress(), checkpoint=checkpoint, decoding=TURN)
    module = EITModule(tiny_backbone(), eviction, mixed(), optimizer=adamw)
    trainer = tiny_trainer(Curriculum(Fixed(RATIO)), max_steps=2)
    data = tiny_data(turns=(2, 3), context_tokens=480, retrieval_share=1.0)
    trainer.fit(module, data)
    assert trainer.callback_metrics["train/selection/KeyDiff"] > 0
    assert trainer.callback_metrics["train/kl"].isfinite()


def test_turns_that_the_data_does_not_make_are_refused(
    tiny_backbone: MakeBackbone, tiny_data: MakeData, tiny_trainer: MakeTrainer
) -> None:
    module = EITModule(tiny_backbone(), RealEviction(KeyDiffPress(), decoding=TURN), optimizer=adamw)
    with pytest.raises(ValueError, match=r"decoding\.interval=turn evicts after the turns .* data\.turns makes none"):
        tiny_trainer(Curriculum(Fixed(RATIO)), max_steps=1).fit(module, tiny_data())
    check_turns([None, Decoding(4)], False, "tasks")
    with pytest.raises(ValueError, match=r"data\.tasks makes none"):
        check_turns([None, TURN], False, "tasks")
