"""The chunked fast paths equal the dense masked reference, and do no more work than what is kept asks for."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from sparsekv_pl.attention.kept_columns import Backend, kept_columns_attention, kept_columns_mask

BACKENDS: tuple[Backend, ...] = ("cpu_flash", "sdpa")
BATCH, HEADS, LENGTH, DIM = 2, 6, 77, 16


def states(kv_heads: int, dtype: torch.dtype = torch.float32, length: int = LENGTH) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(BATCH, heads, length, DIM) for heads in (HEADS, kv_heads, kv_heads)]
    return tuple(torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes)


def kept_at_random(kv_heads: int, count: int, length: int = LENGTH) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    order = torch.rand(BATCH, kv_heads, length, generator=generator).argsort(dim=-1)
    return order[..., :count].sort(dim=-1).values


def padding(side: str) -> Tensor:
    real = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    if side == "left":
        real[1, :30] = False
    if side == "right":
        real[1, -30:] = False
    return real


def dense(query: Tensor, key: Tensor, value: Tensor, kept: Tensor, recent: int, real: Tensor) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    mask, key, value = (x.repeat_interleave(groups, dim=1) for x in (kept_columns_mask(kept, recent, real), key, value))
    return scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


def values_and_gradients(out: Tensor, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
    return [out, *torch.autograd.grad(out, inputs, direction)]


def test_the_mask_states_the_rule_pair_by_pair():
    kept, real, recent = torch.tensor([[[0, 3], [2, 6]]]), torch.tensor([[True] * 5 + [False]]), 2
    mask = kept_columns_mask(kept, recent, real)
    for head, members in enumerate(({0, 3}, {2})):
        for i in range(6):
            for j in range(6):
                visible = j <= i and bool(real[0, j]) and (i - j < recent or j in members)
                assert bool(mask[0, head, i, j]) == visible, (head, i, j)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("side", "kv_heads"), [("none", 2), ("left", 2), ("right", 1), ("left", 6)])
@pytest.mark.parametrize(("recent", "query_chunk", "count"), [(5, 16, 20), (1, 11, 0), (40, 200, 77)])
def test_equal_to_the_dense_mask(backend, side, kv_heads, recent, query_chunk, count):
    inputs, kept, real = states(kv_heads), kept_at_random(kv_heads, count), padding(side)
    if count == 20:
        kept[0, :, -3:] = LENGTH  # row 0 keeps fewer: filler
    out = kept_columns_attention(*inputs, kept, recent=recent, query_chunk=query_chunk, real=real, backend=backend)
    reference = dense(*inputs, kept, recent, real)
    for ours, theirs in zip(values_and_gradients(out, inputs), values_and_gradients(reference, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_errs_no_more_than_the_dense_mask_does(backend):
    inputs, kept, real = states(2, torch.bfloat16), kept_at_random(2, 20), padding("none")
    exact_inputs = tuple(x.detach().double().requires_grad_() for x in inputs)
    exact = values_and_gradients(dense(*exact_inputs, kept, 5, real), exact_inputs)
    # Many small chunks: a key's gradient must not lose precision while they add up.
    out = kept_columns_attention(*inputs, kept, recent=5, query_chunk=2, backend=backend)
    ours = values_and_gradients(out, inputs)
    theirs = values_and_gradients(dense(*inputs, kept, 5, real), inputs)
    for mine, other, truth in zip(ours, theirs, exact, strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine - truth).norm() <= 1.5 * (other - truth).norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_that_sees_nothing_gives_zeros(backend):
    inputs, kept, real = states(2), kept_at_random(2, 20), padding("left")
    out = kept_columns_attention(*inputs, kept, recent=5, query_chunk=16, real=real, backend=backend)
    assert out[1, :30].abs().max() == 0
    assert out[1, 30:].abs().amin() > 0
    assert torch.autograd.grad(out.sum(), inputs)[0][1, :, :30].abs().max() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_saved_for_backward_grows_with_the_length_only(backend):
    def saved_elements(length: int) -> int:
        storages: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        inputs, kept = states(2, length=length), kept_at_random(2, length // 4, length)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = kept_columns_attention(*inputs, kept, recent=8, query_chunk=16, backend=backend)
        assert out.requires_grad and storages
        return sum(storages.values())

    assert saved_elements(512) == pytest.approx(2 * saved_elements(256), rel=0.05)


def test_work_falls_with_what_is_kept():
    class Scores(TorchDispatchMode):
        """Counts query-key pairs that aten's forward and backward attention kernels are given."""

        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = str(function)
            if "flash_attention_for_cpu" in name:
                query, key = args[1:3] if "backward" in name else args[:2]
                self.count += query.shape[:3].numel() * key.shape[2]
            return function(*args, **(kwargs or {}))

    def scores(count: int) -> int:
        inputs = states(2, length=512)
        with Scores() as counted:
            kept = kept_at_random(2, count, 512)
            kept_columns_attention(*inputs, kept, recent=8, query_chunk=16).sum().backward()
        return counted.count

    everything, quarter = scores(512), scores(128)
    assert everything > 0
    assert quarter < 0.35 * everything


@pytest.mark.parametrize("name", ["recent", "query_chunk"])
def test_windows_below_one_token_are_refused(name):
    settings = {"recent": 5, "query_chunk": 16} | {name: 0}
    with pytest.raises(ValueError, match=f"{name} is 0; it must be at least 1"):
        kept_columns_attention(*states(2), kept_at_random(2, 20), **settings)
