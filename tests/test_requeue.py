"""A training that Slurm requeues, by Lightning itself, ends as one that was never stopped."""

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import load_file
from torch import Tensor

from tests.cluster_cases import QWEN, ROOT, SLURM, dry, put_on_path
from train import TrainCommandLine


class Signal(Callback):
    """The signal that Slurm sends before the time limit, in the middle of the second step's accumulation."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        if batch_idx == 3 and trainer.ckpt_path is None:
            os.kill(os.getpid(), signal.SIGUSR1)


def test_a_requeued_training_ends_as_one_that_was_never_stopped(
    tiny_models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["pytest"])
    put_on_path(tmp_path / "bin", "scontrol", f'echo "$@" >> {tmp_path}/scontrol.log', monkeypatch)
    run = tmp_path / "run"
    more = ["--config", str(ROOT / "configs" / "train" / "small.yaml"), "--trainer.accumulate_grad_batches=2"]
    more += [f"--model.backbone.pretrained={tiny_models['qwen3']}", "--model.backbone.dtype=float32"]
    more += ["--data.batch_size=2", "--data.context_tokens=96", "--data.continuation_tokens=16"]
    more += ["--model.eviction.anchors.recent=8", "--trainer.limit_val_batches=0", "--trainer.max_steps=3"]
    more += [f"--trainer.default_root_dir={run}", f"--trainer.logger.save_dir={run}"]
    more += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    command = dry("train.sbatch", str(QWEN), *more, SLURM_NTASKS_PER_NODE="1")

    def train() -> dict[str, Tensor]:
        arguments = command[command.index("train.py") + 1 :]
        settings = {"save_config_kwargs": {"overwrite": True}, "trainer_defaults": {"callbacks": [Signal()]}}
        TrainCommandLine(args=arguments, **settings)
        return load_file(run / "final" / "adapter_model.safetensors")

    unstopped = train()
    assert (tmp_path / "scontrol.log").read_text() == "requeue 77\n"
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoints")  # Slurm would have ended the job before these
    requeued = train()
    assert (run / "checkpoints" / "step=3.ckpt").exists(), "a resumed run's checkpoints lie where they did"
    assert requeued.keys() == unstopped.keys()
    assert all(requeued[name].equal(unstopped[name]) for name in unstopped)
    assert torch.load(run / "hpc_ckpt_1.ckpt", weights_only=True)["global_step"] == 2
