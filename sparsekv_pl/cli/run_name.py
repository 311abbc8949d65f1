"""The run's name: a run writes to output/NAME, and evaluations find its adapter there."""

import re
from pathlib import Path

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from sparsekv_pl.cli.output_folder import check_output

OUTPUT = Path("output")
UNNAMED = str(OUTPUT / "NAME")
"""Default folder of the logger, replaced by the run's own."""

EXPORT = re.compile(r"final|checkpoint-\d+")
"""Names of the folders of a run's adapters, as callbacks.adapter_export makes them."""


def add_name(parser: LightningArgumentParser, reports: bool) -> None:
    """Add ``--name``, with ``reports`` also ``--report``, and a logger that follows them."""
    name_help = "name of the run, which writes to output/NAME; a whole path is used as it is"
    parser.add_argument("--name", type=str | None, default=None, help=name_help)
    if reports:
        report_help = "name of the report, which is written to output/NAME/REPORT; without it, to output/NAME"
        parser.add_argument("--report", type=str | None, default=None, help=report_help)
    settings = {"save_dir": UNNAMED, "name": "", "version": ""}
    logger = {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": settings}
    parser.set_defaults({"trainer.logger": logger})


def fill_name(settings: Namespace) -> None:
    """Fill in the folders that a command's ``settings`` leave to the run's name; given ones stay.

    Raises ``ValueError`` for an empty name, and for an adapter of a run (``final``, ``checkpoint-46``) without the
    run's name.
    """
    for key in ("name", "report"):
        if settings.get(key) == "":
            raise ValueError(f"{key} is empty: give a name, or leave it out")
    run = _run_folder(settings)
    adapter = settings.get("model.init_args.backbone.adapter")
    if isinstance(adapter, str) and EXPORT.fullmatch(adapter):
        if run is None:
            raise ValueError(f"model.backbone.adapter is {adapter}: of which run? Give --name, or the whole folder")
        settings["model.init_args.backbone.adapter"] = str(run / adapter)
    writes = _report_folder(settings, run) if "report" in settings else run
    if settings.get("trainer.default_root_dir") is None and writes is not None:
        settings["trainer.default_root_dir"] = str(writes)
    if settings.get("trainer.logger.init_args.save_dir") == UNNAMED:
        if writes is None:
            settings["trainer.logger"] = True  # Lightning's default, in the working directory
        else:
            settings["trainer.logger.init_args.save_dir"] = str(writes)


def _run_folder(settings: Namespace) -> Path | None:
    """The folder that training writes to."""
    name, given = settings.get("name"), settings.get("trainer.default_root_dir")
    if given is not None and "report" not in settings:
        return Path(given)
    return None if name is None else OUTPUT / Path(name).expanduser()


def _report_folder(settings: Namespace, run: Path | None) -> Path | None:
    """The folder for an evaluation's logger and trainer; also fills in the report's folder.

    For a report in the run's own folder it is the subfolder ``evaluation``: the run's folder has training's events, and
    the checkpoints of a requeued job, which Lightning would load.
    """
    report, output = settings.get("report"), settings.get("model.init_args.output")
    if output is None and (run is not None or report is not None):
        output = str((run or OUTPUT) / Path(report or "").expanduser())
        if "model.init_args.output" in settings:
            settings["model.init_args.output"] = output
    if output is None:
        return None
    check_output("model.output", output)
    return Path(output) if report is not None else Path(output) / "evaluation"
