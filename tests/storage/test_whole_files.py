"""All exports, reports and results are written by one function, completely or not at all."""

import errno
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sparsekv_pl.blocksparse.gate_store import GateShape, write_gates
from sparsekv_pl.blocksparse.tensor_format import LayerTensors, Metadata, write
from sparsekv_pl.eviction.interrupted_prefill import SavedState
from sparsekv_pl.reporting.file_formats import replace_all
from sparsekv_pl.storage.records import Results
from sparsekv_pl.storage.user_errors import user_message
from sparsekv_pl.storage.whole_files import mend, written_whole

ROOT = Path(__file__).parents[2]
WRITES = re.compile(
    r"\.write_text\(|\.write_bytes\(|save_file\(|torch\.save\((?!\w+, file\))|\.save_pretrained\(|"
    r"json\.dump\(|parser\.save\(|"
    r"open\([^)]*[\"'][wa]b?\+?[\"']|\.to_csv\([^)i]|savefig\([^b]"
)
ELSEWHERE = {
    "sparsekv_pl/storage/own_folder.py": 1,  # who holds a lock
    "sparsekv_pl/evaluation/time_and_memory.py": 1,  # a switch of the kernel's
    "sparsekv_pl/storage/records.py": 1,  # adds lines
}
"""Places that write otherwise, and how many."""


def test_nothing_is_written_past_the_one_function() -> None:
    """Every call that writes stands in a block of ``written_whole``, or writes below the name that one gave."""
    files = [path for name in ("sparsekv_pl", "callbacks", "data") for path in (ROOT / name).rglob("*.py")]
    assert len(files) > 100
    found = {}
    for path in files:
        lines = [line for line in path.read_text().splitlines() if WRITES.search(line)]
        past = [line for line in lines if "partial" not in line]
        if past:
            found[str(path.relative_to(ROOT))] = past
    assert {name: len(lines) for name, lines in found.items()} == ELSEWHERE, found


def layer() -> LayerTensors:
    tensor = torch.ones(1, 1, 2, 2)
    about = {"layer_idx": 0, "seq_len": 2, "num_heads": 1, "num_kv_heads": 1, "head_dim": 2, "hidden_size": 2}
    metadata = Metadata(**about, batch_size=1, timestamp="20240219_120000", model_path="m")  # type: ignore[typeddict-item]
    return LayerTensors(tensor, tensor, tensor, metadata)


def folder_of_tensors(folder: Path) -> None:
    with written_whole(folder / "export") as partial:
        partial.mkdir()
        save_file({"a": torch.ones(2)}, partial / "model.safetensors")


WRITERS: dict[str, Callable[[Path], object]] = {
    "report": lambda folder: replace_all(folder, {"report.json": b"{}", "report.html": b"<html>"}),
    "gates": lambda folder: write_gates(folder, GateShape(1, 1, 1, 2, 2, gate_dim=2), {"a": torch.ones(2)}),
    "tensors": lambda folder: write(folder, 0, layer()),
    "state": lambda folder: SavedState(folder / "state.safetensors").save("key", {"a": torch.ones(2)}),
    "folder": folder_of_tensors,
    "results": lambda folder: Results(folder).put("key", [{"a": 1}], "trained"),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_disk_that_fills_is_a_line_with_the_path_and_leaves_nothing(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left") as refused:
        patch.setattr(os, "fsync", full)
        WRITERS[kind](tmp_path)
    line = user_message(refused.value)
    assert line is not None and "make room" in line and str(tmp_path) in line and "\n" not in line
    if kind != "results":  # a line that is added, and read again
        assert list(tmp_path.iterdir()) == []
    WRITERS[kind](tmp_path)
    assert not list(tmp_path.glob(".*.partial"))


def test_an_error_of_a_library_that_hides_the_systems_is_the_systems(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"No space left on device: .*it'$") as refused, written_whole(tmp_path / "it"):
        raise Exception("Error while serializing: I/O error: No space left on device (os error 28)")
    assert refused.value.errno == errno.ENOSPC


def test_an_error_about_another_file_names_that_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"), written_whole(tmp_path / "it") as partial:
        partial.write_bytes((tmp_path / "absent").read_bytes())


@pytest.mark.parametrize("place", ["before.rename", "partial.replace"])
def test_a_folder_that_a_kill_half_replaced_is_the_old_or_the_new_one(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(text: str) -> None:
        with written_whole(tmp_path / "it") as partial:
            partial.mkdir()
            (partial / "file").write_text(text)

    class Killed(BaseException):
        """Nothing after it runs, cleaning neither."""

    def die(*_: object) -> None:
        raise Killed

    write("old")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("sparsekv_pl.storage.whole_files._undo", lambda *_: None)
        patch.setattr(Path, "replace" if place == "partial.replace" else "rename", die)
        write("new")
    mend(tmp_path)
    assert (tmp_path / "it" / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["it"]


def test_a_folder_that_cannot_be_replaced_stays_under_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of_tensors(tmp_path)

    def refuse(*_: object) -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="Permission denied"):
        folder_of_tensors(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


@pytest.mark.parametrize("target", ["elsewhere", "absent"])
def test_a_link_gives_way_to_a_folder_and_what_it_leads_to_stays(target: str, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("mine")
    (tmp_path / "export").symlink_to(target)
    folder_of_tensors(tmp_path)
    assert [path.name for path in (tmp_path / "export").iterdir()] == ["model.safetensors"]
    assert (tmp_path / "elsewhere" / "file").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_disk_that_does_not_sync_folders_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def files_alone(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", files_alone)
    folder_of_tensors(tmp_path)
    assert (tmp_path / "export" / "model.safetensors").exists()


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_weights_can_be_read_by_whom_the_umask_lets(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        with written_whole(tmp_path / "adapter") as partial:
            partial.mkdir()
            save_file({"weight": torch.ones(2)}, partial / "adapter_model.safetensors")
            (partial / "linked").symlink_to(ROOT / "README.md")
        with written_whole(tmp_path / "one.safetensors") as partial:
            save_file({"weight": torch.ones(2)}, partial)
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    for file in (tmp_path / "adapter" / "adapter_model.safetensors", tmp_path / "one.safetensors"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~mask
