"""Comparing a learned gate with Sketch&Walk, with random blocks and the oracle as controls.

Agreement between the methods and with the true attention is measured on dense passes, so that all methods see the same
states. Perplexity and answers are measured in passes with block-sparse attention.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import DynamicCache

from sparsekv_pl.blocksparse.block_agreement import AgreementSettings, BlockAgreement
from sparsekv_pl.blocksparse.block_methods import block_methods, oracle
from sparsekv_pl.blocksparse.block_passes import BlockPasses
from sparsekv_pl.blocksparse.comparison_report import comparison_report
from sparsekv_pl.blocksparse.gate import AttentionGates
from sparsekv_pl.blocksparse.sketchwalk import SketchWalk
from sparsekv_pl.evaluation.model_analysis import Analysis
from sparsekv_pl.eviction.prefill import continue_from
from sparsekv_pl.models.backbone import Backbone
from sparsekv_pl.models.batch import TEXT, CaseBatch
from sparsekv_pl.models.weight_match import check_gates
from sparsekv_pl.reporting.console import show
from sparsekv_pl.storage.fingerprint import folder_digest
from sparsekv_pl.storage.records import Record


class BlockComparison(Analysis):
    """Compares a gate, Sketch&Walk, random and nearest blocks, and the oracle: agreement, mass, perplexity, needles.

    Agreement and perplexity are measured on text windows; all other cases are answered. batch_size must be 1. Raises
    ``ValueError`` for a setting out of range, or gates that do not fit the model.

    Parameters
    ----------
    backbone
        The model.
    output
        Folder for the report (null: where the run's name says, else output/compare), with
        comparison_results_{timestamp}.json (all measurements) and comparison_summary_{timestamp}.json (their means).
    gates
        Folder with trained gates (configs/train/gate.yaml trains them); null compares without a gate.
    block_size
        Tokens per block; must equal the gates'.
    sketch_dim, exponent, dense_layers, dampings
        Sketch&Walk's settings, see blocksparse/sketchwalk.py; each damping is a method. In forward passes the first
        ``dense_layers`` layers are dense for every method.
    top_k_blocks
        Key blocks per query block when agreement is measured.
    threshold
        The gate is also measured selecting blocks with at least this share of its softmax.
    budgets
        Numbers of key blocks per query block for which the mass kept is reported.
    pass_budgets
        Numbers of key blocks per query block in the forward passes.
    picture_layers
        Layers whose selections are drawn; null: the first that is not dense, the middle one and the last.
    seed
        Seed of random blocks and of Sketch&Walk's transform.
    """

    def __init__(
        self,
        backbone: Backbone,
        output: str | None = None,
        gates: str | None = None,
        block_size: int = 64,
        sketch_dim: int = 64,
        exponent: float = 8,
        dense_layers: int = 2,
        dampings: Sequence[float] = (1.0,),
        top_k_blocks: int = 16,
        threshold: float = 0.1,
        budgets: Sequence[int] = (4, 8, 16, 32),
        pass_budgets: Sequence[int] = (16,),
        picture_layers: Sequence[int] | None = None,
        seed: int = 0,
    ) -> None:
        _check({"top_k_blocks": [top_k_blocks], "budgets": budgets, "pass_budgets": pass_budgets}, threshold, dampings)
        for damping in dampings:  # raises for invalid settings before the model is loaded
            SketchWalk(block_size, sketch_dim, exponent, dense_layers, damping, seed)
        found = None if gates is None else _gates(Path(gates).expanduser(), block_size)
        super().__init__(backbone, output or "output/compare")
        self.gates = found  # a submodule: it moves to the device with this module
        self.gates_digest: str | None = None
        if gates is not None and found is not None:
            folder = Path(gates).expanduser()
            check_gates(folder, backbone.pretrained, backbone.files)
            found.check(self.causal_lm)
            self.gates_digest = folder_digest(folder)
        layers = self.causal_lm.config.get_text_config().num_hidden_layers
        first = min(dense_layers, layers - 1)
        drawn = sorted({first, (first + layers) // 2, layers - 1}) if picture_layers is None else list(picture_layers)
        if any(not 0 <= layer < layers for layer in drawn):
            raise ValueError(f"picture_layers has {drawn}, but the model has layers 0 to {layers - 1}")
        self.sketch: dict[str, Any] = {
            "sketch_dim": sketch_dim,
            "exponent": exponent,
            "dense_layers": dense_layers,
            "dampings": list(dampings),
            "seed": seed,
        }
        self.settings: dict[str, Any] = {
            "block_size": block_size,
            "top_k_blocks": top_k_blocks,
            "budgets": list(budgets),
            "shares": [0.9, 0.95],
            "pictured": drawn,
            "threshold": threshold,
            "pass_budgets": list(pass_budgets),
            "gates": gates,
            **self.sketch,
        }

    def setup(self, stage: str) -> None:
        """Check batch size and context lengths.

        Raises ``ValueError`` for a batch size other than 1, or contexts with no more than ``top_k_blocks`` blocks.
        """
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if getattr(data, "batch_size", 1) != 1:
            raise ValueError(f"data.batch_size={data.batch_size}: block-sparse attention takes one case, give 1")
        block_size, top_k = self.settings["block_size"], self.settings["top_k_blocks"]
        for length in getattr(data, "lengths", []):
            if length <= top_k * block_size:
                raise ValueError(
                    f"a context of {length} tokens has no more than top_k_blocks={top_k} blocks of "
                    f"{block_size}: there is nothing to choose. Use longer contexts or fewer blocks"
                )
        threshold = self.settings["threshold"]
        self.methods = block_methods(self.gates, block_size=block_size, threshold=threshold, **self.sketch)
        for method in self.methods:
            method.make()  # raises for settings that do not fit
        super().setup(stage)

    def described(self) -> dict[str, Any]:
        """See ``Analysis``; the gates are identified by a digest."""
        return {**self.settings, "gates": self.gates_digest}

    def measure(self, batch: CaseBatch) -> Sequence[Record]:
        """Measure a text window's agreement on a dense pass, and any case under every method.

        ``kind`` of a record is "agreement", "pair", "picture" or "pass".
        """
        (case,) = batch["cases"]
        common = {"case": case.id, "task": case.task, "length": batch["context_ids"].shape[1], "depth": case.depth}
        records: list[Record] = []
        if case.task == TEXT:
            names = ("block_size", "top_k_blocks", "budgets", "shares", "pictured")
            seen = BlockAgreement(self.methods, AgreementSettings(*(self.settings[name] for name in names)))
            continue_from(self.causal_lm, batch["context_ids"], DynamicCache(), 0, observer=seen)
            for kind, found in (("agreement", seen.agreement), ("pair", seen.pairs), ("picture", seen.pictures)):
                records += [{"kind": kind, **common, **record} for record in found]
        passes = BlockPasses(self.causal_lm, self.tokenizer, batch, self.settings["dense_layers"])
        found = passes.records([*self.methods, oracle(self.settings["block_size"])], self.settings["pass_budgets"])
        return records + [{"kind": "pass", **common, **record} for record in found]

    def write(self, records: list[Record], environment: dict[str, object]) -> list[Path]:
        timestamp = time.strftime("%Y%m%d_%H%M%S")
        lines, paths = comparison_report(self.output, records, self.settings, environment, timestamp)
        show(*lines)
        return paths


def _gates(folder: Path, block_size: int) -> AttentionGates:
    """Load the gates in ``folder``. Raises ``ValueError`` if there are none, or they are for other blocks."""
    if not folder.is_dir():
        raise ValueError(
            f"gates={folder}: there is no such folder. Train gates first (python train.py fit --config "
            "configs/train/gate.yaml), or compare without a gate (--model.gates null)"
        )
    gates = AttentionGates.load(folder)
    if gates.shape.block_size != block_size:
        raise ValueError(
            f"block_size={block_size}, but the gates of {folder} were trained for blocks of "
            f"{gates.shape.block_size} tokens: give their block_size"
        )
    return gates.eval()


def _check(blocks: dict[str, Sequence[int]], threshold: float, dampings: Sequence[float]) -> None:
    for name, counts in blocks.items():
        if not counts or min(counts) < 2 or len(set(counts)) < len(counts):
            raise ValueError(
                f"{name}={list(counts)} must be different numbers of blocks, each at least 2: the first block and the "
                "query's own are always selected"
            )
    if not 0 < threshold < 1:
        raise ValueError(f"threshold={threshold} must be between 0 and 1: a share of a softmax over blocks")
    if not dampings or len(set(dampings)) < len(dampings):
        raise ValueError(f"dampings={list(dampings)} must be different numbers, at least one")
