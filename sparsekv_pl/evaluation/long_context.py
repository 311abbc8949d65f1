"""The LightningModule that reads a context of any length in constant memory, and asks for the needles in it."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jsonargparse import set_parsing_settings
from kvpress import BasePress

from sparsekv_pl.evaluation.batch_keys import batch_of
from sparsekv_pl.evaluation.case_view import add_kept, case_record, held, share_kept
from sparsekv_pl.evaluation.measurement import Measurement
from sparsekv_pl.evaluation.measuring_module import MeasuringModule, Piece
from sparsekv_pl.evaluation.points import check_evicts
from sparsekv_pl.evaluation.prefill_progress import PrefillProgress
from sparsekv_pl.evaluation.stop_signal import stop_signal
from sparsekv_pl.evaluation.time_and_memory import Phases
from sparsekv_pl.evaluation.view_pages import VIEWED_TOKENS, ViewedCases
from sparsekv_pl.eviction.interrupted_prefill import SavedState
from sparsekv_pl.eviction.kept_memory import kept_memory
from sparsekv_pl.eviction.limits import check_positions
from sparsekv_pl.eviction.prefill import ChunkedPrefill
from sparsekv_pl.eviction.prefilled_cache import Prefilled
from sparsekv_pl.eviction.press_model_check import check_press, check_press_alone
from sparsekv_pl.eviction.quantised_pairs import PairQuantisation
from sparsekv_pl.eviction.quantised_prefill import QuantisedPrefill
from sparsekv_pl.models.backbone import Backbone
from sparsekv_pl.models.batch import CaseBatch
from sparsekv_pl.models.compression_ratio import check_compression_ratio
from sparsekv_pl.models.memory_planner import plan
from sparsekv_pl.models.seeding import globally_seeded
from sparsekv_pl.presses.nesting import press_name
from sparsekv_pl.presses.ratio import compression_ratio_of
from sparsekv_pl.reporting.condition import Condition
from sparsekv_pl.reporting.console import show
from sparsekv_pl.reporting.file_formats import json_bytes
from sparsekv_pl.reporting.loggers import log_scores
from sparsekv_pl.storage.records import Record
from sparsekv_pl.storage.result_keys import canonical, class_path, settings_of
from sparsekv_pl.storage.whole_files import replace

set_parsing_settings(subclasses_enabled=[BasePress])

STATE, PHASES = "state.safetensors", "phases.json"
TITLE = "Needles in a long context"


class LongContextModule(MeasuringModule):
    """Prefills haystacks in chunks under an eviction budget, then answers every question from a copy of the cache.

    A run may be stopped (Ctrl-C ends it after the running chunk) or killed. The next run continues from
    ``output/state.safetensors`` and skips finished haystacks. Raises ``ValueError`` for a setting out of range, or a
    press that does not fit the model.

    Parameters
    ----------
    backbone
        The model; with ``backbone.adapter`` it is measured with the adapter on ("trained").
    press
        Selects the KV pairs to keep after every chunk; null keeps everything. For contexts beyond the model's trained
        positions it must be a kvpress.KeyRerotationPress around another press.
    budget
        KV pairs kept per KV head, in tokens; null: the press's compression_ratio decides.
    chunk_tokens
        Most tokens of a chunk. The cache holds at most budget + chunk_tokens.
    output
        Folder for the report, the finished work and the state of an unfinished one.
        Null: where the run's name says, else output/long_context.
    title
        Title of the report.
    save_every
        Chunks between two saved states.
    dry
        Build and tokenise everything, print the plan and stop before inference.
    tokens_per_second
        Prefill speed assumed by the plan; null: the plan states no time.
    quantisation
        Bits in which the kept pairs are stored; null keeps them whole.
    views
        Number of questions that the report links an eviction viewer of: which tokens the press kept. Contexts of more
        than 10,000 tokens, or of a single chunk, have none.
    """

    one_process = (
        "a haystack is read by one process, not by {}: set trainer.devices to 1, and spread a large model with "
        "backbone.placement"
    )

    def __init__(
        self,
        backbone: Backbone,
        press: BasePress | None,
        budget: int | None = 2048,
        chunk_tokens: int = 1024,
        output: str | None = None,
        title: str = TITLE,
        save_every: int = 64,
        dry: bool = False,
        tokens_per_second: float | None = None,
        quantisation: PairQuantisation | None = None,
        views: int = 2,
    ) -> None:
        self.viewed = ViewedCases(views, VIEWED_TOKENS)
        for name, value in {"budget": budget, "chunk_tokens": chunk_tokens, "save_every": save_every}.items():
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if press is None and budget is not None:
            raise ValueError(f"budget={budget} needs a press: name one, or set budget to null")
        if press is not None:
            check_compression_ratio("press.compression_ratio", compression_ratio_of(press))
            check_evicts(press)
            check_press_alone(press)
        self.press, self.budget, self.chunk_tokens = press, budget, chunk_tokens
        # Before a prefill: it sets the ratio of each chunk.
        self.press_settings = settings_of(press)
        self.draws_for = canonical(settings_of(press, described=class_path))
        self.phases, self.between = Phases(), ExitStack()
        with self.phases("load"):
            super().__init__(output or "output/long_context", backbone, trained_alone=True)
        self.backbone: Backbone = backbone
        self.title, self.save_every = title, save_every
        self.dry, self.tokens_per_second, self.quantisation = dry, tokens_per_second, quantisation
        check_press(self.causal_lm, press)

    def setup(self, stage: str) -> None:
        """Check that the data's context lengths can be run, and read the finished work."""
        super().setup(stage)
        for length in getattr(self.trainer.datamodule, "lengths", []):  # type: ignore[attr-defined]
            self._filling(length)
        self.saved = SavedState(self.output / STATE)

    def on_test_epoch_start(self) -> None:
        """Start the phase in which the first haystack is made."""
        self.between.enter_context(self.phases("tokenise"))

    def on_test_batch_start(self, batch: CaseBatch, batch_idx: int, dataloader_idx: int = 0) -> None:  # noqa: ARG002
        """End the phase in which the haystack was made."""
        self.between.close()

    def on_test_batch_end(self, outputs: Any, batch: CaseBatch, batch_idx: int, dataloader_idx: int = 0) -> None:  # noqa: ARG002
        """Start the phase in which the next haystack is made."""
        if batch_idx + 1 < int(self.trainer.num_test_batches[0]):
            self.on_test_epoch_start()

    def pieces(self, batch: CaseBatch, variant: str) -> Iterator[Piece]:
        """One haystack with its questions; none in a ``dry`` run, which prints the plan."""
        if self.dry:
            self._show_plan(batch)
            return
        key = self._key(batch, variant)
        yield Piece(key, "haystacks", lambda: self._read(batch, variant, key), kept=lambda: self.saved.discard())

    def on_test_end(self) -> None:
        """Write time and memory of the phases, and the report if anything was measured."""
        replace(self.output / PHASES, json_bytes(self.phases.records()))
        log_scores(self.loggers, self.phases.scalars(), 0)
        super().on_test_end()

    def write(self, records: list[Record], environment: dict[str, Any]) -> list[Path]:
        """Write the report and print the table."""
        pages = self.pages(records, self.viewed.count)
        cases = [record for record in records if "case" in record]
        return self.report_cases(cases, environment | {"device": str(self._input_device)}, pages=pages)

    @property
    def _input_device(self) -> torch.device:
        return self.causal_lm.get_input_embeddings().weight.device  # type: ignore[return-value]

    def _filling(self, tokens: int) -> ChunkedPrefill:
        settings = (self.causal_lm, self.press, tokens, self.chunk_tokens, self.budget)
        return QuantisedPrefill(*settings, quantisation=self.quantisation)

    def _filling_for(self, batch: CaseBatch) -> ChunkedPrefill:
        """A prefill of the batch's context. Raises ``ValueError`` if the model has no positions for its answers."""
        tokens = batch["context_ids"].shape[1]
        filling = self._filling(tokens)
        asked = int(batch["continuation_lengths"].max()) + max(case.max_new_tokens for case in batch["cases"])
        if not filling.rotates:
            check_positions(self.causal_lm, tokens + asked, tokens, rotates=False)
        return filling

    def _read(self, batch: CaseBatch, variant: str, key: str) -> list[Record]:
        filling, tokens = self._filling_for(batch), batch["context_ids"].shape[1]
        with self.phases(f"prefill {tokens}"):
            costs = self._fill(filling, batch, key)
        with self.phases(f"answer {tokens}"):
            return self._answers(filling, batch, variant, costs)

    def _fill(self, filling: ChunkedPrefill, batch: CaseBatch, key: str) -> Record:
        """Run the remaining chunks; return the cost, which includes the seconds of earlier runs."""
        context, seconds = batch["context_ids"], 0.0
        state = self.saved.load(key)
        if state is not None:
            filling.load_state_dict(state)
            seconds = float(state["seconds"])
        with stop_signal() as stop, PrefillProgress(context.shape[1], filling.seen) as progress:
            while filling.chunks_left:
                start, end = filling.bounds[filling.chunks_done]
                began = time.perf_counter()
                with self._draws(batch, start):
                    filling.advance(context[:, start:end].to(self._input_device))
                if self._input_device.type == "cuda":
                    torch.cuda.synchronize()
                seconds += time.perf_counter() - began
                progress.reached(end)
                if stop.is_set() or filling.chunks_done % self.save_every == 0:
                    self.saved.save(key, filling.state_dict() | {"seconds": torch.tensor(seconds)})
                    costs = {"tokens_per_second": end / seconds, "peak_bytes": self.phases.peak_bytes()}
                    log_scores(self.loggers, {f"prefill/{name}": value for name, value in costs.items()}, end)
                if stop.is_set():
                    stop.stop()
        # Each question has the seconds of the whole prefill, which include the eviction.
        return {"prefill_seconds": seconds, "eviction_seconds": 0.0, "peak_bytes": self.phases.peak_bytes()}

    def _draws(self, batch: CaseBatch, start: int) -> AbstractContextManager[None]:
        """Seed a press without a seed of its own for one chunk, so that a rerun may begin with it."""
        cases = (case.id for case in batch["cases"])
        return globally_seeded("measured press", *cases, self.draws_for, str(self.budget), start)

    def _answers(self, filling: ChunkedPrefill, batch: CaseBatch, variant: str, costs: Record) -> list[Record]:
        prefilled, tokens = filling.result(), batch["context_ids"].shape[1]
        packed, prefill = self.quantisation, f"chunks of {self.chunk_tokens}"
        found = kept_memory(self.causal_lm, prefilled.cache, packed)
        ratio = round(1 - found.kept_pairs / tokens, 6)
        condition = Condition(press_name(self.press), ratio, prefill, "" if packed is None else str(packed))
        shared = {
            "length": tokens,
            **self.columns(variant, condition, self.press),
            "kept_pairs": found.kept_pairs,
            "kv_bytes": found.kv_bytes,
            "freed": found.freed,
            **costs,
        }
        records = []
        for row, case in enumerate(batch["cases"]):
            answered = Measurement(self.causal_lm, self.tokenizer, self._row(batch, row)).answers(prefilled.copy())[0]
            about = {"case": case.id, "task": case.task, "depth": case.depth, "seed": case.seed}
            records.append(about | shared | {"needle_kept": share_kept(prefilled.positions, case)} | answered)
        return records + self._views(batch, variant, condition, prefilled)

    def _views(self, batch: CaseBatch, variant: str, condition: Condition, prefilled: Prefilled) -> list[Record]:
        """Records as of ``case_views``, without a mass: the teacher's full cache was never made."""
        ids, views = batch["context_ids"], []
        for row in self.viewed.rows(batch) if prefilled.positions else ():
            view = case_record(self.tokenizer, batch["cases"][row], ids[0].tolist())
            add_kept(view, condition.name, held(prefilled.positions, 0, ids.shape[1]), sorted(prefilled.positions))
            views.append({"variant": variant, **view})
        return views

    def _row(self, batch: CaseBatch, row: int) -> CaseBatch:
        length = batch["continuation_lengths"][row : row + 1]
        return CaseBatch(
            context_ids=batch["context_ids"],
            continuation_ids=batch["continuation_ids"][row : row + 1, : int(length)].to(self._input_device),
            continuation_lengths=length.to(self._input_device),
            cases=[batch["cases"][row]],
        )

    def _key(self, batch: CaseBatch, variant: str) -> str:
        return self.key(
            variant,
            press=self.press_settings,
            budget=self.budget,
            chunk_tokens=self.chunk_tokens,
            batch=batch_of(batch, named=True),
            **({} if self.quantisation is None else {"quantisation": asdict(self.quantisation)}),
        )

    def _show_plan(self, batch: CaseBatch) -> None:
        filling, backbone = self._filling_for(batch), self.backbone
        planned = plan(
            backbone.pretrained,
            batch["context_ids"].shape[1],
            dtype=backbone.dtype,
            load_in_4bit=backbone.load_in_4bit,
            compression_ratio=None if self.press is None else self.press.compression_ratio,
            budget=self.budget,
            chunk_tokens=self.chunk_tokens,
            rerotates=filling.rotates,
            tokens_per_second=self.tokens_per_second,
            cache_dir=backbone.cache_dir,
        )
        depths = ", ".join(str(case.depth) for case in batch["cases"])
        show(
            *planned.lines(),
            f"{filling.chunks_left:,} chunks, questions for needles at {depths}. Dry: stopped before inference",
        )
