"""Oracle hot blocks: the document's blocks that the token before the answer attends to (Scout-KV's first phase)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from sparsekv_pl.analysis.hot_blocks import HotBlocks
from sparsekv_pl.analysis.oracle_findings import Choice
from sparsekv_pl.analysis.oracle_report import write_oracle
from sparsekv_pl.evaluation.model_analysis import Analysis
from sparsekv_pl.eviction.prefill import continue_from
from sparsekv_pl.models.backbone import Backbone
from sparsekv_pl.models.batch import CaseBatch, CaseInfo
from sparsekv_pl.models.layer_kinds import evicted_layers
from sparsekv_pl.reporting.console import show
from sparsekv_pl.storage.records import Record, rounded

DIGITS = 5
"""Significant digits of a stored share."""


class OracleBlocks(Analysis):
    """Tests the sparsity hypothesis: for a question, a model attends to a few blocks of a long document.

    One forward pass reads document, question and the answer's beginning. In every layer the last token's attention is
    summed over blocks of the document, which begins with the chat template's opening. Writes ``oracle_data.json`` in
    the layout of Scout-KV's ``generate_oracle_data.py`` (with an adapter also ``oracle_data_trained.json``), and a
    report. Any attention implementation of the model works. ``layers``, ``heads`` and ``top_k`` do not affect what is
    measured: after changing them, a run only rewrites the report. Raises ``ValueError`` for a number below 1, and for
    layers or heads that the model does not have.

    Parameters
    ----------
    backbone
        The model; ``load_in_4bit`` for NF4.
    output
        Folder for all output.
    block_size
        Tokens per block.
    top_k
        Number of hot blocks.
    layers
        Layers to average over, of those with full attention; null: all of them.
    heads
        Query heads of each layer to average over; null: all.
    """

    def __init__(
        self,
        backbone: Backbone,
        output: str | None = None,
        block_size: int = 512,
        top_k: int = 5,
        layers: list[int] | None = None,
        heads: list[int] | None = None,
    ) -> None:
        for name, value in {"block_size": block_size, "top_k": top_k}.items():
            if value < 1:
                raise ValueError(f"{name} is {value}: give at least 1")
        super().__init__(backbone, output or "output/oracle")
        config = self.causal_lm.config.get_text_config()
        measured = evicted_layers(config)
        _check("layers", layers, measured)
        _check("heads", heads, list(range(config.num_attention_heads)))
        self.block_size, self.choice = block_size, Choice(top_k, layers, heads, measured)
        self.named = {"base": backbone.pretrained, "trained": f"{backbone.pretrained} + {backbone.adapter}"}
        self.quantisation = "4-bit (bitsandbytes)" if backbone.load_in_4bit else f"none ({backbone.dtype})"

    def described(self) -> dict[str, Any]:
        return {"block_size": self.block_size}

    def measure(self, batch: CaseBatch) -> list[Record]:
        """Measure a batch; return a record per row with each head's share of attention per block, and BM25 scores."""
        rows = zip(
            batch["context_ids"], batch["continuation_ids"], batch["continuation_lengths"], batch["cases"], strict=True
        )
        return [self._record(context, asked[: int(length)], case) for context, asked, length, case in rows]

    def write(self, records: list[Record], environment: dict[str, object]) -> list[Path]:
        lines, paths = write_oracle(
            self.output, records, self.choice, self.block_size, self.named, self.quantisation, environment
        )
        show(lines)
        return paths

    def _record(self, context: Tensor, asked: Tensor, case: CaseInfo) -> Record:
        model = self.causal_lm
        hot = HotBlocks(len(context), self.block_size)
        continue_from(model, torch.cat([context, asked])[None], DynamicCache(), 0, observer=hot)
        mass = hot.mass[0]
        texts = [str(self.tokenizer.decode(block)) for block in context.split(self.block_size)]
        return {
            "id": case.id,
            "question": case.question.strip(),
            "answers": list(case.answers),
            "documents": list(case.document_ids),
            "depth": case.depth,
            "context_tokens": len(context),
            "prompt_tokens": len(context) + len(asked),
            "num_blocks": mass.shape[-1],
            "answer_blocks": self._blocks_of(case.answer_span),
            "mass": rounded(mass.tolist(), DIGITS),
            "bm25": rounded(bm25_scores(case.question, texts), DIGITS),
        }

    def _blocks_of(self, span: tuple[int, int] | None) -> list[int] | None:
        """The blocks that contain any of the tokens [start, end)."""
        return None if span is None else list(range(span[0] // self.block_size, (span[1] - 1) // self.block_size + 1))


def bm25_scores(question: str, texts: Sequence[str]) -> list[float]:
    """BM25 score of each text for the question (Lucene's variant, k1 1.5, b 0.75, English stop words, no stemmer).

    All scores are 0 if no text contains a word of the question. X. H. Lu, "BM25S: orders of magnitude faster lexical
    search via eager sparse scoring", arXiv 2407.03618.
    """
    import bm25s

    words = bm25s.tokenize([*texts, question], stopwords="en", return_ids=False, show_progress=False)
    known = {word for text in words[:-1] for word in text}
    asked = [word for word in words[-1] if word in known]
    if not asked:
        return [0.0] * len(texts)
    index = bm25s.BM25()
    index.index(words[:-1], show_progress=False)
    return [float(score) for score in index.get_scores(asked)]


def _check(name: str, chosen: list[int] | None, known: list[int]) -> None:
    if chosen is not None and (not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(known)):
        whole = known == list(range(len(known)))
        some = f"0 to {known[-1]}" if whole else f"{', '.join(map(str, known))}, which have full attention"
        raise ValueError(f"{name} is {chosen}: give some of {some}, none twice, or null for all")
