"""Saving and loading gates without a model, and errors that name the field that does not fit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsekv_pl.blocksparse.gate import AttentionGates, GateScorer
from tests.blocksparse.test_gate import YARN, ids, random_gates, seen_by_attention
from tests.random_models import Build


def test_gates_are_loaded_alone(random_model: Build, tmp_path: Path) -> None:
    model = random_model()
    gates = random_gates(model)
    gates.save(tmp_path / "gates")
    assert {path.name for path in (tmp_path / "gates").iterdir()} == {"gates.json", "gates.safetensors"}
    loaded = AttentionGates.load(tmp_path / "gates")
    assert loaded.shape == gates.shape
    query, key = seen_by_attention(model, ids())[1]
    assert torch.equal(loaded.gate(1)(query, key), gates.gate(1)(query, key))
    loaded.check(model)


@pytest.mark.parametrize(
    "name, settings",
    [
        ("layers", {"num_hidden_layers": 3}),
        ("heads", {"num_attention_heads": 8}),
        ("kv_heads", {"num_key_value_heads": 4}),
        ("head_dim", {"head_dim": 16}),
        ("inv_freq", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
        ("inv_freq", {"rope_parameters": YARN, "max_position_embeddings": 2048}),
    ],
)
def test_another_model_is_named_by_its_field(random_model: Build, name: str, settings: dict[str, Any]) -> None:
    gates = AttentionGates.for_model(random_model(), 8)
    other = random_model(**settings)
    with pytest.raises(ValueError, match=f"^{name}: .*load gates trained for this model"):
        gates.check(other)


@pytest.mark.parametrize(
    "name, settings", [("heads", {"num_attention_heads": 8}), ("kv_heads", {"num_key_value_heads": 4})]
)
def test_a_scorer_names_the_field_too(random_model: Build, name: str, settings: dict[str, Any]) -> None:
    scorer = GateScorer(AttentionGates.for_model(random_model(), 8))
    states = seen_by_attention(random_model(**settings), ids())
    with pytest.raises(ValueError, match=f"^{name}: "):
        scorer(0, *states[0])
    with pytest.raises(ValueError, match="layers: the gates have 2, but layer 2 asks"):
        scorer(2, *seen_by_attention(random_model(), ids())[0])


def test_what_is_no_gate_is_refused(random_model: Build, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no gates\.json and no gates\.safetensors"):
        AttentionGates.load(tmp_path)
    gates = random_gates(random_model())
    gates.save(tmp_path)
    shape = json.loads((tmp_path / "gates.json").read_text())
    (tmp_path / "gates.json").write_text(json.dumps(shape | {"gate_dim": 8}))
    with pytest.raises(ValueError, match=r"do not fit the shape.*query_weight"):
        AttentionGates.load(tmp_path)
    (tmp_path / "gates.json").write_text(json.dumps(shape | {"colour": 1}))
    with pytest.raises(ValueError, match="colour"):
        AttentionGates.load(tmp_path)
    (tmp_path / "gates.json").write_text(json.dumps(shape))
    tensors = load_file(tmp_path / "gates.safetensors")
    del tensors["layers.1.key_weight"]
    save_file(tensors, tmp_path / "gates.safetensors")
    with pytest.raises(ValueError, match=r"do not fit the shape.*layers\.1\.key_weight"):
        AttentionGates.load(tmp_path)
    (tmp_path / "gates.safetensors").write_bytes((tmp_path / "gates.safetensors").read_bytes()[:100])
    with pytest.raises(ValueError, match="holds no gates that can be read"):
        AttentionGates.load(tmp_path)


@pytest.mark.parametrize(
    "settings, complaint", [((0, 8), "block_size=0"), ((8, 7), "gate_dim=7"), ((8, 0), "gate_dim=0")]
)
def test_bad_sizes_are_named(random_model: Build, settings: tuple[int, int], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        AttentionGates.for_model(random_model(), *settings)
