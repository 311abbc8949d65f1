"""Reports of comparisons and validations: means, paired scores and pages from numbers computed by hand."""

import math
from pathlib import Path
from typing import Any

import pytest

from sparsekv_pl.blocksparse.comparison_figures import blocks_figure, budget_figure, layers_figure
from sparsekv_pl.blocksparse.comparison_report import comparison_report
from sparsekv_pl.blocksparse.comparison_summary import comparison_summary, means, needle_rows, sparse_layers, text_rows
from sparsekv_pl.blocksparse.validation_figures import validation_figure
from sparsekv_pl.blocksparse.validation_summary import expected_table, sections, summary
from sparsekv_pl.reporting.page import markdown
from sparsekv_pl.storage.records import Record

METHODS = ("gate", "gate, threshold 0.1", "Sketch&Walk", "random")
SETTINGS: dict[str, Any] = {
    "gates": "folder",
    "top_k_blocks": 4,
    "threshold": 0.1,
    "budgets": [2, 4],
    "shares": [0.9],
    "dense_layers": 1,
}


def agreement(method: str, layer: int, case: str = "a", **measures: Any) -> Record:
    names = [
        f"{name}{end}" for name in ("overlap", "jaccard", "recall", "pearson", "spearman") for end in ("", "_free")
    ]
    record: Record = dict.fromkeys([*names, "sparsity", "mass_kept"], 0.5)
    if "threshold" not in method:
        record |= {f"{name}_at_{b}": 0.1 * b for name in ("mass", "recall", "sparsity") for b in (2, 4)}
        record["sparsity_for_0.9"] = 0.25
    return {**base("agreement", case, method), "layer": layer, **record, **measures}


def base(kind: str, case: str, method: str, **more: Any) -> Record:
    common = {"kind": kind, "variant": "base", "case": case, "task": "text", "length": 64, "depth": None}
    return {**common, "method": method, **more}


def pair(method: str, other: str, layer: int, **measures: float) -> Record:
    names = [f"{name}{end}" for name in ("overlap", "overlap_back", "jaccard") for end in ("", "_free")]
    return {**base("pair", "a", method, other=other, layer=layer), **dict.fromkeys(names, 0.5), **measures}


def text(case: str, method: str, nll: float, tokens: int = 10, **more: Any) -> Record:
    measures = {"nll": nll, "kl": 1.0, "tokens": tokens, "sparsity": 0.5, "seconds": 1.0}
    budget = None if method == "dense" else 4
    return {**base("pass", case, method, budget=budget), **measures, **more}


def needle(case: str, method: str, exact: float, length: int = 64) -> Record:
    measures = {"exact": exact, "sparsity": 0.5, "seconds": 1.0, "task": "facts", "length": length}
    return {**base("pass", case, method, budget=None if method == "dense" else 4), **measures}


def run() -> list[Record]:
    records = [agreement(method, layer) for layer in (0, 1) for method in METHODS if (method, layer) != (METHODS[2], 0)]
    pairs = [pair(one, METHODS[2], 1, overlap=0.4, overlap_free=0.1, jaccard=0.6) for one in METHODS[:2]]
    grid = [[0.5, 0.0], [0.25, 0.75]]
    picture = base("picture", "a", "", layer=1, truth=grid, chosen=dict.fromkeys(METHODS, grid))
    passes = [text("a", "dense", 20), *(text("a", method, 22) for method in METHODS)]
    asked = [needle(f"n{i}", method, float(i)) for i in range(2) for method in ("dense", *METHODS)]
    return records + pairs + [picture] + passes + asked


def test_means_leave_out_what_is_not_defined() -> None:
    records = [agreement("gate", 0, mass_kept=0.2), agreement("gate", 1, case="b", mass_kept=None)]
    records.append(agreement("gate", 2, mass_kept=0.6))
    (row,) = means(records, ["variant", "length", "method"])
    assert row["mass_kept"] == pytest.approx(0.4)
    assert row["cases"] == 2
    (none,) = means(records[1:2], ["method"])
    assert none["mass_kept"] is None


def test_methods_are_compared_where_all_of_them_choose() -> None:
    records = run()
    assert sparse_layers([record for record in records if record["kind"] == "agreement"]) == [1]
    records.append(agreement("gate", 0, case="b", mass_kept=0.0))
    rows = comparison_summary(records, SETTINGS)["agreement"]
    assert {row["method"]: row["mass_kept"] for row in rows} == dict.fromkeys(METHODS, 0.5)


def test_perplexity_is_paired_with_dense_on_the_same_windows() -> None:
    passes = [text("a", "dense", 20), text("b", "dense", 90, 30), text("b", "gate", 96, 30), text("a", "gate", 24)]
    dense, gate = text_rows(passes)
    assert dense["perplexity"] == pytest.approx(math.exp(110 / 40))
    assert (dense["ratio"], dense["ratio_interval"]) == (1, (1, 1))
    assert gate["ratio"] == pytest.approx(math.exp(10 / 40))
    assert gate["kl"] == pytest.approx(2 / 40)
    low, high = gate["ratio_interval"]
    assert low == pytest.approx(math.exp(6 / 30))  # window b alone, and window a alone
    assert high == pytest.approx(math.exp(4 / 10))


