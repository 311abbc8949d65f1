"""OraclePress, the ceiling: it keeps what the continuation attends to, and is refused where none is known."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kvpress import AdaKVPress, KnormPress, SnapKVPress
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsekv_pl.attention.evicted_attention import attention_implementation
from sparsekv_pl.evaluation import measurement
from sparsekv_pl.evaluation.continuation_mass import continuation_mass
from sparsekv_pl.evaluation.evaluation_module import EvaluationModule
from sparsekv_pl.evaluation.lm_eval_module import LMEvalModule
from sparsekv_pl.evaluation.long_context import LongContextModule
from sparsekv_pl.evaluation.measurement import Measurement
from sparsekv_pl.evaluation.points import Point, Setting
from sparsekv_pl.eviction.kept_positions import kept_positions
from sparsekv_pl.eviction.prefill import prefill
from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.eviction.replay import RecordedPrefill
from sparsekv_pl.eviction.while_decoding import Decoding
from sparsekv_pl.models.batch import TEXT, CaseBatch, CaseInfo
from sparsekv_pl.objectives import LM
from sparsekv_pl.presses import EvictionAugPress, OraclePress
from sparsekv_pl.presses.nesting import press_name
from sparsekv_pl.presses.oracle import foreseen, oracles_in
from sparsekv_pl.reporting.condition import ORACLE, Condition, marked
from sparsekv_pl.training.eit_module import EITModule
from tests.tiny_training import MakeBackbone, MakeCases, MakeTrainer

CONTEXT, CONTINUATION, RATIO = 48, 8, 0.75
LENGTHS = [8, 5, 7]
ANSWERS = [("zebra",), ("a crown of gold", "twelve"), ("9",)]


def batch(task: str) -> CaseBatch:
    rows = torch.randint(2, 1024, (3, CONTEXT + CONTINUATION), generator=torch.Generator().manual_seed(0))
    return CaseBatch(
        context_ids=rows[:, :CONTEXT],
        continuation_ids=rows[:, CONTEXT:],
        continuation_lengths=torch.tensor(LENGTHS),
        cases=[CaseInfo(f"{task}/{i}", task, () if task == TEXT else ANSWERS[i], max_new_tokens=4) for i in range(3)],
    )


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def tiny(request: pytest.FixtureRequest, tiny_models: dict[str, str]) -> tuple[Any, Any]:
    folder = tiny_models[request.param]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def kept_by_eager_attention(model: Any, tokenizer: Any, cases: CaseBatch, row: int) -> list[list[set[int]]]:
    """Layer -> KV head -> positions: all of a row's attention written out, summed over the continuation's tokens."""
    ids = cases["continuation_ids"][row, : LENGTHS[row]].tolist()
    if cases["cases"][row].task != TEXT:
        ids += tokenizer.encode(" " + ", ".join(ANSWERS[row]))
    with attention_implementation(model, "eager"):
        whole = torch.cat([cases["context_ids"][row], torch.tensor(ids)])
        attentions = model(whole[None], output_attentions=True).attentions
    received = [one[0, :, CONTEXT:, :CONTEXT].sum(1).view(2, 2, CONTEXT).sum(1) for one in attentions]
    kept = int(CONTEXT * (1 - RATIO))
    return [[set(head.topk(kept).indices.tolist()) for head in layer] for layer in received]


@pytest.mark.parametrize("task", ["needle", TEXT])
def test_it_keeps_the_top_of_the_attention_that_the_continuation_pays(tiny: tuple[Any, Any], task: str) -> None:
    model, tokenizer = tiny
    cases, press = batch(task), OraclePress(RATIO)
    recorded = RecordedPrefill(model, cases["context_ids"])
    with torch.no_grad(), foreseen([press], continuation_mass(recorded, cases, tokenizer)):
        evicted = recorded.evicted(press)
    kept = kept_positions(recorded.cache, evicted.cache)
    for row in range(3):
        found = [[set(head.nonzero().flatten().tolist()) for head in layer[row]] for layer in kept]
        assert found == kept_by_eager_attention(model, tokenizer, cases, row)


@pytest.mark.parametrize("press", [OraclePress(), AdaKVPress(OraclePress())], ids=press_name)
def test_it_is_measured_through_the_same_eviction_as_any_press(tiny: tuple[Any, Any], press: Any) -> None:
    """Text, beside a press that needs nothing; then questions, all points decoded together."""
    model, tokenizer = tiny
    texts = Measurement(model, tokenizer, batch(TEXT), with_stability=True)
    found = {name: texts.at(Point(one, RATIO)) for name, one in (("oracle", press), ("norm", KnormPress()))}
    assert all(record["kept_pairs"] == pytest.approx(CONTEXT / 4, abs=0.5) for record in found["oracle"])
    assert sum(record["kl"] for record in found["oracle"]) < sum(record["kl"] for record in found["norm"])
    assert "mean_retained" in found["norm"][0] and "mean_retained" not in found["oracle"][0]
    asked, points = Measurement(model, tokenizer, batch("needle")), [Point(), Point(press, 0.5), Point(press, RATIO)]
    asked.ahead = points
    together = [asked.at(point) for point in points]
    alone = [Measurement(model, tokenizer, batch("needle")).at(point) for point in points]
    assert [[one["answer"] for one in records] for records in together] == [
        [one["answer"] for one in records] for records in alone
    ]
    assert all(oracle.mass is None for oracle in oracles_in(press)), "known while it evicts, and no longer"


def test_base_and_trained_keep_by_their_own_attention_and_the_report_says_what_it_is(
    tiny_backbone: MakeBackbone,
    tiny_cases: MakeCases,
    tiny_trainer: MakeTrainer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, _ = tiny_backbone().load()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path / "adapter")
    seen: list[torch.Tensor] = []

    def recording(*given: Any) -> Any:
        mass = continuation_mass(*given)
        seen.append(mass[1])
        return mass

    monkeypatch.setattr(measurement, "continuation_mass", recording)
    backbone = tiny_backbone(adapter=str(tmp_path / "adapter"), lora=None)
    settings = [Setting(OraclePress(), [0.5, 0.75]), Setting(SnapKVPress(window_size=8), [0.5])]
    module = EvaluationModule(backbone, settings, str(tmp_path / "run"))
    tiny_trainer().test(module, tiny_cases(windows=0, cases_per_cell=1), verbose=False)
    base, trained = seen  # one batch: a pass for each side, whatever the number of ratios
    assert not torch.allclose(base, trained, atol=1e-3)
    report = (tmp_path / "run" / "report.md").read_text()
    assert "| Oracle (ceiling: sees the question) | 0.50 | - |" in report
    assert "| SnapKV | 0.50 | unseen |" in report
    listed = " ".join(folder.name for folder in (tmp_path / "run" / "kvpress").iterdir())
    assert "snapkv" in listed and "oracle" not in listed, "a ceiling is not for leaderboards"


def test_names_and_marks_agree() -> None:
    assert press_name(OraclePress()) == ORACLE
    assert marked(press_name(AdaKVPress(OraclePress()))) == "AdaKV(Oracle) (ceiling: sees the question)"
    assert marked("SnapKV") == "SnapKV" and Condition("SnapKV", 0.5).may_be_seen
    assert not Condition("AdaKV(Oracle)", 0.5).may_be_seen


@pytest.mark.parametrize("press", [OraclePress(), AdaKVPress(OraclePress())], ids=press_name)
def test_it_is_refused_where_no_continuation_is_known(
    press: Any, tiny_backbone: MakeBackbone, random_model: Callable[..., Any]
) -> None:
    known = rf"{press_name(press).replace('(', '.').replace(')', '.')} keeps what the continuation will attend to"
    makers: list[Callable[[], Any]] = [
        lambda: EITModule(tiny_backbone(), RealEviction(press), LM()),
        lambda: EITModule(tiny_backbone(), RealEviction(KnormPress()), validation_eviction=RealEviction(press)),
        lambda: LongContextModule(tiny_backbone(), press),
        lambda: LMEvalModule(tiny_backbone(), [Setting(press, [0.5])], ["arc_easy"]),
    ]
    for make in makers:
        with pytest.raises(ValueError, match=known):
            make()
    mixture = EvictionAugPress([press, KnormPress()])
    with pytest.raises(ValueError, match="keeps what the continuation will attend to"):
        EITModule(tiny_backbone(), RealEviction(mixture), LM())
    press.compression_ratio = 0.5
    with pytest.raises(ValueError, match="OraclePress keeps what the continuation of the whole context attends to"):
        prefill(random_model(), torch.ones(1, 8, dtype=torch.long), press)
    with pytest.raises(ValueError, match="cannot evict from 2 chunks"):
        Setting(press, [0.5], chunk_tokens=24).check(48)
    with pytest.raises(ValueError, match="sees the whole continuation, so it cannot evict while that is read"):
        Setting(press, [0.5], decoding=Decoding(24)).check(48)
