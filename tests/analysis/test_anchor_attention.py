"""A run of the anchor analysis on a tiny model: base and trained, resuming, and the report."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from sparsekv_pl.analysis.anchor_attention import AnchorAnalysis, observed
from sparsekv_pl.analysis.anchor_profile import GROUPS
from sparsekv_pl.analysis.token_types import types_for
from sparsekv_pl.models.anchors import Anchors
from tests.tiny_training import MakeBackbone, MakeCases, MakeTrainer


@pytest.fixture(scope="module")
def adapter(tiny_backbone: MakeBackbone, tmp_path_factory: pytest.TempPathFactory) -> str:
    """One that changes attention a lot."""
    folder = tmp_path_factory.mktemp("adapter")
    model = tiny_backbone().load()[0]
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.5, generator=generator)
    model.save_pretrained(folder)
    return str(folder)


def run(analysis: AnchorAnalysis, data: Any, make_trainer: MakeTrainer, **settings: Any) -> dict[str, Any]:
    make_trainer(**settings).predict(analysis, data, return_predictions=False)
    return json.loads((analysis.output / "report.json").read_text())


def test_a_run_ends_in_its_report(
    tiny_backbone: MakeBackbone,
    tiny_cases: MakeCases,
    tiny_trainer: MakeTrainer,
    adapter: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    analysis = AnchorAnalysis(tiny_backbone(adapter=adapter), str(tmp_path))
    report = run(analysis, tiny_cases(), tiny_trainer)
    assert list(report["variants"]) == ["base", "trained"]
    assert report["lengths"] == [96]
    base, trained = report["variants"].values()
    assert base["windows"] == trained["windows"] == 8  # four of text, a fact at two depths, twice
    assert np_shape(base["heads"]["carrying"]) == (2, 4)
    assert np_shape(base["layers"]["attention"]) == (2, 7)
    kinds = {row["type"]: row for row in base["types"]}
    special = kinds["special"]  # the chat template's first token, which is a sink
    assert special["with_sinks"]["tokens"] > 0 == special["tokens"]
    assert base["types"] != trained["types"]
    assert [row["tokens"] for row in base["types"]] == [row["tokens"] for row in trained["types"]]
    snippet = yaml.safe_load((tmp_path / "anchors.yaml").read_text())
    assert Anchors(**snippet["anchors"]) == Anchors(**trained["rule"]["anchors"])
    said = capsys.readouterr().out
    assert (tmp_path / "anchors.yaml").read_text().strip() in said and "base, times chance" in said
    names = {"types", "layers", "distances", "positions", "heads"}
    assert {path.stem for path in tmp_path.glob("*.png")} == names


def np_shape(nested: list[list[float]]) -> tuple[int, int]:
    assert len({len(line) for line in nested}) == 1
    return len(nested), len(nested[0])


def test_what_is_measured_is_not_measured_again(
    tiny_backbone: MakeBackbone,
    tiny_cases: MakeCases,
    tiny_trainer: MakeTrainer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = {"tasks": [], "batch_size": 1}
    first = run(
        AnchorAnalysis(tiny_backbone(), str(tmp_path)), tiny_cases(**data), tiny_trainer, limit_predict_batches=2
    )
    assert first["variants"]["base"]["windows"] == 2
    calls: list[str] = []
    measure = AnchorAnalysis.measure

    def counted(self: AnchorAnalysis, batch: Any) -> Any:
        calls.append(batch["cases"][0].id)
        return measure(self, batch)

    monkeypatch.setattr(AnchorAnalysis, "measure", counted)
    other = AnchorAnalysis(tiny_backbone(), str(tmp_path), sinks=2, threshold=1.5, recent_mass=0.9)
    second = run(other, tiny_cases(**data), tiny_trainer)
    assert second["variants"]["base"]["windows"] == 4 and len(calls) == 2
    assert second["variants"]["base"]["rule"]["threshold"] == 1.5
    assert other.described() != AnchorAnalysis(tiny_backbone(), str(tmp_path), carrying=0.5).described()


def test_what_is_observed_does_not_depend_on_the_rows_beside_it(tiny_backbone: MakeBackbone) -> None:
    model, tokenizer = tiny_backbone(lora=None).load(trainable=False)
    ids = torch.randint(2, 1024, (3, 40), generator=torch.Generator().manual_seed(0))
    types = types_for(tokenizer).of(ids)
    with torch.no_grad():
        together, alone = observed(model, ids, types), observed(model, ids[1:2], types[1:2])
    assert together.count == GROUPS
    for layer, wanted in alone.layers.items():
        torch.testing.assert_close(together.layers[layer].by_group[1:2], wanted.by_group, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sinks": 17}, "sinks is 17"),
        ({"carrying": 0.0}, "carrying is 0.0"),
        ({"recent_mass": 1.5}, "recent_mass is 1.5"),
        ({"threshold": -1.0}, "threshold is -1.0"),
    ],
)
def test_bad_settings_are_named_before_the_model_is_loaded(
    settings: dict[str, Any], message: str, tiny_backbone: MakeBackbone
) -> None:
    with pytest.raises(ValueError, match=message):
        AnchorAnalysis(tiny_backbone(pretrained="./nowhere"), **settings)