def test_needles_are_counted_and_compared_with_dense() -> None:
    passes = [needle(f"n{i}", "dense", float(i < 3)) for i in range(4)]
    passes += [needle(f"n{i}", "gate", float(i < 1)) for i in range(4)]
    passes += [needle("m", method, 1.0, length=128) for method in ("dense", "gate")]
    rows = {(row["length"], row["method"]): row for row in needle_rows(passes)}
    assert rows[64, "gate"]["right"] == 1
    assert rows[64, "gate"]["difference"] == pytest.approx(-0.5)
    low, high = rows[64, "gate"]["difference_interval"]
    assert -1 <= low < -0.5 < high <= 0
    assert rows[128, "gate"]["accuracy_interval"][0] == pytest.approx(1 / (1 + 1.959964**2))
    assert (rows["all", "gate"]["right"], rows["all", "gate"]["cases"]) == (2, 5)


def test_expected_figures_stand_beside_ours() -> None:
    rows = {row["quantity"]: row for row in comparison_summary(run(), SETTINGS)["expected"]}
    overlap = rows["block overlap of gate and Sketch&Walk (gate by threshold)"]
    assert (overlap["ours"], overlap["ours_without_first_and_own"], overlap["met"]) == (0.4, 0.1, True)
    assert rows["Jaccard similarity of gate and Sketch&Walk (gate top 4)"]["met"] is False
    assert rows["sparsity of the gate (by threshold)"]["expected"] == "0.7-0.9"
    assert rows["sparsity of Sketch&Walk (top 4)"]["met"] is False
    assert len(rows) == 7


def test_the_page_says_where_the_expected_figures_are_from(tmp_path: Path) -> None:
    said, paths = comparison_report(tmp_path, run(), SETTINGS, {"python": "3"}, "20240219_130000")
    names = {path.name for path in paths}
    assert names >= {"comparison_results_20240219_130000.json", "comparison_summary_20240219_130000.json", "blocks.png"}
    page = (tmp_path / "report.md").read_text()
    assert "for Llama-3.1-8B-Instruct at 4,096 to 16,384 tokens" in page
    assert "| block overlap of gate and Sketch&Walk (gate by threshold) | 0.3-0.5 | 0.400 | 0.100 | yes |" in page
    assert "| gate | 0.200 (0.200) | 0.400 (0.400) | 0.250 |" in page
    assert "| gate, 4 blocks | 0.500 | 9.03 [9.03, 9.03] | 1.221 [1.221, 1.221] | 0.100 [0.100, 0.100] |" in page
    assert "| gate, 4 blocks | 0.500 | 1 of 2 | 0.50 [0.09, 0.91] | +0.00 [+0.00, +0.00] |" in page
    assert any(line.startswith("64 tokens, 2 cases, needle accuracy: ") for line in said)
    assert "picture" not in (tmp_path / "comparison_results_20240219_130000.json").read_text()


def test_base_and_trained_stand_side_by_side(tmp_path: Path) -> None:
    both = [{**record, "variant": variant} for record in run() for variant in ("base", "trained")]
    paths = comparison_report(tmp_path, both, SETTINGS, {}, "t")[1]
    assert {path.name for path in paths} >= {"blocks_base.png", "blocks_trained.png", "passes_trained.png"}
    page = (tmp_path / "report.md").read_text()
    assert "| trained | gate, 4 blocks |" in page


def test_needles_without_text_still_make_a_page(tmp_path: Path) -> None:
    asked = [record for record in run() if record["task"] == "facts"]
    comparison_report(tmp_path, asked, SETTINGS, {}, "t")
    page = (tmp_path / "report.md").read_text()
    assert "needle accuracy" in page
    assert "Agreement with" not in page


def test_curves_are_of_methods_that_take_a_budget() -> None:
    rows = comparison_summary(run(), SETTINGS)["agreement"]
    (axes,) = budget_figure(rows, METHODS, [2, 4]).axes
    drawn = {str(line.get_label()): list(line.get_ydata()) for line in axes.get_lines()}
    assert set(drawn) == set(METHODS) - {"gate, threshold 0.1"}
    assert drawn["random"] == pytest.approx([0.2, 0.4])


def test_a_dense_layer_is_a_gap() -> None:
    figure = layers_figure(comparison_summary(run(), SETTINGS)["agreement_by_layer"], METHODS)
    lines = {str(line.get_label()): list(line.get_ydata()) for line in figure.axes[0].get_lines()}
    assert lines["gate"] == [0.5, 0.5]
    assert math.isnan(lines["Sketch&Walk"][0])
    assert lines["Sketch&Walk"][1] == 0.5


