"""The statistics analysis: its figures equal those of eager attention, and its report compares base and trained."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sparsekv_pl.analysis.statistics_analysis import AttentionStatisticsAnalysis
from sparsekv_pl.analysis.statistics_report import even_attention, labels, picture_names, summaries_of
from sparsekv_pl.attention.evicted_attention import attention_implementation
from sparsekv_pl.attention.statistics import StatisticsSettings, attention_statistics
from sparsekv_pl.models.anchors import Anchors
from sparsekv_pl.models.batch import CaseBatch
from sparsekv_pl.storage.records import Record
from tests.tiny_training import MakeAdapter, MakeBackbone, MakeCases, MakeTrainer

SETTINGS = StatisticsSettings(top_k=8, block_size=20, block_threshold=0.05, query_tile=16, key_tile=20)


@pytest.fixture
def run(
    tiny_backbone: MakeBackbone, tiny_trainer: MakeTrainer, tmp_path: Path
) -> Callable[..., tuple[AttentionStatisticsAnalysis, dict[str, Any]]]:
    """Run over a datamodule; the analysis and its report."""

    def run(data: Any, kind: str = "llama", adapter: str | None = None, **settings: Any) -> Any:
        settings = {"statistics": SETTINGS, **settings}
        analysis = AttentionStatisticsAnalysis(tiny_backbone(kind, adapter=adapter), str(tmp_path), **settings)
        tiny_trainer().predict(analysis, data)
        return analysis, json.loads((tmp_path / "report.json").read_text())

    return run


@torch.no_grad()
def eager(analysis: AttentionStatisticsAnalysis, batches: list[CaseBatch]) -> tuple[Tensor, Tensor]:
    """Ids (N, S) and attention (layers, N, H, S, S) of all batches' contexts."""
    model, ids = analysis.causal_lm, torch.cat([batch["context_ids"] for batch in batches])
    with attention_implementation(model, "eager"):
        return ids, torch.stack(model(input_ids=ids, output_attentions=True).attentions)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize(("window", "chunk_tokens"), [(None, None), (None, 40), (1, 40), (30, 40)])
@torch.no_grad()
def test_means_are_those_of_eager_attention(
    tiny_backbone: MakeBackbone, tiny_cases: MakeCases, kind: str, window: int | None, chunk_tokens: int | None
) -> None:
    """The last chunk of 96 tokens has 16 of them unless a window needs more."""
    settings = StatisticsSettings(window=window, top_k=8, block_size=20, block_threshold=0.05, key_tile=20)
    analysis = AttentionStatisticsAnalysis(tiny_backbone(kind), statistics=settings, chunk_tokens=chunk_tokens)
    data = tiny_cases(tasks=[], windows=4)
    data.tokenizer = analysis.tokenizer
    data.setup()
    batches = list(data.predict_dataloader())
    (summary,) = summaries_of(
        [{"variant": "base", **r} for b in batches for r in analysis.measure(b)], settings, [0, 1]
    )
    assert summary["windows"] == 4
    got = summary["variants"]["base"]
    ids, attention = eager(analysis, batches)
    attention = attention[..., -(window or 96) :, :]  # (layers, N, H, W, S)
    anchors = Anchors(recent=0).mask(ids, analysis.tokenizer)
    entropy = torch.special.entr(attention).sum(-1)
    by_block = torch.stack([part.sum(-1) for part in attention.split(20, dim=-1)], dim=-1).mean(3)
    wanted = {
        "entropy": entropy,
        "effective_support": entropy.exp(),
        "top_k_coverage": attention.topk(8).values.sum(-1),
        "anchor_share": (attention * anchors[:, None, None]).sum(-1),
        "first_block_share": by_block[..., :1],
    }
    for name, values in wanted.items():
        expected = values.mean((1, 3))
        torch.testing.assert_close(torch.tensor(got["measures"][name]), expected, rtol=1e-4, atol=1e-4, msg=name)
        row = next(row for row in summary["overall"] if row["measure"] == name)
        assert row["means"]["base"] == pytest.approx(float(expected.mean()), rel=1e-4)
        low, high = row["intervals"]["base"]
        assert low <= row["means"]["base"] <= high
    torch.testing.assert_close(torch.tensor(got["received"]), by_block.mean((1, 2)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 7, 500])
def test_even_attention_is_that_of_queries_that_want_nothing(window: int | None) -> None:
    settings = StatisticsSettings(window=window, block_size=8)
    measured = attention_statistics(torch.zeros(1, 2, 30, 4), torch.zeros(1, 1, 30, 4), settings)
    wanted = measured.received_by_block(8)[0, 0] / measured.entropy.shape[-1]
    assert even_attention(30, settings) == pytest.approx(wanted.numpy())
    assert even_attention(30, settings).sum() == pytest.approx(1)


