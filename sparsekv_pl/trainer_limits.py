"""Limits of a run that contradict each other, or leave nothing to do: Lightning takes them without a word."""

from collections.abc import Mapping
from typing import Any


def check_limits(trainer: Mapping[str, Any], command: str) -> None:
    """Raise ``ValueError`` for settings of the trainer with which ``command`` (fit, test) could not do its work."""
    for unit in ("steps", "epochs"):
        least, most = trainer.get(f"min_{unit}"), trainer.get(f"max_{unit}")
        if least is not None and most is not None and 0 <= most < least:
            raise ValueError(f"trainer.min_{unit} is {least}, above trainer.max_{unit}, {most}: give at most {most}")
    limits = {"fit": "limit_train_batches", "validate": "limit_val_batches", "test": "limit_test_batches"}
    name = limits.get(command, "limit_predict_batches")
    if trainer.get(name) == 0:
        raise ValueError(f"trainer.{name} is 0, so {command} would do nothing: give 1 or more, or leave it out")
