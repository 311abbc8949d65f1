"""Time of the parts of an EIT step with torch.compile over the same part without.

Run from the checkout: ``python benchmarks/compile.py``. Takes about ten minutes on two cores, most of it compiling.

A ratio below 1 is a gain. Compilation is not in the ratios; another column has the seconds of the first call. A whole
decoder layer is traced through the press's hook and the growing cache: ``graphs`` counts compilations, including
recompilations for a new length, and ``breaks`` counts graph breaks, where Python continues.
"""

import time
from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import torch
from kvpress import SnapKVPress
from measure import paired_times, report
from torch import Tensor

from sparsekv_pl.eviction.interface import Selection
from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.models.backbone import Backbone, causal_lm
from sparsekv_pl.models.batch import IGNORE
from sparsekv_pl.models.decoder import decoder_of
from sparsekv_pl.models.native_precision import decide
from sparsekv_pl.objectives import EIT, Mixed, SelectionObjective, losses
from sparsekv_pl.objectives.selection_loss import SelectionLoss
from sparsekv_pl.training.eit_module import EITModule

NATIVE = decide(accelerator="cpu")
Step = Callable[[], object]
CONTEXTS = (256, 240, 248, 232)
"""Context lengths in turn, which shows whether the compiler needs a graph per length."""
CONTINUATION = 64
PIECES = {"norms": ("input_layernorm", "post_attention_layernorm"), "mlp": ("mlp",)}


def token_loss(compiled: bool) -> Step:
    """Cross-entropy and KL of 256 tokens over SmolLM2's vocabulary, float32 arithmetic, inputs of the native type."""
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, NATIVE.dtype)
    hidden = partial(torch.randn, 256, 576, generator=generator, dtype=dtype)
    student, teacher = hidden().requires_grad_(), hidden()
    head = torch.randn(49_152, 576, generator=generator).mul_(0.05).to(dtype)
    labels = torch.randint(49_152, (256,), generator=generator)
    chunk = torch.compile(losses._loss_and_grad, dynamic=True) if compiled else losses._loss_and_grad

    def step() -> None:
        with patch.object(losses, "_loss_and_grad", chunk):
            losses.distillation_loss(student, teacher, head, labels, kl_weight=1.0).loss.backward()

    return step


def selection_loss(compiled: bool) -> Step:
    """The selection loss of 30 layers: 4 rows, 3 KV heads, 1,024 keys."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(30, 4, 3, 1_024, generator=generator, requires_grad=True)
    mass = torch.rand(30, 4, 3, 1_024, generator=generator)
    loss = SelectionLoss()
    parts = {name: getattr(loss, name) for name in ("_target", "_heads")}
    if compiled:
        parts = {name: torch.compile(part, dynamic=True) for name, part in parts.items()}

    def step() -> None:
        with patch.multiple(loss, **parts):
            pairs = [(Selection(i, "SnapKV", scores[i]), mass[i]) for i in range(30)]
            loss(pairs)["SnapKV"].backward()

    return step


def training_step(part: str, compiled: bool) -> Step:
    """A whole EIT step without the optimizer's, with ``part`` of every layer compiled."""
    objective = Mixed([EIT(), SelectionObjective()])
    module = EITModule(Backbone(dtype=NATIVE.dtype), RealEviction(SnapKVPress()), objective)
    module.train()
    if compiled:
        for layer in decoder_of(causal_lm(module.model)).layers:
            for piece in [layer] if part == "layer" else [getattr(layer, name) for name in PIECES[part]]:
                piece.compile(dynamic=True)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(5, 40_000, (1, tokens + CONTINUATION), generator=generator) for tokens in CONTEXTS]

    def step() -> None:
        for ids in batches:
            _train(module, ids)

    return step


def _train(module: EITModule, ids: Tensor) -> None:
    module.zero_grad()
    context, continuation = ids[:, :-CONTINUATION], ids[:, -CONTINUATION:]
    labels = continuation.clone()
    labels[:, 0] = IGNORE
    batch = {"context_ids": context, "continuation_ids": continuation, "labels": labels}
    with NATIVE.autocast():
        terms, _ = module.loss_terms(batch, compression_ratio=0.5, step=0)  # type: ignore[arg-type]
    terms["loss"].backward()


PARTS: dict[str, Callable[[bool], Step]] = {
    "token loss": token_loss,
    "selection loss": selection_loss,
    "step, norms compiled": partial(training_step, "norms"),
    "step, MLPs compiled": partial(training_step, "mlp"),
    "step, layers compiled": partial(training_step, "layer"),
}


def main() -> None:
    """Time each part, compiled over uncompiled, in turn."""
    print(NATIVE)
    rows, ratios = [], {}
    for name, build in PARTS.items():
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        step, reference = build(True), build(False)
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
        timed = paired_times(step, reference)
        counters = torch._dynamo.utils.counters
        ratios[name] = timed.median
        rows.append(
            {
                "part": name,
                "time": f"{timed.median:.2f} ({timed.low:.2f}-{timed.high:.2f})",
                "first call": f"{seconds:.0f} s",
                "graphs": counters["stats"]["unique_graphs"],
                "breaks": sum(counters["graph_break"].values()),
            }
        )
    report("compile", rows, ratios, floors={}, goals={})


if __name__ == "__main__":
    main()
