"""Summaries of planted profiles, and the sections and pictures of their report."""

import json
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from sparsekv_pl.analysis.anchor_figures import anchor_figures, layers_figure
from sparsekv_pl.analysis.anchor_profile import GROUPS, AnchorProfile, groups_of, profile_records
from sparsekv_pl.analysis.anchor_report import (
    anchor_sections,
    anchor_summary,
    anchor_yaml,
    layer_table,
    type_rows,
)
from sparsekv_pl.analysis.token_types import TYPES
from sparsekv_pl.attention.received_attention import ReceivedAttention
from sparsekv_pl.models.anchors import Anchors
from sparsekv_pl.reporting.page import html, markdown
from sparsekv_pl.reporting.plots import png

LENGTH, ROWS = 80, 3
PUNCTUATION, WORD = TYPES.index("punctuation"), TYPES.index("content")


def kinds() -> Tensor:
    """Content, and punctuation at random places that differ between the rows; no other type."""
    draws = torch.rand(ROWS, LENGTH, generator=torch.Generator().manual_seed(0))
    return torch.where(draws < 0.2, PUNCTUATION, WORD)


def profile(punctuation: float, layers: int = 2) -> AnchorProfile:
    """One head; in the last layer punctuation is ``punctuation`` times as heavy as content, before it all is equal."""
    types, observer = kinds(), ReceivedAttention(groups_of(kinds()), GROUPS)
    for layer in range(layers):
        heavy = punctuation if layer == layers - 1 else 1.0
        key = torch.where(types == PUNCTUATION, heavy, 1.0).log()[:, None, :, None]
        observer(layer, torch.ones_like(key), key, key)
    return AnchorProfile.of(profile_records(observer, types, 0.8))


def summaries() -> dict[str, Any]:
    return {
        name: anchor_summary(profile(weight), 4, 2.0, 0.5, [0, 1])
        for name, weight in (("base", 1.0), ("trained", 20.0))
    }


def test_types_add_up_and_leave_the_sinks_out() -> None:
    rows = {row["type"]: row for row in type_rows(profile(20.0), 4)}
    assert list(rows) == ["sinks", *TYPES]
    assert sum(row["attention"] for row in rows.values()) == pytest.approx(1)
    assert sum(row["tokens"] for row in rows.values()) == pytest.approx(1)
    with_sinks = [row["with_sinks"]["attention"] for name, row in rows.items() if name != "sinks"]
    assert sum(with_sinks) == pytest.approx(1)
    low, high = rows["punctuation"]["interval"]
    assert 1.5 < low <= rows["punctuation"]["times_chance"] <= high
    assert rows["content"]["times_chance"] < 1
    assert rows["special"]["times_chance"] is None and rows["special"]["interval"] is None


def test_layers_are_told_apart() -> None:
    table = layer_table(profile(20.0), 4, [0, 1])
    attention, times = np.array(table["attention"]), np.array(table["times_chance"], float)
    np.testing.assert_allclose(attention.sum(1), 1, rtol=1e-4)
    place = table["columns"].index("punctuation")
    assert times[0, place - 1] == pytest.approx(1, abs=1e-3) and times[1, place - 1] > 2
    assert np.isnan(times[:, table["columns"].index("special") - 1]).all()
    assert attention[1, place] > attention[0, place]


def test_a_summary_is_json_and_its_distances_are_all_there() -> None:
    summary = json.loads(json.dumps(anchor_summary(profile(1.0), 4, 2.0, 0.5, [0, 1]), allow_nan=False))
    assert [(row["from"], row["to"]) for row in summary["distances"]][:4] == [(0, 1), (1, 2), (2, 4), (4, 8)]
    assert sum(row["all"]["attention"] for row in summary["distances"]) == pytest.approx(1)
    assert sum(row["attention"] for row in summary["positions"]) == pytest.approx(1, rel=1e-4)
    assert summary["distances"][-1]["held"] == pytest.approx(1)
    assert [row["all"]["times_chance"] for row in summary["distances"]] == pytest.approx([1] * 8, abs=1e-3)
    assert summary["windows"] == ROWS


def test_the_rule_stands_beside_the_default_and_what_its_cost_buys() -> None:
    found = profile(20.0)
    rule = anchor_summary(found, 4, 2.0, 0.5, [0, 1])["rule"]
    chosen, default, nearest = rule["kept"]
    assert rule["anchors"]["punctuation"] and chosen["anchors"] == rule["anchors"]
    assert default["anchors"] == {"sinks": 4, "recent": 64, "special": True, "punctuation": True}
    assert default["tokens_at_the_end"] == found.tokens_kept(Anchors())
    wider = Anchors(nearest["anchors"]["sinks"], 2 * nearest["anchors"]["recent"], False, False)
    assert nearest["tokens"] <= default["tokens"] < found.portion(found.kept(wider)).tokens
    assert nearest["anchors"]["sinks"] == rule["anchors"]["sinks"] and not nearest["anchors"]["punctuation"]
    assert nearest["attention"] < default["attention"]


def test_the_snippet_makes_the_anchors() -> None:
    snippet = anchor_yaml({"sinks": 1, "recent": 128, "special": False, "punctuation": True})
    assert Anchors(**yaml.safe_load(snippet)["anchors"]) == Anchors(1, 128, False, True)


@pytest.mark.parametrize("variants", [["base"], ["base", "trained"]])
def test_the_page_tells_every_variant(variants: list[str]) -> None:
    own = {name: summary for name, summary in summaries().items() if name in variants}
    sections = anchor_sections(own, sinks=4, carrying=0.8)
    captions = {name: caption for name, (caption, _) in anchor_figures(own, 0.8).items()}
    page = markdown("Anchors", sections, captions)
    for name in variants:
        assert f"{name}: {anchor_yaml(own[name]['rule']['anchors'])}" in page
    lines = [line for line in page.splitlines() if line.startswith("| punctuation |")]
    assert len(lines) == 1 and lines[0].count("->") == 5 * (len(variants) - 1)
    assert {picture for section in sections for picture in section.pictures} == set(captions)
    assert all(len(line) == len(table.header) for s in sections for table in s.tables for line in table.lines)
    assert html("Anchors", sections, captions, dict.fromkeys(captions, b"")).count("<img") == len(captions)


def test_pictures_show_what_they_should() -> None:
    both = summaries()
    figures = {name.removesuffix(".png"): figure for name, (_, figure) in anchor_figures(both, 0.8).items()}
    assert all(png(figure).startswith(b"\x89PNG") for figure in figures.values())
    per_token, share, _ = figures["types"].axes
    assert len(share.patches) == 3 * (len(TYPES) + 1) and len(per_token.patches) == 2 * (len(TYPES) + 1)
    heights = {container.get_label(): [bar.get_height() for bar in container] for container in share.containers}
    assert heights["trained"] == [row["attention"] for row in both["trained"]["types"]]
    maps = [axes.images[0].get_array() for axes in layers_figure({"base": both["base"]["layers"]}).axes if axes.images]
    np.testing.assert_allclose(maps[0], both["base"]["layers"]["attention"])
    cumulative = figures["distances"].axes[1].lines[0].get_ydata()
    assert list(cumulative) == [row["held"] for row in both["base"]["distances"]]
