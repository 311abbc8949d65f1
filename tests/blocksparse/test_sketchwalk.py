"""Sketch&Walk equals its matrix definition in float64, for any partition of the tokens into forwards."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from sparsekv_pl.attention.blocks import TopBlocks
from sparsekv_pl.blocksparse.hadamard import SubsampledHadamard
from sparsekv_pl.blocksparse.sketchwalk import SketchWalk
from sparsekv_pl.eviction.prefill import continue_from

BLOCK = 4
Layers = list[tuple[Tensor, Tensor]]


def states(tokens: int, layers: int = 4, batch: int = 2, dim: int = 8, seed: int = 0) -> Layers:
    """Queries (B, 4, L, D) and keys (B, 2, L, D) of every layer."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, 4, tokens, dim), (batch, 2, tokens, dim)
    return [
        (torch.randn(shapes[0], generator=generator), torch.randn(shapes[1], generator=generator))
        for _ in range(layers)
    ]


def walker(**settings: Any) -> SketchWalk:
    return SketchWalk(**({"block_size": BLOCK, "sketch_dim": 8, "exponent": 3, "dense_layers": 0} | settings))


def scored(scorer: SketchWalk, layers: Layers, start: int = 0, stop: int | None = None) -> list[Tensor]:
    """Scores (B, Nq, Nk) of tokens start to stop in every layer."""
    stop = layers[0][0].shape[2] if stop is None else stop
    found = [scorer(layer, q[:, :, start:stop], k[:, :, :stop]) for layer, (q, k) in enumerate(layers)]
    assert all(rows is not None for rows in found)
    return [rows[:, 0] for rows in found if rows is not None]


def dense_walk(
    layers: Layers, damping: float, exponent: float, sketch: SubsampledHadamard | None = None
) -> list[Tensor]:
    """R_l (B, N, N), entry by entry."""
    walks: list[Tensor] = []
    for query, key in layers:
        q, k = (
            torch.stack([block.double().mean((1, 2)) for block in x.split(BLOCK, dim=2)], dim=1) for x in (query, key)
        )
        scale = q.shape[-1] ** 0.5
        if sketch is not None:
            q, k = sketch(q), sketch(k)
        batch, count = q.shape[:2]
        transitions = torch.zeros(batch, count, count, dtype=torch.float64)
        for b in range(batch):
            for i in range(count):
                attention = torch.exp(torch.stack([q[b, i] @ k[b, j] / scale for j in range(i + 1)]))
                attention = (attention / attention.sum()) ** exponent
                transitions[b, i, : i + 1] = attention / attention.sum()
        walks.append((1 - damping) * transitions + damping * walks[-1] @ transitions if walks else transitions)
    return walks


