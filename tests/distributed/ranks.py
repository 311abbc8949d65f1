"""Training that runs alike in one process and on two: what each case trains, on which batches, and what comes of it."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import torch
from kvpress import ExpectedAttentionPress, KnormPress, RandomPress, SnapKVPress
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, IterableDataset

from callbacks.adapter_export import AdapterExport
from callbacks.curriculum import Curriculum
from sparsekv_pl.eviction import Eviction
from sparsekv_pl.eviction.dropout import KVDropout
from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.eviction.while_decoding import Decoding
from sparsekv_pl.models.anchors import Anchors
from sparsekv_pl.models.backbone import Backbone
from sparsekv_pl.models.batch import IGNORE, Batch
from sparsekv_pl.models.lora import Lora
from sparsekv_pl.objectives import (
    EIT,
    LM,
    Chunks,
    Layerwise,
    Mixed,
    Objective,
    Reconstruction,
    SelectionObjective,
    SparseLM,
)
from sparsekv_pl.presses import BlockDropoutPress, EvictionAugPress, SoftThresholdPress, SparseRegPress
from sparsekv_pl.schedules import Adaptive, Fixed, Linear, Schedule, Spread
from sparsekv_pl.training.eit_module import EITModule

RANKS, ROWS = 2, 2
CONTEXT, CONTINUATION = 64, 12
SUPERVISED = [11, 9, 2, 5]
"""Tokens of each row of all ranks: the second rank's rows have fewer."""


@dataclass
class Case:
    """What is trained, for how long, and on what."""

    objective: Callable[[], Objective]
    eviction: Callable[[], Eviction]
    backbone: dict[str, Any] = field(default_factory=dict)
    schedule: Callable[[], Schedule] = lambda: Fixed(0.5)
    steps: int = 1
    accumulate: int = 1
    lengths: list[int] = field(default_factory=lambda: [CONTEXT] * RANKS * ROWS)
    """Tokens of each row's context."""
    continuations: list[int] = field(default_factory=lambda: [CONTINUATION] * RANKS * ROWS)
    """Tokens of each row's continuation."""
    validations: int = 0
    """Batches of validation, after every step."""


def snapkv() -> RealEviction:
    return RealEviction(SnapKVPress(window_size=8))


def drawn(budget: int | None = None, **settings: Any) -> RealEviction:
    presses = [SnapKVPress(window_size=8), ExpectedAttentionPress()]
    return RealEviction(EvictionAugPress(presses, [1.0, 2.0], **settings), budget=budget)


def threshold() -> SoftThresholdPress:
    return SoftThresholdPress(threshold=0.5, learnable=True, window_size=8)


def seldom_threshold() -> RealEviction:
    """Steps 0 and 2 draw SnapKV, step 1 the press that learns a threshold."""
    return RealEviction(EvictionAugPress([threshold(), SnapKVPress(window_size=8)]))


def aligned() -> Mixed:
    return Mixed([EIT(temperature=2.0), SelectionObjective()], [1.0, 0.5])


def dropout() -> KVDropout:
    return KVDropout(Anchors(recent=4), query_chunk=16)


def blocks() -> RealEviction:
    return RealEviction(BlockDropoutPress(block_size=4, protect_recent=4), chunk_tokens=32)


GRADIENTS = {
    "eit and selection": Case(aligned, lambda: drawn(score_all=True)),
    "lm": Case(LM, snapkv),
    "lm, everything trains": Case(LM, snapkv, backbone={"lora": None}),
    "sparse lm": Case(
        SparseLM, lambda: RealEviction(SparseRegPress(SnapKVPress(window_size=8), weight=0.5, window_size=8))
    ),
    "kv dropout": Case(EIT, dropout),
    "block dropout": Case(LM, blocks),
    "learnable threshold": Case(LM, lambda: RealEviction(threshold())),
    "reconstruction": Case(lambda: Mixed([LM(), Reconstruction(block_size=8, cue_tokens=4)]), snapkv),
    "many chunks, not kept": Case(LM, lambda: RealEviction(SnapKVPress(window_size=8), 24, checkpoint=True)),
    "lengths differ": Case(aligned, snapkv, lengths=[64, 40, 40, 52]),
    "lengths differ, chunks": Case(
        lambda: Mixed([EIT(), Chunks()], [1.0, 0.5]),
        lambda: RealEviction(SnapKVPress(window_size=8), 24),
        lengths=[64, 40, 40, 52],
    ),
    "lengths differ, kv dropout": Case(LM, dropout, lengths=[64, 64, 64, 40]),
    "lengths differ, sparse lm": Case(
        SparseLM,
        lambda: RealEviction(SparseRegPress(SnapKVPress(window_size=8), weight=0.5, window_size=8)),
        lengths=[64, 40, 40, 64],
    ),
    "accumulated": Case(aligned, snapkv, accumulate=2),
    # One rank's press has nothing to select from:
    "contexts within the budget": Case(
        aligned,
        lambda: drawn(score_all=True, budget=48),
        schedule=lambda: Fixed(0.0),
        steps=2,
        lengths=[64, 64, 40, 40],
    ),
    "contexts within the budget, drawn by distance": Case(
        aligned,
        lambda: RealEviction(EvictionAugPress([KnormPress(), RandomPress(seed=1)], by_distance=True), budget=48),
        schedule=lambda: Fixed(0.0),
        steps=3,
        lengths=[40, 40, 64, 40],
    ),
    "continuations within the interval": Case(
        aligned,
        lambda: RealEviction(KnormPress(), decoding=Decoding(8, context=False)),
        continuations=[12, 12, 7, 7],
    ),
    # What some parameters have no part in:
    "threshold at ratio 0": Case(LM, lambda: RealEviction(threshold()), schedule=lambda: Fixed(0.0), steps=2),
    "threshold not drawn": Case(LM, seldom_threshold, steps=3),
    "drawn by distance": Case(
        aligned, lambda: drawn(score_all=True, by_distance=True), steps=6, lengths=[64, 40, 40, 52], validations=3
    ),
    "selection alone": Case(SelectionObjective, snapkv, steps=2),
    "attention of layers alone": Case(lambda: Layerwise("attention"), snapkv, steps=2),
}
CURRICULA = {
    "spread": Case(LM, drawn, schedule=lambda: Spread(Linear(0.2, 0.7, steps=20)), steps=20),
    "adaptive": Case(
        LM,
        dropout,
        schedule=lambda: Adaptive(0.3, step_size=0.1, tolerance=0.05, back_off=0.05),
        steps=6,
        validations=3,
    ),
}
CASES = GRADIENTS | CURRICULA


