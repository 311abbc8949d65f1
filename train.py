"""Train: python train.py fit --config configs/quickstart.yaml [--ckpt_path last] [--merge].

plan in place of fit prints steps, hours and bytes, and loads no weights.
"""

import sys
from pathlib import Path

from lightning.pytorch.cli import LightningArgumentParser

from callbacks.adapter_export import AdapterExport
from callbacks.checkpoint_files import chosen
from callbacks.earlier_run import set_aside
from callbacks.progress_lines import progress
from callbacks.stopping import Stopping
from sparsekv_pl.cli.command_line import CommandLine, run
from sparsekv_pl.cli.run_folders import trained_into
from sparsekv_pl.cli.saved_config import SaveRunConfig


class TrainCommandLine(CommandLine):
    """The commands fit and validate, with the export of the trained adapter."""

    commands = ("fit", "validate")
    progress = staticmethod(progress)
    always = (Stopping,)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the export of every run; --merge also writes a plain Hugging Face model."""
        parser.add_lightning_class_args(AdapterExport, "export")
        parser.add_argument("--merge", action="store_true", help="at the end, fold the adapter into the base: merged/")
        parser.link_arguments("merge", "export.merge")

    def before_instantiate_classes(self) -> None:
        """Check the file or folder of --ckpt_path before a model is loaded, and set aside an earlier run's files."""
        super().before_instantiate_classes()
        settings = self.config.get(self.config.get("subcommand") or "", self.config)
        if settings.get("ckpt_path") not in (None, "last", "best", "hpc"):
            settings.ckpt_path = str(chosen(Path(settings.ckpt_path)))

    def before_fit(self) -> None:
        """Move aside what an earlier training left: a run that was refused by now has not touched it."""
        settings = self.named()
        if self.folders.writes and not settings.get("trainer.fast_dev_run"):
            set_aside((folder for _, folder in trained_into(settings)), settings.get("ckpt_path"))


def plan() -> None:
    """Print what a training would take."""
    from sparsekv_pl.cli.training_planner import main

    main(sys.argv[2:])


if __name__ == "__main__":
    settings = {"save_config_callback": SaveRunConfig, "save_config_kwargs": {"overwrite": True}}
    run(plan if sys.argv[1:2] == ["plan"] else lambda: TrainCommandLine(**settings, seed_everything_default=0))
