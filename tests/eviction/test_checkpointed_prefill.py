"""Real eviction with activation checkpointing: the same loss and gradients, and no more positions than there are."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from kvpress import (
    AdaKVPress,
    BasePress,
    ExpectedAttentionPress,
    KeyRerotationPress,
    KnormPress,
    MergingPress,
    RandomPress,
    ScorerPress,
    SnapKVPress,
)
from torch import Tensor
from transformers import PreTrainedModel

from sparsekv_pl.eviction import Evicted
from sparsekv_pl.eviction.checkpointed_prefill import PressAsItWas, checkpointed_prefill
from sparsekv_pl.eviction.prefill import ChunkedPrefill, prefill
from sparsekv_pl.eviction.prefilled_cache import Prefilled
from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.eviction.request import NOTHING, Request
from sparsekv_pl.models.batch import IGNORE, Batch
from sparsekv_pl.objectives.attention_mass import with_mass
from sparsekv_pl.objectives.selection_loss import SelectionLoss
from sparsekv_pl.presses import EvictionAugPress
from sparsekv_pl.presses.block_dropout import BlockDropoutPress
from sparsekv_pl.presses.nesting import press_name
from sparsekv_pl.presses.press_context import press_context_in
from sparsekv_pl.presses.ratio import set_compression_ratio
from sparsekv_pl.presses.soft_threshold import SoftThresholdPress
from sparsekv_pl.presses.step_draws import draw
from sparsekv_pl.training.eit_module import EITModule
from tests.random_models import Build
from tests.tiny_training import MakeBackbone, mixed

Gradients = dict[str, Tensor]
CONTEXT, CONTINUATION, BUDGET, RATIO = 48, 8, 20, 0.5


@dataclass
class LossAndWeights(ScorerPress):
    """Knorm's scores, with soft weights of kept keys and a loss."""

    compression_ratio: float = 0.0

    def score(self, module: Any, hidden_states: Tensor, keys: Tensor, values: Tensor, *rest: Any) -> Tensor:
        scores = -keys.norm(dim=-1)
        press_context = press_context_in(rest[-1])
        assert press_context is not None
        kept = max(1, int(keys.shape[2] * (1 - self.compression_ratio)))
        press_context.key_log_weights[module.layer_idx] = scores.topk(kept, dim=-1).values
        press_context.losses.setdefault("spread", []).append(values.square().mean() + hidden_states.square().mean())
        return scores


def presses() -> list[BasePress]:
    """Make new presses, as tests change their settings."""
    return [
        KnormPress(),
        SnapKVPress(window_size=4),
        ExpectedAttentionPress(),
        KeyRerotationPress(SnapKVPress(window_size=4)),
        KeyRerotationPress(ExpectedAttentionPress()),
        EvictionAugPress([SnapKVPress(window_size=4), ExpectedAttentionPress()], score_all=True),
        EvictionAugPress([KeyRerotationPress(KnormPress()), KnormPress()]),
        MergingPress(KnormPress()),
        RandomPress(),
        BlockDropoutPress(block_size=4, protect_start=2, protect_recent=4),
        LossAndWeights(),
    ]


def ids(tokens: int = CONTEXT) -> tuple[Tensor, Tensor]:
    everything = torch.randint(0, 64, (2, tokens + CONTINUATION), generator=torch.Generator().manual_seed(0))
    return everything[:, :tokens], everything[:, tokens:]


def loss_of(evicted: Evicted) -> Tensor:
    """Sum differently weighted outputs, a selection loss against random attention, press losses and a continuation."""
    generator = torch.Generator().manual_seed(1)
    loss = (evicted.hidden.float() * torch.randn(evicted.hidden.shape, generator=generator)).sum()
    mass = dict.fromkeys(range(2), torch.rand(2, 2, CONTEXT, generator=generator))
    loss = loss + sum(SelectionLoss()(with_mass(evicted.selections, mass)).values()) + sum(evicted.losses.values())
    if evicted.context is not None:
        loss = loss + evicted.context.continued(ids()[1][:, :4]).float()[..., 0].sum() + evicted.context.lost.sum()
    return loss


def run(
    model: PreTrainedModel, press: BasePress, checkpoint: bool, request: Request = NOTHING, **settings: Any
) -> tuple[Tensor, Gradients]:
    """Loss and gradients; before backward another draw and ratio are set, as a second micro-batch would."""
    torch.manual_seed(2)  # RandomPress draws from the global generator
    model.train()
    eviction = RealEviction(press, checkpoint=checkpoint, **settings)
    loss = loss_of(eviction(model, *ids(), compression_ratio=RATIO, step=3, request=request))
    draw(press, 2)  # EvictionAugPress draws its first press at step 3, its second at step 2
    set_compression_ratio(press, 0.1)
    torch.manual_seed(3)
    model.zero_grad()
    loss.backward()
    return loss.detach(), gradients(model)


