"""Check that sharded training (FSDP2) equals training in one process, and compare its cost with DDP's.

Run from the checkout on a machine with two or more GPUs: ``python benchmarks/fsdp.py``. It prints PASS or FAIL for each
check (benchmarks/fsdp_checks.py), and time and peak memory of FSDP2 over DDP for training LoRA on ``--pretrained``.
``--gloo`` runs only the checks, on two CPU processes. Exit codes: 0 if all pass, 1 if one fails, 2 without the GPUs.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from fsdp_checks import CHECKS, check
from fsdp_runs import Rows, Run, become, free_port, quiet
from lightning.pytorch import Callback, Trainer
from measure import report
from tiny_llama import save_llama
from torch.multiprocessing import start_processes

from sparsekv_pl.eviction.dropout import KVDropout
from sparsekv_pl.models.backbone import EMBEDDED, Backbone
from sparsekv_pl.models.lora import Lora
from sparsekv_pl.models.native_precision import decide
from sparsekv_pl.training.eit_module import EITModule

WARM_UP, STEPS, CONTINUATION = 3, 13, 64


class Meter(Callback):
    """Seconds of the steps after the warm-up, and this rank's peak of GPU memory in bytes."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        if batch_idx == WARM_UP:
            self.started = self._now()

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:  # noqa: ARG002
        self.seconds = self._now() - self.started
        self.peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


def train(rank: int, run: Run, port: int, tokens: int) -> None:
    """Run one rank of a measured run with one row; write its figures to figures.RANK.json."""
    become(rank, port)
    native = decide(sharded=True)  # for DDP too: one precision for both
    backbone = Backbone(run.models["tied"], native.dtype, sharded=run.sharded)
    module = EITModule(backbone, KVDropout(checkpoint=True))
    module.compression_ratio = 0.5
    meter = Meter()
    trainer = Trainer(**run.settings() | {"max_steps": STEPS, "precision": native.precision, "callbacks": [meter]})
    trainer.fit(module, Rows(run.ranks, tokens - CONTINUATION, CONTINUATION, STEPS))
    (run.folder / f"figures.{rank}.json").write_text(json.dumps([meter.seconds, meter.peak]))


def figures(run: Run, tokens: int) -> None:
    """Print time and memory of FSDP2 and of DDP."""
    rows, seconds, peaks = [], {}, {}
    for name, sharded in (("ddp", False), ("fsdp2", True)):
        ranked = replace(run, sharded=sharded)
        start_processes(train, (ranked, free_port(), tokens), nprocs=run.ranks, start_method="spawn")
        ranks = [json.loads((run.folder / f"figures.{rank}.json").read_text()) for rank in range(run.ranks)]
        seconds[name], peaks[name] = (max(column) for column in zip(*ranks, strict=True))
        speed = run.ranks * tokens * (STEPS - WARM_UP) / seconds[name]
        rows.append({"strategy": name, "tokens/s": f"{speed:.0f}", "peak GiB/GPU": f"{peaks[name] / 2**30:.2f}"})
    ratios = {"time_fsdp2_over_ddp": seconds["fsdp2"] / seconds["ddp"]}
    ratios["memory_fsdp2_over_ddp"] = peaks["fsdp2"] / max(peaks["ddp"], 1)
    report("fsdp", rows, ratios, floors={"memory_fsdp2_over_ddp": 1 / run.ranks}, goals={"memory_fsdp2_over_ddp": 0.9})


def tiny_models(folder: Path) -> dict[str, str]:
    """Save random models of three layers with SmolLM2's tokenizer, with tied embeddings and without."""
    tokenizer = Backbone(EMBEDDED).load_tokenizer()
    for name in ("tied", "untied"):
        shape = {"intermediate_size": 96, "initializer_range": 0.1, "tie_word_embeddings": name == "tied"}
        save_llama(folder / name, tokenizer, layers=3, width=64, heads=(4, 2), **shape)
    return {name: str(folder / name) for name in ("tied", "untied")}


def save_adapter(folder: Path, pretrained: str) -> None:
    """Save an adapter with two random factors: in a fresh one, one factor and half of the gradients are zero."""
    torch.manual_seed(1)
    model = Backbone(pretrained, dtype="float32", lora=Lora(r=4)).load()[0]
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.05)
    model.save_pretrained(folder / "adapter")


def main() -> int:
    """Run checks and measurement; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gloo", action="store_true", help="run only the checks, on two CPU processes")
    parser.add_argument("--models", nargs=2, metavar=("TIED", "UNTIED"), help="folders of tiny models to check with")
    parser.add_argument("--pretrained", default=EMBEDDED, help="the model for throughput and memory")
    parser.add_argument("--tokens", type=int, default=2_048, help="tokens of a row in the measurement")
    arguments = parser.parse_args()
    gpus = torch.cuda.device_count()
    if not arguments.gloo and gpus < 2:
        print(f"NOT RUN: FSDP2 is for two GPUs or more and this machine has {gpus}; --gloo runs the checks on the CPU")
        return 2
    quiet()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        given = arguments.models and dict(zip(("tied", "untied"), arguments.models, strict=True))
        models = given or tiny_models(folder)
        save_adapter(folder, models["tied"])
        found = check(Run(folder, models, 2, "cpu" if arguments.gloo else "gpu"))
        for name in CHECKS:
            print(f"FAIL {name}: {found[name]}" if found[name] else f"PASS {name}", flush=True)
        if not arguments.gloo:
            figures(Run(folder, {"tied": arguments.pretrained}, gpus, "gpu"), arguments.tokens)
    return 1 if any(found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
