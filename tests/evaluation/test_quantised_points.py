"""Evicted and quantised pairs in an evaluation: a slow reference, keys of finished work, tables by memory."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from kvpress import BasePress, KeyDiffPress, KnormPress
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel

from sparsekv_pl.evaluation.evaluation_module import EvaluationModule
from sparsekv_pl.evaluation.lm_eval_model import PressedLM
from sparsekv_pl.evaluation.measurement import Measurement
from sparsekv_pl.evaluation.points import Point, Setting
from sparsekv_pl.eviction.quantised_pairs import PairQuantisation
from sparsekv_pl.eviction.while_decoding import Decoding
from sparsekv_pl.models.batch import TEXT
from tests.evaluation.test_evaluation_module import batches
from tests.evaluation.test_measurement import CONTEXT, LENGTHS, batch
from tests.eviction.slow_rounding import slowly_rounded
from tests.tiny_training import MakeAdapter, MakeBackbone, MakeTrainer

FOUR = PairQuantisation(4, group=8)


@pytest.fixture(scope="module")
def model(tiny_models: dict[str, str]) -> PreTrainedModel:
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tiny_models["llama"], dtype=torch.float32).eval()
    return loaded


@torch.no_grad()
def slow_nll(model: Any, row: int, press: BasePress, quantisation: PairQuantisation) -> float:
    """Prefill under the press, round each number by itself, and read the text token by token."""
    texts, cache = batch(TEXT), DynamicCache()
    with press(model):
        model(texts["context_ids"][row : row + 1], past_key_values=cache)
    for layer in cache.layers:
        assert layer.keys is not None and layer.values is not None
        settings = (quantisation.bits, quantisation.group, quantisation.residual)
        layer.keys, layer.values = slowly_rounded(layer.keys, layer.values, *settings)
    ids, nll = texts["continuation_ids"][row, : LENGTHS[row]], 0.0
    for step, token in enumerate(ids[:-1]):
        position = torch.tensor([[CONTEXT + step]])
        logits = model(token.view(1, 1), past_key_values=cache, position_ids=position).logits[0, -1]
        nll -= float(logits.log_softmax(-1)[ids[step + 1]])
    return nll


@pytest.mark.parametrize(
    ("ratio", "quantisation"),
    [(0.5, FOUR), (0.75, PairQuantisation(2)), (0.0, PairQuantisation(2, residual=20))],
    ids=str,
)
def test_text_is_read_after_pairs_rounded_one_number_at_a_time(
    model: PreTrainedModel, tiny_models: dict[str, str], ratio: float, quantisation: PairQuantisation
) -> None:
    tokenizer, press = AutoTokenizer.from_pretrained(tiny_models["llama"]), KeyDiffPress()
    records = Measurement(model, tokenizer, batch(TEXT)).at(Point(press, ratio, quantisation=quantisation))
    press.compression_ratio = ratio
    for row, record in enumerate(records):
        assert record["nll"] == pytest.approx(slow_nll(model, row, press, quantisation), rel=1e-3)
    kept, heads = CONTEXT - int(CONTEXT * ratio), 2 * 2  # of two layers
    rounded = kept - quantisation.residual
    groups = -(-rounded // quantisation.group) * 16 + rounded * -(-16 // quantisation.group)
    stored = 2 * 16 * rounded * quantisation.bits // 8 + 4 * groups + 2 * 16 * 4 * quantisation.residual
    assert records[0]["kv_bytes"] == heads * stored and records[0]["kept_pairs"] == kept


def test_chunks_and_answers_read_rounded_pairs_too(model: PreTrainedModel, tiny_models: dict[str, str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_models["llama"])
    points = [Point(KnormPress(), 0.5, 16, quantisation=how) for how in (None, PairQuantisation(2))]
    whole, rounded = (Measurement(model, tokenizer, batch(TEXT)).at(point) for point in points)
    assert abs(whole[0]["nll"] - rounded[0]["nll"]) > 1e-3 and whole[0]["kept_pairs"] == rounded[0]["kept_pairs"]
    together = Measurement(model, tokenizer, batch("needle"))
    together.ahead = dense = [Point(KnormPress(), 0.5, quantisation=how) for how in (None, PairQuantisation(2), FOUR)]
    at_once = [together.at(point) for point in dense]
    for point, records in zip(dense, at_once, strict=True):
        alone = Measurement(model, tokenizer, batch("needle")).at(point)
        assert [record["answer"] for record in records] == [record["answer"] for record in alone]
    assert len({record[0]["kv_bytes"] for record in at_once}) == 3


def test_other_bits_are_other_work_and_the_report_finds_the_best_at_less_memory(
    tiny_backbone: MakeBackbone, tiny_trainer: MakeTrainer, tiny_adapter: MakeAdapter, tmp_path: Path, monkeypatch: Any
) -> None:
    measured: list[str] = []
    adapter, at = tiny_adapter(training={"presses": ["KeyDiff"]}), Measurement.at

    def recording(self: Measurement, point: Any) -> Any:
        measured.append(point.name)
        return at(self, point)

    monkeypatch.setattr(Measurement, "at", recording)

    def run(*quantisations: PairQuantisation | None) -> dict[str, Any]:
        setting = Setting(KeyDiffPress(), [0.5, 0.9, 0.95], quantisations=list(quantisations))
        module = EvaluationModule(tiny_backbone(adapter=adapter), [setting], str(tmp_path / "run"), views=1)
        tiny_trainer().test(module, DataLoader(batches()[1:], batch_size=None), verbose=False)
        report: dict[str, Any] = json.loads((tmp_path / "run" / "report.json").read_text())
        return report

    run(None)
    assert "KeyDiff_0-9_dense" in measured
    measured.clear()
    report = run(None, PairQuantisation(4), PairQuantisation(2, residual=1))
    assert {name.partition("dense_")[2] for name in measured} == {"4_bits", "2_bits_newest_1_whole"}
    measured.clear()
    assert run(None, PairQuantisation(4), PairQuantisation(2, residual=1))["rows"] == report["rows"] and not measured
    assert {row["stored"] for row in report["rows"]} == {"", "4 bits", "2 bits, newest 1 whole"}
    keydiff = [line for line in report["ledger"] if line["press"] == "KeyDiff"]
    assert [line["stored"] for line in keydiff] == [""] * 3 + ["4 bits"] * 3 + ["2 bits, newest 1 whole"] * 3
    page = (tmp_path / "run" / "report.md").read_text()
    best = page.partition("## At less memory")[2].partition("\n## ")[0]
    assert "| 16 times less | base | KeyDiff | " in best and "| 32 times less | trained | KeyDiff | " in best
    assert "| KeyDiff | 0.50 | 4 bits |" in page and "| KeyDiff | 0.50 | whole |" in page
    assert (tmp_path / "run" / "memory-curves.png").exists()
    folders = {folder.name for folder in (tmp_path / "run" / "kvpress").iterdir() if "0.90" in folder.name}
    assert len(folders) == 2 * 3 and any("keydiff_2_bits_newest_1_whole" in name for name in folders)


def test_pairs_are_not_quantised_while_text_is_read() -> None:
    with pytest.raises(ValueError, match=r"^decoding=Decoding\(interval=8[^\n]+ evicts while tokens are read[^\n]+$"):
        Setting(KnormPress(), [0.5], decoding=Decoding(8), quantisations=[None, FOUR])


def test_tasks_of_lm_eval_are_answered_from_rounded_pairs(model: PreTrainedModel, tiny_models: dict[str, str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_models["llama"])

    def score(**settings: Any) -> float:
        lm = PressedLM(model, tokenizer, KnormPress(0.5), **settings)
        context = tokenizer.encode("The committee met in the afternoon and said nothing about the harbour.")
        prefilled, held, _ = lm.prefilled(context)
        return lm._score(prefilled, held, [5, 6, 7])[0]

    assert score() == score(quantisation=None) != score(quantisation=PairQuantisation(2))
    assert score(quantisation=PairQuantisation(8)) == pytest.approx(score(), abs=0.1)
