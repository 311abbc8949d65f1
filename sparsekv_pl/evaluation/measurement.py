"""Measuring one batch of cases at one point of the matrix: answers, perplexity, KL and cost."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from sparsekv_pl.evaluation.answer_columns import answer_columns
from sparsekv_pl.evaluation.continuation_mass import continuation_mass
from sparsekv_pl.evaluation.perplexity_and_kl import FullCacheReading
from sparsekv_pl.evaluation.points import Point
from sparsekv_pl.evaluation.recalled_words import recalled_tokens
from sparsekv_pl.evaluation.stability_probe import StabilityProbe
from sparsekv_pl.evaluation.time_and_memory import Phases, timed
from sparsekv_pl.evaluation.while_evicting import measured_while_evicting, rows_apart
from sparsekv_pl.eviction.answering import Answering
from sparsekv_pl.eviction.decoding import greedy_together
from sparsekv_pl.eviction.kept_memory import kept_memory
from sparsekv_pl.eviction.limits import rope_changes
from sparsekv_pl.eviction.prefill import continue_from
from sparsekv_pl.eviction.prefilled_cache import Prefilled
from sparsekv_pl.eviction.quantised_pairs import quantise
from sparsekv_pl.eviction.quantised_prefill import QuantisedPrefill
from sparsekv_pl.eviction.replay import RecordedPrefill
from sparsekv_pl.models.batch import TEXT, CaseBatch
from sparsekv_pl.models.head import head_of
from sparsekv_pl.models.layer_kinds import evicted_layers
from sparsekv_pl.models.seeding import globally_seeded
from sparsekv_pl.models.stop_tokens import stop_ids
from sparsekv_pl.presses.nesting import press_name
from sparsekv_pl.presses.oracle import foreseen, oracles_in
from sparsekv_pl.presses.ratio import set_compression_ratio
from sparsekv_pl.presses.traits import traits_of
from sparsekv_pl.storage.records import Record

log = logging.getLogger(__name__)

HELD_BYTES = 2**31
"""Bytes of waiting keys and values above which no further point joins a decoding."""


@dataclass
class _Asked:
    """A point whose rows have read their questions."""

    rows: Answering
    costs: Record
    """Cost per case."""
    seconds: float
    """Time of reading the questions."""
    peak_bytes: int

    @property
    def nbytes(self) -> int:
        """Bytes of its keys and values."""
        return self.rows.nbytes

    @property
    def tokens(self) -> int:
        """Tokens that its rows generated, stop tokens included."""
        return sum(len(answer) + 1 for answer in self.rows.answers)


class Measurement:
    """Measures one batch with one model. Points that evict after a dense prefill share one prefill of the context.

    Parameters
    ----------
    model, tokenizer, batch
        The model, its tokenizer, and the cases: contexts (B, L) and continuations (B, T).
    with_stability
        On text, also measure how stable a press's choice is.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch: CaseBatch,
        with_stability: bool = False,
    ) -> None:
        self.model, self.tokenizer, self.batch = model, tokenizer, batch
        self.with_stability, self._layers = with_stability, evicted_layers(model.config)
        self.ahead: Sequence[Point] = ()
        """Points that will be measured next, in this order: their answers are decoded together."""
        self._answered: dict[str, list[Record]] = {}

    @torch.no_grad()
    def at(self, point: Point) -> list[Record]:
        """Measure at ``point``; return a record per case."""
        if self.by_row(point):
            return [record for row in range(len(self.batch["cases"])) for record in self.row(row).at(point)]
        if point.decoding is not None:
            return measured_while_evicting(self, point)
        if not self.is_text:
            if point.name not in self._answered:
                self._answered |= self._answers_from(point)
            return self._answered.pop(point.name)
        if point.press is not None:
            set_compression_ratio(point.press, point.compression_ratio)
        phases = Phases()
        with phases("point"):
            prefilled, costs = self.prefilled(point)
            left = self.left(point, prefilled.cache)
            rows = self._read(point, prefilled)
        if self.measures_stability(point):
            rows = [row | stable for row, stable in zip(rows, self._stable(point), strict=True)]
        return [costs | left | {"peak_bytes": phases.peak_bytes()} | row for row in rows]

    def measures_stability(self, point: Point) -> bool:
        """Whether the records of ``point`` include the stability of its press's choice."""
        stable = self.with_stability and self.is_text and point.press is not None and point.condition.way == "dense"
        return stable and not oracles_in(point.press)

    def _stable(self, point: Point) -> list[Record]:
        assert point.press is not None
        try:
            with self.draws(point):
                return self._stability.of(point.press)
        except ValueError as error:  # a press that merges or changes pairs has scores, but no stability
            log.warning("no stability of %s: %s", press_name(point.press), error)
            return [{} for _ in self.batch["cases"]]

    @property
    def is_text(self) -> bool:
        """Whether the continuations are text to read, not questions to answer."""
        return self.batch["cases"][0].task == TEXT

    def by_row(self, point: Point) -> bool:
        """Whether rows are measured one by one: the press or ``point.decoding`` needs a batch of one row."""
        if point.press is None or len(self.batch["cases"]) == 1:
            return False
        return not traits_of(point.press).replayable or rows_apart(self.batch, point)

    def draws(self, point: Point) -> AbstractContextManager[None]:
        """Seed a press that has no seed of its own: its draws are equal in every run, for base and trained."""
        cases = (case.id for case in self.batch["cases"])
        return globally_seeded("measured press", *cases, press_name(point.press), str(float(point.compression_ratio)))

    def left(self, point: Point, cache: DynamicCache) -> Record:
        """The KV pairs and bytes left by an eviction, per case."""
        found = kept_memory(self.model, cache, point.quantisation)
        kv_bytes = found.kv_bytes // len(self.batch["cases"])
        return {"kept_pairs": found.kept_pairs, "kv_bytes": kv_bytes, "freed": found.freed}

    def _answers_from(self, point: Point) -> dict[str, list[Record]]:
        """Name -> records, of ``point`` and of the points whose answers were decoded with it."""
        asked = {point.name: self._asked(point)}
        for other in self._beside(point):
            if sum(one.nbytes for one in asked.values()) > self._may_wait():
                break
            with suppress(Exception):  # it is measured by itself later, and fails there
                asked[other.name] = self._asked(other, held=sum(one.nbytes for one in asked.values()))
        if len(asked) == 1:
            return self._decoded(asked)
        try:
            return self._decoded(asked)
        except Exception as error:
            names, why = ", ".join(asked), str(error)  # a log may keep the error, which holds the caches
            log.warning("answers of %s are decoded one point at a time, because: %s", names, why)
            self.ahead = []
            asked.clear()  # free the caches for the point's own
        return self._decoded({point.name: self._asked(point)})

    def _may_wait(self) -> int:
        """Most bytes of waiting caches. A full GPU raises an error, which is handled; a CPU process would be killed."""
        free = psutil.virtual_memory().available if self.model.device.type == "cpu" else 4 * HELD_BYTES
        return min(HELD_BYTES, free // 4)

    def _beside(self, point: Point) -> list[Point]:
        """The points after ``point`` that can be decoded with it."""
        names = [other.name for other in self.ahead]
        if point.name not in names or rope_changes(self.model):
            return []
        behind = self.ahead[names.index(point.name) + 1 :]
        return [other for other in behind if other.decoding is None and not self.by_row(other)]

    def _asked(self, point: Point, held: int = 0) -> _Asked:
        """Evict at ``point`` and read the questions, while ``held`` bytes of other points wait in memory."""
        if point.press is not None:
            set_compression_ratio(point.press, point.compression_ratio)
        phases = Phases()
        with phases("point"):
            prefilled, costs = self.prefilled(point)
            left = self.left(point, prefilled.cache)
            answering, seconds = timed(lambda: self._answering(prefilled))
        return _Asked(answering, costs | left, seconds, phases.peak_bytes() - held)

    def _decoded(self, asked: Mapping[str, _Asked]) -> dict[str, list[Record]]:
        """Decode the answers of all ``asked`` points together; return their records by name."""
        phases, held = Phases(), sum(one.nbytes for one in asked.values())
        with phases("answers"):
            _, seconds = timed(lambda: greedy_together(self.model, [one.rows for one in asked.values()], self.stop_ids))
        apart = sum(one.rows.seconds for one in asked.values())
        tokens = sum(one.tokens for one in asked.values())
        records = {}
        for name, one in asked.items():
            own = one.seconds + one.rows.seconds + (seconds - apart) * one.tokens / tokens
            peak = max(one.peak_bytes, phases.peak_bytes() - held + one.nbytes)
            records[name] = [one.costs | {"peak_bytes": peak} | row for row in self.scored(one.rows.answers, own)]
        return records

    @cached_property
    def _stability(self) -> StabilityProbe:
        return StabilityProbe(self.recorded, self.batch["continuation_ids"], self.batch["continuation_lengths"])

    @property
    def recorded(self) -> RecordedPrefill:
        """The dense prefill of the batch's contexts, which the points share."""
        return self._recorded[0]

    @cached_property
    def _recorded(self) -> tuple[RecordedPrefill, float]:
        return timed(lambda: RecordedPrefill(self.model, self.batch["context_ids"]))

    @cached_property
    def full(self) -> FullCacheReading:
        """The model's outputs for the continuation with the full cache."""
        full, ids = self.recorded.evicted(None), self.batch["continuation_ids"]
        hidden = continue_from(self.model, ids, full.cache, full.next_position)
        head, lengths = head_of(self.model), self.batch["continuation_lengths"].tolist()
        recalled = recalled_tokens(self.tokenizer, self.batch["context_ids"], ids, lengths)
        return FullCacheReading(hidden, head, ids, lengths, recalled)

    @cached_property
    def foreseen_mass(self) -> dict[int, Tensor]:
        """Layer -> (B, K, L), what the continuations will attend to."""
        return continuation_mass(self.recorded, self.batch, self.tokenizer)

    def row(self, row: int) -> "Measurement":
        """The measurement of one of the batch's rows alone."""
        alone: Any = {name: values[row : row + 1] for name, values in dict[str, Any](self.batch).items()}
        return Measurement(self.model, self.tokenizer, alone, with_stability=False)  # it compares replays

    def prefilled(self, point: Point) -> tuple[Prefilled, dict[str, float]]:
        """The context's cache after the point's eviction, and the seconds of prefill and eviction."""
        packed = point.quantisation
        if point.chunk_tokens is not None or (packed is not None and packed.residual):  # which needs their order
            settings = (self.model, point.press, (context := self.batch["context_ids"]).shape[1], point.chunk_tokens)
            with self.draws(point):
                prefilled, seconds = timed(lambda: QuantisedPrefill(*settings, quantisation=packed).run(context))
            return prefilled, {"prefill_seconds": seconds, "eviction_seconds": 0.0}
        recorded, seconds = self._recorded
        oracles = oracles_in(point.press)
        with self.draws(point), foreseen(oracles, self.foreseen_mass) if oracles else nullcontext():
            prefilled, evicting = timed(lambda: recorded.evicted(point.press))
        if packed is not None:
            quantise(prefilled.cache, packed, self._layers)
        return prefilled, {"prefill_seconds": seconds, "eviction_seconds": evicting}

    def answers(self, prefilled: Prefilled) -> list[Record]:
        """Answer the questions from a prefilled cache, which is used up; return the scored records."""
        rows, reading = timed(lambda: self._answering(prefilled))
        _, seconds = timed(lambda: greedy_together(self.model, [rows], self.stop_ids))
        return self.scored(rows.answers, reading + seconds)

    def _answering(self, prefilled: Prefilled) -> Answering:
        batch = self.batch
        most = [case.max_new_tokens for case in batch["cases"]]
        return Answering(self.model, prefilled, batch["continuation_ids"], batch["continuation_lengths"], most)

    def scored(self, answers: list[list[int]], seconds: float) -> list[Record]:
        """Records of the cases' answers, which took ``seconds`` together."""
        return [
            answer_columns(case, text) | {"decode_seconds": seconds / len(answers), "decode_tokens": len(answer)}
            for case, answer in zip(self.batch["cases"], answers, strict=True)
            for text in [str(self.tokenizer.decode(answer, skip_special_tokens=True)).strip()]
        ]

    def _read(self, point: Point, prefilled: Prefilled) -> list[Record]:
        """Perplexity and KL of the continuation without its first token, predicted by the full cache."""
        ids = self.batch["continuation_ids"]
        if point.press is None:
            hidden = self.full.hidden
        else:
            hidden = continue_from(self.model, ids, prefilled.cache, prefilled.next_position)
        return self.full.scores(hidden)

    @cached_property
    def stop_ids(self) -> set[int]:
        """Tokens that end an answer."""
        return stop_ids(self.model, self.tokenizer)
