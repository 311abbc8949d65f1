"""SparseRegPress: delegation to the press inside it, and training with it."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kvpress import AdaKVPress, BasePress, ComposedPress, KeyRerotationPress, KnormPress, SnapKVPress, StreamingLLMPress
from lightning.pytorch.loggers import CSVLogger
from transformers import DynamicCache, PreTrainedModel

from sparsekv_pl.eviction.prefill import prefill
from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.objectives import SparseLM
from sparsekv_pl.presses.caught_scores import catch_scores
from sparsekv_pl.presses.eviction_aug import EvictionAugPress
from sparsekv_pl.presses.sparse_reg import SparseRegPress
from sparsekv_pl.training.eit_module import EITModule
from tests.presses.sparse_reg_cases import LENGTH, Build, ids, press_with
from tests.tiny_training import MakeBackbone, MakeData, MakeTrainer, adamw, trained

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
