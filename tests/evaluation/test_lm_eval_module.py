"""lm_eval tasks as a Lightning run: measuring, reuse of finished work, and refusals."""

import json
import logging
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kvpress import BasePress, KnormPress, SnapKVPress, StreamingLLMPress, ThinKPress

from sparsekv_pl.evaluation.lm_eval_model import PressedLM
from sparsekv_pl.evaluation.lm_eval_module import LMEvalModule
from sparsekv_pl.evaluation.lm_eval_records import table
from sparsekv_pl.evaluation.points import Setting
from sparsekv_pl.eviction.while_decoding import Decoding
from sparsekv_pl.models.backbone import Backbone
from sparsekv_pl.storage.records import Record
from tests.evaluation.lm_eval_cases import check_viewers
from tests.tiny_training import MakeAdapter, MakeBackbone, MakeTrainer

Make = Callable[..., LMEvalModule]
Run = Callable[[LMEvalModule], LMEvalModule]
pytestmark = pytest.mark.usefixtures("datasets_cache")

NOTES = "The lookup of a name goes through the namespaces that a statement can see. " * 3
CHOICE = """
task: choice
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{notes}} It is"
doc_to_choice: [a name, a statement]
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
ANSWER = """
task: answer
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: generate_until
doc_to_text: "{{notes}}"
doc_to_target: "a name"
generation_kwargs: {until: ["."], max_gen_toks: 3}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
READ = """
task: read
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{notes}}"
metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}]
"""


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with three tasks over the same four documents."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"notes": f"Note {i}. {NOTES}", "answer": i % 2} for i in range(4)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for text in (CHOICE, ANSWER, READ):
        name = text.split()[1]
        (folder / f"{name}.yaml").write_text(text.replace("ROWS", str(folder / "rows.jsonl")))
    return folder


@pytest.fixture
def make(tiny_backbone: MakeBackbone, tasks: Path, tmp_path: Path) -> Make:
    """LMEvalModule(**settings) of the tiny Llama: Knorm at 0.5 over the task ``choice``."""

    def made(backbone: dict[str, Any] | None = None, **settings: Any) -> LMEvalModule:
        defaults: dict[str, Any] = {
            "settings": [Setting(KnormPress(), [0.5])],
            "tasks": ["choice"],
            "include_path": str(tasks),
            "output": str(tmp_path / "output"),
        }
        return LMEvalModule(tiny_backbone(**(backbone or {})), **(defaults | settings))

    return made


@pytest.fixture
def reported(monkeypatch: pytest.MonkeyPatch) -> list[list[Record]]:
    """The records of every report, which is not written: its pictures take seconds."""
    reports: list[list[Record]] = []

    def recording(_output: Path, summary: Any, *_: Any) -> list[Path]:
        reports.append(summary.records)
        return []

    monkeypatch.setattr("sparsekv_pl.evaluation.lm_eval_module.write_run", recording)
    return reports


@pytest.fixture
def run(tiny_trainer: MakeTrainer) -> Run:
    def done(module: LMEvalModule) -> LMEvalModule:
        tiny_trainer().test(module, verbose=False)
        return module

    return done


def scores(module: LMEvalModule) -> dict[tuple[str, ...], float]:
    return {
        (record["variant"], record["press"], record["task"], record["metric"]): record["value"]
        for record in module.records
        if "metric" in record
    }


