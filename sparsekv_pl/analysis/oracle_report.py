"""The report of oracle hot blocks: the seed's JSON, main figures, tables and pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from sparsekv_pl.analysis.oracle_figures import layers_figure, mass_figure, recall_figure, samples_figure
from sparsekv_pl.analysis.oracle_findings import Choice, Sample, concentration, differences, mean, recall
from sparsekv_pl.analysis.oracle_layers import best_head, by_layer, head_recall
from sparsekv_pl.analysis.oracle_tables import best_lines, figures_line, layer_table, mass_tables, recall_tables
from sparsekv_pl.reporting.analysis_page import write_analysis
from sparsekv_pl.reporting.file_formats import json_bytes
from sparsekv_pl.reporting.heatmaps import sparsity_figure
from sparsekv_pl.reporting.page import Section
from sparsekv_pl.storage.records import Record, grouped

TITLE = "Oracle hot blocks"
HYPOTHESIS = (
    "The sparsity hypothesis (Scout-KV): for a question about a long document, the model mostly attends to a few "
    "blocks of text, not to all of it. This report measures the {top_k} hottest blocks' share of the attention on the "
    "document, with and without block 0. That block holds the attention sink, which receives attention independently "
    "of its content (G. Xiao et al., arXiv 2309.17453)."
)
HOW_TO_READ = (
    "The figures are the attention of one token, the last before the answer, averaged over {heads} of {layers}. "
    "Blocks of {block_size} tokens are counted from the first token that the model reads, the chat template's opening; "
    "the last one may be shorter. Attention to tokens after the document (the question, the token itself) is in no "
    "block: shares are of the attention on the document.",
    "Recall is how often a block that holds the answer is among the {top_k} hottest. Chance is the exact probability "
    "of this for {top_k} blocks drawn at random. p is the exact probability of as many hits by chance. BM25 ranks the "
    "same blocks by the words of the question. Place alone ranks them by the mean attention of all other questions "
    "with as many blocks, which does not depend on this question. Without the sink, block 0 is left out of the "
    "ranking, and so are questions whose answer it holds.",
    "Brackets hold 95 % intervals: Wilson's for shares of questions, otherwise a percentile bootstrap that draws "
    "questions with replacement. Questions without a known answer block count in shares of attention and not in "
    "recall.",
)


def write_oracle(
    output: Path,
    records: Sequence[Record],
    choice: Choice,
    block_size: int,
    named: Mapping[str, str],
    quantisation: str,
    environment: Mapping[str, object],
) -> tuple[str, list[Path]]:
    """Write all results of the records; return the main figures in a line per variant, and the paths.

    ``records`` are those of ``OracleBlocks.measure``, each with its ``variant``. ``named`` (variant -> the model's
    name) and ``quantisation`` (in words) are for ``oracle_data.json``.
    """
    samples = {v: [Sample(record, choice) for record in own] for v, own in grouped(records, "variant").items()}
    findings = {variant: found(some) for variant, some in samples.items()}
    if len(samples) == 2:
        findings["trained minus base"] = differences(samples["base"], samples["trained"])
    lines = {v: figures_line(findings[v], choice.top_k) for v in samples}
    content = {
        "settings": {"block_size": block_size, "top_k": choice.top_k, "layers": choice.layers, "heads": choice.heads},
        "findings": findings,
        "samples": [_described(sample) for some in samples.values() for sample in some],
    }
    data = {
        "oracle_data.json" if v == "base" else f"oracle_data_{v}.json": json_bytes(
            oracle_data(some, named[v], quantisation, block_size)
        )
        for v, some in samples.items()
    }
    figures = _figures(samples, findings)
    sections = _sections(samples, findings, lines, block_size, list(figures))
    paths = write_analysis(output, TITLE, sections, content, environment, figures, data)
    return "\n".join(f"{named[v]}: {text}" for v, text in lines.items()), paths


def oracle_data(samples: Sequence[Sample], model: str, quantisation: str, block_size: int) -> dict[str, Any]:
    """The content of Scout-KV's ``generate_oracle_data.py``, with the same keys in the same order."""
    return {
        "metadata": {
            "model": model,
            "quantization": quantisation,
            "block_size": block_size,
            "num_samples": len(samples),
        },
        "samples": [
            {
                "question": sample.record["question"],
                "answer": next(iter(sample.record["answers"]), ""),
                f"top_{sample.choice.top_k}_block_ids": sample.top,
                "all_block_scores": {str(i): round(score, 6) for i, score in enumerate(sample.scores.tolist())},
                "num_blocks": sample.record["num_blocks"],
                "context_tokens": sample.record["context_tokens"],
            }
            for sample in samples
        ],
    }


