"""Compression curricula: the fraction of KV pairs that is removed at each training step.

SparseKV's "keep 0.9 -> 0.3" is compression_ratio 0.1 -> 0.7 here. Steps are optimizer steps, from 0; lengths are steps
or shares of the run (training/schedule_steps.py). A setting out of range raises ``ValueError``.
"""

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from dataclasses import dataclass, field, fields
from typing import Any

from typing_extensions import override

from sparsekv_pl.models.compression_ratio import check_at_least, check_compression_ratio
from sparsekv_pl.models.seeding import random_for
from sparsekv_pl.training.schedule_steps import Steps, check_boundaries, check_settled, check_steps, in_steps

RESUME = "resume with the schedule that the run was started with, or start a new run"


class Schedule(ABC):
    """A compression curriculum: ``ratio(step)``, a function of the step alone unless it adapts to validation."""

    @abstractmethod
    def ratio(self, step: int) -> float:
        """Return the compression ratio of optimizer step ``step`` (from 0), 0 <= ratio < 1."""

    def over(self, max_steps: int) -> "Schedule":
        """Return this schedule with lengths in steps; ``ValueError`` if they are shares and ``max_steps`` is -1."""
        return in_steps(self, max_steps)

    @property
    def observes(self) -> bool:
        """Whether the schedule needs validation perplexities (``observe``)."""
        return False

    def observe(self, perplexity: float) -> None:  # noqa: B027 - a pure schedule ignores it
        """Take the newest validation perplexity under eviction."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint, JSON-able; empty for a pure schedule."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the result of ``state_dict``; ``ValueError`` if it is of another kind of schedule."""
        if state:
            raise ValueError(f"{type(self).__name__} has no state, but the checkpoint holds {state}: {RESUME}")

    def describe(self) -> dict[str, Any]:
        """Return the schedule as in a config: ``{"class_path": ..., "init_args": {...}}``, JSON-able."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.init}  # type: ignore[arg-type]
        init_args = {k: v.describe() if isinstance(v, Schedule) else v for k, v in given.items()}
        return {"class_path": f"{type(self).__module__}.{type(self).__qualname__}", "init_args": init_args}


class WarmedUp(Schedule):
    """A schedule with a warm-up, in which the ratio rises linearly from 0 to the schedule's start."""

    warmup_steps: Steps
    """Length of the warm-up, in optimizer steps or as a share of the run."""

    @abstractmethod
    def after_warmup(self, step: int) -> float:
        """Return the compression ratio ``step`` steps after the warm-up's end."""

    @override
    def ratio(self, step: int) -> float:
        check_settled(self)
        if step < self.warmup_steps:
            return self.after_warmup(0) * step / self.warmup_steps
        return self.after_warmup(step - int(self.warmup_steps))


@dataclass(frozen=True)
class Fixed(WarmedUp):
    """The same ``compression_ratio``, 0 <= r < 1, at every step after the warm-up of ``warmup_steps``."""

    compression_ratio: float = 0.5
    warmup_steps: Steps = 0

    def __post_init__(self) -> None:
        check_compression_ratio("Fixed.compression_ratio", self.compression_ratio)
        check_steps("Fixed.warmup_steps", self.warmup_steps, 0)

    @override
    def after_warmup(self, step: int) -> float:
        return self.compression_ratio


@dataclass(frozen=True)
class Linear(WarmedUp):
    """A straight line from ``start`` to ``end`` over ``steps``, then ``end``.

    Parameters
    ----------
    start, end
        Compression ratios, 0 <= r < 1.
    steps
        Length of the line, in optimizer steps or as a share of the run after the warm-up (1.0: all of it).
    warmup_steps
        See ``WarmedUp``.
    """

    start: float = 0.1
    end: float = 0.7
    steps: Steps = 1.0
    warmup_steps: Steps = 0

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_compression_ratio(f"{name}.start", self.start)
        check_compression_ratio(f"{name}.end", self.end)
        check_steps(f"{name}.steps", self.steps, 1)
        check_steps(f"{name}.warmup_steps", self.warmup_steps, 0)

    def progress(self, step: int) -> float:
        """Return the share of the way from ``start`` to ``end``, 0 to 1."""
        return min(step / self.steps, 1.0)

    @override
    def after_warmup(self, step: int) -> float:
        done = self.progress(step)
        return (1 - done) * self.start + done * self.end


@dataclass(frozen=True)
class Cosine(Linear):
    """Half a cosine from ``start`` to ``end`` over ``steps``, then ``end``; parameters as in ``Linear``."""

    @override
    def progress(self, step: int) -> float:
        return (1 - math.cos(math.pi * super().progress(step))) / 2


