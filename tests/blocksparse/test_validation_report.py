"""Expected and measured figures: which files count, and which expectations are met."""

from typing import Any

import pytest

from sparsekv_pl.blocksparse.validation_figures import validation_figure
from sparsekv_pl.blocksparse.validation_summary import expected_table, sections, summary
from sparsekv_pl.reporting.page import markdown
from sparsekv_pl.storage.records import Record


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