def test_blocks_are_drawn_beside_the_truth_and_later_ones_left_out() -> None:
    grid = [[0.5, 0.0], [0.25, 0.75]]
    figure = blocks_figure([{"layer": 3, "truth": grid, "chosen": {"gate": grid}}], ["gate", "Sketch&Walk"])
    truth, gate, dense = figure.axes[:3]
    assert [axes.get_title() for axes in (truth, gate, dense)] == ["true attention", "gate", "Sketch&Walk"]
    array = gate.get_images()[0].get_array()
    assert array.mask.tolist() == [[False, True], [False, False]]
    assert array.data.tolist() == grid
    assert not dense.get_images()
    assert dense.texts[0].get_text() == "dense"


def record(length: int, layer: int, kept_dense: bool = False, **figures: Any) -> Record:
    defaults = {"actual_sparsity": 0.8, "block_sparsity": 0.75, "cosine_similarity": 0.98, "mse": 0.001}
    defaults |= {"max_error": 0.05, "dense_time_ms": 45.0, "sparse_time_ms": 15.0, "speedup": 3.0}
    return {"sample_id": "s", "layer_idx": layer, "seq_len": length, "kept_dense": kept_dense, **defaults, **figures}


def verdicts(*records: Record) -> dict[tuple[str, int | None], tuple[float | None, bool | None]]:
    return {(e["name"], e["seq_len"]): (e["here"], e["met"]) for e in summary(records, {})["expected"]}


def test_what_was_expected_is_met() -> None:
    assert verdicts(record(8192, 2), record(16384, 2)) == {
        ("cosine similarity", 8192): (0.98, True),
        ("cosine similarity", 16384): (0.98, True),
        ("mean squared error", 8192): (0.001, True),
        ("mean squared error", 16384): (0.001, True),
        ("largest error", 8192): (0.05, True),
        ("largest error", 16384): (0.05, True),
        ("sparsity", 8192): (0.8, True),
        ("sparsity", 16384): (0.8, True),
        ("speed-up", 8192): (3.0, True),
        ("speed-up", 16384): (3.0, True),
    }


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("cosine similarity", "cosine_similarity", 0.94),
        ("mean squared error", "mse", 0.02),
        ("largest error", "max_error", 0.2),
        ("sparsity", "actual_sparsity", 0.5),
        ("sparsity", "actual_sparsity", 0.9),
        ("speed-up", "speedup", 1.4),
    ],
)
def test_what_was_expected_is_missed(name: str, field: str, value: float) -> None:
    found = verdicts(record(8192, 2, **{field: value}))
    assert found[name, 8192] == (value, False)
    assert sum(met is False for _, met in found.values()) == 1


def test_means_leave_dense_layers_out_and_the_largest_error_is_of_all() -> None:
    records = [record(4096, 0, kept_dense=True, mse=0.0, cosine_similarity=1.0)]
    records += [record(4096, 2, mse=0.002, max_error=0.3), record(4096, 3, mse=0.004)]
    found = verdicts(*records)
    assert found["mean squared error", 4096] == (pytest.approx(0.003), True)
    assert found["largest error", 4096] == (0.3, False)
    assert found["speed-up", 8192] == found["speed-up", 16384] == (None, None)
    assert ("speed-up", 4096) not in found


def test_by_length_and_layer() -> None:
    content = summary([record(4096, 0, kept_dense=True), record(4096, 2), record(8192, 2, speedup=5.0)], {"top_k": 16})
    assert list(content["by_length"]) == ["4096", "8192"]
    assert content["by_layer"]["2"]["speedup"] == {"mean": 4.0, "min": 3.0, "max": 5.0}
    assert content["by_length_and_layer"]["4096"]["0"]["kept_dense"] == 1
    assert "sparse_layers" in content["by_length"]["4096"]


def test_the_page_tells_all_of_it() -> None:
    records = [record(512, 0, kept_dense=True), record(4096, 2), {"file": "a.pt", "refused": "a.pt is truncated"}]
    content = summary(records, {})
    page = markdown("Report", sections(content))
    assert "| cosine similarity | > 0.95 | 4096 | 0.98 | yes |" in page
    assert "| speed-up | 1.5 to 3 | 8192 | - | not measured |" in page
    assert "| 512 | 0 | dense | 1 |" in page
    assert "| a.pt | a.pt is truncated |" in page
    assert all(len(line) == 5 for line in expected_table(content).lines)
    assert "Refused" not in markdown("Report", sections(summary(records[:2], {})))


def test_the_picture_has_a_line_per_length_and_what_was_expected() -> None:
    records = [record(length, layer, kept_dense=layer == 0) for length in (4096, 8192) for layer in (0, 2, 5)]
    cosine, speedup = validation_figure([*records, {"file": "a.pt", "refused": "it is"}]).axes
    for axes in (cosine, speedup):
        drawn = {line.get_label(): list(line.get_xdata()) for line in axes.lines}
        assert drawn["4096 tokens"] == drawn["8192 tokens"] == [0, 2, 5]
    levels = {line.get_ydata()[0] for line in speedup.lines if line.get_linestyle() == "--"}
    assert levels == {1.5}
    hollow = [list(line.get_xdata()) for line in cosine.lines if line.get_markerfacecolor() == "white"]
    assert hollow == [[0], [0]]
    assert not validation_figure([]).axes
