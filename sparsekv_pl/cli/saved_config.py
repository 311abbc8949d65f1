"""Saving a run's resolved configuration beside its output, and logging it."""

from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback

from sparsekv_pl.reporting.public_addresses import public_addresses
from sparsekv_pl.storage.whole_files import written_whole

HEADER = b"# lightning.pytorch=="
"""First bytes of a configuration that was saved, or printed with --print_config."""


class SaveRunConfig(SaveConfigCallback):
    """Saves the resolved configuration in the logger's folder, and logs it as hyper-parameters to all loggers.

    Paths of web addresses are hidden, because they may hold keys.
    """

    def __init__(self, parser: LightningArgumentParser, config: Namespace, **settings: Any) -> None:
        super().__init__(parser, public_addresses(config), **settings)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save on all ranks to one folder. Lightning's own method could leave half a file after a kill.

        Raises ``ValueError`` if the file to write is the user's own.
        """
        self.save_to_log_dir = False
        path = self._path = self.path(trainer, pl_module)
        if path.is_file() and (content := path.read_bytes()) and not content.startswith(HEADER):
            raise ValueError(
                f"{path} is a configuration that you wrote, and the run would replace it by all of its settings: "
                "rename it, or give a --name or a folder of the run's own"
            )
        super().setup(trainer, pl_module, stage)

    def path(self, trainer: Trainer, pl_module: LightningModule) -> Path:  # noqa: ARG002
        """The file in the logger's folder, or in the trainer's if the logger has none. All ranks must call it."""
        return Path(trainer.log_dir or trainer.default_root_dir) / "config.yaml"

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Send the configuration to the loggers, and write it to the file."""
        from sparsekv_pl.reporting.loggers import log_settings

        log_settings(trainer.loggers, yaml.safe_load(self.parser.dump(self.config, skip_none=False)))
        with written_whole(self._path) as partial:
            self.parser.save(self.config, partial, skip_none=False, overwrite=True)


class SaveEvaluationConfig(SaveRunConfig):
    """Saves the resolved configuration beside the report, as evaluation.yaml."""

    def path(self, trainer: Trainer, pl_module: LightningModule) -> Path:  # noqa: ARG002
        """The file in the module's ``output`` folder."""
        return Path(str(pl_module.output)) / "evaluation.yaml"
