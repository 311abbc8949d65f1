"""Block-sparse attention equals the dense reference, values and gradients, and touches what is selected alone."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import create_block_mask

from sparsekv_pl.attention import block_sparse
from sparsekv_pl.attention.block_sparse import block_sparse_attention, dense_reference
from sparsekv_pl.attention.blocks import Blocks, block_count, blocks_of, first_block, top_blocks
from sparsekv_pl.attention.flex_blocks import flex_attention_over, flex_mask, suits_flex
from tests.largest_tensor import Largest

SIZE, DIM = 16, 8
LENGTHS = [(64, 64), (70, 70), (37, 70), (16, 64), (5, 70), (1, 65), (1, 64)]
HEADS = [(4, 4), (4, 2), (3, 1)]
SELECTIONS = [(per_head, kind) for per_head in (False, True) for kind in ("top", "drawn")]


def states(
    queries: int, keys: int, heads: int = 4, kv_heads: int = 2, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (2, heads, queries, DIM), (2, kv_heads, keys, DIM), (2, kv_heads, keys, DIM)
    query, key, value = (torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes)
    return query, key, value


def selection(queries: int, keys: int, groups: int, kind: str = "top", size: int = SIZE) -> Blocks:
    """Three blocks per query block, or as many as happen to be drawn."""
    count = block_count(keys, size)
    scores = torch.rand(
        2, groups, count - first_block(queries, keys, size), count, generator=torch.Generator().manual_seed(1)
    )
    return top_blocks(scores, 3, size, keys) if kind == "top" else blocks_of(scores < 0.4, size, keys)


def gradients(attended: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    direction = torch.randn(attended.shape, generator=torch.Generator().manual_seed(2)).to(attended.dtype)
    return torch.autograd.grad(attended, inputs, direction)


WAYS = [
    *((lengths, (4, 2), per_head, kind, block_sparse.UNIT) for lengths in LENGTHS for per_head, kind in SELECTIONS),
    *(((37, 70), heads, True, "drawn", unit) for heads in HEADS for unit in (1, 30_000, block_sparse.UNIT)),
    *((lengths, (4, 2), False, "top", 1) for lengths in LENGTHS),
]


@pytest.mark.parametrize(("lengths", "heads", "per_head", "kind", "unit"), WAYS, ids=str)
def test_values_and_gradients_equal_the_dense_reference(
    lengths: tuple[int, int],
    heads: tuple[int, int],
    per_head: bool,
    kind: str,
    unit: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(block_sparse, "UNIT", unit)
    inputs = states(*lengths, *heads)
    blocks = selection(*lengths, heads[0] if per_head else 1, kind)
    attended, expected = (f(*inputs, blocks) for f in (block_sparse_attention, dense_reference))
    torch.testing.assert_close(attended, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(gradients(attended, *inputs), gradients(expected, *inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lengths", [(11, 11), (7, 11), (2, 11)], ids=str)
def test_gradients_equal_finite_differences(lengths: tuple[int, int]) -> None:
    inputs = [x[:1, :2, :, :3].detach().requires_grad_() for x in states(*lengths, dtype=torch.float64)]
    blocks = replace(selection(*lengths, 1, size=4), indices=selection(*lengths, 1, size=4).indices[:1])
    assert torch.autograd.gradcheck(lambda *qkv: block_sparse_attention(*qkv, blocks), inputs)


@pytest.mark.parametrize("lengths", [(70, 70), (1, 70)], ids=str)
def test_bfloat16_is_as_near_as_rounding_allows(lengths: tuple[int, int]) -> None:
    inputs, blocks = states(*lengths, dtype=torch.bfloat16), selection(*lengths, 1)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    attended, expected = block_sparse_attention(*inputs, blocks), dense_reference(*exact, blocks)
    assert attended.dtype == torch.bfloat16
    pairs = [
        (attended, expected),
        *zip(gradients(attended, *inputs), gradients(expected, *exact), strict=True),
    ]
    for ours, theirs in pairs:
        assert (ours.double() - theirs).norm() < 0.01 * theirs.norm()


def test_scaling_is_that_of_the_dot_products() -> None:
    inputs, blocks = states(64, 64), selection(64, 64, 1)
    attended, expected = (f(*inputs, blocks, scaling=0.7) for f in (block_sparse_attention, dense_reference))
    torch.testing.assert_close(attended, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(attended, block_sparse_attention(*inputs, blocks))


def test_heads_may_lie_inside_tokens() -> None:
    """As a model's projections leave them."""
    inputs = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in states(64, 64)]
    blocks = selection(64, 64, 1)
    expected = dense_reference(*inputs, blocks)
    torch.testing.assert_close(block_sparse_attention(*inputs, blocks), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_what_is_not_selected_is_not_touched(lengths: tuple[int, int]) -> None:
    """A block that no query selects holds NaN, which spoils whatever it is multiplied with."""
    query, key, value = (x.detach() for x in states(*lengths))
    mask = selection(*lengths, 1).mask()
    mask[..., 1] = False
    blocks = blocks_of(mask, SIZE, lengths[1])
    unseen = ~blocks.mask().any((0, 1, 2))
    if lengths[0] < lengths[1] - 2 * SIZE:
        assert unseen.any()
    spoilt = unseen.repeat_interleave(SIZE)[: lengths[1], None]
    expected = block_sparse_attention(query, key, value, blocks)
    poisoned = (states.masked_fill(spoilt, torch.nan) for states in (key, value))
    assert torch.equal(block_sparse_attention(query, *poisoned, blocks), expected)


def test_a_single_query_gathers_what_it_selects() -> None:
    """No copy of the cache, whatever its length."""
    for keys in (200, 2_000):
        inputs = [x.detach() for x in states(1, keys)]
        with Largest() as found:
            block_sparse_attention(*inputs, selection(1, keys, 1))
        assert found.numbers == 3 * SIZE * DIM


def test_nothing_is_as_large_as_queries_times_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_sparse, "UNIT", 1)
    inputs = states(640, 640)
    with Largest() as found:
        attended = block_sparse_attention(*inputs, selection(640, 640, 1))
    assert found.numbers == attended.numel()
    with Largest() as found:
        gradients(attended, *inputs)
    assert found.numbers == attended.numel() < 640 * 640


