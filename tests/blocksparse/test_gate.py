"""The gate: pooling, undoing RoPE, and decoding equal to prefill."""

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from sparsekv_pl.attention.evicted_attention import passing
from sparsekv_pl.blocksparse.block_methods import BlockMethod
from sparsekv_pl.blocksparse.gate import AttentionGates, GateScorer, ropes_of, turned
from sparsekv_pl.eviction.prefill import continue_from
from sparsekv_pl.models.decoder import decoder_of
from tests.random_models import Build

TOKENS = 45
"""Five blocks of 8 and a short one of 5."""
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 512}


def ids(tokens: int = TOKENS) -> Tensor:
    return torch.randint(1, 64, (2, tokens), generator=torch.Generator().manual_seed(1))


def seen_by_attention(model: PreTrainedModel, tokens: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """{layer: (queries, keys)} as an observer sees them."""
    states: dict[int, tuple[Tensor, Tensor]] = {}

    def observe(layer: int, query: Tensor, key: Tensor, value: Tensor) -> None:  # noqa: ARG001
        states[layer] = query, key

    with torch.no_grad():
        continue_from(model, tokens, DynamicCache(), 0, observer=observe)
    return states


def before_rope(model: PreTrainedModel, tokens: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """{layer: (queries, keys)} as the layers' own projections (and norms of heads) give them: (B, heads, T, D)."""
    caught: dict[tuple[int, str], Tensor] = {}
    hooks = []
    for index, layer in enumerate(decoder_of(model).layers):
        for side in "qk":
            source = getattr(layer.self_attn, f"{side}_norm", None) or getattr(layer.self_attn, f"{side}_proj")

            def catch(_: Any, __: Any, output: Tensor, at: tuple[int, str] = (index, side)) -> None:
                caught[at] = output

            hooks.append(source.register_forward_hook(catch))
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    shape = (*tokens.shape, -1, model.config.head_dim)
    queries, keys = (
        {i: x.reshape(shape).transpose(1, 2) for (i, own), x in caught.items() if own == side} for side in "qk"
    )
    return {i: (queries[i], keys[i]) for i in queries}


def random_gates(model: PreTrainedModel, gate_dim: int = 6, block_size: int = 8) -> AttentionGates:
    gates = AttentionGates.for_model(model, block_size, gate_dim)
    generator = torch.Generator().manual_seed(2)
    for parameter in gates.parameters():
        parameter.data.normal_(std=0.5, generator=generator)
    return gates


def reference(gates: AttentionGates, layer: int, query: Tensor, key: Tensor) -> Tensor:
    """(B, H, N, N) scores of states before RoPE (B, heads, S, D), one pair of blocks after the other."""
    gate, size = gates.gate(layer), gates.shape.block_size
    group, dim = query.shape[1] // key.shape[1], gates.shape.gate_dim
    count = -(-query.shape[2] // size)
    frequencies = gate.inv_freq[torch.linspace(0, len(gate.inv_freq) - 1, dim // 2).round().long()]

    def at(vector: Tensor, block: int) -> Tensor:
        pairs = torch.complex(*vector.chunk(2, -1)) * torch.polar(torch.ones(dim // 2), block * size * frequencies)
        return torch.cat([pairs.real, pairs.imag], -1) * gate.attention_scaling

    logits = torch.full((len(query), query.shape[1], count, count), -torch.inf)
    for head in range(query.shape[1]):
        for row in range(count):
            pooled = query[:, head, row * size : (row + 1) * size].mean(1)
            wanted = at(pooled @ gate.query_weight[head].T, row)
            for column in range(row + 1):
                block = key[:, head // group, column * size : (column + 1) * size]
                pooled = torch.cat([block.amax(1), block.amin(1), block.mean(1)], -1)
                offered = at(pooled @ gate.key_weight[head // group].T, column)
                logits[:, head, row, column] = (wanted * offered).sum(-1) / dim**0.5
    return logits.softmax(-1)


# --- RoPE is undone ---


def test_turning_back_gives_what_was_turned() -> None:
    states = torch.randn(2, 3, 50, 16, generator=torch.Generator().manual_seed(0))
    positions, inv_freq = torch.arange(1000, 1050), 10000.0 ** -torch.linspace(0, 1, 6)
    there = turned(states, positions, inv_freq, 1.3)
    torch.testing.assert_close(turned(there, -positions, inv_freq, 1 / 1.3), states)
    assert not torch.allclose(there[..., :12], states[..., :12], atol=0.1)
    assert torch.equal(there[..., 12:], states[..., 12:])


@pytest.mark.parametrize("random_model", ["llama", "qwen3"], indirect=True)
@pytest.mark.parametrize("rope", [{}, YARN], ids=["default", "yarn"])
def test_pools_are_those_of_the_projections_before_rope(random_model: Build, rope: dict[str, Any]) -> None:
    model = random_model(rope_parameters=rope, max_position_embeddings=2048) if rope else random_model()
    gates = AttentionGates.for_model(model, block_size=8)
    assert (float(gates.gate(0).attention_scaling) > 1.1) == bool(rope)
    rotated, plain = seen_by_attention(model, ids()), before_rope(model, ids())
    for layer in rotated:
        for heads, raw in zip(rotated[layer], plain[layer], strict=True):
            torch.testing.assert_close(gates.gate(layer).unrotated(heads, 0), raw, rtol=1e-4, atol=1e-4)
    scores = random_gates(model).gate(1)(*rotated[1])
    torch.testing.assert_close(scores, reference(random_gates(model), 1, *plain[1]), rtol=1e-4, atol=1e-5)


def test_numbers_that_rope_leaves_are_left() -> None:
    config = hf.PhiConfig(**SIZES, partial_rotary_factor=0.5)
    model = hf.PhiForCausalLM(config).eval()
    model.config.head_dim = 8
    gates = AttentionGates.for_model(model, 8, 6)
    assert gates.shape.rotary_dim == 4
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    rotated = seen_by_attention(model, ids())
    plain = before_rope(model, ids())
    torch.testing.assert_close(gates.gate(0).unrotated(rotated[0][1], 0), plain[0][1], rtol=1e-4, atol=1e-4)


def test_layers_without_rope_are_not_turned() -> None:
    model = hf.SmolLM3ForCausalLM(hf.SmolLM3Config(**SIZES, no_rope_layers=[1, 0, 1, 0])).eval()
    assert [bool(rope.inv_freq.any()) for rope in ropes_of(model)] == [True, False, True, False]
    gates = AttentionGates.for_model(model, 8)
    states = torch.randn(1, 2, 20, gates.shape.head_dim, generator=torch.Generator().manual_seed(0))
    assert torch.equal(gates.gate(1).unrotated(states, 30), states)
    assert not torch.allclose(gates.gate(0).unrotated(states, 30), states, atol=0.1)


@pytest.mark.parametrize(
    "config, kind, complaint",
    [
        (lambda: hf.Glm4Config(**SIZES, head_dim=8), hf.Glm4ForCausalLM, "Glm4ForCausalLM rotates other pairs"),
        (
            lambda: hf.Gemma3TextConfig(**SIZES, head_dim=8),
            hf.Gemma3ForCausalLM,
            "Gemma3ForCausalLM has no RoPE of fixed",
        ),
        (
            lambda: hf.LlamaConfig(**SIZES, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            hf.LlamaForCausalLM,
            "rope_type 'dynamic'",
        ),
        (
            lambda: hf.Lfm2Config(**SIZES, layer_types=["conv", "full_attention"] * 2),
            hf.Lfm2ForCausalLM,
            r"Lfm2ForCausalLM has no attention in its layers \[0, 2\]",
        ),
    ],
    ids=["other pairs", "two kinds", "frequencies that change", "layers without attention"],
)
def test_rope_that_cannot_be_undone_is_refused(config: Any, kind: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        AttentionGates.for_model(kind(config()))


# --- the gate ---


@pytest.mark.parametrize("gate_dim", [2, 6, 8, 16])
@pytest.mark.parametrize("block_size", [8, 64, 1])
def test_scores_equal_the_formula(random_model: Build, gate_dim: int, block_size: int) -> None:
    model = random_model()
    gates = random_gates(model, gate_dim, block_size)
    query, key = seen_by_attention(model, ids(13))[1]
    got = gates.gate(1)(query, key)
    torch.testing.assert_close(got, reference(gates, 1, *before_rope(model, ids(13))[1]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.sum(-1), torch.ones(got.shape[:3]))
    assert bool((got.triu(1) == 0).all())


def test_long_contexts_are_pooled_strip_by_strip(random_model: Build) -> None:
    gates = random_gates(random_model(), block_size=2)
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, heads, 71, 8, generator=generator) for heads in (4, 2))  # strips of 32
    positions = torch.arange(71)
    plain = [turned(states, -positions, gates.gate(0).inv_freq, 1.0) for states in (query, key)]
    torch.testing.assert_close(gates.gate(0)(query, key), reference(gates, 0, *plain), rtol=1e-4, atol=1e-5)


def test_an_untrained_gate_compares_the_averages(random_model: Build) -> None:
    model = random_model()
    gate = AttentionGates.for_model(model, 8, 8).gate(0)
    query, key = before_rope(model, ids(40))[0]
    starts = torch.arange(0, 40, 8)
    query, key = (turned(s.unflatten(2, (-1, 8)).mean(3), starts, gate.inv_freq, 1.0) for s in (query, key))
    logits = query @ key.repeat_interleave(2, 1).transpose(2, 3) / 8**0.5
    expected = logits.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf).softmax(-1)
    torch.testing.assert_close(gate(*seen_by_attention(model, ids(40))[0]), expected, rtol=1e-4, atol=1e-5)


def test_both_projections_get_a_gradient_and_later_blocks_none(random_model: Build) -> None:
    model = random_model()
    gate = random_gates(model).gate(0)
    query, key = (states.clone().requires_grad_() for states in seen_by_attention(model, ids())[0])
    gate.log_scores(query, key)[:, :, 2, 1].sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in gate.parameters())
    assert query.grad is not None and key.grad is not None
    assert bool(query.grad[:, :, 16:24].abs().sum() > 0) and not bool(query.grad[:, :, 24:].any())
    assert bool(key.grad[:, :, :24].abs().sum() > 0) and not bool(key.grad[:, :, 24:].any())


def test_autocast_changes_nothing(random_model: Build) -> None:
    model = random_model()
    gates, (query, key) = random_gates(model), seen_by_attention(model, ids())[0]
    expected, scored = gates.gate(0)(query, key), GateScorer(gates)(0, query, key)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gates.gate(0)(query, key), expected)
        assert torch.equal(GateScorer(gates)(0, query, key), scored)


# --- as a scorer ---


@pytest.mark.parametrize("prefilled", [1, 7, 8, 20, 44])
@pytest.mark.parametrize("step", [1, 3, 9])
def test_decoding_equals_the_last_rows_of_prefill(random_model: Build, prefilled: int, step: int) -> None:
    model = random_model()
    gates, states = random_gates(model), seen_by_attention(model, ids())
    scorer = GateScorer(gates)
    for layer in states:
        scorer(layer, *(part[:, :, :prefilled] for part in states[layer]))
    for stop in range(prefilled + step, TOKENS + 1, step):
        for layer, (query, key) in states.items():
            got = scorer(layer, query[:, :, stop - step : stop], key[:, :, :stop])
            expected = gates.gate(layer)(query[:, :, :stop], key[:, :, :stop])[:, :, (stop - step) // 8 :]
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
            assert not got.requires_grad


def test_a_new_context_begins_anew(random_model: Build) -> None:
    model = random_model()
    gates = random_gates(model)
    query, key = seen_by_attention(model, ids())[0]
    scorer = GateScorer(gates)
    for tokens in (30, 13, 45):
        again = scorer(0, query[:, :, :tokens], key[:, :, :tokens])
        torch.testing.assert_close(again, gates.gate(0)(query[:, :, :tokens], key[:, :, :tokens]))


def test_keys_that_were_not_scored_are_refused(random_model: Build) -> None:
    model = random_model()
    query, key = seen_by_attention(model, ids())[0]
    scorer = GateScorer(random_gates(model))
    with pytest.raises(ValueError, match="layer 0 has 44 older keys in 2 rows, but 0 tokens in 0 rows were scored"):
        scorer(0, query[:, :, -1:], key)
    scorer(0, query[:, :, :30], key[:, :, :30])
    with pytest.raises(ValueError, match="has 20 older keys in 2 rows, but 30 tokens in 2 rows were scored"):
        scorer(0, query[:, :, 30:31], key[:, :, 10:31])  # ten were evicted
    with pytest.raises(ValueError, match="has 30 older keys in 1 rows, but 30 tokens in 2 rows were scored"):
        scorer(0, query[:1, :, 30:31], key[:1, :, :31])


def test_a_scorer_keeps_blocks_not_tokens(random_model: Build) -> None:
    model = random_model()
    query, key = seen_by_attention(model, ids())[0]
    scorer = GateScorer(random_gates(model))
    scorer(0, query, key)
    kept = scorer._seen[0]
    assert kept.query.untyped_storage().nbytes() == 2 * 4 * 5 * 8 * 4
    assert kept.blocks.untyped_storage().nbytes() == 2 * 2 * 6 * 6 * 4


@pytest.mark.parametrize("threshold", [None, 0.25], ids=["top", "threshold"])
def test_the_model_runs_and_decodes_under_the_gate(random_model: Build, threshold: float | None) -> None:
    """A token at a block's end sees what it saw when the whole block was prefilled; the blocks differ from all."""
    model = random_model()
    gates = random_gates(model, gate_dim=8)
    scorer = GateScorer(gates)
    with torch.no_grad():
        dense = continue_from(model, ids(), DynamicCache(), 0)
        with passing(model, selector=BlockMethod("gate", lambda: scorer, threshold).selector(scorer, 3)):
            whole = continue_from(model, ids(), DynamicCache(), 0)
            cache = DynamicCache()
            continue_from(model, ids()[:, :40], cache, 0)
            last = continue_from(model, ids()[:, 40:], cache, 40)
    torch.testing.assert_close(last, whole[:, 40:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(whole[:, :16], dense[:, :16], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(whole, dense, atol=1e-2)
