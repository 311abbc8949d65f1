"""Unsupported models and presses are refused before anything runs: changing or partial RoPE, presses of one row."""

from typing import Any

import pytest
import torch
from kvpress import BasePress, ChunkKVPress, CriticalAdaKVPress, KeyRerotationPress, KnormPress
from torch import Tensor
from transformers import Phi3Config, Phi3ForCausalLM, PreTrainedModel

from sparsekv_pl.eviction.decoding import greedy
from sparsekv_pl.eviction.kept_memory import kept_memory
from sparsekv_pl.eviction.limits import unscaled_positions
from sparsekv_pl.eviction.prefill import full_cache, prefill
from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.eviction.replay import RecordedPrefill
from sparsekv_pl.presses.nesting import press_name
from tests.architectures import YARN, architecture
from tests.random_models import Build

DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "short_factor": [1.0] * 4,
    "long_factor": [1.0, 2.0, 4.0, 8.0],
}


def ids(tokens: int, rows: int = 1) -> Tensor:
    return torch.randint(0, 64, (rows, tokens), generator=torch.Generator().manual_seed(tokens))


def phi3(**settings: Any) -> PreTrainedModel:
    shape = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    config = Phi3Config(vocab_size=64, num_hidden_layers=2, pad_token_id=0, **(shape | settings))
    return Phi3ForCausalLM(config).eval()


@pytest.mark.parametrize("rope", [DYNAMIC, LONG], ids=["dynamic", "longrope"])
def test_a_cache_is_not_continued_where_rope_changes(rope: dict[str, Any], random_model: Build) -> None:
    model = random_model(max_position_embeddings=256, rope_parameters=rope)
    prefill(model, ids(48), KnormPress(0.5), chunk_tokens=16)
    with pytest.raises(ValueError, match=r"beyond 64 tokens it turns keys by other frequencies"):
        prefill(model, ids(80), KnormPress(0.5), chunk_tokens=40)
    with pytest.raises(ValueError, match=r"those of the first 60 of 70 tokens"):
        RealEviction(KnormPress())(model, ids(60), ids(10), compression_ratio=0.5, step=0)
    with pytest.raises(
        ValueError, match=rf"keys cannot be re-rotated in a model with RoPE of type '{rope['rope_type']}'"
    ):
        prefill(model, ids(48), KeyRerotationPress(KnormPress(0.5)))


@torch.no_grad()
def test_beyond_the_change_longrope_is_as_it_was(random_model: Build) -> None:
    model = random_model(max_position_embeddings=256, rope_parameters=LONG)
    whole = model.model(ids(90)).last_hidden_state
    torch.testing.assert_close(full_cache(model, ids(90)[:, :80], ids(90)[:, 80:]), whole[:, 80:])


def test_partly_turned_heads_are_not_turned_again() -> None:
    model = phi3(partial_rotary_factor=0.5)
    prefill(model, ids(48), KnormPress(0.5))
    with pytest.raises(ValueError, match=r"4 of 8 dimensions of a head turned by RoPE"):
        prefill(model, ids(48), KeyRerotationPress(KnormPress(0.5)))


@pytest.mark.parametrize(
    "press", [ChunkKVPress(KnormPress(0.5), chunk_length=4), CriticalAdaKVPress(KnormPress(0.5))], ids=press_name
)
def test_a_press_that_evicts_from_one_row_alone_takes_no_more(random_model: Build, press: BasePress) -> None:
    model = random_model()
    for evicted in (prefill(model, ids(48), press), RecordedPrefill(model, ids(48)).evicted(press)):
        assert kept_memory(model, evicted.cache).kept_pairs == 24
    for run in (prefill, lambda made, given, what: RecordedPrefill(made, given).evicted(what)):
        with pytest.raises(
            ValueError, match=r"\(Knorm\) evicts from one row alone, and a batch has 3, .* batch_size=1"
        ):
            run(model, ids(48, rows=3), press)


QUERY_SCALES: dict[str, dict[str, Any]] = {
    "llama4_text": {"floor_scale": 33, "attn_scale": 2.0},
    "ministral3": {
        "rope_parameters": {**YARN, "original_max_position_embeddings": 32, "llama_4_scaling_beta": 2.0},
        "sliding_window": None,
    },
}
"""Queries of both are scaled from position 32 on."""


@pytest.mark.parametrize("name", QUERY_SCALES)
@torch.no_grad()
def test_positions_by_which_a_model_scales_queries_are_refused(name: str) -> None:
    model, text = architecture(name, **QUERY_SCALES[name]), ids(40) % 60 + 3
    assert unscaled_positions(model.config) == 32
    whole = model.model(text[:, :32]).last_hidden_state
    torch.testing.assert_close(full_cache(model, text[:, :20], text[:, 20:32]), whole[:, 20:], rtol=1e-4, atol=1e-4)
    message = f"{type(model).__name__} scales queries by their positions from 32 on"
    for context, more in ((20, 13), (33, 1)):
        with pytest.raises(ValueError, match=message):
            RealEviction(KnormPress())(model, text[:, :context], text[:, :more], compression_ratio=0.5, step=0)
    with pytest.raises(ValueError, match=message):
        greedy(model, prefill(model, text[:, :28], KnormPress(0.5)), text[:, :2], torch.tensor([2]), [4])
