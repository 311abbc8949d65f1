"""Perplexity, KL and answers of a model with block-sparse attention in context and continuation."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from sparsekv_pl.attention.blocks import Selector
from sparsekv_pl.attention.evicted_attention import passing
from sparsekv_pl.blocksparse.block_methods import DENSE, BlockMethod, FirstDense, Watched
from sparsekv_pl.evaluation.measurement import Measurement
from sparsekv_pl.evaluation.perplexity_and_kl import reading_scores
from sparsekv_pl.eviction.prefill import continue_from
from sparsekv_pl.eviction.prefilled_cache import Prefilled
from sparsekv_pl.metrics.retrieval import RETRIEVAL_SCORES
from sparsekv_pl.models.batch import TEXT, CaseBatch
from sparsekv_pl.models.head import head_of
from sparsekv_pl.storage.records import Record


@dataclass
class BlockPasses:
    """Measures one case with dense and with block-sparse attention, without eviction."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    batch: CaseBatch
    """One case, because block-sparse attention does not support padding."""
    dense_layers: int = 0
    """Number of first layers that stay dense for every method."""

    def records(self, methods: Sequence[BlockMethod], budgets: Sequence[int]) -> list[Record]:
        """Measure dense attention, then every method at every budget (a method with a threshold only once).

        A record has ``method``, ``budget`` (blocks per query block, None if unlimited), ``sparsity`` (of the context's
        pass, with dense layers as 0), ``seconds`` in total, and either ``nll`` and ``kl`` to dense (nats, summed) with
        ``tokens``, or the scores of ``metrics/retrieval.py`` with the ``answer``.
        """
        start = time.perf_counter()
        prefilled = self._prefilled()
        is_text = self.batch["cases"][0].task == TEXT
        teacher = self._read(prefilled) if is_text else None
        found = self._read_scores(teacher, teacher) if teacher is not None else self._answered(prefilled)
        seconds = time.perf_counter() - start
        records = [{"method": DENSE, "budget": None, "sparsity": 0.0, "seconds": seconds} | found]
        for method in methods:
            for budget in budgets if method.threshold is None else budgets[:1]:
                start = time.perf_counter()
                watched = Watched(method.selector(FirstDense(method.make(), self.dense_layers), budget))
                found = self._under(watched, teacher)
                named = {"method": method.name, "budget": None if method.threshold is not None else budget}
                records.append(
                    {**named, "sparsity": watched.sparsity(), "seconds": time.perf_counter() - start, **found}
                )
        return records

    def _under(self, selector: Selector, teacher: Tensor | None) -> Record:
        with passing(self.model, selector=selector):
            prefilled = self._prefilled()
            if teacher is None:
                return self._answered(prefilled)
            return self._read_scores(self._read(prefilled), teacher)

    def _prefilled(self) -> Prefilled:
        cache = DynamicCache()
        continue_from(self.model, self.batch["context_ids"], cache, 0)
        return Prefilled(cache, self.batch["context_ids"].shape[1], [])

    def _read(self, prefilled: Prefilled) -> Tensor:
        """(T, E): hidden states of the continuation."""
        ids = self.batch["continuation_ids"]
        return continue_from(self.model, ids, prefilled.cache, prefilled.next_position)[0]

    def _read_scores(self, hidden: Tensor, teacher: Tensor) -> Record:
        head = head_of(self.model)
        return reading_scores(hidden, teacher, head, self.batch["continuation_ids"][0])

    @torch.no_grad()
    def _answered(self, prefilled: Prefilled) -> Record:
        (scored,) = Measurement(self.model, self.tokenizer, self.batch).answers(prefilled)
        return {name: scored[name] for name in (*RETRIEVAL_SCORES, "answer", "answers")}
