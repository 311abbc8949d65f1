"""Block-sparse attention, Sketch&Walk's selection included, against PyTorch's dense causal attention on a CPU.

16 blocks of 64 tokens per query block, at 4,096, 8,192 and 16,384 tokens, forward only. Dense attention uses the
variant that is fastest at 2,048 tokens: KV heads shared or repeated, and 16-bit inputs as they are or in float32.
Inputs are random, because the selection does not change the amount of work.

Run from the checkout: ``python benchmarks/block_sparse.py``. Takes about ten minutes on two cores, and 4 GiB.
"""

import time
from collections.abc import Callable
from functools import partial
from itertools import count, product

import torch
from measure import paired_times, peak_memory, report
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sparsekv_pl.attention.block_sparse import block_sparse_attention
from sparsekv_pl.attention.blocks import TopBlocks
from sparsekv_pl.blocksparse.sketchwalk import SketchWalk

SHAPES = {"32 heads of 128": (32, 32, 128), "32 heads of 128, 8 KV": (32, 8, 128), "SmolLM2-135M": (9, 3, 64)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LENGTHS = 4_096, 8_192, 16_384
GOALS = {8_192: 1 / 2.5, 16_384: 1 / 4.5}
Case = tuple[str, str, int]
MEMORY: Case = "32 heads of 128, 8 KV", "float32", 16_384


def inputs(shape: str, dtype: str, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    heads, kv_heads, dim = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, number, tokens, dim) for number in (heads, kv_heads, kv_heads)]
    query, key, value = (torch.randn(size, generator=generator).to(DTYPES[dtype]) for size in shapes)
    return query, key, value


def dense(query: Tensor, key: Tensor, value: Tensor, repeat: bool, upcast: bool) -> Tensor:
    if repeat:
        groups = query.shape[1] // key.shape[1]
        key, value = (states.repeat_interleave(groups, 1) for states in (key, value))
    dtype = torch.float32 if upcast else query.dtype
    attended = scaled_dot_product_attention(
        query.to(dtype), key.to(dtype), value.to(dtype), is_causal=True, enable_gqa=not repeat
    )
    return attended.to(query.dtype)


def fastest_route(shape: str, dtype: str) -> tuple[bool, bool]:
    """The fastest ``repeat`` and ``upcast`` of ``dense``."""
    states = inputs(shape, dtype, 2_048)
    seconds: dict[tuple[bool, bool], float] = {}
    for route in product((False, True), (False,) if dtype == "float32" else (False, True)):
        times = []
        for _ in range(3):
            start = time.perf_counter()
            dense(*states, *route)
            times.append(time.perf_counter() - start)
        seconds[route] = min(times)
    return min(seconds, key=seconds.__getitem__)


def build(
    method: str, shape: str, dtype: str, tokens: int, repeat: bool = False, upcast: bool = False
) -> Callable[[], object]:
    """A step of one layer's attention; "sparse" is a layer in the middle of the walk."""
    torch.set_grad_enabled(False)
    query, key, value = inputs(shape, dtype, tokens)
    if method == "dense":
        return partial(dense, query, key, value, repeat, upcast)
    select, layers = TopBlocks(SketchWalk(dense_layers=0)), count()
    select(next(layers), query, key)

    def step() -> Tensor:
        blocks = select(next(layers), query, key)
        assert blocks is not None
        return block_sparse_attention(query, key, value, blocks)

    return step


def measure(case: Case, route: tuple[bool, bool]) -> tuple[dict[str, object], dict[str, float]]:
    """A row to print, and its ratios by name."""
    shape, dtype, tokens = case
    rounds = 3 if tokens < 16_384 else 2
    cost = paired_times(build("sparse", *case), build("dense", *case, *route), rounds)
    ratios = {f"time_{shape}_{dtype}_{tokens}": cost.median}
    memory = "-"
    if case == MEMORY:
        sparse = peak_memory(__file__, "build", "sparse", *case)
        ratios["memory"] = sparse / peak_memory(__file__, "build", "dense", *case, *route)
        memory = f"{ratios['memory']:.3f}"
    used = [name for name, chosen in zip(("repeated", "in float32"), route, strict=True) if chosen]
    row: dict[str, object] = {
        "shape": shape,
        "dtype": dtype,
        "tokens": f"{tokens:,}",
        "time ratio (low to high)": f"{cost.median:.3f} ({cost.low:.3f} to {cost.high:.3f})",
        "times faster": f"{1 / cost.median:.1f}",
        "peak memory ratio": memory,
        "dense": " ".join(used) or "as is",
    }
    return row, ratios


def main() -> None:
    rows: list[dict[str, object]] = []
    ratios: dict[str, float] = {}
    for shape, dtype in product(SHAPES, DTYPES):
        route = fastest_route(shape, dtype)
        for tokens in LENGTHS:
            row, measured = measure((shape, dtype, tokens), route)
            rows.append(row)
            ratios |= measured
    goals = {
        f"time_{shape}_{dtype}_{tokens}": round(goal, 4)
        for shape, dtype, (tokens, goal) in product(SHAPES, DTYPES, GOALS.items())
    }
    report("block_sparse", rows, ratios, floors={}, goals=goals)


if __name__ == "__main__":
    main()
