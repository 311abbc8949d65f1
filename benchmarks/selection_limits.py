"""Limits of what a press can keep and its scores can express, and the effect of selection losses (SmolLM2-135M).

Run from the checkout: ``python benchmarks/selection_limits.py`` for the limits (a minute or two on one core), and
``python benchmarks/selection_limits.py train`` for the training (about 45 s a row).

Limits are measured on the untrained model with needles, for every press and context length. Keys that a press keeps by
rule fill part of its budget; "best" is the attention that the rest of the budget could hold if the teacher's attention
selected it, "oracle" that of the whole budget without the rule. Attention is the teacher's while it answers, without
the first 4 tokens. The ratios on the last line are the attention lost over the least that the press's rule allows.

Training takes a few steps of only the selection loss on 4 contexts and measures the same 4: it shows what can change,
not what generalises.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from kvpress import (
    ExpectedAttentionPress,
    KeyDiffPress,
    KnormPress,
    LagKVPress,
    ScorerPress,
    SnapKVPress,
    TOVAPress,
)
from measure import report
from torch import Tensor

from data.collate import needle_batch, pad_id
from data.facts import Split
from data.needles import NeedleCase, NeedleTask, needle_ids
from data.packing import split_tokens
from data.text import EmbeddedText, Splits
from sparsekv_pl.eviction.prefill import prefill
from sparsekv_pl.eviction.request import Request
from sparsekv_pl.models.backbone import Backbone, causal_lm
from sparsekv_pl.models.batch import Supervised
from sparsekv_pl.models.decoder import decoder_of
from sparsekv_pl.models.lora import Lora
from sparsekv_pl.models.native_precision import decide
from sparsekv_pl.objectives.attention_mass import AttentionMass
from sparsekv_pl.objectives.score_alignment import evictable_keys, key_logits
from sparsekv_pl.objectives.selection_loss import SelectionLoss
from sparsekv_pl.presses import EvictionAugPress
from sparsekv_pl.presses.caught_scores import catch_scores
from sparsekv_pl.presses.nesting import press_name
from sparsekv_pl.training.teacher import Teacher

NATIVE = decide(accelerator="cpu")
SINKS = 4
LENGTHS, RATIOS, CASES = (256, 384), (0.5, 0.75), 6
PRESSES: dict[str, ScorerPress] = {
    "SnapKV, window 64": SnapKVPress(),
    "SnapKV, window 16": SnapKVPress(window_size=16),
    "LagKV, lag 128": LagKVPress(),
    "LagKV, lag 32, cross": LagKVPress(lag_size=32, cross_scoring=True),
    "LagKV, lag 16, cross": LagKVPress(lag_size=16, cross_scoring=True),
    "Knorm": KnormPress(),
    "ExpectedAttention": ExpectedAttentionPress(),
    "TOVA": TOVAPress(),
    "KeyDiff": KeyDiffPress(),
}


@dataclass
class Needles:
    """Contexts with one needle each, and the teacher's attention to them while it answers."""

    batch: Any
    needle: Tensor
    """(B, L) bool: the tokens of the needle."""
    mass: list[Tensor]
    """The teacher's attention, (B, K, L) per layer."""

    @property
    def beyond(self) -> Tensor:
        """(layers, B, K, L): the mass, 0 at the sinks."""
        mass = torch.stack(self.mass)
        mass[..., :SINKS] = 0
        return mass


def needles(model: Any, tokenizer: Any, tokens: int, count: int, split: Split) -> Needles:
    """Make ``count`` contexts of ``tokens`` tokens with needles spread over all depths."""
    text = split_tokens(EmbeddedText(), Splits(), split, tokenizer, tokens)
    task = NeedleTask(tokenizer, tokens, split=split, supervise="value_and_stop")
    cases = [task.case(i, text, depth=(i + 0.5) / count) for i in range(count)]
    batch = needle_batch(cases, pad_id(tokenizer))
    mass = AttentionMass(Supervised.of(batch["labels"]), tokens)
    Teacher(model)(batch["context_ids"], batch["continuation_ids"], mass)
    return Needles(batch, torch.stack([_span(task, case) for case in cases]), list(mass.mass.values()))


def _span(task: NeedleTask, case: NeedleCase) -> Tensor:
    wanted = torch.tensor(needle_ids(task.frame, case.fact))
    at = (torch.tensor(case.context_ids).unfold(0, len(wanted), 1) == wanted).all(-1).nonzero()[-1]
    places = torch.arange(len(case.context_ids))
    return (places >= at) & (places < at + len(wanted))