@dataclass(frozen=True)
class Step(WarmedUp):
    """Piecewise constant: ``values[i]`` before step ``boundaries[i]``, ``values[i + 1]`` from it on.

    Parameters
    ----------
    values
        Compression ratios, one more than ``boundaries``.
    boundaries
        Increasing lengths, in optimizer steps or as shares of the run after the warm-up.
    warmup_steps
        See ``WarmedUp``.
    """

    values: list[float] = field(default_factory=lambda: [0.1, 0.3, 0.5, 0.7])
    boundaries: list[int] | list[float] = field(default_factory=lambda: [0.25, 0.5, 0.75])
    warmup_steps: Steps = 0

    def __post_init__(self) -> None:
        for i, value in enumerate(self.values):
            check_compression_ratio(f"Step.values[{i}]", value)
        if len(self.values) != len(self.boundaries) + 1:
            raise ValueError(
                f"Step has {len(self.values)} values and {len(self.boundaries)} boundaries: give one value "
                f"more than boundaries, because a boundary lies between two values"
            )
        check_boundaries("Step.boundaries", self.boundaries)
        check_steps("Step.warmup_steps", self.warmup_steps, 0)

    @override
    def after_warmup(self, step: int) -> float:
        return self.values[bisect_right(self.boundaries, step)]


@dataclass
class Adaptive(WarmedUp):
    """Raise the ratio while validation perplexity under eviction is stable; keep or lower it when perplexity rises.

    The first validation sets the reference; after that it is the best perplexity so far. A validation is stable if its
    perplexity is at most ``(1 + tolerance)`` times the reference. Validations during the warm-up count too.

    Parameters
    ----------
    start, maximum
        The lowest ratio, used before the first validation, and the highest.
    step_size
        Increase of the ratio each time, above 0.
    tolerance
        Largest relative rise of perplexity that counts as stable.
    patience
        Number of consecutive stable validations before the ratio rises.
    back_off
        Decrease of the ratio when perplexity rises; 0 keeps the ratio.
    warmup_steps
        See ``WarmedUp``.
    """

    start: float = 0.1
    maximum: float = 0.7
    step_size: float = 0.05
    tolerance: float = 0.02
    patience: int = 1
    back_off: float = 0.05
    warmup_steps: Steps = 0
    level: float = field(init=False)
    best: float | None = field(init=False, default=None)
    held: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        check_compression_ratio("Adaptive.start", self.start)
        check_compression_ratio("Adaptive.maximum", self.maximum)
        check_at_least("Adaptive.maximum", self.maximum, self.start)
        for name, minimum in (("tolerance", 0), ("patience", 1), ("back_off", 0)):
            check_at_least(f"Adaptive.{name}", getattr(self, name), minimum)
        check_steps("Adaptive.warmup_steps", self.warmup_steps, 0)
        if not self.step_size > 0:
            raise ValueError(f"Adaptive.step_size is {self.step_size}: give a rise above 0, or use Fixed")
        self.level = self.start

    @override
    def after_warmup(self, step: int) -> float:
        return self.level

    @property
    @override
    def observes(self) -> bool:
        return True

    @override
    def observe(self, perplexity: float) -> None:
        """Raise, keep or lower the ratio. Infinity counts as a rise; NaN and values below 1 raise ``ValueError``."""
        if not perplexity >= 1:
            raise ValueError(f"validation perplexity under eviction is {perplexity}: exp(loss) is at least 1, check it")
        limit = math.inf if self.best is None else self.best * (1 + self.tolerance)
        if math.isinf(perplexity) or perplexity > limit:
            self.held = 0
            self.level = max(self.start, self.level - self.back_off)
            return
        if self.best is None:
            self.best = perplexity
            return
        self.best = min(self.best, perplexity)
        self.held += 1
        if self.held >= self.patience:
            self.held = 0
            self.level = min(self.maximum, self.level + self.step_size)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"level": self.level, "best": self.best, "held": self.held}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        if set(state) != set(self.state_dict()):
            raise ValueError(
                f"Adaptive needs the state {sorted(self.state_dict())}, but the checkpoint holds {state}: {RESUME}"
            )
        if not self.start <= state["level"] <= self.maximum:
            raise ValueError(
                f"the checkpoint's compression level {state['level']} lies outside Adaptive.start "
                f"{self.start} to Adaptive.maximum {self.maximum}: widen them, or start a new run"
            )
        self.level, self.best, self.held = state["level"], state["best"], state["held"]


@dataclass(frozen=True)
class Spread(Schedule):
    """Draw each step's ratio uniformly from ``low`` (0 <= low < 1) to ``schedule``'s, so that small ones stay trained.

    The draw is a function of (``seed``, step): every rank and every resumed run draws the same. If ``schedule``'s ratio
    is at or below ``low``, it is used unchanged.
    """

    schedule: Schedule
    low: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_compression_ratio("Spread.low", self.low)
        check_at_least("Spread.seed", self.seed, 0)

    @override
    def ratio(self, step: int) -> float:
        high = self.schedule.ratio(step)
        if high <= self.low:
            return high
        return self.low + (high - self.low) * random_for("compression ratio", self.seed, step).random()

    @property
    @override
    def observes(self) -> bool:
        return self.schedule.observes

    @override
    def observe(self, perplexity: float) -> None:
        self.schedule.observe(perplexity)

    @override
    def state_dict(self) -> dict[str, Any]:
        return self.schedule.state_dict()

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.schedule.load_state_dict(state)
