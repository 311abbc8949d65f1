"""AnchorPress inside wrappers, replays and kvpress's pipeline, its settings, and from YAML."""

from typing import Any

import pytest
import torch
from jsonargparse import ArgumentError, ArgumentParser
from kvpress import (
    AdaKVPress,
    BasePress,
    ChunkPress,
    CriticalAdaKVPress,
    KnormPress,
    SnapKVPress,
)
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    pipeline,
)

import sparsekv_pl.training.eit_module  # noqa: F401  lets YAML name a press by its class
from sparsekv_pl.eviction.prefill import prefill
from sparsekv_pl.models.anchors import Anchors
from sparsekv_pl.presses.anchor import AnchorPress
from sparsekv_pl.presses.ratio import set_compression_ratio
from sparsekv_pl.storage.result_keys import settings_of
from tests.presses.anchor_cases import (
    CONTEXT,
    anchor,
    check_against_loops,
    context,
    pressed,
)
from tests.random_models import Build


def test_adakv_and_too_many_anchors(random_model: Build) -> None:
    model, press = random_model(), anchor(0.9)
    pressed(model, AdaKVPress(press))
    for layer in model.model.layers:
        rows, heads, places = layer.self_attn.masked_key_indices
        kept = torch.ones(2, 2, CONTEXT, dtype=torch.bool)
        kept[rows, heads, places] = False
        assert kept[0].nonzero()[:, 1].tolist() == [0, 1, 46, 47] * 2


def test_chunk_press_keeps_the_ends_of_every_part(random_model: Build) -> None:
    model = random_model()
    cache = pressed(model, ChunkPress(anchor(0.5), chunk_length=16))
    full = prefill(model, context(), None).cache
    for layer, whole in zip(cache.layers, full.layers, strict=True):
        assert layer.keys.shape[2] == CONTEXT // 2
        found = torch.cdist(layer.values, whole.values).argmin(-1)
        for part in range(0, CONTEXT, 16):
            ends = {part, part + 1, *range(part + 12, part + 16)}
            assert all(ends <= set(head) for head in found.flatten(0, 1).tolist())


def test_kvpress_s_own_pipeline(tiny_models: dict[str, str]) -> None:
    """The tokenizer is the one beside the model's weights."""
    model, own = (kind.from_pretrained(tiny_models["llama"]) for kind in (AutoModelForCausalLM, AutoTokenizer))
    asking, cache = pipeline("kv-press-text-generation", model=model, tokenizer=own, device="cpu"), DynamicCache()
    text = "The tiger, old and grey, sleeps. Under the bridge; near the river. " * 6
    press = AnchorPress(0.7, KnormPress(), Anchors(sinks=1, recent=3))
    asking(text, question="Where?", max_new_tokens=2, press=press, cache=cache)
    context_ids = asking.preprocess(text, ["Where?"], answer_prefix="", max_context_length=10_000)["context_ids"]
    anchors = press.anchors.mask(context_ids, own)[0].nonzero()[:, 0]
    budget = int(context_ids.shape[1] * 0.3)
    assert 10 < len(anchors) < budget
    full = prefill(model, context_ids, None).cache
    for layer, whole in zip(cache.layers, full.layers, strict=True):
        assert layer.keys.shape[2] == budget
        same = (whole.keys[:, :, anchors, None] - layer.keys[:, :, None]).abs().amax(-1) < 1e-5
        assert same.any(-1).all()


def test_without_special_tokens_and_punctuation_no_tokenizer_is_needed(random_model: Build) -> None:
    model, press = random_model(), AnchorPress(0.5, KnormPress(), Anchors(2, 4, special=False, punctuation=False))
    with torch.no_grad():
        check_against_loops(model, press, KnormPress(0.5))
    with pytest.raises(ValueError, match=r"press\.tokenizer = "):
        prefill(model, context(), AnchorPress(0.5))


def test_a_wrapper_that_does_not_show_the_model_is_an_error(random_model: Build) -> None:
    """kvpress's CriticalAdaKVPress."""
    model, press = random_model(), anchor(0.5, KnormPress())
    with pytest.raises(ValueError, match=r"post_init_from_model\(model\)"):
        pressed(model, CriticalAdaKVPress(press))
    press.post_init_from_model(model)
    pressed(model, CriticalAdaKVPress(press), rows=1)  # it takes no more


def test_the_scorer_works_at_the_ratio_of_the_whole(random_model: Build) -> None:
    seen: list[float] = []

    class Notes(KnormPress):
        def score(self, *args: Any) -> Tensor:
            seen.append(self.compression_ratio)
            return super().score(*args)

    press = anchor(0.5, Notes())
    before = settings_of(press)
    set_compression_ratio(press, 0.75)
    pressed(random_model(), press)
    assert seen == [0.75, 0.75]
    set_compression_ratio(press, 0.5)
    assert settings_of(press) == before  # the settings in a run's key do not depend on where a press was used


def parsed(init_args: dict[str, Any]) -> Any:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--press", type=BasePress)
    config = {"press": {"class_path": "sparsekv_pl.presses.anchor.AnchorPress", "init_args": init_args}}
    return parser.instantiate(parser.parse_object(config)).press


def test_yaml_sets_the_anchors_and_the_scorer() -> None:
    press = parsed(
        {
            "compression_ratio": 0.5,
            "anchors": {"sinks": 1, "recent": 8, "punctuation": False},
            "press": {"class_path": "kvpress.SnapKVPress", "init_args": {"window_size": 5}},
        }
    )
    assert press == AnchorPress(0.5, SnapKVPress(window_size=5), Anchors(sinks=1, recent=8, punctuation=False))
    assert type(press.press) is SnapKVPress
    assert parsed({}) == AnchorPress()
    assert parsed({"anchors": {"recent": 8}}).anchors == Anchors(recent=8)


@pytest.mark.parametrize("wrong", [{"anchors": {"sink": 1}}, {"anchors": {"sinks": -1}}, {"tokenizer": "gpt2"}])
def test_yaml_with_a_mistake_is_an_error(wrong: dict[str, Any]) -> None:
    with pytest.raises((ArgumentError, ValueError), match=r"sink|tokenizer"):
        parsed(wrong)