def close(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("damping", [1.0, 0.25, 0.0])
@pytest.mark.parametrize("tokens", [3, 16, 23])
def test_walk_equals_its_matrix_definition(damping: float, tokens: int) -> None:
    layers = states(tokens)
    for found, expected in zip(scored(walker(damping=damping), layers), dense_walk(layers, damping, 3), strict=True):
        close(found, expected)
        close(found.sum(-1), torch.ones(found.shape[:2]))
        assert bool((found.triu(1) == 0).all()), "later blocks are out of reach"


def test_walk_equals_its_definition_with_fewer_coordinates() -> None:
    layers = states(23, dim=12)
    expected = dense_walk(layers, 0.5, 3, SubsampledHadamard(12, 4, seed=7))
    for found, wanted in zip(scored(walker(damping=0.5, sketch_dim=4, seed=7), layers), expected, strict=True):
        close(found, wanted)
    assert not torch.allclose(expected[0], dense_walk(layers, 0.5, 3)[0], atol=1e-2)


@pytest.mark.parametrize("damping", [1.0, 0.25])
@pytest.mark.parametrize("chunks", [[10, *[1] * 13], [1] * 9, [5, 2, 9, 1, 1, 6], [8, 4, 3, 8], [2, 1, 21]])
def test_decode_equals_prefills_last_row(chunks: list[int], damping: float) -> None:
    """Token by token its last row, and in chunks that cross borders its last rows."""
    layers, scorer, start = states(sum(chunks)), walker(damping=damping), 0
    for chunk in chunks:
        stop = start + chunk
        whole = scored(walker(damping=damping), [(q[:, :, :stop], k[:, :, :stop]) for q, k in layers])
        rows = -(-stop // BLOCK) - start // BLOCK
        for found, prefilled in zip(scored(scorer, layers, start, stop), whole, strict=True):
            close(found, prefilled[:, -rows:])
        start = stop


def test_dense_layers_have_no_scores_but_count() -> None:
    layers = states(20)
    dense, all_scored = walker(dense_layers=2, damping=1.0), scored(walker(damping=1.0), layers)
    found = [dense(layer, q, k) for layer, (q, k) in enumerate(layers)]
    assert found[:2] == [None, None]
    for layer in (2, 3):
        rows = found[layer]
        assert rows is not None and rows.shape == (2, 1, 5, 5)
        close(rows[:, 0], all_scored[layer])


def test_chosen_layers_walk_over_those_alone() -> None:
    layers, scorer = states(20), walker(damping=0.5)
    for (q, k), index, expected in zip(layers, (1, 5, 6, 9), scored(walker(damping=0.5), layers), strict=True):
        rows = scorer(index, q, k)
        assert rows is not None
        close(rows[:, 0], expected)


def test_a_new_context_begins_anew() -> None:
    scorer, layers = walker(damping=1.0), states(20, seed=1)
    scored(scorer, states(30))
    scorer(0, *states(9)[0])  # a forward that came no further
    for found, expected in zip(scored(scorer, layers), scored(walker(damping=1.0), layers), strict=True):
        close(found, expected)


def test_a_copied_cache_goes_on_with_a_copy() -> None:
    layers, scorer = states(20), walker(damping=1.0)
    scored(scorer, layers, 0, 10)
    other = copy.deepcopy(scorer)
    first = scored(scorer, layers, 10, 20)
    for found, again in zip(first, scored(other, layers, 10, 20), strict=True):
        torch.testing.assert_close(found, again, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_sixteen_bits_are_computed_in_float32(dtype: torch.dtype, autocast: bool) -> None:
    rounded = [(q.to(dtype), k.to(dtype)) for q, k in states(43)]
    exact = dense_walk(rounded, 0.25, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        for found, expected in zip(scored(walker(), rounded), exact, strict=True):
            close(found, expected)


def test_there_is_no_gradient() -> None:
    (q, k), *_ = states(12)
    rows = walker()(0, q.requires_grad_(), k)
    assert rows is not None and not rows.requires_grad


@pytest.mark.parametrize("older", [7, 9, 11])
def test_an_evicted_cache_is_refused(older: int) -> None:
    scorer, layers = walker(), states(20)
    scored(scorer, layers, 0, 10)
    (q, k), *_ = layers
    with pytest.raises(
        ValueError, match=rf"layer 0 has {older} older keys .* 10 tokens .* blocks need the whole cache"
    ):
        scorer(0, q[:, :, :1], k[:, :, : older + 1])


def test_other_rows_are_refused() -> None:
    scorer = walker()
    scored(scorer, states(10))
    (q, k), *_ = states(11, batch=3)
    with pytest.raises(ValueError, match="10 older keys in 3 rows, but 10 tokens in 2 rows"):
        scorer(0, q[:, :, 10:], k)


def test_a_continuation_of_nothing_is_refused() -> None:
    (q, k), *_ = states(10)
    with pytest.raises(ValueError, match=r"layer 0 has 5 older keys .* 0 tokens"):
        walker()(0, q[:, :, 5:], k)


@pytest.mark.parametrize(("given", "then"), [([0, 2], 1), ([0, 1], 1), ([3, 5], 4)])
def test_layers_out_of_order_are_refused_in_a_new_context(given: list[int], then: int) -> None:
    scorer, ((q, k), *_) = walker(), states(10)
    for layer in given:
        scorer(layer, q, k)
    with pytest.raises(
        ValueError, match=rf"layer {then} .* followed layer {given[-1]} .* ascending order .* reset\(\)"
    ):
        scorer(then, q, k)


@pytest.mark.parametrize(("given", "then"), [([0], 2), ([0, 1], 3), ([], 1), ([0, 1, 2], 1), ([0, 1], 7)])
def test_layers_out_of_order_are_refused_in_a_continuation(given: list[int], then: int) -> None:
    scorer, layers = walker(), states(10)
    scored(scorer, layers, 0, 9)
    q, k = layers[0]
    for layer in given:
        scorer(layer, q[:, :, 9:], k)
    with pytest.raises(ValueError, match=rf"layer {then} .* followed layer"):
        scorer(then, q[:, :, 9:], k)


def test_layers_of_different_lengths_are_refused() -> None:
    scorer = walker()
    scorer(0, *states(10)[0])
    with pytest.raises(ValueError, match=r"layer 1 with .* \(2, 12, 12\) followed layer 0 with \(2, 10, 10\)"):
        scorer(1, *states(12)[0])


def test_reset_forgets_the_layers() -> None:
    scorer, ((q, k), *_) = walker(), states(10)
    scorer(1, q, k)
    scorer.reset()
    assert scorer(3, q, k) is not None
    assert scorer(5, q, k) is not None


@pytest.mark.parametrize(
    "settings",
    [{"block_size": 0}, {"sketch_dim": 0}, {"exponent": 0}, {"dense_layers": -1}, {"damping": 1.1}, {"damping": -0.1}],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(settings))}={next(iter(settings.values()))}"):
        SketchWalk(**settings)


def test_a_sketch_of_more_coordinates_than_the_head_has_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sketch_dim=16 .* use sketch_dim=8"):
        walker(sketch_dim=16)(0, *states(10)[0])


def test_a_model_runs_with_it(random_model: Callable[..., PreTrainedModel]) -> None:
    """With room for all blocks nothing changes, in prefill, chunks and decoding; with less room something does."""
    model, ids = (
        random_model(num_hidden_layers=3),
        torch.randint(64, (2, 30), generator=torch.Generator().manual_seed(0)),
    )
    hidden: dict[int | None, Tensor] = {}
    for top_k in (None, 100, 2):
        attention: dict[str, Any] = {} if top_k is None else {"selector": TopBlocks(walker(dense_layers=1), top_k)}
        cache, parts = DynamicCache(), []
        with torch.no_grad():
            for start, stop in ((0, 18), (18, 27), (27, 28), (28, 29), (29, 30)):
                parts.append(continue_from(model, ids[:, start:stop], cache, start, **attention))
        hidden[top_k] = torch.cat(parts, 1)
    torch.testing.assert_close(hidden[100], hidden[None], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(hidden[2], hidden[None], rtol=1e-2, atol=1e-2)
