"""Evicting while a continuation is read or written equals one token at a time, with an eviction every few tokens."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from kvpress import (
    BasePress,
    DecodingPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KeyRerotationPress,
    KnormPress,
    PrefillDecodingPress,
    PyramidKVPress,
    ScorerPress,
    SnapKVPress,
    StreamingLLMPress,
)
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from callbacks.curriculum import Curriculum
from sparsekv_pl.eviction.continuation import Continuation
from sparsekv_pl.eviction.prefill import ChunkedPrefill, full_cache
from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.eviction.request import Request
from sparsekv_pl.eviction.while_decoding import Decoding
from sparsekv_pl.models.batch import IGNORE, Supervised
from sparsekv_pl.objectives.attention_mass import AttentionMass, with_mass
from sparsekv_pl.objectives.selection_loss import SelectionLoss
from sparsekv_pl.presses import EvictionAugPress
from sparsekv_pl.presses.nesting import press_name
from sparsekv_pl.presses.ratio import set_compression_ratio
from sparsekv_pl.schedules import Fixed
from sparsekv_pl.training.eit_module import EITModule
from sparsekv_pl.training.step_shape import StepShape
from sparsekv_pl.training.teacher import Teacher
from tests.eviction.token_by_token import (
    CONTEXT,
    CONTINUATION,
    INTERVAL,
    RATIO,
    ROWS,
    TURNS,
    TokenByToken,
    budgets,
    ends_of,
    ids,
)
from tests.random_models import Build
from tests.tiny_training import MakeBackbone, MakeData, MakeTrainer, adamw, mixed


def later_masses(model: PreTrainedModel, labels: Tensor, ends: Sequence[int]) -> dict[int, dict[int, Tensor]]:
    """layer -> end -> (B, K, end): eager attention of the supervised rows after ``end``, one mean per row."""
    eager = model.__class__(model.config.__class__(**{**model.config.to_dict(), "attn_implementation": "eager"}))
    eager.load_state_dict(model.state_dict())
    with torch.no_grad():
        attentions = eager.eval()(torch.cat(ids(), 1), output_attentions=True).attentions
    found: dict[int, dict[int, Tensor]] = {}
    for layer, attention in enumerate(attentions):
        grouped = attention.unflatten(1, (2, 2)).mean(2)  # (B, K, all, all)
        for end in ends:
            mass = torch.zeros(ROWS, 2, end)
            for row in range(ROWS):
                predicts = [CONTEXT + t - 1 for t in range(1, CONTINUATION) if labels[row, t] != IGNORE]
                after = [place for place in predicts if place >= end]
                if after:
                    mass[row] = grouped[row, :, after, :end].mean(1)
            found.setdefault(layer, {})[end] = mass
    return found


PRESSES = [
    KnormPress(),
    KeyDiffPress(),
    SnapKVPress(window_size=3),
    ExpectedAttentionPress(n_sink=2),
    StreamingLLMPress(n_sink=2),
]
DECODINGS = [
    Decoding(INTERVAL),
    Decoding(INTERVAL, budget=9),
    Decoding(INTERVAL, grows=True),
    Decoding(INTERVAL, context=False),
]
WAYS = [(press, DECODINGS[0]) for press in PRESSES] + [(KnormPress(), decoding) for decoding in DECODINGS[1:]]
WAYS += [
    (SnapKVPress(window_size=3), Decoding("turn")),
    (KeyDiffPress(), Decoding("turn", budget=9)),
    (KnormPress(), Decoding("turn", grows=True)),
]


def weights(shape: torch.Size) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("press", "decoding"), WAYS, ids=[f"{press_name(p)}, {d.label}" for p, d in WAYS])
def test_training_equals_one_token_at_a_time_in_values_and_gradients(
    random_model: Build, press: ScorerPress, decoding: Decoding
) -> None:
    model = random_model()
    labels = ids()[1].clone()
    labels[:, 0] = labels[0, 5:7] = labels[1, 8:] = IGNORE  # nothing is asked of row 1 after its last evictions
    slow = TokenByToken(model, press, ends_of(decoding), budgets(decoding))
    expected = slow.read(*ids())
    ends = [end for end in range(CONTEXT + CONTINUATION) if end in slow.ends]
    masses = later_masses(model, labels, ends)
    chosen = [(one, masses[one.layer][one.seen]) for one in slow.selections if one.seen in ends]
    parts = (expected * weights(expected.shape)).sum(), SelectionLoss(sinks=2)(chosen).values()
    wanted = gradients(model, parts[0] + 10 * sum(parts[1]))

    for checkpoint in (False, True):
        evicts = RealEviction(press, checkpoint=checkpoint, decoding=decoding)
        evicted = evicts(model, *ids(), compression_ratio=RATIO, step=0, request=Request(scores=True), turn_ends=TURNS)
        torch.testing.assert_close(evicted.hidden, expected, rtol=1e-4, atol=1e-4)
        mass = AttentionMass(Supervised.of(labels), CONTEXT, evicts.later_evictions(CONTEXT, CONTINUATION, TURNS))
        Teacher(model)(*ids(), mass)
        pairs = with_mass([one for one in evicted.selections if one.kept < one.scores.shape[-1]], mass.mass, mass.later)
        assert {(one.layer, one.seen) for one, _ in pairs} == {(one.layer, one.seen) for one, _ in chosen}
        losses = SelectionLoss(sinks=2)(pairs)
        torch.testing.assert_close(losses, SelectionLoss(sinks=2)(chosen), rtol=1e-4, atol=1e-5)
        got = gradients(model, (evicted.hidden * weights(expected.shape)).sum() + 10 * sum(losses.values()))
        assert got.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-3, msg=lambda m, name=name: f"{name}: {m}")


@torch.no_grad()
@pytest.mark.parametrize("decoding", [*DECODINGS, Decoding(INTERVAL, budget=20), Decoding(INTERVAL, 20, grows=True)])
def test_the_evictions_budget_goes_on_to_hold(random_model: Build, decoding: Decoding) -> None:
    model, least = random_model(), 12
    slow = TokenByToken(model, KnormPress(), ends_of(decoding), lambda seen: min(least, budgets(decoding)(seen)))
    evicts = RealEviction(KnormPress(), budget=least, decoding=decoding)
    found = evicts(model, *ids(), compression_ratio=RATIO, step=0, request=Request(scores=True))
    torch.testing.assert_close(found.hidden, slow.read(*ids()), rtol=1e-4, atol=1e-4)
    assert {one.kept for one in found.selections} == {min(least, decoding.budget or least), least}
    step = StepShape(CONTEXT, CONTINUATION, RATIO, KnormPress(), budget=least, decoding=decoding)
    assert {held for _, _, held in step.pieces[:-1]} == {min(least, decoding.budget or least)}  # the plan's


def reading(model: PreTrainedModel, press: BasePress, decoding: Decoding, tokens: int) -> Continuation:
    set_compression_ratio(press, RATIO if decoding.context else 0.0)
    filling = ChunkedPrefill(model, press, CONTEXT, request=Request(contexts=True))
    filling.run(ids()[0])
    return Continuation(filling, decoding, RATIO, tokens, TURNS)


@torch.no_grad()
@pytest.mark.parametrize("context", [False, True], ids=["DecodingPress", "PrefillDecodingPress"])
def test_reading_evicts_as_kvpress_does_token_by_token(random_model: Build, context: bool) -> None:
    model, more, cache, found = random_model(), ids()[1], DynamicCache(), []
    press: Any = DecodingPress(KnormPress(), compression_interval=INTERVAL, target_size=15)
    if context:
        press = PrefillDecodingPress(KnormPress(RATIO), press)
    with press(model):
        model.model(ids()[0], past_key_values=cache, cache_position=torch.arange(CONTEXT))
        for step in range(CONTINUATION):
            place = torch.tensor([CONTEXT + step])
            at = {"past_key_values": cache, "position_ids": place[None], "cache_position": place}
            found.append(model.model(more[:, step : step + 1], **at).last_hidden_state)
    now = reading(model, KnormPress(), Decoding(INTERVAL, budget=15, context=context), CONTINUATION)
    torch.testing.assert_close(now.read(more), torch.cat(found, 1), rtol=1e-4, atol=1e-4)
    assert [layer.keys.shape[2] for layer in now.reading.cache.layers] == [15 + CONTINUATION % INTERVAL] * 2


@torch.no_grad()
def test_memory_stays_flat_and_nothing_is_lost_without_pressure(random_model: Build) -> None:
    model = random_model()
    now = reading(model, KnormPress(), Decoding(4, budget=15), CONTINUATION)
    now.read(ids()[1])
    pair = now.kv_bytes[0][1] // 15
    assert now.kv_bytes == [(tokens, 15 * pair) for tokens in range(0, 13, 4)]
    growing = reading(model, KnormPress(), Decoding(4, grows=True), CONTINUATION)
    growing.read(ids()[1])
    assert [held // pair for _, held in growing.kv_bytes] == [(CONTEXT + read) // 2 for read in range(0, 13, 4)]
    free = reading(model, KnormPress(), Decoding(4, budget=999, context=False), CONTINUATION)
    torch.testing.assert_close(free.read(ids()[1]), full_cache(model, *ids()), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("interval", [1, 4, 100, "turn"])
def test_what_is_written_is_what_one_token_at_a_time_writes(random_model: Build, interval: Any) -> None:
    model, question, most = random_model(), ids()[1][:, :6], [17, 9]
    decoding, head = Decoding(interval, budget=12), model.lm_head.weight
    slow = TokenByToken(model, KnormPress(), ends_of(decoding), budgets(decoding))
    last, expected = slow.read(ids()[0], question)[:, -1:], []
    for _ in range(max(most)):
        expected.append((last[:, -1] @ head.T).argmax(-1, keepdim=True))
        last = slow.run(expected[-1])
    rows = torch.cat(expected, 1).tolist()
    assert len({token for row in rows for token in row}) > 3
    written = reading(model, KnormPress(), decoding, question.shape[1] + max(most)).write(question, most)
    assert written == [row[:count] for row, count in zip(rows, most, strict=True)]
    stop = rows[0][5]
    ended = reading(model, KnormPress(), decoding, question.shape[1] + max(most)).write(question, most, {stop})
    assert ended == [row[: row.index(stop)] if stop in row else row for row in written]


PASSING = [
    KeyRerotationPress(KnormPress()),
    PyramidKVPress(window_size=3),
    EvictionAugPress([KnormPress(), SnapKVPress(window_size=3)], score_all=True),
]


@torch.no_grad()
@pytest.mark.parametrize("press", PASSING, ids=press_name)
def test_presses_of_every_kind_evict_again(random_model: Build, press: BasePress) -> None:
    now = reading(random_model(), press, Decoding(INTERVAL, budget=12), CONTINUATION)
    assert now.read(ids()[1]).isfinite().all()
    held = [layer.keys.shape[2] for layer in now.reading.cache.layers]
    assert sum(held) <= 2 * (12 + CONTINUATION % INTERVAL + 1)


@pytest.mark.parametrize(
    ("press", "decoding", "request_", "named"),
    [
        (SnapKVPress(window_size=6), Decoding(6), Request(), r"decoding\.interval=6 must be above the window"),
        (PyramidKVPress(window_size=2), Decoding(6), Request(), "PyramidKV cannot evict again and again in training"),
        (KnormPress(), Decoding(6), Request(layers=frozenset({"hidden"})), "an objective over layers"),
    ],
)
def test_what_cannot_be_trained_is_refused(press: BasePress, decoding: Decoding, request_: Request, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        RealEviction(press, decoding=decoding).check(CONTEXT, request_)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_it_trains_on_questions_whose_text_is_read_after_the_eviction(
    checkpoint: bool, tiny_backbone: MakeBackbone, tiny_data: MakeData, tiny_trainer: MakeTrainer
) -> None:
    eviction = RealEviction(KeyDiffPress(), checkpoint=checkpoint, decoding=Decoding(16))
    module = EITModule(tiny_backbone(), eviction, mixed(), optimizer=adamw)
    trainer = tiny_trainer(Curriculum(Fixed(RATIO)), max_steps=2)
    trainer.fit(module, tiny_data(read_tokens=(20, 40), retrieval_share=1.0))
    assert trainer.callback_metrics["train/selection/KeyDiff"] > 0
    assert trainer.callback_metrics["train/kl"].isfinite()