def gradients(model: torch.nn.Module) -> Gradients:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(got: tuple[Tensor, Gradients], expected: tuple[Tensor, Gradients]) -> None:
    assert len(expected[1]) > 0
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


# --- the same gradients ---


@pytest.mark.parametrize("chunk_tokens, budget", [(None, None), (12, BUDGET)])
@pytest.mark.parametrize("index", range(len(presses())), ids=[press_name(press) for press in presses()])
def test_loss_and_gradients_are_those_without_checkpointing(
    random_model: Build, index: int, chunk_tokens: int | None, budget: int | None
) -> None:
    model, settings = random_model(), {"chunk_tokens": chunk_tokens, "budget": budget, "request": Request(scores=True)}
    expected = run(model, presses()[index], False, **settings)
    assert_equal(run(model, presses()[index], True, **settings), expected)
    assert max(float(grad.abs().max()) for grad in expected[1].values()) > 1e-2


@pytest.mark.parametrize("chunk_tokens, budget", [(None, BUDGET), (24, None), (17, 9), (7, 40)])
def test_whatever_the_chunks_and_the_budget(random_model: Build, chunk_tokens: int | None, budget: int | None) -> None:
    model, settings = random_model(), {"chunk_tokens": chunk_tokens, "budget": budget, "request": Request(scores=True)}
    expected = run(model, KeyRerotationPress(ExpectedAttentionPress()), False, **settings)
    assert_equal(run(model, KeyRerotationPress(ExpectedAttentionPress()), True, **settings), expected)


@pytest.mark.parametrize("press", [AdaKVPress(KnormPress()), SoftThresholdPress(window_size=8)], ids=press_name)
def test_a_press_for_one_chunk_works_in_one_and_is_refused_in_more(random_model: Build, press: BasePress) -> None:
    model = random_model()
    assert_equal(run(model, press, True), run(model, press, False))
    with pytest.raises(ValueError, match=r"one chunk|chunk_tokens: null"):
        run(model, press, True, chunk_tokens=16)


def test_questions_about_the_evicted_context_reach_back_through_it(random_model: Build) -> None:
    model, settings = random_model(), {"chunk_tokens": 16, "budget": BUDGET, "request": Request(contexts=True)}
    expected = run(model, ExpectedAttentionPress(), False, **settings)
    assert_equal(run(model, ExpectedAttentionPress(), True, **settings), expected)
    assert expected[0] != run(model, ExpectedAttentionPress(), False, chunk_tokens=16, budget=BUDGET)[0]


def test_bfloat16_autocast_is_repeated(random_model: Build) -> None:
    """Backward runs outside the autocast, as Lightning's does."""
    model, results = random_model(), []
    for checkpoint in (False, True):
        eviction = RealEviction(ExpectedAttentionPress(), 16, BUDGET, checkpoint=checkpoint)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(eviction(model, *ids(), compression_ratio=RATIO, step=0, request=Request(scores=True)))
        model.zero_grad()
        loss.backward()
        results.append((loss.detach(), gradients(model)))
    assert_equal(results[1], results[0])


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("full", [True, False])
def test_training_steps_with_a_teacher_are_the_same(kind: str, full: bool, tiny_backbone: MakeBackbone) -> None:
    """LoRA's adapter is switched off and on again for the second half of the batch, before backward runs the first."""
    settings = {"lora": None} if full else {}
    everything = torch.randint(2, 1024, (2, 112), generator=torch.Generator().manual_seed(3))
    labels = everything[:, 96:].clone()
    labels[:, 0] = IGNORE
    batch = Batch(
        context_ids=everything[:, :96],
        context_lengths=[96, 64],
        continuation_ids=everything[:, 96:],
        labels=labels,
        document_ids=["a", "b"],
        tasks=["text", "text"],
    )
    results = []
    for checkpoint in (False, True):
        torch.manual_seed(0)
        press = EvictionAugPress([SnapKVPress(window_size=8), ExpectedAttentionPress()], score_all=True)
        eviction = RealEviction(press, 32, 40, checkpoint=checkpoint)
        module = EITModule(tiny_backbone(kind, **settings), eviction, mixed())
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        module.train()
        terms, _ = module.loss_terms(batch, 0.5, 0)
        terms["loss"].backward()
        results.append((terms["loss"].detach(), gradients(module)))
    assert_equal(results[1], results[0])