def scores_of(model: Any, context_ids: Tensor) -> dict[str, list[Tensor]]:
    """A press's scores of the same keys, (B, K, L) per layer. Evicting after each layer does not change them."""
    press = EvictionAugPress(list(PRESSES.values()), score_all=True)
    press.compression_ratio = 0.5  # kvpress scores nothing at 0
    names = {id(scorer): name for name, scorer in PRESSES.items()}
    scores: dict[str, list[Tensor]] = {name: [] for name in PRESSES}
    with catch_scores(press) as caught:
        prefill(causal_lm(model), context_ids, press)
    for item in sorted(caught, key=lambda item: item.layer):
        scores[names[id(item.scorer)]].append(item.scores)
    return scores


def highest(values: Tensor, count: int) -> Tensor:
    """Bool mask of the ``count`` highest values of the last axis."""
    chosen = torch.zeros_like(values, dtype=torch.bool)
    return chosen.scatter(-1, values.topk(count, dim=-1).indices, True)


def kept_rows(name: str, scores: Tensor, case: Needles) -> Iterator[tuple[dict[str, object], float]]:
    """What a press keeps at each ratio, and its lost attention over the least that its rule allows."""
    tokens, beyond = scores.shape[-1], case.beyond
    by_rule = torch.stack([~evictable_keys(layer, 0) for layer in scores])
    for ratio in RATIOS:
        budget = int(tokens * (1 - ratio))
        chosen = {
            "kept": highest(scores, budget),
            "best": highest(torch.where(by_rule, 1.0 + scores, beyond), budget),
            "oracle": highest(beyond, budget - SINKS),
        }
        held = {what: float((beyond * keys).sum() / beyond.sum()) for what, keys in chosen.items()}
        found = {what: keys[case.needle[None, :, None].expand_as(keys)].float().mean() for what, keys in chosen.items()}
        rule = float(by_rule.float().sum(-1).mean())
        row: dict[str, object] = {"press": name, "tokens": tokens, "ratio": ratio, "budget": budget}
        row |= {"by rule": f"{rule / budget:.0%}", "free": max(0, round(budget - rule))}
        row |= {f"attention {what}": f"{share:.3f}" for what, share in held.items()}
        row |= {f"needle {what}": f"{share:.2f}" for what, share in found.items()}
        yield row, (1 - held["kept"]) / (1 - held["best"])


def score_row(name: str, scores: list[Tensor], case: Needles, with_gradient: float) -> dict[str, object]:
    """Figures of a press's scores, averaged over heads weighted by their attention to evictable keys."""
    found: dict[str, list[Tensor]] = {}
    for layer, mass in zip(scores, case.mass, strict=True):
        keys = evictable_keys(layer, SINKS)
        kept = torch.where(keys, mass, 0)
        target = (kept / kept.sum(-1, keepdim=True)).clamp(min=1e-9).log()
        log_shares = torch.where(keys, key_logits(layer.float(), keys).log_softmax(-1), 0)
        distinct = torch.tensor([[len(head.unique()) for head in row] for row in layer]) / layer.shape[-1]
        values = {
            "entropy": _entropy(log_shares, keys),
            "teacher": _entropy(target, keys),
            "cross-entropy": -(target.exp() * log_shares * keys).sum(-1),
            "deviation": _deviation(log_shares, keys),
            "teacher's": _deviation(target, keys),
            "distinct": distinct,
            "weight": kept.sum(-1),
        }
        for key, value in values.items():
            found.setdefault(key, []).append(value)
    weight = torch.stack(found.pop("weight"))
    means = {key: float((torch.stack(values) * weight).sum() / weight.sum()) for key, values in found.items()}
    row: dict[str, object] = {"press": name, "tokens": scores[0].shape[-1]}
    return row | {key: f"{mean:.2f}" for key, mean in means.items()} | {"gradient": f"{with_gradient:.0%}"}


def _entropy(logs: Tensor, keys: Tensor) -> Tensor:
    return -(logs.exp() * logs * keys).sum(-1)


def _deviation(logs: Tensor, keys: Tensor) -> Tensor:
    """Standard deviation of log-shares; its inverse is the temperature that makes a standardised score as peaked."""
    mean = (logs * keys).sum(-1, keepdim=True) / keys.sum(-1, keepdim=True)
    return ((logs - mean).square() * keys).sum(-1).div(keys.sum(-1)).sqrt()