def test_every_task_is_scored_under_every_press_base_and_trained(
    make: Make,
    run: Run,
    tiny_adapter: MakeAdapter,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    adapter = tiny_adapter(training={"presses": ["Knorm"]})
    module = run(make({"adapter": adapter}, tasks=["choice", "answer", "read"]))

    found = scores(module)
    metrics = {("choice", "acc"), ("choice", "acc_norm"), ("answer", "exact_match"), ("read", "bits_per_byte")}
    assert {key[2:] for key in found} == metrics
    assert {key[:2] for key in found} == {(v, p) for v in ("base", "trained") for p in ("full cache", "Knorm")}
    bits = {key[:2]: value for key, value in found.items() if key[2] == "read"}
    assert bits["base", "full cache"] != bits["trained", "full cache"]

    cases = [record for record in module.records if record["task"] == "choice" and "case" in record]
    assert [record["case"] for record in cases[:4]] == [f"choice/{i}" for i in range(4)]
    for variant in ("base", "trained"):
        exact = [r["exact"] for r in cases if (r["variant"], r["press"]) == (variant, "Knorm")]
        assert sum(exact) / 4 == found[variant, "Knorm", "choice", "acc"]
    assert all(record["seen_in_training"] == (record["press"] == "Knorm") for record in module.records)
    one = next(record for record in module.records if record["press"] == "Knorm" and record.get("metric") == "acc")
    assert (one["n"], one["contexts"], one["evicted"], one["freed"]) == (4, 4, 4, True)
    assert one["kept_pairs"] == pytest.approx((one["context_tokens"] - 1) / 2, abs=0.5)

    said = capsys.readouterr().out
    assert all(word in said for word in ("choice", "exact_match", "bits_per_byte", "Knorm", "base", "trained", "±"))
    report = json.loads((tmp_path / "output" / "report.json").read_text())
    assert {row["task"] for row in report["rows"]} >= {"choice", "answer"}
    kept = tmp_path / "output" / "lm_eval" / "trained_Knorm_0-5_dense"
    [saved, *_] = kept.rglob("results_*.json")
    assert json.loads(saved.read_text())["results"].keys() <= {"choice", "answer", "read"}
    assert len(list(kept.rglob("samples_*.jsonl"))) == 3
    check_viewers(tmp_path / "output", ["answer/0", "choice/0"])


@pytest.mark.usefixtures("reported")
def test_without_an_adapter_there_is_the_base_alone(make: Make, run: Run) -> None:
    before = torch.initial_seed(), random.getstate()
    module = run(make({"lora": None}, limit=2))
    assert (torch.initial_seed(), random.getstate()) == before  # though lm_eval seeds both
    assert {record["variant"] for record in module.records} == {"base"}
    assert {record["n"] for record in module.records if "metric" in record} == {2}


def count_work(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the presses of every PressedLM that is made from now on."""
    made: list[str] = []
    init = PressedLM.__init__

    def recording(self: PressedLM, model: Any, tokenizer: Any, press: BasePress | None = None, **settings: Any) -> None:
        made.append(type(press).__name__)
        init(self, model, tokenizer, press, **settings)

    monkeypatch.setattr(PressedLM, "__init__", recording)
    return made


@pytest.mark.usefixtures("reported")
def test_finished_work_is_not_done_again(
    make: Make,
    run: Run,
    tasks: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = run(make())
    made = count_work(monkeypatch)
    again = run(make(settings=[Setting(KnormPress(), [0.5]), Setting(StreamingLLMPress(), [0.5])]))
    assert made == ["StreamingLLMPress"]
    assert again.records[: len(first.records)] == first.records
    run(make(limit=3))
    assert made[1:] == ["NoneType", "KnormPress"]
    with (tasks / "rows.jsonl").open("a") as file:
        file.write(json.dumps({"notes": NOTES, "answer": 0}) + "\n")
    assert {record["n"] for record in run(make()).records if "metric" in record} == {5}


class Broken(KnormPress):
    """Fails in every layer."""

    def score(self, *_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("out of scores")


def test_a_press_that_fails_is_in_the_table_and_the_others_go_on(
    make: Make,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    reported: list[list[Record]],
) -> None:
    settings = [Setting(Broken(), [0.5]), Setting(ThinKPress(), [0.5]), Setting(KnormPress(), [0.5])]
    with caplog.at_level(logging.ERROR):
        module = run(make(settings=settings))
    failed = [record for record in module.records if "error" in record]
    (broken, unfit) = failed
    assert (broken["press"], broken["error"]) == ("Broken", "RuntimeError: out of scores")
    assert unfit["press"] == "ThinK" and "ThinK has no compression_ratio to set" in unfit["error"]
    assert ("base", "Knorm", "choice", "acc") in scores(module)
    assert "out of scores" in "".join(capsys.readouterr().out.split("\n")) + caplog.text
    assert broken in reported[0] and unfit in reported[0]
    made = count_work(monkeypatch)
    run(make(settings=settings))
    assert made == ["Broken"]  # a failure is tried again


@pytest.mark.usefixtures("reported")
def test_contexts_too_short_for_the_press_are_counted(
    make: Make,
    run: Run,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module = run(make(settings=[Setting(SnapKVPress(window_size=500), [0.5])], limit=2))
    assert scores(module)["base", "SnapKV", "choice", "acc"] == scores(module)["base", "full cache", "choice", "acc"]
    one = next(record for record in module.records if record["press"] == "SnapKV" and "metric" in record)
    assert (one["contexts"], one["evicted"]) == (2, 0)
    assert "0 of 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"tasks": []}, "at least one task"),
        ({"tasks": ["choice", "choice"]}, "none twice"),
        ({"limit": 0}, "limit=0"),
        ({"num_fewshot": -1}, "num_fewshot=-1"),
        ({"held_back": 0}, "held_back=0"),
        ({"include_path": "nowhere"}, "include_path='nowhere'"),
        ({"settings": [Setting(KnormPress(), [0.5], decoding=Decoding(8))]}, r"decoding=Decoding\(interval=8"),
    ],
)
def test_bad_settings_are_refused_before_the_model_is_loaded(
    make: Make, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], named: str
) -> None:
    monkeypatch.setattr(Backbone, "load", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=named):
        make(**settings)


def test_a_tokenizer_without_a_chat_template_is_refused(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Backbone, "load_tokenizer", lambda _: SimpleNamespace(chat_template=None))
    monkeypatch.setattr(Backbone, "load", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ValueError, match="no chat template"):
        make(apply_chat_template=True)


def test_an_unknown_task_is_refused_with_its_likes(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lm_eval.tasks.manager.TaskIndex._iter_yaml_files", lambda root: sorted(root.glob("*.yaml")))
    monkeypatch.setattr(Backbone, "load", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=r"task 'choise' is neither .* similar: choice"):
        make(tasks=["choise"])


def test_more_than_one_device_is_refused(make: Make, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning.pytorch.Trainer.world_size", 2)
    with pytest.raises(ValueError, match=r"trainer\.devices to 1"):
        run(make())


def test_quantised_pairs_have_a_line_of_their_own() -> None:
    counts = {"n": 1, "evicted": 1, "contexts": 1}
    score = {"task": "choice", "metric": "acc", "variant": "base", "value": 0.5, "stderr": None, **counts}
    whole = score | {"press": "Knorm", "compression_ratio": 0.5, "prefill": "dense"}
    shown = table([whole, whole | {"stored": "4 bits"}])
    assert [*shown.columns[2].cells] == ["Knorm", "Knorm, dense, 4 bits"]