def test_the_same_without_gradients_bit_for_bit(random_model: Build) -> None:
    model, press = random_model(), KeyRerotationPress(ExpectedAttentionPress(RATIO))
    context, request = ids()[0], Request(scores=True, contexts=True)
    with torch.no_grad():
        expected = prefill(model, context, press, 12, BUDGET, request)
        got = checkpointed_prefill(ChunkedPrefill(model, press, CONTEXT, 12, BUDGET, request), context)
    assert got.next_position == expected.next_position
    for layer, other in zip(got.cache.layers, expected.cache.layers, strict=True):
        assert torch.equal(layer.keys, other.keys)
        assert torch.equal(layer.values, other.values)
    assert all(torch.equal(got.positions[layer], expected.positions[layer]) for layer in range(2))
    for selection, other in zip(got.selections, expected.selections, strict=True):
        assert (selection.layer, selection.press) == (other.layer, other.press)
        assert torch.equal(selection.scores, other.scores)
        assert torch.equal(selection.positions, other.positions)


def test_backward_can_run_twice_and_leaves_the_press_as_it_is(random_model: Build) -> None:
    model, press = random_model(), EvictionAugPress([KnormPress(), SnapKVPress(window_size=4)])
    eviction = RealEviction(press, 12, BUDGET, checkpoint=True)
    loss = loss_of(eviction(model, *ids(), compression_ratio=RATIO, step=3))
    draw(press, 2)
    set_compression_ratio(press, 0.25)
    parameters = list(model.model.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    assert press.drawn == 1
    assert [inner.compression_ratio for inner in press.presses] == [0.25, 0.25]
    assert all(map(torch.equal, first, torch.autograd.grad(loss, parameters)))


def test_a_press_as_it_was_comes_back_after_an_error() -> None:
    press = KeyRerotationPress(KnormPress(0.5))
    then = PressAsItWas(press)
    set_compression_ratio(press, 0.25)
    with pytest.raises(RuntimeError, match="stop"), then:
        assert press.compression_ratio == 0.5
        raise RuntimeError("stop")
    assert press.compression_ratio == 0.25


def checkpointed(model: PreTrainedModel, context: Tensor, press: BasePress, chunk_tokens: int) -> Prefilled:
    return checkpointed_prefill(ChunkedPrefill(model, press, context.shape[1], chunk_tokens), context)


@pytest.mark.parametrize("fill", [prefill, checkpointed])
def test_soft_weights_follow_their_keys(random_model: Build, fill: Any) -> None:
    """Of every chunk: later chunks and the continuation see the weights, in the order of the keys."""
    model = random_model()
    result = fill(model, ids()[0], LossAndWeights(RATIO), 12)
    assert result.press_context is not None
    for layer, cached in enumerate(result.cache.layers):
        torch.testing.assert_close(result.press_context.key_log_weights[layer], -cached.keys.norm(dim=-1))
    assert len(result.press_context.losses["spread"]) == 4 * 2
    one = fill(model, ids()[0][:, :24], LossAndWeights(RATIO), 12).cache.layers[1].keys
    unweighted = prefill(model, ids()[0][:, :24], KnormPress(RATIO), 12).cache.layers[1].keys
    assert not torch.allclose(one, unweighted, atol=1e-3)


# --- positions ---


@pytest.mark.parametrize("checkpoint", [False, True])
def test_contexts_beyond_the_models_positions_train_with_rerotated_keys(random_model: Build, checkpoint: bool) -> None:
    model, asked = random_model(max_position_embeddings=BUDGET + 12), []
    model.model.rotary_emb.register_forward_hook(
        lambda _, args, kwargs, __: asked.append(int((*args, *kwargs.values())[1].max())), with_kwargs=True
    )
    press = KeyRerotationPress(KnormPress())  # one that looks at no positions of its own
    run(model, press, checkpoint, chunk_tokens=12, budget=BUDGET)
    assert max(asked) < BUDGET + 12


@pytest.mark.parametrize(
    "press, limit, message",
    [
        (KnormPress(), 47, "takes 48 positions, but this model was trained on 47 .*KeyRerotationPress"),
        (KnormPress(), 55, "8 tokens from position 48 on takes 56 positions, .* trained on 55 .*KeyRerotation"),
        (KeyRerotationPress(KnormPress()), 31, "takes 32 positions, but this model was trained on 31 .*lower budget"),
    ],
)
@pytest.mark.parametrize("checkpoint", [False, True])
def test_contexts_and_continuations_that_do_not_fit_are_refused(
    random_model: Build, press: BasePress, limit: int, message: str, checkpoint: bool
) -> None:
    eviction = RealEviction(press, 12, BUDGET, checkpoint=checkpoint)
    with pytest.raises(ValueError, match=message):
        eviction(random_model(max_position_embeddings=limit), *ids(), compression_ratio=0.0, step=0)
