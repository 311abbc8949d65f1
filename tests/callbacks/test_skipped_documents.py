"""The counts of unusable documents and left out questions: the newest of every worker, added up."""

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from callbacks.skipped_documents import SkippedDocuments


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
