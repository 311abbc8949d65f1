"""The report of a comparison of block methods."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsekv_pl.blocksparse.comparison_figures import comparison_figures, pass_name
from sparsekv_pl.blocksparse.comparison_summary import Line, comparison_summary
from sparsekv_pl.reporting.analysis_page import write_analysis
from sparsekv_pl.reporting.file_formats import json_bytes
from sparsekv_pl.reporting.page import Section, Table
from sparsekv_pl.reporting.sections import score
from sparsekv_pl.storage.records import Record, grouped

Cell = Callable[[Line], str]
TITLE = "Key blocks: a learned gate against Sketch&Walk"
AGREEMENT = {
    "sparsity": "sparsity",
    "overlap": "overlap",
    "overlap_free": "overlap, free",
    "jaccard": "Jaccard",
    "jaccard_free": "Jaccard, free",
    "recall": "recall",
    "recall_free": "recall, free",
    "pearson": "Pearson",
    "pearson_free": "Pearson, free",
    "spearman": "Spearman",
    "spearman_free": "Spearman, free",
    "mass_kept": "mass kept",
}
PAIRS = {
    "overlap": "overlap",
    "overlap_free": "overlap, free",
    "overlap_back": "overlap back",
    "overlap_back_free": "overlap back, free",
    "jaccard": "Jaccard",
    "jaccard_free": "Jaccard, free",
}
EXPECTED_NOTE = (
    "The expected figures are those of the SketchWalk document, for Llama-3.1-8B-Instruct at 4,096 to 16,384 tokens "
    "and a gate that selects by threshold; ours are for the model and the lengths below. Overlap is the share of the "
    "gate's blocks that Sketch&Walk selects too. Every method selects the first block and a query block's own, which "
    "raises both figures; the next column leaves these two out. Random blocks, further down, show the level of "
    "chance."
)
NO_GATE = "There is no gate in this run (gates: null): train one with configs/train/gate.yaml."
AGREEMENT_NOTE = (
    "Measured on dense passes, so that all methods see the same states; means over heads, windows, layers {layers} "
    "and the query blocks that see more than {top_k} blocks (the others select all they see). Sparsity counts all "
    "query blocks. The reference is the oracle's selection for each head: the {top_k} blocks with the most "
    "attention. Overlap is the share of a method's blocks that are the oracle's; recall is the share of the oracle's "
    "that it found; correlations are between its scores and true attention, by row over the visible blocks. "
    '"Free" leaves out the first block and a query\'s own, which all select. Sketch&Walk and the nearest blocks make '
    "one selection for all heads; its upper bound is the oracle with one choice for all heads."
)
BUDGETS_NOTE = (
    "Same layers and query blocks. The left columns have the share of attention mass kept for a number of blocks per "
    "query block, in brackets the share of the heaviest free blocks found, and in the header the sparsity of these "
    "query blocks. The right columns have the sparsity at which a method keeps that share of the mass, if each query "
    "block of each head takes only as many blocks, best first, as needed."
)
PASSES_NOTE = (
    "Context and continuation both run with the selected blocks, with a new scorer for each case; the first {dense} "
    "layers are dense for every method, and sparsity (of the context's pass) counts them as 0. KL is to dense "
    "attention, in nats per token. All methods have the same cases. Brackets hold 95 % intervals: Wilson's for "
    "accuracy, otherwise a percentile bootstrap over cases, paired with dense attention. An interval without width "
    "says only that no case differed."
)


def comparison_report(
    output: Path,
    records: Sequence[Record],
    settings: Mapping[str, Any],
    environment: Mapping[str, object],
    timestamp: str,
) -> tuple[list[str], list[Path]]:
    """Write the page, the pictures and comparison_{results,summary}_{timestamp}.json.

    Returns the main results in a few lines, and the paths.
    """
    summary = comparison_summary(records, settings)
    figures = comparison_figures(records, summary, settings)
    measured = [record for record in records if record["kind"] != "picture"]
    named = {"settings": dict(settings), "environment": dict(environment)}
    short = {name: rows for name, rows in summary.items() if not name.endswith("_by_layer")}
    paths = write_analysis(
        output,
        TITLE,
        comparison_sections(summary, settings, figures),
        {"settings": dict(settings), **short},
        environment,
        figures,
        {
            f"comparison_results_{timestamp}.json": json_bytes({**named, "results": measured}),
            f"comparison_summary_{timestamp}.json": json_bytes({**named, **summary}),
        },
    )
    return at_a_glance(summary, settings), paths


def at_a_glance(summary: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """A sentence per length and table, with the best method first."""
    sentences = []
    for rows, measure, form, what in (
        (summary["agreement"], "mass_kept", ".3f", f"attention mass kept by {settings['top_k_blocks']} blocks"),
        (summary["text"], "ratio", ".3f", "perplexity over dense"),
        (summary["needles"], "accuracy", ".2f", "needle accuracy"),
    ):
        for caption, found, several in _by_length(rows):
            ranked = sorted(found, key=lambda row: row[measure], reverse=measure != "ratio")
            names = [
                f"{row['variant']} " * several + (pass_name(row) if "budget" in row else row["method"])
                for row in ranked
            ]
            scores = "; ".join(f"{name} {row[measure]:{form}}" for name, row in zip(names, ranked, strict=True))
            sentences.append(f"{caption}, {what}: {scores}.")
    return sentences


def comparison_sections(
    summary: Mapping[str, Any], settings: Mapping[str, Any], figures: Iterable[str]
) -> list[Section]:
    """Sections of the page that have content."""

    def pictures(start: str) -> list[str]:
        return [name for name in figures if name.startswith(start)]

    top_k = settings["top_k_blocks"]
    no_gate = [NO_GATE] if settings["gates"] is None else []
    about = [EXPECTED_NOTE, *no_gate, f"Settings: {', '.join(f'{name} {value}' for name, value in settings.items())}."]
    pairs = {"method": _text("method"), "other": _text("other"), **_labelled(PAIRS)}
    sections = [
        Section("At a glance", paragraphs=at_a_glance(summary, settings)),
        Section(
            "Against the SketchWalk document",
            paragraphs=about,
            tables=_tables(summary["expected"], EXPECTED_COLUMNS),
        ),
        Section(
            f"Agreement with true attention, {top_k} blocks",
            pictures("agreement_by_layer"),
            [AGREEMENT_NOTE.format(layers=_span(summary["sparse_layers"]), top_k=top_k)],
            _tables(summary["agreement"], {"method": _text("method"), **_labelled(AGREEMENT)}),
        ),
        Section("Agreement with one another", tables=_tables(summary["pairs"], pairs)),
        Section(
            "Quality at equal sparsity, sparsity at equal quality",
            pictures("mass_over_budget"),
            [BUDGETS_NOTE],
            [*_budget_tables(summary["agreement"], settings)],
        ),
        Section(
            "As attention in a forward pass",
            pictures("passes"),
            [PASSES_NOTE.format(dense=settings["dense_layers"])],
            [*_text_tables(summary["text"]), *_tables(summary["needles"], NEEDLE_COLUMNS, "Needles, {}")],
        ),
        Section("Chosen blocks", pictures("blocks")),
    ]
    return [section for section in sections if section.tables or section.pictures or section is sections[0]]


def _by_length(rows: Sequence[Line]) -> Iterator[tuple[str, list[Line], bool]]:
    """(caption, rows, whether there are several variants) for each length; "all" last."""
    several = len({row["variant"] for row in rows}) > 1
    for length, found in grouped(rows, "length").items():
        windows = ", ".join(dict.fromkeys(f"{row['cases']} cases" for row in found if "cases" in row))
        caption = f"{length:,} tokens" if isinstance(length, int) else f"{length} lengths"
        yield caption + f", {windows}" * bool(windows), found, several


def _table(rows: Sequence[Line], several: bool, columns: Mapping[str, Cell], caption: str) -> Table:
    """A line per row; ``several`` variants have a column of their own."""
    shown = ({"model": _text("variant")} if several else {}) | {**columns}
    return Table(list(shown), [[cell(row) for cell in shown.values()] for row in rows], caption)


def _tables(rows: Sequence[Line], columns: Mapping[str, Cell], caption: str = "{}") -> list[Table]:
    """A table per length."""
    return [_table(found, several, columns, caption.format(length)) for length, found, several in _by_length(rows)]


def _labelled(measures: Mapping[str, str]) -> dict[str, Cell]:
    return {label: _digits(name) for name, label in measures.items()}


def _text(name: str) -> Cell:
    return lambda row: row[name]


def _digits(name: str) -> Cell:
    return lambda row: score(row[name], digits=3)


EXPECTED_COLUMNS: dict[str, Cell] = {
    "": _text("quantity"),
    "expected": _text("expected"),
    "ours": _digits("ours"),
    "without first and own": _digits("ours_without_first_and_own"),
    "met": lambda row: {True: "yes", False: "no", None: "-"}[row["met"]],
}
NEEDLE_COLUMNS: dict[str, Cell] = {
    "method": pass_name,
    "sparsity": _digits("sparsity"),
    "needles": lambda row: f"{row['right']} of {row['cases']}",
    "accuracy": lambda row: score(row["accuracy"], row["accuracy_interval"]),
    "minus dense": lambda row: score(row["difference"], row["difference_interval"], sign=True),
}
TEXT_COLUMNS: dict[str, Cell] = {
    "method": pass_name,
    "sparsity": _digits("sparsity"),
    "perplexity": lambda row: score(row["perplexity"], row["perplexity_interval"]),
    "perplexity over dense": lambda row: score(row["ratio"], row["ratio_interval"], digits=3),
    "KL to dense": lambda row: score(row["kl"], row["kl_interval"], digits=3),
}


def _text_tables(rows: Sequence[Line]) -> Iterator[Table]:
    for caption, found, several in _by_length(rows):
        yield _table(found, several, TEXT_COLUMNS, f"Text, {caption}, {found[0]['tokens']} tokens read")


def _budget_tables(rows: Sequence[Line], settings: Mapping[str, Any]) -> Iterator[Table]:
    budgets, shares = settings["budgets"], settings["shares"]

    def kept(budget: int) -> Cell:
        mass, recall = _digits(f"mass_at_{budget}"), _digits(f"recall_at_{budget}")
        return lambda row: f"{mass(row)} ({recall(row)})"

    prices = {f"sparsity at {100 * share:g} % of the mass": _digits(f"sparsity_for_{share:g}") for share in shares}
    for caption, found, several in _by_length([row for row in rows if f"mass_at_{budgets[0]}" in row]):
        quality = {f"{b} blocks ({score(found[0][f'sparsity_at_{b}'], digits=3)})": kept(b) for b in budgets}
        yield _table(found, several, {"method": _text("method"), **quality, **prices}, caption)


def _span(layers: Sequence[int]) -> str:
    """ "2 to 29", or a list if there are gaps."""
    if layers and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]} to {layers[-1]}"
    return ", ".join(map(str, layers))
