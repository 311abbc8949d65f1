"""The length of a learning-rate schedule, which follows from trainer.max_steps."""

import logging

from jsonargparse import Namespace

log = logging.getLogger(__name__)

LENGTHS = ("total_steps", "T_max")
"""Settings of schedules that are the run's length where they are null."""


def fill_length(settings: Namespace) -> None:
    """Set the length of the learning-rate schedule in a command's ``settings`` to the run's, if it is null.

    Raises ``ValueError`` if a schedule of ``total_steps`` ends before the run, which would stop training there, or if
    neither has a length.
    """
    key, max_steps = "model.init_args.lr_scheduler.init_args", settings.get("trainer.max_steps")
    schedule = settings.get(key)
    if not isinstance(schedule, Namespace) or schedule.get("epochs") is not None:
        return
    for name in LENGTHS:
        if name not in schedule:
            continue
        length = schedule[name]
        if length is None and max_steps < 1:
            raise ValueError(
                f"model.lr_scheduler.{name} follows trainer.max_steps, which is {max_steps}: give either of them"
            )
        if length is None:
            settings[f"{key}.{name}"] = max_steps
        elif name == "T_max" and length < max_steps:
            log.warning(
                "model.lr_scheduler.T_max is %d, and trainer.max_steps %d: the learning rate rises again after step "
                "%d. sparsekv_pl.training.cosine_schedule.CosineSchedule without T_max follows max_steps",
                *(length, max_steps, length),
            )
        elif length < max_steps:
            raise ValueError(
                f"model.lr_scheduler.total_steps is {length}, and trainer.max_steps {max_steps}: training would stop "
                f"at step {length}. Leave total_steps out, and it follows max_steps"
            )
