"""Matrix products of SmolLM2's shapes in bfloat16 over float32, forwards and backwards, on one thread.

Run from the checkout: ``python benchmarks/bfloat16.py``. Takes a minute, or ten if the CPU emulates bfloat16; in that
case the ratios are the factors of the warning in sparsekv_pl/models/native_precision.py. To emulate bfloat16 on any
CPU: ``ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 python benchmarks/bfloat16.py``.
"""

from collections.abc import Callable

import torch
from measure import paired_times, report
from torch.nn.functional import linear

from sparsekv_pl.models.native_precision import decide

TOKENS = 1_024
SHAPES = {"query": (576, 576), "key": (576, 192), "up": (576, 1_536), "down": (1_536, 576), "head": (576, 49_152)}
"""Input and output widths. The LM head's product has ``HEAD_TOKENS`` rows."""
HEAD_TOKENS = 256


def product(shape: str, dtype: torch.dtype, backwards: bool) -> Callable[[], object]:
    """A step that computes one product, or the gradients of its input and its weight."""
    width, out = SHAPES[shape]
    tokens = HEAD_TOKENS if shape == "head" else TOKENS
    inputs = torch.randn(tokens, width).to(dtype).requires_grad_(backwards)
    weight = torch.randn(out, width).mul_(0.05).to(dtype).requires_grad_(backwards)
    if not backwards:
        return lambda: linear(inputs, weight)
    made = linear(inputs, weight)
    gradient = torch.ones_like(made)
    return lambda: torch.autograd.grad(made, (inputs, weight), gradient, retain_graph=True)


def main() -> None:
    """Print a row for each shape."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(decide(accelerator="cpu"))
    rows, ratios = [], {}
    for shape in SHAPES:
        row = {"product": shape, "shape": " x ".join(map(str, SHAPES[shape]))}
        for way, backwards in (("forwards", False), ("backwards", True)):
            half, full = (product(shape, dtype, backwards) for dtype in (torch.bfloat16, torch.float32))
            took = paired_times(half, full, rounds=5)
            row[way] = f"{took.median:.2f} ({took.low:.2f}-{took.high:.2f})"
            ratios[f"{shape} {way}"] = took.median
        rows.append(row)
    report("bfloat16", rows, ratios, {}, {})


if __name__ == "__main__":
    main()
