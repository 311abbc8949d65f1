"""The ways to choose key blocks that are compared: a learned gate, Sketch&Walk, and controls below and above them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsekv_pl.attention.blocks import Blocks, BlockScorer, Selector, ThresholdBlocks, TopBlocks
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
    """A way to choose key blocks, under the name that a report gives it."""

    name: str
    make: Callable[[], BlockScorer]
    """A fresh scorer, without state: take one for every context."""
    threshold: float | None = None
    """Selects the blocks that score at least this; None: the best, as many as the budget."""

    def selector(self, scorer: BlockScorer, budget: int) -> Selector:
        """Chooses by the scores of ``scorer``; ``budget`` blocks, where there is no threshold."""
        return TopBlocks(scorer, budget) if self.threshold is None else ThresholdBlocks(scorer, self.threshold)


@dataclass
class FirstDense:
    """A scorer whose first ``layers`` layers are dense, as Sketch&Walk's are: equal terms for every method."""

    scorer: BlockScorer
    layers: int
    block_size: int = field(init=False)

    def __post_init__(self) -> None:
        self.block_size = self.scorer.block_size

    def __call__(self, layer: int, query: Tensor, key: Tensor) -> Tensor | None:
        """See ``BlockScorer``. The scorer is asked in every layer: it may remember what it saw."""
        scores = self.scorer(layer, query, key)
        return None if layer < self.layers else scores


class Watched:
    """A selector that notes how sparse the attention of a context was, dense layers included as 0."""

    def __init__(self, selector: Selector) -> None:
        self.selector = selector
        self._layers: list[Tensor] = []

    def __call__(self, layer: int, query: Tensor, key: Tensor) -> Blocks | None:
        """See ``Selector``."""
        blocks = self.selector(layer, query, key)
        if query.shape[2] == key.shape[2]:
            dense = torch.zeros((), device=query.device)
            self._layers.append(dense if blocks is None else blocks.sparsity().mean())
        return blocks

    def sparsity(self) -> float:
        """Of the key blocks that a context's queries could see, the share left out; mean over layers and heads."""
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
    """All methods but the oracles, gate first; without ``gates`` the gate is not among them."""
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
    """The blocks that really receive the most attention, for each head its own."""
    return BlockMethod(ORACLE, lambda: TrueBlocks(block_size))