def found(samples: Sequence[Sample]) -> dict[str, Any]:
    """All figures of one variant."""
    return {
        "questions": len(samples),
        "documents": len({tuple(sample.record["documents"]) for sample in samples}),
        "answers_with_a_place": sum(sample.answer is not None for sample in samples),
        "sink_share": mean([sample.scores[0] / sample.scores.sum() for sample in samples]),
        "beyond": mean([1 - sample.scores.sum() for sample in samples]),
        "concentration": concentration(samples),
        "recall": recall(samples),
        "layers": by_layer(samples),
        "best_head": best_head(samples),
    }


def _sections(
    samples: Mapping[str, Sequence[Sample]],
    findings: Mapping[str, Any],
    lines: Mapping[str, str],
    block_size: int,
    pictures: Sequence[str],
) -> list[Section]:
    (first, *_), *_ = samples.values()
    choice = first.choice
    words = {
        "top_k": choice.top_k,
        "block_size": block_size,
        "heads": "all heads" if choice.heads is None else f"heads {choice.heads}",
        "layers": "all layers" if choice.layers is None else f"layers {choice.layers}",
    }

    def drawn(name: str) -> list[str]:
        return [file for file in pictures if file.startswith(name)]

    few = [
        f"The {len(some)} questions come from {findings[v]['documents']} documents; the intervals assume independent "
        "questions and may be too narrow."
        for v, some in list(samples.items())[:1]
        if findings[v]["documents"] < len(some)
    ]
    sections = [
        Section(
            "Main figures",
            paragraphs=[HYPOTHESIS.format(**words), *(f"{v}: {text}" for v, text in lines.items()), *few],
        ),
        Section("Where the attention is", drawn("mass"), tables=mass_tables(findings, list(samples), choice.top_k)),
        Section("Are the answer's blocks hot?", drawn("recall"), tables=recall_tables(findings, list(samples))),
        Section("Question by question", drawn("samples")),
        Section(
            "By layer and head",
            [*drawn("layers"), *drawn("heads")],
            [*best_lines(findings, list(samples))],
            [layer_table(findings[variant]["layers"], variant, choice.top_k) for variant in samples],
        ),
        Section("How to read this", paragraphs=[text.format(**words) for text in HOW_TO_READ]),
    ]
    return [section for section in sections if section.paragraphs or section.tables or section.pictures]


ALTS = {
    "mass": "share of the attention in the hottest blocks, and how many blocks hold most of it",
    "recall": "how often the answer's block is among the hottest, by ranker",
    "samples": "attention of every question over the blocks of its document; the answer's blocks are framed",
    "layers": "the same by layer",
    "heads": "how often each head's hottest blocks hold the answer",
}


def _described(sample: Sample) -> dict[str, Any]:
    """A question's entry in report.json."""
    names = "variant id question answers documents depth context_tokens prompt_tokens num_blocks".split()
    return {
        **{name: sample.record.get(name) for name in names},
        "answer_blocks": sample.answer,
        "top_blocks": sample.top,
        "block_scores": sample.scores.tolist(),
        "bm25": sample.record["bm25"],
        "beyond": float(1 - sample.scores.sum()),
    }


def _figures(samples: Mapping[str, Sequence[Sample]], findings: Mapping[str, Any]) -> dict[str, tuple[str, Figure]]:
    """File name -> (caption, picture), for everything that was measured."""
    own = {variant: findings[variant] for variant in samples}
    figures = {"mass.png": mass_figure({v: found["concentration"] for v, found in own.items()})}
    recalls = {variant: found["recall"] for variant, found in own.items() if found["recall"]}
    if recalls:
        figures["recall.png"] = recall_figure(recalls)
    figures["layers.png"] = layers_figure({variant: found["layers"] for variant, found in own.items()})
    for variant, some in samples.items():
        ending = "" if len(samples) == 1 else f"_{variant}"
        figures[f"samples{ending}.png"] = samples_figure(some)
        if (heads := head_recall(some)) is not None:
            figures[f"heads{ending}.png"] = sparsity_figure(
                {f"recall of the answer's block without sink ({variant})": heads}, numbers=some[0].choice.numbers
            )
    return {name: (ALTS[name.split("_")[0].removesuffix(".png")], figure) for name, figure in figures.items()}
