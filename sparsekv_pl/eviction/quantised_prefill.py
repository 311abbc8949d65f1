"""A prefill whose kept pairs are quantised after every chunk's eviction, for training and evaluation alike."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from sparsekv_pl.eviction.prefill import ChunkedPrefill
from sparsekv_pl.eviction.quantised_pairs import PackedPairs, PairQuantisation, quantise


@dataclass(eq=False)
class QuantisedPrefill(ChunkedPrefill):
    """``ChunkedPrefill`` that stores what stays in few bits: a chunk reads the rounded pairs of the chunks before it.

    Pairs that an earlier chunk rounded are rounded again with the new ones, as groups change. Keys that a press
    re-rotates are turned from their rounded form. Layers in which presses do not evict (windows) stay whole.

    Parameters
    ----------
    quantisation
        Bits and groups; None keeps pairs whole.

    Raises
    ------
    ValueError
        If pairs are to stay whole by their age and the press does not say which are the newest.
    """

    quantisation: PairQuantisation | None = None
    packed: dict[int, PackedPairs] = field(default_factory=dict, init=False, repr=False)
    """layer -> its pairs after the last chunk, where presses evict; empty without quantisation."""

    def __post_init__(self) -> None:
        residual = 0 if self.quantisation is None else self.quantisation.residual
        if residual:  # the order of positions is then restored in a single chunk too
            self.request = replace(self.request, contexts=True)
        super().__post_init__()
        deciding = self.deciding
        if residual and deciding is not None and not (deciding.by_scores or deciding.head_wise):
            assert self.traits is not None
            raise ValueError(
                f"residual={residual}: {self.traits.name} does not say which of the pairs that it keeps are the "
                "newest: take residual 0, or a press that selects by scores (KeyDiffPress, SnapKVPress)"
            )

    def advance(self, chunk_ids: Tensor) -> None:
        """Run the next chunk (B, stop - start), evict and quantise."""
        super().advance(chunk_ids)
        if self.quantisation is None:
            return
        self.packed = quantise(self.cache, self.quantisation, self.layers)
        rotation = None if self.traits is None else self.tracker.rotation
        if rotation is not None:  # its keys as first kept are not rounded
            for layer in self.layers:
                rotation.first.pop(layer, None)
                rotation.places.pop(layer, None)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from ``state``, whose pairs are rounded."""
        super().load_state_dict(state)
        self.packed = {}
