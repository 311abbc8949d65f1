"""The training of benchmarks/soak.py: the smallest model, an HTTP server of shards that fails on demand, a config."""

import json
import os
import random
import string
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

ROOT = Path(__file__).resolve().parents[1]
CONTEXT, CONTINUATION, ACCUMULATED = 64, 16, 2
MEASURED_EVERY = 10
"""Optimizer steps from one measurement of memory and open files to the next."""
PATIENCE = 300
"""Longest time between two micro-batches, in seconds."""
SHARDS, EPOCHS, DOCUMENT_WORDS = 10, 5, (12, 60)
"""About how many times a run reads the text: one shard per fiftieth of its steps."""


class Recorder(Callback):
    """Writes a line per micro-batch, in one write, to ``records.N.jsonl`` in the trainer's folder (N: the start).

    A line has the micro-batch's index, the steps done, the loss as ``float.hex`` and the documents; every tenth step
    also the process's resident memory in bytes and its number of open files.
    """

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = Path(trainer.default_root_dir)
        self.file = folder / f"records.{len(list(folder.glob('records.*'))):02}.jsonl"
        self.file.touch()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        line: dict[str, Any] = {"batch": batch_idx, "step": trainer.global_step}
        line |= {"loss": outputs["loss"].item().hex(), "documents": batch["document_ids"]}
        if (batch_idx + 1) % (MEASURED_EVERY * trainer.accumulate_grad_batches) == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            line |= {
                "resident": pages * os.sysconf("SC_PAGE_SIZE"),
                "files": sum(1 for _ in Path("/proc/self/fd").iterdir()),
            }
        with self.file.open("a") as lines:
            lines.write(json.dumps(line) + "\n")


def make_model(folder: Path) -> None:
    """Save a random two-layer Llama with 25 thousand weights and a byte tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from benchmarks.tiny_llama import save_llama

    words = ["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    raw = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", pad_token="</s>")
    shape = {"intermediate_size": 64, "head_dim": 16, "max_position_embeddings": 1024, "tie_word_embeddings": True}
    save_llama(folder, tokenizer, layers=2, width=32, heads=(2, 1), **shape)


def make_shards(steps: int) -> dict[str, list[dict[str, str]]]:
    """Shard's name -> rows {"id", "text"} of random words, as many as make ``steps`` in ``EPOCHS`` readings."""
    rng = random.Random(0)
    words = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(1, 7))) for _ in range(500)]
    size = steps * ACCUMULATED * (CONTEXT + CONTINUATION) // (EPOCHS * SHARDS)
    shards: dict[str, list[dict[str, str]]] = {}
    for number in range(SHARDS):
        rows: list[dict[str, str]] = []
        while sum(len(row["text"]) for row in rows) < size:
            text = " ".join(rng.choices(words, k=rng.randint(*DOCUMENT_WORDS)))
            rows.append({"id": f"{number}-{len(rows)}", "text": text})
        shards[f"{number}.jsonl"] = rows
    return shards


class Shards(ThreadingHTTPServer):
    """Serves shards on 127.0.0.1, with ranges. Each of ``faults`` damages a reply: "stall" and "drop" after half of it,
    "garbage" all of it, and "corrupt" every reply for one shard until ``corrupt``, its name, is None.
    """

    daemon_threads = True

    def __init__(self, shards: dict[str, list[dict[str, str]]]) -> None:
        self.contents = {
            name: "".join(json.dumps(row) + "\n" for row in rows).encode() for name, rows in shards.items()
        }
        self.faults: deque[str] = deque()
        self.corrupt: str | None = None
        self.replies = 0
        self.ended = Event()
        super().__init__(("127.0.0.1", 0), _Reply)
        self.urls = [self.url(name) for name in shards]
        Thread(target=self.serve_forever, daemon=True).start()

    def url(self, name: str | None) -> str:
        """The address of a shard."""
        return f"http://127.0.0.1:{self.server_port}/{name}"

    def close(self) -> None:
        """Release stalled replies and stop the server."""
        self.ended.set()
        self.shutdown()
        self.server_close()


