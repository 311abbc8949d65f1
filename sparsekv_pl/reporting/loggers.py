"""Sending scores, pictures and settings to a run's loggers; a warning names what a logger does not support."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_warn


def log_scores(loggers: Iterable[Any], scores: Mapping[str, float], step: int | None = None) -> None:
    """Log numbers by name to every logger."""
    for logger in loggers:
        logger.log_metrics(dict(scores), step)


def log_picture(loggers: Iterable[Any], name: str, pixels: np.ndarray, step: int = 0) -> None:
    """Log ``pixels`` (height, width, 3) uint8 to every logger that supports pictures (TensorBoard, W&B, MLflow)."""
    for logger in loggers:
        if isinstance(logger, DummyLogger):  # fast_dev_run's
            continue
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, pixels, step, dataformats="HWC")
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_image(logger.run_id, pixels, artifact_file=f"{name}/{step}.png")
        elif hasattr(logger, "log_image"):  # W&B's, and loggers like it
            logger.log_image(key=name, images=[pixels], step=step)
        else:
            left_out(logger, f"picture {name}")


def log_pictures(loggers: Iterable[Any], paths: Iterable[Path]) -> None:
    """Log the PNG files among ``paths`` under their names."""
    from matplotlib.image import imread

    found = list(loggers)
    for path in paths:
        if found and path.suffix == ".png":
            log_picture(found, path.stem, (imread(path)[..., :3] * 255).round().astype(np.uint8))


def log_settings(loggers: Iterable[Any], settings: dict[str, Any]) -> None:
    """Log ``settings`` as hyper-parameters to every logger. The command line has checked that they hold no secret."""
    for logger in loggers:
        logger.log_hyperparams(settings)


def left_out(logger: Logger, what: str) -> None:
    """Warn once that a logger does not support ``what``."""
    rank_zero_warn(f"{type(logger).__name__} does not take the {what}: it is left out there")
