"""The attention that presses keep of the most that their budget could, by layer and head: values, pieces, pictures."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kvpress import AdaKVPress, KnormPress, SnapKVPress
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from sparsekv_pl.attention.evicted_attention import attention_implementation
from sparsekv_pl.evaluation.evaluation_module import EvaluationModule
from sparsekv_pl.evaluation.kept_attention import SINKS, keeps_attention, kept_attention
from sparsekv_pl.evaluation.measurement import Measurement
from sparsekv_pl.evaluation.points import Point, Setting
from sparsekv_pl.models.batch import TEXT, CaseBatch, CaseInfo
from sparsekv_pl.presses import OraclePress
from sparsekv_pl.reporting.ceiling_maps import reached_figures, reached_of
from tests.tiny_training import MakeAdapter, MakeBackbone, MakeTrainer

CONTEXT, RATIO = 48, 0.75
LENGTHS = [8, 5]


def batch(task: str) -> CaseBatch:
    rows = torch.randint(2, 1024, (2, CONTEXT + 8), generator=torch.Generator().manual_seed(0))
    return CaseBatch(
        context_ids=rows[:, :CONTEXT],
        continuation_ids=rows[:, CONTEXT:],
        continuation_lengths=torch.tensor(LENGTHS),
        cases=[CaseInfo(f"{task}/{i}", task, () if task == TEXT else ("zebra",), max_new_tokens=3) for i in range(2)],
    )


@torch.no_grad()
def by_loops(model: Any, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Kept attention and the most, (layers, K), under Knorm: all attention and all norms written out, key by key."""
    cases = batch("needle")
    sums = np.zeros((2, model.config.num_hidden_layers, 2))
    for row, length in enumerate(LENGTHS):
        ids = cases["continuation_ids"][row, :length].tolist() + tokenizer.encode(" zebra")
        whole = torch.cat([cases["context_ids"][row], torch.tensor(ids)])[None]
        cache = DynamicCache()
        model(whole[:, :CONTEXT], past_key_values=cache)
        with attention_implementation(model, "eager"):
            attentions = model(whole, output_attentions=True).attentions
        for layer, attention in enumerate(attentions):
            received = attention[0, :, CONTEXT:, :CONTEXT].mean(1).view(2, -1, CONTEXT).mean(1)
            for head, norms in enumerate(cache.layers[layer].keys[0].norm(dim=-1).tolist()):
                kept = sorted(range(CONTEXT), key=norms.__getitem__)[: int(CONTEXT * (1 - RATIO))]
                chosen = [float(received[head, key]) for key in kept if key >= SINKS]
                best = sorted(received[head, SINKS:].tolist(), reverse=True)[: len(chosen)]
                sums[:, layer, head] += sum(chosen), sum(best)
    return sums[0], sums[1]


@pytest.fixture(scope="module")
def tiny(tiny_models: dict[str, str]) -> tuple[Any, Any]:
    folder = tiny_models["llama"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def test_it_is_the_attention_of_what_is_kept_and_of_the_best_of_as_many(tiny: tuple[Any, Any]) -> None:
    found = kept_attention(Measurement(*tiny, batch("needle")), Point(KnormPress(), RATIO))
    kept, most = by_loops(*tiny)
    np.testing.assert_allclose(found["kept_attention"], kept, rtol=1e-4)
    np.testing.assert_allclose(found["most_attention"], most, rtol=1e-4)
    assert (kept < most).all()


def test_chunks_and_budgets_by_head_are_counted_and_the_oracle_keeps_the_most(tiny: tuple[Any, Any]) -> None:
    measurement = Measurement(*tiny, batch(TEXT))
    for point in (Point(KnormPress(), RATIO, chunk_tokens=24), Point(AdaKVPress(SnapKVPress(window_size=8)), RATIO)):
        assert keeps_attention(point)
        found = kept_attention(measurement, point)
        shares = np.divide(found["kept_attention"], found["most_attention"])
        assert (shares > 0).all() and (shares < 1).all()
    oracle = kept_attention(measurement, Point(OraclePress(), RATIO))
    np.testing.assert_allclose(oracle["kept_attention"], oracle["most_attention"], rtol=1e-5)
    assert not keeps_attention(Point(OraclePress(), RATIO)) and not keeps_attention(Point())


def test_base_and_trained_are_drawn_by_layer_and_head_for_each_press(
    tiny_backbone: MakeBackbone,
    tiny_adapter: MakeAdapter,
    tiny_trainer: MakeTrainer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A second run reads it from disk."""
    adapter = tiny_adapter(0.3, tmp_path / "adapter", {"presses": ["Knorm"], "steps": 1})
    settings = [Setting(KnormPress(), [0.5, RATIO]), Setting(OraclePress(), [0.5])]

    def run() -> dict[str, Any]:
        module = EvaluationModule(tiny_backbone(adapter=adapter), settings, str(tmp_path / "run"), kept_attention=True)
        tiny_trainer().test(module, DataLoader([batch("needle")] * 2, batch_size=None), verbose=False)
        found: dict[str, Any] = json.loads((tmp_path / "run" / "kept_attention.json").read_text())
        return found

    found = run()
    assert {(one["press"], one["compression_ratio"], one["variant"]) for one in found["points"]} == {
        ("Knorm", ratio, variant) for ratio in (0.5, RATIO) for variant in ("base", "trained")
    }
    base, trained = (next(one for one in found["points"] if one["variant"] == name) for name in ("base", "trained"))
    assert base["by_layer_and_head"] != trained["by_layer_and_head"]
    assert (tmp_path / "run" / "attention-kept-knorm.png").exists()
    monkeypatch.setattr("sparsekv_pl.evaluation.kept_attention.kept_and_most", None)
    assert run() == found


def test_the_picture_has_base_above_trained_and_a_column_per_ratio() -> None:
    records: list[dict[str, Any]] = [
        {
            "press": "Knorm",
            "compression_ratio": ratio,
            "variant": variant,
            "kept_attention": kept,
            "most_attention": [[2.0, 0.0]],
        }
        for ratio in (0.5, 0.9)
        for variant, kept in (("base", [[0.5, 0.0]]), ("base", [[0.0, 0.0]]), ("trained", [[1.5, 0.0]]))
    ]
    ((press, figure),) = reached_figures(reached_of(records), [7])
    titles = [axes.get_title() for axes in figure.axes[:4]]
    assert press == "Knorm"
    assert titles == [
        "ratio 0.5\nbase: 0.12",
        "ratio 0.9\nbase: 0.12",
        "ratio 0.5\ntrained: 0.75",
        "ratio 0.9\ntrained: 0.75",
    ]
    image = figure.axes[2].images[0]
    assert image.get_clim() == (0, 1) and image.get_array().tolist() == [[0.75, None]]
    assert figure.axes[0].yaxis.get_major_formatter()(0) == "7"
