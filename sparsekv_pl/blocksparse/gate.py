"""A learned gate: small projections of pooled queries and keys that predict which key blocks a query block attends to.

SeerAttention (https://arxiv.org/abs/2410.13276), with its default pools: the average for queries; maximum, minimum and
average for keys. Deviations from the paper:

- Queries and keys arrive after RoPE, as in attention; the gate undoes the rotation before pooling.
- ``gate_dim`` may differ from the head's dimension; the frequencies at block positions are then an even selection of
  the model's.
- Projections start as the identity on the averages: an untrained gate compares block means.
"""

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsekv_pl.attention.blocks import check_seen, visible_blocks
from sparsekv_pl.blocksparse.gate_store import GateShape, read_gates, write_gates
from sparsekv_pl.models.cache_shape import cache_shape
from sparsekv_pl.models.decoder import decoder_of
from sparsekv_pl.models.layer_kinds import attentions

STRIP = 16
"""Blocks whose rotation is undone at once, in float32; limits the memory and fits a CPU's cache."""

Pool = Callable[[Tensor], Tensor]
QUERY_POOLS: tuple[Pool, ...] = (lambda blocks: blocks.mean(3),)
KEY_POOLS: tuple[Pool, ...] = (lambda blocks: blocks.amax(3), lambda blocks: blocks.amin(3), QUERY_POOLS[0])


class Rope(NamedTuple):
    """A layer's RoPE: coordinates i and i + rotary_dim / 2 are rotated by position * inv_freq[i]."""

    inv_freq: Tensor
    """(rotary_dim / 2,) radians per position; zeros for a layer without RoPE."""
    scaling: float
    """Factor of the rotated coordinates."""


def ropes_of(model: PreTrainedModel) -> list[Rope]:
    """The RoPE of every layer of ``model``.

    Raises ``ValueError`` if it cannot be undone from a position alone: frequencies that depend on the context's length
    or the layer's kind, or other pairs of coordinates (tested on the model's own function).
    """
    decoder = decoder_of(model)
    rotary: Any = getattr(decoder, "rotary_emb", None)
    inv_freq, kind = getattr(rotary, "inv_freq", None), getattr(rotary, "rope_type", "default")
    if inv_freq is None or "dynamic" in kind or kind == "longrope":
        raise ValueError(
            f"{type(model).__name__} has no RoPE of fixed frequencies (rope_type {kind!r}), which a gate must undo: "
            "choose another model, or a selector that works after RoPE (SketchWalk)"
        )
    without = sorted(set(range(len(decoder.layers))) - set(attentions(model)))
    if without:
        raise ValueError(
            f"{type(model).__name__} has no attention in its layers {without}, and every layer gets a gate: choose "
            "another model, or a selector without gates (SketchWalk)"
        )
    rope = Rope(inv_freq, float(rotary.attention_scaling))
    if not _turns_like(decoder.layers[0].self_attn, rotary, rope):
        raise ValueError(
            f"{type(model).__name__} rotates other pairs of coordinates in RoPE than Llama, which a gate cannot undo: "
            "choose another model, or a selector that works after RoPE (SketchWalk)"
        )
    still = Rope(torch.zeros_like(inv_freq), 1.0)
    return [rope if getattr(layer.self_attn, "use_rope", True) else still for layer in decoder.layers]