def test_autocast_casts_as_pytorch_does() -> None:
    query, key, value = states(64, 64)
    blocks = selection(64, 64, 1)
    with torch.autocast("cpu", torch.bfloat16):
        attended = block_sparse_attention(query, key, value.bfloat16(), blocks)
    assert torch.equal(attended, block_sparse_attention(*(x.bfloat16() for x in (query, key, value)), blocks))


@pytest.mark.parametrize(
    ("shapes", "named"),
    [
        (((2, 4, 70, 8), (2, 3, 70, 8)), "H a multiple of K"),
        (((2, 4, 71, 8), (2, 2, 70, 8)), "the last T of the S positions"),
        (((2, 4, 70, 8), (2, 2, 70, 4)), "do not fit"),
        (((1, 4, 70, 8), (1, 2, 70, 8)), "do not fit queries"),
        (((2, 4, 69, 8), (2, 2, 69, 8)), "over 70 keys do not fit queries"),
        (((2, 4, 16, 8), (2, 2, 70, 8)), "do not fit queries"),
        (((2, 6, 70, 8), (2, 2, 70, 8)), "for 1 or all heads"),
    ],
)
def test_what_does_not_fit_is_refused(shapes: tuple[tuple[int, ...], tuple[int, ...]], named: str) -> None:
    query, key = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=named):
        block_sparse_attention(query, key, key, selection(70, 70, 4))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("per_head", [False, True], ids=["shared", "per_head"])
@pytest.mark.parametrize("lengths", [(64, 64), (70, 70), (37, 70), (18, 70)], ids=str)
def test_flex_attention_equals_the_dense_reference(lengths: tuple[int, int], per_head: bool) -> None:
    """Not compiled, on a CPU: this tests mask function, padding and grouping. The next test has the blocks."""
    inputs = [x.detach() for x in states(*lengths)]
    blocks = selection(*lengths, 4 if per_head else 1, "drawn")
    attended = flex_attention_over(blocks, *inputs, DIM**-0.5, compiled=False)
    torch.testing.assert_close(attended, dense_reference(*inputs, blocks), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("per_head", [False, True], ids=["shared", "per_head"])
@pytest.mark.parametrize("keys", [64, 70])
@pytest.mark.parametrize("first", [0, 2])
def test_full_and_partial_blocks_are_those_that_flex_attention_finds_itself(
    first: int, keys: int, per_head: bool
) -> None:
    groups, rows = 4 if per_head else 1, block_count(keys, SIZE) - first
    mask = flex_mask(selection(keys - first * SIZE, keys, groups, "drawn"))
    found = create_block_mask(mask.mask_mod, 2, groups, rows * SIZE, keys, device="cpu", BLOCK_SIZE=SIZE)
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(mask, name), getattr(found, name)), name
    for indices, counts in (("kv_indices", "kv_num_blocks"), ("full_kv_indices", "full_kv_num_blocks")):
        ours, theirs, count = (getattr(mask, indices), getattr(found, indices), getattr(found, counts))
        named = torch.arange(ours.shape[-1]) < count[..., None]
        assert torch.equal(ours.where(named, -1), theirs.where(named, -1)), indices


@pytest.mark.parametrize(
    ("device", "queries", "size", "learns", "suits"),
    [
        ("cuda", 256, 64, False, True),
        ("cuda", 256, 128, False, True),
        ("cuda", 256, 128, True, True),
        ("cuda", 256, 64, True, False),
        ("cuda", 256, 32, False, False),
        ("cuda", 1, 64, False, False),
        ("cpu", 256, 64, False, False),
    ],
)
def test_flex_attention_is_for_gpus_and_blocks_of_whole_tiles(
    device: str, queries: int, size: int, learns: bool, suits: bool
) -> None:
    blocks = selection(queries, 256, 1, size=size)
    with FakeTensorMode():
        query = torch.empty(2, 4, queries, DIM, device=device, requires_grad=learns)
        key = torch.empty(2, 2, 256, DIM, device=device)
        assert suits_flex(query, key, key, blocks) == suits
