"""Export of attention gates, which train beside a model."""

import json
from pathlib import Path

import pytest
import torch

from callbacks.adapter_export import AdapterExport
from sparsekv_pl.blocksparse.gate import AttentionGates
from sparsekv_pl.blocksparse.gate_distillation import GateDistillation
from sparsekv_pl.models.backbone import Backbone
from tests.callbacks.checkpoint_cases import names
from tests.tiny_training import MakeBackbone, MakeData, MakeTrainer


def gates(backbone: Backbone) -> GateDistillation:
    return GateDistillation(backbone, block_size=16, gate_dim=8, optimizer=lambda p: torch.optim.AdamW(p, lr=0.1))


def test_a_module_that_trains_beside_its_model_exports_that_alone(
    tiny_backbone: MakeBackbone, tiny_data: MakeData, tiny_trainer: MakeTrainer, tmp_path: Path
) -> None:
    module = gates(tiny_backbone())
    tiny_trainer(AdapterExport(str(tmp_path)), max_steps=2).fit(module, tiny_data())
    assert names(tmp_path / "final") == {"gates.json", "gates.safetensors", "training.json"}
    exported, trained = AttentionGates.load(tmp_path / "final").state_dict(), module.gates.state_dict()
    assert all(torch.equal(exported[name], trained[name]) for name in trained)
    training = json.loads((tmp_path / "final" / "training.json").read_text())
    assert (training["steps"], training["block_size"], training["gate_dim"]) == (2, 16, 8)
    assert training["trainable_parameters"] == sum(p.numel() for p in module.gates.parameters())
    assert "train/loss" in training["last_metrics"]


def test_there_is_nothing_to_merge_beside_a_model(
    tiny_backbone: MakeBackbone, tiny_data: MakeData, tiny_trainer: MakeTrainer, tmp_path: Path
) -> None:
    trainer = tiny_trainer(AdapterExport(str(tmp_path), merge=True), max_steps=1)
    with pytest.raises(ValueError, match="GateDistillation trains none: leave --merge out"):
        trainer.fit(gates(tiny_backbone()), tiny_data())
    assert names(tmp_path) == set()
