"""Checks of benchmarks/fsdp.py: training runs with a sharded model against the same runs in one process.

Every run starts from the same weights and reads the same global batches; each rank takes a part of the rows.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import measure  # noqa: F401  puts the checkout on the path
import torch
from fsdp_runs import CONTEXT, CONTINUATION, ROWS, SLOW, STEPS, TOLERANCE, Case, Rows, Run, become, free_port
from kvpress import SnapKVPress
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.multiprocessing import start_processes

from callbacks.adapter_export import AdapterExport
from sparsekv_pl.eviction.dropout import KVDropout
from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.models.backbone import Backbone
from sparsekv_pl.models.lora import Lora
from sparsekv_pl.models.quantisation import parameter_count
from sparsekv_pl.objectives import EIT, Mixed, Objective, SelectionObjective


class NeverWhole(Callback):
    """Raises if a rank holds more than its part, or a rank other than 0 reads the weights."""

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:  # noqa: ARG002
        self.parameters = parameter_count(pl_module)
        assert all(parameter.is_meta for parameter in pl_module.parameters()), "weights before sharding"
        if trainer.global_rank > 0:
            Backbone._model = _refuse  # type: ignore[assignment, method-assign]

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        held = sum(p.to_local().numel() for p in pl_module.parameters())
        assert held <= 1.02 * self.parameters / trainer.world_size, f"{held} of {self.parameters} parameters"


def _refuse(*_: Any) -> None:
    raise AssertionError("a rank other than the first reads the weights")


def _mixed() -> Objective:
    return Mixed([EIT(), SelectionObjective()], [1.0, 0.5])


CASES = {
    "lora_real_eviction": Case(),
    "lora_real_eviction_selection_loss_accumulated": Case(objective=_mixed, trainer={"accumulate_grad_batches": 2}),
    "lora_chunks_checkpointed": Case(lambda: RealEviction(SnapKVPress(window_size=8), 24, checkpoint=True), _mixed),
    "lora_kv_dropout": Case(KVDropout),
    "lora_kv_dropout_layers_checkpointed": Case(lambda: KVDropout(checkpoint=True)),
    "full_tied_clipped": Case(adapter=False, optimizer=SLOW, trainer={"gradient_clip_val": 0.5}),
    "full_untied_kv_dropout": Case(KVDropout, model="untied", adapter=False, optimizer=SLOW),
    "lora_bf16_mixed": Case(KVDropout, optimizer=SLOW, trainer={"precision": "bf16-mixed"}),
    "full_bf16_mixed": Case(KVDropout, adapter=False, optimizer=SLOW, trainer={"precision": "bf16-mixed"}),
    "lora_bf16_true": Case(KVDropout, optimizer=SLOW, trainer={"precision": "bf16-true"}),
}
ADAMW = Case(KVDropout, optimizer=partial(torch.optim.AdamW, lr=1e-2), trainer={"gradient_clip_val": 1.0})
"""The run that is saved and resumed."""
CHECKS = (*CASES, "resume_sharded", "resume_consolidated", "consolidated_in_one_process", "export", "never_whole")


def saver(folder: Path) -> ModelCheckpoint:
    """A callback that saves a checkpoint half-way."""
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=STEPS // 2, save_top_k=-1)


def saved_and_resumed(run: Run, name: str) -> str:
    """The first difference between an uninterrupted run and one that was stopped half-way; "" if there is none."""
    whole = run.fit(ADAMW, saver(run.folder / name), enable_checkpointing=True)
    resumed = run.fit(ADAMW, resume=run.folder / name / f"step={STEPS // 2}.ckpt")
    return difference({**whole, "losses": whole["losses"][STEPS // 2 :]}, resumed, 0.0)


def exports(run: Run, rank: int) -> None:
    """Exports the adapter to final/ and the merged model to merged/, and saves their expected content."""
    torch.save(run.fit(ADAMW, AdapterExport(str(run.folder), merge=True)), run.folder / f"export.{rank}.pt")


def never_whole(run: Run) -> None:
    """Trains fresh LoRA weights."""
    run.trainer(ADAMW, NeverWhole()).fit(
        run.module(ADAMW, adapter=None, lora=Lora(r=4)), Rows(ROWS, CONTEXT, CONTINUATION, STEPS)
    )


def difference(expected: dict[str, Any], found: dict[str, Any], tolerance: float) -> str:
    """The first difference of more than ``tolerance``; "" if there is none."""
    pairs = {"losses": (torch.tensor(expected["losses"]), torch.tensor(found["losses"]))}
    if expected["weights"].keys() != found["weights"].keys():
        return f"other weights: {sorted(expected['weights'].keys() ^ found['weights'].keys())[:4]}"
    pairs |= {name: (weight, found["weights"][name]) for name, weight in expected["weights"].items()}
    for name, (one, other) in pairs.items():
        if one.shape != other.shape:
            return f"{name}: shape {tuple(other.shape)} instead of {tuple(one.shape)}"
        error = float((one.float() - other.float()).abs().max())
        if not error <= tolerance:
            return f"{name} differs by {error:.1e}, {tolerance:.0e} is allowed"
    return ""


def work(rank: int, run: Run, port: int) -> None:
    """Run all cases on one rank; rank 0 writes its findings to found.json."""
    become(rank, port)
    found: dict[str, str] = {}
    for name, case in CASES.items():
        found[name] = _attempt(lambda case=case, name=name: torch.save(run.fit(case), run.folder / f"{name}.{rank}.pt"))
    found["resume_sharded"] = _attempt(lambda: saved_and_resumed(run, "sharded"))
    whole = replace(run, consolidated=True)
    found["resume_consolidated"] = _attempt(lambda: saved_and_resumed(whole, "consolidated"))
    found["export"] = _attempt(lambda: exports(run, rank))
    found["never_whole"] = _attempt(lambda: never_whole(run))
    (run.folder / f"found.{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def check(run: Run, start_method: str = "spawn") -> dict[str, str]:
    """Check -> its fault; "" if it passes."""
    context = start_processes(work, (run, free_port()), nprocs=run.ranks, join=False, start_method=start_method)
    alone = replace(run, ranks=1)
    for name, case in {**CASES, "adamw": ADAMW}.items():
        torch.save(alone.fit(case), run.folder / f"{name}.alone.pt")
    while not context.join():  # raises where a rank died
        pass
    ranks = [json.loads((run.folder / f"found.{rank}.json").read_text()) for rank in range(run.ranks)]
    found = {name: next(filter(None, (rank[name] for rank in ranks)), "") for name in ranks[0]}
    for name, case in CASES.items():
        found[name] = found[name] or _compared(run.folder, name, case)
    found["consolidated_in_one_process"] = found["resume_consolidated"] or _attempt(lambda: _resumed_alone(alone))
    found["export"] = found["export"] or _attempt(lambda: _exported(run))
    assert found.keys() == set(CHECKS)
    return found


def _compared(folder: Path, name: str, case: Case) -> str:
    tolerance = TOLERANCE[case.trainer.get("precision", "32-true")]
    return difference(
        torch.load(folder / f"{name}.alone.pt", weights_only=True),
        torch.load(folder / f"{name}.0.pt", weights_only=True),
        tolerance,
    )


def _resumed_alone(alone: Run) -> str:
    """One process resumes from the ranks' checkpoint and ends like an uninterrupted process."""
    found = alone.fit(ADAMW, resume=alone.folder / "consolidated" / f"step={STEPS // 2}.ckpt")
    expected = torch.load(alone.folder / "adamw.alone.pt", weights_only=True)
    return difference({**expected, "losses": expected["losses"][STEPS // 2 :]}, found, 1e-3)


def _exported(run: Run) -> str:
    """The adapter's folder holds the trained weights; the model in merged/ equals base with adapter."""
    backbone = Backbone(run.models["tied"], dtype="float32")
    adapted = replace(backbone, lora=None, adapter=str(run.folder / "final")).load()[0]
    weights = {name: p.detach() for name, p in adapted.named_parameters() if p.requires_grad}
    trained = torch.load(run.folder / "export.0.pt", weights_only=True)
    if wrong := difference(trained, {**trained, "weights": weights}, 0.0):
        return wrong
    merged = replace(backbone, lora=None, pretrained=str(run.folder / "merged")).load()[0]
    ids = torch.arange(100)[None]
    with torch.no_grad():
        error = float((merged(ids).logits - adapted(ids).logits).abs().max())
    return "" if error < 1e-3 else f"merged/ differs by {error:.1e}"


def _attempt(run: Callable[[], str | None]) -> str:
    try:
        return run() or ""
    except Exception as error:
        return f"{type(error).__name__}: {error}".replace("\n", " ")[:500]