class Rows(LightningDataModule):
    """Rows of random tokens, the same however many processes share them."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case

    def train_dataloader(self) -> DataLoader[Any]:
        assert self.trainer is not None
        rank, share = self.trainer.global_rank, RANKS * ROWS // self.trainer.world_size
        own = slice(rank * share, (rank + 1) * share)
        return DataLoader(Endless(self.case, own), batch_size=None)

    def val_dataloader(self) -> DataLoader[Any]:
        """Whole batches for whoever's turn it is: Lightning deals them out."""
        batches = [rows(self.case, 1000 + i, slice(0, ROWS)) for i in range(self.case.validations)]
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


class Endless(IterableDataset[Batch]):
    """One rank's rows of batch after batch. Lightning deals out lists, but not this."""

    def __init__(self, case: Case, own: slice) -> None:
        self.case, self.own = case, own

    def __iter__(self) -> Iterator[Batch]:
        return (rows(self.case, seed, self.own) for seed in count())


def rows(case: Case, seed: int, which: slice) -> Batch:
    """Some of the rows of batch ``seed``."""
    ids = torch.randint(2, 1000, (RANKS * ROWS, CONTEXT + CONTINUATION), generator=torch.Generator().manual_seed(seed))
    more = torch.tensor(case.continuations[which])
    context, continuation = ids[which, :CONTEXT], ids[which, CONTEXT : CONTEXT + int(more.max())]
    counts = torch.tensor(SUPERVISED).roll(seed)[which].minimum(more - 1)[:, None]
    labels = continuation.where(torch.arange(continuation.shape[1]) <= counts, IGNORE)
    labels[:, 0] = IGNORE
    longest = max(case.lengths[which])
    batch = Batch(
        context_ids=context[:, :longest],
        continuation_ids=continuation,
        labels=labels,
        document_ids=["doc"] * len(labels),
        tasks=["text"] * len(labels),
    )
    if min(case.lengths) < max(case.lengths):
        batch["context_lengths"] = case.lengths[which]
    return batch


@dataclass
class Watch(Callback):
    """Notes what every optimizer step was, and what it was taken with."""

    gradients: list[dict[str, torch.Tensor]] = field(default_factory=list)
    drawn: list[tuple[float, int]] = field(default_factory=list)
    logged: list[dict[str, float]] = field(default_factory=list)
    validated: list[dict[str, float]] = field(default_factory=list)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:  # noqa: ARG002
        trained = ((name, parameter) for name, parameter in pl_module.named_parameters() if parameter.requires_grad)
        assert isinstance(pl_module, EITModule)
        self.gradients.append({name: torch.zeros(()) if p.grad is None else p.grad.clone() for name, p in trained})
        self.drawn.append((pl_module.compression_ratio, getattr(pl_module.press, "drawn", 0)))

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.logged.append({k: float(v) for k, v in trainer.callback_metrics.items() if not k.startswith("val/")})

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        self.validated.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")})


def run(name: str, pretrained: str, folder: Path, **settings: Any) -> dict[str, list[Any]]:
    """Train a case, say what happened and export what was trained to ``folder/name``."""
    case = CASES[name]
    torch.manual_seed(0)
    backbone = Backbone(**{"pretrained": pretrained, "dtype": "float32", "lora": Lora(r=4)} | case.backbone)
    module = EITModule(
        backbone,
        case.eviction(),
        case.objective(),
        lambda parameters: torch.optim.SGD(parameters, lr=1e-3),
        validation_eviction=snapkv(),
    )
    for called, parameter in module.named_parameters():
        if "lora_B" in called:  # they begin at 0, where half of the gradients are 0
            torch.nn.init.normal_(parameter, std=0.05)
    watch = Watch()
    trainer = Trainer(
        max_steps=case.steps,
        accumulate_grad_batches=case.accumulate,
        val_check_interval=1 if case.validations else None,
        limit_val_batches=1.0 if case.validations else 0,
        num_sanity_val_steps=0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[Curriculum(case.schedule()), watch, AdapterExport(str(folder / name))],
        **settings,
    )
    trainer.fit(module, Rows(case))
    return {kind: getattr(watch, kind) for kind in ("gradients", "drawn", "logged", "validated")}


def rank(rank: int, port: int, pretrained: str, folder: Path) -> None:
    """One of ``RANKS`` processes: all cases, into ``folder``."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
    for name in CASES:
        # Ranks that wait for each other fail soon.
        strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=60))
        torch.save(run(name, pretrained, folder, strategy=strategy, devices=RANKS), folder / f"{name} {rank}.pt")
