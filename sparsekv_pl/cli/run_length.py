"""The length of a learning-rate schedule, which follows from trainer.max_steps."""

from jsonargparse import Namespace


def fill_length(settings: Namespace) -> None:
    """Set ``total_steps`` of the learning-rate schedule in a command's ``settings`` to the run's length.

    Raises
    ------
    ValueError
        If the schedule ends before the run, which would stop training there, or if neither has a length.
    """
    key, max_steps = "model.init_args.lr_scheduler.init_args", settings.get("trainer.max_steps")
    schedule = settings.get(key)
    if not isinstance(schedule, Namespace) or "total_steps" not in schedule or schedule.get("epochs") is not None:
        return
    total = schedule.total_steps
    if total is None and max_steps < 1:
        raise ValueError(
            f"model.lr_scheduler.total_steps follows trainer.max_steps, which is {max_steps}: give either of them"
        )
    if total is not None and total < max_steps:
        raise ValueError(
            f"model.lr_scheduler.total_steps is {total}, and trainer.max_steps {max_steps}: training would stop at "
            f"step {total}. Leave total_steps out, and it follows max_steps"
        )
    if total is None:
        settings[f"{key}.total_steps"] = max_steps
