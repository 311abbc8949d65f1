"""A prefill that is advanced chunk by chunk: saved, restored, bounded, and refused where positions run out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from kvpress import (
    BasePress,
    CriticalKVPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KeyRerotationPress,
    KnormPress,
    ScorerPress,
    SnapKVPress,
)
from torch import Tensor
from transformers import PreTrainedModel

from sparsekv_pl.eviction.interrupted_prefill import SavedState
from sparsekv_pl.eviction.limits import check_weights
from sparsekv_pl.eviction.prefill import ChunkedPrefill, continue_from
from sparsekv_pl.eviction.rotation import turned
from sparsekv_pl.presses.nesting import press_name
from sparsekv_pl.presses.traits import traits_of
from tests.random_models import Build

TOKENS, CHUNK, BUDGET = 96, 12, 18

PRESSES: list[BasePress | None] = [
    None,
    KnormPress(),
    SnapKVPress(window_size=4),
    KeyRerotationPress(KeyDiffPress()),
    KeyRerotationPress(ExpectedAttentionPress()),
]
every_press = pytest.mark.parametrize("press", PRESSES, ids=press_name)


def context(tokens: int = TOKENS) -> Tensor:
    return torch.randint(64, (2, tokens), generator=torch.Generator().manual_seed(0))


def filling(model: PreTrainedModel, press: BasePress | None, tokens: int = TOKENS, **settings: Any) -> ChunkedPrefill:
    budget = None if press is None else BUDGET
    return ChunkedPrefill(model, press, tokens, **({"chunk_tokens": CHUNK, "budget": budget} | settings))


@torch.no_grad()
def advance(made: ChunkedPrefill, until: int | None = None) -> ChunkedPrefill:
    while made.chunks_done < (len(made.bounds) if until is None else until):
        start, stop = made.bounds[made.chunks_done]
        made.advance(context(made.bounds[-1][1])[:, start:stop])
    return made


@torch.no_grad()
def read_on(model: PreTrainedModel, made: ChunkedPrefill) -> Tensor:
    result = made.result()
    return continue_from(model, context()[:, :5], result.cache, result.next_position)


@every_press
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_restored_equals_uninterrupted_bit_for_bit(
    random_model: Build, press: BasePress | None, dtype: torch.dtype, tmp_path: Path
) -> None:
    model, saved = random_model().to(dtype), SavedState(tmp_path / "state.safetensors")
    whole = advance(filling(model, press))
    resumed = filling(model, press)
    for done in (1, 5):  # before and after the budget is full
        saved.save("key", advance(resumed, done).state_dict())
        resumed = filling(model, press)
        state = saved.load("key")
        assert state is not None
        resumed.load_state_dict(state)
        assert resumed.seen == done * CHUNK
    advance(resumed)
    for layer, expected in zip(resumed.cache.layers, whole.cache.layers, strict=True):
        assert torch.equal(layer.keys, expected.keys)
        assert torch.equal(layer.values, expected.values)
    assert torch.equal(read_on(model, resumed), read_on(model, whole))


@pytest.mark.parametrize("press", PRESSES[1:], ids=press_name)
def test_the_cache_never_grows_beyond_budget_and_chunk(random_model: Build, press: BasePress) -> None:
    model, most = random_model(), 0

    def note(module: Any, args: Any, kwargs: Any, output: Any) -> None:  # noqa: ARG001
        nonlocal most
        most = max(most, kwargs["past_key_values"].get_seq_length(module.layer_idx))

    made = filling(model, press)
    for layer in model.model.layers:  # before the press's own hooks
        layer.self_attn.register_forward_hook(note, with_kwargs=True)
    sizes = []
    while made.chunks_left:
        advance(made, made.chunks_done + 1)
        sizes.append(sum(tensor.numel() for tensor in made.state_dict().values()))
        assert made.cache.get_seq_length() <= BUDGET
    assert most == BUDGET + CHUNK
    assert len(set(sizes[2:])) == 1  # nothing that is kept between chunks grows once the budget is full
    assert made.result().selections == []


def test_a_chunk_of_another_length_is_refused(random_model: Build) -> None:
    made = filling(random_model(), KnormPress())
    with pytest.raises(ValueError, match="chunk 0 of 8 has tokens 0 to 12 but 11 were given"):
        made.advance(context()[:, :11])


@dataclass
class Drain(ScorerPress):
    """Drops the oldest pair and the newest ones: every other pair moves down by one position a chunk."""

    compression_ratio: float = 0.0

    def score(self, module: Any, hidden_states: Any, keys: Tensor, *_: Any) -> Tensor:  # noqa: ARG002
        scores = -torch.arange(keys.shape[2]).float()
        scores[0] = -keys.shape[2]
        return scores.expand(keys.shape[:3])


def test_rerotated_keys_do_not_drift(random_model: Build) -> None:
    """In bfloat16, a kept key is one rotation away from its origin, not one for every chunk since."""
    budget, tokens = 48, 60 * CHUNK
    model = random_model(num_hidden_layers=1).to(torch.bfloat16)
    made = advance(filling(model, KeyRerotationPress(Drain()), tokens, budget=budget))
    keys, positions = made.cache.layers[0].keys, made.tracker.positions[0]
    assert keys is not None
    assert positions[0, 0].diff().tolist() == [CHUNK] * (budget - 1)  # the oldest was turned 47 times
    with torch.no_grad():
        attention, layer = model.model.layers[0].self_attn, model.model.layers[0]
        raw = attention.k_proj(layer.input_layernorm(model.model.embed_tokens(context(tokens)))).view(2, tokens, 2, -1)
        raw = (attention.k_norm(raw) if hasattr(attention, "k_norm") else raw).transpose(1, 2)
    kept = raw.gather(2, positions.unsqueeze(-1).expand_as(keys)).float()
    fresh = turned(kept, torch.arange(budget).expand(2, 2, -1), model.model.rotary_emb.inv_freq)
    drift = (keys.float() - fresh).norm(dim=-1) / fresh.norm(dim=-1)
    assert float(drift.max()) < 0.011  # RoPE, the press's turn and ours, each rounded to 8 bits


LIMIT = 40


@pytest.mark.parametrize(
    "press, settings, message",
    [
        (None, {}, "takes 96 positions, but this model was trained on 40 .*KeyRerotationPress"),
        (KnormPress(), {}, "takes 96 positions, but this model was trained on 40 .*KeyRerotationPress"),
        (KeyRerotationPress(KnormPress()), {"budget": 30}, "takes 42 positions, .* 40 .*lower budget or chunk_tokens"),
        (KeyRerotationPress(KnormPress(0.5)), {"budget": None}, "takes 54 positions"),
        (KeyRerotationPress(KnormPress()), {"chunk_tokens": None}, "takes 96 positions"),
    ],
)
def test_positions_that_the_model_was_not_trained_on_are_refused(
    random_model: Build, press: BasePress | None, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        filling(random_model(max_position_embeddings=LIMIT), press, **settings)


def test_scaled_positions_count(random_model: Build) -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
    model = random_model(max_position_embeddings=32, rope_parameters=rope)
    filling(model, None)
    with pytest.raises(ValueError, match="takes 129 positions, but this model was trained on 128"):
        filling(model, None, 129)


@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign", "text"])
def test_a_damaged_or_foreign_state_is_reported_and_not_taken(
    random_model: Build, damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved = SavedState(tmp_path / "state.safetensors")
    assert saved.load("key") is None
    assert not caplog.messages
    saved.save("key", advance(filling(random_model(), KnormPress()), 2).state_dict())
    content = saved.path.read_bytes()
    changed = {
        "cut": content[:-7],
        "flipped": content[:-1] + bytes([content[-1] ^ 1]),
        "foreign": content,
        "text": b"not a state at all",
    }
    saved.path.write_bytes(changed[damage])
    assert saved.load("another" if damage == "foreign" else "key") is None
    assert "starts over" in caplog.text
    assert ("belongs to another" if damage == "foreign" else "is damaged") in caplog.text


def test_a_press_that_reads_weights_on_disk_is_refused(random_model: Build) -> None:
    model = random_model()
    press = CriticalKVPress(KnormPress(0.5))
    check_weights(model, traits_of(press))
    model.model.layers[1].to("meta")
    check_weights(model, traits_of(KnormPress(0.5)))
    with pytest.raises(ValueError, match=r"CriticalKV.* reads weights of the model, some of which lie on disk"):
        ChunkedPrefill(model, press, 40)
