"""What one batch of cases shows under one way to evict: answers, perplexity and KL, and what they cost."""

import logging
from functools import cached_property

import torch
from kvpress import BasePress
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsekv_pl.batch import TEXT, CaseBatch, CaseInfo
from sparsekv_pl.eviction.decoding import greedy, read_while_evicting
from sparsekv_pl.eviction.ledger import ledger
from sparsekv_pl.eviction.prefill import continue_from, prefill
from sparsekv_pl.eviction.prefilled import Prefilled
from sparsekv_pl.eviction.replay import RecordedPrefill
from sparsekv_pl.eviction.setting import Point
from sparsekv_pl.measures.reading import FullCacheReading
from sparsekv_pl.measures.stability import StabilityProbe
from sparsekv_pl.metrics.retrieval import retrieval_scores
from sparsekv_pl.monitoring import Phases, timed
from sparsekv_pl.presses.ratio import set_compression_ratio
from sparsekv_pl.presses.scores import press_name
from sparsekv_pl.presses.traits import traits_of
from sparsekv_pl.results import Record

log = logging.getLogger(__name__)


class Measurement:
    """One batch under one model. The context is prefilled once, for all points that evict after a dense prefill."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch: CaseBatch,
        with_stability: bool = False,
    ) -> None:
        self.model, self.tokenizer, self.batch = model, tokenizer, batch
        self.with_stability = with_stability

    @torch.no_grad()
    def at(self, point: Point) -> list[Record]:
        """The batch's records, one per case."""
        if point.press is not None and not traits_of(point.press).replayable and len(self.batch["cases"]) > 1:
            return [record for row in range(len(self.batch["cases"])) for record in self._row(row).at(point)]
        if point.press is not None:
            set_compression_ratio(point.press, point.compression_ratio)
        phases = Phases()
        with phases("point"):
            rows, costs = self._rows(point)
        shared = costs | {"peak_bytes": phases.peak_bytes()}
        if self.tells_stability(point):
            rows = [row | stable for row, stable in zip(rows, self._stable(point.press), strict=True)]
        return [shared | row for row in rows]

    def tells_stability(self, point: Point) -> bool:
        """Whether the records of ``point`` say how stable its press's choice is."""
        return self.with_stability and self.is_text and point.press is not None and point.prefill == "dense"

    def _stable(self, press: BasePress | None) -> list[Record]:
        assert press is not None
        try:
            return self._stability.of(press)
        except ValueError as error:  # a press that merges or changes pairs has scores, but no stability
            log.warning("no stability of %s: %s", press_name(press), error)
            return [{} for _ in self.batch["cases"]]

    @property
    def is_text(self) -> bool:
        """Whether the continuations are read, not answered."""
        return self.batch["cases"][0].task == TEXT

    def _rows(self, point: Point) -> tuple[list[Record], Record]:
        """What each case shows, and what all of them cost, shared out evenly."""
        prefilled, seconds = self._prefilled(point)
        found = ledger(self.model, prefilled.cache)
        rows = self._read(point, prefilled) if self.is_text else self.answers(prefilled)
        if point.decoding_interval is not None:  # it evicted while it read
            found = ledger(self.model, prefilled.cache)
        costs: Record = {name: value / len(rows) for name, value in seconds.items()}
        pairs = {"kept_pairs": found.kept_pairs, "kv_bytes": found.kv_bytes // len(rows), "freed": found.freed}
        return rows, costs | pairs

    @cached_property
    def _stability(self) -> StabilityProbe:
        batch = self.batch
        return StabilityProbe(self._recorded[0], batch["continuation_ids"], batch["continuation_lengths"])

    @cached_property
    def _recorded(self) -> tuple[RecordedPrefill, float]:
        return timed(lambda: RecordedPrefill(self.model, self.batch["context_ids"]))

    @cached_property
    def _full(self) -> FullCacheReading:
        """What the model makes of the continuation with its full cache."""
        full, ids = self._recorded[0].evicted(None), self.batch["continuation_ids"]
        hidden = continue_from(self.model, ids, full.cache, full.next_position)
        head, lengths = self.model.get_output_embeddings().weight, self.batch["continuation_lengths"].tolist()
        return FullCacheReading(hidden, head, ids, lengths)

    def _row(self, row: int) -> "Measurement":
        batch, rows = self.batch, slice(row, row + 1)
        return Measurement(
            self.model,
            self.tokenizer,
            CaseBatch(
                context_ids=batch["context_ids"][rows],
                continuation_ids=batch["continuation_ids"][rows],
                continuation_lengths=batch["continuation_lengths"][rows],
                cases=batch["cases"][rows],
            ),
            with_stability=False,  # it compares replays
        )

    def _prefilled(self, point: Point) -> tuple[Prefilled, dict[str, float]]:
        """The context's cache as the point leaves it, and the seconds it took."""
        if point.chunk_tokens is not None:
            context = self.batch["context_ids"]
            prefilled, seconds = timed(lambda: prefill(self.model, context, point.press, point.chunk_tokens))
            return prefilled, {"prefill_seconds": seconds, "eviction_seconds": 0.0}
        recorded, seconds = self._recorded
        press = None if point.decoding_interval is not None else point.press
        prefilled, evicting = timed(lambda: recorded.evicted(press))
        return prefilled, {"prefill_seconds": seconds, "eviction_seconds": evicting}

    def answers(self, prefilled: Prefilled) -> list[Record]:
        """What the model says after a cache that was prefilled here or elsewhere, scored; it joins the cache."""
        batch = self.batch
        ids, lengths = batch["continuation_ids"], batch["continuation_lengths"]
        tokens = max(case.max_new_tokens for case in batch["cases"])
        answers, seconds = timed(lambda: greedy(self.model, prefilled, ids, lengths, tokens, self._stop_ids))
        return [self._scored(case, answer, seconds) for case, answer in zip(batch["cases"], answers, strict=True)]

    def _scored(self, case: CaseInfo, answer: list[int], seconds: float) -> Record:
        said = str(self.tokenizer.decode(answer[: case.max_new_tokens], skip_special_tokens=True)).strip()
        return {
            **retrieval_scores(said, case.answers),
            "answer": said,
            "answers": list(case.answers),
            "question": case.question,
            "answer_prefix": case.answer_prefix,
            "max_new_tokens": case.max_new_tokens,
            "decode_seconds": seconds / len(self.batch["cases"]),
            "decode_tokens": len(answer),
        }

    def _read(self, point: Point, prefilled: Prefilled) -> list[Record]:
        """Perplexity and KL of the continuation. Its first token is left out: the context's last predicts it, uncut."""
        ids = self.batch["continuation_ids"]
        if point.press is None:
            hidden = self._full.hidden
        elif point.decoding_interval is None:
            hidden = continue_from(self.model, ids, prefilled.cache, prefilled.next_position)
        else:
            budget = max(1, int(self.batch["context_ids"].shape[1] * (1 - point.compression_ratio)))
            hidden = read_while_evicting(self.model, prefilled, ids, point.press, budget, point.decoding_interval)
        return self._full.scores(hidden)

    @cached_property
    def _stop_ids(self) -> set[int]:
        config = self.model.generation_config
        known = [config.eos_token_id if config is not None else None, self.tokenizer.eos_token_id]
        return {i for item in known if item is not None for i in (item if isinstance(item, list) else [item])}
