"""The compared block methods: a learned gate, Sketch&Walk, and lower and upper controls."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsekv_pl.attention.blocks import (
    Blocks,
    BlockScorer,
    Selector,
    threshold_blocks,
    top_blocks,
)
from sparsekv_pl.blocksparse.control_blocks import LocalBlocks, RandomBlocks
from sparsekv_pl.blocksparse.gate import AttentionGates, GateScorer
from sparsekv_pl.blocksparse.sketchwalk import SketchWalk
from sparsekv_pl.blocksparse.true_blocks import TrueBlocks
from sparsekv_pl.models.devices import stacked

DENSE = "dense"
GATE, SKETCH_WALK = "gate", "Sketch&Walk"
RANDOM, LOCAL = "random", "local"
ORACLE, SHARED_ORACLE = "oracle", "oracle, one choice for all heads"


def thresholded(threshold: float) -> str:
    """The name of the gate that selects by a threshold."""
    return f"{GATE}, threshold {threshold:g}"


@dataclass(frozen=True)
class BlockMethod:
    """A method that selects key blocks, with its name in reports."""

    name: str
    make: Callable[[], BlockScorer]
    """Makes a scorer without state, for one context."""
    threshold: float | None = None
    """Least score of a selected block; None: the best blocks within the budget are selected."""

    def chosen(self, scores: Tensor, budget: int, block_size: int, keys: int) -> Blocks:
        """The blocks selected by ``scores`` (B, G, Nq, Nk)."""
        if self.threshold is None:
            return top_blocks(scores, budget, block_size, keys)
        return threshold_blocks(scores, self.threshold, block_size, keys)

    def selector(self, scorer: BlockScorer, budget: int) -> Selector:
        """A selector by the scores of ``scorer``, of ``budget`` blocks if there is no threshold."""

        def select(layer: int, query: Tensor, key: Tensor) -> Blocks | None:
            scores = scorer(layer, query, key)
            return None if scores is None else self.chosen(scores, budget, scorer.block_size, key.shape[2])

        return select


@dataclass
class FirstDense:
    """A scorer that leaves the first ``layers`` layers dense, as Sketch&Walk does, for a fair comparison."""

    scorer: BlockScorer
    layers: int
    block_size: int = field(init=False)

    def __post_init__(self) -> None:
        self.block_size = self.scorer.block_size

    def __call__(self, layer: int, query: Tensor, key: Tensor) -> Tensor | None:
        """See ``BlockScorer``. The inner scorer is called in every layer, because it may have state."""
        scores = self.scorer(layer, query, key)
        return None if layer < self.layers else scores


class Watched:
    """A selector that also records the sparsity of a context's attention; dense layers count as 0."""

    def __init__(self, selector: Selector) -> None:
        self.selector = selector
        self._layers: list[Tensor] = []

    def __call__(self, layer: int, query: Tensor, key: Tensor) -> Blocks | None:
        blocks = self.selector(layer, query, key)
        if query.shape[2] == key.shape[2]:
            dense = torch.zeros((), device=query.device)
            self._layers.append(dense if blocks is None else blocks.sparsity().mean())
        return blocks

    def sparsity(self) -> float:
        """The share of visible key blocks that was not selected, mean over layers and heads."""
        return float(stacked(self._layers).mean())


def block_methods(
    gates: AttentionGates | None,
    block_size: int,
    sketch_dim: int,
    exponent: float,
    dense_layers: int,
    dampings: Sequence[float],
    threshold: float,
    seed: int,
) -> list[BlockMethod]:
    """All methods except the oracles, the gate first; without ``gates`` there is no gate."""
    methods = []
    if gates is not None:
        methods += [
            BlockMethod(GATE, lambda: GateScorer(gates)),
            BlockMethod(thresholded(threshold), lambda: GateScorer(gates), threshold),
        ]
    for damping in dampings:

        def sketch_walk(damping: float = damping) -> BlockScorer:
            return SketchWalk(block_size, sketch_dim, exponent, dense_layers, damping, seed)

        name = SKETCH_WALK if damping == dampings[0] else f"{SKETCH_WALK}, damping {damping:g}"
        methods.append(BlockMethod(name, sketch_walk))
    methods += [
        BlockMethod(RANDOM, lambda: RandomBlocks(block_size, seed)),
        BlockMethod(LOCAL, lambda: LocalBlocks(block_size)),
    ]
    return methods


def oracle(block_size: int) -> BlockMethod:
    """The method that selects, per head, the blocks with the most true attention."""
    return BlockMethod(ORACLE, lambda: TrueBlocks(block_size))
