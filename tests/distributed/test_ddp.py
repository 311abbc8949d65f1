"""Two ranks with a batch each train as one process does with both: gradients, draws, logs, validation, curriculum."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.multiprocessing import start_processes

from tests.distributed.ranks import CASES, RANKS, rank, run
from tests.processes import free_port


@dataclass
class Ranks:
    """What two ranks left in ``folder``."""

    folder: Path

    def reports(self, name: str) -> list[dict[str, list[Any]]]:
        return [torch.load(self.folder / f"{name} {number}.pt") for number in range(RANKS)]


@pytest.fixture(scope="module")
def ranks(tiny_models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """All cases in one start of the processes: to import the library takes longer than to train."""
    folder = tmp_path_factory.mktemp("ranks")
    start_processes(rank, (free_port(), tiny_models["llama"], folder), nprocs=RANKS, start_method="forkserver")
    return Ranks(folder)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_train_as_one_process_with_both_batches(
    name: str, ranks: Ranks, tiny_models: dict[str, str], tmp_path: Path
) -> None:
    alone = run(name, tiny_models["llama"], tmp_path)
    assert len(alone["gradients"]) == CASES[name].steps
    for reported in ranks.reports(name):
        assert reported["drawn"] == alone["drawn"]
        for found, expected in zip(reported["gradients"], alone["gradients"], strict=True):
            scale = max(float(gradient.abs().max()) for gradient in expected.values())
            assert scale > 1e-4
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * scale)
        for found, expected in zip(reported["logged"], alone["logged"], strict=True):
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)
        assert reported["validated"] == [pytest.approx(one, rel=1e-4) for one in alone["validated"]]
    exported = list((ranks.folder / name).iterdir())
    assert [folder.name for folder in exported] == ["final"]
    files = (next((at / name / "final").glob("*.safetensors")) for at in (ranks.folder, tmp_path))
    weights, expected = map(load_file, files)
    torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-4)


def test_the_adaptive_ratio_moved_with_validation(ranks: Ranks) -> None:
    """Of three batches, one rank has two: what it was given again counts once."""
    reported = ranks.reports("adaptive")
    assert len({ratio for ratio, _ in reported[0]["drawn"]}) > 2
    assert all(len(one["validated"]) == CASES["adaptive"].steps for one in reported)


def test_draws_and_ratios_differ_from_step_to_step(ranks: Ranks) -> None:
    ratios, presses = zip(*ranks.reports("spread")[0]["drawn"], strict=True)
    assert len(set(ratios)) == len(ratios) == 20
    assert set(presses) == {0, 1}
