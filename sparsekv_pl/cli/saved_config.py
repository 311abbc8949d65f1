"""Saves a run's resolved configuration beside what it writes, and gives it to the loggers."""

from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback

from sparsekv_pl.reporting.public_addresses import public_addresses
from sparsekv_pl.storage.whole_files import written_whole


class SaveRunConfig(SaveConfigCallback):
    """Saves the resolved configuration where the logger writes, and gives it to all loggers as hyper-parameters.

    Paths of web addresses are left out, for they may hold keys.
    """

    def __init__(self, parser: LightningArgumentParser, config: Namespace, **settings: Any) -> None:
        super().__init__(parser, public_addresses(config), **settings)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """On all ranks, which agree on the folder. Lightning's own way would leave half a file after a kill."""
        self.save_to_log_dir = False
        self._folder = Path(trainer.log_dir or trainer.default_root_dir)
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Into the logger's folder, or the trainer's where the logger has none."""
        self._log(trainer)
        self._save(self._folder, "config.yaml")

    def _log(self, trainer: Trainer) -> None:
        from sparsekv_pl.reporting.loggers import log_settings

        log_settings(trainer.loggers, yaml.safe_load(self.parser.dump(self.config, skip_none=False)))

    def _save(self, folder: Path, name: str) -> None:
        with written_whole(folder / name) as partial:
            self.parser.save(self.config, partial, skip_none=False, overwrite=True)


class SaveEvaluationConfig(SaveRunConfig):
    """Saves the resolved configuration beside what the run writes, as evaluation.yaml."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Into the module's ``output`` folder."""
        self._log(trainer)
        self._save(Path(str(pl_module.output)), "evaluation.yaml")


__all__ = ["SaveEvaluationConfig", "SaveRunConfig"]