class AttentionGate(nn.Module):
    """One layer's gate, computed in float32.

    Trainable parameters are ``query_weight`` (H, gate_dim, D) and ``key_weight`` (K, gate_dim, 3 D).
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
        """Scores (B, H, N, N) float32, a softmax over the visible key blocks of a whole context. See ``log_scores``."""
        return self.log_scores(query, key).exp()

    def log_scores(self, query: Tensor, key: Tensor) -> Tensor:
        """Log-scores (B, H, N, N) of a whole ``query`` (B, H, S, D) and ``key`` (B, K, S, D), -inf at later blocks."""
        assert query.shape[2] == key.shape[2]
        with torch.autocast(query.device.type, enabled=False):
            return self.compare(self.gate_queries(query, 0), self.gate_keys(key, 0))

    def gate_queries(self, query: Tensor, first: int) -> Tensor:
        """Gate queries (B, H, N, gate_dim) from queries (B, H, T, D) after RoPE, starting with block ``first``."""
        return self._projected(self.pooled(query, first, QUERY_POOLS), self.query_weight, first)

    def gate_keys(self, key: Tensor, first: int) -> Tensor:
        """Gate keys (B, K, N, gate_dim) from keys (B, K, T, D) after RoPE, starting with block ``first``."""
        return self._projected(self.pooled(key, first, KEY_POOLS), self.key_weight, first)

    def compare(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Logarithms of the scores (B, H, Nq, Nk) of gate queries of the last Nq blocks against gate keys."""
        (batch, heads, rows, dim), count = queries.shape, keys.shape[2]
        logits = queries.reshape(batch, keys.shape[1], -1, dim) @ keys.transpose(2, 3) * dim**-0.5
        later = ~visible_blocks(rows, count, 1, queries.device)
        return logits.view(batch, heads, rows, count).masked_fill(later, -torch.inf).log_softmax(-1)

    def pooled(self, states: Tensor, first: int, pools: tuple[Pool, ...]) -> Tensor:
        """Undo RoPE and pool: states (B, heads, T, D) from block ``first`` on to (B, heads, N, pools * D)."""
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
        """Undo RoPE: states (B, heads, T, D) as before it, float32; the first is at ``position``."""
        positions = torch.arange(position, position + states.shape[2], device=states.device)
        return turned(states.float(), -positions, self.inv_freq, 1 / self.attention_scaling)

    def _projected(self, pooled: Tensor, weight: Tensor, first: int) -> Tensor:
        """Project, and rotate to the positions of the blocks' first tokens."""
        positions = (first + torch.arange(pooled.shape[2], device=pooled.device)) * self.shape.block_size
        projected = torch.einsum("bhnd,hgd->bhng", pooled, weight)
        return turned(projected, positions, self.inv_freq[self._picked()], self.attention_scaling)

    def _picked(self) -> Tensor:
        """(gate_dim / 2,): indices of the frequencies that the gate uses; all of them if gate_dim is rotary_dim."""
        last = self.shape.rotary_dim // 2 - 1
        return torch.linspace(0, last, self.shape.gate_dim // 2, device=self.inv_freq.device).round().long()


class AttentionGates(nn.Module):
    """A gate for every layer of a model. Loading and using gates does not need the model."""

    def __init__(self, shape: GateShape, ropes: list[Rope]) -> None:
        super().__init__()
        assert len(ropes) == shape.layers
        self.shape = shape
        self.layers = nn.ModuleList(AttentionGate(shape, rope) for rope in ropes)

    @classmethod
    def for_model(cls, model: PreTrainedModel, block_size: int = 64, gate_dim: int = 64) -> "AttentionGates":
        """Make untrained gates for ``model``. Raises ``ValueError`` for a RoPE that gates do not support."""
        return cls(_shape_of(model, block_size, gate_dim), ropes_of(model))

    @classmethod
    def load(cls, folder: str | Path) -> "AttentionGates":
        """Load gates that ``save`` wrote. Raises ``ValueError`` for a folder without valid gates."""
        shape, tensors = read_gates(folder)
        unknown = Rope(torch.zeros(shape.rotary_dim // 2), 1.0)  # replaced by the file's
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
        """Raise ``ValueError`` with the first field in which the gates and ``model`` differ."""
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
    """A ``BlockScorer`` (see attention/blocks.py) with trained gates. Rows of scores sum to 1.

    It stores gate keys of full blocks, and the queries of the block that is not full. Use one object for all forwards
    of one context, and a ``copy.deepcopy`` of it for a copy of the cache. Decoding gives the last rows of a prefill of
    all tokens. There is no gradient. Gates are moved to each layer's device.
    """

    gates: AttentionGates
    block_size: int = field(init=False)
    _seen: "dict[int, _Seen]" = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.block_size = self.gates.shape.block_size

    @torch.no_grad()
    def __call__(self, layer: int, query: Tensor, key: Tensor) -> Tensor:
        """(B, H, Nq, Nk). See ``BlockScorer``.

        Raises ``ValueError`` for shapes that differ from the gates', and if the S - T older keys are not the tokens
        scored before.
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
        """The state after the tokens before ``query``. Raises ``ValueError`` if those are not ``older`` tokens."""
        rows, shape = len(query), self.gates.shape
        if older == 0:
            blocks = query.new_zeros(rows, shape.kv_heads, 0, shape.gate_dim, dtype=torch.float32)
            return _Seen(0, query[:, :, :0], blocks)
        seen = self._seen.get(layer)
        check_seen(layer, (rows, older), (0, 0) if seen is None else (len(seen.query), seen.tokens))
        assert seen is not None
        return seen


class _Seen(NamedTuple):
    """A layer's state after the tokens scored so far."""

    tokens: int
    query: Tensor
    """(B, H, r, D), the queries of the block that is not full, after RoPE."""
    blocks: Tensor
    """(B, K, n, gate_dim), the gate keys of full blocks."""


def _check_field(name: str, gates: object, model: object) -> None:
    if gates != model:
        raise ValueError(f"{name}: the gates have {gates}, the model {model}: load gates trained for this model")


def turned(states: Tensor, positions: Tensor, inv_freq: Tensor, scaling: Tensor | float) -> Tensor:
    """Rotate the leading coordinates of states (..., T, D) to ``positions`` (T,), like RoPE."""
    angles = positions[:, None].float() * inv_freq
    cos, sin = angles.cos() * scaling, angles.sin() * scaling
    half = len(inv_freq)
    first, second = states[..., :half], states[..., half : 2 * half]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, states[..., 2 * half :]], -1)


def _turns_like(attention: nn.Module, rotary: nn.Module, rope: Rope) -> bool:
    """Whether the model's own RoPE function equals ``turned``."""
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
