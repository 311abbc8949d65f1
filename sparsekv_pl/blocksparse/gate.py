"""A learned gate: small projections of pooled queries and keys that say which key blocks a query block will attend to.

SeerAttention (https://arxiv.org/abs/2410.13276), with its default pools: the average for queries; maximum, minimum and
average for keys. What differs from the paper:

- Queries and keys arrive after RoPE, as attention sees them; the gate turns them back before it pools.
- ``gate_dim`` may differ from the head's dimension; the frequencies at block positions are then picked evenly from the
  model's.
- Projections start as the identity on the averages, so that an untrained gate compares block means.
"""

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsekv_pl.attention.blocks import visible_blocks
from sparsekv_pl.blocksparse.gate_store import GateShape, read_gates, write_gates
from sparsekv_pl.models.cache_shape import cache_shape
from sparsekv_pl.models.decoder import decoder_of

STRIP = 16
"""Blocks turned back at once, in float32: bounds the memory and stays in a CPU's cache."""

Pool = Callable[[Tensor], Tensor]
QUERY_POOLS: tuple[Pool, ...] = (lambda blocks: blocks.mean(3),)
KEY_POOLS: tuple[Pool, ...] = (lambda blocks: blocks.amax(3), lambda blocks: blocks.amin(3), QUERY_POOLS[0])


class Rope(NamedTuple):
    """How a layer turns queries and keys: pairs of numbers, half of the turned ones apart, by position * inv_freq."""

    inv_freq: Tensor
    """(rotary_dim / 2,) radians per position; zeros where a layer does not turn them at all."""
    scaling: float
    """What turned numbers are multiplied with besides."""


def ropes_of(model: PreTrainedModel) -> list[Rope]:
    """The RoPE of every layer of ``model``.

    Raises
    ------
    ValueError
        Where it could not be undone from a position alone: frequencies that change with the context's length or the
        layer's kind, or pairs that are made otherwise (tried on the model's own function).
    """
    decoder = decoder_of(model)
    rotary: Any = getattr(decoder, "rotary_emb", None)
    inv_freq, kind = getattr(rotary, "inv_freq", None), getattr(rotary, "rope_type", "default")
    if inv_freq is None or "dynamic" in kind or kind == "longrope":
        raise ValueError(
            f"{type(model).__name__} has no RoPE of fixed frequencies (rope_type {kind!r}), which a gate must undo: "
            "choose another model, or a selector that does not look before RoPE (SketchWalk)"
        )
    rope = Rope(inv_freq, float(rotary.attention_scaling))
    if not _turns_like(decoder.layers[0].self_attn, rotary, rope):
        raise ValueError(
            f"{type(model).__name__} pairs the numbers that RoPE turns otherwise than Llama does, which a gate cannot "
            "undo: choose another model, or a selector that does not look before RoPE (SketchWalk)"
        )
    still = Rope(torch.zeros_like(inv_freq), 1.0)
    return [rope if getattr(layer.self_attn, "use_rope", True) else still for layer in decoder.layers]


