"""Checkpoints are complete or absent, the newest readable one is used, and code in one is not run."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import torch
import torch.distributed.checkpoint as dcp

from callbacks.checkpoint import SafeCheckpoint
from callbacks.checkpoint_files import chosen, fault, newest_readable, saved_whole
from tests.callbacks.checkpoint_cases import Line, Malice, cut, flip, names
from tests.tiny_training import MakeTrainer


@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_what_was_there_stays_until_the_new_one_is_whole(folder: bool, tmp_path: Path) -> None:
    def write(content: str, fail: bool = False) -> None:
        with saved_whole(target, None) as partial:
            if folder:
                partial.mkdir()
            (partial / "content" if folder else partial).write_text(content)
            assert not fail
        assert names(tmp_path) == {"it.ckpt"}

    def read() -> str:
        return (target / "content" if folder else target).read_text()

    target = tmp_path / "it.ckpt"
    write("old")
    with pytest.raises(AssertionError):
        write("half", fail=True)
    assert names(tmp_path) == {"it.ckpt"}
    assert read() == "old"
    write("new")
    assert read() == "new"


def test_what_a_killed_process_left_is_deleted(fit: Any, tmp_path: Path) -> None:
    (tmp_path / ".step=9.ckpt.partial").write_text("half")
    fit(max_steps=2)
    assert names(tmp_path) == {"step=2.ckpt"}


# --- which one is read ---


@pytest.mark.parametrize(
    ("damage", "why"),
    [(cut, "truncated or corrupt"), (lambda path: flip(path, 0.5), "checksum of .* does not match")],
    ids=["truncated", "flipped"],
)
def test_the_one_before_a_damaged_one_is_used(
    damage: Callable[[Path], None], why: str, fit: Any, tmp_path: Path
) -> None:
    _, straight = fit(max_steps=6, max_epochs=-1)
    damage(tmp_path / "step=6.ckpt")
    with pytest.warns(UserWarning, match=f"checkpoint not used: {tmp_path}/step=6.ckpt: .*{why}"):
        trainer, module = fit(max_steps=6, max_epochs=-1, ckpt_path="last")
    assert trainer.ckpt_path == str(tmp_path / "step=4.ckpt")
    assert not fault(tmp_path / "step=6.ckpt"), "it is written again"
    assert trainer.global_step == 6
    assert straight.map.weight.shape == module.map.weight.shape


def test_no_readable_one_is_an_error_and_none_at_all_is_a_start(fit: Any, tmp_path: Path) -> None:
    trainer, _ = fit(max_steps=4, ckpt_path="last")
    assert trainer.global_step == 4
    for path in tmp_path.glob("*.ckpt"):
        cut(path)
    with pytest.raises(ValueError, match=r"no checkpoint can be read; start over .*step=4.*; .*step=2"):
        fit(max_steps=4, ckpt_path="last")


def test_ckpt_path_may_be_a_file_a_folder_or_a_run(fit: Any, tmp_path: Path) -> None:
    fit(max_steps=4)
    newest = tmp_path / "step=4.ckpt"
    run = tmp_path / "run"
    shutil.copytree(tmp_path, run / "checkpoints")
    assert chosen(newest) == chosen(tmp_path) == newest
    assert chosen(run).name == "step=4.ckpt"
    cut(newest)
    with pytest.raises(ValueError, match=r"step=4\.ckpt: it is truncated or corrupt"):
        chosen(newest)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no \.ckpt in this folder"):
        chosen(tmp_path / "empty")
    with pytest.raises(ValueError, match="no such file or folder"):
        chosen(tmp_path / "absent")


def not_a_checkpoint(kind: str, path: Path) -> None:
    if kind == "tensors":
        torch.save({"weight": torch.ones(2)}, path)
    elif kind == "a list":
        torch.save([1, 2], path)
    elif kind == "another zip":
        with ZipFile(path, "w") as archive:
            archive.writestr("document.xml", "<text/>")
    else:
        path.write_bytes({"empty": b"", "text": b"a: 1\n", "gguf": b"GGUF" + bytes(100)}[kind])


@pytest.mark.parametrize("kind", ["empty", "text", "gguf", "another zip", "tensors", "a list"])
def test_a_foreign_file_is_named(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "it.ckpt"
    not_a_checkpoint(kind, path)
    with pytest.raises(
        ValueError, match=rf"^--ckpt_path {path}: it is truncated or corrupt \([^\n]+\); give another one"
    ):
        chosen(path)


@pytest.mark.parametrize("address", ["https://host/step=2.ckpt", "s3://bucket/run", "file:///tmp/step=2.ckpt"])
def test_an_address_is_not_fetched(address: str) -> None:
    with pytest.raises(ValueError, match="give a local file or folder, not an address"):
        chosen(Path(address))


def test_code_in_a_checkpoint_is_not_run(fit: Any, tmp_path: Path) -> None:
    fit(max_steps=2)
    content = torch.load(tmp_path / "step=2.ckpt", weights_only=True)
    torch.save(content | {"more": Malice(tmp_path / "ran")}, tmp_path / "step=9.ckpt")
    assert "whose code loading would run" in fault(tmp_path / "step=9.ckpt")
    with pytest.raises(pickle.UnpicklingError):
        fit(ckpt_path=tmp_path / "step=9.ckpt")
    with pytest.warns(UserWarning, match=r"step=9\.ckpt: it holds objects"):
        fit(max_steps=3, max_epochs=-1, ckpt_path="last")
    assert not (tmp_path / "ran").exists()


def test_loading_with_code_cannot_be_asked_for(tiny_trainer: MakeTrainer, fit: Any, tmp_path: Path) -> None:
    fit(max_steps=2)
    trainer = tiny_trainer(SafeCheckpoint(2, dirpath=str(tmp_path)), enable_checkpointing=True)
    with pytest.raises(ValueError, match="weights_only=false would run code"):
        trainer.fit(Line(), ckpt_path=tmp_path / "step=2.ckpt", weights_only=False)


# --- sharded ones ---


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """As Lightning's ModelParallelStrategy saves: torch's shards and metadata, and the rest in meta.pt."""
    folder = tmp_path / "step=2.ckpt"
    module = Line()
    optimizer = module.configure_optimizers()
    module.training_step(torch.ones(1, 100), 0).backward()
    optimizer.step()
    state = {"state_dict": module.state_dict(), "optimizer_0": optimizer.state_dict()}
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    torch.save({"global_step": 2}, folder / "meta.pt")
    return folder


def test_a_sharded_one_is_read(sharded: Path) -> None:
    assert fault(sharded) == ""
    assert chosen(sharded.parent) == chosen(sharded) == sharded


def test_a_damaged_sharded_one_is_not(sharded: Path) -> None:
    shard = next(sharded.glob("*.distcp"))
    cut(shard)
    assert f"{shard.name} ends early" in fault(sharded)
    shard.unlink()
    assert "No such file" in fault(sharded)
    with pytest.raises(ValueError, match="no checkpoint can be read"):
        newest_readable([sharded])


def test_code_in_a_sharded_one_is_not_run(sharded: Path, tmp_path: Path) -> None:
    metadata = pickle.loads((sharded / ".metadata").read_bytes())
    metadata.planner_data = Malice(tmp_path / "ran")
    good = (sharded / ".metadata").read_bytes()
    (sharded / ".metadata").write_bytes(pickle.dumps(metadata))
    assert "posix.mkdir" in fault(sharded)
    (sharded / ".metadata").write_bytes(good)
    assert not fault(sharded)
    shutil.rmtree(sharded)
    dcp.save({"state_dict": {"more": Malice(tmp_path / "ran")}}, checkpoint_id=sharded, no_dist=True)
    torch.save({}, sharded / "meta.pt")
    assert "whose code loading would run" in fault(sharded)
    assert not (tmp_path / "ran").exists()


def test_metadata_imports_nothing_that_it_names(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs_at_import.py").write_text(f"import os; os.mkdir({str(tmp_path / 'ran')!r})")
    monkeypatch.syspath_prepend(tmp_path)
    for module, name in [("runs_at_import", "Any"), ("torch.distributed.checkpoint.metadata", "io.open")]:
        (sharded / ".metadata").write_bytes(b"\x80\x04c" + f"{module}\n{name}\n.".encode())
        assert f"({module}.{name})" in fault(sharded)
    assert not (tmp_path / "ran").exists()
