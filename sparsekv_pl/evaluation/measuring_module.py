"""Base class of all measuring modules: finished work, keys, base and trained, failures, ranks, progress, report."""

import logging
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from kvpress import BasePress
from lightning.pytorch import Callback, LightningModule
from transformers import PreTrainedModel

from sparsekv_pl.evaluation.refused_callbacks import refuse_callbacks
from sparsekv_pl.evaluation.run_output import RunOutput, piece_done
from sparsekv_pl.evaluation.trained_adapter import seen_in_training, variants_of
from sparsekv_pl.evaluation.view_pages import view_pages
from sparsekv_pl.models.backbone import Backbone, adapter_off, causal_lm
from sparsekv_pl.models.native_precision import warn_of_emulation
from sparsekv_pl.models.training_summary import training_summary
from sparsekv_pl.reporting import run_environment, summarised, terminal_table, write_run
from sparsekv_pl.reporting.condition import Condition
from sparsekv_pl.reporting.console import show, show_report
from sparsekv_pl.reporting.loggers import log_scores
from sparsekv_pl.reporting.model_card import measured_results, refresh_cards
from sparsekv_pl.reporting.public_settings import public_command
from sparsekv_pl.storage.records import Record, Results, gathered
from sparsekv_pl.storage.result_keys import computed_by, key_of
from sparsekv_pl.storage.user_errors import log_failure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Piece:
    """A piece of work, measured with the adapter on or off according to its variant.

    Parameters
    ----------
    key
        Equal if and only if everything that decides the records is equal.
    file
        File in ``output/results`` that stores the records, without rank and ending.
    measure
        Returns the records; JSON-able and finite.
    columns
        Columns added to each record; they are not stored.
    label
        The piece's name if it fails: the failure is logged and recorded ("error"), the other pieces continue, and no
        other piece with this label is tried in this run. None: a failure ends the run.
    unfit
        Why the piece cannot be measured; recorded like a failure, and ``key`` and ``measure`` are not used.
    kept
        Called after the records are on disk.
    """

    key: str
    file: str
    measure: Callable[[], Iterable[Record]]
    columns: Iterable[Record] = repeat({})
    label: str | None = None
    unfit: str | None = None
    kept: Callable[[], None] = lambda: None


