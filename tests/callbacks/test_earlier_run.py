"""Files of an earlier run in a folder are neither mixed with the new run's nor lost."""

import errno
import json
from pathlib import Path

import pytest
import torch

from callbacks.checkpoint_files import latest_first
from callbacks.earlier_run import set_aside
from tests.callbacks.checkpoint_cases import cut, names

EVENTS = "events.out.tfevents.1.host"


def save(path: Path, step: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"global_step": step, "state_dict": {}, "optimizer_states": []}, path)


def export(folder: Path, step: int) -> None:
    folder.mkdir(parents=True)
    (folder / "training.json").write_text(json.dumps({"steps": step}))


@pytest.fixture
def used(tmp_path: Path) -> Path:
    """A run to step 9 with checkpoints and exports of steps 6 and 9, and a report."""
    folder = tmp_path / "run"
    for step in (6, 9):
        save(folder / "checkpoints" / f"step={step}.ckpt", step)
        export(folder / f"checkpoint-{step}", step)
    export(folder / "final", 9)
    (folder / "merged").mkdir()  # of before it said its step
    for name in ("config.yaml", EVENTS, "report.json", ".training.lock"):
        (folder / name).write_text("")
    return folder


KEPT = {"report.json", ".training.lock"}


def test_a_new_run_finds_an_empty_folder_and_says_where_the_rest_is(
    used: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        set_aside([used, used], None)
    assert names(used) == KEPT | {"checkpoints", "earlier-1"}
    assert names(used / "checkpoints") == set()
    assert names(used / "earlier-1") >= {
        "checkpoint-6",
        "checkpoint-9",
        "final",
        "merged",
        "events.out.tfevents.1.host",
    }
    assert names(used / "earlier-1" / "checkpoints") == {"step=6.ckpt", "step=9.ckpt"}
    assert f"moved to {used}/earlier-1; --ckpt_path {used}/earlier-1 resumes it" in caplog.text
    save(used / "checkpoints" / "step=3.ckpt", 3)
    set_aside([used], str(used / "earlier-1" / "checkpoints" / "step=9.ckpt"))  # which is another run
    assert names(used / "earlier-2" / "checkpoints") == {"step=3.ckpt"}


def test_what_goes_on_keeps_what_it_left(used: Path) -> None:
    before = names(used)
    for own in ("last", str(used / "checkpoints" / "step=9.ckpt")):
        set_aside([used], own)
        assert names(used) == before
    cut(used / "checkpoints" / "step=9.ckpt")
    set_aside([used], str(used / "checkpoints" / "step=6.ckpt"))  # the latest that can be read
    assert names(used) == before
    save(used / "hpc_ckpt_1.ckpt", 9)
    set_aside([used], None)  # Slurm requeued it
    assert names(used) == before | {"hpc_ckpt_1.ckpt"}


@pytest.mark.parametrize("ckpt_path", ["last", "checkpoints/step=9.ckpt"])
def test_exports_and_checkpoints_may_lie_apart(ckpt_path: str, used: Path) -> None:
    exports = used.parent / "exports"
    exports.mkdir()
    (used / "final").rename(exports / "final")
    set_aside([used, exports], ckpt_path if ckpt_path == "last" else str(used / ckpt_path))
    assert names(exports) == {"final"}
    set_aside([used, exports], None)
    assert names(exports) == {"earlier-1"}


def test_going_on_from_an_earlier_step_takes_what_follows_it_away(used: Path) -> None:
    set_aside([used], str(used / "checkpoints" / "step=6.ckpt"))
    assert names(used) == KEPT | {
        "checkpoints",
        "checkpoint-6",
        "config.yaml",
        "events.out.tfevents.1.host",
        "earlier-1",
    }
    assert names(used / "checkpoints") == {"step=6.ckpt"}
    assert names(used / "earlier-1") == {"checkpoints", "checkpoint-9", "final", "merged"}


def test_a_folder_is_the_same_by_any_of_its_names(used: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run goes on from is never moved away from under it."""
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to("run")
    before = names(used)
    for name in ("link/checkpoints/step=9.ckpt", "run/../run/checkpoints/step=9.ckpt"):
        set_aside([Path("run")], name)
        set_aside([Path("link")], str(used / "checkpoints" / "step=9.ckpt"))
        assert names(used) == before


def test_checkpoints_on_another_disk_stay_on_it(used: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = tmp_path / "disk"
    (used / "checkpoints").rename(disk)
    (used / "checkpoints").symlink_to(disk)
    rename = Path.rename

    def apart(path: Path, target: Path) -> Path:
        if (disk in path.resolve().parents) != (disk in target.resolve().parents):
            raise OSError(errno.EXDEV, "Invalid cross-device link", str(path), None, str(target))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", apart)
    set_aside([used], None)
    assert names(disk) == {"earlier-1"}
    assert names(disk / "earlier-1") == {"step=6.ckpt", "step=9.ckpt"}
    assert names(used / "earlier-1") >= {"final", "config.yaml", EVENTS}
    assert (used / "checkpoints").is_symlink()


def test_a_configuration_without_curves_is_the_users(tmp_path: Path) -> None:
    """Runs without a name write beside it."""
    (tmp_path / "config.yaml").write_text("# mine")
    export(tmp_path / "final", 9)
    set_aside([tmp_path], None)
    assert names(tmp_path) == {"config.yaml", "earlier-1"}


def test_an_empty_or_absent_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")  # of one that never got far
    set_aside([tmp_path, tmp_path / "absent"], None)
    assert names(tmp_path) == {"config.yaml"}


def test_no_clock_decides_which_checkpoint_is_the_last(tmp_path: Path) -> None:
    """Nor does its name, where the file says the step."""
    for name, step in (("step=2.ckpt", 2), ("step=10.ckpt", 10), ("hpc_ckpt_1.ckpt", 12), ("step=9.ckpt", 9)):
        save(tmp_path / name, step)
    cut(tmp_path / "step=9.ckpt")
    order = [path.name for path in latest_first(tmp_path.iterdir())]
    assert order == ["hpc_ckpt_1.ckpt", "step=10.ckpt", "step=9.ckpt", "step=2.ckpt"]
