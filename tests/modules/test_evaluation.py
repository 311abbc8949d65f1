"""The measurements against a plain reference: a fresh prefill under the press, then one token at a time."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kvpress import BasePress, ExpectedAttentionPress, KnormPress, SnapKVPress
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import DynamicCache

from data.mixture import EvictionData
from sparsekv_pl.backbone import Backbone
from sparsekv_pl.batch import IGNORE, Batch
from sparsekv_pl.modules.evaluation import EvaluationModule, Setting, most_likely
from sparsekv_pl.presses.scores import press_name

MakeBackbone = Callable[..., Backbone]
MakeTrainer = Callable[..., Trainer]
CONTEXT, HEAD, VALUE = 48, 3, 2
ROW_KEYS = {
    "press",
    "compression_ratio",
    "seen_in_training",
    "metric",
    "before",
    "after",
    "before_interval",
    "after_interval",
    "cases",
}


class Reference:
    """transformers and kvpress alone."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @torch.no_grad()
    def logits(self, context: Tensor, press: BasePress | None, ratio: float, forced: list[int], more: int) -> Tensor:
        """(len(forced) + more, V): feeds ``forced``, then ``more`` tokens of its own greedy choice, one by one."""
        cache = DynamicCache()
        if press is None:
            self.model(context[None], past_key_values=cache)
        else:
            press.compression_ratio = ratio
            with press(self.model):
                self.model(context[None], past_key_values=cache)
        rows: list[Tensor] = []
        for step in range(len(forced) + more):
            token = forced[step] if step < len(forced) else int(rows[-1].argmax())
            position = torch.tensor([[len(context) + step]])
            ids = torch.tensor([[token]])
            rows.append(self.model(ids, past_key_values=cache, position_ids=position).logits[0, -1])
        return torch.stack(rows)

    def generate(self, context: Tensor, press: BasePress | None, ratio: float, head: list[int]) -> list[int]:
        logits = self.logits(context, press, ratio, head, VALUE - 1)
        return logits[HEAD - 1 :].argmax(-1).tolist()


@pytest.fixture(scope="module")
def reference(tiny_models: dict[str, str]) -> Reference:
    from transformers import AutoModelForCausalLM

    return Reference(AutoModelForCausalLM.from_pretrained(tiny_models["llama"], dtype=torch.float32).eval())


