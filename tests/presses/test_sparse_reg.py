"""Sparse attention as a loss: against dense attention's entropy and mass, with every kind of press, in training."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kvpress import AdaKVPress, BasePress, ComposedPress, KeyRerotationPress, KnormPress, SnapKVPress, StreamingLLMPress
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from sparsekv_pl.eviction.prefill import prefill
from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.objectives import SparseLM
from sparsekv_pl.presses.caught_scores import catch_scores
from sparsekv_pl.presses.eviction_aug import EvictionAugPress
from sparsekv_pl.presses.nesting import press_name, presses_in, scorers_in
from sparsekv_pl.presses.ratio import set_compression_ratio
from sparsekv_pl.presses.sparse_reg import SparseRegPress
from sparsekv_pl.presses.traits import traits_of
from sparsekv_pl.training.eit_module import EITModule
from tests.random_models import Build
from tests.tiny_training import MakeBackbone, MakeData, MakeTrainer, adamw, trained

LENGTH, WINDOW, SINKS = 24, 5, 2
KINDS = ["entropy", "l1"]


def press_with(press: BasePress | None = None, **settings: Any) -> SparseRegPress:
    return SparseRegPress(press, **({"window_size": WINDOW, "sinks": SINKS} | settings))


def ids(rows: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randint(1, 64, (rows, length), generator=torch.Generator().manual_seed(0))


def losses(model: PreTrainedModel, press: BasePress, **settings: Any) -> dict[str, list[Tensor]]:
    press_context = prefill(model.train(), ids(), press, **settings).press_context
    assert press_context is not None
    return press_context.losses


def attentions_of(model: PreTrainedModel, mask: Tensor | None = None) -> list[Tensor]:
    model.eval().set_attn_implementation("eager")
    found = model.model(ids(), attention_mask=mask, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    return list(found)


def reference(attention: Tensor, kind: str, rows: range) -> Tensor:
    """Compute a term for every row of attention (B, H, L, L)."""
    terms = []
    for at in rows:
        row = attention[:, :, at, : at + 1]
        if kind == "entropy":
            terms.append(-(row * row.log()).sum(-1))
        else:
            terms.append(row[..., SINKS : max(SINKS, at + 1 - WINDOW)].sum(-1))
    return torch.stack(terms).mean()


# --- settings ---


def test_the_inner_press_is_found_and_set() -> None:
    inner = SnapKVPress(0.3, window_size=9)
    press = press_with(inner)
    assert list(presses_in(press)) == [press, inner]
    assert scorers_in(press) == [inner]
    assert press_name(press) == "SparseReg(SnapKV)"
    assert traits_of(press).window == 9
    assert press.compression_ratio == 0.3
    set_compression_ratio(press, 0.6)
    assert press.compression_ratio == inner.compression_ratio == 0.6
    with pytest.raises(ValueError, match="Composed"):
        set_compression_ratio(press_with(ComposedPress([inner])), 0.5)


def test_without_an_inner_press_nothing_is_ever_evicted(random_model: Build) -> None:
    press = press_with()
    set_compression_ratio(press, 0.5)
    assert press.compression_ratio == 0
    assert traits_of(press).only_trains and not traits_of(press_with(KnormPress())).only_trains
    assert prefill(random_model(), ids(), press).cache.get_seq_length() == LENGTH


# --- what it measures ---


@pytest.mark.parametrize("random_model", ["llama", "qwen3"], indirect=True)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_dense_attention(random_model: Build, kind: str) -> None:
    model = random_model()
    found = losses(model, press_with(SnapKVPress(0.5, window_size=WINDOW), kind=kind, weight=1.0))
    assert list(found) == [kind]
    expected = [reference(attention, kind, range(LENGTH - WINDOW, LENGTH)) for attention in attentions_of(model)]
    assert len(found[kind]) == len(expected) == 2
    for term, value in zip(found[kind], expected, strict=True):
        torch.testing.assert_close(term, value, atol=1e-5, rtol=1e-5)
    projections = [getattr(model.model.layers[0].self_attn, name).weight for name in ("q_proj", "k_proj", "v_proj")]
    ours, dense = (torch.autograd.grad(torch.stack(terms).sum(), projections) for terms in (found[kind], expected))
    assert all(gradient.any() for gradient in ours)
    torch.testing.assert_close(ours, dense, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_weight_and_layers(random_model: Build) -> None:
    model = random_model()
    whole = losses(model, press_with(weight=1.0))["entropy"]
    assert losses(model, press_with(weight=0.25, layers=[1]))["entropy"] == [0.25 * whole[1]]
    evict = RealEviction(press_with(KnormPress(), weight=2.0))
    evicted = evict(model.train(), ids(), ids(length=5), compression_ratio=0.5, step=0)
    torch.testing.assert_close(evicted.losses, {"entropy": 2 * torch.stack(whole).mean()})
    assert evicted.kept_share == 0.5


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_every_chunk_has_its_rows(random_model: Build, kind: str) -> None:
    model = random_model()
    found = losses(model, press_with(kind=kind, weight=1.0), chunk_tokens=8)[kind]
    attentions = attentions_of(model)
    expected = [
        reference(attentions[layer], kind, range(stop - WINDOW, stop)) for stop in (8, 16, 24) for layer in (0, 1)
    ]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("random_model", ["llama", "qwen3"], indirect=True)
@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("left", "right"), [(0, 9), (9, 0), (4, 5), (0, 21)])
def test_a_padded_row_counts_as_it_would_alone(random_model: Build, kind: str, left: int, right: int) -> None:
    model, press, calls = random_model(), press_with(kind=kind), []
    cache = DynamicCache()

    def loss(module: Any, _: Any, kwargs: dict[str, Any], __: Any) -> None:
        keys = cache.layers[module.layer_idx].keys
        assert keys is not None
        calls.append(press.loss(module, kwargs["hidden_states"], keys, kwargs))

    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(loss, with_kwargs=True)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :left] = 0
    mask[1, LENGTH - right :] = 0
    model.model(ids(), attention_mask=mask, past_key_values=cache)
    for row in (slice(0, 1), slice(1, 2)):
        cache = DynamicCache()
        model.model(ids()[row, mask[row][0].bool()], past_key_values=cache)
    for layer in range(2):
        both = (calls[2 + layer] + calls[4 + layer]) / 2
        torch.testing.assert_close(calls[layer], both, atol=1e-5, rtol=1e-4)


def test_attention_on_one_key_has_an_entropy_of_0_and_a_finite_gradient(random_model: Build) -> None:
    model = random_model()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(1e4)
            if hasattr(layer.self_attn, "q_norm"):
                layer.self_attn.q_norm.weight.mul_(1e4)
    terms = losses(model, press_with(weight=1.0))["entropy"]
    assert all(0 <= term < 0.05 for term in terms)
    torch.stack(terms).sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)


def test_bfloat16(random_model: Build) -> None:
    exact = losses(random_model(), press_with(weight=1.0))["entropy"]
    model = random_model().bfloat16()
    for kind in KINDS:
        terms = losses(model, press_with(kind=kind, weight=1.0))[kind]
        assert terms[0].dtype == torch.float32
        if kind == "entropy":
            torch.testing.assert_close(terms, exact, atol=0.05, rtol=0.02)
        torch.stack(terms).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


# --- what it leaves to the inner press ---

INNER: dict[str, Callable[[], BasePress]] = {
    "knorm": lambda: KnormPress(0.5),
    "snapkv": lambda: SnapKVPress(0.5, window_size=4),
    "composed": lambda: ComposedPress([KnormPress(0.5), StreamingLLMPress(0.2)]),
    "rerotated": lambda: KeyRerotationPress(KnormPress(0.5)),
    "adakv": lambda: AdaKVPress(KnormPress(0.5)),
    "one of several": lambda: EvictionAugPress(
        [SnapKVPress(0.5, window_size=4), KnormPress(0.5)], [0, 1], score_all=True
    ),
}


def evicted(model: PreTrainedModel, press: BasePress) -> list[Any]:
    cache = prefill(model, ids(), press).cache
    masked = [getattr(layer.self_attn, "masked_key_indices", None) for layer in model.model.layers]
    return [layer.keys for layer in cache.layers] + [layer.values for layer in cache.layers] + masked


@torch.no_grad()
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("inner", INNER)
def test_the_inner_press_evicts_as_it_would_alone(random_model: Build, inner: str, training: bool) -> None:
    model = random_model().train(training)
    alone, inside = INNER[inner](), INNER[inner]()
    for press in (alone, inside):
        if isinstance(press, EvictionAugPress):
            press.draw(0)
    torch.testing.assert_close(evicted(model, press_with(inside)), evicted(model, alone), atol=0, rtol=0)
    press_context = prefill(model, ids(), press_with(inside)).press_context
    assert press_context is not None
    assert len(press_context.losses.get("entropy", [])) == (2 if training else 0)
    assert not any(module._forward_hooks for module in model.modules())


def test_the_scores_of_all_that_could_have_been_drawn_are_caught(random_model: Build) -> None:
    press = INNER["one of several"]()
    assert isinstance(press, EvictionAugPress)
    press.draw(0)
    with catch_scores(press_with(press)) as caught:
        prefill(random_model().train(), ids(), press_with(press))
    assert [type(scored.scorer) for scored in caught] == [SnapKVPress, KnormPress] * 2


@torch.no_grad()
def test_many_chunks_are_evicted_from_as_by_the_inner_press_alone(random_model: Build) -> None:
    model = random_model().train()
    several = EvictionAugPress([StreamingLLMPress(0.5, n_sink=2)])
    several.draw(0)
    for inner in (StreamingLLMPress(0.5, n_sink=2), KeyRerotationPress(SnapKVPress(0.5, window_size=4)), several):
        alone = prefill(model, ids(), inner, chunk_tokens=8)
        inside = prefill(model, ids(), press_with(inner), chunk_tokens=8)
        for layer in range(2):
            assert torch.equal(inside.cache.layers[layer].keys, alone.cache.layers[layer].keys)
            assert torch.equal(inside.positions[layer], alone.positions[layer])


@torch.no_grad()
def test_as_one_of_several_it_measures_and_evicts_when_drawn(random_model: Build) -> None:
    press = EvictionAugPress([press_with(KnormPress(0.5)), KnormPress(0.5)])
    for drawn, terms in ((0, 2), (1, 0)):
        press.drawn = drawn
        prefilled = prefill(random_model().train(), ids(), press)
        assert prefilled.press_context is not None
        assert len(prefilled.press_context.losses.get("entropy", [])) == terms
        assert prefilled.cache.get_seq_length() == LENGTH // 2


@torch.no_grad()
def test_training_outside_our_prefill_is_an_error_and_evaluation_is_not(random_model: Build) -> None:
    model, press = random_model(), press_with(KnormPress(0.5))
    cache = DynamicCache()
    with press(model):
        model.model(ids(), past_key_values=cache)
    assert cache.get_seq_length() == LENGTH // 2
    with pytest.raises(ValueError, match="RealEviction"), press(model.train()):
        model.model(ids(), past_key_values=DynamicCache())


# --- training ---


def test_sparse_lm_trains_with_it_and_logs_it(
    tiny_backbone: MakeBackbone, tiny_data: MakeData, tiny_trainer: MakeTrainer, tmp_path: Path
) -> None:
    press = SparseRegPress(SnapKVPress(window_size=8), weight=0.5, window_size=16)
    module = EITModule(tiny_backbone(), RealEviction(press), SparseLM(), optimizer=adamw)
    module.compression_ratio = 0.5
    before = trained(module)
    logger = CSVLogger(tmp_path)
    trainer = tiny_trainer(max_steps=3, logger=logger, log_every_n_steps=1)
    trainer.fit(module, tiny_data())
    logger.save()
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/press/entropy"]]
    assert len(rows) == 3
    for row in rows:
        entropy = float(row["train/press/entropy"])
        assert 0.5 < entropy < 0.5 * 4.6  # 0.5 nats of at most log(96)
        assert float(row["train/loss"]) == pytest.approx(float(row["train/cross_entropy"]) + entropy, rel=1e-5)
    assert any(not torch.equal(value, before[name]) for name, value in trained(module).items())


def test_sparse_lm_without_it_is_an_error_before_a_model_is_loaded(tiny_backbone: MakeBackbone) -> None:
    with pytest.raises(ValueError, match="SparseRegPress"):
        EITModule(tiny_backbone(pretrained="nowhere"), RealEviction(KnormPress()), SparseLM())
