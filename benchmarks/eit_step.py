"""One EIT step against one plain LoRA cross-entropy step on the same tokens, on SmolLM2-135M-Instruct.

Run from the checkout: ``python benchmarks/eit_step.py``. Takes about ten minutes on two cores.

The plain step is that of a fine-tuning script: one forward over all tokens, cross-entropy on all of them from dense
logits, backward. The EIT step runs the teacher, evicts half of the context with ExpectedAttention, and supervises the
continuation.
"""

from collections.abc import Callable

import torch
from kvpress import ExpectedAttentionPress
from measure import Ratio, paired_times, peak_memory, report
from torch.nn.functional import cross_entropy

from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.models.backbone import Backbone, causal_lm
from sparsekv_pl.models.batch import IGNORE
from sparsekv_pl.models.native_precision import decide
from sparsekv_pl.objectives import EIT, Mixed, Objective, SelectionObjective
from sparsekv_pl.training.eit_module import EITModule

NATIVE = decide(accelerator="cpu")
LENGTHS = (1_024, 2_048)
CONTINUATION_SHARE = 1 / 4
OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "eit": EIT,
    "eit+selection": lambda: Mixed([EIT(), SelectionObjective()]),
}
GOALS = {"eit": (1.6, 1.15), "eit+selection": (1.7, 1.15)}
"""Upper limits of time and memory over the plain step."""
FLOOR = 1.5
"""Lower bound in time for a step that supervises as many tokens: the teacher adds a forward to forward and backward.
Supervising only the continuation saves the LM head on the context and may be faster."""


def build_step(method: str, tokens: int) -> Callable[[], None]:
    """A whole step without the optimizer's; ``method`` is "plain" or the name of an objective."""
    torch.manual_seed(0)
    ids = torch.randint(5, 40_000, (1, tokens))
    if method == "plain":
        model, _ = Backbone(dtype=NATIVE.dtype).load()
        model.train()
        return lambda: _plain(model, ids)
    module = EITModule(Backbone(dtype=NATIVE.dtype), RealEviction(ExpectedAttentionPress()), OBJECTIVES[method]())
    module.train()
    cut = int(tokens * (1 - CONTINUATION_SHARE))
    labels = ids[:, cut:].clone()
    labels[:, 0] = IGNORE
    return lambda: _eit(module, ids[:, :cut], ids[:, cut:], labels)


def _plain(model: torch.nn.Module, ids: torch.Tensor) -> None:
    model.zero_grad()
    with NATIVE.autocast():
        logits = causal_lm(model)(input_ids=ids, use_cache=False).logits
        loss = cross_entropy(logits[0, :-1].float(), ids[0, 1:])
    loss.backward()


def _eit(module: EITModule, context: torch.Tensor, continuation: torch.Tensor, labels: torch.Tensor) -> None:
    module.zero_grad()
    batch = {"context_ids": context, "continuation_ids": continuation, "labels": labels}
    with NATIVE.autocast():
        terms, _ = module.loss_terms(batch, compression_ratio=0.5, step=0)  # type: ignore[arg-type]
    terms["loss"].backward()


def main() -> None:
    """Measure every objective at every length and print the ratios."""
    print(NATIVE)
    rows, ratios, goals = [], {}, {}
    for tokens in LENGTHS:
        plain_memory = peak_memory(__file__, "build_step", "plain", tokens)
        plain = build_step("plain", tokens)
        for method, (time_goal, memory_goal) in GOALS.items():
            timed: Ratio = paired_times(build_step(method, tokens), plain)
            memory = peak_memory(__file__, "build_step", method, tokens)
            key = f"{method}@{tokens}"
            ratios |= {f"{key} time": timed.median, f"{key} memory": memory / plain_memory}
            goals |= {f"{key} time": time_goal, f"{key} memory": memory_goal}
            rows.append(
                {
                    "step": method,
                    "tokens": tokens,
                    "time": f"{timed.median:.2f} ({timed.low:.2f}-{timed.high:.2f})",
                    "memory": f"{memory / plain_memory:.2f}",
                    "peak MiB": f"{memory / 2**20:.0f} against {plain_memory / 2**20:.0f}",
                }
            )
    report("eit_step", rows, ratios, {name: FLOOR for name in ratios if name.endswith("time")}, goals)


if __name__ == "__main__":
    main()
