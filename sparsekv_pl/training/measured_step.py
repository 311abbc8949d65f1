"""The operations a second of a training step on this machine, measured in a few random layers of the model."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from sparsekv_pl.eviction import Eviction
from sparsekv_pl.eviction.dropout import KVDropout
from sparsekv_pl.models.anchors import AnchorTable
from sparsekv_pl.models.batch import Batch, Supervised
from sparsekv_pl.models.lora import Lora, inject_lora
from sparsekv_pl.objectives import Objective
from sparsekv_pl.training.step_operations import row_operations
from sparsekv_pl.training.step_shape import ModelShape, StepShape
from sparsekv_pl.training.student import Student
from sparsekv_pl.training.teacher import Teacher

LAYERS = (2, 4)
"""Layers of the two models that are run. More layers take as much more each as those between the two."""
MOST_TOKENS = 1_024
"""Most tokens of all contexts that are run."""
RUNS = 2
"""Runs of each, of which the fastest counts."""


@dataclass(frozen=True)
class MeasuredStep:
    """What runs: a model of ``config`` with an adapter, and the training's own eviction and objective."""

    config: PreTrainedConfig
    lora: Lora
    eviction: Eviction
    objective: Objective

    def tflops(
        self, model: ModelShape, step: StepShape, device: torch.device, clock: Callable[[], float] = time.perf_counter
    ) -> float:
        """Return the 10^12 planned operations of ``model`` that ``device`` does in a second of ``step``.

        The step runs forwards and backwards, without optimizer, with weights in ``step.dtype`` (also where the run's
        have 4 bits). Raises ``ValueError`` for an objective or a press that cannot run in random layers.
        """
        few = _cut(step)
        short, longer = (min(self._seconds(layers, few, device, clock)) for layers in LAYERS)
        each = max(0.0, longer - short) / (LAYERS[1] - LAYERS[0])
        seconds = short + each * (model.layers - LAYERS[0])
        return few.rows * sum(row_operations(model, few).values()) / seconds / 1e12

    def _seconds(self, layers: int, step: StepShape, device: torch.device, clock: Callable[[], float]) -> list[float]:
        try:
            self.objective.check_layers(layers, range(layers))
            self.objective.prepare(Words())
            if isinstance(self.eviction, KVDropout):
                self.eviction.tokenizer = AnchorTable(*torch.zeros(2, 64, dtype=torch.bool))  # of batch_of's ids
            student, batch = self._student(layers, step.dtype, device), batch_of(step, device)
            return [_timed(student, batch, step, clock) for _ in range(RUNS)]
        except ValueError as error:
            raise ValueError(f"--tflops measure cannot run {layers} random layers ({error}): give a number") from error

    def _student(self, layers: int, dtype: torch.dtype, device: torch.device) -> Student:
        config = copy.deepcopy(self.config.get_text_config(decoder=True))
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
        with torch.random.fork_rng():
            model: Any = inject_lora(AutoModelForCausalLM.from_config(config, dtype=dtype), self.lora)
        model = model.to(device).train()
        return Student(model, self.eviction, Teacher(model), self.objective)


def batch_of(step: StepShape, device: torch.device | str = "cpu") -> Batch:
    """A batch of random tokens with the step's lengths and turns, all of its continuation supervised."""
    context, later, rows = step.context_tokens, step.continuation_tokens, step.rows
    ids = torch.randint(5, 60, (rows, context + later), device=device)
    columns = torch.arange(step.supervised, device=device).expand(rows, -1).clone()
    return Batch(
        context_ids=ids[:, :context],
        continuation_ids=ids[:, context:],
        labels=ids[:, context:].clone(),
        supervised=Supervised(columns, [step.supervised] * rows),
        turn_ends=[step.turn_ends] * rows,
        document_ids=[""] * rows,
        tasks=[""] * rows,
    )


class Words:
    """A stand-in for a tokenizer, whose texts an objective reads after a context."""

    @staticmethod
    def encode(text: str, **_: Any) -> list[int]:
        """Return an id per word."""
        return list(range(len(text.split())))


def _cut(step: StepShape) -> StepShape:
    """Shorten ``step`` to few rows and tokens."""
    context = min(step.context_tokens, MOST_TOKENS)
    return replace(step, context_tokens=context, rows=max(1, min(step.rows, MOST_TOKENS // context)))


def _timed(student: Student, batch: Batch, step: StepShape, clock: Callable[[], float]) -> float:
    """Return the seconds of one step."""
    device = batch["context_ids"].device
    start = clock()
    with torch.autocast(device.type, step.dtype, enabled=step.dtype != torch.float32):
        view, _ = student.view(batch, step.compression_ratio, 0)
        loss = student.objective(view)["loss"]
        loss.backward()
    loss.item()  # waits for a GPU
    return clock() - start
