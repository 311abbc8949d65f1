"""Real processes of train.py and evaluate.py, killed with SIGKILL in the middle of their work, then run again."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from tests.processes import ROOT, Started, free_port

ACCUMULATED, STEPS, SAVED, KILLED_IN = 2, 4, 2, 6
"""Checkpoints follow steps 2 and 4; the kill comes in step 4, when its first micro-batch (of index 6) has its
gradient."""


class Recorder(Callback):
    """Writes a line for every micro-batch of this rank, whole at once; ``wait_in`` waits for the kill in that batch."""

    def __init__(self, folder: str, wait_in: int | None = None) -> None:
        self.folder, self.wait_in = Path(folder), wait_in

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        module: Any = pl_module
        line = {
            "batch": batch_idx,
            "loss": outputs["loss"].item().hex(),
            "compression_ratio": module.compression_ratio.hex(),
            "press": getattr(module.press, "drawn", None),
            "documents": batch["document_ids"],
            "tokens": batch["context_ids"].sum().item(),
        }
        with (self.folder / f"{trainer.global_rank}.jsonl").open("a") as lines:
            lines.write(json.dumps(line) + "\n")
        if batch_idx == self.wait_in:
            time.sleep(600)


def config(model: str, folder: Path, ranks: int, workers: int, eviction: dict[str, Any]) -> dict[str, Any]:
    schedule = {"class_path": "sparsekv_pl.schedules.Linear", "init_args": {"start": 0.4, "end": 0.8, "steps": 4}}
    spread = {"class_path": "sparsekv_pl.schedules.Spread", "init_args": {"low": 0.1, "schedule": schedule}}
    keeper = {"dirpath": str(folder), "filename": "{step}", "every_n_train_steps": SAVED, "save_top_k": -1}
    module = {
        "backbone": {"pretrained": model, "dtype": "float32", "lora": {"r": 4}},
        "eviction": eviction,
        "validation_eviction": press("sparsekv_pl.eviction.real.RealEviction", press=SNAPKV),
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
        "lr_scheduler": {
            "class_path": "torch.optim.lr_scheduler.OneCycleLR",
            "init_args": {"max_lr": 0.01, "total_steps": STEPS + 1},
        },
    }
    data = {
        "context_tokens": 96,
        "continuation_tokens": 16,
        "batch_size": 2,
        "num_workers": workers,
    }
    ddp = {
        "class_path": "lightning.pytorch.strategies.DDPStrategy",
        "init_args": {"process_group_backend": "gloo"},
    }
    trainer = {
        "default_root_dir": str(folder),
        "accelerator": "cpu",
        "devices": ranks,
        "strategy": "auto" if ranks == 1 else ddp,
        "max_steps": STEPS,
        "max_epochs": -1,
        "accumulate_grad_batches": ACCUMULATED,
        "gradient_clip_val": 1.0,
        "limit_val_batches": 0,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [
            {"class_path": "callbacks.curriculum.Curriculum", "init_args": {"schedule": spread}},
            {"class_path": "tests.test_kill.Recorder", "init_args": {"folder": str(folder)}},
            {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": keeper},
        ],
    }
    return {
        "seed_everything": 0,
        "model": {"class_path": "sparsekv_pl.training.eit_module.EITModule", "init_args": module},
        "data": {"class_path": "data.mixture.EvictionData", "init_args": data},
        "trainer": trainer,
    }


def start(
    path: Path, settings: dict[str, Any], wait_in: int | None = None, resume: Path | None = None
) -> list[Started]:
    """The processes of train.py, one per rank, started as torchrun starts them."""
    path.mkdir(exist_ok=True)
    recorder: dict[str, Any] = settings["trainer"]["callbacks"][1]["init_args"]
    recorder["wait_in"] = wait_in
    (path / "run.yaml").write_text(yaml.safe_dump(settings))
    command = ["train.py", "fit", "--config", str(path / "run.yaml")] + ([f"--ckpt_path={resume}"] if resume else [])
    ranks = settings["trainer"]["devices"]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks), "NODE_RANK": "0"}
    places = [meeting | {"LOCAL_RANK": str(rank)} for rank in range(ranks)] if ranks > 1 else [{}]
    return [Started(command, path / f"log.{rank}", **place) for rank, place in enumerate(places)]


def kill_in(path: Path, ranks: list[Started]) -> None:
    """SIGKILL, when every rank has the gradient of the micro-batch that it waits in."""
    while not all(len(lines(path, rank)) > KILLED_IN for rank in range(len(ranks))):
        for process in ranks:
            assert process.poll() is None, process.printed[-2000:]
        time.sleep(0.05)
    for process in ranks:
        process.kill()
        assert process.wait() == -signal.SIGKILL


def end(ranks: list[Started]) -> None:
    for process in ranks:
        assert process.wait() == 0, process.printed[-2000:]


def lines(path: Path, rank: int) -> list[dict[str, Any]]:
    file = path / f"{rank}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def assert_same(one: Any, other: Any, where: str = "checkpoint") -> None:
    """Bit for bit, all the way down."""
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for name in one:
            assert_same(one[name], other[name], f"{where}.{name}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for i, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_same(left, right, f"{where}[{i}]")
    else:
        assert one == other, where


def state(path: Path) -> dict[str, Any]:
    """All of the last checkpoint; of the callbacks' state the curriculum's: others hold paths and seconds."""
    saved = torch.load(path / f"step={STEPS}.ckpt", weights_only=True)
    saved["callbacks"] = saved["callbacks"].get("Curriculum")
    return saved


def press(name: str, **settings: Any) -> dict[str, Any]:
    return {"class_path": name, "init_args": settings}


SNAPKV = press("kvpress.SnapKVPress", window_size=8)
DRAWN = press(
    "sparsekv_pl.eviction.real.RealEviction",
    press=press(
        "sparsekv_pl.presses.EvictionAugPress", presses=[SNAPKV, press("sparsekv_pl.presses.BlockDropoutPress")]
    ),
)
DROPOUT = press("sparsekv_pl.eviction.dropout.KVDropout")


@pytest.mark.parametrize(
    ("ranks", "workers", "eviction"),
    [(1, 0, DROPOUT), (2, 2, DRAWN)],
    ids=["1 rank 0 workers", "2 ranks 2 workers"],
)
def test_killed_and_resumed_equals_uninterrupted(
    ranks: int, workers: int, eviction: dict[str, Any], tiny_models: dict[str, str], tmp_path: Path
) -> None:
    def settings(path: Path) -> dict[str, Any]:
        return config(tiny_models["llama"], path, ranks, workers, eviction)

    paths = [tmp_path / name for name in ("whole", "killed", "resumed")]
    whole, killed, resumed = paths
    reference = start(whole, settings(whole))
    try:
        kill_in(killed, start(killed, settings(killed), wait_in=KILLED_IN))
        assert sorted(path.name for path in killed.glob("*.ckpt")) == [f"step={SAVED}.ckpt"]
        end(start(resumed, settings(resumed), resume=killed / f"step={SAVED}.ckpt"))
        end(reference)
    finally:
        for process in reference:
            process.kill()
    done = SAVED * ACCUMULATED
    for rank in range(ranks):
        expected = lines(whole, rank)
        assert [line["batch"] for line in expected] == list(range(STEPS * ACCUMULATED))
        assert lines(killed, rank) == expected[: KILLED_IN + 1]
        assert lines(resumed, rank) == expected[done:]
    assert_same(state(whole), state(resumed))


PIECES = 2 * 5 + 1
"""Batches x points of the run below, and the views of its tokens."""


def command(output: Path, pretrained: str) -> list[str]:
    config = ROOT / "configs" / "evaluate" / "niah.yaml"
    arguments = [f"--model.backbone.pretrained={pretrained}", "--model.backbone.dtype=float32"]
    arguments += [f"--model.output={output}", f"--trainer.logger.save_dir={output}", "--trainer.accelerator=cpu"]
    arguments += ["--data.lengths=[512]", "--data.depths=[0.5]", "--data.cases_per_cell=2", "--data.batch_size=2"]
    arguments += ["--trainer.precision=32-true", "--trainer.enable_progress_bar=false"]
    return ["evaluate.py", "test", "--config", str(config), *arguments]


def finished(output: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in (output / "results").glob("*.jsonl"))


def run(output: Path, pretrained: str) -> list[dict[str, object]]:
    process = Started(command(output, pretrained), output.with_suffix(".log"))
    assert process.wait() == 0, process.printed[-2000:]
    rows = json.loads((output / "report.json").read_text())["rows"]
    return [{name: row[name] for name in ("press", "compression_ratio", "base", "cases", "f1_base")} for row in rows]


def test_killed_and_rerun_equals_uninterrupted(tiny_models: dict[str, str], tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", tiny_models["llama"])
    assert finished(tmp_path / "whole") == PIECES
    halves = tmp_path / "halves"
    process = Started(command(halves, tiny_models["llama"]), tmp_path / "log")
    while process.poll() is None and finished(halves) < 3:
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it was over before it could be killed: give it more to do"
    kept = {path: path.read_bytes() for path in (halves / "results").glob("*.jsonl")}
    assert 3 <= finished(halves) < PIECES
    assert not (halves / "report.json").exists()
    assert run(halves, tiny_models["llama"]) == whole
    assert finished(halves) == PIECES
    for path, lines in kept.items():
        whole_lines = lines[: lines.rfind(b"\n") + 1]
        assert path.read_bytes().startswith(whole_lines), "what was finished before the kill was done again"
