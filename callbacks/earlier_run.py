"""Move the files of an earlier training in a run's folder aside, so that they are neither mixed in nor deleted."""

import re
from collections.abc import Iterable
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info

from callbacks.checkpoint_files import checkpoints_in, fault, step_of
from sparsekv_pl.models.training_summary import TRAINING_SUMMARY
from sparsekv_pl.storage.json_file import read_mapping
from sparsekv_pl.storage.whole_files import mend

EXPORTS = ("final", "merged", "checkpoint-*")
CURVES = ("events.out.tfevents.*", "metrics.csv", "hparams.yaml")
CONFIG = "config.yaml"
"""Configuration of a training, if its curves lie beside it; elsewhere a user may have written the file."""
LISTED = 4
"""File names that a message lists."""


def set_aside(folders: Iterable[Path], ckpt_path: str | None) -> None:
    """Move files of other runs in a training's ``folders`` to ``earlier-1`` (or 2, ...) in each of them.

    A new run, or one that resumes from another folder's checkpoint, owns none of the files. One that resumes from a
    checkpoint that is not the latest owns those of no later step. Prints what was moved, and how to resume it.
    """
    own = list(dict.fromkeys(place for folder in folders if folder.is_dir() for place in _places(folder)))
    for folder in own:
        mend(folder)
    step = _goes_on_from([path for folder in own for path in checkpoints_in(folder)], ckpt_path)
    if step is None:
        return
    for folder in own:
        later = [path for path in checkpoints_in(folder) if step_of(path) > step]
        later += [path for name in EXPORTS for path in sorted(folder.glob(name)) if _step(path) > step]
        if step < 0:
            curves = [path for name in CURVES for path in sorted(folder.glob(name))]
            later += [*curves, *folder.glob(CONFIG)] if curves else []
        if later:
            _move(folder, later, step)


def _places(folder: Path) -> list[Path]:
    """Return ``folder`` resolved, after the folder of its checkpoints if that is a link, as to another disk."""
    checkpoints = folder / "checkpoints"
    apart = checkpoints.is_symlink() and checkpoints.is_dir()
    return [*([checkpoints.resolve()] if apart else []), folder.resolve()]


def _goes_on_from(saved: list[Path], ckpt_path: str | None) -> int | None:
    """Return the step that the run resumes from, -1 for a new run; None if all of ``saved`` is its own."""
    if any(path.name.startswith("hpc_ckpt_") for path in saved):
        return None  # Lightning resumes from these, whatever ckpt_path is
    if ckpt_path is None or ckpt_path in ("last", "best", "hpc"):
        return None if ckpt_path and saved else -1
    path = Path(ckpt_path).expanduser().resolve()
    if path not in saved:
        return -1
    step = step_of(path)
    return step if any(step_of(other) > step and not fault(other) for other in saved) else None


def _step(export: Path) -> int:
    """Return the step of an export; if unknown, a number above any step."""
    if named := re.fullmatch(r"checkpoint-(\d+)", export.name):
        return int(named[1])
    try:
        return int(read_mapping(export / TRAINING_SUMMARY)["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return 2**62


def _move(folder: Path, paths: list[Path], step: int) -> None:
    number = 1
    while (aside := folder / f"earlier-{number}").exists():
        number += 1
    for path in paths:
        target = aside / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    names = [str(path.relative_to(folder)) for path in paths]
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    what = "an earlier run" if step < 0 else f"files after step {step}, at which this run resumes"
    again = f"; --ckpt_path {aside} resumes it" if checkpoints_in(aside) else ""
    rank_zero_info(f"{folder} holds {what}: {', '.join(names[:LISTED])}{more}: moved to {aside}{again}")
