"""Stability of a press's choice: while a text goes on, and between two prompts."""

from functools import cached_property

import torch
from kvpress import BasePress
from torch import Tensor
from transformers import PreTrainedModel

from sparsekv_pl.eviction.kept_positions import kept_positions, masked_keys
from sparsekv_pl.eviction.prefill import continue_from
from sparsekv_pl.eviction.replay import RecordedPrefill
from sparsekv_pl.metrics.eviction_stability import (
    ContextImportance,
    heaviest,
    overlap,
    retained_by_layer,
    retained_statistics,
)
from sparsekv_pl.models.devices import stacked
from sparsekv_pl.models.layer_kinds import evicted_layers
from sparsekv_pl.models.rotary import rotary_of
from sparsekv_pl.storage.records import Record


class StabilityProbe:
    """Stability of evictions from the contexts (B, L) of a recorded prefill, measured on their continuations (B, T).

    Measures, per row:

    - ``min_retained`` (worst case), ``mean_retained`` and ``retained_variance`` over the continuation's steps, means
      over layers and KV heads (metrics/eviction_stability.py);
    - ``overlap_prompts``: the Jaccard index between the context pairs kept in this prompt and those kept in a prompt
      that also holds the continuation;
    - ``overlap_steps``: the Jaccard index between the ideal sets for the continuation's two halves, which says how much
      the best choice itself changes.
    """

    def __init__(self, recorded: RecordedPrefill, continuation_ids: Tensor, lengths: Tensor) -> None:
        self.recorded, self.continuation_ids = recorded, continuation_ids
        self.lengths = lengths

    @torch.no_grad()
    def of(self, press: BasePress) -> list[Record]:
        """One record per row. Raises ``ValueError`` for a press that changes pairs: kept ones cannot be identified."""
        kept, longer = self._kept(self.recorded, press), self._kept(self._longer, press)
        retained = retained_by_layer(dict(enumerate(self._importance.values())), kept)
        steps = torch.arange(retained.shape[-1], device=retained.device)
        counted = (steps < self.lengths.view(-1, 1))[None, :, None]
        measured = retained_statistics(retained, counted)
        context = kept[0].shape[-1]
        measured["overlap_prompts"] = stacked([overlap(a, b[..., :context]) for a, b in zip(kept, longer, strict=True)])
        measured["overlap_steps"] = stacked(
            [self._ideal(importance, mask) for importance, mask in zip(self._importance.values(), kept, strict=True)]
        )
        per_row = {name: values.mean((0, 2)).tolist() for name, values in measured.items()}
        return [{name: values[row] for name, values in per_row.items()} for row in range(len(self.lengths))]

    @cached_property
    def _importance(self) -> dict[int, Tensor]:
        """Layer -> importance, of the layers in which presses evict, in order."""
        full = self.recorded.evicted(None)
        observer = ContextImportance(self.recorded.context_ids.shape[1])
        model = self.recorded.model
        continue_from(model, self.continuation_ids, full.cache, full.next_position, observer=observer)
        return observer.importance

    @cached_property
    def _longer(self) -> RecordedPrefill:
        return RecordedPrefill(self.recorded.model, torch.cat([self.recorded.context_ids, self.continuation_ids], 1))

    def _ideal(self, importance: Tensor, kept: Tensor) -> Tensor:
        """(B, K): overlap of the heaviest pairs in the first and in the second half of the shortest continuation."""
        importance = importance[:, :, : int(self.lengths.min())]
        first, second = importance.chunk(2, dim=2)
        budget = int(kept.sum(-1).float().mean().round())
        return overlap(heaviest(first.sum(2), budget), heaviest(second.sum(2), budget))

    @staticmethod
    def _kept(recorded: RecordedPrefill, press: BasePress) -> list[Tensor]:
        model: PreTrainedModel = recorded.model
        evicted = recorded.evicted(press)
        layers = evicted_layers(model.config)
        return kept_positions(recorded.cache, evicted.cache, masked_keys(model), rotary_of(model), layers)
