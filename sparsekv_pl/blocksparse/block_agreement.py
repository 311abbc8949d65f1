"""Agreement of block methods with the attention of one dense pass, and with one another."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from sparsekv_pl.attention.blocks import Blocks, BlockScorer, top_blocks, visible_blocks
from sparsekv_pl.blocksparse.agreement_scores import (
    blocks_for_mass,
    free_blocks,
    jaccard,
    mass_kept,
    overlap,
    pearson,
    sparsity,
    spearman,
)
from sparsekv_pl.blocksparse.block_methods import ORACLE, SHARED_ORACLE, BlockMethod
from sparsekv_pl.blocksparse.true_blocks import block_attention
from sparsekv_pl.storage.records import Record, rounded


@dataclass(frozen=True)
class AgreementSettings:
    """Settings of ``BlockAgreement``."""

    block_size: int = 64
    top_k: int = 16
    """Blocks per query block that a method selects. Query blocks that see no more than these are not counted."""
    budgets: Sequence[int] = (4, 8, 16, 32)
    """Further numbers of blocks for which mass kept and recall are reported."""
    shares: Sequence[float] = (0.9, 0.95)
    """Shares of the attention mass for which the needed number of blocks is reported."""
    pictured: Sequence[int] = ()
    """Layers whose selections are stored for a picture."""


class BlockAgreement:
    """An ``Observer`` (evicted_attention.py) of one dense pass over a context of one row.

    Every method's scorer sees each layer's queries and keys and selects blocks, which does not change the pass. The
    oracles, whose scores are the true attention, are added. A layer that a scorer leaves dense has no record.

    ``agreement`` has a record per layer and method, ``pairs`` one per layer and pair of methods, ``pictures`` one per
    pictured layer. ``blocksparse/agreement_scores.py`` defines the measures; the reference of overlap, Jaccard and
    recall is the oracle's selection per head. All are means over the counted query blocks and the heads. Measures that
    end in ``_free`` leave out the first block and a query's own. Mass, recall and sparsity at budgets and for shares
    are measured for methods without a threshold.
    """

    def __init__(self, methods: Sequence[BlockMethod], settings: AgreementSettings) -> None:
        self.methods, self.settings = methods, settings
        self._scorers: list[BlockScorer] = [method.make() for method in methods]
        self._by_threshold = {method.name for method in methods if method.threshold is not None}
        self.agreement: list[Record] = []
        self.pairs: list[Record] = []
        self.pictures: list[Record] = []

    @torch.no_grad()
    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> None:  # noqa: ARG002
        """Measure one layer: ``query`` (1, H, S, D), ``key`` (1, K, S, D)."""
        size, keys = self.settings.block_size, key.shape[2]
        truth = block_attention(query, key, size).mass
        chosen: dict[str, tuple[Tensor, Blocks]] = {}
        for method, scorer in zip(self.methods, self._scorers, strict=True):
            scores = scorer(layer, query, key)
            if scores is not None:
                chosen[method.name] = scores, method.chosen(scores, self.settings.top_k, size, keys)
        for name, scores in {ORACLE: truth, SHARED_ORACLE: truth.mean(1, keepdim=True)}.items():
            chosen[name] = scores, top_blocks(scores, self.settings.top_k, size, keys)
        self._compare(layer, truth, chosen, visible_blocks(query.shape[2], keys, size, query.device))

    def _compare(self, layer: int, truth: Tensor, chosen: dict[str, tuple[Tensor, Blocks]], visible: Tensor) -> None:
        masks = {name: blocks.mask() for name, (_, blocks) in chosen.items()}
        if layer in self.settings.pictured:
            selections = {name: _picture(mask.float()) for name, mask in masks.items()}
            self.pictures.append({"layer": layer, "truth": _picture(truth), "chosen": selections})
        counted = visible.sum(-1) > self.settings.top_k
        truth, visible = truth[:, :, counted], visible[counted]
        masks = {name: mask[:, :, counted] for name, mask in masks.items()}
        for name, (scores, blocks) in chosen.items():
            record: Record = {"layer": layer, "method": name, "sparsity": float(blocks.sparsity().mean())}
            record |= _with_oracle(masks[name], masks[ORACLE], visible)
            record |= self._with_truth(scores[:, :, counted], masks[name], truth, visible)
            if name not in self._by_threshold:
                record |= self._at_budgets(scores[:, :, counted], truth, visible)
            self.agreement.append(record)
        for one, other in combinations([name for name in chosen if name not in (ORACLE, SHARED_ORACLE)], 2):
            record = {"layer": layer, "method": one, "other": other}
            self.pairs.append(record | _of_two(masks[one], masks[other], visible))

    @staticmethod
    def _with_truth(scores: Tensor, mask: Tensor, truth: Tensor, visible: Tensor) -> Record:
        free = free_blocks(visible)
        return {
            "choice_sparsity": float(sparsity(mask.sum(-1), visible).mean()),
            "mass_kept": _mean(mass_kept(mask, truth)),
            "pearson": _mean(pearson(scores, truth, visible)),
            "spearman": _mean(spearman(scores, truth, visible)),
            "pearson_free": _mean(pearson(scores, truth, free)),
            "spearman_free": _mean(spearman(scores, truth, free)),
        }

    def _at_budgets(self, scores: Tensor, truth: Tensor, visible: Tensor) -> Record:
        free = free_blocks(visible)
        record: Record = {}
        for share in self.settings.shares:
            needed = blocks_for_mass(scores, truth, share, visible)
            record[f"sparsity_for_{share:g}"] = float(sparsity(needed, visible).mean())
        for budget in self.settings.budgets:
            selected, best = self._best(scores, budget), self._best(truth, budget)
            record[f"mass_at_{budget}"] = _mean(mass_kept(selected, truth))
            record[f"recall_at_{budget}"] = _mean(overlap(best, selected, free))
            record[f"sparsity_at_{budget}"] = float(sparsity(selected.sum(-1), visible).mean())
        return record

    def _best(self, scores: Tensor, budget: int) -> Tensor:
        """(B, G, rows, N) bool: the best ``budget`` blocks of the last rows; G is H or 1."""
        size = self.settings.block_size
        return top_blocks(scores, budget, size, scores.shape[-1] * size).mask()


def _with_oracle(mask: Tensor, oracle: Tensor, visible: Tensor) -> Record:
    both = _of_two(mask, oracle, visible)
    both["recall"], both["recall_free"] = both.pop("overlap_back"), both.pop("overlap_back_free")
    return both


def _of_two(one: Tensor, other: Tensor, visible: Tensor) -> Record:
    record = {}
    for end, among in (("", visible), ("_free", free_blocks(visible))):
        record[f"overlap{end}"] = _mean(overlap(one, other, among))
        record[f"overlap_back{end}"] = _mean(overlap(other, one, among))
        record[f"jaccard{end}"] = _mean(jaccard(one, other, among))
    return record


def _mean(values: Tensor) -> float | None:
    """Mean over rows and heads where the measure is defined; None if it is defined nowhere."""
    mean = float(values.double().nanmean())
    return None if mean != mean else mean


def _picture(values: Tensor) -> list[list[float]]:
    """``values`` (1, G, Nq, Nk) as (Nq, Nk) lists, averaged over heads."""
    return rounded(values[0].mean(0).tolist(), 3)
