"""Steps, hours and bytes of a training from its settings and the model's config; nothing is loaded."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from sparsekv_pl.models.duration import duration
from sparsekv_pl.models.memory_planner import gib
from sparsekv_pl.training.score_memory import uncounted
from sparsekv_pl.training.step_memory import StepMemory, Term, allowances
from sparsekv_pl.training.step_operations import row_operations
from sparsekv_pl.training.step_shape import ModelShape, StepShape

TFLOPS = 200.0
"""10^12 operations a second of one device: a fifth of what an H100 multiplies in bfloat16, for unfused kernels."""
SHORTEST_CHUNK = 256
"""Fewest tokens of a chunk that are proposed."""


@dataclass(frozen=True)
class TrainingPlan:
    """A run's cost on each of its devices."""

    model: ModelShape
    step: StepShape
    steps: int
    accumulated: int
    """Batches of a device in one optimizer step."""
    shortest_context: int
    """Fewest tokens of a context; lengths are drawn evenly up to the step's."""

    @property
    def memory(self) -> StepMemory:
        """The bytes of a step."""
        return StepMemory(self.model, self.step)

    @property
    def allowances(self) -> list[Term]:
        """Bytes beside tensors."""
        return allowances(self.step, self.memory.peak.bytes)

    @property
    def total_bytes(self) -> int:
        """Peak of one device."""
        return self.memory.total + sum(term.bytes for term in self.allowances)

    @property
    def rows(self) -> int:
        """Rows of an optimizer step, on all devices."""
        return self.step.rows * self.accumulated * self.step.devices

    @property
    def operations(self) -> dict[str, float]:
        """Operations of an optimizer step on all devices, by pass, at the mean context."""
        return {name: self.rows * count for name, count in row_operations(self.model, self.step, self.mean).items()}

    @property
    def mean(self) -> float:
        """Mean tokens of a context."""
        return (self.shortest_context + self.step.context_tokens) / 2

    @property
    def typical_step(self) -> StepShape:
        """The step at the mean context; contexts of different lengths run one after the other."""
        alike = self.shortest_context == self.step.context_tokens
        return replace(self.step, context_tokens=round(self.mean), rows=self.step.rows if alike else 1)

    def seconds(self, tflops: float) -> float:
        """Duration of an optimizer step if each device computes ``tflops`` 10^12 operations a second."""
        return sum(self.operations.values()) / (tflops * 1e12 * self.step.devices)

    def lines(self, limit: int, tflops: float, rate: str) -> list[str]:
        """Format the plan for devices with ``limit`` bytes; ``rate`` says where ``tflops`` comes from."""
        model, step, memory = self.model, self.step, self.memory
        tokens = self.rows * (self.mean + step.continuation_tokens)
        least = "" if self.shortest_context == step.context_tokens else f"{self.shortest_context:,} to "
        where = f"{step.devices} devices, {'sharded' if step.sharded else 'each with the whole model'}"
        lines = [
            f"{model.name}: {model.parameters / 1e9:.2f} B parameters, {model.trained / 1e6:.1f} M trained",
            f"{self.steps:,} steps of {self.rows} rows ({where if step.devices > 1 else 'one device'}), contexts of "
            f"{least}{step.context_tokens:,} tokens: {self.steps * tokens / 1e6:.1f} M tokens",
            "",
            "bytes of one device at the longest context",
            *map(_line, memory.always()),
            *map(_line, memory.peak.terms),
            *map(_line, self.allowances),
            f"{gib(self.total_bytes):>12}  in all, of {gib(limit)}; a step peaks at: {_peaks(memory)}",
            "",
            f"{sum(self.operations.values()) / 1e12:,.0f} TFLOP a step: {', '.join(self._passes())}",
            f"{duration(self.seconds(tflops))} a step, {duration(self.seconds(tflops) * self.steps)} in all, without "
            f"validation, at {tflops:,.3g} TFLOP/s a device ({rate})",
        ]
        if names := uncounted(step.scorers):
            lines.append(f"scores of {', '.join(names)} are counted as ExpectedAttention's, which hold most")
        return [*lines, self.verdict(limit)]

    def verdict(self, limit: int) -> str:
        """Return whether the plan fits ``limit`` bytes; if not, the settings that would."""
        if self.total_bytes <= limit:
            return f"fits: {gib(limit - self.total_bytes)} are left"
        sizes = [(settings, plan.total_bytes) for settings, plan in self.smaller()]
        found = "; or ".join(f"{settings} ({gib(size)})" for settings, size in sizes if size <= limit)
        fixes = f"these would: {found}" if found else "no shorter chunks, batches or contexts would either"
        return f"DOES NOT FIT: {gib(self.total_bytes - limit)} too much; {fixes}"

    def smaller(self) -> Iterator[tuple[str, "TrainingPlan"]]:
        """Yield settings that take less, with their plans: the mildest change first."""
        step, whole = self.step, self.step.chunk_tokens or self.step.context_tokens
        if step.rows > 1:
            yield (
                f"--data.batch_size 1 --trainer.accumulate_grad_batches {self.accumulated * step.rows}",
                replace(self, step=replace(step, rows=1), accumulated=self.accumulated * step.rows),
            )
        if step.dropout and not step.checkpoint:
            yield "--model.eviction.checkpoint true", replace(self, step=replace(step, checkpoint=True))
        cut = not (step.dropout or step.decoding or step.full_cache)  # what neither chunks nor checkpoints go with
        for chunk in (tokens for tokens in (2048, 1024, 512, SHORTEST_CHUNK) if cut and tokens < whole):
            yield (
                f"--model.eviction.chunk_tokens {chunk} --model.eviction.checkpoint true",
                replace(self, step=replace(step, chunk_tokens=chunk, checkpoint=True)),
            )
        shorter = step.context_tokens // 2
        if shorter >= SHORTEST_CHUNK and not step.turn_ends:
            shortest = min(self.shortest_context, shorter)
            made = replace(self, step=replace(step, context_tokens=shorter), shortest_context=shortest)
            yield f"--data.context_tokens {shorter}", made

    def _passes(self) -> list[str]:
        return [f"{name} {count / 1e12:,.1f}" for name, count in self.operations.items() if count]


def _line(term: Term) -> str:
    return f"{gib(term.bytes):>12}  {term.name}: {term.formula}"


def _peaks(memory: StepMemory) -> str:
    """Name the phase that holds most, and what the others hold."""
    peak = memory.peak
    others = ", ".join(f"{phase.name} {gib(phase.bytes)}" for phase in memory.phases() if phase.name != peak.name)
    return f"{peak.name} {gib(peak.bytes)} ({others})"