class _Reply(BaseHTTPRequestHandler):
    """Answer one request in HTTP/1.0, which closes the connection after it."""

    server: Shards

    def do_HEAD(self) -> None:
        self._begin(self.server.contents[self.path.strip("/")])

    def do_GET(self) -> None:
        server, name = self.server, self.path.strip("/")
        reads = "Range" in self.headers  # fsspec also requests without a range and only reads the headers
        server.replies += reads
        fault = server.faults.popleft() if reads and server.faults else None
        if fault == "corrupt":
            server.corrupt = name
        content = server.contents[name]
        if fault == "garbage" or server.corrupt == name:
            content = b"<html>" + b"x" * (len(content) - 6)
        body = self._begin(content)
        self.wfile.write(body[: len(body) // 2] if fault in ("stall", "drop") else body)
        if fault == "stall":
            server.ended.wait()

    def _begin(self, content: bytes) -> bytes:
        """Write the headers; return the part of ``content`` to send."""
        asked = self.headers.get("Range")
        first, last = asked.removeprefix("bytes=").split("-") if asked else ("0", "")
        end = min(int(last or len(content)) + 1, len(content))
        self.send_response(206 if asked else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(end - int(first)))
        self.send_header("Content-Range", f"bytes {first}-{end - 1}/{len(content)}")
        self.end_headers()
        return content[int(first) : end]

    def log_message(self, *_: Any) -> None:
        """Silent."""


def named(class_path: str, **settings: Any) -> dict[str, Any]:
    """A class and its arguments as in YAML."""
    return {"class_path": class_path, "init_args": settings}


def config(model: str, urls: list[str], steps: int, saved_every: int) -> dict[str, Any]:
    """A ``train.py fit`` configuration: real eviction, two presses, two objectives, random ratios, all weights."""
    objectives = [named("sparsekv_pl.objectives.EIT"), named("sparsekv_pl.objectives.SelectionObjective")]
    presses = [named("kvpress.ExpectedAttentionPress"), named("kvpress.SnapKVPress", window_size=8)]
    press = named("sparsekv_pl.presses.EvictionAugPress", presses=presses)
    growing = named("sparsekv_pl.schedules.Linear", start=0.4, end=0.8, steps=steps)
    schedule = named("sparsekv_pl.schedules.Spread", low=0.1, schedule=growing)
    module = named(
        "sparsekv_pl.training.eit_module.EITModule",
        backbone={"pretrained": model, "dtype": "float32", "lora": None},
        eviction=named("sparsekv_pl.eviction.real.RealEviction", chunk_tokens=32, press=press),
        objective=named("sparsekv_pl.objectives.Mixed", objectives=objectives),
        optimizer=named("torch.optim.AdamW", lr=1e-3),
        lr_scheduler=named("torch.optim.lr_scheduler.OneCycleLR", max_lr=1e-3, total_steps=steps + 1),
    )
    retries = {"limit": 6, "first_wait": 0.2, "longest_wait": 1.0, "timeout_seconds": 2.0}
    data = named(
        "data.mixture.EvictionData",
        text=named("data.text.HubText", name="json", data_files=urls, block_size=8, retries=retries),
        context_tokens=CONTEXT,
        continuation_tokens=CONTINUATION,
        batch_size=1,
        retrieval_share=0.0,
    )
    trainer = {
        "accelerator": "cpu",
        "precision": "32-true",
        "max_epochs": -1,
        "max_steps": steps,
        "accumulate_grad_batches": ACCUMULATED,
        "gradient_clip_val": 1.0,
        "limit_val_batches": 0,
        "log_every_n_steps": 10,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": named("lightning.pytorch.loggers.TensorBoardLogger", save_dir=".", name="", version=""),
        "callbacks": [
            named("callbacks.curriculum.Curriculum", schedule=schedule),
            named("callbacks.throughput.Throughput"),
            named("callbacks.skipped_documents.SkippedDocuments"),
            named("callbacks.checkpoint.SafeCheckpoint", every_n_train_steps=saved_every),
            named("benchmarks.soak_source.Recorder"),
        ],
    }
    return {"seed_everything": 0, "model": module, "data": data, "trainer": trainer}


class Run:
    """Starts train.py in ``folder``, each time with its own log and records; later starts resume the first."""

    def __init__(self, folder: Path, config: Path, server: Shards) -> None:
        folder.mkdir()
        self.folder, self.config, self.server, self.starts = folder, config, server, 0

    def start(self) -> None:
        """Start train.py, and count the start."""
        arguments = ["fit", "--config", str(self.config), f"--trainer.default_root_dir={self.folder}"]
        arguments += [f"--trainer.logger.save_dir={self.folder}"]
        arguments += ["--ckpt_path=last"] if self.starts else []
        self.log = self.folder / f"log.{self.starts:02}.txt"
        self.records = self.folder / f"records.{self.starts:02}.jsonl"
        self.starts += 1
        quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(self.folder / "cache")}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "train.py", *arguments], cwd=ROOT, env=os.environ | quiet, stdout=log, stderr=log
            )

    def newest(self) -> int:
        """Index of this start's last micro-batch, -1 before its first."""
        if not self.records.exists():
            return -1
        with self.records.open("rb") as lines:
            lines.seek(max(0, self.records.stat().st_size - 4096))
            whole = lines.read().split(b"\n")[:-1]
        return json.loads(whole[-1])["batch"] if whole else -1

    def wait(self, ready: Callable[[], bool]) -> None:
        """Wait until ``ready``. Raises RuntimeError if the process ends, or makes no micro-batch for too long."""
        newest, deadline = -1, time.monotonic() + PATIENCE
        while True:
            ended = self.process.poll() is not None
            if ready():
                return
            if ended or time.monotonic() > deadline:
                raise RuntimeError(
                    f"{self.folder.name}: exit code {self.process.returncode}\n{self.log_text()[-2000:]}"
                )
            if newest != (newest := self.newest()):
                deadline = time.monotonic() + PATIENCE
            time.sleep(0.02)

    def reach(self, batch: int) -> None:
        """Wait for the next micro-batch."""
        self.wait(lambda: self.newest() >= batch)

    def end(self, number: int | None = None) -> int:
        """Send signal ``number`` if given, wait for the end, and return the exit code."""
        if number is not None:
            self.process.send_signal(number)
        self.wait(lambda: self.process.poll() is not None)
        return self.process.returncode

    def stop(self) -> None:
        """Kill the process if it still runs."""
        if self.starts and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def log_text(self) -> str:
        """The log of this start so far."""
        return self.log.read_text()

    def checkpoints(self) -> list[Path]:
        """Checkpoint files, latest step first."""
        from callbacks.checkpoint_files import latest_first

        return latest_first(self.folder.glob("checkpoints/*.ckpt"))

    def all_records(self) -> list[dict[str, Any]]:
        """Records of all starts, in order."""
        files = sorted(self.folder.glob("records.*"))
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]

    def line(self, part: str) -> str:
        """The last line of this start's log that contains ``part``."""
        found = [line for line in self.log_text().splitlines() if part in line]
        return found[-1] if found else f"({part!r} is not in {self.log})"
