"""Steps under eviction against one plain LoRA cross-entropy step on the same tokens, on SmolLM2-135M-Instruct.

Run from the checkout: ``python benchmarks/eit_step.py``; ``--tokens 1024 --only robust robust-local`` runs a part.
Takes about an hour on two cores, ten minutes at 1,024 tokens.

The plain step is that of a fine-tuning script: one forward over all tokens, cross-entropy on all of them from dense
logits, backward. The others run the teacher, evict most of the context and supervise the continuation: "eit" half of
the context with ExpectedAttention and a quarter of the tokens as continuation; "robust" is the recipe of
configs/train/robust.yaml, four presses aligned and every token of the context held to the base, "robust-unheld" the
same without the latter. Seconds are CPU time.
"""

import time
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from counted_step import robust_press
from kvpress import BasePress, ExpectedAttentionPress
from measure import Ratio, paired_times, peak_memory, report, seconds
from torch.nn.functional import cross_entropy

from sparsekv_pl.eviction.local_gradients import LocalGradients
from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.models.backbone import Backbone, causal_lm
from sparsekv_pl.models.batch import IGNORE
from sparsekv_pl.models.native_precision import decide
from sparsekv_pl.objectives import EIT, FirstChunk, Mixed, Objective, SelectionObjective
from sparsekv_pl.training.eit_module import EITModule

NATIVE = decide(accelerator="cpu")
LENGTHS = (1_024, 2_048, 4_096)
PLAIN = "plain"


@dataclass
class Method:
    """A step to measure: its press, loss, eviction's settings, continuation and ratio, and the goals over the plain."""

    press: Callable[[], BasePress]
    objective: Callable[[], Objective]
    settings: dict[str, Any] = field(default_factory=dict)
    continuation_share: float = 1 / 16
    compression_ratio: float = 0.9
    goals: tuple[float, float] = (1.3, 1.15)
    """Upper limits of time and of memory over the plain step."""


def recipe() -> Objective:
    """The recipe's losses."""
    return Mixed([EIT(), SelectionObjective(), FirstChunk(EIT(kl_weight=100.0))], [1.0, 10.0, 0.1])


def unheld() -> Objective:
    """The recipe's losses of the continuation and of the scores."""
    return Mixed([EIT(), SelectionObjective()], [1.0, 10.0])


METHODS = {
    "eit": Method(ExpectedAttentionPress, EIT, {}, 1 / 4, 0.5, (1.6, 1.15)),
    "eit+selection": Method(
        ExpectedAttentionPress, lambda: Mixed([EIT(), SelectionObjective()]), {}, 1 / 4, 0.5, (1.7, 1.15)
    ),
    "robust": Method(robust_press, recipe),
    "robust-unheld": Method(robust_press, unheld),
    "robust-eviction": Method(robust_press, EIT),
    "robust-local": Method(robust_press, recipe, {"local_gradients": LocalGradients()}),
    "robust-chunks": Method(robust_press, recipe, {"chunk_tokens": 512, "checkpoint": True}),
}
FLOOR = 1.5
"""Lower bound in time for a step that supervises as many tokens: the teacher adds a forward to forward and backward.
Supervising only the continuation saves the LM head on the context, and gradients that stay in the layer save the
context's backward, so that both may be faster."""


def build_step(name: str, tokens: int) -> Callable[[], None]:
    """A whole step without the optimizer's; ``name`` is "plain" or a method's."""
    torch.manual_seed(0)
    ids = torch.randint(5, 40_000, (1, tokens))
    if name == PLAIN:
        model, _ = Backbone(dtype=NATIVE.dtype).load()
        model.train()
        return lambda: _plain(model, ids)
    method = METHODS[name]
    module = EITModule(
        Backbone(dtype=NATIVE.dtype), RealEviction(method.press(), **method.settings), method.objective()
    )
    module.train()
    cut = int(tokens * (1 - method.continuation_share))
    labels = ids[:, cut:].clone()
    labels[:, 0] = IGNORE
    return lambda: _eit(module, ids[:, :cut], ids[:, cut:], labels, method.compression_ratio)


def _plain(model: torch.nn.Module, ids: torch.Tensor) -> None:
    model.zero_grad()
    with NATIVE.autocast():
        logits = causal_lm(model)(input_ids=ids, use_cache=False).logits
        loss = cross_entropy(logits[0, :-1].float(), ids[0, 1:])
    loss.backward()


def _eit(
    module: EITModule, context: torch.Tensor, continuation: torch.Tensor, labels: torch.Tensor, ratio: float
) -> None:
    module.zero_grad()
    batch = {"context_ids": context, "continuation_ids": continuation, "labels": labels}
    with NATIVE.autocast():
        terms, _ = module.loss_terms(batch, compression_ratio=ratio, step=0)  # type: ignore[arg-type]
    terms["loss"].backward()


def main(lengths: Sequence[int], names: Sequence[str], rounds: int) -> None:
    """Measure every method at every length and print the ratios."""
    print(NATIVE)
    rows: list[dict[str, object]] = []
    ratios, goals = {}, {}
    for tokens in lengths:
        plain_memory = peak_memory(__file__, "build_step", PLAIN, tokens)
        plain = build_step(PLAIN, tokens)
        plain()
        plain_seconds = seconds(plain, time.process_time)
        for name in names:
            step = build_step(name, tokens)
            timed: Ratio = paired_times(step, plain, rounds, time.process_time)
            memory = peak_memory(__file__, "build_step", name, tokens)
            key = f"{name}@{tokens}"
            ratios |= {f"{key} time": timed.median, f"{key} memory": memory / plain_memory}
            goals |= dict(zip((f"{key} time", f"{key} memory"), METHODS[name].goals, strict=True))
            rows.append(
                {
                    "step": name,
                    "tokens": tokens,
                    "CPU s": f"{timed.median * plain_seconds:.2f} against {plain_seconds:.2f}",
                    "time": f"{timed.median:.2f} ({timed.low:.2f}-{timed.high:.2f})",
                    "memory": f"{memory / plain_memory:.2f}",
                    "peak MiB": f"{memory / 2**20:.0f} against {plain_memory / 2**20:.0f}",
                }
            )
            del step
    report("eit_step", rows, ratios, {name: FLOOR for name in ratios if name.endswith("time")}, goals)


if __name__ == "__main__":
    parser = ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    main(given.tokens, given.only, given.rounds)
