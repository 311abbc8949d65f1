"""The viewer in an evaluation: which cases are viewed, that the bits are what was kept, and the report's links."""

import base64
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kvpress import AdaKVPress, ExpectedAttentionPress, KnormPress, KVzipPress, RandomPress
from torch.utils.data import DataLoader

from sparsekv_pl.evaluation import evaluation_module
from sparsekv_pl.evaluation.evaluation_module import EvaluationModule
from sparsekv_pl.evaluation.points import Setting
from sparsekv_pl.evaluation.view_pages import ViewedCases
from sparsekv_pl.models.batch import CaseBatch, CaseInfo
from sparsekv_pl.reporting.condition import Condition
from tests.tiny_training import MakeBackbone, MakeTrainer

DEPTHS = (0.0, 0.3, 0.5, 0.6, 1.0)
CONTEXT = 48


class Broken(KnormPress):
    """Fails wherever it is applied."""

    def score(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("out of everything")


def batch(length: int = CONTEXT) -> CaseBatch:
    rows = torch.randint(2, 1024, (len(DEPTHS), length + 8), generator=torch.Generator().manual_seed(0))
    cases = [CaseInfo(f"needle/{d}", "needle", ("zebra",), max_new_tokens=3, depth=d, question="Who?") for d in DEPTHS]
    lengths = torch.full((len(DEPTHS),), 8)
    return CaseBatch(
        context_ids=rows[:, :length], continuation_ids=rows[:, length:], continuation_lengths=lengths, cases=cases
    )


@pytest.fixture
def run(tiny_backbone: MakeBackbone, tiny_trainer: MakeTrainer, tmp_path: Path) -> Callable[..., EvaluationModule]:
    """Measure one batch of needles into one folder; the module, with its records."""

    def run(settings: list[Setting], **more: Any) -> EvaluationModule:
        module = EvaluationModule(tiny_backbone(), settings, str(tmp_path), **more)
        tiny_trainer().test(module, DataLoader([batch()], batch_size=None), verbose=False)
        return module

    return run


def test_the_bits_are_what_each_case_kept(run: Callable[..., EvaluationModule], tmp_path: Path) -> None:
    """Also with chunks, hidden pairs, draws of a whole batch, and a press that runs the model itself, row by row."""
    settings = [
        Setting(KnormPress(), [0.25, 0.5]),
        Setting(KnormPress(), [0.5], chunk_tokens=16),
        Setting(AdaKVPress(ExpectedAttentionPress()), [0.5]),
        Setting(RandomPress(), [0.5]),
        Setting(KVzipPress(), [0.5]),
        Setting(Broken(), [0.5]),
    ]
    records = run(settings).records
    views = [record for record in records if "viewed" in record]
    assert [view["viewed"] for view in views] == ["needle/0.3", "needle/0.6"]
    for view in views:
        own = [record for record in records if record.get("case") == view["viewed"] and "kept_pairs" in record]
        pairs = {Condition.of(record).name: record["kept_pairs"] for record in own if Condition.of(record).evicts}
        shape, count = (view["layers"], view["heads"], CONTEXT), 2 * 2 * CONTEXT
        found = {}
        for name, packed in view["kept"].items():
            bits = np.unpackbits(np.frombuffer(base64.b64decode(packed), np.uint8))[:count].reshape(shape)
            found[name] = bits.sum() / (shape[0] * shape[1])
        assert found.keys() == pairs.keys() and len(found) == 6
        hides = {name for name in pairs if name.startswith(("AdaKV", "KVzip"))}  # unevenly, and a mean over the batch
        for name, kept in found.items():
            assert kept == pytest.approx(pairs[name], abs=6 if name in hides else 1e-6), name
        assert view["unknown"] == {"Broken at 0.5, dense": "RuntimeError: out of everything"}
    page = (tmp_path / "viewer-1.html").read_text()
    content = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])  # type: ignore[index]
    assert {(point["press"], point["ratio"]) for point in content["points"]} >= {("Knorm, chunks of 16", 0.5)}
    assert content["missing"] == ["Broken at 0.5, dense, base, is not shown: RuntimeError: out of everything"]


def test_a_report_links_its_cases_and_measures_them_once(
    run: Callable[..., EvaluationModule], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [Setting(KnormPress(), [0.5])]
    run(settings, views=1)
    report = (tmp_path / "report.html").read_text()
    assert '<a href="viewer.html">needle/0.5</a>' in report
    assert "- [needle/0.5](viewer.html)" in (tmp_path / "report.md").read_text()
    page = (tmp_path / "viewer.html").read_bytes()
    monkeypatch.setattr(evaluation_module, "case_views", lambda *_, **__: pytest.fail("measured again"))
    run(settings, views=1)
    assert (tmp_path / "viewer.html").read_bytes() == page
    (tmp_path / "viewer.html").unlink()
    run(settings, views=0)
    assert "viewer" not in (tmp_path / "report.html").read_text() and not (tmp_path / "viewer.html").exists()


def test_a_model_in_bfloat16_is_viewed_too(
    tiny_backbone: MakeBackbone, tiny_trainer: MakeTrainer, tmp_path: Path
) -> None:
    module = EvaluationModule(tiny_backbone(dtype="bfloat16"), [Setting(KnormPress(), [0.5])], str(tmp_path))
    tiny_trainer().test(module, DataLoader([batch()], batch_size=None), verbose=False)
    views = [record for record in module.records if "viewed" in record]
    assert len(views) == 2 and all(view["mass"] for view in views)


def test_cases_are_chosen_once_and_spread_over_depths() -> None:
    chosen = ViewedCases(3, CONTEXT)
    assert chosen.rows(batch(CONTEXT + 1)) == [], "too long"
    assert [DEPTHS[row] for row in chosen.rows(batch())] == [0.3, 0.5, 0.6]
    assert chosen.rows(batch()) == chosen.rows(batch()) != []
    other = batch()
    other["cases"] = [CaseInfo(f"other/{number}", "needle") for number in range(5)]
    assert chosen.rows(other) == []
    with pytest.raises(ValueError, match="views is -1: give a number of cases, 0 for none"):
        ViewedCases(-1, None)
