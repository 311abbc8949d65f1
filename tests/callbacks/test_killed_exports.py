"""A run that was killed between its last checkpoint and its exports writes them when it is resumed."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kvpress import SnapKVPress

from callbacks.adapter_export import AdapterExport, export_whole
from callbacks.checkpoint import SafeCheckpoint
from callbacks.curriculum import Curriculum
from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.schedules import Linear
from sparsekv_pl.training.eit_module import EITModule
from tests.callbacks.checkpoint_cases import cut
from tests.tiny_training import MakeBackbone, MakeData, MakeTrainer

STEPS = 3
RUN = {"checkpoints", "checkpoint-2", "checkpoint-3", "final", "merged"}
TIMED = {"training.json", "README.md"}
"""Files that hold the seconds of the run."""


@pytest.fixture
def fit(
    tiny_backbone: MakeBackbone, tiny_data: MakeData, tiny_trainer: MakeTrainer, tmp_path: Path
) -> Callable[..., None]:
    """Three steps with a checkpoint after the second and the last; ``last`` goes on."""

    def run(last: bool = True) -> None:
        export = AdapterExport(str(tmp_path), merge=True)
        saver = SafeCheckpoint(2, dirpath=str(tmp_path / "checkpoints"))
        trainer = tiny_trainer(Curriculum(Linear()), export, saver, enable_checkpointing=True, max_steps=STEPS)
        module = EITModule(tiny_backbone(), RealEviction(SnapKVPress(window_size=8)))
        trainer.fit(module, tiny_data(), ckpt_path="last" if last else None)

    return run


def contents(folder: Path) -> dict[str, bytes]:
    """Return the contents of the files without the run's time."""
    files = [path for name in ("final", "merged") for path in sorted((folder / name).iterdir())]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.name not in TIMED}


def test_exports_that_are_missing_or_torn_are_written_at_resume(fit: Callable[..., None], tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fit(last=False)
    expected = contents(tmp_path)

    def nothing(_: Path) -> None:
        pass

    def remove(folder: Path) -> None:
        shutil.rmtree(folder)

    def hide(folder: Path) -> None:
        """As a kill between the two renames of a replaced folder leaves it."""
        folder.rename(folder.with_name(f".{folder.name}.before.partial"))

    def tear(folder: Path) -> None:
        cut(next(folder.glob("*.safetensors")))

    def forget(folder: Path) -> None:
        (folder / "training.json").unlink()

    for damage in (nothing, remove, hide, tear, forget):
        for name in ("final", "merged"):
            damage(tmp_path / name)
        fit()
        assert contents(tmp_path) == expected, damage.__name__
        assert {path.name for path in tmp_path.iterdir()} == RUN
        assert all(export_whole(tmp_path / name, STEPS) for name in ("final", "merged"))


def test_the_last_checkpoint_is_of_the_model_before_it_was_merged(fit: Callable[..., None], tmp_path: Path) -> None:
    fit(last=False)
    saved = torch.load(tmp_path / "checkpoints" / "step=3.ckpt", weights_only=True)["state_dict"]
    assert saved.keys() == torch.load(tmp_path / "checkpoints" / "step=2.ckpt", weights_only=True)["state_dict"].keys()


def test_a_kill_while_an_export_is_written_leaves_none_that_is_half(
    fit: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def die(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("callbacks.adapter_export.shutil.copy", die)  # the last that merged's writer does
        fit(last=False)
    assert not (tmp_path / "merged").exists()
    fit()
    assert export_whole(tmp_path / "merged", STEPS)
