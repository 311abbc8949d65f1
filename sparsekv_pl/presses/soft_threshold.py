"""SoftThresholdPress: keys fade out by a sigmoid of the attention they receive, so that selecting is differentiable."""

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
"""The score of padding: below every attention, which may be 0."""


@dataclass
class SoftThresholdPress(InOrderPress, Draws):
    """Weigh every key by sigmoid(temperature * (attention - threshold)) in training, and evict by attention after it.

    ``attention`` is what a key receives from the last ``window_size`` queries, a mean over them and over the query
    heads of a KV head, in units of the uniform share: 1 is what each of S keys would get if attention were spread
    evenly, 1 / S of it. So a threshold means the same at every length. (Most keys get less: sinks take the most.)

    In training, in a prefill of ours, nothing is removed. What follows multiplies the unnormalised attention to a key
    by its weight, so gradients reach keys, values, queries and a learnable threshold alike. The hard limit of high
    temperatures is dropping what lies below the threshold. In evaluation, outside our prefill, and in a wrapper that
    only asks for scores (AdaKVPress), this is a plain scorer that keeps exactly the budget by the same attention.

    The observation window and the sinks always stay, with a weight of 1. Where they do not all fit the budget, the
    sinks go first, then the most recent. Padding has a weight of 0. Keys must come in the order of their positions,
    and in one chunk.

    The gate is that of learned token pruning (LTP, https://arxiv.org/abs/2107.00910), which learns a threshold by
    layer. Here one threshold serves all layers, and what is thresholded comes from a window, not from all queries.

    Parameters
    ----------
    compression_ratio
        0 switches the press off. Else it sets the budget; in training under a fixed or learnable threshold it has
        nothing to decide.
    window_size
        Queries that judge, in tokens.
    sinks
        First tokens that always stay.
    threshold
        In uniform shares. None puts it, in each row and KV head, midway between the last key that the budget keeps and
        the first that it drops; no gradient flows through it. The hard limit is then what evaluation evicts.
    learnable
        Train the threshold, from ``threshold`` on. A loss on tokens alone pulls it down, for more context is better:
        add a term that asks for sparse attention (SparseRegPress).
    temperature, final_temperature, anneal_steps
        At optimizer step n the temperature is temperature * (final_temperature / temperature) ** (n / anneal_steps),
        and ``final_temperature`` from ``anneal_steps`` on. None keeps it constant.
    """

    compression_ratio: float = 0.0
    window_size: int = 32
    sinks: int = 4
    threshold: float | None = None
    learnable: bool = False
    temperature: float = 1.0
    final_temperature: float | None = None
    anneal_steps: int = 1000
    step: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        check_compression_ratio("SoftThresholdPress.compression_ratio", self.compression_ratio)
        for name, least in (("window_size", 1), ("sinks", 0), ("anneal_steps", 1)):
            if not getattr(self, name) >= least:
                raise ValueError(f"SoftThresholdPress.{name}={getattr(self, name)} must be at least {least}")
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

    def draw(self, step: int) -> float:
        """Set the temperature of optimizer step ``step``, and return it."""
        self.step = step
        return self.temperature_now

    @property
    def temperature_now(self) -> float:
        """The temperature of the step that was drawn last."""
        if self.final_temperature is None:
            return self.temperature
        return self.temperature * (self.final_temperature / self.temperature) ** min(self.step / self.anneal_steps, 1)

    def score(
        self,
        module: nn.Module,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,  # noqa: ARG002
        attentions: Tensor | None,  # noqa: ARG002
        kwargs: Mapping[str, Any],
    ) -> Tensor:
        """(B, K, S) float32: the attention received; what always stays ties above all else, padding is below."""
        attention = window_attention(module, hidden_states, keys, kwargs, self.window_size)
        place = key_places(keys, kwargs)
        received = attention.sum(2) / window_rows(attention) * (place.amax(-1) + 1)[:, None, None]
        scores = received.unflatten(1, (keys.shape[1], -1)).mean(2)
        pinned = self._rank(place) < compute_n_kept(keys.shape[2], self.compression_ratio)
        scores = torch.where(pinned[:, None], scores.detach().amax() + 1, scores)  # masked_fill would read the number
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
        """Note the log-weights (B, K, S) in training, else evict. See ``ScorerPress.compress``."""
        press_context = press_context_in(kwargs)
        if self.compression_ratio == 0 or press_context is None or not module.training:
            return super().compress(module, hidden_states, keys, values, attentions, kwargs)
        if keys.shape[2] != hidden_states.shape[1]:
            raise ValueError(
                f"SoftThresholdPress was shown {keys.shape[2]} keys of {hidden_states.shape[1]} tokens: in training it "
                "needs the whole context in one chunk (chunk_tokens: null), and no press before it"
            )
        scores = self.score(module, hidden_states, keys, values, attentions, kwargs)
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        press_context.key_log_weights[layer] = self._log_weights(scores, self._rank(key_places(keys, kwargs)))
        return keys, values

    def _log_weights(self, scores: Tensor, rank: Tensor) -> Tensor:
        """(B, K, S) log of each key's weight, by scores (B, K, S) and the rank (B, S) of what is protected."""
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
            # Where what always stays fills the budget this is infinite: the rest is dropped outright.
            threshold = edge[..., -2:].mean(-1, keepdim=True)
        logits = self.temperature_now * (scores - threshold)
        return logsigmoid(logits.masked_fill(pinned, torch.inf).masked_fill(padding, -torch.inf))

    def _rank(self, place: Tensor) -> Tensor:
        """(B, S) int64: the order in which protected keys at ``place`` (B, S) are kept, from 0; S for all others."""
        count = place.amax(-1, keepdim=True) + 1
        from_end = count - 1 - place
        rank = torch.where(place < self.sinks, place, count.clamp(max=self.sinks) + from_end)
        protected = (place >= 0) & ((place < self.sinks) | (from_end < self.window_size))
        return rank.where(protected, place.shape[1])
