"""Pictures and settings for whatever loggers a run has; what one of them does not take is left out with a line."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_warn


def log_scores(loggers: Iterable[Any], scores: Mapping[str, float], step: int | None = None) -> None:
    """Numbers by name, to every logger."""
    for logger in loggers:
        logger.log_metrics(dict(scores), step)


def log_picture(loggers: Iterable[Any], name: str, pixels: np.ndarray, step: int = 0) -> None:
    """``pixels`` (height, width, 3) uint8, to every logger that takes pictures (TensorBoard, W&B, MLflow)."""
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
    """The PNG files among ``paths``, named after themselves."""
    from matplotlib.image import imread

    found = list(loggers)
    for path in paths:
        if found and path.suffix == ".png":
            log_picture(found, path.stem, (imread(path)[..., :3] * 255).round().astype(np.uint8))


def log_settings(loggers: Iterable[Any], settings: dict[str, Any]) -> None:
    """Hyper-parameters, to every logger; ``settings`` hold no secret, which the command line has checked."""
    for logger in loggers:
        logger.log_hyperparams(settings)


def left_out(logger: Logger, what: str) -> None:
    """Say, once, what a logger does not take."""
    rank_zero_warn(f"{type(logger).__name__} does not take the {what}: it is left out there")
