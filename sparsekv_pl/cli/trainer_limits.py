"""Limits of a run that contradict each other or leave nothing to do, which Lightning accepts silently."""

from argparse import Action
from collections.abc import Iterable, Mapping
from typing import Any, Union, get_args


def counts_before_shares(actions: Iterable[Action]) -> None:
    """Make every option of ``actions`` that takes an int or a float read 1 as one batch and 1.0 as all batches.

    Python caches ``Optional[Union[int, float]]`` and ``Optional[Union[float, int]]`` as one type, with the order that
    came first in the process. If float came first, jsonargparse silently reads 1 as 1.0: every batch.
    """
    for action in actions:
        kinds = get_args(getattr(action, "_typehint", None))
        if int in kinds and float in kinds:
            others = [kind for kind in kinds if kind not in (int, float)]
            action._typehint = Union[tuple([int, float, *others])]  # type: ignore[attr-defined]  # noqa: UP007


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
