"""Keys that fade out: the formula against dense attention, the hard limit, gradients, evaluation, training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kvpress import AdaKVPress, BasePress, ChunkPress, DecodingPress, KeyRerotationPress, ScorerPress
from lightning.pytorch import Callback
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from sparsekv_pl.eviction.chunked import ChunkedEviction, continued
from sparsekv_pl.eviction.prefill import continue_from, full_cache, prefill
from sparsekv_pl.modules.eit import EITModule
from sparsekv_pl.objectives import EIT
from sparsekv_pl.presses.draws import draw
from sparsekv_pl.presses.eviction_aug import EvictionAugPress
from sparsekv_pl.presses.notes import PressNotes
from sparsekv_pl.presses.scores import catch_scores, learnable, trainable_scorers
from sparsekv_pl.presses.soft_threshold import SoftThresholdPress
from sparsekv_pl.selection import SelectionLoss
from tests.tiny_training import MakeBackbone, MakeData, MakeTrainer, adamw

Build = Callable[..., PreTrainedModel]
LENGTH, WINDOW, SINKS = 24, 4, 2


def press_with(ratio: float = 0.5, **settings: Any) -> SoftThresholdPress:
    return SoftThresholdPress(ratio, **({"window_size": WINDOW, "sinks": SINKS} | settings))


def ids(rows: int = 2, length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randint(1, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


def noted(model: PreTrainedModel, press: BasePress, context: Tensor | None = None) -> PressNotes:
    notes = prefill(model.train(), ids() if context is None else context, press).notes
    assert notes is not None
    return notes


@torch.no_grad()
def received(model: PreTrainedModel, context: Tensor) -> list[Tensor]:
    """(B, K, S) of each layer, from the whole attention: the reference."""
    model.eval().set_attn_implementation("eager")
    attentions = model.model(context, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    return [
        attention[:, :, -WINDOW:].mean(2).unflatten(1, (2, 2)).mean(2) * context.shape[1] for attention in attentions
    ]


def protected(length: int = LENGTH) -> Tensor:
    index = torch.arange(length)
    return (index < SINKS) | (index >= length - WINDOW)


# --- settings ---


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"compression_ratio": 1.0}, "compression_ratio is 1.0"),
        ({"window_size": 0}, "window_size=0"),
        ({"sinks": -1}, "sinks=-1"),
        ({"anneal_steps": 0}, "anneal_steps=0"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"final_temperature": float("inf")}, "final_temperature=inf"),
        ({"threshold": float("nan")}, "threshold=nan"),
        ({"learnable": True}, "learnable=True needs a threshold"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"SoftThresholdPress.{said}"):
        SoftThresholdPress(**settings)


def test_only_a_learnable_threshold_is_a_parameter() -> None:
    assert learnable(press_with(threshold=0.5)) == {}
    assert [p.item() for p in learnable(press_with(threshold=0.5, learnable=True)).values()] == [0.5]


# --- the temperature ---


def test_the_temperature_is_geometric_in_the_step() -> None:
    press = press_with(temperature=2.0, final_temperature=200.0, anneal_steps=4)
    assert [press.draw(step) for step in (0, 1, 2, 4, 9)] == pytest.approx([2, 2 * 10**0.5, 20, 200, 200])
    assert [press_with(temperature=3.0).draw(step) for step in (0, 1000)] == [3, 3]
    falling = press_with(temperature=8.0, final_temperature=2.0, anneal_steps=2)
    draw(EvictionAugPress([falling]), 1)  # inside another press too
    assert falling.temperature_now == pytest.approx(4)


class Temperatures(Callback):
    def __init__(self, press: SoftThresholdPress) -> None:
        self.press, self.seen = press, dict[int, float]()

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.seen[trainer.global_step - 1] = self.press.temperature_now


def test_the_temperature_is_the_same_after_a_resume(
    tiny_backbone: MakeBackbone, tiny_data: MakeData, tiny_trainer: MakeTrainer, tmp_path: Path
) -> None:
    def run(steps: int, resume: Path | None = None) -> tuple[Any, dict[int, float]]:
        press = SoftThresholdPress(window_size=8, final_temperature=16.0, anneal_steps=4)
        seen = Temperatures(press)
        trainer = tiny_trainer(seen, max_steps=steps, max_epochs=-1)
        module = EITModule(tiny_backbone(), ChunkedEviction(press), EIT(), optimizer=adamw)
        module.compression_ratio = 0.5
        trainer.fit(module, tiny_data(), ckpt_path=resume)
        return trainer, seen.seen

    trainer, first = run(2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    _, rest = run(4, tmp_path / "two.ckpt")
    assert first | rest == pytest.approx({0: 1, 1: 2, 2: 4, 3: 8})
    assert set(rest) == {2, 3}


# --- the weights ---


@torch.no_grad()
def test_weights_are_the_sigmoid_of_attention_less_a_fixed_threshold(random_model: Build) -> None:
    model, press = random_model(), press_with(threshold=0.3, temperature=2.5)
    expected = received(model, ids())
    notes = noted(model, press)
    assert list(notes.key_log_weights) == [0, 1]
    for layer, log_weights in notes.key_log_weights.items():
        weights = (2.5 * (expected[layer] - 0.3)).sigmoid().masked_fill(protected(), 1)
        torch.testing.assert_close(log_weights.exp(), weights, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_evenly_spread_attention_is_1(random_model: Build) -> None:
    model = random_model()
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.zero_()
    notes = noted(model, press_with(threshold=0.0))
    shares = notes.key_log_weights[0].exp().logit()[..., ~protected()]
    visible = torch.arange(LENGTH - WINDOW, LENGTH) + 1  # a query spreads it over the keys that it sees
    torch.testing.assert_close(shares, (LENGTH / visible).mean().expand_as(shares))


@torch.no_grad()
def test_without_a_threshold_the_budget_is_what_weighs_more_than_a_half(random_model: Build) -> None:
    model = random_model()
    for ratio in (0.05, 0.3, 0.5, 0.7):
        for log_weights in noted(model, press_with(ratio)).key_log_weights.values():
            assert ((log_weights.exp() > 0.5).sum(-1) == int(LENGTH * (1 - ratio))).all()
            ordered = log_weights.exp()[..., ~protected()].sort(descending=True).values
            kept = int(LENGTH * (1 - ratio)) - SINKS - WINDOW
            logits = ordered.logit()
            torch.testing.assert_close(logits[..., kept - 1], -logits[..., kept], atol=1e-5, rtol=1e-4)  # midway


@torch.no_grad()
@pytest.mark.parametrize("ratio", [0.75, 0.9])
def test_where_protected_keys_fill_the_budget_the_rest_is_dropped_outright(random_model: Build, ratio: float) -> None:
    budget = int(LENGTH * (1 - ratio))  # 6: sinks and window just fit; 2: the sinks alone
    expected = protected() & ((torch.arange(LENGTH) < SINKS) | torch.tensor(budget > SINKS))
    for log_weights in noted(random_model(), press_with(ratio)).key_log_weights.values():
        assert torch.equal(log_weights.exp(), expected.float().expand_as(log_weights))


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"threshold": 0.2}])
def test_ratio_0_changes_nothing(random_model: Build, settings: dict[str, Any]) -> None:
    model = random_model()
    evict = ChunkedEviction(press_with(**settings))
    for training in (True, False):
        evicted = evict(model.train(training), ids(), ids(length=5), compression_ratio=0.0, step=0)
        assert torch.equal(evicted.hidden, full_cache(model, ids(), ids(length=5)))


@torch.no_grad()
def test_nothing_is_removed_in_training(random_model: Build) -> None:
    prefilled = prefill(random_model().train(), ids(), press_with(0.9))
    assert [prefilled.cache.get_seq_length(layer) for layer in range(2)] == [LENGTH, LENGTH]


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"threshold": 0.2}])
def test_rows_are_independent(random_model: Build, settings: dict[str, Any]) -> None:
    model, press = random_model(), press_with(0.6, **settings)
    together = noted(model, press, ids(3)).key_log_weights
    for row in range(3):
        for layer, log_weights in noted(model, press, ids(3)[row : row + 1]).key_log_weights.items():
            torch.testing.assert_close(log_weights[0], together[layer][row], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_in_training_it_needs_one_chunk(random_model: Build) -> None:
    with pytest.raises(ValueError, match="one chunk"):
        prefill(random_model().train(), ids(), press_with(), chunk_tokens=12)


# --- the hard limit ---


class Dropping(ScorerPress):
    """Really drops, by the scores of another press."""

    def __init__(self, soft: SoftThresholdPress) -> None:
        super().__init__(soft.compression_ratio)
        self.scoring = soft.score

    def score(self, *args: Any) -> Tensor:
        return self.scoring(*args)


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.7, 0.75, 0.8, 0.9])
def test_the_hard_limit_is_dropping(random_model: Build, ratio: float) -> None:
    """Values and gradients, also where the protected keys do not all fit (0.8, 0.9)."""
    model = random_model().double().train()
    soft = press_with(ratio, temperature=1e12)
    found = []
    for press in (soft, Dropping(soft)):
        model.zero_grad()
        hidden = continued(model, prefill(model, ids(), press), ids(length=6, seed=1))
        hidden.square().mean().backward()
        found.append((hidden, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-10, rtol=1e-8)
    assert found[0][1]["model.layers.0.self_attn.v_proj.weight"].any()


def test_soft_weights_are_neither_dropping_nor_keeping(random_model: Build) -> None:
    model = random_model().train()
    soft, more = press_with(0.5), ids(length=6, seed=1)
    hidden = continued(model, prefill(model, ids(), soft), more)
    for other in (continued(model, prefill(model, ids(), Dropping(soft)), more), full_cache(model, ids(), more)):
        assert (hidden - other).abs().max() > 1e-3


# --- gradients ---


def loss_of(model: PreTrainedModel, press: SoftThresholdPress) -> Tensor:
    hidden = continued(model, prefill(model, ids(), press), ids(length=6, seed=1))
    pick = torch.randn(hidden.shape, dtype=hidden.dtype, generator=torch.Generator().manual_seed(5))
    return (hidden * pick).sum()


def exact_norm(norm: Any, hidden: Tensor) -> Tensor:
    """As transformers' RMSNorm, which computes in float32: too coarse for finite differences."""
    return norm.weight * hidden * (hidden.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()


def test_gradients_of_threshold_queries_keys_and_values_are_those_of_finite_differences(
    random_model: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, press = random_model().double().train(), press_with(threshold=0.4, learnable=True, temperature=3.0)
    monkeypatch.setattr(type(model.model.norm), "forward", exact_norm)
    press.learned_threshold.data = press.learned_threshold.data.double()
    attention = model.model.layers[0].self_attn
    weights = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight, press.learned_threshold]
    gradients = torch.autograd.grad(loss_of(model, press), weights)
    generator = torch.Generator().manual_seed(6)
    for weight, gradient in zip(weights, gradients, strict=True):
        direction, eps = torch.randn(weight.shape, dtype=torch.float64, generator=generator), 1e-5
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight += sign * eps * direction
                values.append(float(loss_of(model, press)))
                weight -= sign * eps * direction
        numeric = (values[0] - values[1]) / (2 * eps)
        assert abs(numeric) > 1e-3
        assert float((gradient * direction).sum()) == pytest.approx(numeric, rel=1e-5)


def test_the_context_s_last_queries_learn_to_look_at_what_the_continuation_needs(random_model: Build) -> None:
    """Layer 1's q_proj of the context: hidden states of the continuation alone do not depend on it when dropping."""
    model = random_model().double().train()
    query = model.model.layers[1].self_attn.q_proj
    norms = []
    for temperature in (2.0, 1e12):
        prefilled = prefill(model, ids(), press_with(temperature=temperature))
        cut = query.weight.detach()
        with torch.no_grad():  # another tensor for the continuation, so that only the window's queries have gradients
            held = query.weight
        query.weight = torch.nn.Parameter(cut.clone())
        hidden = continued(model, prefilled, ids(length=6, seed=1))
        query.weight = held
        norms.append(float(torch.autograd.grad(hidden.square().sum(), held, allow_unused=True)[0].abs().max()))
    assert norms[0] > 1e-4
    assert norms[1] == 0


def test_bfloat16_trains(random_model: Build) -> None:
    model = random_model().bfloat16().train()
    press = press_with(threshold=0.3, learnable=True)
    loss_of(model, press).backward()
    assert press.learned_threshold.grad is not None and press.learned_threshold.grad != 0
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert noted(model, press).key_log_weights[0].dtype == torch.float32


# --- evaluation ---


@torch.no_grad()
@pytest.mark.parametrize("ratio", [0.05, 0.5, 0.75, 0.8, 0.95])
@pytest.mark.parametrize("settings", [{}, {"threshold": 5.0, "learnable": True}])
def test_evaluation_keeps_exactly_the_budget_by_attention(
    random_model: Build, ratio: float, settings: dict[str, Any]
) -> None:
    model = random_model()
    expected = received(model, ids())
    prefilled = prefill(model, ids(), press_with(ratio, **settings), with_positions=True)
    budget = max(1, int(LENGTH * (1 - ratio)))
    index = torch.arange(LENGTH)
    first = torch.where(index < SINKS, 100 + LENGTH - index, torch.where(protected(), 100 + index - LENGTH, 0))
    for layer in range(2):
        assert prefilled.cache.get_seq_length(layer) == budget
        best = expected[layer].masked_fill(protected(), 0) + first
        assert torch.equal(prefilled.positions[layer], best.topk(budget).indices.sort().values)
    assert prefilled.notes is not None and not prefilled.notes.key_log_weights


@torch.no_grad()
def test_outside_our_prefill_it_evicts_in_training_too(random_model: Build) -> None:
    model, cache = random_model().train(), DynamicCache()
    with press_with(0.5)(model):
        model.model(ids(), past_key_values=cache)
    assert [cache.get_seq_length(layer) for layer in range(2)] == [12, 12]


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_keeps_what_it_would_keep_alone(random_model: Build, side: str) -> None:
    model, short = random_model(), 15
    context, mask = ids(2), torch.ones(2, LENGTH, dtype=torch.long)
    where = slice(LENGTH - short, LENGTH) if side == "left" else slice(0, short)
    mask[1] = 0
    mask[1, where] = 1

    def scores(tokens: Tensor, mask: Tensor | None, ratio: float) -> list[Tensor]:
        press = press_with(ratio)
        with catch_scores(press) as caught, press(model):
            model.model(tokens, attention_mask=mask, past_key_values=DynamicCache())
        return [scored.scores for scored in caught]

    alone = scores(context[1:, where], None, 0.2)
    for together, own in zip(scores(context, mask, 0.5), alone, strict=True):  # 12 of 24, and 12 of 15
        row = together[1, :, where]
        inner = ~protected(short)
        torch.testing.assert_close(row[:, inner], own[0][:, inner], atol=1e-4, rtol=1e-3)
        assert torch.equal(row.topk(12).indices.sort().values, own[0].topk(12).indices.sort().values)
        kept = together[1].topk(12).indices
        assert mask[1][kept].all()
        kept = together[1].topk(18).indices  # more than the row has: all that is real, then padding
        assert (mask[1][kept].sum(-1) == short).all()


@torch.no_grad()
def test_wrappers_take_its_scores(random_model: Build) -> None:
    model = random_model()
    for wrapper in (KeyRerotationPress(press_with(0.5)), ChunkPress(press_with(0.5), chunk_length=12)):
        cache = DynamicCache()
        with wrapper(model):
            model.model(ids(), past_key_values=cache)
        assert [cache.get_seq_length(layer) for layer in range(2)] == [12, 12]
    with AdaKVPress(press_with(0.5))(model):
        model.model(ids(), past_key_values=DynamicCache())
        masked = model.model.layers[0].self_attn.masked_key_indices
    assert len(masked[0]) == 2 * 2 * 12
    assert not protected()[masked[2]].any()
    cache = DynamicCache()
    with DecodingPress(press_with(), compression_interval=6, target_size=10)(model):
        continue_from(model, ids()[:, :12], cache, 0)
        for position in range(12, 18):
            continue_from(model, ids()[:, position : position + 1], cache, position, decoding=True)
    assert [cache.get_seq_length(layer) for layer in range(2)] == [10, 10]


# --- training ---


def test_a_selection_loss_trains_its_scores(random_model: Build) -> None:
    model, press = random_model().train(), press_with(0.5)
    assert trainable_scorers(press) == [press]
    selections = prefill(model, ids(), press, with_scores=True).selections
    mass = torch.rand(2, 2, LENGTH, generator=torch.Generator().manual_seed(3))
    loss = SelectionLoss(SINKS)([(selection, mass) for selection in selections])["SoftThreshold"]
    share = selections[0].scores.masked_fill(protected(), 0)
    share = share / share.sum(-1, keepdim=True)
    target = mass.masked_fill(protected(), 0)
    terms = -(target * share.clamp(min=1e-9).log()).sum(-1)  # each head by the mass it is measured on
    one = SelectionLoss(SINKS)([(selections[0], mass)])["SoftThreshold"]
    torch.testing.assert_close(one, (terms / target.sum()).sum())
    gradient = torch.autograd.grad(loss, model.model.layers[0].self_attn.q_proj.weight)[0]
    assert gradient.isfinite().all() and gradient.any()


def test_training_moves_a_learnable_threshold_and_saves_it(
    tiny_backbone: MakeBackbone, tiny_data: MakeData, tiny_trainer: MakeTrainer, tmp_path: Path
) -> None:
    def module() -> EITModule:
        press = SoftThresholdPress(window_size=8, threshold=0.5, learnable=True)
        made = EITModule(tiny_backbone(), ChunkedEviction(press), EIT(), optimizer=adamw)
        made.compression_ratio = 0.5
        return made

    trains, trainer = module(), tiny_trainer(max_steps=2)
    trainer.fit(trains, tiny_data())
    (name,) = (name for name, _ in trains.named_parameters() if "threshold" in name)
    assert trains.press is not None
    (threshold,) = learnable(trains.press).values()
    assert 1e-3 < abs(threshold.item() - 0.5) < 0.05  # two steps of AdamW at 1e-2
    trainer.save_checkpoint(tmp_path / "it.ckpt")
    saved = torch.load(tmp_path / "it.ckpt", weights_only=False)["state_dict"]
    assert torch.equal(saved[name], threshold)
    resumed = module()
    resumed.load_state_dict(saved, strict=False)
    assert resumed.press is not None
    assert torch.equal(next(iter(learnable(resumed.press).values())), threshold)
