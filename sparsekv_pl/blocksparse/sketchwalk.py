"""Sketch&Walk: training-free selection of key blocks from sketches of block means and a walk across the layers.

"Scout Before You Attend" (https://arxiv.org/abs/2602.07397). In every layer, queries and keys are averaged over heads
and within blocks; their sketches give one score per pair of blocks, sharpened to a transition matrix W_l. The walk
multiplies these matrices from the first layer on: a query block can also reach a block through blocks in between.

Deviations from the paper:

- W_l is normalised by row. softmax(a)^s is softmax(s a) up to a factor per row, so rankings within a row of W_l do not
  change, and the product of 30 layers does not underflow. The product does change: the factor is largest for rows with
  few visible blocks, and without it all walks would end in the first blocks.
- Scores are divided by sqrt(D) of the head, as in attention, because our sketch preserves inner products for every
  ``sketch_dim``. The paper's text and the authors' code divide by sqrt(sketch_dim).
- ``damping``: 1 is the paper's product; 0.25 is used by the authors' code (Escanord/SketchWalk, ``walk_damping``) and
  is the default here. A product of many layers drifts to the first block, from which it cannot leave.
- The query of a block that is not full is the mean of its queries so far, in prefill and in decoding.

The authors' code also differs from the paper and from this module: it sums softmaxes of all heads, does not sharpen,
takes three damped steps of the walk per layer (a "degree" of 3), and keeps fractions of the context as sink and window.
Here all heads share one selection, and ``TopBlocks`` keeps the first and the own block.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsekv_pl.attention.blocks import block_count, check_seen, first_block, visible_blocks
from sparsekv_pl.blocksparse.hadamard import SubsampledHadamard


@dataclass
class SketchWalk:
    """A ``BlockScorer`` (see attention/blocks.py). Scores are rows of the walk, non-negative with sum 1.

    With W_l = softmax(exponent * q k^T / sqrt(D)) over the visible blocks, q and k sketched block means of layer l:
    R_0 = W_0 and R_l = (1 - damping) W_l + damping R_(l-1) W_l. Scores of layer l are the rows of R_l.

    It has state: use one object for all forwards of one context, in order, and a ``copy.deepcopy`` of it for a copy of
    the cache. A forward of T tokens only scores these T tokens, and gives the last rows of a prefill of all tokens. The
    state per layer is (B, N, sketch_dim) sums of keys and (B, N, N) transitions, N blocks, in float32. There is no
    gradient. Raises ``ValueError`` for a setting out of range.

    Parameters
    ----------
    block_size
        Tokens per block.
    sketch_dim
        Coordinates of the sketches, at most the next power of two from the head dimension.
    exponent
        Sharpening of the block scores, above 0.
    dense_layers
        Layers with a smaller index are dense; their transitions are part of the walk.
    damping
        Weight of the walk against the layer alone, from 0 (each layer by itself) to 1 (the paper's product).
    seed
        Seed of the sketch, which is the same for all layers.
    """

    block_size: int = 64
    sketch_dim: int = 64
    exponent: float = 8
    dense_layers: int = 2
    damping: float = 0.25
    seed: int = 0
    _sketch: SubsampledHadamard | None = field(default=None, init=False, repr=False, compare=False)
    _layers: "dict[int, _Layer]" = field(default_factory=dict, init=False, repr=False, compare=False)
    _pass: "_Pass | None" = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("block_size", "sketch_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 < self.exponent <= 1000:  # far beyond, one block takes all and the logits overflow
            raise ValueError(f"exponent={self.exponent} must be above 0, up to 1000: 1 leaves block scores as they are")
        if self.dense_layers < 0:
            raise ValueError(f"dense_layers={self.dense_layers} must be at least 0")
        if not 0 <= self.damping <= 1:
            raise ValueError(f"damping={self.damping} must be in [0, 1]: it is the weight of the walk")

    def reset(self) -> None:
        """Reset the state, before another model or a walk over other layers."""
        self._layers, self._pass = {}, None

    @torch.no_grad()
    def __call__(self, layer: int, query: Tensor, key: Tensor) -> Tensor | None:
        """(B, 1, Nq, Nk) float32, or None for the first layers. See ``BlockScorer``.

        Layers must ascend, and may be a subset of the model's: the context's first forward sets the layers of the walk,
        and later forwards must have the same. Raises ``ValueError`` for layers out of order, and if the S - T older
        keys are not the tokens scored before.
        """
        tokens = query.shape[0], query.shape[2], key.shape[2]
        walk = self._enter(layer, tokens)
        state = self._layers.get(layer) or _Layer.empty(query, self.sketch_dim)
        check_seen(layer, (tokens[0], tokens[2] - tokens[1]), (len(state.keys), state.seen))
        with torch.autocast(query.device.type, enabled=False):  # autocast would round sums and walk to 16 bits
            state, rows = self._advance(state, query, key)
            if walk is not None:
                rows = torch.lerp(rows, walk.to(rows.device) @ state.transitions, self.damping)
        self._layers[layer] = state
        self._pass = _Pass(layer, tokens, rows)
        return None if layer < self.dense_layers else rows[:, None]

    def _enter(self, layer: int, tokens: tuple[int, int, int]) -> Tensor | None:
        """The walk (B, Nq, Nk) before ``layer``, None for the first. Raises ``ValueError`` for layers out of order."""
        order, new_context = list(self._layers), tokens[1] == tokens[2]
        if not order or layer == order[0] or (new_context and layer < order[0]):
            if new_context:
                self.reset()
            return None
        begun = self._pass
        assert begun is not None
        in_turn = layer > begun.layer if new_context else order[order.index(begun.layer) + 1 :][:1] == [layer]
        if begun.tokens != tokens or not in_turn:
            raise ValueError(
                f"layer {layer} with (rows, queries, keys) {tokens} followed layer {begun.layer} with {begun.tokens}: "
                f"every forward gives the layers in ascending order from {order[0]} on, the same ones in all forwards "
                "of a context. Call reset() before a walk over other layers"
            )
        return begun.walk

    def _advance(self, state: "_Layer", query: Tensor, key: Tensor) -> "tuple[_Layer, Tensor]":
        """Add the new tokens to the layer's state; return the state and the tokens' rows (B, Nq, Nk) of W_l."""
        queries, keys, dim = query.shape[2], key.shape[2], query.shape[3]
        first, count = first_block(queries, keys, self.block_size), block_count(keys, self.block_size)
        query_sums = self._sketched(block_sums(query, state.seen, self.block_size))
        if state.seen % self.block_size:
            query_sums[:, 0] += state.query
        key_sums = pad(state.keys, (0, 0, 0, count - state.keys.shape[1]))
        key_sums[:, first:] += self._sketched(block_sums(key[:, :, state.seen :], state.seen, self.block_size))
        starts = torch.arange(count, device=key.device) * self.block_size
        sizes = (keys - starts).clamp(max=self.block_size)[:, None]
        scores = (query_sums / sizes[first:]) @ (key_sums / sizes).transpose(1, 2) * dim**-0.5
        visible = visible_blocks(queries, keys, self.block_size, key.device)
        rows = (scores * self.exponent).masked_fill(~visible, -torch.inf).softmax(-1)
        transitions = rows.new_zeros(len(rows), count, count)
        transitions[:, :first, :first] = state.transitions[:, :first, :first]
        transitions[:, first:] = rows
        return _Layer(keys, key_sums, query_sums[:, -1], transitions), rows

    def _sketched(self, sums: Tensor) -> Tensor:
        if self._sketch is None or len(self._sketch.signs) != sums.shape[-1]:
            self._sketch = SubsampledHadamard(sums.shape[-1], self.sketch_dim, self.seed)
        return self._sketch.to(sums.device)(sums)


class _Layer(NamedTuple):
    """A layer's state, as sums, so that a block that is not full can grow."""

    seen: int
    """Number of tokens seen."""
    keys: Tensor
    """(B, N, sketch_dim), sketched sums of every block's keys."""
    query: Tensor
    """(B, sketch_dim), sketched sum of the last block's queries."""
    transitions: Tensor
    """(B, N, N), a row of W_l per query block."""

    @classmethod
    def empty(cls, like: Tensor, sketch_dim: int) -> "_Layer":
        zeros = like.new_zeros(len(like), 0, sketch_dim, dtype=torch.float32)
        return cls(0, zeros, zeros.sum(1), zeros[..., :0])


class _Pass(NamedTuple):
    """State of the running forward after a layer."""

    layer: int
    tokens: tuple[int, int, int]
    """Rows, queries and keys: the same in all layers of a forward."""
    walk: Tensor
    """(B, Nq, Nk), the rows of R_l."""


def block_sums(states: Tensor, start: int, block_size: int) -> Tensor:
    """Average states (B, heads, T, D) over heads and sum them over the tokens of each block: (B, n, D) float32.

    The first token is at position ``start``; the first and the last block may be partial.
    """
    tokens = states.shape[2]
    before = min(-start % block_size, tokens)
    whole = before + (tokens - before) // block_size * block_size
    parts = []
    # On a CPU, summing 16-bit numbers in float32 copies them: strips keep the copy in the CPU's cache.
    step = tokens if states.is_cuda else 4 * block_size
    for strip in states[:, :, before:whole].split(step, 2) if whole > before else ():
        parts.append(strip.unflatten(2, (-1, block_size)).sum(3, dtype=torch.float32).sum(1))
    if before:
        parts.insert(0, states[:, :, :before].sum((1, 2), dtype=torch.float32)[:, None])
    if whole < tokens:
        parts.append(states[:, :, whole:].sum((1, 2), dtype=torch.float32)[:, None])
    return torch.cat(parts, 1) / states.shape[1]