@pytest.fixture(scope="module")
def needles(reference: Reference) -> list[Batch]:
    """Six cases whose value is what the model would say with its full cache; every third value is wrong."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(2, 1024, (6, CONTEXT + HEAD), generator=generator)
    batches = []
    for start in (0, 3):
        context, head = rows[start : start + 3, :CONTEXT], rows[start : start + 3, CONTEXT:]
        values = [reference.generate(c, None, 0.0, h.tolist()) for c, h in zip(context, head, strict=True)]
        values[2][1] = (values[2][1] + 1) % 1024
        value = torch.tensor(values)
        batches.append(
            Batch(
                context_ids=context,
                continuation_ids=torch.cat([head, value, value[:, :1]], 1),
                labels=torch.cat([torch.full_like(head, IGNORE), value, torch.full_like(value[:, :1], IGNORE)], 1),
                document_ids=["random"] * 3,
                tasks=["needle"] * 3,
            )
        )
    return batches


@pytest.fixture(scope="module")
def texts() -> list[Batch]:
    ids = torch.randint(2, 1024, (4, CONTEXT + 8), generator=torch.Generator().manual_seed(1))
    labels = ids[:, CONTEXT:].clone()
    labels[:, 0] = IGNORE
    labels[1, 3:] = IGNORE
    return [
        Batch(
            context_ids=ids[i : i + 2, :CONTEXT],
            continuation_ids=ids[i : i + 2, CONTEXT:],
            labels=labels[i : i + 2],
            document_ids=["random"] * 2,
            tasks=["text"] * 2,
        )
        for i in (0, 2)
    ]


def settings() -> list[Setting]:
    return [
        Setting(ExpectedAttentionPress(), [0.25, 0.75]),
        Setting(SnapKVPress(window_size=8), [0.5]),
        Setting(KnormPress(), [0.5]),
    ]


def measure(module: EvaluationModule, make_trainer: MakeTrainer, data: Any) -> dict[str, Any]:
    loader = data if isinstance(data, EvictionData) else DataLoader(data, batch_size=None)
    make_trainer().test(module, loader, verbose=False)
    return json.loads((module.output / "report.json").read_text())


def test_accuracy_is_the_verdict_of_greedy_decoding(
    reference: Reference,
    needles: list[Batch],
    tiny_backbone: MakeBackbone,
    tiny_trainer: MakeTrainer,
    tmp_path: Path,
) -> None:
    report = measure(EvaluationModule(tiny_backbone(), settings(), str(tmp_path)), tiny_trainer, needles)
    measured = {(row["press"], row["compression_ratio"]): row["before"] for row in report["rows"]}
    points: list[tuple[BasePress | None, float]] = [(None, 0.0)]
    points += [(setting.press, ratio) for setting in settings() for ratio in setting.compression_ratios]
    for press, ratio in points:
        right = 0
        for batch in needles:
            for context, ids, labels in zip(
                batch["context_ids"], batch["continuation_ids"], batch["labels"], strict=True
            ):
                said = reference.generate(context, press, ratio, ids[:HEAD].tolist())
                right += said == labels[labels != IGNORE].tolist()
        assert measured.pop((press_name(press), ratio)) == pytest.approx(right / 6), press_name(press)
    assert measured == {}
    scores = {row["before"] for row in report["rows"]}
    assert max(scores) == pytest.approx(4 / 6)
    assert min(scores) < 4 / 6


def test_perplexity_is_that_of_single_tokens_after_a_fresh_prefill(
    reference: Reference,
    texts: list[Batch],
    tiny_backbone: MakeBackbone,
    tiny_trainer: MakeTrainer,
    tmp_path: Path,
) -> None:
    report = measure(EvaluationModule(tiny_backbone(), settings(), str(tmp_path)), tiny_trainer, texts)
    measured = {(row["press"], row["compression_ratio"]): row for row in report["rows"]}
    points: list[tuple[BasePress | None, float]] = [(None, 0.0)]
    points += [(setting.press, ratio) for setting in settings() for ratio in setting.compression_ratios]
    for press, ratio in points:
        losses = []
        for batch in texts:
            for context, ids, labels in zip(
                batch["context_ids"], batch["continuation_ids"], batch["labels"], strict=True
            ):
                logits = reference.logits(context, press, ratio, ids[:-1].tolist(), 0)
                losses.append(torch.nn.functional.cross_entropy(logits, labels[1:], reduction="none")[labels[1:] >= 0])
        row = measured[press_name(press), ratio]
        assert row["before"] == pytest.approx(float(torch.cat(losses).mean().exp()), rel=1e-4)
        assert row["before_interval"][0] <= row["before"] <= row["before_interval"][1]
        assert (row["metric"], row["cases"]) == ("perplexity", 4)
    assert len({round(row["before"], 3) for row in report["rows"]}) == len(points)


@pytest.fixture
def adapter(tiny_backbone: MakeBackbone, tmp_path: Path) -> Callable[..., str]:
    """A folder with an adapter, untrained unless ``std`` is given, and what its training said of itself."""

    def make(std: float = 0.0) -> str:
        model = tiny_backbone().load()[0]
        for name, parameter in model.named_parameters():
            if std and parameter.requires_grad:
                torch.nn.init.normal_(model.get_parameter(name), std=std)
        folder = tmp_path / f"adapter-{std}"
        model.save_pretrained(folder)
        (folder / "training.json").write_text(json.dumps({"presses": ["SnapKV", "LagKV"], "steps": 110}))
        return str(folder)

    return make


def test_an_untrained_adapter_changes_nothing(
    adapter: Callable[..., str],
    needles: list[Batch],
    texts: list[Batch],
    tiny_backbone: MakeBackbone,
    tiny_trainer: MakeTrainer,
    tmp_path: Path,
) -> None:
    module = EvaluationModule(tiny_backbone(adapter=adapter()), settings(), str(tmp_path))
    report = measure(module, tiny_trainer, texts + needles)
    assert len(report["rows"]) == 2 * 5
    for row in report["rows"]:
        assert row["after"] == row["before"]
        assert row["after_interval"] == row["before_interval"]


def test_the_report_says_before_and_after_for_the_same_cases(
    adapter: Callable[..., str],
    tiny_backbone: MakeBackbone,
    tiny_data: Callable[..., EvictionData],
    tiny_trainer: MakeTrainer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = measure(EvaluationModule(tiny_backbone(), settings(), str(tmp_path / "base")), tiny_trainer, tiny_data())
    trained = EvaluationModule(tiny_backbone(adapter=adapter(0.3)), settings(), str(tmp_path / "trained"))
    report = measure(trained, tiny_trainer, tiny_data())
    assert set(report) == {"rows", "training", "environment"}
    assert report["training"] == {"presses": ["SnapKV", "LagKV"], "steps": 110}
    assert all(set(row) == ROW_KEYS for row in report["rows"])
    assert [row["before"] for row in report["rows"]] == [row["before"] for row in base["rows"]]
    perplexities = [row for row in report["rows"] if row["metric"] == "perplexity"]
    assert all(row["after"] != row["before"] for row in perplexities)
    assert {row["press"] for row in report["rows"] if row["seen_in_training"]} == {"SnapKV"}
    assert {(row["press"], row["compression_ratio"]) for row in report["rows"] if row["press"] == "full cache"} == {
        ("full cache", 0.0)
    }
    assert {row["cases"] for row in report["rows"]} == {4}
    assert all(row["after"] is None and not row["seen_in_training"] for row in base["rows"])
    for name in ("report.json", "report.csv", "report.md", "report.png"):
        assert (tmp_path / "trained" / name).stat().st_size > 0
        assert name in capsys.readouterr().out or name != "report.json"
    with (tmp_path / "trained" / "report.csv").open() as table:
        assert len(list(csv.DictReader(table))) == len(report["rows"])


def test_a_tie_in_bfloat16_is_decided_in_float32() -> None:
    hidden = torch.tensor([[1.0, 1.0]])
    head = torch.tensor([[1.0, 0.0], [1.0, 0.001]])
    with torch.autocast("cpu", torch.bfloat16):
        assert most_likely(hidden, head).tolist() == [1]


@pytest.mark.parametrize("ratio", [-0.1, 1.0])
def test_a_ratio_outside_0_to_1_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match=f"{ratio}"):
        Setting(KnormPress(), [0.5, ratio])


def test_settings_that_the_report_could_not_tell_apart_are_refused(tiny_backbone: MakeBackbone) -> None:
    twice = [Setting(SnapKVPress(window_size=8), [0.5]), Setting(SnapKVPress(window_size=16), [0.25, 0.5])]
    with pytest.raises(ValueError, match=r"SnapKV at 0\.5 more than once"):
        EvaluationModule(tiny_backbone(), twice)


def test_contexts_shorter_than_a_window_stop_before_measuring(
    tiny_backbone: MakeBackbone, tiny_data: Callable[..., EvictionData], tiny_trainer: MakeTrainer, tmp_path: Path
) -> None:
    module = EvaluationModule(tiny_backbone(), [Setting(SnapKVPress(window_size=96), [0.5])], str(tmp_path))
    with pytest.raises(ValueError, match="SnapKV looks at a window of 96 tokens but contexts have 96"):
        tiny_trainer().test(module, tiny_data())
