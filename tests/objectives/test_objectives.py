"""All objectives: chosen and mixed in YAML, and trained under real eviction."""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from kvpress import SnapKVPress

from callbacks.curriculum import Curriculum
from sparsekv_pl.eviction.dropout import KVDropout
from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.eviction.request import NOTHING, Request
from sparsekv_pl.models.anchors import Anchors
from sparsekv_pl.models.batch import IGNORE, Batch
from sparsekv_pl.objectives import (
    EIT,
    LM,
    Layerwise,
    Mixed,
    Objective,
    Reconstruction,
    SelectionObjective,
    SparseLM,
)
from sparsekv_pl.presses.sparse_reg import SparseRegPress
from sparsekv_pl.schedules import Linear
from sparsekv_pl.training.eit_module import EITModule
from tests.tiny_training import MakeBackbone, MakeData, MakeTrainer, adamw, trained
from train import TrainCommandLine

ROOT = Path(__file__).parents[2]


def regularised_press() -> SparseRegPress:
    return SparseRegPress(SnapKVPress(window_size=8), window_size=8)


OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "lm": LM,
    "sparse_lm": SparseLM,
    "reconstruction": Reconstruction,
    "eit": EIT,
    "selection": SelectionObjective,
    "layerwise hidden": lambda: Layerwise("hidden"),
    "layerwise attention": lambda: Layerwise("attention", layer_weights=[1.0, 2.0]),
}
RECONSTRUCTION = {"reconstruction", "reconstruction_lost", "reconstruction_accuracy"}
SELECTION = {"selection/SnapKV", "kept_mass/SnapKV", "kept_mass_most/SnapKV"}
TERMS = {
    "lm": {"cross_entropy"},
    "sparse_lm": {"cross_entropy", "press/entropy"},
    "reconstruction": RECONSTRUCTION,
    "eit": {"cross_entropy", "kl"},
    "selection": SELECTION,
    "layerwise hidden": {"layerwise_hidden"},
    "layerwise attention": {"layerwise_attention"},
    "mixed": {
        *("cross_entropy", "cross_entropy_2", "cross_entropy_4", "kl", "press/entropy"),
        *("layerwise_hidden", "layerwise_attention", *RECONSTRUCTION, *SELECTION),
    },
}


def everything() -> Mixed:
    return Mixed([make() for make in OBJECTIVES.values()], [1.0, 0.1, 0.5, 1.0, 3.0, 0.1, 0.1])


# --- trained ---


@pytest.mark.parametrize("chunk_tokens", [None, 40])
@pytest.mark.parametrize("name", TERMS)
def test_every_objective_trains_under_real_eviction_and_logs_its_terms(
    name: str, chunk_tokens: int | None, tiny_backbone: MakeBackbone, tiny_data: MakeData, tiny_trainer: MakeTrainer
) -> None:
    eviction = RealEviction(regularised_press(), chunk_tokens)
    objective = everything() if name == "mixed" else OBJECTIVES[name]()
    module = EITModule(tiny_backbone(), eviction, objective, optimizer=adamw)
    before = trained(module)
    trainer = tiny_trainer(Curriculum(Linear(0.5, 0.6, steps=1)), max_steps=2)
    trainer.fit(module, tiny_data(retrieval_share=0.5))
    logged = {key: float(value) for key, value in trainer.callback_metrics.items()}
    logs = {key.removeprefix("train/"): value for key, value in logged.items() if key.startswith("train/")}
    assert set(logs) - {"loss", "compression_ratio", "kept_share", "skipped_steps"} == TERMS[name]
    assert all(math.isfinite(value) for value in logs.values()), logs
    assert logs["loss"] > 0
    if "reconstruction" in logs:
        assert 0.5 <= logs["reconstruction_lost"] <= 1
        assert 0 <= logs["reconstruction_accuracy"] <= 1
    changed = [key for key, value in trained(module).items() if not torch.equal(value, before[key])]
    assert any("lora_B" in key for key in changed)


@pytest.mark.parametrize("chunk_tokens", [None, 40])
def test_at_compression_0_nothing_is_asked_for(
    chunk_tokens: int | None, tiny_backbone: MakeBackbone, tiny_data: MakeData, tiny_trainer: MakeTrainer
) -> None:
    module = EITModule(tiny_backbone(), RealEviction(SnapKVPress(window_size=8), chunk_tokens), Reconstruction())
    trainer = tiny_trainer(Curriculum(Linear(0.0, 0.0)), max_steps=1)
    trainer.fit(module, tiny_data())
    assert trainer.callback_metrics["train/loss"] == 0


# --- with KV dropout ---


@pytest.mark.parametrize("objective", [Reconstruction(), SelectionObjective(), Mixed([LM(), Reconstruction()])])
def test_what_needs_a_press_is_refused_under_kv_dropout(objective: Objective, tiny_backbone: MakeBackbone) -> None:
    with pytest.raises(ValueError, match="KVDropout has no press"):
        EITModule(tiny_backbone(), KVDropout(), objective)


EVICTIONS: dict[str, Callable[[], Any]] = {
    "one chunk": lambda: RealEviction(SnapKVPress(window_size=8)),
    "many chunks": lambda: RealEviction(SnapKVPress(window_size=8), chunk_tokens=16),
    "kv dropout": lambda: KVDropout(Anchors(sinks=1, recent=4)),
}