def test_base_and_trained_are_compared(
    run: Callable[..., Any], tiny_cases: MakeCases, tiny_adapter: MakeAdapter, tmp_path: Path
) -> None:
    _, report = run(tiny_cases(tasks=[], windows=3), adapter=tiny_adapter())
    (summary,) = report["summaries"]
    assert (summary["task"], summary["length"], summary["windows"]) == ("text", 96, 3)
    base, trained = (np.array(means["measures"]["entropy"]) for means in summary["variants"].values())
    row = summary["overall"][0]
    assert row["measure"] == "entropy"
    assert row["difference"] == pytest.approx((trained - base).mean())
    assert abs(row["difference"]) > 0.01
    assert row["difference_interval"][0] <= row["difference"] <= row["difference_interval"][1]
    page = (tmp_path / "report.md").read_text()
    assert all(label in page for label in labels(SETTINGS).values())
    pictures = {f"{name}.png" for name in ("heads-base", "heads-trained", "heads-difference", "received")}
    assert {path.name for path in tmp_path.glob("*.png")} == pictures
    with (tmp_path / "heads.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 2 * 2 * 4  # variants, layers, heads
    last = summary["variants"]["trained"]["measures"]
    assert float(lines[-1]["block_sparsity"]) == last["block_sparsity"][1][3]
    with (tmp_path / "received.csv").open() as file:
        shares = [float(line["share"]) for line in csv.DictReader(file)]
    assert sum(shares) == pytest.approx(2 * 2)  # each layer's blocks share all of its attention


def test_tasks_and_lengths_have_summaries_of_their_own() -> None:
    """By hand: two windows of one length, one of another and one of another task."""

    def record(task: str, length: int, number: int, value: float) -> Record:
        measures = {name: [[value]] for name in labels(SETTINGS)}
        return {
            "variant": "base",
            "id": f"{task}{length}{number}",
            "task": task,
            "length": length,
            "measures": measures,
            "received": [[value] * -(-length // 20)],
        }

    records = [record("text", 96, 0, 1.0), record("text", 64, 0, 4.0), record("text", 96, 1, 2.0)]
    summaries = summaries_of([*records, record("facts", 96, 0, 8.0)], SETTINGS, [0, 1])
    found = [(s["task"], s["length"], s["windows"], s["overall"][0]["means"]["base"]) for s in summaries]
    assert found == [("facts", 96, 1, 8.0), ("text", 64, 1, 4.0), ("text", 96, 2, 1.5)]
    assert [len(s["variants"]["base"]["received"][0]) for s in summaries] == [5, 4, 5]
    names = [name for summary in summaries for name in picture_names(summaries, summary)]
    assert len(set(names)) == 3 * 2
    assert "text-64-received.png" in names


def test_tiles_change_neither_figures_nor_what_is_finished(
    run: Callable[..., Any], tiny_cases: MakeCases, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, first = run(tiny_cases(tasks=[], windows=2))

    def never(*_: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr(AttentionStatisticsAnalysis, "measure", never)
    settings = {"top_k": 8, "block_size": 20, "block_threshold": 0.05}
    _, again = run(tiny_cases(tasks=[], windows=2), statistics=StatisticsSettings(**settings))
    assert again["summaries"] == first["summaries"]
    with pytest.raises(AssertionError, match="measured again"):
        run(tiny_cases(tasks=[], windows=2), statistics=StatisticsSettings(**settings | {"top_k": 9}))


def test_the_console_says_what_matters(
    run: Callable[..., Any], tiny_cases: MakeCases, capsys: pytest.CaptureFixture[str]
) -> None:
    _, report = run(tiny_cases(tasks=[], windows=2))
    said = capsys.readouterr().out
    entropy = report["summaries"][0]["overall"][0]["means"]["base"]
    assert f"text, 96 tokens, base: entropy (nats) {entropy:.3g};" in said


@pytest.mark.parametrize("chunk_tokens", [0, 10])
def test_chunks_that_cut_query_blocks_are_refused(tiny_backbone: MakeBackbone, chunk_tokens: int) -> None:
    settings = StatisticsSettings(query_block=4)
    with pytest.raises(ValueError, match=f"chunk_tokens={chunk_tokens} must be a positive multiple of query_block=4"):
        AttentionStatisticsAnalysis(tiny_backbone(), statistics=settings, chunk_tokens=chunk_tokens)
