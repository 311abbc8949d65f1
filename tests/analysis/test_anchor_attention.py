"""A run of the anchor analysis on a tiny model: base and trained, resuming, and the report."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparsekv_pl.analysis.anchor_attention import AnchorAnalysis
from sparsekv_pl.models.anchors import Anchors
from tests.tiny_training import MakeAdapter, MakeBackbone, MakeCases, MakeTrainer


def run(analysis: AnchorAnalysis, data: Any, make_trainer: MakeTrainer, **settings: Any) -> dict[str, Any]:
    make_trainer(**settings).predict(analysis, data, return_predictions=False)
    return json.loads((analysis.output / "report.json").read_text())


def test_a_run_ends_in_its_report(
    tiny_backbone: MakeBackbone,
    tiny_cases: MakeCases,
    tiny_trainer: MakeTrainer,
    tiny_adapter: MakeAdapter,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    analysis = AnchorAnalysis(tiny_backbone(adapter=tiny_adapter()), str(tmp_path))
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
