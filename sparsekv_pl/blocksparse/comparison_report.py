"""The report of a comparison of block methods."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsekv_pl.blocksparse.comparison_figures import comparison_figures, pass_name
from sparsekv_pl.blocksparse.comparison_summary import Line, comparison_summary
from sparsekv_pl.reporting.analysis_page import write_analysis
from sparsekv_pl.reporting.file_formats import json_bytes
from sparsekv_pl.reporting.page import Picture, Section, Table
from sparsekv_pl.reporting.sections import score
from sparsekv_pl.storage.records import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
            names = [f"{row['variant']} " * several + _named(row) for row in ranked]
            scores = "; ".join(f"{name} {row[measure]:{form}}" for name, row in zip(names, ranked, strict=True))
            sentences.append(f"{caption}, {what}: {scores}.")
    return sentences


def _named(row: Line) -> str:
    return pass_name(row) if "budget" in row else str(row["method"])


def comparison_sections(
    summary: Mapping[str, Any], settings: Mapping[str, Any], figures: "Mapping[str, tuple[str, Figure]]"
) -> list[Section]:
    """Sections of the page that have content."""

    def pictures(start: str) -> list[Picture]:
        return [Picture(name, shown) for name, (shown, _) in figures.items() if name.startswith(start)]

    top_k = settings["top_k_blocks"]
    sections = [
        Section("At a glance", paragraphs=at_a_glance(summary, settings)),
        Section(
            "Against the SketchWalk document", paragraphs=_about(settings), tables=_expected_tables(summary["expected"])
        ),
        Section(
            f"Agreement with true attention, {top_k} blocks",
            pictures("agreement_by_layer"),
            [AGREEMENT_NOTE.format(layers=_span(summary["sparse_layers"]), top_k=top_k)],
            _tables(summary["agreement"], AGREEMENT, ["method"]),
        ),
        Section("Agreement with one another", tables=_tables(summary["pairs"], PAIRS, ["method", "other"])),
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
            [*_text_tables(summary["text"]), *_needle_tables(summary["needles"])],
        ),
        Section("Chosen blocks", pictures("blocks")),
    ]
    return [section for section in sections if section.tables or section.pictures or section is sections[0]]


def _about(settings: Mapping[str, Any]) -> list[str]:
    chosen = ", ".join(f"{name} {value}" for name, value in settings.items())
    return [EXPECTED_NOTE, *([NO_GATE] if settings["gates"] is None else []), f"Settings: {chosen}."]


def _by_length(rows: Sequence[Line]) -> Iterator[tuple[str, list[Line], bool]]:
    """(caption, rows, whether there are several variants) for each length; "all" last."""
    several = len({row["variant"] for row in rows}) > 1
    for length in dict.fromkeys(row["length"] for row in rows):
        found = [row for row in rows if row["length"] == length]
        windows = ", ".join(dict.fromkeys(f"{row['cases']} cases" for row in found if "cases" in row))
        caption = f"{length:,} tokens" if isinstance(length, int) else f"{length} lengths"
        yield caption + f", {windows}" * bool(windows), found, several


def _tables(rows: Sequence[Line], columns: Mapping[str, str], names: Sequence[str]) -> list[Table]:
    """A table per length: the names, then the measures."""
    return [
        Table(
            [*["model"] * several, *names, *columns.values()],
            [
                [*[row["variant"]] * several, *(row[name] for name in names), *(_three_digits(row[c]) for c in columns)]
                for row in found
            ],
            caption,
        )
        for caption, found, several in _by_length(rows)
    ]


def _expected_tables(rows: Sequence[Line]) -> list[Table]:
    header = ["", "expected", "ours", "without first and own", "met"]
    return [
        Table(
            [*["model"] * several, *header],
            [
                [
                    *[row["variant"]] * several,
                    row["quantity"],
                    row["expected"],
                    _three_digits(row["ours"]),
                    _three_digits(row["ours_without_first_and_own"]),
                    {True: "yes", False: "no", None: "-"}[row["met"]],
                ]
                for row in found
            ],
            caption,
        )
        for caption, found, several in _by_length(rows)
    ]


def _budget_tables(rows: Sequence[Line], settings: Mapping[str, Any]) -> Iterator[Table]:
    budgets, shares = settings["budgets"], settings["shares"]
    for caption, found, several in _by_length([row for row in rows if f"mass_at_{budgets[0]}" in row]):
        header = [f"{b} blocks ({_three_digits(found[0][f'sparsity_at_{b}'])})" for b in budgets]
        lines = [
            [
                *[row["variant"]] * several,
                row["method"],
                *(f"{_three_digits(row[f'mass_at_{b}'])} ({_three_digits(row[f'recall_at_{b}'])})" for b in budgets),
                *(_three_digits(row[f"sparsity_for_{share:g}"]) for share in shares),
            ]
            for row in found
        ]
        prices = [f"sparsity at {100 * share:g} % of the mass" for share in shares]
        yield Table([*["model"] * several, "method", *header, *prices], lines, caption)


def _text_tables(rows: Sequence[Line]) -> Iterator[Table]:
    header = ["method", "sparsity", "perplexity", "perplexity over dense", "KL to dense"]
    for caption, found, several in _by_length(rows):
        lines = [
            [
                *[row["variant"]] * several,
                pass_name(row),
                _three_digits(row["sparsity"]),
                score(row["perplexity"], row["perplexity_interval"]),
                _interval(row["ratio"], row["ratio_interval"]),
                _interval(row["kl"], row["kl_interval"]),
            ]
            for row in found
        ]
        yield Table([*["model"] * several, *header], lines, f"Text, {caption}, {found[0]['tokens']} tokens read")


def _needle_tables(rows: Sequence[Line]) -> Iterator[Table]:
    header = ["method", "sparsity", "needles", "accuracy", "minus dense"]
    for caption, found, several in _by_length(rows):
        lines = [
            [
                *[row["variant"]] * several,
                pass_name(row),
                _three_digits(row["sparsity"]),
                f"{row['right']} of {row['cases']}",
                score(row["accuracy"], row["accuracy_interval"]),
                score(row["difference"], row["difference_interval"], sign=True),
            ]
            for row in found
        ]
        yield Table([*["model"] * several, *header], lines, f"Needles, {caption}")


def _interval(value: float, span: tuple[float, float] | None) -> str:
    """Like ``score``, with a third digit for ratios near 1."""
    return f"{value:.3f}" + ("" if span is None else f" [{span[0]:.3f}, {span[1]:.3f}]")


def _three_digits(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _span(layers: Sequence[int]) -> str:
    """ "2 to 29", or a list if there are gaps."""
    if layers and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]} to {layers[-1]}"
    return ", ".join(map(str, layers))