@pytest.mark.parametrize("eviction", EVICTIONS)
@pytest.mark.parametrize("match", ["hidden", "attention"])
def test_layerwise_compares_the_same_tokens_in_every_eviction(
    match: Any, eviction: str, tiny_backbone: MakeBackbone
) -> None:
    """A fresh adapter is the teacher, so that only what was evicted can make a difference: none at compression 0."""
    module = EITModule(tiny_backbone(), EVICTIONS[eviction](), Layerwise(match))
    tokens = torch.randint(2, 1024, (2, 48), generator=torch.Generator().manual_seed(3))
    labels = tokens[:, 32:].masked_fill(torch.arange(16) < 3, IGNORE)
    batch = Batch(
        context_ids=tokens[:, :32],
        continuation_ids=tokens[:, 32:],
        labels=labels,
        document_ids=["a", "b"],
        tasks=["text", "text"],
    )
    view, _ = module.student.view(batch, 0.0, 0)
    student, teacher = view.layers[match]
    assert sorted(student) == sorted(teacher) == [0, 1]
    assert student[0].shape == teacher[0].shape == (2 * 13, 64)
    name = f"layerwise_{match}"
    assert float(module.loss_terms(batch, 0.0, 0)[0][name]) < 1e-8
    terms, _ = module.loss_terms(batch, 0.7, 0)
    assert float(terms[name]) > 1e-3
    terms["loss"].backward()
    assert any(bool(p.grad.any()) for n, p in module.named_parameters() if "lora_B" in n and p.grad is not None)


# --- sparse_lm and mixed ---


def test_mixed_asks_for_whatever_one_of_them_needs() -> None:
    mixed = everything()
    switches = {name: True for name in ("teacher", "scores", "contexts", "press_losses")}
    assert mixed.request == Request(**switches, layers=frozenset({"hidden", "attention"}))
    assert Mixed([LM(), LM()]).request == NOTHING


def test_mixed_prepares_all_of_them(tiny_backbone: MakeBackbone) -> None:
    reconstructions = [Reconstruction(instruction="Again: "), Reconstruction(instruction="")]
    module = EITModule(tiny_backbone(), EVICTIONS["one chunk"](), Mixed([Mixed(list(reconstructions))]))
    assert reconstructions[0].instruction_ids == module.tokenizer.encode("Again: ", add_special_tokens=False)
    assert reconstructions[1].instruction_ids == []


# --- YAML ---

CHOSEN = """
class_path: sparsekv_pl.objectives.Mixed
init_args:
  weights: [1.0, 0.1, 0.5, 1.0, 3.0, 0.1, 0.2]
  objectives:
    - class_path: sparsekv_pl.objectives.LM
      init_args: {chunk_tokens: 64}
    - class_path: sparsekv_pl.objectives.SparseLM
    - class_path: sparsekv_pl.objectives.Reconstruction
      init_args: {block_size: 16, cue_tokens: 4, least_lost: 0.75, instruction: "Once more: "}
    - class_path: sparsekv_pl.objectives.EIT
      init_args: {kl_weight: 0.5, temperature: 2.0}
    - class_path: sparsekv_pl.objectives.SelectionObjective
      init_args: {heads: equal}
    - class_path: sparsekv_pl.objectives.Layerwise
    - class_path: sparsekv_pl.objectives.Layerwise
      init_args: {match: attention, layer_weights: [1.0, 3.0]}
"""


def test_all_of_them_are_chosen_in_yaml(
    tiny_models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pytest"])
    config = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    config["model"]["init_args"]["objective"] = yaml.safe_load(CHOSEN)
    config["model"]["init_args"]["backbone"]["pretrained"] = tiny_models["llama"]
    eviction = config["model"]["init_args"]["eviction"]["init_args"]
    inner = {"press": eviction["press"]}
    eviction["press"] = {"class_path": "sparsekv_pl.presses.SparseRegPress", "init_args": inner}
    (tmp_path / "all.yaml").write_text(yaml.safe_dump(config))
    arguments = ["--config", str(tmp_path / "all.yaml")]
    made = TrainCommandLine(args=arguments, run=False, save_config_callback=None)
    objective = made.model.objective
    assert isinstance(objective, Mixed)
    assert objective.weights == [1.0, 0.1, 0.5, 1.0, 3.0, 0.1, 0.2]
    lm, sparse, reconstruction, eit, selection, hidden, attention = objective.objectives
    assert lm == LM(chunk_tokens=64)
    assert sparse == SparseLM()
    assert reconstruction == Reconstruction(block_size=16, cue_tokens=4, least_lost=0.75, instruction="Once more: ")
    assert isinstance(reconstruction, Reconstruction)
    assert made.model.tokenizer.decode(reconstruction.instruction_ids) == "Once more: "
    assert eit == EIT(kl_weight=0.5, temperature=2.0)
    assert selection == SelectionObjective(heads="equal")
    assert hidden == Layerwise()
    assert attention == Layerwise("attention", [1.0, 3.0])
    assert made.model.student.objective.request.contexts
    assert made.model.student.objective.request.scores


def test_a_mixture_that_weighs_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Mixed.weights=\[0, 0\].*at least one above 0"):
        Mixed([EIT(), LM()], [0, 0])
