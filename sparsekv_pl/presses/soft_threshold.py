"""SoftThresholdPress: fade keys out by a sigmoid of the attention they receive, so that selection is differentiable."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import torch
from kvpress.utils import compute_n_kept
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, pad

from sparsekv_pl.models.compression_ratio import check_compression_ratio
from sparsekv_pl.presses.key_tokens import key_places
from sparsekv_pl.presses.position_order import InOrderPress
from sparsekv_pl.presses.press_context import press_context_in
from sparsekv_pl.presses.step_draws import Draws
from sparsekv_pl.presses.window_attention import window_attention, window_rows

PADDING = -1.0
"""The score of padding, below every attention (at least 0)."""


@dataclass
class SoftThresholdPress(InOrderPress, Draws):
    """Weigh keys by sigmoid(temperature * (attention - threshold)) in training; evict by attention in evaluation.

    ``attention`` is what a key receives from the last ``window_size`` queries, a mean over them and over the query
    heads of a KV head, in units of the uniform share 1 / S: 1 is what each of S keys gets if attention is spread
    evenly. So a threshold means the same at every length. (Most keys get less: sinks take the most.)

    In training, in this project's prefill, nothing is removed. Later attention multiplies the unnormalised weight of a
    key by this weight, so gradients reach keys, values, queries and a learnable threshold. In the limit of high
    temperatures, keys below the threshold are dropped. In evaluation, outside this prefill and in a wrapper that only
    uses scores (AdaKVPress), this is a plain scorer that keeps exactly the budget by the same attention.

    The observation window and the sinks always stay, with a weight of 1. If they exceed the budget, sinks are kept
    first, then the most recent tokens. Padding has a weight of 0. Keys must be in the order of their positions, and in
    one chunk.

    The gate is that of learned token pruning (LTP, https://arxiv.org/abs/2107.00910), which learns one threshold per
    layer. Here all layers share one threshold, and attention comes from a window, not from all queries.

    Parameters
    ----------
    compression_ratio
        0 switches the press off. Otherwise it sets the budget; it has no effect in training under a fixed or learnable
        threshold.
    window_size
        Last queries whose attention is measured, in tokens.
    sinks
        First tokens that always stay.
    threshold
        In uniform shares. None sets it, in each row and KV head, midway between the last key that the budget keeps and
        the first that it drops, without a gradient; the limit of high temperatures then equals evaluation's eviction.
    learnable
        Train the threshold, starting at ``threshold``. A loss on tokens alone lowers it, because more context is
        better: add a term for sparse attention (SparseRegPress).
    temperature, final_temperature, anneal_steps
        At optimizer step n the temperature is temperature * (final_temperature / temperature) ** (n / anneal_steps),
        and ``final_temperature`` from ``anneal_steps`` on. A ``final_temperature`` of None keeps it constant;
        ``anneal_steps`` of None is the training's length.

    Raises
    ------
    ValueError
        For a setting out of range.
    """

    compression_ratio: float = 0.0
    window_size: int = 32
    sinks: int = 4
    threshold: float | None = None
    learnable: bool = False
    temperature: float = 1.0
    final_temperature: float | None = None
    anneal_steps: int | None = None
    run_steps: int = field(default=-1, init=False)
    step: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        check_compression_ratio("SoftThresholdPress.compression_ratio", self.compression_ratio)
        for name, least in (("window_size", 1), ("sinks", 0), ("anneal_steps", 1)):
            value = getattr(self, name)
            if not (value is None and name == "anneal_steps") and not value >= least:
                raise ValueError(f"SoftThresholdPress.{name}={value} must be at least {least}")
        for name in ("temperature", "final_temperature"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and isfinite(value)):
                raise ValueError(f"SoftThresholdPress.{name}={value} must be above 0 and finite")
        if self.threshold is not None and not isfinite(self.threshold):
            raise ValueError(f"SoftThresholdPress.threshold={self.threshold} must be finite, or null")
        if self.learnable and self.threshold is None:
            raise ValueError(
                "SoftThresholdPress.learnable=True needs a threshold to start from: set threshold, to 0.1 say"
            )
        if self.learnable:  # found by nesting.learnable
            self.learned_threshold = nn.Parameter(torch.tensor(float(self.threshold or 0)))

    def draw(self, step: int) -> None:
        """Set the temperature for optimizer step ``step``."""
        self.step = step

    def over(self, max_steps: int) -> None:
        """Take the training's length; ``ValueError`` if ``anneal_steps`` should follow and there is none (-1)."""
        if self.final_temperature is not None and self.anneal_steps is None and max_steps < 1:
            raise ValueError(
                f"SoftThresholdPress.anneal_steps follows trainer.max_steps, which is {max_steps}: give either of them"
            )
        self.run_steps = max_steps

    @property
    def temperature_now(self) -> float:
        """The temperature at the latest step passed to ``draw``."""
        if self.final_temperature is None:
            return self.temperature
        steps = self.run_steps if self.anneal_steps is None else self.anneal_steps
        if steps < 1:
            raise ValueError("SoftThresholdPress.anneal_steps is null outside a training: give a number of steps")
        return self.temperature * (self.final_temperature / self.temperature) ** min(self.step / steps, 1)

    def score(
        self,
        module: nn.Module,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,  # noqa: ARG002
        attentions: Tensor | None,  # noqa: ARG002
        kwargs: Mapping[str, Any],
    ) -> Tensor:
        """Return scores (B, K, S) float32: attention received; protected keys share the maximum, padding is lowest."""
        attention = window_attention(module, hidden_states, keys, kwargs, self.window_size)
        place = key_places(keys, kwargs)
        received = attention.sum(2) / window_rows(attention) * (place.amax(-1) + 1)[:, None, None]
        scores = received.unflatten(1, (keys.shape[1], -1)).mean(2)
        pinned = self._rank(place) < compute_n_kept(keys.shape[2], self.compression_ratio)
        scores = torch.where(pinned[:, None], scores.detach().amax() + 1, scores)  # masked_fill would synchronise
        return scores.masked_fill((place < 0)[:, None], PADDING)

    def compress(
        self,
        module: nn.Module,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        attentions: Tensor | None,
        kwargs: Mapping[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """Write log-weights (B, K, S) to the press context in training, else evict; see ``ScorerPress.compress``."""
        press_context = press_context_in(kwargs)
        if self.compression_ratio == 0 or press_context is None or not module.training:
            return super().compress(module, hidden_states, keys, values, attentions, kwargs)
        if keys.shape[2] != hidden_states.shape[1]:
            raise ValueError(
                f"SoftThresholdPress got {keys.shape[2]} keys of {hidden_states.shape[1]} tokens: in training it "
                "needs the whole context in one chunk (chunk_tokens: null), and no press before it"
            )
        scores = self.score(module, hidden_states, keys, values, attentions, kwargs)
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        press_context.key_log_weights[layer] = self._log_weights(scores, self._rank(key_places(keys, kwargs)))
        return keys, values

    def _log_weights(self, scores: Tensor, rank: Tensor) -> Tensor:
        """Return the log of each key's weight (B, K, S), from scores (B, K, S) and ranks (B, S), see ``_rank``."""
        length = scores.shape[-1]
        budget = compute_n_kept(length, self.compression_ratio)
        padding = scores == PADDING
        pinned = (rank < (budget if self.threshold is None else length))[:, None].expand_as(scores)
        if self.learnable:
            threshold = self.learned_threshold.to(scores)
        elif self.threshold is not None:
            threshold = scores.new_tensor(self.threshold)
        else:
            ordered = scores.detach().masked_fill(pinned, torch.inf).masked_fill(padding, -torch.inf)
            edge = pad(ordered, (0, 1), value=-torch.inf).topk(budget + 1, dim=-1).values
            # Infinite if the protected keys fill the budget: the rest is then dropped completely.
            threshold = edge[..., -2:].mean(-1, keepdim=True)
        logits = self.temperature_now * (scores - threshold)
        return logsigmoid(logits.masked_fill(pinned, torch.inf).masked_fill(padding, -torch.inf))

    def _rank(self, place: Tensor) -> Tensor:
        """Rank protected keys at ``place`` (B, S) from 0 in the order they are kept, (B, S) int64; S for all others."""
        count = place.amax(-1, keepdim=True) + 1
        from_end = count - 1 - place
        rank = torch.where(place < self.sinks, place, count.clamp(max=self.sinks) + from_end)
        protected = (place >= 0) & ((place < self.sinks) | (from_end < self.window_size))
        return rank.where(protected, place.shape[1])
