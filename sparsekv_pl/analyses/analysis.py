"""What every analysis of a model shares: loading, progress, finished work on disk, base and trained, the report."""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from sparsekv_pl.adapter import training_summary, variants_of
from sparsekv_pl.backbone import Backbone, adapter_off, causal_lm
from sparsekv_pl.batch import CaseBatch
from sparsekv_pl.eviction.limits import position_limit
from sparsekv_pl.keys import batch_of, computed_by, key_of
from sparsekv_pl.native_precision import warn_of_emulation
from sparsekv_pl.pieces import piece_done
from sparsekv_pl.reporting import run_environment
from sparsekv_pl.reporting.console import show_report
from sparsekv_pl.results import Record, Results, gathered
from sparsekv_pl.run_output import WritesOutput


class Analysis(WritesOutput, ABC):
    """Measures every batch of a datamodule once, keeps what is finished in ``output/results``, and ends in a report.

    A run that was killed, or that is given more batches, measures what is missing.

    Parameters
    ----------
    backbone
        The model; with ``backbone.adapter`` everything is measured twice, with the adapter off (base) and on (trained).
    output
        Folder for the report, its pictures and the finished work; subclasses have a default for null.
    """

    def __init__(self, backbone: Backbone, output: str) -> None:
        super().__init__()
        self.output = Path(output).expanduser()
        self.training_summary = training_summary(backbone.adapter)
        self.model, self.tokenizer = backbone.load(trainable=False)
        self.base, self.identity = backbone.described(), backbone.identity()
        self.variants = variants_of(backbone.adapter)

    @abstractmethod
    def described(self) -> dict[str, Any]:
        """All settings that decide what ``measure`` returns, JSON-able: part of a finished measurement's key."""

    @abstractmethod
    def measure(self, batch: CaseBatch) -> Sequence[Record]:
        """What one batch shows with the model as it is; JSON-able and finite."""

    @abstractmethod
    def write(self, records: list[Record], environment: dict[str, object]) -> list[Path]:
        """Write the report of all records, each with its ``variant``, and say on the console what matters."""

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The transformers model, an adapter active in it or not."""
        return causal_lm(self.model)

    def setup(self, stage: str) -> None:  # noqa: ARG002
        """Check that the model can take contexts of these lengths, and read what is finished already."""
        longest = max(getattr(self.trainer.datamodule, "lengths", []), default=0)  # type: ignore[attr-defined]
        limit = position_limit(self.causal_lm)
        if limit is not None and longest > limit:
            raise ValueError(
                f"lengths has {longest} tokens, but this model was trained on {limit} positions "
                "(max_position_embeddings): use shorter contexts, or another model"
            )
        warn_of_emulation(self.trainer)
        self.results = Results(self.output / "results", self.global_rank)
        self.records: list[Record] = []
        self.started = time.time()

    @torch.no_grad()
    def predict_step(self, batch: CaseBatch, batch_idx: int) -> list[Record]:  # noqa: ARG002
        """Measure one batch, base and trained; of several ranks, each is given batches of its own."""
        records: list[Record] = []
        for number, variant in enumerate(self.variants, 1):
            key = self._key(batch, variant)
            found = self.results.get(key)
            if found is None:
                with self._variant(variant):
                    found = list(self.measure(batch))
                self.results.put(key, found, variant)
            records += [{"variant": variant, **record} for record in found]
            piece_done(self, number, len(self.variants))
        self.records += records
        return records

    def on_predict_end(self) -> None:
        """Write the report."""
        records = gathered(self.records)
        if not self.trainer.is_global_zero or not records:
            return
        told = run_environment(self, self.started, dtype=self.identity["dtype"], model=self.base)
        show_report(self.write(records, told), self.loggers)

    def _variant(self, variant: str) -> AbstractContextManager[Any]:
        return adapter_off(self.model) if variant == "base" else nullcontext()

    def _key(self, batch: CaseBatch, variant: str) -> str:
        return key_of(
            analysis=type(self).__name__,
            settings=self.described(),
            model=self.identity,
            adapter=self.variants[variant],
            computed_by=computed_by(self),
            batch=batch_of(batch, named=True),
        )
