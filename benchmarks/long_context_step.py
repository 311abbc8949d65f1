"""Cost of a training step on long contexts with a fixed budget, in chunks with activation checkpointing.

Run from the checkout: ``python benchmarks/long_context_step.py``. Takes about half an hour on one core.

SmolLM2-135M-Instruct, LoRA r 16, the LM objective under ExpectedAttention, in the CPU's native precision. Longer
contexts only have more chunks, and ideally need neither more memory nor more time per token. Only the state stored
between chunks has to grow; its size is printed.
"""

from collections.abc import Callable

import torch
from kvpress import ExpectedAttentionPress
from measure import paired_times, peak_memory, report

from sparsekv_pl.eviction.prefill import ChunkedPrefill
from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.models.backbone import Backbone, causal_lm
from sparsekv_pl.models.batch import IGNORE
from sparsekv_pl.models.native_precision import decide
from sparsekv_pl.objectives import LM
from sparsekv_pl.training.eit_module import EITModule

NATIVE = decide(accelerator="cpu")
SHORT, LONG = 2_048, 8_192
CHUNK = BUDGET = CONTINUATION = 512
WITHOUT = (2_048, 4_096)
"""Lengths in tokens that are also measured without checkpointing."""
MEMORY_GOAL, TIME_GOAL = 1.3, 1.25
"""Upper limits of the long context over the short one, in memory and in time per token."""


def build_step(tokens: int, checkpoint: bool) -> Callable[[], None]:
    """A whole step without the optimizer's on ``tokens`` tokens of context and continuation together."""
    module, batch = _module(checkpoint), _batch(tokens)

    def step() -> None:
        module.zero_grad()
        with NATIVE.autocast():
            terms, _ = module.loss_terms(batch, compression_ratio=0.0, step=0)  # type: ignore[arg-type]
        terms["loss"].backward()

    return step


def _module(checkpoint: bool) -> EITModule:
    torch.manual_seed(0)
    eviction = RealEviction(ExpectedAttentionPress(), CHUNK, BUDGET, checkpoint=checkpoint)
    module = EITModule(Backbone(dtype=NATIVE.dtype), eviction, LM())
    module.train()
    return module


def _batch(tokens: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 40_000, (1, tokens), generator=torch.Generator().manual_seed(0))
    labels = ids[:, -CONTINUATION:].clone()
    labels[:, 0] = IGNORE
    return {"context_ids": ids[:, :-CONTINUATION], "continuation_ids": ids[:, -CONTINUATION:], "labels": labels}


@torch.no_grad()
def state_bytes() -> int:
    """Bytes that a checkpointed step stores per chunk after the budget is full."""
    filling = ChunkedPrefill(causal_lm(_module(True).model), ExpectedAttentionPress(), 2 * CHUNK, CHUNK, BUDGET)
    with NATIVE.autocast():
        for ids in _batch(2 * CHUNK + CONTINUATION)["context_ids"].split(CHUNK, dim=1):
            filling.advance(ids)
    return sum(tensor.nbytes for tensor in filling.state_dict().values())


def main() -> None:
    """Measure memory at every length, and time at the two lengths that are compared."""
    print(NATIVE)
    lengths = [(SHORT, True), (LONG, True), *((tokens, False) for tokens in WITHOUT)]
    memory = {key: peak_memory(__file__, "build_step", *key) for key in lengths}
    timed = paired_times(build_step(LONG, True), build_step(SHORT, True))
    rows = [
        {
            "tokens": tokens,
            "checkpoint": checkpoint,
            "chunks": (tokens - CONTINUATION) // CHUNK,
            "peak MiB": f"{memory[tokens, checkpoint] / 2**20:.0f}",
            "over short": f"{memory[tokens, checkpoint] / memory[SHORT, True]:.2f}",
        }
        for tokens, checkpoint in lengths
    ]
    per_token = timed._replace(**{name: value * SHORT / LONG for name, value in timed._asdict().items()})
    print(f"kept between two chunks: {state_bytes() / 2**20:.1f} MiB")
    print(f"time per token, {LONG} over {SHORT}: {per_token.median:.2f} ({per_token.low:.2f}-{per_token.high:.2f})")
    ratios = {"memory": memory[LONG, True] / memory[SHORT, True], "time per token": per_token.median}
    report("long_context_step", rows, ratios, {}, {"memory": MEMORY_GOAL, "time per token": TIME_GOAL})


if __name__ == "__main__":
    main()
