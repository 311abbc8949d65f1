"""The folders that a run writes to, each claimed by one running process."""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.utilities import rank_zero_only

from sparsekv_pl.storage.own_folder import claimed

TRAINING, REPORT = "training", "report"
"""Uses of a folder. One process each may hold it at a time: an export can be measured while the training runs."""


class RunFolders(ExitStack):
    """The folders that this process holds until the end of the block. Only the first of several ranks holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.writes = getattr(rank_zero_only, "rank", 0) == 0
        self._claimed: set[tuple[str, str]] = set()

    def claim(self, key: str, folder: str | Path, use: str) -> None:
        """Hold ``folder``, which ``key`` sets, for ``use``.

        Raises ``ValueError`` if another process holds it, or it cannot be written.
        """
        path = Path(folder).expanduser()
        known = (os.path.realpath(path), use)  # two of its names may be given for one folder
        if self.writes and known not in self._claimed:
            self.enter_context(claimed(path, key, use))
            self._claimed.add(known)

    def claim_all(self, settings: Namespace, trains: bool) -> None:
        """Hold all output folders of a command's complete ``settings``; none with ``trainer.fast_dev_run``."""
        if settings.get("trainer.fast_dev_run"):
            return
        for key, folder in trained_into(settings) if trains else ():
            self.claim(key, folder, TRAINING)
        if not trains and (output := settings.get("model.init_args.output")) is not None:
            self.claim("model.output", output, REPORT)
        for callback in _callbacks(settings):
            if isinstance(output := callback.get("init_args.output"), str):
                self.claim(f"{callback.class_path.rpartition('.')[2]}.output", output, REPORT)


def trained_into(settings: Namespace) -> Iterator[tuple[str, Path]]:
    """Yield key and path of the folders that a training with these ``settings`` writes to, the run's own first."""
    root = settings.get("trainer.default_root_dir")
    yield "trainer.default_root_dir", Path(root or ".").expanduser()
    if (exports := settings.get("export.directory")) is not None:
        yield "export.directory", Path(exports).expanduser()
    for callback in _callbacks(settings):
        for name in ("dirpath", "directory"):
            if isinstance(folder := callback.get(f"init_args.{name}"), str) and "://" not in folder:
                yield f"{callback.class_path.rpartition('.')[2]}.{name}", Path(folder).expanduser()


def _callbacks(settings: Namespace) -> list[Any]:
    given = settings.get("trainer.callbacks") or []
    return [one for one in (given if isinstance(given, list) else [given]) if isinstance(one, Namespace)]
