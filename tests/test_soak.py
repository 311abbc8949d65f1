"""Parts of the soak benchmark: its comparisons, its server and its training."""

import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from benchmarks.soak import flat_files, flat_memory, readings, same_documents, same_parameters, same_steps
from benchmarks.soak_source import ACCUMULATED, Recorder, Shards, config, make_model, make_shards
from data.mixture import EvictionData
from data.text import HubText
from train import TrainCommandLine

Record = dict[str, Any]
STEPS, MIB = 200, 2**20
DOCUMENTS = {f"json/{number}" for number in range(8)}


@pytest.fixture
def records() -> list[Record]:
    """Of 200 steps: each document in two windows, the second of which begins the next one; measured every tenth."""
    found: list[Record] = []
    for batch in range(STEPS * ACCUMULATED):
        names = [f"json/{number % 8}" for number in ((batch + 1) // 2, batch // 2 + 1)]
        line = {"batch": batch, "step": (batch + 1) // ACCUMULATED, "loss": (batch / 3).hex()}
        found.append(line | {"documents": [" + ".join(dict.fromkeys(names))]})
        if (batch + 1) % (10 * ACCUMULATED) == 0:
            found[-1] |= {"resident": 500 * MIB, "files": 20}
    return found


def lost(records: list[Record]) -> list[Record]:
    return records[:40] + records[42:]


def other_loss(records: list[Record]) -> list[Record]:
    records[77]["loss"] = (25.000001).hex()
    return records


def other_step(records: list[Record]) -> list[Record]:
    records[77]["step"] += 1
    return records


def made_again_otherwise(records: list[Record]) -> list[Record]:
    """A step that is done again, and right only then."""
    return [*records[:100], records[100] | {"loss": (1.0).hex()}, *records[90:]]


def read_again(records: list[Record]) -> list[Record]:
    records[160]["documents"] = ["json/3"]
    return records


@pytest.mark.parametrize("spoil", [lost, other_loss, other_step, made_again_otherwise, read_again])
def test_a_difference_of_the_disturbed_run_is_found(
    spoil: Callable[[list[Record]], list[Record]], records: list[Record]
) -> None:
    again = [*records[:100], *records[90:]]
    fine = same_steps(records, again, STEPS * ACCUMULATED)
    assert fine.passed and "400 of 400 micro-batches, 10 of them made again, 0 lost [], 0 different []" in fine.figures
    assert not same_steps(records, spoil(deepcopy(records)), STEPS * ACCUMULATED).passed


def test_a_document_is_counted_once_for_every_reading(records: list[Record]) -> None:
    windows = ["a", "a + b", "b", "c + a", "d", "d"]
    made = [{"batch": batch, "documents": [names]} for batch, names in enumerate(windows)]
    assert readings([*made, *made[2:4]]) == {"a": 2, "b": 1, "c": 1, "d": 1}
    assert same_documents(records, [*records[:100], *records[90:]], DOCUMENTS).passed


def test_a_document_that_is_read_too_often_or_not_at_all_is_found(records: list[Record]) -> None:
    repeated = read_again(deepcopy(records))
    assert not same_documents(records, repeated, DOCUMENTS).passed
    assert same_documents(repeated, repeated, DOCUMENTS).passed  # one reading more is where a run ends
    twice = deepcopy(repeated)
    twice[200]["documents"] = ["json/3"]
    assert not same_documents(twice, twice, DOCUMENTS).passed
    assert not same_documents(records, records, DOCUMENTS | {"json/8"}).passed
    assert not same_documents(records, records, DOCUMENTS - {"json/0"}).passed


def test_growing_memory_and_files_left_open_are_found(records: list[Record]) -> None:
    assert flat_memory(records, STEPS).figures == (
        "500.0 MiB after step 20, 500.0 MiB at the end (+0.00%), at most 500.0 MiB"
    )
    for record in records:
        if record["step"] < 20 and "resident" in record:
            record["resident"] = 300 * MIB  # warming up does not count
        elif "resident" in record:
            record["resident"] += record["step"] * MIB // 22
    assert flat_memory(records, STEPS).passed
    for record in records[20 * ACCUMULATED :]:
        if "resident" in record:
            record["resident"] += record["step"] * MIB // 22
    grown = flat_memory(records, STEPS)
    assert not grown.passed and "(+3." in grown.figures
    assert flat_files(records, STEPS).passed
    records[-1]["files"] = 21
    assert not flat_files(records, STEPS).passed


def test_other_parameters_are_found(tmp_path: Path) -> None:
    saved: dict[str, Any] = {"state_dict": {"w": torch.ones(3)}, "optimizer_states": [{"state": {0: torch.zeros(3)}}]}
    torch.save(saved, tmp_path / "one")
    torch.save(saved | {"callbacks": "seconds"}, tmp_path / "same")
    saved["optimizer_states"][0]["state"][0][1] = 1e-9
    torch.save(saved, tmp_path / "other")
    assert same_parameters(tmp_path / "one", tmp_path / "same").passed
    assert not same_parameters(tmp_path / "one", tmp_path / "other").passed


@pytest.fixture
def server() -> Iterator[Shards]:
    made = Shards(make_shards(STEPS))
    yield made
    made.close()


def test_the_config_is_what_train_py_takes(server: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pytest"])
    make_model(tmp_path / "model")
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config(str(tmp_path / "model"), server.urls, STEPS, saved_every=5)))
    made = TrainCommandLine(args=["--config", str(path)], run=False, save_config_callback=None)
    assert isinstance(made.datamodule, EvictionData) and isinstance(made.datamodule.text, HubText)
    assert made.datamodule.text.data_files == server.urls
    assert made.trainer.max_steps == STEPS and made.trainer.accumulate_grad_batches == ACCUMULATED
    callbacks: Any = made.trainer.callbacks  # type: ignore[attr-defined]
    assert any(type(callback).__name__ == Recorder.__name__ for callback in callbacks)
    assert sum(parameter.numel() for parameter in made.model.parameters() if parameter.requires_grad) < 30_000
