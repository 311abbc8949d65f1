"""SparseRegPress: add a loss term against spread-out attention, around any press."""

from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal

import torch
from kvpress import BasePress
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from sparsekv_pl.models.layer_kinds import evicted_layers
from sparsekv_pl.presses.key_tokens import key_places
from sparsekv_pl.presses.press_context import press_context_in
from sparsekv_pl.presses.ratio import set_compression_ratio
from sparsekv_pl.presses.window_attention import window_attention, window_rows


@dataclass
class SparseRegPress(BasePress):
    """Evict with another press, and penalise spread-out attention in training; used by the SparseLM objective.

    The loss is computed from the attention of the last ``window_size`` queries of each chunk to all keys before the
    eviction, never from an L x L matrix. Each layer adds ``weight`` times its loss to the press context, and the
    objective adds the mean over layers and chunks. In evaluation only the inner press acts.

    It can wrap any press (ComposedPress and EvictionAugPress too), be one of EvictionAugPress's presses, or be inside
    ComposedPress and PrefillDecodingPress.

    Parameters
    ----------
    press
        The press that evicts. None keeps everything: the compression ratio is then always 0, and validation needs its
        own press (validation_eviction).
    kind
        "entropy": -sum a log a of each row of attention, in nats (log S if it is spread evenly over S keys). "l1": the
        attention of each row to its evictable keys, 0 to 1: those outside the sinks and the row's own last
        ``window_size`` keys. (The L1 norm of a whole softmax row is always 1.) Both are means over rows and heads.
    weight
        Factor of the loss term.
    window_size
        Number of last queries whose attention rows are used, in tokens.
    layers
        Indices of the layers to measure, among those that presses evict from; None for all of these.
    sinks
        Number of first tokens that "l1" does not count.

    Raises
    ------
    ValueError
        For a setting out of range.
    """

    press: BasePress | None = None
    kind: Literal["entropy", "l1"] = "entropy"
    weight: float = 0.01
    window_size: int = 64
    layers: list[int] | None = None
    sinks: int = 4

    def __post_init__(self) -> None:
        if self.kind not in ("entropy", "l1"):
            raise ValueError(f"SparseRegPress.kind={self.kind!r} must be 'entropy' or 'l1'")
        if not (self.weight >= 0 and isfinite(self.weight)):
            raise ValueError(f"SparseRegPress.weight={self.weight} must be at least 0 and finite")
        if self.press is not None and not isinstance(self.press, BasePress):
            raise ValueError(
                f"SparseRegPress.press={self.press!r} is no press: give one of kvpress or sparsekv_pl, or null"
            )
        for name, least in (("window_size", 1), ("sinks", 0)):
            if not getattr(self, name) >= least:
                raise ValueError(f"SparseRegPress.{name}={getattr(self, name)} must be at least {least}")
        if self.layers is not None and (not self.layers or min(self.layers) < 0):
            raise ValueError(f"SparseRegPress.layers={self.layers}: name layers by numbers from 0, or null for all")

    @property
    def compression_ratio(self) -> float:
        """The inner press's ratio; without one, always 0."""
        return 0.0 if self.press is None else self.press.compression_ratio

    @compression_ratio.setter
    def compression_ratio(self, value: float) -> None:
        if self.press is not None:
            set_compression_ratio(self.press, value)

    @contextmanager
    def __call__(self, model: PreTrainedModel) -> Generator:
        """Measure and evict inside the block."""
        self.check_layers(model.config)
        with ExitStack() as stack:
            stack.enter_context(_Measuring(self)(model))  # first: it must see the keys before they are evicted
            if self.press is not None:
                stack.enter_context(self.press(model))
            yield

    def check_layers(self, config: PreTrainedConfig) -> None:
        """Raise ``ValueError`` for a layer in which nothing is measured: a press runs in ``evicted_layers`` alone."""
        evicted = evicted_layers(config)
        if wrong := [layer for layer in self.layers or () if layer not in evicted]:
            raise ValueError(
                f"SparseRegPress.layers={self.layers}: presses evict from layers {', '.join(map(str, evicted))} of "
                f"this model, and nothing is measured in {', '.join(map(str, wrong))}: name some of the former, or null"
            )

    def loss(self, module: nn.Module, hidden_states: Tensor, keys: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """Compute one layer's scalar loss, not yet weighted: see ``kind``.

        ``hidden_states`` (B, L, E) belong to the newest L of the S ``keys`` (B, K, S, D).
        """
        attention = window_attention(module, hidden_states, keys, kwargs, self.window_size)
        if self.kind == "entropy":
            # Clamped before the log, so that 0 log 0 is 0, and its gradient too after the softmax.
            tiny = torch.finfo(attention.dtype).tiny
            by_row = -(attention * attention.clamp(min=tiny).log()).sum(-1)
        else:
            by_row = (attention * self._evictable(attention.shape[2], key_places(keys, kwargs))).sum(-1)
        return (by_row.sum(-1, keepdim=True) / window_rows(attention)).mean()

    def post_init_from_model(self, model: PreTrainedModel) -> None:
        """Check ``layers``, and forward the call of an outer press to the inner press."""
        self.check_layers(model.config)
        if self.press is not None:
            self.press.post_init_from_model(model)

    def score(self, *_: Any, **__: Any) -> Tensor:
        """Raise ``ValueError``: presses that need an inner press's scores (DMSPress) cannot wrap this one."""
        raise ValueError("SparseRegPress has no scores of its own: put it around the press that asks")

    def forward_hook(self, module: nn.Module, input: list[Any], kwargs: dict[str, Any], output: Any) -> Any:
        """Measure one layer and evict from it; called by ComposedPress and PrefillDecodingPress."""
        _Measuring(self).forward_hook(module, input, kwargs, output)
        return output if self.press is None else self.press.forward_hook(module, input, kwargs, output)

    def _evictable(self, rows: int, place: Tensor) -> Tensor:
        """Return (B, 1, W, S) bool, the evictable keys at ``place`` (B, S) for each of the last W = ``rows`` queries.

        Those are all but the sinks and a query's own last ``window_size`` keys.
        """
        last = place.amax(-1, keepdim=True)
        at = last + 1 - rows + torch.arange(rows, device=place.device)
        outside = place[:, None] <= at[..., None] - self.window_size
        return (outside & (place >= self.sinks)[:, None])[:, None]


@dataclass
class _Measuring(BasePress):
    """Add each layer's loss to the press context and keep everything."""

    settings: SparseRegPress

    def compress(
        self,
        module: nn.Module,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        attentions: Tensor | None,  # noqa: ARG002
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        settings = self.settings
        if not module.training:
            return keys, values
        press_context = press_context_in(kwargs)
        if press_context is None:
            raise ValueError(
                "SparseRegPress has nowhere to put its loss in this forward: train it through RealEviction, or set "
                "the model to evaluation mode"
            )
        if settings.layers is None or int(module.layer_idx) in settings.layers:  # type: ignore[arg-type]
            term = settings.weight * settings.loss(module, hidden_states, keys, kwargs)
            press_context.losses.setdefault(settings.kind, []).append(term)
        return keys, values
