"""Bytes that a press's scores hold in one layer until backward, by kind of press, as kvpress computes them."""

from collections.abc import Callable
from dataclasses import dataclass

from kvpress import BasePress, ExpectedAttentionPress, KeyDiffPress, KnormPress, SnapKVPress, TOVAPress

from sparsekv_pl.presses.nesting import press_name
from sparsekv_pl.presses.sparse_reg import SparseRegPress
from sparsekv_pl.training.step_shape import ModelShape

SMALL = 7
"""Float32 numbers per KV head and key that the selection loss itself keeps for one press: target, logits, shares."""


@dataclass(frozen=True)
class Scored:
    """One layer's scoring."""

    model: ModelShape
    tokens: int
    """Tokens whose queries are read."""
    keys: int
    """S, the keys that are scored."""
    product: int
    """Bytes per number in matrix products."""
    stored: int
    """Bytes per number of cached keys."""
    norms: int
    """Bytes per number of a normed query."""


def _knorm(at: Scored, _: BasePress) -> int:
    """Keep norms and scores in float32."""
    return 2 * 4 * at.model.kv_heads * at.keys


def _key_diff(at: Scored, _: BasePress) -> int:
    """Keep the normalised keys, norms and scores."""
    return at.stored * at.keys * (at.model.keys + 6 * at.model.kv_heads)


def _window(at: Scored, press: BasePress) -> int:
    """Keep the keys repeated for all query heads, and the window's attention in float32."""
    window = getattr(press, "window_size", 1)
    return at.keys * (at.product * at.model.queries + 4 * at.model.heads * window)


def _expected_attention(at: Scored, _: BasePress) -> int:
    """Keep centred queries and normed ones, the keys repeated for all query heads, and their products."""
    normed = at.norms if at.model.normed_heads else 0
    return at.model.queries * (at.tokens * (at.product + normed) + at.keys * 2 * at.product)


KINDS: dict[type[BasePress], Callable[[Scored, BasePress], int]] = {
    KnormPress: _knorm,
    KeyDiffPress: _key_diff,
    SnapKVPress: _window,
    TOVAPress: _window,
    ExpectedAttentionPress: _expected_attention,
}
READS_QUERIES = (SnapKVPress, TOVAPress, ExpectedAttentionPress)


def score_bytes(at: Scored, press: BasePress) -> int:
    """Return the bytes of ``press``'s scores and of their part in the selection loss.

    A press of another kind counts as ExpectedAttention, which holds most.
    """
    kept = _kind(press) or _expected_attention
    return kept(at, press) + SMALL * 4 * at.model.kv_heads * at.keys


def loss_bytes(at: Scored, press: SparseRegPress) -> int:
    """Return the bytes of SparseRegPress's loss: keys and the window's queries in float32, attention and logarithms."""
    model, window = at.model, min(press.window_size, at.tokens)
    return 4 * (model.keys * at.keys + window * (model.queries + 3 * model.heads * at.keys))


def uncounted(presses: list[BasePress]) -> list[str]:
    """Return the names of presses that are counted as ExpectedAttention."""
    return [press_name(press) for press in presses if _kind(press) is None]


def _kind(press: BasePress) -> Callable[[Scored, BasePress], int] | None:
    """Return the formula of the nearest class in ``KINDS``; None if there is none."""
    return next((KINDS[base] for base in type(press).__mro__ if base in KINDS), None)
