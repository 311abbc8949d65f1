"""A gate, Sketch&Walk and the controls on a tiny model: from cases to the report, and refusals."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer

from data.evaluation import EvaluationData
from sparsekv_pl.blocksparse.comparison import BlockComparison
from sparsekv_pl.blocksparse.gate import AttentionGates
from sparsekv_pl.models.backbone import causal_lm
from tests.tiny_training import MakeBackbone

SIZE = 8


@pytest.fixture(scope="module")
def gates(tiny_backbone: MakeBackbone, tmp_path_factory: pytest.TempPathFactory) -> str:
    model = causal_lm(tiny_backbone(lora=None).load(trainable=False)[0])
    folder = tmp_path_factory.mktemp("gates")
    AttentionGates.for_model(model, block_size=SIZE, gate_dim=16).save(folder)
    return str(folder)


@pytest.fixture
def run(
    tiny_backbone: MakeBackbone,
    tiny_cases: Callable[..., EvaluationData],
    tiny_trainer: Callable[..., Trainer],
    tmp_path: Path,
) -> Callable[..., dict[str, Any]]:
    """Compare on a window of text and two needles of each length; the report's content."""

    def run(lengths: tuple[int, ...] = (96,), batch_size: int = 1, **settings: Any) -> dict[str, Any]:
        defaults: dict[str, Any] = {
            "block_size": SIZE,
            "sketch_dim": 16,
            "dense_layers": 1,
            "top_k_blocks": 4,
            "budgets": [2, 4],
            "pass_budgets": [4],
        }
        module = BlockComparison(tiny_backbone(lora=None), str(tmp_path / "compare"), **(defaults | settings))
        data = tiny_cases(lengths=lengths, windows=1, cases_per_cell=1, batch_size=batch_size)
        tiny_trainer().predict(module, data, return_predictions=False)
        return json.loads((tmp_path / "compare" / "report.json").read_text())

    return run


def test_the_report_of_all_methods(run: Callable[..., dict[str, Any]], gates: str, tmp_path: Path) -> None:
    report = run(gates=gates, dampings=[1.0, 0.25], lengths=(64, 96))
    methods = ["gate", "gate, threshold 0.1", "Sketch&Walk", "Sketch&Walk, damping 0.25", "random", "local", "oracle"]
    shared = "oracle, one choice for all heads"
    assert report["sparse_layers"] == [1]
    for length in (64, 96):
        # Layer by layer in the order of the methods; Sketch&Walk's first layer is dense.
        assert {row["method"] for row in report["agreement"] if row["length"] == length} == {*methods, shared}
        passes = [row["method"] for row in report["text"] if row["length"] == length]
        assert passes == ["dense", *methods]
    assert {row["cases"] for row in report["needles"] if row["length"] == "all"} == {4}
    assert {row["met"] for row in report["expected"]} <= {True, False}
    assert len(report["expected"]) == 2 * (3 + 4)
    folder = tmp_path / "compare"
    names = {path.name for path in folder.iterdir()}
    assert names >= {"blocks.png", "mass_over_budget.png", "agreement_by_layer.png", "passes.png", "report.html"}
    (results,) = folder.glob("comparison_results_????????_??????.json")
    (summary,) = folder.glob("comparison_summary_????????_??????.json")
    found = json.loads(results.read_text())
    assert {record["kind"] for record in found["results"]} == {"agreement", "pair", "pass"}
    assert {record["layer"] for record in found["results"] if record["kind"] == "agreement"} == {0, 1}
    assert {row["layer"] for row in json.loads(summary.read_text())["agreement_by_layer"]} == {0, 1}


def test_a_comparison_without_a_gate_says_so(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    report = run(gates=None)
    assert not any(row["method"].startswith("gate") for row in report["agreement"])
    assert [row["quantity"] for row in report["expected"]] == ["sparsity of Sketch&Walk (top 4)"]
    assert "There is no gate in this run" in (tmp_path / "compare" / "report.md").read_text()


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"gates": "nowhere"}, "gates=nowhere: there is no such folder. Train gates first .*gate.yaml"),
        ({"batch_size": 2}, "data.batch_size=2: .*give 1"),
        ({"top_k_blocks": 12}, "a context of 96 tokens has no more than top_k_blocks=12 blocks of 8"),
        ({"top_k_blocks": 1}, "top_k_blocks=\\[1\\]"),
        ({"budgets": [4, 4]}, "budgets=\\[4, 4\\] must be different"),
        ({"pass_budgets": []}, "pass_budgets=\\[\\]"),
        ({"threshold": 1.0}, "threshold=1.0 must be between"),
        ({"dampings": []}, "dampings=\\[\\] must be"),
        ({"dampings": [2.0]}, "damping=2.0 must be in"),
        ({"picture_layers": [2]}, "picture_layers has \\[2\\].*layers 0 to 1"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    run: Callable[..., dict[str, Any]], settings: dict[str, Any], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BlockComparison, "measure", lambda *_: pytest.fail("it was measured"))
    with pytest.raises(ValueError, match=complaint):
        run(**settings)


def test_gates_of_other_blocks_are_refused(run: Callable[..., dict[str, Any]], gates: str) -> None:
    with pytest.raises(ValueError, match=r"block_size=4, but the gates of .* were trained for blocks of 8"):
        run(gates=gates, block_size=4)