def limits(model: Any, tokenizer: Any) -> None:
    """Print both tables of the untrained model."""
    kept, scores, ratios = [], [], {}
    for tokens in LENGTHS:
        case = needles(model, tokenizer, tokens, CASES, "validation")
        graph = scores_of(model, case.batch["context_ids"][:1])
        with torch.no_grad():
            scores = scores_of(model, case.batch["context_ids"])
            for name, layers in scores.items():
                for row, ratio in kept_rows(name, torch.stack(layers).float(), case):
                    kept.append(row)
                    ratios[f"{name} {row['ratio']}@{tokens}"] = ratio
                with_gradient = sum(layer.requires_grad for layer in graph[name]) / len(layers)
                scores.append(score_row(name, layers, case, with_gradient))
    report("selection_limits: scores", scores, {}, {}, {})
    report("selection_limits", kept, ratios, dict.fromkeys(ratios, 1.0), {})


STEPS, ROWS, TOKENS, LAYERS = 12, 4, 256, 16
TRAINED = ("Knorm", "SnapKV, window 64", "SnapKV, window 16", "LagKV, lag 16, cross")
AS_MASSES = "cross-entropy, 1, scores as masses"
LOSSES = {
    "cross-entropy, 1": SelectionLoss(),
    "cross-entropy, 0.3": SelectionLoss(temperature=0.3),
    "ranking, 1": SelectionLoss(form="ranking"),
    "ranking, 0.3": SelectionLoss(form="ranking", temperature=0.3),
    AS_MASSES: SelectionLoss(),
}
NOT_FOR: dict[str, set[str]] = {"SnapKV": {AS_MASSES, "cross-entropy, 0.3"}, "LagKV": set()}
"""Pairs that equal another loss, because SnapKV's scores have a natural scale."""


def train(model: Any, tokenizer: Any, presses: list[str]) -> None:
    """Print, for each press and loss, the attention and needles kept before and after a few steps."""
    decoder_of(causal_lm(model)).layers = decoder_of(causal_lm(model)).layers[:LAYERS]
    case = needles(model, tokenizer, TOKENS, ROWS, "train")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    start = [parameter.detach().clone() for parameter in trained]
    before = {name: kept_now(model, name, case) for name in presses}
    rows = []
    for name in presses:
        for label, loss in LOSSES.items():
            if label in NOT_FOR.get(press_name(PRESSES[name]), {AS_MASSES}):
                continue
            with torch.no_grad():
                for parameter, value in zip(trained, start, strict=True):
                    parameter.copy_(value)
            gradient = _steps(model, trained, PRESSES[name], label == AS_MASSES, loss, case)
            after = kept_now(model, name, case)
            row = {"press": name, "loss": label, "first gradient": f"{gradient:.3f}"}
            rows.append(row | {key: f"{before[name][key]} -> {value}" for key, value in after.items()})
            print(rows[-1], flush=True)
    report("selection_limits: training", rows, {}, {}, {})


def _steps(
    model: Any, trained: list[Tensor], press: ScorerPress, as_masses: bool, loss: SelectionLoss, case: Needles
) -> float:
    """Train on alternating halves of the contexts; return the norm of the first step's gradient.

    ``as_masses`` treats scores as masses although they are not (LagKV's).
    """
    norms = []
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
    for step in range(STEPS):
        half = slice(0, ROWS // 2) if step % 2 else slice(ROWS // 2, ROWS)
        with NATIVE.autocast():
            context = case.batch["context_ids"][half]
            selections = prefill(causal_lm(model), context, press, request=Request(scores=True)).selections
        optimizer.zero_grad()
        if as_masses:
            selections = [replace(selection, order_only=False) for selection in selections]
        pairs = [(selection, case.mass[selection.layer][half]) for selection in selections]
        loss(pairs)[press_name(press)].backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, 1.0)))
        optimizer.step()
    return norms[0]


@torch.no_grad()
def kept_now(model: Any, name: str, case: Needles) -> dict[str, str]:
    """The untrained model's attention to the keys that the press now keeps, and the share of the needle's keys kept."""
    press = PRESSES[name]
    press.compression_ratio = 0.5  # kvpress scores nothing at 0
    with NATIVE.autocast():
        context = case.batch["context_ids"]
        selections = prefill(causal_lm(model), context, press, request=Request(scores=True)).selections
    scores = torch.stack([selection.scores for selection in selections]).float()
    rows = [row for row, _ in kept_rows(name, scores, case)]
    return {f"{what} at {row['ratio']}": str(row[f"{what} kept"]) for row in rows for what in ("attention", "needle")}


def main() -> None:
    """Print the limits, or with ``train`` and optional names of presses the training."""
    torch.manual_seed(0)
    print(NATIVE)
    model, tokenizer = Backbone(dtype=NATIVE.dtype, lora=Lora(r=16)).load()
    if sys.argv[1:2] == ["train"]:
        train(model, tokenizer, sys.argv[2:] or list(TRAINED))
    else:
        limits(model, tokenizer)


if __name__ == "__main__":
    main()
