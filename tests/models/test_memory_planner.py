"""The plan against real allocations: caches after a forward, weights after a load; and its warnings."""

from typing import Any

import pytest
import torch
from kvpress import KnormPress
from transformers import (
    Llama4ForCausalLM,
    LlamaConfig,
    MistralConfig,
    MistralForCausalLM,
)

from sparsekv_pl.eviction.kept_memory import kept_memory
from sparsekv_pl.eviction.prefill import prefill
from sparsekv_pl.models import memory_planner as planner
from sparsekv_pl.models.memory_planner import plan
from tests.models.planner_cases import cache_bytes, random_ids, tiny_llama4
from tests.tiny_training import MakeBackbone
from tests.windowed_models import ids, windowed_model

# --- the cache ---


@pytest.mark.parametrize(("kind", "dtype"), [("llama", "float32"), ("qwen3", "bfloat16")])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"chunk_tokens": 40},
        {"compression_ratio": 0.3},
        {"compression_ratio": 0.3, "chunk_tokens": 40},
        {"budget": 17, "chunk_tokens": 40},
        {"compression_ratio": 0.9, "budget": 50},
    ],
)
def test_kv_bytes_are_what_a_prefill_allocates(
    kind: str, dtype: Any, settings: dict[str, Any], tiny_backbone: MakeBackbone
) -> None:
    backbone = tiny_backbone(kind, dtype=dtype, lora=None)
    model = backbone.load()[0]
    ratio = settings.get("compression_ratio")
    press = KnormPress(ratio or 0.0) if settings.keys() - {"chunk_tokens"} else None
    with torch.no_grad():
        held = prefill(model, random_ids(3, 101), press, settings.get("chunk_tokens"), settings.get("budget"))
    planned = plan(backbone.pretrained, 101, dtype=dtype, batch=3, **settings)
    assert planned.kv_bytes_kept == cache_bytes(held.cache)
    assert planned.kv_bytes_full == 3 * 101 * planned.kv_bytes_per_token
    assert planned.kv_bytes_per_token == 2 * 2 * 2 * 16 * torch.finfo(getattr(torch, dtype)).bits // 8
    assert planned.kv_bytes_kept <= planned.kv_bytes_peak <= planned.kv_bytes_full


@pytest.mark.parametrize(("tokens", "chunk"), [(101, None), (101, 40), (20, None), (31, 8), (200, 7)])
def test_sliding_and_chunked_layers_forget(tokens: int, chunk: int | None) -> None:
    settings: dict[str, Any] = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    sliding = MistralConfig(**settings, num_attention_heads=4, num_key_value_heads=2, sliding_window=32)
    torch.manual_seed(0)
    models = [MistralForCausalLM(sliding), Llama4ForCausalLM(tiny_llama4())]
    for model in (*models, windowed_model("gemma3"), windowed_model("lfm2"), windowed_model("qwen3-next")):
        press = None if model is models[0] else KnormPress(0.5)
        with torch.no_grad():
            whole, left = (prefill(model, ids(tokens), one, chunk).cache for one in (None, press))
        planned = plan(model.config, tokens, dtype="float32", chunk_tokens=chunk)
        assert planned.kv_bytes_full == kept_memory(model, whole).kv_bytes
        if press is not None:
            planned = plan(model.config, tokens, dtype="float32", chunk_tokens=chunk, compression_ratio=0.5)
            assert any("presses evict in 2 of 4 layers" in line for line in planned.lines()) or model is models[1]
        assert planned.kv_bytes_kept == kept_memory(model, left).kv_bytes <= planned.kv_bytes_peak


def test_head_dim_is_derived_where_it_is_not_given() -> None:
    config = LlamaConfig(hidden_size=96, num_attention_heads=6, num_key_value_heads=3, num_hidden_layers=2)
    config.head_dim = None
    assert planner.cache_shape(config).head_dim == 16
    assert planner.cache_shape(config).kv_heads == 3
    config.num_key_value_heads = None
    assert planner.cache_shape(config).kv_heads == 6


def test_caches_that_are_not_keys_and_values_are_refused() -> None:
    config = LlamaConfig(num_hidden_layers=2)
    config.layer_types = ["mamba", "full_attention"]
    with pytest.raises(ValueError, match=r"llama has layers of kind \['mamba'\]"):
        plan(config, 100)
    config = LlamaConfig(num_hidden_layers=2)
    config.kv_lora_rank = 512
    with pytest.raises(ValueError, match="llama has multi-head latent attention"):
        plan(config, 100)
