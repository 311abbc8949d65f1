"""A stream that stalls, drops or returns garbage is retried; one that stays broken stops with an exact state."""

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from data.documents import Document, SourceFailed
from data.hub_stream import HubBlocks
from data.mixture import EvictionData
from data.retries import Retries
from data.text import Splits, TextSource
from tests.data.faulty import ALL, DROP, GARBAGE, LATE, blocks, names, read


@pytest.mark.parametrize(
    ("faults", "expected"),
    [
        ({6: [DROP]}, [1]),
        ({0: [DROP], 23: [GARBAGE]}, [1, 1]),
        ({7: [DROP, GARBAGE, LATE, DROP, DROP]}, [1, 2, 4, 8, 16]),
    ],
)
def test_a_stream_that_fails_for_a_while_loses_and_repeats_nothing(faults, expected, waits, caplog):
    source = blocks({row: list(errors) for row, errors in faults.items()})
    assert read(source) == ALL == read(source)
    assert waits == expected
    assert caplog.text.count("Opening it again") == len(expected)


def test_a_stall_is_ended_and_its_late_thread_changes_nothing(waits):
    stall = threading.Event()
    source = blocks({9: [stall]}, Retries(timeout_seconds=0.3))
    found = [name for _ in range(3) for name in names(source.next())]
    assert (waits, source.state_dict()["stream"]) == ([1], {"row": 12})
    stall.set()
    for thread in threading.enumerate():
        if thread.name == "text source":
            thread.join(5)
    assert found + read(source) == ALL


def test_the_limit_stops_with_one_error_and_an_exact_state(waits):
    source = blocks({10: [DROP] * 99}, Retries(limit=3, longest_wait=2))
    first = [name for _ in range(2) for name in names(source.next())]
    for _ in range(2):  # asked again it fails again: it must not look like the end of the epoch
        with pytest.raises(
            SourceFailed, match=r"dataset 'fake'.*not readable in 4 tries \(ConnectionError: reset.*\).*resume"
        ):
            source.next()
    assert waits == [1, 2, 2] * 2
    state = json.loads(json.dumps(source.state_dict()))
    healthy = blocks({})
    healthy.load_state_dict(state)
    assert first + read(healthy) == ALL


@pytest.mark.parametrize(
    "settings", [{"limit": -1}, {"first_wait": -1.0}, {"longest_wait": 0.5}, {"timeout_seconds": 0.0}]
)
def test_retries_say_what_is_wrong_with_them(settings):
    with pytest.raises(ValueError, match=rf"retries\.{next(iter(settings))} is"):
        Retries(**settings)


@dataclass
class Healing(TextSource):
    """Rows of a stream that drops at row 22 for as long as the file ``ill`` is there, the same in every worker."""

    ill: str = field(compare=False)

    def documents(self) -> Iterator[Document]:
        return iter(())

    def blocks(self, keep: Callable[[str], bool], number: int = 0, total: int = 1) -> HubBlocks:  # noqa: ARG002
        return blocks({22: [DROP] * 99} if Path(self.ill).exists() else {}, Retries(limit=1, first_wait=0))


class Reads(LightningModule):
    """A module that records its batches."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.found: list[list[int]] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:  # noqa: ARG002
        self.found.append(batch["context_ids"].flatten().tolist())
        return (self.weight * batch["context_ids"].float().std()).cos()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.1)


@pytest.mark.parametrize(("workers", "accumulated"), [(0, 1), (0, 2), (2, 1)])
def test_a_lost_source_stops_with_a_checkpoint_that_goes_on_where_it_was(tokenizer, tmp_path, workers, accumulated):
    ill, saved = tmp_path / "ill", tmp_path / "saved" / "last.ckpt"

    def fit(resume: bool = False) -> Reads:
        settings: dict[str, Any] = {"context_tokens": 20, "continuation_tokens": 4, "retrieval_share": 0.0}
        settings |= {"validation_windows": 0, "validation_needles": 0, "splits": Splits(1, 0, 0)}
        # Three rows: those of a batch before the one that cannot be read must not be lost.
        data = EvictionData(Healing(str(ill)), batch_size=3, num_workers=workers, **settings)
        quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = Trainer(
            max_steps=6,
            accumulate_grad_batches=accumulated,
            accelerator="cpu",
            callbacks=ModelCheckpoint(saved.parent, "{step}", save_last=True, save_on_exception=True),
            limit_val_batches=0,
            **quiet,
        )
        module = Reads(tokenizer)
        with pytest.raises(SourceFailed, match=r"dataset 'fake'.*2 tries") if ill.exists() else nullcontext():
            trainer.fit(module, data, ckpt_path=min(saved.parent.glob("*.ckpt")) if resume else None)
        return module

    ill.touch()
    stopped = fit()
    ill.unlink()
    resumed = fit(resume=True)
    shutil.rmtree(saved.parent)
    whole = fit()
    done = len(stopped.found) // accumulated * accumulated
    assert 0 < done < len(whole.found) == 6 * accumulated
    assert stopped.found[:done] + resumed.found == whole.found
    assert torch.equal(resumed.weight, whole.weight)
