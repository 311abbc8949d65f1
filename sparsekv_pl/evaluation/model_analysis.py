"""Base class of all analyses of a model: one piece of work per batch, base and trained."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Any

from sparsekv_pl.evaluation.batch_keys import batch_of
from sparsekv_pl.evaluation.measuring_module import MeasuringModule, Piece
from sparsekv_pl.eviction.limits import position_limit
from sparsekv_pl.models.backbone import Backbone
from sparsekv_pl.models.batch import CaseBatch
from sparsekv_pl.storage.records import Record


class Analysis(MeasuringModule):
    """Measures every batch of a datamodule once, base and trained; see ``MeasuringModule``.

    Subclasses replace an ``output`` of null by a default.
    """

    def __init__(self, backbone: Backbone, output: str, trained_alone: bool = False) -> None:
        super().__init__(output, backbone, trained_alone)

    @abstractmethod
    def described(self) -> dict[str, Any]:
        """All settings that decide the result of ``measure``, JSON-able: part of the key of finished work."""

    @abstractmethod
    def measure(self, batch: CaseBatch) -> Sequence[Record]:
        """Measure one batch with the model in its present state; return JSON-able, finite records."""

    def setup(self, stage: str) -> None:
        """Check the data's context lengths and read the finished work.

        Raises ``ValueError`` for a context longer than the model's trained positions.
        """
        longest = max(getattr(self.trainer.datamodule, "lengths", []), default=0)  # type: ignore[attr-defined]
        limit = position_limit(self.causal_lm)
        if limit is not None and longest > limit:
            raise ValueError(
                f"lengths has {longest} tokens, but this model was trained on {limit} positions "
                "(max_position_embeddings): use shorter contexts, or another model"
            )
        super().setup(stage)

    def pieces(self, batch: CaseBatch, variant: str) -> Iterator[Piece]:
        """One piece: the whole batch."""
        yield Piece(
            key=self.key(
                variant, analysis=type(self).__name__, settings=self.described(), batch=batch_of(batch, named=True)
            ),
            file=variant,
            measure=lambda: self.measure(batch),
            columns=repeat({"variant": variant}),
        )