class AttentionGate(nn.Module):
    """One layer's gate, computed in float32.

    ``query_weight`` (H, gate_dim, D) and ``key_weight`` (K, gate_dim, 3 D) are what trains.
    """

    inv_freq: Tensor
    attention_scaling: Tensor

    def __init__(self, shape: GateShape, rope: Rope) -> None:
        super().__init__()
        self.shape = shape
        self.register_buffer("inv_freq", rope.inv_freq.detach().float().cpu().clone())
        self.register_buffer("attention_scaling", torch.tensor(float(rope.scaling)))
        self.query_weight = nn.Parameter(torch.zeros(shape.heads, shape.gate_dim, shape.head_dim))
        self.key_weight = nn.Parameter(torch.zeros(shape.kv_heads, shape.gate_dim, len(KEY_POOLS) * shape.head_dim))
        rows, picked = torch.arange(shape.gate_dim), self._picked()
        columns = torch.cat([picked, picked + shape.rotary_dim // 2])
        with torch.no_grad():
            self.query_weight[:, rows, columns] = 1
            self.key_weight[:, rows, columns - shape.head_dim] = 1  # the average is the last of the pools

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        """(B, H, N, N) float32: softmax over the visible key blocks of a whole context. See ``log_scores``."""
        return self.log_scores(query, key).exp()

    def log_scores(self, query: Tensor, key: Tensor) -> Tensor:
        """Logarithm of the scores, -inf at later blocks; ``query`` (B, H, S, D), ``key`` (B, K, S, D), from 0 on."""
        assert query.shape[2] == key.shape[2]
        with torch.autocast(query.device.type, enabled=False):
            return self.compare(self.gate_queries(query, 0), self.gate_keys(key, 0))

    def gate_queries(self, query: Tensor, first: int) -> Tensor:
        """(B, H, N, gate_dim) of queries (B, H, T, D) after RoPE, which begin where block ``first`` does."""
        return self._projected(self.pooled(query, first, QUERY_POOLS), self.query_weight, first)

    def gate_keys(self, key: Tensor, first: int) -> Tensor:
        """(B, K, N, gate_dim) of keys (B, K, T, D) after RoPE, which begin where block ``first`` does."""
        return self._projected(self.pooled(key, first, KEY_POOLS), self.key_weight, first)

    def compare(self, queries: Tensor, keys: Tensor) -> Tensor:
        """(B, H, Nq, Nk): logarithm of the scores of gate queries, the last of the blocks, against gate keys."""
        (batch, heads, rows, dim), count = queries.shape, keys.shape[2]
        logits = queries.reshape(batch, keys.shape[1], -1, dim) @ keys.transpose(2, 3) * dim**-0.5
        later = ~visible_blocks(rows, count, 1, queries.device)
        return logits.view(batch, heads, rows, count).masked_fill(later, -torch.inf).log_softmax(-1)

    def pooled(self, states: Tensor, first: int, pools: tuple[Pool, ...]) -> Tensor:
        """(B, heads, N, pools * D): the states (B, heads, T, D) from block ``first`` on, turned back and pooled."""
        size, tokens = self.shape.block_size, states.shape[2]
        whole = tokens // size * size
        runs = [run for run in (*states[:, :, :whole].split(STRIP * size, 2), states[:, :, whole:]) if run.shape[2]]
        position, parts = first * size, []
        for run in runs:
            blocks = self.unrotated(run, position).unflatten(2, (-1, min(size, run.shape[2])))
            parts.append(torch.cat([pool(blocks) for pool in pools], -1))
            position += run.shape[2]
        return torch.cat(parts, 2)

    def unrotated(self, states: Tensor, position: int) -> Tensor:
        """(B, heads, T, D) float32: the states as they were before RoPE, the first at ``position``."""
        positions = torch.arange(position, position + states.shape[2], device=states.device)
        return turned(states.float(), -positions, self.inv_freq, 1 / self.attention_scaling)

    def _projected(self, pooled: Tensor, weight: Tensor, first: int) -> Tensor:
        """Projected and turned to the positions of the blocks' first tokens."""
        positions = (first + torch.arange(pooled.shape[2], device=pooled.device)) * self.shape.block_size
        projected = torch.einsum("bhnd,hgd->bhng", pooled, weight)
        return turned(projected, positions, self.inv_freq[self._picked()], self.attention_scaling)

    def _picked(self) -> Tensor:
        """(gate_dim / 2,): the frequencies that the gate uses; all in order where it is as wide as what RoPE turns."""
        last = self.shape.rotary_dim // 2 - 1
        return torch.linspace(0, last, self.shape.gate_dim // 2, device=self.inv_freq.device).round().long()


class AttentionGates(nn.Module):
    """A gate for every layer of a model. They hold all they need: no model is needed to load or use them."""

    def __init__(self, shape: GateShape, ropes: list[Rope]) -> None:
        super().__init__()
        assert len(ropes) == shape.layers
        self.shape = shape
        self.layers = nn.ModuleList(AttentionGate(shape, rope) for rope in ropes)

    @classmethod
    def for_model(cls, model: PreTrainedModel, block_size: int = 64, gate_dim: int = 64) -> "AttentionGates":
        """Untrained gates for ``model``; ValueError for attention that they cannot follow."""
        return cls(_shape_of(model, block_size, gate_dim), ropes_of(model))

    @classmethod
    def load(cls, folder: str | Path) -> "AttentionGates":
        """Gates that ``save`` wrote; ValueError for a folder that holds none."""
        shape, tensors = read_gates(folder)
        unknown = Rope(torch.zeros(shape.rotary_dim // 2), 1.0)  # the file says
        gates = cls(shape, [unknown] * shape.layers)
        try:
            gates.load_state_dict(tensors)
        except RuntimeError as error:
            reason = str(error).splitlines()[1].strip()
            raise ValueError(f"{folder}: the tensors do not fit the shape beside them: {reason}") from error
        return gates

    def save(self, folder: str | Path) -> None:
        """Write ``gates.safetensors`` and ``gates.json`` to ``folder``."""
        write_gates(folder, self.shape, self.state_dict())

    def gate(self, layer: int) -> AttentionGate:
        """The gate of ``layer``."""
        gate = self.layers[layer]
        assert isinstance(gate, AttentionGate)
        return gate

    def check(self, model: PreTrainedModel) -> None:
        """Raise ``ValueError`` with the name of the first field in which the gates and ``model`` differ."""
        wanted = _shape_of(model, self.shape.block_size, self.shape.gate_dim)
        for name, value in asdict(wanted).items():
            _check_field(name, getattr(self.shape, name), value)
        for layer, rope in enumerate(ropes_of(model)):
            own = self.gate(layer)
            pairs = (own.inv_freq, rope.inv_freq), (own.attention_scaling, torch.tensor(rope.scaling))
            if not all(torch.allclose(mine.cpu(), its.float().cpu(), rtol=1e-4, atol=0) for mine, its in pairs):
                raise ValueError(f"inv_freq: layer {layer} has another RoPE: load gates trained for this model")


@dataclass
class GateScorer:
    """A ``BlockScorer`` (see attention/blocks.py) that asks trained gates. Rows of scores sum to 1.

    It remembers gate keys of full blocks, and the queries of the one that is not full: one context at a time, every
    forward of it through the same object; a copy of a cache needs a ``copy.deepcopy`` of it. Decoding gives what one
    prefill of everything would give in its last rows. There is no gradient. Gates go to where a layer computes.
    """

    gates: AttentionGates
    block_size: int = field(init=False)
    _seen: "dict[int, _Seen]" = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.block_size = self.gates.shape.block_size

    @torch.no_grad()
    def __call__(self, layer: int, query: Tensor, key: Tensor) -> Tensor:
        """(B, H, Nq, Nk). See ``BlockScorer``.

        Raises
        ------
        ValueError
            For shapes that are not the gates', and where the S - T older keys are not the tokens scored before.
        """
        self._check_shape(layer, query, key)
        gate, size = self.gates.gate(layer).to(query.device), self.block_size
        older, keys = key.shape[2] - query.shape[2], key.shape[2]
        seen, first = self._older(layer, query, older), older // size
        with torch.autocast(query.device.type, enabled=False):
            if seen.query.shape[2]:
                query = torch.cat([seen.query, query], 2)
            gate_queries = gate.gate_queries(query, first)
            gate_keys = torch.cat([seen.blocks, gate.gate_keys(key[:, :, first * size :], first)], 2)
            scores = gate.compare(gate_queries, gate_keys).exp()
        rest = query[:, :, query.shape[2] - keys % size :].clone()  # a view would hold all queries
        self._seen[layer] = _Seen(keys, rest, gate_keys[:, :, : keys // size])
        return scores

    def _check_shape(self, layer: int, query: Tensor, key: Tensor) -> None:
        shape = self.gates.shape
        if layer >= shape.layers:
            raise ValueError(f"layers: the gates have {shape.layers}, but layer {layer} asks: load this model's gates")
        _check_field("heads", shape.heads, query.shape[1])
        _check_field("kv_heads", shape.kv_heads, key.shape[1])
        _check_field("head_dim", shape.head_dim, key.shape[3])

    def _older(self, layer: int, query: Tensor, older: int) -> "_Seen":
        """What is remembered of the tokens before ``query``; ValueError where that is not ``older`` tokens."""
        rows, shape = len(query), self.gates.shape
        if older == 0:
            blocks = query.new_zeros(rows, shape.kv_heads, 0, shape.gate_dim, dtype=torch.float32)
            return _Seen(0, query[:, :, :0], blocks)
        seen = self._seen.get(layer)
        if seen is None or seen.tokens != older or len(seen.query) != rows:
            scored = "none were" if seen is None else f"{seen.tokens} tokens in {len(seen.query)} rows were"
            raise ValueError(
                f"layer {layer} has {older} older keys in {rows} rows, but {scored} scored: blocks need the whole "
                "cache. Evict nothing (no press), give every forward of a context to the same scorer, and copy the "
                "scorer where a cache is copied"
            )
        return seen


class _Seen(NamedTuple):
    """What a layer's scorer keeps of the tokens before."""

    tokens: int
    query: Tensor
    """(B, H, r, D), the queries of the block that is not full, as they came."""
    blocks: Tensor
    """(B, K, n, gate_dim), the gate keys of full blocks."""


def _check_field(name: str, gates: object, model: object) -> None:
    if gates != model:
        raise ValueError(f"{name}: the gates have {gates}, the model {model}: load gates trained for this model")


def turned(states: Tensor, positions: Tensor, inv_freq: Tensor, scaling: Tensor | float) -> Tensor:
    """(..., T, D): the leading numbers of the states turned to ``positions`` (T,), as RoPE does."""
    angles = positions[:, None].float() * inv_freq
    cos, sin = angles.cos() * scaling, angles.sin() * scaling
    half = len(inv_freq)
    first, second = states[..., :half], states[..., half : 2 * half]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, states[..., 2 * half :]], -1)


def _turns_like(attention: nn.Module, rotary: nn.Module, rope: Rope) -> bool:
    """Whether the function that the model's own code turns queries with does what ``turned`` does."""
    rotate = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if rotate is None:
        return False
    positions, half = torch.arange(4, device=rope.inv_freq.device), len(rope.inv_freq)
    probe = torch.arange(8.0 * half, device=positions.device).view(1, 1, 4, 2 * half) / half
    expected = rotate(probe, probe, *rotary(probe, positions[None]))[0]
    return torch.allclose(turned(probe, positions, rope.inv_freq, rope.scaling), expected, atol=1e-4)


def _shape_of(model: PreTrainedModel, block_size: int, gate_dim: int) -> GateShape:
    config = model.config.get_text_config(decoder=True)
    shape, rotary_dim = cache_shape(config), 2 * len(ropes_of(model)[0].inv_freq)
    heads = config.num_attention_heads
    return GateShape(len(shape.windows), heads, shape.kv_heads, shape.head_dim, rotary_dim, block_size, gate_dim)
