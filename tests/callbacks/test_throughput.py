"""What training logs of its data: throughput by tokens and time, and documents and questions that were left out."""

import resource
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate, get_worker_info
from typing_extensions import override

from callbacks.skipped_documents import SkippedDocuments
from callbacks.throughput import Throughput, peak_memory_gib
from tests.tiny_training import MakeTrainer

CONTEXT, CONTINUATION, BATCH = 7, 3, 2
TOKENS = BATCH * (CONTEXT + CONTINUATION)


class Windows(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {
            "context_ids": torch.zeros(CONTEXT, dtype=torch.int64),
            "continuation_ids": torch.zeros(CONTINUATION, dtype=torch.int64),
        }


class Timed(pl.LightningModule):
    """Training batches last the given seconds, a validation batch 1000."""

    def __init__(self, seconds: list[float]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seconds = iter(seconds)
        self.now = 5.0
        self.logged: dict[int, dict[str, float]] = {}

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.now += next(self.seconds)
        return self.weight * 1.0

    @override
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.now += 1000.0

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        self.logged.setdefault(self.trainer.global_step, {})[name.removeprefix("throughput/")] = value
        super().log(name, value, *args, **kwargs)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def run(tiny_trainer: MakeTrainer) -> Callable[..., pl.Trainer]:
    def fit(module: Timed, callback: Throughput, lengths: list[int] | None = None, **settings: Any) -> pl.Trainer:
        callback.clock = lambda: module.now
        trainer = tiny_trainer(callback, **({"log_every_n_steps": 1} | settings))
        entries = {} if lengths is None else {"context_lengths": lengths}
        loader = DataLoader(Windows(), batch_size=BATCH, collate_fn=lambda rows: default_collate(rows) | entries)
        trainer.fit(module, loader, loader)
        return trainer

    return fit


def test_speeds_are_averages_over_a_sliding_window(run: Callable[..., pl.Trainer]) -> None:
    module = Timed([1.0, 3.0, 5.0, 11.0])
    trainer = run(module, Throughput(window=2))
    spans = {1: 1.0, 2: 4.0, 3: 8.0, 4: 16.0}
    steps = {1: 1, 2: 2, 3: 2, 4: 2}
    assert {s: m["tokens_per_second"] for s, m in module.logged.items()} == {
        s: TOKENS * steps[s] / spans[s] for s in spans
    }
    assert {s: m["steps_per_second"] for s, m in module.logged.items()} == {s: steps[s] / spans[s] for s in spans}
    assert trainer.callback_metrics["throughput/tokens_per_second"] == TOKENS * 2 / 16


def test_the_padding_of_contexts_is_not_counted(run: Callable[..., pl.Trainer]) -> None:
    module = Timed([2.0] * 4)
    run(module, Throughput(), lengths=[CONTEXT, 4])
    assert {m["tokens_per_second"] for m in module.logged.values()} == {(CONTEXT + 4 + BATCH * CONTINUATION) / 2}


def test_accumulated_batches_are_one_step(run: Callable[..., pl.Trainer]) -> None:
    module = Timed([1.0] * 6)
    run(module, Throughput(), accumulate_grad_batches=3, max_steps=2)
    assert sorted(module.logged) == [1, 2]
    assert module.logged[2]["steps_per_second"] == 2 / 6
    assert module.logged[2]["tokens_per_second"] == TOKENS


def test_validation_and_the_sanity_check_are_not_counted(run: Callable[..., pl.Trainer]) -> None:
    module = Timed([2.0] * 6)
    run(module, Throughput(), max_steps=6, val_check_interval=2, limit_val_batches=1)
    assert module.now >= 1000 * 3
    assert {s: m["tokens_per_second"] for s, m in module.logged.items()} == dict.fromkeys(range(1, 7), TOKENS / 2)


@pytest.mark.parametrize(("every_n_steps", "steps"), [(None, [3, 6]), (2, [2, 4, 6])])
def test_it_logs_every_n_steps(run: Callable[..., pl.Trainer], every_n_steps: int | None, steps: list[int]) -> None:
    module = Timed([1.0] * 6)
    run(module, Throughput(every_n_steps), max_steps=6, log_every_n_steps=3)
    assert sorted(module.logged) == steps


def test_a_second_fit_starts_counting_anew(run: Callable[..., pl.Trainer]) -> None:
    callback = Throughput()
    run(Timed([1.0] * 4), callback)
    module = Timed([4.0] * 4)
    module.now = 500.0
    run(module, callback)
    assert module.logged[4]["tokens_per_second"] == TOKENS / 4


def test_peak_memory_is_the_process_own_on_cpu(run: Callable[..., pl.Trainer]) -> None:
    module = Timed([1.0] * 4)
    run(module, Throughput())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    assert 0.05 < module.logged[4]["peak_memory_gib"] <= peak


@pytest.mark.parametrize(("platform", "unit"), [("linux", 2**10), ("darwin", 1)])
def test_the_unit_of_peak_memory(monkeypatch: pytest.MonkeyPatch, platform: str, unit: int) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=3 * 2**30 // unit))
    assert peak_memory_gib(torch.device("cpu")) == 3.0


def test_peak_memory_of_a_gpu_is_what_its_tensors_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: (device.index + 1) * 2**30)
    assert peak_memory_gib(torch.device("cuda", 1)) == 2.0


@pytest.mark.parametrize("settings", [{"every_n_steps": 0}, {"window": 0}])
def test_bad_settings_are_named(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"Throughput.{next(iter(settings))} is 0: give 1"):
        Throughput(**settings)


class Counts(IterableDataset[dict[str, Any]]):
    """Worker w skips 10 ** w documents and leaves out twice as many questions for each batch."""

    def __init__(self, questions: bool) -> None:
        self.questions = questions

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker = 0 if info is None else info.id
        for batch in range(1, 10):
            count = batch * 10**worker
            left_out = {"left_out_questions": {"speakers": 2 * count}} if self.questions else {}
            yield {"context_ids": torch.zeros(1, 2), "skipped_documents": count} | left_out


class Logs(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.logged: dict[str, list[tuple[int, float]]] = {}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:  # noqa: ARG002
        return self.weight * 1.0

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        self.logged.setdefault(name, []).append((self.trainer.global_step, value))
        super().log(name, value, *args, **kwargs)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("workers", "every", "expected"),
    [(0, 2, [(2, 2), (4, 4), (6, 6)]), (2, 1, [(2, 11), (3, 12), (4, 22), (5, 23), (6, 33)])],
)
def test_the_newest_count_of_every_worker_is_added_up(tiny_trainer, workers, every, expected):
    module = Logs()
    trainer = tiny_trainer(SkippedDocuments(), max_steps=6, log_every_n_steps=every)
    trainer.fit(module, DataLoader(Counts(questions=every == 1), batch_size=None, num_workers=workers))
    assert module.logged.pop("data/skipped_documents") == expected
    twice = [(step, 2 * count) for step, count in expected]
    assert module.logged == ({"data/left_out_questions/speakers": twice} if every == 1 else {})
    assert trainer.callback_metrics["data/skipped_documents"] == expected[-1][1]