class MeasuringModule(LightningModule, ABC):
    """Measures every batch piece by piece, stores finished work in ``output/results``, and writes a report at the end.

    A run that was killed, or that gets more to measure, measures only what is missing. It runs as ``test`` or
    ``predict``; subclasses define the pieces and the report.

    Parameters
    ----------
    output
        Folder for the report and the finished work; nothing is written there with ``trainer.fast_dev_run``.
    backbone
        The model; with ``backbone.adapter`` everything is measured twice, with the adapter off (base) and on (trained).
        None if the module loads no model.
    trained_alone
        With an adapter, measure only with it on.
    """

    one_process: ClassVar[str | None] = None
    """Message of the ``ValueError`` raised with several ranks; {} is their number. None: ranks are supported."""
    title = ""
    """Title of the report."""

    def __init__(self, output: str | Path, backbone: Backbone | None = None, trained_alone: bool = False) -> None:
        super().__init__()
        self._output = RunOutput(output)
        self.backbone = backbone
        adapter = None if backbone is None else backbone.adapter
        self.training_summary = training_summary(adapter)
        if backbone is not None:
            self.model, self.tokenizer = backbone.load(trainable=False)
            self.base, self.identity = backbone.described(), backbone.identity()
        self.variants = variants_of(adapter)
        if trained_alone:
            self.variants = dict([*self.variants.items()][-1:])
        self.failed: set[str] = set()

    @abstractmethod
    def pieces(self, batch: Any, variant: str) -> Iterable[Piece]:
        """The pieces of work of a batch. Nothing runs before a piece's ``measure`` is called."""

    @abstractmethod
    def write(self, records: list[Record], environment: dict[str, Any]) -> list[Path]:
        """Write the report of all ranks' records, print its main table, and return the paths."""

    @property
    def output(self) -> Path:
        """The folder of this run."""
        return self._output.of(self._trainer)

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The transformers model inside ``model``, whether or not an adapter is active."""
        return causal_lm(self.model)

    def configure_callbacks(self) -> list[Callback]:
        """Add no callback. Raises ``ValueError`` for one of the trainer's that cannot work in an evaluation."""
        refuse_callbacks(self.trainer)
        return []

    def setup(self, stage: str) -> None:  # noqa: ARG002
        """Read the finished work. Raises ``ValueError`` for several ranks where only one is supported."""
        if self.one_process is not None and self.trainer.world_size > 1:
            raise ValueError(self.one_process.format(self.trainer.world_size))
        if self.backbone is not None:
            warn_of_emulation(self.trainer)
        self.results = Results(self.output / "results", self.global_rank)
        self.records: list[Record] = []
        self.started = time.time()

    @torch.no_grad()
    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Measure one batch, base and trained."""
        ranks = self.trainer.world_size
        # Ranks take turns, and the last turn begins again at the first batch to give every rank one.
        if ranks == 1 or batch_idx * ranks + self.global_rank < len(self.trainer.test_dataloaders.dataset):  # type: ignore[union-attr]
            self._measure(batch)

    @torch.no_grad()
    def predict_step(self, batch: Any, batch_idx: int) -> list[Record]:  # noqa: ARG002
        """Measure one batch, base and trained. Each rank has its own batches."""
        return self._measure(batch)

    def on_test_end(self) -> None:
        """Write the report, and say which finished work did not fit into it."""
        records = gathered(self.records)
        if self.results.unread and self.trainer.world_size == 1:  # of several ranks, each asks for its own share
            log.warning(
                "%s also holds %d finished pieces of work of other settings, files, versions, code or (before 0.2.0) "
                "class paths: they are not in this report, and what of them belongs here was measured again",
                *(self.results.folder, len(self.results.unread)),
            )
        if self.trainer.is_global_zero and records:
            dtype = {} if self.backbone is None else {"dtype": self.identity["dtype"]}
            show_report(self.write(records, run_environment(self, self.started, **dtype)), self.loggers)

    def on_predict_end(self) -> None:
        """Write the report."""
        self.on_test_end()

    def key(self, variant: str, **decides: Any) -> str:
        """The key of a piece: a digest of ``decides``, the model, its adapter, and what computes."""
        model = {} if self.backbone is None else {"model": self.identity, "adapter": self.variants[variant]}
        return key_of(computed_by=computed_by(self), **model, **decides)

    def is_left(self, piece: Piece) -> bool:
        """Whether ``piece`` still has to be measured: it is not unfit, has not failed, and is not on disk."""
        return not piece.unfit and piece.label not in self.failed and self.results.get(piece.key) is None

    def columns(self, variant: str, condition: Condition, press: BasePress | None = None) -> Record:
        """The columns of every record measured under a condition."""
        seen = seen_in_training(press, self.training_summary)
        return {"variant": variant, **condition.columns(), "seen_in_training": seen}

    def pages(self, records: Sequence[Record], count: int) -> dict[str, tuple[str, bytes]]:
        """At most ``count`` viewer's pages of a run's records: file name -> (case, page)."""
        assert self.backbone is not None
        model = {"model": self.base["pretrained"], "adapter": self.backbone.adapter or "none"}
        return view_pages(records, count, "What the cache kept", model)

    def report_cases(
        self,
        records: Sequence[Record],
        environment: Mapping[str, Any],
        figures: "Mapping[str, Figure] | None" = None,
        pages: Mapping[str, tuple[str, bytes]] | None = None,
        card: bool = False,
    ) -> list[Path]:
        """Write a report of base against trained from records of cases; log its scores and print its table.

        ``figures`` and ``pages`` are those of ``write_run``. With ``card``, also write the tables into the adapter's
        model card.
        """
        summary = summarised(records)
        log_scores(self.loggers, summary.scores())
        paths = write_run(self.output, summary, self.training_summary, environment, self.title, figures, pages)
        show(terminal_table(summary))
        if card and self.backbone is not None and self.backbone.adapter is not None:
            seed = os.environ.get("PL_GLOBAL_SEED")  # the argument of seed_everything
            results = measured_results(summary, public_command("evaluate.py"), None if seed is None else int(seed))
            refresh_cards(Path(self.backbone.adapter).expanduser(), results)
        return paths

    def _measure(self, batch: Any) -> list[Record]:
        records: list[Record] = []
        for turn, variant in enumerate(self.variants):
            with self._variant(variant):
                pieces = list(self.pieces(batch, variant))
                for number, piece in enumerate(pieces, turn * len(pieces) + 1):
                    records += self._records_of(piece)
                    piece_done(self, number, len(self.variants) * len(pieces))
        self.records += records
        return records

    def _variant(self, variant: str) -> AbstractContextManager[Any]:
        return adapter_off(self.model) if variant == "base" and self.backbone is not None else nullcontext()

    def _records_of(self, piece: Piece) -> list[Record]:
        found = None if piece.unfit else self.results.get(piece.key)
        if found is None:
            found = [] if piece.label in self.failed else self._measured(piece)
        return [about | record for about, record in zip(piece.columns, found, strict=False)]

    def _measured(self, piece: Piece) -> list[Record]:
        if piece.unfit:
            return self._failure(piece, piece.unfit)
        try:
            records = list(piece.measure())
        except Exception as error:
            if piece.label is None:
                raise
            log_failure(log, piece.label, error)
            return self._failure(piece, f"{type(error).__name__}: {error}")
        self.results.put(piece.key, records, piece.file)
        piece.kept()
        return records

    def _failure(self, piece: Piece, why: str) -> list[Record]:
        assert piece.label is not None
        self.failed.add(piece.label)
        return [{"error": why}]
